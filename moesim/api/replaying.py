"""`replay`: a trace, a model, a machine and a placement in; what happened out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from moesim.api.documents import cluster_of, model_of, read_plan, trace_of
from moesim.api.running import Replay, builder_of, passes_of, simulate
from moesim.api.solving import solve
from moesim.costs.model import CostModel
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
from moesim.sim.routers import router_of
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace

PLACEMENTS = ("linear", "round_robin", "random", "eplb")


def replay(
    trace: str | RoutingTrace,
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    placement: str = "linear",
    tokens_per_step: int | None = None,
    settings: Mapping[str, str] | Settings | None = None,
    map_layers: str | None = None,
    times: str = "model",
    strict: bool = False,
    seed: int = 0,
    as_recorded: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Run a routing trace on a cluster with expert parallelism over all of its devices.

    trace: name, path or `synthetic:…`. plan: a plan or its path; without one, `placement` (linear, round_robin, random,
    eplb) makes one. tokens_per_step: tokens per forward pass over all ranks; None keeps the recorded steps. settings: see
    `moesim.sim.settings.Settings`. map_layers: how trace layers stand for model layers if they differ. times: `model`, or `trace`
    for the durations that the trace recorded, rescaled where the plan changes a rank's load (see `moesim.sim.recorded`). as_recorded: tokens stay
    on the rank that recorded them, instead of being dealt out anew, and steps keep their numbers; with recorded times they always do.
    Raises InputError if any document breaks a rule, or if they do not fit each other.
    """
    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    routing = trace_of(trace, moe_model, seed, map_layers, any_top_k=bool(chosen.router))
    recorded = None
    if times == "trace":
        from moesim.api.recorded import recorded_times

        recorded = recorded_times(routing, moe_model, cluster, chosen, tokens_per_step, strict)
    elif times != "model":
        raise InputError(describe("--times", "times", times, "must be model or trace"))
    if routing.rounds != chosen.rounds:
        remedy = "declare a trace with a row per round by `moesim trace transform --rule rounds:C`" if routing.rounds == 1 else "set it"
        raise InputError(describe("--set", "rounds", chosen.rounds, f"must be {routing.rounds}, the rounds per layer of {routing.source}", remedy))
    costs = CostModel(cluster, moe_model, strict=strict and recorded is None)  # recorded times refuse what is left of the model's
    placed = placed_plan(plan, placement, routing, moe_model, cluster, seed, chosen.pipeline.stages)
    builder = builder_of(cluster, moe_model, placed, costs, chosen)
    router = router_of(chosen.router or placed.policies.get("router", ""), routing)
    if recorded is not None:
        if router is not None:
            raise InputError(describe("--times", "times", times, "must be model where a router changes the routing; the recorded times are those of another"))
        if chosen.pipeline.is_on or builder.stages.count > 1:
            raise InputError(describe("--times", "times", times, "must be model with pipeline stages, training or chunks; a recording has none of them"))
        recorded.attach(builder)
    passes = passes_of(
        routing,
        placed.num_ranks,
        tokens_per_step,
        seed,
        micro_batches=chosen.parts(builder.stages.count),
        as_recorded=as_recorded or recorded is not None,
        router=router,
    )
    result = simulate(passes, builder, routing, tokens_per_step, progress, began, seed)
    if router is not None:
        result.report["routing"] |= router.report()
    return result if recorded is None else recorded.annotate(result)


def placed_plan(ref: str | Path | Plan | None, placement: str, routing: RoutingTrace, model: MoEModel, cluster: Cluster, seed: int, stages: int = 1) -> Plan:
    """Return the plan that is named, or else the placement that is, with all devices of a pipeline stage as one expert-parallel group."""
    if ref is not None:
        return read_plan(ref)
    if placement not in PLACEMENTS:
        raise InputError(describe("--placement", "placement", placement, f"must be one of {', '.join(PLACEMENTS)}"))
    if cluster.num_ranks % stages:
        raise InputError(describe("--set", "pipeline.stages", stages, f"must divide the {cluster.num_ranks} devices of {cluster.name}"))
    if placement == "eplb" and stages > 1:
        raise InputError(describe("--placement", "placement", placement, "is for one pipeline stage", "use linear, round_robin or random, or give a plan"))
    if placement == "eplb":
        return solve(routing, model=model, hardware=cluster, objective="balance", solver="eplb", weight_memory_bytes=math.inf, seed=seed, predict=False).plan
    ranks = cluster.num_ranks // stages
    plan = linear(
        model=model.name,
        num_experts=model.num_experts,
        moe_layer_ids=model.moe_layer_ids,
        experts_L=model.experts_L,
        num_ranks=ranks,
        kind=placement,
        seed=seed,
    )
    return replace(plan, parallel=replace(plan.parallel, pp=stages))
