"""The validator: an honest answer passes, every lie is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.validate import CheckError, validate
from tests.solvers.instances import lognormal

PROBLEM = PlacementProblem(load_KLE=lognormal(2, 8), num_ranks=3, slots_per_rank_R=np.array([4, 3, 3]))


def table_with(layer: int, slot: int, expert: int) -> np.ndarray:
    table = np.array(solve(PROBLEM).slot_to_expert_LS)
    table[layer, slot] = expert
    return table


def test_an_honest_answer_passes() -> None:
    validate(PROBLEM, solve(PROBLEM))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": 0.999}, "value"),
        ({"bound": 0.1}, "bound"),
        ({"bound": 1.5}, "bound"),
        ({"gap": 0.0}, "gap"),
        ({"status": "OPTIMAL"}, "OPTIMAL"),
        ({"status": "PROVEN"}, "status"),
        ({"slot_to_expert_LS": np.zeros((2, 9), dtype=np.int32)}, "shape"),
        ({"slot_to_expert_LS": table_with(0, 0, 8)}, "expert in layer 0"),
        ({"slot_to_expert_LS": table_with(1, 0, -1)}, "empty slots|no slot for expert"),
    ],
)
def test_a_lie_is_refused(change: dict[str, Any], words: str) -> None:
    honest = solve(PROBLEM)
    assert honest.gap > 1e-6
    with pytest.raises(CheckError, match=words):
        validate(PROBLEM, replace(honest, **change))


def test_a_missing_expert_is_named() -> None:
    table = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]] * 2, dtype=np.int32)
    with pytest.raises(CheckError, match=r"layer 0 has no slot for expert 4 \(4 missing"):
        validate(PROBLEM, replace(solve(PROBLEM), slot_to_expert_LS=table))


def test_an_expert_twice_on_a_rank_is_refused_unless_allowed() -> None:
    table = np.array([[0, 0, 1, 2, 3, 4, 5, 6, 7, 1]] * 2, dtype=np.int32)
    with pytest.raises(CheckError, match="rank 0 holds expert 0 2 times in layer 0"):
        validate(PROBLEM, replace(solve(PROBLEM), slot_to_expert_LS=table))
    with pytest.raises(CheckError, match="value"):
        validate(PROBLEM, replace(solve(PROBLEM), slot_to_expert_LS=table), may_duplicate=True)


def test_a_broken_budget_is_refused() -> None:
    running = solve(PROBLEM, "linear").slot_to_expert_LS
    tight = PlacementProblem(load_KLE=PROBLEM.load_KLE, num_ranks=3, slots_per_rank_R=PROBLEM.slots_per_rank_R, previous=running, move_budget_slots=1)
    with pytest.raises(CheckError, match="budget of 1"):
        validate(tight, solve(PROBLEM))


def test_shares_must_sum_to_one() -> None:
    honest = solve(PROBLEM)
    with pytest.raises(CheckError, match="must sum to 1"):
        validate(PROBLEM, replace(honest, share_LS=np.full(honest.slot_to_expert_LS.shape, 0.4)))
