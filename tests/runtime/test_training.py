"""Experts move with their Adam moments: training with migrations is training without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

importlib.import_module("torch._dynamo")  # an optimizer's first step imports it: once here, not once in every rank

from moesim.errors import ApplyError  # noqa: E402
from moesim.plan import Plan  # noqa: E402
from moesim.runtime import client  # noqa: E402
from tests.runtime.inside import inside, plan_of  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402
from tests.runtime.toys import Training, any_plan, joined, permuted  # noqa: E402

pytestmark = pytest.mark.dist
STEPS = 50


def train(rank: int, size: int, group: Any, folder: str, plans: dict[int, Plan]) -> Any:
    run = Training(permuted(size, None), rank=rank, group=group, store=torch.distributed.FileStore(f"{folder}/store", size))
    losses, moved = [], []
    for step in range(STEPS):
        if step in plans:
            before = run.experts()
            run.migrate(plans[step])
            moved.append((before, run.experts()))
        losses.append(run.step(step))
    return losses, run.experts(), run.weights(), moved


def result(folder: Path, name: str, ranks: int, plans: dict[int, Plan]) -> list[Any]:
    (folder / name).mkdir()
    return run_ranks(ranks, train, str(folder / name), plans, timeout_s=240)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_loss_of_50_steps_with_5_migrations_is_that_without(ranks: int, tmp_path: Path) -> None:
    at = (0, 1, 13, 24, 41)  # before there are any moments, after the first step, …
    plain = result(tmp_path, "plain", ranks, {})
    permutations = result(tmp_path, "permutations", ranks, {step: permuted(ranks, seed) for seed, step in enumerate(at)})
    replicas = result(tmp_path, "replicas", ranks, {step: any_plan(ranks, seed) for seed, step in enumerate(at)})
    assert permutations[0][0] == plain[0][0], "permutations change no bit"
    assert joined([rank[1] for rank in permutations]) == joined([rank[1] for rank in plain])
    assert replicas[0][0] == pytest.approx(plain[0][0], rel=1e-4)
    assert plain[0][0][-1] < plain[0][0][0]
    for run in (permutations, replicas):
        for index in range(len(at)):
            before, after = (joined([rank[3][index][side] for rank in run]) for side in (0, 1))
            assert before == after and all(len(copies) == 1 for copies in after.values()), "copies of an expert, with its moments, are the same bits"
    final = joined([rank[1] for rank in replicas])
    assert len(final) == 24 and all(len(copies) == 1 for copies in final.values())
    expected = {key: value for rank in plain for key, value in rank[2].items()}
    for rank in replicas:
        for key, value in rank[2].items():
            assert np.abs(value - expected[key]).max() <= 1e-3


def test_optimizers_that_are_not_at_the_same_step_are_refused(tmp_path: Path) -> None:
    assert pytest.importorskip("transformers", reason="the model needs transformers").AutoConfig  # here, or two threads import it at once
    with inside(tmp_path) as live:
        for rank, step in enumerate((3.0, 4.0)):
            layer = live.layers[rank][1]
            weight = torch.nn.Parameter(layer.down_proj)
            layer.down_proj = weight
            optimizer = torch.optim.Adam([weight])
            optimizer.state[weight] = {"step": torch.tensor(step), "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
            layer.rows.attach(optimizer)
        with pytest.raises(ApplyError, match=r"layer row 1: down_proj.step is 4.0 on rank 1 and 3.0 on rank 0; let every rank's optimizer take the same steps"):
            client.apply_plan(live.address, plan_of(1))
        assert live.maps() == {live.plan.map_sha256} and live.serves()
        optimizer.state[weight]["step"] -= 1
        assert client.apply_plan(live.address, plan_of(1))["status"] == "installed"
