"""`solve`: loads in, a checked placement with its bound and its predicted gain out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, read_plan, trace_of, windows_of
from moesim.api.running import builder_of, passes_of, simulate
from moesim.balance import balance_of
from moesim.costs.model import CostModel
from moesim.errors import InputError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import MoEModel
from moesim.plan import Parallel, Plan, linear
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace

OBJECTIVES = ("balance", "robust", "traffic", "hops")
"""`traffic`: distinct ranks that a token reaches in a layer; `hops`: ranks left between layers, for context-coherent execution."""
AFFINITY_SLACK = 0.1
"""How much busier than in a balanced plan the busiest rank may be where traffic is the objective."""
GAIN_TOKENS = 4096
"""Tokens of the trace on which `solve` replays the plan to predict its gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solve returns."""

    report: dict[str, Any]
    plan: Plan


def solve(
    traces: str | RoutingTrace | Sequence[str | RoutingTrace],
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    objective: str | None = None,
    redundant: int = 0,
    solver: str | None = None,
    previous: str | Path | Plan | None = None,
    move_budget_bytes: float | None = None,
    time_limit_s: float | None = None,
    map_layers: str | None = None,
    dispatch: str = "equal",
    seed: int = 0,
    predict: bool = True,
) -> Solution:
    """Compute an expert placement for all layers, check it independently, and predict what it gains over linear placement.

    traces: one trace, or several as windows (then the objective is `robust` unless told otherwise). redundant: extra slots
    per layer. dispatch: how replicas share an expert's tokens: `equal`, `lp` (optimal for these loads) or `fast`. previous and
    move_budget_bytes: repair this plan, changing at most so many bytes of weights. time_limit_s caps the search; a search cut
    short says TIME_LIMIT. Raises InfeasibleError if no placement satisfies the requirements.
    """
    from moesim.solvers.problem import PlacementProblem
    from moesim.solvers.registry import solve as run_solver
    from moesim.solvers.registry import to_plan
    from moesim.solvers.robust import RobustResult

    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    listed = [traces] if isinstance(traces, (str, RoutingTrace)) else list(traces)
    if not listed:
        raise InputError("solve: no trace given; name at least one")
    routings = [trace_of(item, moe_model, seed, map_layers) for item in listed]
    objective = objective or ("robust" if len(routings) > 1 else "balance")
    if objective not in OBJECTIVES:
        raise InputError(
            describe("solve", "objective", objective, f"must be one of {', '.join(OBJECTIVES)}", "traffic and latency objectives are not available yet")
        )
    if not 0 <= redundant <= 1 << 16:
        raise InputError(describe("solve", "redundant", redundant, "must be in 0..65536"))
    if move_budget_bytes is not None and previous is None:
        raise InputError("solve: --move-budget needs --from; name the plan that is running now")
    load_KLE = windows_of(routings, objective)
    old = None if previous is None else read_plan(previous)
    slots_R = _slots_per_rank(moe_model, cluster, redundant, old)
    if old is not None:
        old.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids)
    expert_bytes = sizes.expert_bytes(moe_model)
    problem = PlacementProblem(
        load_KLE=load_KLE,
        num_ranks=cluster.num_ranks,
        slots_per_rank_R=slots_R,
        ranks_per_node=cluster.devices_per_node,
        num_groups=moe_model.num_groups,
        previous=None if old is None else old.slot_to_expert_LS,
        move_budget_slots=None if move_budget_bytes is None else int(move_budget_bytes // expert_bytes),
    )
    limit = None if time_limit_s is None else (lambda: time_limit_s - (time.perf_counter() - began))
    evidence = None
    if objective in ("traffic", "hops"):
        if redundant or old is not None or solver is not None or len(routings) > 1:
            raise InputError(f"solve: objective {objective!r} takes one trace and neither --redundant, --from nor --solver; leave them out")
        result, evidence = _solve_affinity(routings[0], objective, cluster, seed, limit)
    else:
        default = "repair" if move_budget_bytes is not None else "robust" if objective == "robust" else "greedy"
        result = run_solver(problem, solver or default, seed=seed, deadline=limit)
    plan = to_plan(
        result,
        model=moe_model.name,
        num_experts=moe_model.num_experts,
        moe_layer_ids=moe_model.moe_layer_ids,
        slots_per_rank_R=slots_R,
        parallel=Parallel(ep=cluster.num_ranks, dp=cluster.num_ranks),
        fingerprints={"model": moe_model.sha256, "hardware": cluster.sha256, "trace": ",".join(item.fingerprint for item in routings)},
    )
    if dispatch != "equal":
        from moesim.solvers.dispatch import solve_dispatch, with_shares

        shares = solve_dispatch(plan, (load_KLE / np.maximum(load_KLE.sum(axis=(1, 2), keepdims=True), 1e-300)).sum(axis=0), method=dispatch)
        plan = with_shares(plan, shares.share_LS, shares)
    rank_load_KLR = np.stack([plan.rank_load_LR(load) for load in load_KLE])
    most = rank_load_KLR.max(axis=2)
    moved = None if old is None else int((old.slot_to_expert_LS != plan.slot_to_expert_LS).sum())
    report: dict[str, Any] = {
        "schema": "moesim.solve/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "objective": objective,
        "value": result.value,
        "bound": result.bound,
        "gap": result.gap,
        "status": result.status,
        "wall_s": None,
        "balance": {
            "planned": balance_of(rank_load_KLR).mean_over_max,
            "per_layer_min": float((rank_load_KLR.mean(axis=2) / np.where(most > 0, most, 1))[most > 0].min()) if (most > 0).any() else 1.0,
        },
        "dispatch": dispatch,
        "affinity": evidence,
        "windows": {"count": len(load_KLE), **({"mode": result.mode, "held_out": dict(result.held_out)} if isinstance(result, RobustResult) else {})},
        "traffic": {"distinct_remote_ranks": None, "inter_node_bytes": None},
        "moved": {"slots": moved, "bytes": None if moved is None else moved * expert_bytes},
        "solver": result.solver,
        "slots": plan.num_slots,
        "ranks": plan.num_ranks,
        "plan_sha256": plan.sha256,
        "solve_s": time.perf_counter() - began,
        "predicted": None,
    }
    if predict:
        _predict(report, routings[0], moe_model, cluster, plan, seed)
    report["wall_s"] = time.perf_counter() - began
    return Solution(report=report, plan=plan)


def _solve_affinity(routing: RoutingTrace, objective: str, cluster: Cluster, seed: int, limit: Callable[[], float] | None) -> tuple[Any, dict[str, Any]]:
    """Plan for traffic on half of the tokens; return the result and its evidence on the other half and on its null."""
    from moesim.solvers.affinity.plan import plan_affinity
    from moesim.solvers.affinity.result import FANOUT, HOPS

    if routing.kind != "tokens":
        raise TraceError(f"{routing.source}: holds counts only; objective {objective!r} needs the choices of every token")
    inside = cluster.devices_per_node if cluster.num_nodes > 1 else 0
    kind = FANOUT if objective == "traffic" else HOPS
    found = plan_affinity(routing, num_ranks=cluster.num_ranks, ranks_per_node=inside, objective=kind, load_slack=AFFINITY_SLACK, seed=seed, deadline=limit)
    return found.result, found.evidence.as_dict()


def _slots_per_rank(model: MoEModel, cluster: Cluster, redundant: int, old: Plan | None) -> np.ndarray:
    if old is not None:
        if old.num_ranks != cluster.num_ranks:
            raise InputError(describe(old.source, "num_ranks", old.num_ranks, f"must equal the {cluster.num_ranks} devices of {cluster.name}"))
        return np.bincount(old.slot_rank_S, minlength=cluster.num_ranks)
    total = model.num_experts + redundant
    return np.bincount(np.arange(total) % cluster.num_ranks, minlength=cluster.num_ranks)


def _predict(report: dict[str, Any], routing: RoutingTrace, model: MoEModel, cluster: Cluster, plan: Plan, seed: int) -> None:
    """Replay the plan and linear placement on the same head of the first trace and add what they predict."""
    tokens = GAIN_TOKENS if routing.kind == "counts" or routing.is_synthetic and routing.num_rows > GAIN_TOKENS else None
    passes = list(passes_of(routing, cluster.num_ranks, tokens, seed, max_tokens=GAIN_TOKENS))
    costs = CostModel(cluster, model)
    before, after = (
        simulate(passes, builder_of(cluster, model, choice, costs, Settings()), routing, tokens, None, 0.0).report
        for choice in (linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=cluster.num_ranks), plan)
    )
    report["traffic"] = {"distinct_remote_ranks": after["traffic"]["distinct_remote_ranks"], "inter_node_bytes": after["bytes"]["inter_node"]}
    report["predicted"] = {
        "tokens": after["tokens"],
        "step_ms": {"linear": before["step_ms"]["mean"], "plan": after["step_ms"]["mean"]},
        "balance": {"linear": before["balance"]["mean_over_max"], "plan": after["balance"]["mean_over_max"]},
        "gain": before["step_ms"]["mean"] / after["step_ms"]["mean"] - 1.0,
    }
