"""Experts move with their Adam moments: training with migrations is training without them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

importlib.import_module("torch._dynamo")  # an optimizer's first step imports it: once here, not once in every rank

from moesim.plan import Plan  # noqa: E402
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
