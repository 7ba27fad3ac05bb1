"""Repair under other objectives than balance, and over several windows: the budget is kept, and the objective's own cost falls along the frontier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers.objective import Decode, Objective
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import recount
from moesim.solvers.registry import default_solver, solve
from moesim.solvers.validate import validate
from tests.solvers.instances import lognormal
from tests.solvers.test_traffic_places import problem_of, routed

DECODE = Decode(tokens=32, top_k=2)


def running(text: str, budget: int | None, slots: int = 5) -> PlacementProblem:
    """Return a problem whose running placement is the linear one."""
    if "traffic" in text:
        free = problem_of(routed(300, 16, 3, topics=4, layers=3), 4, slots, text, ranks_per_node=2)
    else:
        free = PlacementProblem(
            load_KLE=lognormal(3, 16), num_ranks=4, slots_per_rank_R=np.array(slots), objective=Objective.parse(text, decode=DECODE), ranks_per_node=2
        )
    return replace(free, previous=solve(replace(free, objective=Objective()), "linear").slot_to_expert_LS, move_budget_slots=budget)


@pytest.mark.parametrize("text", ["activated", "balance+activated:0.5", "traffic", "balance+traffic:0.5"])
@pytest.mark.parametrize("slots", [4, 5])
def test_a_budget_is_kept_and_more_of_it_is_never_worse(text: str, slots: int) -> None:
    costs = []
    for budget in (0, 4, 12, 60):
        problem = running(text, budget, slots)
        assert default_solver(problem) == "repair"
        result: Any = solve(problem)
        assert int((result.slot_to_expert_LS != problem.previous).sum()) <= budget
        assert result.cost == pytest.approx(recount(problem, result.slot_to_expert_LS.tolist()))
        costs.append(result.cost)
    assert costs == sorted(costs, reverse=True) and costs[-1] < costs[1] < costs[0]
    fresh: Any = solve(replace(running(text, None, slots), previous=None), "descent")
    assert costs[-1] <= fresh.cost * 1.001


@pytest.mark.parametrize("text", ["balance+activated:0.5", "traffic"])
def test_every_point_of_the_frontier_keeps_its_budget(text: str) -> None:
    problem = running(text, 40)
    result = solve(problem, options={"frontier": True})
    assert result.frontier is not None and len(result.frontier) > 4
    values = [point.value for point in result.frontier]
    assert values == sorted(values) and values[-1] == pytest.approx(result.value) and result.frontier[0].slots == 0
    for point in result.frontier:
        assert int((point.slot_to_expert_LS != problem.previous).sum()) == point.slots <= 40
    few = solve(problem, options={"fits": lambda table: int((table != problem.previous).sum()) <= 7})
    assert int((few.slot_to_expert_LS != problem.previous).sum()) <= 7 and few.value >= values[0]


@pytest.mark.parametrize("risk", ["mean", "worst", "cvar:0.5"])
def test_several_windows_are_repaired_together(risk: str) -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    load = np.stack([lognormal(3, 32) * generator.lognormal(0, 0.5, (3, 32)) for _ in range(4)])
    free = PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(9))
    old = solve(replace(free, load_KLE=load[:1], window_weight_K=None)).slot_to_expert_LS
    values = []
    for budget in (0, 6, 24):
        problem = replace(free, previous=old, move_budget_slots=budget)
        result = solve(problem, options={"risk": risk, "frontier": True})
        validate(problem, result)
        assert result.objective == f"robust:{risk}" and int((result.slot_to_expert_LS != old).sum()) <= budget
        values.append(result.value)
    assert values[0] < values[1] <= values[2] or risk != "mean"
    assert max(values) > values[0]


def test_what_cannot_be_repaired_says_why() -> None:
    with pytest.raises(InputError, match="leave out the risk"):
        solve(running("activated", 3), options={"risk": "worst"})
    with pytest.raises(InputError, match="does not plan for hops"):
        solve(replace(running("traffic", 3, 4), objective=Objective.parse("hops", routes=routed(300, 16, 3, topics=4, layers=3))))
