"""`replay`: a trace, a model, a machine and a placement in; what happened out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from moesim.api.documents import cluster_of, model_of, read_plan, trace_of
from moesim.api.running import Replay, builder_of, passes_of, simulate
from moesim.api.solving import solve
from moesim.costs.model import CostModel
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
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
    strict: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Replay:
    """Run a routing trace on a cluster with expert parallelism over all of its devices.

    trace: name, path or `synthetic:…`. plan: a plan or its path; without one, `placement` (linear, round_robin, random,
    eplb) makes one. tokens_per_step: tokens per forward pass over all ranks; None keeps the recorded steps. settings: see
    `moesim.sim.settings.Settings`. map_layers: how trace layers stand for model layers if they differ.
    Raises InputError if any document breaks a rule, or if they do not fit each other.
    """
    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    routing = trace_of(trace, moe_model, seed, map_layers)
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    costs = CostModel(cluster, moe_model, strict=strict)
    placed = placed_plan(plan, placement, routing, moe_model, cluster, seed)
    builder = builder_of(cluster, moe_model, placed, costs, chosen)
    passes = passes_of(routing, cluster.num_ranks, tokens_per_step, seed, micro_batches=chosen.micro_batches)
    return simulate(passes, builder, routing, tokens_per_step, progress, began)


def placed_plan(ref: str | Path | Plan | None, placement: str, routing: RoutingTrace, model: MoEModel, cluster: Cluster, seed: int) -> Plan:
    """Return the plan that is named, or else the placement that is."""
    if ref is not None:
        return read_plan(ref)
    if placement not in PLACEMENTS:
        raise InputError(describe("--placement", "placement", placement, f"must be one of {', '.join(PLACEMENTS)}"))
    if placement == "eplb":
        return solve(routing, model=model, hardware=cluster, objective="balance", solver="eplb", seed=seed, predict=False).plan
    return linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=cluster.num_ranks, kind=placement, seed=seed)
