"""`rebalance`: a trace replayed with and without a balancer; is rebalancing worth it, and from which period on?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesim.api.changing import change_run
from moesim.api.documents import cluster_of, model_of, trace_of
from moesim.api.replaying import placed_plan
from moesim.api.running import builder_of, passes_of, rebuilt, refuse_mixed
from moesim.costs.model import CostModel
from moesim.errors import InputError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.change_report import ChangeRun, sweep_periods, verdict
from moesim.sim.routers import router_of
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace

DEFAULT_POLICY = "on_drift:0.9"


def rebalance(
    traces: Sequence[str | RoutingTrace],
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    placement: str = "linear",
    policy: str | None = None,
    mode: str | None = None,
    periods: Sequence[int] = (),
    planner_s: float | None = None,
    tokens_per_step: int | None = None,
    settings: Mapping[str, str] | Settings | None = None,
    map_layers: str | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Replay the traces one after another under a balancer policy and without one; return both and the verdict.

    policy, mode, planner_s: short for the settings `change.balancer` (here `on_drift:0.9` where nothing names one),
    `change.mode` and `change.planner_s`. periods: also sweep these periods (passes) and name the shortest from which on
    rebalancing pays. The other arguments are those of `replay`. Raises InputError if a document breaks a rule or they do not fit each other.
    """
    began = time.perf_counter()
    if not traces:
        raise InputError("rebalance: no trace given; name at least one")
    moe_model, cluster = model_of(model), cluster_of(hardware)
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    routings = [trace_of(item, moe_model, seed, map_layers, any_top_k=bool(chosen.router)) for item in traces]
    costs = CostModel(cluster, moe_model)
    start = placed_plan(plan, placement, routings[0], moe_model, cluster, seed)
    passes = [
        item
        for routing in routings
        for item in passes_of(routing, cluster.num_ranks, tokens_per_step, seed, micro_batches=chosen.micro_batches, router=router_of(chosen.router, routing))
    ]
    passes = [replace(item, step=number) for number, item in enumerate(passes)]

    change = chosen.change.with_policies(start.policies)
    change = replace(
        change,
        balancer=policy or change.balancer or DEFAULT_POLICY,
        mode=mode or change.mode,
        planner_s=change.planner_s if planner_s is None else planner_s,
    )

    def run(balancer: str) -> ChangeRun:
        builder = builder_of(cluster, moe_model, start, costs, replace(chosen, change=replace(change, balancer=balancer)))
        refuse_mixed(builder)
        return change_run(passes, builder, lambda plan: rebuilt(builder, plan), progress)

    without, acted = run("never"), run(change.balancer)
    return {
        "schema": "moesim.rebalance/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "policy": change.balancer,
        "mode": change.mode,
        "verdict": verdict(acted, without),
        "run": acted.report(),
        "sweep": sweep_periods(periods, lambda period: run(f"periodic:{period}"), without) if periods else None,
        "routing": [routing.source for routing in routings],
        "wall_s": time.perf_counter() - began,
    }
