"""Redundancy for a target: the fewest slots that reach it, against trying every size by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.errors import InfeasibleError, InputError
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.redundancy import redundancy_for
from moesim.solvers.registry import validate
from tests.solvers.instances import brute_force_cost, zipf


def problem_of(load: np.ndarray, ranks: int) -> PlacementProblem:
    return PlacementProblem(load_KLE=load, num_ranks=ranks, slots_per_rank_R=np.array(-(-load.shape[-1] // ranks)))


@pytest.mark.parametrize("target", [0.6, 0.8, 0.9, 0.97])
@pytest.mark.parametrize("load", [[60.0, 20.0, 10.0, 5.0, 5.0], [9.0, 8.0, 3.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0, 4.0]])
def test_the_slots_are_the_fewest_that_any_placement_needs(load: list[float], target: float) -> None:
    load_E, ranks = np.array(load), 3
    best = {slots: load_E.sum() / ranks / brute_force_cost(load_E, [slots] * ranks, [1.0] * ranks) for slots in range(2, 6)}
    enough = [slots for slots, value in best.items() if value >= target]
    found = redundancy_for(problem_of(load_E[None], ranks), target)
    assert found.slots_per_rank == enough[0]
    assert found.redundant == enough[0] * ranks - 5
    assert found.least_possible <= enough[0]
    assert found.result.value >= target


def test_the_plan_holds_and_every_smaller_size_was_tried() -> None:
    problem = problem_of(zipf(3, 64, 1.0), 16)
    found = redundancy_for(problem, 0.95)
    sized = PlacementProblem(load_KLE=problem.load_KLE, num_ranks=16, slots_per_rank_R=np.array(found.slots_per_rank))
    validate(sized, found.result)
    assert [slots for slots, _, _ in found.tried] == list(range(4, found.slots_per_rank + 1))
    assert all(value < 0.95 and value <= bound for _, value, bound in found.tried[:-1])
    assert all(bound < 0.95 for slots, _, bound in found.tried if slots < found.least_possible)


def test_a_target_out_of_reach_is_named_with_the_best_found() -> None:
    # four experts on three ranks: at two slots per rank two of them cannot be halved
    with pytest.raises(InfeasibleError, match="up to 2 slots per rank reaches 0.99; best 0.9"):
        redundancy_for(problem_of(np.array([[9.0, 8.0, 7.0, 6.0]]), 3), 0.99, most=2)
    with pytest.raises(InfeasibleError, match="time ran out at 2"):
        redundancy_for(problem_of(np.ones((1, 4)), 2), 0.9, deadline=lambda: 0.0)


@pytest.mark.parametrize("target", [0.0, 1.5, float("nan")])
def test_a_target_that_is_no_balance_is_refused(target: float) -> None:
    with pytest.raises(InputError, match="balance in 0..1"):
        redundancy_for(problem_of(np.ones((1, 4)), 2), target)


def test_a_running_placement_is_refused() -> None:
    problem = PlacementProblem(load_KLE=np.ones((1, 4)), num_ranks=2, slots_per_rank_R=np.array(2), previous=np.array([[0, 1, 2, 3]]))
    with pytest.raises(InputError, match="running placement"):
        redundancy_for(problem, 0.9)
