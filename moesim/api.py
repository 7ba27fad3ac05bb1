"""What notebooks and users import: replay a trace, solve for a plan, each from names or paths to a report.

`replay` → `Replay` (report, ledger, plan); `solve` → `Solution` (report, plan). A report is the JSON object that the
command line prints; its keys are stable. Bad input raises an `InputError` that says what to change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.balance import balance_of
from moesim.costs.model import CostModel
from moesim.errors import InputError, ModelError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.model import sizes
from moesim.model.hf_config import load_model
from moesim.model.moe_model import MoEModel
from moesim.plan import Parallel, Plan, linear
from moesim.report.summary import replay_report
from moesim.sim import memory
from moesim.sim.batch import micro_batch_T, pass_shape
from moesim.sim.build import ProgramBuilder
from moesim.sim.ledger import Ledger
from moesim.sim.loads import LoadCompiler
from moesim.sim.replay import Part, Pass, run_passes
from moesim.sim.settings import Settings
from moesim.traces.open import check_fits, open_trace
from moesim.traces.routing_trace import RoutingTrace, TraceShape
from moesim.traces.steps import StepTokens, iter_steps

PLACEMENTS = ("linear", "round_robin", "random", "eplb")
OBJECTIVES = ("balance", "robust", "traffic", "hops")
"""`traffic`: distinct ranks that a token reaches in a layer; `hops`: ranks left between layers, for context-coherent execution."""
AFFINITY_SLACK = 0.1
"""How much busier than in a balanced plan the busiest rank may be where traffic is the objective."""
GAIN_TOKENS = 8192
"""Tokens of the trace on which `solve` replays the plan to predict its gain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay returns."""

    report: dict[str, Any]
    ledger: Ledger
    plan: Plan
    load_LE: np.ndarray
    """int64 [L, E]: routed (token, expert) choices."""

    def write(self, folder: Path) -> list[Path]:
        """Write metrics.json, steps.csv and timeline.json to `folder`; return their paths."""
        from moesim.report.files import write_replay

        return write_replay(self.report, self.ledger, folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a solve returns."""

    report: dict[str, Any]
    plan: Plan


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
    moe_model, cluster = _model(model), _cluster(hardware)
    routing = _trace(trace, moe_model, seed, map_layers)
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    costs = CostModel(cluster, moe_model, strict=strict)
    placed = _plan(plan, placement, routing, moe_model, cluster, seed)
    builder = _builder(cluster, moe_model, placed, costs, chosen)
    passes = _passes(routing, cluster.num_ranks, tokens_per_step, seed, micro_batches=chosen.micro_batches)
    return _simulate(passes, builder, routing, tokens_per_step, progress, began)


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
    moe_model, cluster = _model(model), _cluster(hardware)
    listed = [traces] if isinstance(traces, (str, RoutingTrace)) else list(traces)
    if not listed:
        raise InputError("solve: no trace given; name at least one")
    routings = [_trace(item, moe_model, seed, map_layers) for item in listed]
    objective = objective or ("robust" if len(routings) > 1 else "balance")
    if objective not in OBJECTIVES:
        raise InputError(
            describe("solve", "objective", objective, f"must be one of {', '.join(OBJECTIVES)}", "traffic and latency objectives are not available yet")
        )
    if not 0 <= redundant <= 1 << 16:
        raise InputError(describe("solve", "redundant", redundant, "must be in 0..65536"))
    if move_budget_bytes is not None and previous is None:
        raise InputError("solve: --move-budget needs --from; name the plan that is running now")
    load_KLE = _windows(routings, objective)
    old = None if previous is None else _read_plan(previous)
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


def parallelize(
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: int | None = None,
    arrival_rps: float | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    routing: str = "balanced",
    objective: str = "throughput",
    modes: tuple[str, ...] = ("mixed", "disaggregated"),
    time_limit_s: float | None = None,
) -> dict[str, Any]:
    """Search how to split a model over all devices of a cluster; return the report of `moesim parallel`.

    routing: `balanced`, `zipf:S`, or a trace (name, path, `synthetic:…`) whose expert loads are taken. The other arguments are those of
    `moesim.solvers.parallelism`. Raises InfeasibleError, naming the smallest violated requirement, if no deployment will do.
    """
    from moesim.solvers.parallelism import Slo, Space, Workload, plan_parallelism

    began = time.perf_counter()
    moe_model, cluster = _model(model), _cluster(hardware)
    named = routing == "balanced" or routing.startswith("zipf:")
    load: str | np.ndarray = routing if named else _windows([_trace(routing, moe_model, 0, None)], "balance")[0]
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, concurrency=concurrency, arrival_rps=arrival_rps, routing=load)
    limit = None if time_limit_s is None else (lambda: time_limit_s - (time.perf_counter() - began))
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    result = plan_parallelism(moe_model, cluster, workload, slo, CostModel, space=Space(modes=modes), deadline=limit, objective=objective)
    return {
        "schema": "moesim.parallel/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "routing": routing,
        "wall_s": time.perf_counter() - began,
        **result.as_dict(),
    }


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


# --- documents -------------------------------------------------------------------------------------


def trace_shape(model: MoEModel) -> TraceShape:
    """Return what a routing trace has to agree with to run on `model`."""
    if not model.moe_layer_ids:
        raise ModelError(f"{model.name}: has no MoE layers, so there is no routing to replay; name a model with experts")
    return TraceShape(
        model=model.name,
        num_experts=model.num_experts,
        top_k=model.top_k,
        moe_layer_ids=model.moe_layer_ids,
        num_groups=model.num_groups,
        top_k_groups=model.top_k_groups,
    )


def _model(ref: str | MoEModel) -> MoEModel:
    return ref if isinstance(ref, MoEModel) else load_model(ref)


def _cluster(ref: str | Cluster) -> Cluster:
    return ref if isinstance(ref, Cluster) else load_cluster(ref)


def _trace(ref: str | RoutingTrace, model: MoEModel, seed: int, map_layers: str | None) -> RoutingTrace:
    shape = trace_shape(model)
    routing = ref if isinstance(ref, RoutingTrace) else open_trace(ref, shape=shape, seed=seed)
    return check_fits(routing, shape, map_layers)


def _read_plan(ref: str | Path | Plan) -> Plan:
    return ref if isinstance(ref, Plan) else Plan.read(Path(ref))


def _plan(ref: str | Path | Plan | None, placement: str, routing: RoutingTrace, model: MoEModel, cluster: Cluster, seed: int) -> Plan:
    if ref is not None:
        return _read_plan(ref)
    if placement not in PLACEMENTS:
        raise InputError(describe("--placement", "placement", placement, f"must be one of {', '.join(PLACEMENTS)}"))
    if placement == "eplb":
        return solve(routing, model=model, hardware=cluster, objective="balance", solver="eplb", seed=seed, predict=False).plan
    return linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=cluster.num_ranks, kind=placement, seed=seed)


def _windows(routings: Sequence[RoutingTrace], objective: str) -> np.ndarray:
    """Return float64 [K, L, E]: one window per trace; a single trace under `robust` gives its own windows."""
    if len(routings) == 1 and objective == "robust":
        return routings[0].counts_WLE().astype(np.float64)
    return np.stack([routing.counts_WLE("all")[0] for routing in routings]).astype(np.float64)


def _slots_per_rank(model: MoEModel, cluster: Cluster, redundant: int, old: Plan | None) -> np.ndarray:
    if old is not None:
        if old.num_ranks != cluster.num_ranks:
            raise InputError(describe(old.source, "num_ranks", old.num_ranks, f"must equal the {cluster.num_ranks} devices of {cluster.name}"))
        return np.bincount(old.slot_rank_S, minlength=cluster.num_ranks)
    total = model.num_experts + redundant
    return np.bincount(np.arange(total) % cluster.num_ranks, minlength=cluster.num_ranks)


# --- running ---------------------------------------------------------------------------------------


def _builder(cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, settings: Settings) -> ProgramBuilder:
    """Check that plan, model and cluster fit each other, weights included, and return what builds their Programs."""
    plan.check_model(name=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids)
    builder = ProgramBuilder(cluster=cluster, model=model, plan=plan, costs=costs, settings=settings)
    memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=0, tokens=0)
    return builder


def _part(step: StepTokens, keep_T: np.ndarray | None, num_ranks: int) -> Part:
    rows = slice(None) if keep_T is None else keep_T
    rank_T, valid = step.rank_T[rows], None if step.valid_TLK is None else step.valid_TLK[rows]
    shape = pass_shape(rank_T=rank_T, phase_T=step.phase_T[rows], request_T=step.request_T[rows], position_T=step.position_T[rows], num_ranks=num_ranks)
    return Part(shape, step.experts_TLK[rows], rank_T, valid)


def _passes(
    routing: RoutingTrace, num_ranks: int, tokens_per_step: int | None, seed: int, *, micro_batches: int = 1, max_tokens: int | None = None
) -> Iterator[Pass]:
    done = 0
    for step in iter_steps(routing, num_ranks=num_ranks, tokens_per_step=tokens_per_step, seed=seed):
        whole = _part(step, None, num_ranks)
        if micro_batches == 1:
            yield Pass(step.step, whole.shape, (whole,))
        else:
            number_T = micro_batch_T(step.rank_T, micro_batches)
            yield Pass(step.step, whole.shape, tuple(_part(step, number_T == index, num_ranks) for index in range(micro_batches)))
        done += len(step.rank_T)
        if max_tokens is not None and done >= max_tokens:
            return


def _simulate(
    passes: Iterable[Pass],
    builder: ProgramBuilder,
    routing: RoutingTrace,
    tokens_per_step: int | None,
    progress: Callable[[int], None] | None,
    began: float,
) -> Replay:
    cluster, model, plan = builder.cluster, builder.model, builder.plan
    compiler = LoadCompiler(plan, ranks_per_node=cluster.devices_per_node)
    run = run_passes(passes, builder=builder, compiler=compiler, progress=progress)
    if run.steps == 0:
        raise TraceError(f"{routing.source}: holds no token to replay; every row is a warm-up dummy or the trace is empty")
    account = memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=run.kv_entries_peak * builder.tp, tokens=run.tokens_peak)
    report = replay_report(run, routing, builder, account, tokens_per_step, time.perf_counter() - began)
    return Replay(report=report, ledger=run.ledger, plan=plan, load_LE=run.sums.expert_LE)


def _predict(report: dict[str, Any], routing: RoutingTrace, model: MoEModel, cluster: Cluster, plan: Plan, seed: int) -> None:
    """Replay the plan and linear placement on the same head of the first trace and add what they predict."""
    tokens = GAIN_TOKENS if routing.kind == "counts" or routing.is_synthetic and routing.num_rows > GAIN_TOKENS else None
    passes = list(_passes(routing, cluster.num_ranks, tokens, seed, max_tokens=GAIN_TOKENS))
    costs = CostModel(cluster, model)
    before, after = (
        _simulate(passes, _builder(cluster, model, choice, costs, Settings()), routing, tokens, None, 0.0).report
        for choice in (_plan(None, "linear", routing, model, cluster, seed), plan)
    )
    report["traffic"] = {"distinct_remote_ranks": after["traffic"]["distinct_remote_ranks"], "inter_node_bytes": after["bytes"]["inter_node"]}
    report["predicted"] = {
        "tokens": after["tokens"],
        "step_ms": {"linear": before["step_ms"]["mean"], "plan": after["step_ms"]["mean"]},
        "balance": {"linear": before["balance"]["mean_over_max"], "plan": after["balance"]["mean_over_max"]},
        "gain": before["step_ms"]["mean"] / after["step_ms"]["mean"] - 1.0,
    }
