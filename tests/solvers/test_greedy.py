"""The greedy solver: never worse than its bound says, close to optimal, indifferent to names, repeatable."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from tests.solvers.instances import brute_force_cost, lognormal, problems, zipf


@settings(max_examples=30, deadline=None)
@given(problems(faults=True))
def test_every_problem_gets_a_placement_that_passes_the_check(problem: PlacementProblem) -> None:
    result = solve(problem)
    assert result.value <= result.bound
    assert result.status in ("OPTIMAL", "FEASIBLE")


@settings(max_examples=12, deadline=None)
@given(problems(max_windows=3), st.sampled_from(["mean", "worst", "cvar:0.5"]))
def test_every_problem_with_windows_passes_the_check(problem: PlacementProblem, risk: str) -> None:
    assert solve(problem, options={"risk": risk}).value > 0


@pytest.mark.parametrize("seed", range(12))
def test_small_problems_are_within_a_percent_of_brute_force(seed: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    load = generator.lognormal(0, 0.8, 6)
    slots = [[3, 3, 3], [4, 3, 2], [2, 2, 2], [3, 2, 2]][seed % 4]
    speed = [1.0, 1.0, 1.0] if seed % 3 else [1.0, 1.5, 0.5]
    problem = PlacementProblem(load_KLE=load[None], num_ranks=3, slots_per_rank_R=np.array(slots), device_speed_R=np.array(speed))
    best = load.sum() / sum(speed) / brute_force_cost(load, slots, speed)
    result = solve(problem)
    assert result.value <= best * (1 + 1e-9) <= result.bound * (1 + 1e-9)
    assert result.value >= 0.99 * best


@settings(max_examples=10, deadline=None)
@given(problems(max_windows=2), st.randoms(use_true_random=False))
def test_renaming_experts_leaves_the_value_unchanged(problem: PlacementProblem, random: object) -> None:
    order = np.random.Generator(np.random.PCG64(7)).permutation(problem.num_experts)
    renamed = PlacementProblem(
        load_KLE=problem.load_KLE[:, :, order], num_ranks=problem.num_ranks, slots_per_rank_R=problem.slots_per_rank_R, device_speed_R=problem.device_speed_R
    )
    assert solve(renamed).value == pytest.approx(solve(problem).value, rel=1e-12)


@pytest.mark.parametrize("seed", [4, 14, 36, 42])
def test_renaming_experts_leaves_the_value_unchanged_where_copies_tie(seed: int) -> None:
    # loads are powers of two: a halved expert ties with a whole one, and only an order that ignores names breaks such ties alike
    generator = np.random.Generator(np.random.PCG64(seed))
    load = 2.0 ** generator.integers(0, 5, (3, 10))
    order = generator.permutation(10)
    values = [solve(PlacementProblem(load_KLE=one, num_ranks=4, slots_per_rank_R=np.array(3))).value for one in (load, load[:, order])]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_uniform_load_has_nothing_to_gain() -> None:
    problem = PlacementProblem(load_KLE=np.full((3, 64), 5.0), num_ranks=8, slots_per_rank_R=np.array(8))
    linear, greedy = solve(problem, "linear"), solve(problem)
    assert linear.value == greedy.value == 1.0
    assert greedy.status == "OPTIMAL"


def test_no_load_at_all_is_balanced() -> None:
    result = solve(PlacementProblem(load_KLE=np.zeros((2, 8)), num_ranks=2, slots_per_rank_R=np.array(5)))
    assert result.value == result.bound == 1.0


@pytest.mark.parametrize(
    "load", [zipf(6, 256, 0.6), zipf(6, 256, 1.0), zipf(6, 256, 1.2), lognormal(6, 256)], ids=["zipf0.6", "zipf1.0", "zipf1.2", "lognormal"]
)
@pytest.mark.parametrize(("ranks", "slots", "floor"), [(32, 9, 0.9985), (64, 5, 0.998)])
def test_deepseek_scale_reaches_the_bound(load: np.ndarray, ranks: int, slots: int, floor: float) -> None:
    result = solve(PlacementProblem(load_KLE=load, num_ranks=ranks, slots_per_rank_R=np.array(slots)))
    assert 1 - result.gap >= floor


def test_the_same_input_gives_the_same_bytes() -> None:
    load = lognormal(4, 64)
    first, second = (solve(PlacementProblem(load_KLE=load, num_ranks=8, slots_per_rank_R=np.array(9)), seed=3) for _ in range(2))
    assert first.slot_to_expert_LS.tobytes() == second.slot_to_expert_LS.tobytes()
    assert (first.value, first.iterations) == (second.value, second.iterations)


def test_a_deadline_already_past_still_gives_a_valid_placement_and_says_so() -> None:
    problem = PlacementProblem(load_KLE=lognormal(4, 64), num_ranks=8, slots_per_rank_R=np.array(9))
    cut, whole = solve(problem, deadline=lambda: -1.0), solve(problem)
    assert cut.status == "TIME_LIMIT"
    assert cut.value < whole.value <= whole.bound <= cut.bound


def test_a_faster_rank_gets_more_load() -> None:
    problem = PlacementProblem(load_KLE=np.ones((1, 12)), num_ranks=2, slots_per_rank_R=np.array([8, 4]), device_speed_R=np.array([2.0, 1.0]))
    result = solve(problem)
    assert result.value == 1.0


def test_slots_beyond_one_per_expert_stay_empty() -> None:
    result = solve(PlacementProblem(load_KLE=np.ones((1, 3)), num_ranks=2, slots_per_rank_R=np.array(5)))
    assert (result.slot_to_expert_LS < 0).sum() == 4


def test_previous_names_are_kept_where_it_costs_nothing() -> None:
    load = lognormal(3, 32)
    arguments: dict[str, Any] = {"load_KLE": load, "num_ranks": 4, "slots_per_rank_R": np.array(10)}
    first = solve(PlacementProblem(**arguments))
    again = solve(PlacementProblem(**arguments, previous=first.slot_to_expert_LS))
    assert np.array_equal(first.slot_to_expert_LS, again.slot_to_expert_LS)


def test_robust_planning_beats_planning_on_the_summed_load() -> None:
    load = np.stack([lognormal(3, 32, seed) for seed in range(4)])
    arguments: dict[str, Any] = {"num_ranks": 8, "slots_per_rank_R": np.array(6)}
    problem = PlacementProblem(load_KLE=load, **arguments)
    robust = solve(problem)
    summed = solve(PlacementProblem(load_KLE=load.sum(axis=0), **arguments))
    kept = solve(PlacementProblem(load_KLE=load, **arguments, previous=summed.slot_to_expert_LS, move_budget_slots=0), "repair")
    assert robust.objective == "robust:mean"
    assert robust.value > kept.value + 0.02


def test_the_worst_window_is_better_under_the_worst_case_objective() -> None:
    load = np.stack([lognormal(1, 24, seed) for seed in range(3)])
    problem = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(7), window_weight_K=np.array([0.8, 0.15, 0.05]))
    mean, worst = solve(problem), solve(problem, options={"risk": "worst"})
    kept = PlacementProblem(
        load_KLE=load,
        num_ranks=4,
        slots_per_rank_R=np.array(7),
        window_weight_K=np.array([0.8, 0.15, 0.05]),
        previous=mean.slot_to_expert_LS,
        move_budget_slots=0,
    )
    assert worst.value > solve(kept, "repair", options={"risk": "worst"}).value
