"""Whatever the plan, the data type and the number of ranks: permutations change no bit of outputs and of a training step, replicas only the last ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

importlib.import_module("torch._dynamo")  # an optimizer's first step imports it: once here, not once in every rank

from tests.runtime.ranks import run_ranks  # noqa: E402
from tests.runtime.toys import Training, any_plan, joined, permuted  # noqa: E402

pytestmark = pytest.mark.dist
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}
"""Of outputs and weights, relative to the largest output and in units of the largest step of a weight."""


def one_plan(rank: int, size: int, group: Any, folder: str, dtype: str, plans: list[Any]) -> list[Any]:
    answers = []
    for number, plan in enumerate(plans):
        store = torch.distributed.FileStore(f"{folder}/{number}", size)
        run = Training(permuted(size, None), rank=rank, group=group, store=store, dtype=getattr(torch, dtype))
        run.step(0)  # so that there are moments to move
        before = run.experts()
        if plan is not None:
            run.migrate(plan)
        after = run.experts()
        output = run.forward(1).numpy()
        loss = run.step(2)
        answers.append((before, after, output, loss, run.experts(), run.weights()))
    return answers


def check(folder: Path, ranks: int, dtype: str, seeds: range) -> int:
    """Compare plans with the plain order; return how many were compared."""
    permutations, replicas = [permuted(ranks, seed) for seed in seeds], [any_plan(ranks, seed) for seed in seeds]
    answers = run_ranks(ranks, one_plan, str(folder), dtype, [None, *permutations, *replicas], timeout_s=500)
    start, weights = joined([answer[0][0] for answer in answers]), {key: value for answer in answers for key, value in answer[0][5].items()}
    assert len(start) == 24 and all(len(copies) == 1 for copies in start.values())
    for index in range(1, 1 + 2 * len(seeds)):
        assert joined([answer[index][0] for answer in answers]) == start
        assert joined([answer[index][1] for answer in answers]) == start, "every expert and its moments arrived whole, all copies alike"
        trained = joined([answer[index][4] for answer in answers])
        assert all(len(copies) == 1 for copies in trained.values()), "copies stay alike in training"
        exact = index <= len(seeds)
        if exact:
            assert trained == joined([answer[0][4] for answer in answers])
        for answer in answers:
            _, _, output, loss, _, held = answer[index]
            plain = answer[0][2]
            if exact:
                assert output.tobytes() == plain.tobytes() and loss == answer[0][3]
            else:
                assert np.abs(output - plain).max(initial=0) <= TOLERANCE[dtype] * max(np.abs(plain).max(initial=0), 1)
                assert loss == pytest.approx(answer[0][3], rel=TOLERANCE[dtype])
                assert max(np.abs(value - weights[key]).max() for key, value in held.items()) <= TOLERANCE[dtype]
    return 2 * len(seeds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_random_plans_change_nothing_but_rounding(ranks: int, dtype: str, tmp_path: Path) -> None:
    assert check(tmp_path, ranks, dtype, range(1 if ranks == 8 else 2)) in (2, 4)  # 20 plans over all cases


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_200_random_plans_change_nothing_but_rounding(ranks: int, dtype: str, tmp_path: Path) -> None:
    assert check(tmp_path, ranks, dtype, range(100, 117)) == 34
