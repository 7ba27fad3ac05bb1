"""MILP and CP-SAT are exact: they agree with brute force and with each other, and never call a stopped run optimal."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest

from moesim.errors import InfeasibleError, InputError
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.result import OPTIMAL_GAP
from tests.solvers.instances import brute_force_cost, lognormal

pytest.importorskip("pulp")
pytest.importorskip("ortools")

CASES = [
    (5, [3, 3], [1.0, 1.0]),
    (6, [3, 3, 2], [1.0, 1.0, 1.0]),
    (8, [5, 5], [1.0, 1.0]),
    (6, [3, 2, 2], [1.0, 2.0, 1.0]),
    (4, [2, 2, 2], [1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize("solver", ["milp", "cp-sat"])
@pytest.mark.parametrize(("experts", "slots", "speed"), CASES)
def test_the_optimum_is_that_of_brute_force(solver: str, experts: int, slots: list[int], speed: list[float]) -> None:
    load = lognormal(1, experts, seed=experts)
    problem = PlacementProblem(load_KLE=load, num_ranks=len(slots), slots_per_rank_R=np.array(slots), device_speed_R=np.array(speed))
    result = solve(problem, solver)
    assert result.status == "OPTIMAL"
    assert result.value == pytest.approx(load.sum() / sum(speed) / brute_force_cost(load[0], slots, speed), rel=1e-6)


def test_both_agree_on_windows_and_layers() -> None:
    load = np.stack([lognormal(2, 6, seed, sigma=1.0) for seed in (1, 2)])
    problem = PlacementProblem(load_KLE=load, num_ranks=3, slots_per_rank_R=np.array(3), window_weight_K=np.array([2.0, 1.0]))
    milp, cpsat, greedy = solve(problem, "milp"), solve(problem, "cp-sat"), solve(problem)
    assert milp.status == cpsat.status == "OPTIMAL"
    assert milp.value == pytest.approx(cpsat.value, rel=1e-6)
    assert greedy.value <= milp.value * (1 + 1e-9)
    assert milp.bound <= greedy.bound


def test_a_rank_may_hold_an_expert_twice_where_that_is_allowed() -> None:
    # 2 ranks with 3 slots: 3 of 4 copies of the hot expert on a rank balance 8 against 4 + 4
    load = np.array([[9.0, 3.0, 3.0]])
    results = [
        solve(PlacementProblem(load_KLE=load, num_ranks=2, slots_per_rank_R=np.array([3, 2]), allow_duplicates_on_rank=allowed), "cp-sat")
        for allowed in (False, True)
    ]
    assert results[0].value <= results[1].value
    assert results[1].status == "OPTIMAL"


@pytest.mark.parametrize(("solver", "options"), [("milp", {"max_nodes": 1}), ("cp-sat", {"max_effort": 1})])
def test_a_run_stopped_by_its_limit_is_not_called_optimal(solver: str, options: dict[str, int]) -> None:
    problem = PlacementProblem(load_KLE=lognormal(1, 14, seed=5), num_ranks=5, slots_per_rank_R=np.array(4))
    result = solve(problem, solver, options=options)
    assert (result.status == "OPTIMAL") == (result.gap <= OPTIMAL_GAP)
    assert result.status == "FEASIBLE"


@pytest.mark.parametrize("solver", ["milp", "cp-sat"])
def test_a_run_stopped_by_the_clock_says_so_and_keeps_a_certified_gap(solver: str) -> None:
    problem = PlacementProblem(load_KLE=lognormal(1, 14, seed=5), num_ranks=5, slots_per_rank_R=np.array(4))
    left = iter([1.0] * 100_000)
    result = solve(problem, solver, deadline=lambda: next(left))
    assert result.status == "TIME_LIMIT"
    assert 0 < result.gap < 0.2


def test_a_deadline_already_past_returns_the_greedy_start() -> None:
    problem = PlacementProblem(load_KLE=lognormal(2, 8, seed=1), num_ranks=3, slots_per_rank_R=np.array(4))
    assert solve(problem, "milp", deadline=lambda: -1.0).status == "TIME_LIMIT"


def test_a_model_too_large_is_refused() -> None:
    problem = PlacementProblem(load_KLE=lognormal(1, 256), num_ranks=144, slots_per_rank_R=np.array(3))
    with pytest.raises(InputError, match="variables"):
        solve(problem, "milp")


@pytest.mark.parametrize(("solver", "module"), [("milp", "pulp"), ("cp-sat", "ortools")])
def test_a_missing_library_names_the_remedy(solver: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.partition(".")[0] == module:
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    problem = PlacementProblem(load_KLE=lognormal(1, 6), num_ranks=2, slots_per_rank_R=np.array(4))
    with pytest.raises(InfeasibleError, match=r'pip install "moesim\[solvers\]"') as caught:
        solve(problem, solver)
    assert caught.value.missing is not None and module in str(caught.value.missing) and caught.value.relaxation == "--solver greedy"
