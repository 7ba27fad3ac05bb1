"""`rebalance`: a trace replayed with and without a balancer; is rebalancing worth it, and from which period on?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, trace_of
from moesim.api.replaying import placed_plan
from moesim.api.running import builder_of, passes_of
from moesim.costs.model import CostModel
from moesim.errors import InputError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.balancer import Balancer
from moesim.sim.change import run_with_change
from moesim.sim.change_report import ChangeRun, sweep_periods, verdict
from moesim.sim.migration import MigrationSettings
from moesim.sim.routers import router_of
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace


def rebalance(
    traces: Sequence[str | RoutingTrace],
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    placement: str = "linear",
    policy: str = "on_drift:0.9",
    mode: str = "background",
    periods: Sequence[int] = (),
    planner_s: float | None = None,
    tokens_per_step: int | None = None,
    settings: Mapping[str, str] | Settings | None = None,
    map_layers: str | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Replay the traces one after another under a balancer policy and without one; return both and the verdict.

    policy: `never`, `periodic:N`, `on_drift:T` or `budgeted:BYTES,N` (see `moesim.sim.balancer`). mode: migrate in the
    `background` or in a `pause`. periods: also sweep these periods (passes) and name the shortest from which on rebalancing
    pays. planner_s: time that the planner takes on the simulated clock; None: a declared default. The other arguments are
    those of `replay`. Raises InputError if a document breaks a rule or they do not fit each other.
    """
    began = time.perf_counter()
    if not traces:
        raise InputError("rebalance: no trace given; name at least one")
    moe_model, cluster = model_of(model), cluster_of(hardware)
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    routings = [trace_of(item, moe_model, seed, map_layers, any_top_k=bool(chosen.router)) for item in traces]
    costs = CostModel(cluster, moe_model)
    start = placed_plan(plan, placement, routings[0], moe_model, cluster, seed)
    builder_of(cluster, moe_model, start, costs, chosen)
    passes = [
        item
        for routing in routings
        for item in passes_of(
            routing, cluster.num_ranks, tokens_per_step, seed, micro_batches=chosen.micro_batches, router=router_of(chosen.router, routing)
        )
    ]
    passes = [replace(item, step=number) for number, item in enumerate(passes)]

    def run(balancer: Balancer | None) -> ChangeRun:
        return run_with_change(
            passes,
            plan=start,
            builder_factory=lambda current: builder_of(cluster, moe_model, current, costs, chosen),
            balancer=balancer,
            migration=MigrationSettings(mode=mode),
            progress=progress,
        )

    def balancer(name: str) -> Balancer:
        return Balancer(planner=planner_for(cluster), policy=name, planner_s=planner_s)

    without, acted = run(None), run(balancer(policy))
    return {
        "schema": "moesim.rebalance/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "policy": policy,
        "mode": mode,
        "verdict": verdict(acted, without),
        "run": acted.report(),
        "sweep": sweep_periods(periods, lambda period: run(balancer(f"periodic:{period}")), without) if periods else None,
        "routing": [routing.source for routing in routings],
        "wall_s": time.perf_counter() - began,
    }


def planner_for(cluster: Cluster) -> Callable[[np.ndarray, Plan, int | None], Plan]:
    """Return the planner that a balancer on `cluster` is handed: a repair within a budget, else a fresh plan laid over the running one."""
    from moesim.solvers.problem import PlacementProblem
    from moesim.solvers.registry import solve

    def planner(load_KLE: np.ndarray, plan: Plan, budget_slots: int | None) -> Plan:
        problem = PlacementProblem(
            load_KLE=load_KLE.sum(axis=0),
            num_ranks=plan.num_ranks,
            slots_per_rank_R=np.bincount(plan.slot_rank_S, minlength=plan.num_ranks),
            ranks_per_node=cluster.devices_per_node,
            previous=plan.slot_to_expert_LS,
            move_budget_slots=budget_slots,
        )
        result = solve(problem, "greedy" if budget_slots is None else "repair")
        return replace(plan, slot_to_expert_LS=result.slot_to_expert_LS, share_LS=None, result={"solver": result.solver}, source="balancer")

    return planner
