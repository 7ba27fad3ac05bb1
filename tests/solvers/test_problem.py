"""A problem that cannot be solved or makes no sense is refused with the smallest rule it breaks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moesim.errors import InfeasibleError, InputError
from moesim.plan import Plan
from moesim.solvers import metrics
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import SOLVERS, register, solve, to_plan
from tests.solvers.instances import lognormal


def build(**changes: Any) -> PlacementProblem:
    return PlacementProblem(**{"load_KLE": np.ones((2, 6)), "num_ranks": 2, "slots_per_rank_R": np.array(3), **changes})


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"slots_per_rank_R": np.array(2)}, InfeasibleError, r"needs 6 slots.*give 4: 2 missing per layer"),
        ({"slots_per_rank_R": np.array([9, 0])}, None, ""),
        ({"slots_per_rank_R": np.array([5, 0])}, InfeasibleError, "1 missing per layer, first in layer 0"),
        ({"load_KLE": np.array([[1.0, np.nan]])}, InputError, "window 0, layer 0, expert 1"),
        ({"load_KLE": np.array([[[1.0, 1.0]], [[1.0, -2.0]]])}, InputError, r"window 1, layer 0, expert 1 = -2\.0 must be finite and >= 0"),
        ({"load_KLE": np.ones(4)}, InputError, "load shape"),
        ({"num_ranks": 0}, InputError, "num_ranks"),
        ({"slots_per_rank_R": np.array([3, 3, 3])}, InputError, "slots_per_rank"),
        ({"slots_per_rank_R": np.array([3.5, 3.5])}, InputError, "integers"),
        ({"device_speed_R": np.array([1.0, 0.0])}, InputError, "device_speed"),
        ({"window_weight_K": np.array([0.0])}, InputError, "window_weight"),
        ({"num_groups": 4}, InputError, "num_groups"),
        ({"num_ranks": 4, "ranks_per_node": 3}, InputError, "ranks_per_node"),
        ({"move_budget_slots": 3}, InputError, "needs a previous placement"),
        ({"previous": np.zeros((2, 6), dtype=int)}, InputError, "no slot for expert 1 in layer 0"),
        ({"previous": np.zeros((2, 5), dtype=int)}, InputError, "previous shape"),
        ({"previous": np.full((2, 6), 7)}, InputError, "previous"),
    ],
)
def test_a_broken_rule_is_named(changes: dict[str, Any], error: type[Exception] | None, words: str) -> None:
    if error is None:
        build(**changes)
        return
    with pytest.raises(error, match=words):
        build(**changes)


def test_slots_that_no_expert_may_use_do_not_count() -> None:
    with pytest.raises(InfeasibleError, match=r"give 5: 7 missing"):
        build(load_KLE=np.ones((1, 12)), num_ranks=1, slots_per_rank_R=np.array(5))
    assert build(load_KLE=np.ones((1, 3)), num_ranks=2, slots_per_rank_R=np.array(5)).fill_R.tolist() == [3, 3]


def test_an_unknown_solver_or_option_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'greedy'"):
        solve(build(), "gredy")
    with pytest.raises(InputError, match="option"):
        solve(build(), options={"speed": 11})
    with pytest.raises(InputError, match="must be an integer in 0"):
        solve(build(), options={"rounds": -1})
    with pytest.raises(InputError, match="mean, worst or cvar"):
        solve(build(load_KLE=np.ones((2, 1, 6))), options={"risk": "cvar:2"})


def test_a_user_can_add_a_solver() -> None:
    register("copy-of-linear", SOLVERS["linear"])
    try:
        assert np.array_equal(solve(build(), "copy-of-linear").slot_to_expert_LS, solve(build(), "linear").slot_to_expert_LS)
    finally:
        del SOLVERS["copy-of-linear"]


@pytest.mark.parametrize("name", ["linear", "round_robin", "random"])
@pytest.mark.parametrize("slots", [[4, 4, 4], [3, 2, 2], [5, 0, 4], [3, 3, 1]])
def test_baselines_hold_every_expert_and_say_that_they_are_baselines(name: str, slots: list[int]) -> None:
    result = solve(PlacementProblem(load_KLE=lognormal(2, 7), num_ranks=3, slots_per_rank_R=np.array(slots)), name, seed=2)
    assert result.status == "BASELINE"


def test_linear_and_round_robin_are_what_they_are_called() -> None:
    assert solve(build(), "linear").slot_to_expert_LS[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert solve(build(), "round_robin").slot_to_expert_LS[0].tolist() == [0, 2, 4, 1, 3, 5]


def test_a_result_becomes_a_plan_with_the_same_balance() -> None:
    problem = build(load_KLE=lognormal(2, 6), slots_per_rank_R=np.array([4, 3]))
    result = solve(problem)
    plan = to_plan(result, model="toy", num_experts=6, moe_layer_ids=(1, 3), slots_per_rank_R=problem.slots_per_rank_R, fingerprints={"model": "0" * 64})
    assert isinstance(plan, Plan)
    assert metrics.balance_of(plan.rank_load_LR(problem.load_KLE[0])).mean_over_max == pytest.approx(result.value)
    assert plan.result["status"] == result.status
    with pytest.raises(InputError, match="multiple of the 2 ranks"):
        to_plan(result, model="toy", num_experts=6, moe_layer_ids=(1, 3), num_ranks=2)
    with pytest.raises(InputError, match="must sum to the 7 slots"):
        to_plan(result, model="toy", num_experts=6, moe_layer_ids=(1, 3), slots_per_rank_R=np.array([3, 3]))


def test_risk_measures_order_as_they_should() -> None:
    ideal, peak, weight = np.ones((4, 1)), np.array([[1.0], [2.0], [3.0], [4.0]]), np.full(4, 0.25)
    values = {risk: 1 / metrics.fold_windows(peak, ideal, weight, risk) for risk in ("mean", "cvar:1.0", "cvar:0.5", "cvar:0.25", "worst")}
    assert values == pytest.approx({"mean": 2.5, "cvar:1.0": 2.5, "cvar:0.5": 3.5, "cvar:0.25": 4.0, "worst": 4.0})
