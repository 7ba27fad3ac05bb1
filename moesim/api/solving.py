"""`solve`: loads in, a checked placement with its bound and its predicted gain out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, read_plan, trace_of, windows_of
from moesim.api.fitting import check_memory, slots_per_rank
from moesim.api.running import builder_of, passes_of, simulate
from moesim.balance import balance_of
from moesim.costs.model import CostModel
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import MoEModel
from moesim.plan import Parallel, Plan, linear
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace

AFFINITY_SLACK = 0.1
"""How much busier than in a balanced plan the busiest rank may be where traffic alone is the objective."""
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
    slots: int | Sequence[int] | None = None,
    speeds: Sequence[float] | None = None,
    weight_memory_bytes: float | None = None,
    batch: int | None = None,
    solver: str | None = None,
    previous: str | Path | Plan | None = None,
    move_budget_bytes: float | None = None,
    move_budget_s: float | None = None,
    frontier: bool = False,
    time_limit_s: float | None = None,
    map_layers: str | None = None,
    dispatch: str = "equal",
    target_balance: float | None = None,
    seed: int = 0,
    predict: bool = True,
) -> Solution:
    """Compute an expert placement for all layers, check it independently, and predict what it gains over linear placement.

    traces: one trace, or several as windows (then the objective is `robust` unless told otherwise). objective: `robust`, or what
    `moesim.solvers.objective` knows: balance, activated, latency, traffic, hops, or a sum like `balance+activated:0.5`. batch: decode tokens
    per step over all ranks, for activated and latency; None takes the trace's. redundant: extra slots per layer; slots: instead, slots of
    every rank; speeds: relative speed of every rank; weight_memory_bytes: of a device, that weights may take. dispatch: how replicas share an
    expert's tokens: `equal`, `lp` (optimal for these loads), `fast`, or `once` (one copy serves a decode batch). target_balance: find the fewest
    slots per rank that reach it. previous with move_budget_bytes or move_budget_s (of migration on idle links): repair this plan within the budget;
    frontier: also report what every smaller budget buys. time_limit_s caps the search; one cut short says TIME_LIMIT.
    Raises InfeasibleError if no placement satisfies the requirements.
    """
    from moesim.api.migrating import break_even_steps, frontier_rows, migration_cost, moved_bytes, placed
    from moesim.api.objectives import asked_for
    from moesim.solvers.objective import BALANCE
    from moesim.solvers.problem import PlacementProblem
    from moesim.solvers.recount import recount
    from moesim.solvers.registry import default_solver, to_plan
    from moesim.solvers.registry import solve as run_solver
    from moesim.solvers.result import ObjectiveResult
    from moesim.solvers.robust import RobustResult
    from moesim.solvers.validate import validate

    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    listed = [traces] if isinstance(traces, (str, RoutingTrace)) else list(traces)
    if not listed:
        raise InputError("solve: no trace given; name at least one")
    routings = [trace_of(item, moe_model, seed, map_layers) for item in listed]
    named = objective or ("robust" if len(routings) > 1 else "balance")
    asked = asked_for("balance" if named == "robust" else named, routings, model=moe_model, cluster=cluster, batch=batch, seed=seed)
    old = None if previous is None else read_plan(previous)
    _check_budget(old, move_budget_bytes, move_budget_s, frontier, time_limit_s)
    budgeted = frontier or move_budget_bytes is not None or move_budget_s is not None
    if old is not None and asked.unseen is not None and not budgeted:
        raise InputError(f"solve: objective {named!r} plans ranks from scratch; leave out --from, or repair with --move-budget or --frontier")
    slots_R = slots_per_rank(moe_model, cluster, redundant, slots, old)
    check_memory(moe_model, cluster, slots_R, weight_memory_bytes)
    if old is not None:
        old.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
    load_KLE = windows_of(asked.routings, named)
    expert_bytes = sizes.expert_bytes(moe_model)
    problem = PlacementProblem(
        load_KLE=load_KLE,
        num_ranks=cluster.num_ranks,
        slots_per_rank_R=slots_R,
        ranks_per_node=cluster.devices_per_node,
        ranks_per_rack=cluster.ranks_per_leaf if 1 < cluster.nodes_per_leaf < cluster.num_nodes else 0,
        num_groups=moe_model.num_groups,
        experts_L=moe_model.experts_L,
        previous=None if old is None else old.slot_to_expert_LS,
        move_budget_slots=None if move_budget_bytes is None else int(move_budget_bytes // expert_bytes),
        device_speed_R=None if speeds is None else np.asarray(speeds, dtype=np.float64),
        objective=asked.objective,
    )
    limit = None if time_limit_s is None else (lambda: time_limit_s - (time.perf_counter() - began))
    chosen = solver or ("repair" if budgeted else "robust" if named == "robust" else default_solver(problem))
    options: dict[str, Any] = {"load_slack": AFFINITY_SLACK} if chosen == "affinity" else {"frontier": True} if frontier else {}
    if move_budget_s is not None and old is not None:
        running = old
        options["fits"] = lambda table: migration_cost(running, placed(running, table), cluster, expert_bytes).total_s <= move_budget_s
    redundancy = None
    if target_balance is None:
        result = run_solver(problem, chosen, seed=seed, deadline=limit, options=options)
    else:
        from moesim.solvers.redundancy import redundancy_for

        if named != "balance" or len(routings) > 1 or redundant or slots is not None or old is not None or solver is not None:
            raise InputError(
                "solve: --target-balance searches the slots for one trace; leave out --objective, --redundant, --slots-per-rank, --from and --solver"
            )
        redundancy = redundancy_for(problem, target_balance, seed=seed, deadline=limit)
        slots_R = np.full(cluster.num_ranks, redundancy.slots_per_rank)
        check_memory(moe_model, cluster, slots_R, weight_memory_bytes)
        problem, result = replace(problem, slots_per_rank_R=slots_R), redundancy.result
        validate(problem, result)
    evidence = asked.evidence(result, problem, seed)
    plan = to_plan(
        result,
        model=moe_model.name,
        num_experts=moe_model.num_experts,
        moe_layer_ids=moe_model.moe_layer_ids,
        experts_L=moe_model.experts_L,
        slots_per_rank_R=slots_R,
        parallel=Parallel(ep=cluster.num_ranks, dp=cluster.num_ranks),
        fingerprints={"model": moe_model.sha256, "hardware": cluster.sha256, "trace": ",".join(item.fingerprint for item in routings)},
    )
    cost = getattr(result, "cost", None)
    if dispatch == "once":
        from moesim.solvers.activation import activated_L, serve_once_LS
        from moesim.solvers.dispatch import with_shares

        if asked.objective.decode is None or asked.objective.alone != "activated":
            raise InputError("solve: --dispatch once lets one copy serve a decode batch; it needs --objective activated")
        share_LS = serve_once_LS(problem, result.slot_to_expert_LS, asked.objective.decode)
        plan, cost = with_shares(plan, share_LS), float(activated_L(problem, result.slot_to_expert_LS, share_LS, asked.objective.decode).sum())
    elif dispatch != "equal":
        from moesim.solvers.dispatch import solve_dispatch, with_shares

        shares = solve_dispatch(plan, (load_KLE / np.maximum(load_KLE.sum(axis=(1, 2), keepdims=True), 1e-300)).sum(axis=0), method=dispatch)
        plan = with_shares(plan, shares.share_LS, shares)
    rank_load_KLR = np.stack([plan.rank_load_LR(load) for load in load_KLE])
    most = rank_load_KLR.max(axis=2)
    moved, written = (None, None) if old is None else moved_bytes(old, plan.slot_to_expert_LS, expert_bytes)
    report: dict[str, Any] = {
        "schema": "moesim.solve/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "objective": named,
        "value": result.value,
        "bound": result.bound,
        "gap": result.gap,
        "status": result.status,
        "wall_s": None,
        "cost": None
        if cost is None
        else {
            "value": cost,
            "bound": result.cost_bound if isinstance(result, ObjectiveResult) else None,
            "balanced": None,
            "unit": asked.unit,
            "batch_tokens": asked.batch_tokens,
            "phase": asked.phase,
        },
        "balance": {
            "planned": balance_of(rank_load_KLR).mean_over_max,
            "per_layer_min": float((rank_load_KLR.mean(axis=2) / np.where(most > 0, most, 1))[most > 0].min()) if (most > 0).any() else 1.0,
        },
        "dispatch": dispatch,
        "affinity": None if evidence is None else evidence.as_dict(),
        "windows": {"count": len(load_KLE), **({"mode": result.mode, "held_out": dict(result.held_out)} if isinstance(result, RobustResult) else {})},
        "traffic": {"distinct_remote_ranks": None, "distinct_remote_nodes": None, "inter_node_bytes": None},
        "moved": {"slots": moved, "bytes": written},
        "solver": result.solver,
        "slots": plan.num_slots,
        "ranks": plan.num_ranks,
        "plan_sha256": plan.sha256,
        "solve_s": time.perf_counter() - began,
        "predicted": None,
        "migration": None,
        "frontier": None,
        "redundancy": None
        if redundancy is None
        else {key: getattr(redundancy, key) for key in ("target", "slots_per_rank", "redundant", "least_possible", "tried")},
        "break_even_steps": None,
    }
    others = {} if old is None else {"running": old}
    if isinstance(result, ObjectiveResult) and result.objective != "balance":
        # what the other objective is worth: the balanced plan of the same slots
        free = replace(problem, objective=BALANCE, previous=None, move_budget_slots=None)
        balanced = run_solver(free, "greedy", seed=seed, deadline=limit).slot_to_expert_LS
        report["cost"]["balanced"] = recount(problem, balanced.tolist())
        others["balanced"] = replace(plan, slot_to_expert_LS=balanced, share_LS=None)
    # the simulated devices are equal: unequal speeds have no prediction
    outlook = Outlook(asked.routings[0], moe_model, cluster, batch, seed) if predict and speeds is None else None
    if outlook is not None:
        outlook.add_to(report, plan, others)
    if old is not None:
        migration = migration_cost(old, plan, cluster, expert_bytes)
        report["migration"] = {name: getattr(migration, name) for name in ("copies", "bytes", "transfer_s", "install_s", "total_s")}
        if outlook is not None:
            report["break_even_steps"] = break_even_steps(migration.total_s, outlook.step_s(old), outlook.step_s(plan))
        if result.frontier is not None:
            report["frontier"] = frontier_rows(result.frontier, old, cluster, expert_bytes, None if outlook is None else outlook.step_s)
    report["wall_s"] = time.perf_counter() - began
    return Solution(report=report, plan=plan)


def _check_budget(old: Plan | None, budget_bytes: float | None, budget_s: float | None, frontier: bool, time_limit_s: float | None) -> None:
    if old is None and (frontier or budget_bytes is not None or budget_s is not None):
        flag = "--frontier" if frontier else "--move-budget"
        raise InputError(f"solve: {flag} needs --from; name the plan that is running now")
    if budget_bytes is not None and budget_s is not None:
        raise InputError("solve: --move-budget is bytes or time, not both")
    for key, value in (("move_budget", budget_bytes), ("move_budget", budget_s), ("time_limit", time_limit_s)):
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise InputError(describe("solve", key, value, "must be finite and >= 0"))


class Outlook:
    """Replays plans on the same head of a trace."""

    def __init__(self, routing: RoutingTrace, model: MoEModel, cluster: Cluster, tokens_per_step: int | None, seed: int) -> None:
        """Cut the passes; tokens_per_step: None keeps the recorded steps."""
        whole = routing.kind == "counts" or (routing.is_synthetic and routing.num_rows > GAIN_TOKENS)
        self._tokens = tokens_per_step or (GAIN_TOKENS if whole else None)
        self._passes = list(passes_of(routing, cluster.num_ranks, self._tokens, seed, max_tokens=GAIN_TOKENS))
        self._routing, self._model, self._cluster = routing, model, cluster
        self._costs = CostModel(cluster, model)
        self._known: dict[str, dict[str, Any]] = {}

    def report(self, plan: Plan) -> dict[str, Any]:
        """Return the replay report of a plan."""
        key = plan.sha256
        if key not in self._known:
            builder = builder_of(self._cluster, self._model, plan, self._costs, Settings(rounds=self._routing.rounds))
            self._known[key] = simulate(self._passes, builder, self._routing, self._tokens, None, 0.0).report
        return self._known[key]

    def step_s(self, plan: Plan) -> float:
        """Return the mean time of a step."""
        return float(self.report(plan)["step_ms"]["mean"]) / 1e3

    def add_to(self, report: dict[str, Any], plan: Plan, others: Mapping[str, Plan]) -> None:
        """Add what is predicted of the plan, of linear placement and of others."""
        model = self._model
        plain = linear(
            model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L, num_ranks=self._cluster.num_ranks
        )
        runs = {name: self.report(one) for name, one in {"linear": plain, "plan": plan, **others}.items()}
        after = runs["plan"]
        report["traffic"] = {**after["traffic"], "inter_node_bytes": after["bytes"]["inter_node"]}
        report["predicted"] = {
            "tokens": after["tokens"],
            "step_ms": {name: run["step_ms"]["mean"] for name, run in runs.items()},
            "balance": {name: run["balance"]["mean_over_max"] for name, run in runs.items()},
            "gain": runs["linear"]["step_ms"]["mean"] / after["step_ms"]["mean"] - 1.0,
        }
