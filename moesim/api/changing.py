"""Runs whose plan changes: the settings `change.…` with the planner that a balancer on this machine is handed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.plan import Plan
from moesim.sim.balancer import Planner
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.change_replay import run_change
from moesim.sim.change_report import ChangeRun


def change_run(
    passes: Iterable[Pass], builder: ProgramBuilder, rebuild: Callable[[Plan], ProgramBuilder], progress: Callable[[int], None] | None = None
) -> ChangeRun:
    """Replay `passes` from the plan of `builder` on, as its settings change it; rebuild: the builder of another plan."""
    return run_change(
        passes, plan=builder.plan, settings=builder.settings.change, builder_factory=rebuild, planner=planner_for(builder.cluster), progress=progress
    )


def planner_for(cluster: Cluster) -> Planner:
    """Return the planner that a balancer on `cluster` is handed."""
    return planner_on(cluster.devices_per_node)


def planner_on(ranks_per_node: int | None, limit_s: float | None = None) -> Planner:
    """Return a planner: a repair within a budget, else a fresh plan laid over the running one.

    ranks_per_node: None: one node. limit_s: longest search, so that plans on a busy machine may differ; None: plans depend on the loads alone.
    """
    from moesim.solvers.problem import PlacementProblem
    from moesim.solvers.registry import solve

    def planner(load_KLE: np.ndarray, plan: Plan, budget_slots: int | None) -> Plan:
        problem = PlacementProblem(
            load_KLE=load_KLE.sum(axis=0),
            num_ranks=plan.num_ranks,
            slots_per_rank_R=np.bincount(plan.slot_rank_S, minlength=plan.num_ranks),
            ranks_per_node=ranks_per_node or plan.num_ranks,
            experts_L=plan.experts_L,
            previous=plan.slot_to_expert_LS,
            move_budget_slots=budget_slots,
        )
        until = None if limit_s is None else time.monotonic() + limit_s
        result = solve(problem, "greedy" if budget_slots is None else "repair", deadline=None if until is None else lambda: until - time.monotonic())
        return replace(plan, slot_to_expert_LS=result.slot_to_expert_LS, share_LS=None, result={"solver": result.solver}, source="balancer")

    return planner
