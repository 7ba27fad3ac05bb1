"""Problems whose layers have unequally many experts: against brute force, against the same problem without padding, and their checks."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.plan import linear
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.dispatch import solve_dispatch
from moesim.solvers.objective import Decode, Objective
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import recount
from moesim.solvers.registry import SOLVERS, solve, to_plan
from moesim.solvers.validate import CheckError, validate


@st.composite
def uneven(draw: st.DrawFn, max_windows: int = 1) -> PlacementProblem:
    """Draw a small problem whose largest layer sets the slots."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    experts, ranks, windows = max(counts), draw(st.integers(1, 3)), draw(st.integers(1, max_windows))
    slots = [draw(st.integers(0, 3)) for _ in range(ranks)]
    while sum(min(one, experts) for one in slots) < experts:
        slots[slots.index(min(slots))] += 1
    load = np.array(draw(st.lists(st.integers(0, 40), min_size=windows * len(counts) * experts, max_size=windows * len(counts) * experts)), dtype=float)
    load = load.reshape(windows, len(counts), experts) * (np.arange(experts) < np.array(counts)[:, None])
    return PlacementProblem(load_KLE=load, num_ranks=ranks, slots_per_rank_R=np.array(slots), experts_L=tuple(counts))


def least_cost(problem: PlacementProblem, layer: int, weight_K: np.ndarray) -> float:
    """Return the least Σ_k weight · load of the fullest rank of a layer over all placements that fill its slots."""
    fill, load = problem.fill_LR[layer].tolist(), problem.load_KLE[:, layer]
    experts = problem.num_experts if problem.experts_L is None else problem.experts_L[layer]
    best = np.inf
    for held in itertools.product(*(list(itertools.combinations(range(experts), count)) for count in fill)):
        copies = np.bincount([expert for one in held for expert in one], minlength=experts)
        if copies.all():
            rank_RK = np.stack([sum((load[:, expert] / copies[expert] for expert in one), np.zeros(len(load))) for one in held])
            best = min(best, float(weight_K @ rank_RK.max(axis=0)))
    return best


def test_a_smaller_layer_has_as_many_extra_slots_as_the_largest_spread_evenly() -> None:
    load = np.ones((3, 8)) * (np.arange(8) < np.array([[4], [8], [2]]))
    problem = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(3), experts_L=(4, 8, 2))
    assert problem.fill_LR.tolist() == [[2, 2, 2, 2], [3, 3, 3, 3], [2, 2, 1, 1]]
    tight = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array([1, 1, 3, 3]), experts_L=(4, 8, 2))
    assert tight.fill_LR.tolist() == [[1, 1, 1, 1], [1, 1, 3, 3], [1, 1, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(problem=uneven())
def test_bounds_and_exact_plans_agree_with_brute_force(problem: PlacementProblem) -> None:
    best = np.array([least_cost(problem, layer, np.ones(1)) for layer in range(problem.num_layers)])
    assert (layer_bound_KL(problem)[0] <= best * (1 + 1e-9)).all()
    ideal = problem.load_KLE.sum() / problem.num_ranks
    optimum = ideal / best.sum() if best.sum() > 0 else 1.0
    result = solve(problem, "milp")
    assert result.status == "OPTIMAL" and result.value == pytest.approx(optimum)
    assert result.bound >= optimum * (1 - 1e-9)
    assert optimum * (1 + 1e-9) >= solve(problem, "greedy").value


@settings(max_examples=30, deadline=None)
@given(problem=uneven(max_windows=3))
def test_parts_weigh_windows_as_the_whole_does(problem: PlacementProblem) -> None:
    total_K = problem.load_KLE.sum(axis=(1, 2))
    assume(problem.num_windows > 1 and (total_K > 0).all())
    weight_K = problem.num_ranks / total_K / problem.num_windows
    optimum = 1 / sum(least_cost(problem, layer, weight_K) for layer in range(problem.num_layers))
    result = solve(problem, "milp")
    assert result.status == "OPTIMAL" and result.value == pytest.approx(optimum)


@settings(max_examples=12, deadline=None)
@given(problem=uneven(max_windows=3), seed=st.integers(0, 3))
def test_every_solver_fills_what_a_layer_fills_and_nothing_that_it_lacks(problem: PlacementProblem, seed: int) -> None:
    unequal = (np.diff(problem.fill_LR, axis=1) != 0).any() or (np.diff(problem.slots_per_rank_R) != 0).any()
    for name in sorted(set(SOLVERS) - {"repair", "affinity", "milp", "cp-sat"}):
        if unequal and name.startswith("eplb"):
            continue  # EPLB wants equally many slots on all ranks
        table = solve(problem, name, seed=seed).slot_to_expert_LS  # checked independently
        for row, count in zip(table, problem.experts_L or (problem.num_experts,) * len(table), strict=True):
            assert set(row.tolist()) - {-1} == set(range(count))


def test_padding_changes_nothing() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    load = generator.integers(1, 100, (2, 3, 6)).astype(float)
    plain = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(2))
    padded = PlacementProblem(load_KLE=np.pad(load, ((0, 0), (0, 0), (0, 2))), num_ranks=4, slots_per_rank_R=np.array([3, 3, 2, 2]), experts_L=(6, 6, 6))
    assert padded.fill_LR.tolist() == [[2, 2, 2, 2]] * 3
    for name in ("greedy", "eplb", "linear", "random"):
        one, other = solve(plain, name), solve(padded, name)
        assert (one.value, one.bound) == pytest.approx((other.value, other.bound)) and one.status == other.status
        assert np.array_equal(one.slot_to_expert_LS.reshape(3, 4, 2), np.stack([other.slot_to_expert_LS[:, at : at + 2] for at in (0, 3, 6, 8)], axis=1))
    assert PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(2), experts_L=(6, 6, 6)).experts_L is None


@pytest.mark.parametrize("text", ["activated", "latency", "balance+activated:0.4"])
def test_objectives_are_recounted_on_unequal_layers(text: str) -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    load = generator.integers(1, 100, (2, 3, 8)) * (np.arange(8) < np.array([[4], [8], [6]]))
    objective = Objective.parse(
        text, decode=Decode(tokens=16, top_k=2), expert_seconds=lambda tokens, mask: (tokens * 1e-6 + 1e-5 * (mask & (tokens > 0))).sum(axis=2)
    )
    problem = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(3), experts_L=(4, 8, 6), objective=objective)
    result = solve(problem)
    assert recount(problem, result.slot_to_expert_LS.tolist()) == pytest.approx(result.cost)  # type: ignore[attr-defined]
    assert result.cost <= recount(problem, solve(replace(problem), "linear").slot_to_expert_LS.tolist()) * (1 + 1e-9)  # type: ignore[attr-defined]


@settings(max_examples=40, deadline=None)
@given(problem=uneven(), budget=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_repair_keeps_its_budget_over_all_layers(problem: PlacementProblem, budget: int, seed: int) -> None:
    running = solve(problem, "random", seed=seed)
    asked = replace(problem, previous=running.slot_to_expert_LS, move_budget_slots=budget)
    repaired = solve(asked, options={"frontier": True})
    assert int((repaired.slot_to_expert_LS != running.slot_to_expert_LS).sum()) <= budget
    assert repaired.value >= running.value * (1 - 1e-12)
    values = [point.value for point in repaired.frontier or ()]
    assert values == sorted(values)
    far = solve(replace(asked, move_budget_slots=1000))
    assert far.value >= repaired.value * (1 - 1e-9)
    assert far.value >= solve(problem, "greedy").value * (1 - 1e-9)


def test_a_budget_goes_where_it_buys_most() -> None:
    load = np.array([[10.0, 10, 0, 0, 0, 0], [9, 1, 9, 1, 5, 5]])
    problem = PlacementProblem(load_KLE=load, num_ranks=2, slots_per_rank_R=np.array(3), experts_L=(2, 6))
    running = np.array([[0, -1, -1, 1, -1, -1], [0, 2, 4, 1, 3, 5]])
    repaired = solve(replace(problem, previous=running, move_budget_slots=2))
    assert (repaired.slot_to_expert_LS[0] == running[0]).all() and (repaired.slot_to_expert_LS[1] != running[1]).sum() == 2


def test_the_validator_sees_absent_experts_and_other_slots() -> None:
    load = np.ones((2, 4)) * (np.arange(4) < np.array([[2], [4]]))
    problem = PlacementProblem(load_KLE=load, num_ranks=2, slots_per_rank_R=np.array(2), experts_L=(2, 4))
    good = solve(problem, "greedy")
    assert (good.slot_to_expert_LS[0] >= 0).sum() == 2
    table = good.slot_to_expert_LS.copy()
    table[0, 1] = 3
    with pytest.raises(CheckError, match="expert in layer 0"):
        validate(problem, replace(good, slot_to_expert_LS=table))
    table[0, 1] = 1 - table[0, 0]
    with pytest.raises(CheckError, match="filled slots of rank 0 in layer 0"):
        validate(problem, replace(good, slot_to_expert_LS=table))


def test_loads_of_absent_experts_and_traffic_are_refused() -> None:
    with pytest.raises(InputError, match="layer 0, expert 2 = 1.0 must be 0: the layer has 2 experts"):
        PlacementProblem(load_KLE=np.ones((2, 4)), num_ranks=2, slots_per_rank_R=np.array(2), experts_L=(2, 4))
    with pytest.raises(InputError, match="must have one count per MoE layer, 2"):
        PlacementProblem(load_KLE=np.zeros((2, 4)), num_ranks=2, slots_per_rank_R=np.array(2), experts_L=(2,))
    with pytest.raises(InputError, match="must divide"):
        PlacementProblem(load_KLE=np.zeros((2, 4)), num_ranks=2, slots_per_rank_R=np.array(2), experts_L=(2, 4), num_groups=4)


@pytest.mark.parametrize("method", ["equal", "fast", "lp"])
def test_shares_of_unequal_layers_are_as_good_as_without_padding(method: str) -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    load = generator.integers(1, 100, (2, 6)) * (np.arange(6) < np.array([[3], [6]]))
    problem = PlacementProblem(load_KLE=load, num_ranks=3, slots_per_rank_R=np.array(3), experts_L=(3, 6))
    plan = to_plan(solve(problem, "greedy"), model="m", num_experts=6, moe_layer_ids=(0, 1), num_ranks=3, experts_L=(3, 6))
    result = solve_dispatch(plan, load, method)
    assert replace(plan, share_LS=result.share_LS).rank_load_LR(load).max(axis=1) == pytest.approx(result.time_L)
    small = PlacementProblem(load_KLE=load[:1, :3], num_ranks=3, slots_per_rank_R=np.array(2))
    alone = to_plan(solve(small, "greedy"), model="m", num_experts=3, moe_layer_ids=(0,), num_ranks=3)
    assert solve_dispatch(alone, load[:1, :3], method).value == pytest.approx(result.time_L[0])


def test_linear_placement_fills_what_a_problem_without_extra_slots_fills() -> None:
    for ranks in (3, 4, 8):
        plan = linear(model="m", num_experts=12, moe_layer_ids=(0, 1, 2), num_ranks=ranks, experts_L=(5, 12, 8))
        load = plan.present_LE.astype(float)
        problem = PlacementProblem(load_KLE=load, num_ranks=ranks, slots_per_rank_R=np.bincount(plan.slot_rank_S), experts_L=(5, 12, 8))
        filled = np.stack([np.bincount(plan.slot_rank_S, row >= 0, minlength=ranks) for row in plan.slot_to_expert_LS])
        assert np.array_equal(filled, problem.fill_LR)
