"""Repair: the move budget is kept to the slot, more budget is never worse, and faults of a running plan are tolerated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.solvers.assignment import align_LS, assign, relabel_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.repair import knee
from moesim.solvers.result import FrontierPoint, make_result
from moesim.solvers.validate import validate
from tests.solvers.instances import lognormal, problems


def moved(problem: PlacementProblem, table: np.ndarray) -> int:
    assert problem.previous is not None
    return int((table != problem.previous).sum())


@settings(max_examples=25, deadline=None)
@given(problems(), st.integers(0, 2**31), st.integers(0, 12))
def test_the_budget_is_never_exceeded_and_never_hurts(problem: PlacementProblem, seed: int, budget: int) -> None:
    running = solve(problem, "random", seed=seed)
    kept = PlacementProblem(
        load_KLE=problem.load_KLE,
        num_ranks=problem.num_ranks,
        slots_per_rank_R=problem.slots_per_rank_R,
        device_speed_R=problem.device_speed_R,
        previous=running.slot_to_expert_LS,
        move_budget_slots=budget,
    )
    result = solve(kept, "repair")
    assert moved(kept, result.slot_to_expert_LS) <= budget
    assert result.value >= running.value * (1 - 1e-12)


def drifted(budget: int | None) -> PlacementProblem:
    generator = np.random.Generator(np.random.PCG64(1))
    load = lognormal(6, 64)
    running = solve(PlacementProblem(load_KLE=load, num_ranks=8, slots_per_rank_R=np.array(9)))
    return PlacementProblem(
        load_KLE=load * generator.lognormal(0, 0.4, load.shape),
        num_ranks=8,
        slots_per_rank_R=np.array(9),
        previous=running.slot_to_expert_LS,
        move_budget_slots=budget,
    )


def test_the_frontier_rises_and_every_budget_gives_what_it_promises() -> None:
    result = solve(drifted(400), "repair", options={"frontier": True})
    assert result.frontier is not None
    values = [point.value for point in result.frontier]
    assert values == sorted(set(values)) and len(values) > 10
    assert result.frontier[0].slots == 0 and result.frontier[-1].value == pytest.approx(result.value)
    for point in result.frontier:
        assert moved(drifted(0), point.slot_to_expert_LS) == point.slots
        validate(drifted(point.slots), make_result(drifted(point.slots), point.slot_to_expert_LS, solver="repair", status="FEASIBLE"))
    for point in result.frontier[1:4]:
        again = solve(drifted(point.slots), "repair")
        assert again.value >= point.value - 0.02


def test_the_knee_is_where_moves_begin_to_buy_less_than_average() -> None:
    table = np.zeros((1, 1))
    line = [FrontierPoint(slots=slots, value=value, slot_to_expert_LS=table) for slots, value in ((0, 0.5), (10, 0.8), (20, 0.86), (100, 0.9))]
    assert knee(line) == 2 and knee(line[:1]) == 0 and knee(line[:2]) == 1
    result = solve(drifted(None), "repair", options={"frontier": True})
    assert result.frontier is not None
    at = result.frontier[knee(result.frontier)]
    first, last = result.frontier[0], result.frontier[-1]
    assert (at.value - first.value) / (at.slots or 1) > (last.value - at.value) / max(last.slots - at.slots, 1)


@pytest.mark.parametrize("most", [0, 1, 17, 10**6])
def test_any_limit_on_the_placement_can_be_a_budget(most: int) -> None:
    problem = drifted(None)
    result = solve(problem, "repair", options={"fits": lambda table: moved(problem, table) <= most})
    assert moved(problem, result.slot_to_expert_LS) <= most
    assert result.value >= solve(drifted(min(most, 400)), "repair").value - 0.02


def test_few_moves_win_back_most_of_the_loss() -> None:
    unmoved, few, free = (solve(drifted(budget), "repair").value for budget in (0, 50, None))
    assert few > unmoved + 0.6 * (free - unmoved)


def test_a_budget_of_nothing_moves_nothing() -> None:
    problem = drifted(0)
    assert moved(problem, solve(problem, "repair").slot_to_expert_LS) == 0


def test_repair_without_a_limit_is_as_good_as_starting_afresh() -> None:
    problem = drifted(None)
    assert solve(problem, "repair").value >= solve(problem).value - 1e-4


def test_a_running_plan_with_duplicates_and_holes_can_be_repaired() -> None:
    previous = np.array([[0, 0, 1, 2, 3, -1]])
    loads = np.array([[5.0, 1.0, 1.0, 1.0]])
    for budget in (0, 1, 2, 6):
        problem = PlacementProblem(load_KLE=loads, num_ranks=2, slots_per_rank_R=np.array(3), previous=previous, move_budget_slots=budget)
        assert moved(problem, solve(problem, "repair").slot_to_expert_LS) <= budget


def test_a_solver_that_ignores_budgets_refuses_one() -> None:
    with pytest.raises(InputError, match="cannot keep a budget of 5 moved slots"):
        solve(drifted(5), "greedy")
    with pytest.raises(InputError, match="--from PLAN"):
        solve(PlacementProblem(load_KLE=np.ones((1, 4)), num_ranks=2, slots_per_rank_R=np.array(2)), "repair")


def least_cost(cost: np.ndarray) -> float:
    """Return the least assignment cost by dynamic programming over sets of columns."""
    size = len(cost)
    best = {0: 0.0}
    for row in range(size):
        following: dict[int, float] = {}
        for used, total in best.items():
            for column in range(size):
                if not used >> column & 1:
                    key = used | 1 << column
                    following[key] = min(following.get(key, np.inf), total + cost[row, column])
        best = following
    return best[(1 << size) - 1]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_assignment_is_optimal(size: int) -> None:
    generator = np.random.Generator(np.random.PCG64(size))
    for ties in (True, False) * 20:
        cost = -generator.integers(0, 6, (size, size)).astype(float) if ties else generator.normal(size=(size, size))
        columns = assign(cost)
        assert sorted(columns) == list(range(size))
        assert cost[np.arange(size), columns].sum() == pytest.approx(least_cost(cost))


@settings(max_examples=60, deadline=None)
@given(problems(even=True), st.integers(0, 2**31))
def test_relabelling_keeps_the_placement_and_moves_no_more_slots(problem: PlacementProblem, seed: int) -> None:
    first, second = solve(problem, "random", seed=seed), solve(problem, "random", seed=seed + 1)
    target = PlacementProblem(
        load_KLE=problem.load_KLE,
        num_ranks=problem.num_ranks,
        slots_per_rank_R=problem.slots_per_rank_R,
        device_speed_R=problem.device_speed_R,
        previous=first.slot_to_expert_LS,
    )
    named = relabel_LS(target, second.slot_to_expert_LS)
    assert moved(target, named) <= moved(target, align_LS(second.slot_to_expert_LS, first.slot_to_expert_LS, problem.slots_per_rank_R))
    for before, after in zip(second.slot_to_expert_LS, named, strict=True):
        slots = int(problem.slots_per_rank_R[0])
        assert sorted(sorted(rank) for rank in before.reshape(-1, slots).tolist()) == sorted(sorted(rank) for rank in after.reshape(-1, slots).tolist())


def test_renamed_ranks_cost_nothing() -> None:
    running = solve(PlacementProblem(load_KLE=lognormal(2, 32), num_ranks=8, slots_per_rank_R=np.array(5))).slot_to_expert_LS
    order = np.random.Generator(np.random.PCG64(4)).permutation(8)
    shuffled = running.reshape(2, 8, 5)[:, order].reshape(2, 40)
    problem = PlacementProblem(load_KLE=lognormal(2, 32), num_ranks=8, slots_per_rank_R=np.array(5), previous=running)
    assert np.array_equal(relabel_LS(problem, shuffled), running)
