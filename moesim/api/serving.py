"""`serve`: requests, a model, a machine, routing and serving settings in; latencies and throughput out."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, need_equal_layers, read_plan, trace_of
from moesim.costs import footprint
from moesim.costs.energy import cost
from moesim.costs.group import Group
from moesim.costs.group_loads import Placement, capped_LE, linear_placement
from moesim.costs.model import CostModel
from moesim.costs.provenance import Provenance
from moesim.costs.step import StepModel
from moesim.errors import InputError, PlanError, describe
from moesim.files import write_atomic
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.serving.curves import StepCurves
from moesim.sim.serving.instance import Pool
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.serving.simulate import ServingRun, Simulation
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request, Requests
from moesim.traces.requests.open import open_requests
from moesim.traces.routing_trace import RoutingTrace
from moesim.units import format_bytes

BALANCED = "synthetic:balanced"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What the step times need to know of a routing trace."""

    source: str
    kind: str
    synthetic: str | None
    assign_LE: np.ndarray
    """Expected choices of every expert by one token; one row where all layers are alike."""
    drawn: bool = False
    """Whether the choices of a batch are drawn although all experts are equally popular: a small batch then leaves experts idle, as a router does."""

    @property
    def is_even(self) -> bool:
        """Whether every batch loads all experts alike, by definition."""
        return (
            not self.drawn
            and self.synthetic is not None
            and self.synthetic.startswith("synthetic:balanced")
            and bool((self.assign_LE == self.assign_LE[:, :1]).all())
        )

    def report(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"source": self.source, "kind": self.kind, "synthetic": self.synthetic, "use": "even loads" if self.is_even else "loads drawn per batch"}


def routing_of(ref: str | RoutingTrace, model: MoEModel, seed: int = 0, map_layers: str | None = None) -> Routing | None:
    """Return the loads of a trace on `model`; None for a dense model, which routes nothing."""
    if not model.moe_layer_ids:
        return None
    trace = trace_of(ref, model, seed, map_layers)
    load_LE = trace.counts_WLE("all")[0].astype(np.float64)
    if (load_LE == load_LE[:1]).all():
        load_LE = load_LE[:1]
    return Routing(source=trace.source, kind=trace.kind, synthetic=trace.synthetic, assign_LE=capped_LE(load_LE, model.top_k))


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How a model is served: degrees of an instance, limits, and what the steps cost."""

    cluster: Cluster
    model: MoEModel
    settings: Settings
    group: Group
    curves: StepCurves
    blocks: int
    """KV blocks of an attention replica."""
    costs: CostModel
    routing: Routing | None

    def pool(self, instances: int, scale: float = 1.0) -> Pool:
        """Return that many instances whose steps take `scale` times their time."""
        chosen, tp = self.settings.serving, self.group.tp
        swap = 0.0
        if chosen.preemption == "swap":
            if "dram" not in self.cluster.tiers:
                raise InputError(describe("--set", "serving.preemption", "swap", f"needs a host memory (tier dram), which {self.cluster.name} lacks"))
            token = sizes.kv_bytes_per_token(self.model, tp) / chosen.pp
            moved = self.costs.tier_copy("dram", np.array([1e9, 2e9])).seconds
            swap = token * float(moved[1] - moved[0]) / 1e9
        return Pool(
            curves=self.curves,
            instances=instances,
            blocks=self.blocks,
            settings=chosen,
            host_s=self.settings.host_overhead_us * 1e-6,
            draft_s=chosen.draft_us * 1e-6,
            swap_s_per_token=swap,
            scale=scale,
        )

    def transfer_s(self, tokens: int) -> float:
        """Return the time in which the devices of an instance, side by side, hand the KV cache of a prompt over."""
        nbytes = float(footprint.kv_L(self.model, self.group.tp, tokens).sum()) / self.settings.serving.pp
        far = self.cluster.num_nodes > 1
        return float(self.costs.p2p(np.array([nbytes]), nodes=2 if far else 1).seconds[0])

    def run(
        self,
        requests: Requests,
        *,
        scale: float = 1.0,
        prefill: Deployment | None = None,
        on_finish: Callable[[Request, float, float, float, float], None] | None = None,
    ) -> ServingRun:
        """Serve requests; scale: factor on the time of every step; prefill: degrees and limits of the prefill instances where they are others."""
        chosen, first = self.settings.serving, prefill or self
        handed: dict[int, float] = {}

        def transfer_s(tokens: int) -> float:
            if tokens not in handed:
                handed[tokens] = max(first.transfer_s(tokens), self.transfer_s(tokens))
            return handed[tokens]

        return Simulation(
            requests,
            chosen,
            self.pool(chosen.instances, scale),
            prefill=first.pool(chosen.prefill_instances, scale) if chosen.prefill_instances else None,
            transfer_s=transfer_s,
            max_context=chosen.max_model_len or self.model.max_position,
            on_finish=on_finish,
        )()


def deployment_of(
    cluster: Cluster,
    model: MoEModel,
    settings: Settings,
    *,
    group: Group,
    routing: Routing | None,
    plan: Plan | None = None,
    backend: str = "vllm",
    strict: bool = False,
    seed: int = 0,
) -> Deployment:
    """Build a deployment. Raises PlanError if it does not fit the cluster or the model not into memory."""
    chosen = settings.serving
    need = group.ranks * chosen.pp * (chosen.instances + chosen.prefill_instances)
    if need > cluster.num_ranks:
        raise PlanError(describe(cluster.name, "devices", cluster.num_ranks, f"must be >= {need}: {group.ranks} per stage, {chosen.pp} stages, all instances"))
    if chosen.pp > model.num_layers:
        raise InputError(describe("--set", "serving.pp", chosen.pp, f"must be <= the {model.num_layers} layers of {model.name}"))
    placement: Placement = linear_placement
    if plan is not None:
        table = plan.slot_to_expert_LS
        placement = lambda load_LE, ranks, slots: table  # noqa: E731
        if routing is not None and len(routing.assign_LE) == 1:
            routing = replace(routing, assign_LE=np.repeat(routing.assign_LE, len(table), axis=0))
    costs = CostModel(cluster, model, strict=strict, backend=backend)
    assign = routing.assign_LE if routing is not None else np.zeros((0, 0))
    draw = None if routing is None or routing.is_even else seed
    steps = StepModel(model, cluster, costs, assign, placement, draw_seed=draw, all2all=chosen.all2all)
    context = chosen.max_model_len or model.max_position
    blocks = chosen.num_gpu_blocks or kv_blocks(cluster, model, group, chosen)
    curves = StepCurves(
        steps,
        group,
        pp=chosen.pp,
        max_tokens=chosen.max_num_batched_tokens if chosen.chunked_prefill else max(chosen.max_num_batched_tokens, min(context, 1 << 17)),
        max_seqs=chosen.max_num_seqs,
        max_context=context,
        verify=1 + chosen.draft_tokens,
    )
    return Deployment(cluster=cluster, model=model, settings=settings, group=group, curves=curves, blocks=blocks, costs=costs, routing=routing)


def kv_blocks(cluster: Cluster, model: MoEModel, group: Group, chosen: ServingSettings) -> int:
    """Return the KV blocks of one attention replica: what weights and activations of the fullest stage leave.

    Layers with a sliding window keep the window of `max_num_seqs` sequences, at most their share of what is left. Raises PlanError if nothing is left.
    """
    capacity = footprint.capacity_bytes(cluster, chosen.memory_share)
    weights = footprint.weights_L(model, group)
    ends = footprint.ends_bytes(model, group.tp, chosen.pp)
    work = float(footprint.activation_bytes(model, group, chosen.max_num_batched_tokens))
    per_layer = sizes.kv_bytes_per_token_layer(model, group.tp)
    windowed = set(model.attention.sliding_layer_ids) if model.attention.sliding_window else set()
    fewest = None
    for stage, layers in enumerate(np.array_split(np.arange(model.num_layers), chosen.pp)):
        used = float(weights[layers].sum()) + (ends[0] if stage == 0 else 0.0) + (ends[1] if stage == chosen.pp - 1 else 0.0) + work
        left = capacity - used
        if left <= 0:
            raise PlanError(
                f"{cluster.name}: {model.name} with tp {group.tp}, ep {group.ep}, pp {chosen.pp} needs {format_bytes(used)} a device for weights and "
                f"activations, must be < {format_bytes(capacity)}: use more devices, more stages, or a larger serving.memory_share"
            )
        narrow = sum(layer in windowed for layer in layers.tolist())
        kept = min(narrow * per_layer * float(model.attention.sliding_window or 0) * chosen.max_num_seqs, left * narrow / len(layers))
        full = max(len(layers) - narrow, 1)
        blocks = int((left - kept) / (full * per_layer * chosen.block_size))
        fewest = blocks if fewest is None else min(fewest, blocks)
    assert fewest is not None
    if fewest < 1:
        raise PlanError(f"{cluster.name}: no KV block of {chosen.block_size} tokens fits beside the weights of {model.name}; use more devices")
    return fewest


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serving returns."""

    report: dict[str, Any]
    rows: list[tuple[str, float, float, float, float]]
    """Id, arrival, time to first token, time per output token and latency (s) of every request, where they were asked for."""

    def write(self, folder: Path, *, plots: bool = False) -> list[Path]:
        """Write metrics.json and requests.csv to `folder`; the wall time is left out, so that equal runs give equal bytes."""
        if plots:
            raise InputError("replay: --plots draws forward passes; a replay of requests has none to draw, drop it")
        stable = {key: value for key, value in self.report.items() if key != "wall_s"}
        metrics, table = folder / "metrics.json", folder / "requests.csv"
        write_atomic(metrics, json.dumps(stable, indent=2, allow_nan=False) + "\n")

        def fill(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["request", "arrival_s", "ttft_ms", "tpot_ms", "latency_ms"])
                writer.writerows((name, f"{at:.6f}", *(f"{value * 1e3:.6f}" for value in rest)) for name, at, *rest in self.rows)

        write_atomic(table, fill)
        return [metrics, table]


def serve(
    requests: str | Path | Requests,
    *,
    trace: str | RoutingTrace,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    placement: str = "linear",
    settings: Mapping[str, str] | Settings | None = None,
    map_layers: str | None = None,
    backend: str = "vllm",
    strict: bool = False,
    seed: int = 0,
    keep_rows: bool = False,
) -> Serving:
    """Serve requests on a cluster whose devices are shared out to equal instances; `trace` says how tokens are routed.

    plan, placement: as for `replay`; they place the experts of one stage. An instance has
    num_ranks / (all instances · pp) ranks per stage, attention_tp of which share an attention replica. keep_rows: keep the times of
    every request. Raises InputError if any document breaks a rule, or if they do not fit each other.
    """
    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    need_equal_layers(moe_model, "a replay of requests")
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    _check_settings(chosen)
    asked = requests if isinstance(requests, Requests) else open_requests(requests, seed=seed)
    placed = read_plan(plan) if plan is not None else None
    if placed is not None:
        placed.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
    if placed is None and placement != "linear":
        from moesim.api.replaying import placed_plan

        placed = placed_plan(None, placement, trace_of(trace, moe_model, seed, map_layers), moe_model, cluster, seed)
    group = group_of(cluster, moe_model, chosen, placed)
    routing = routing_of(trace, moe_model, seed, map_layers)
    deployment = deployment_of(cluster, moe_model, chosen, group=group, routing=routing, plan=placed, backend=backend, strict=strict, seed=seed)
    rows: list[tuple[str, float, float, float, float]] = []

    def note(request: Request, arrival: float, queued: float, first: float, end: float) -> None:
        tpot = (end - first) / (request.output_tokens - 1) if request.output_tokens > 1 else 0.0
        rows.append((request.id, arrival, first - arrival, tpot, end - arrival))

    run = deployment.run(asked, on_finish=note if keep_rows else None)
    return Serving(report=serving_report(run, asked, deployment, time.perf_counter() - began), rows=rows)


def _check_settings(settings: Settings) -> None:
    """Raise InputError for a setting that acts on traced passes only."""
    defaults = Settings()
    for item in fields(Settings):
        if item.name not in ("attention_tp", "host_overhead_us", "serving") and getattr(settings, item.name) != getattr(defaults, item.name):
            raise InputError(describe("--set", item.name, "a value", "acts on traced passes and does not go with requests", "drop it, or drop --requests"))


def group_of(cluster: Cluster, model: MoEModel, settings: Settings, plan: Plan | None) -> Group:
    """Return the degrees of a stage when all devices of a cluster are shared out. Raises InputError if they do not divide."""
    chosen = settings.serving
    stages = chosen.pp * (chosen.instances + chosen.prefill_instances)
    ranks, rest = divmod(cluster.num_ranks, stages)
    tp = settings.attention_tp if settings.attention_tp > 1 or plan is None else plan.parallel.tp
    if rest or not ranks or ranks % tp:
        rule = f"must divide by {stages} stages of all instances, and those by attention_tp = {tp}"
        raise InputError(describe(cluster.name, "devices", cluster.num_ranks, rule))
    group = group_with(model, tp=tp, dp=ranks // tp, expert_tp=chosen.expert_tp, slots=plan.num_slots if plan is not None else None)
    if plan is not None and (plan.num_ranks != group.ep or (plan.slot_rank_S != np.repeat(np.arange(group.ep), group.slots)).any()):
        rule = f"must be the {group.ep} expert-parallel ranks of a stage, with {group.slots} slots each"
        raise PlanError(describe(plan.source, "ranks", plan.num_ranks, rule))
    return group


def group_with(model: MoEModel, *, tp: int, dp: int, expert_tp: int, slots: int | None = None) -> Group:
    """Return the degrees of a stage; slots: of a layer, None: one per expert. Raises InputError if they do not fit the model."""
    if model.attention.num_heads % tp:
        raise InputError(describe("--set", "attention_tp", tp, f"must divide the {model.attention.num_heads} heads of {model.name}"))
    if not model.moe_layer_ids:
        return Group(tp, dp, 1, 1, 0)
    ranks = tp * dp
    if ranks % expert_tp or model.expert_ffn_size % expert_tp:
        rule = f"must divide the {ranks} ranks of a stage and the {model.expert_ffn_size} columns of an expert"
        raise InputError(describe("--set", "serving.expert_tp", expert_tp, rule))
    ep = ranks // expert_tp
    count = slots or model.num_experts
    if count % ep:
        rule = f"must divide over {ep} expert-parallel ranks"
        raise InputError(describe("deployment", "slots per layer", count, rule, "choose serving.expert_tp or other devices"))
    return Group(tp, dp, ep, expert_tp, count // ep)


def serving_report(run: ServingRun, requests: Requests, deployment: Deployment, wall_s: float) -> dict[str, Any]:
    """Return the report of a replay that requests drive; its keys are those of `moesim.replay/1`."""
    group, chosen, routing = deployment.group, deployment.settings.serving, deployment.routing
    tokens = run.output_tokens + run.prompt_tokens
    simulated = run.simulated_s
    loads = deployment.curves.steps.loads(group)
    balance = None
    if loads is not None:
        mean, most = loads.rank_LX.mean(axis=1), loads.rank_LX.max(axis=1)
        ratio = mean / most
        balance = {"mean_over_max": float(mean.sum() / most.sum()), "layer_mean": float(ratio.mean()), "worst_layer": float(ratio.min())}
    tier = deployment.cluster.memory.name
    priced = cost(deployment.cluster, simulated_s=simulated, tokens=tokens, output_tokens=run.output_tokens)
    return {
        "schema": "moesim.replay/1",
        "model": deployment.model.name,
        "hardware": deployment.cluster.name,
        "deployment": {"tp": group.tp, "dp": group.dp, "ep": group.ep, "expert_tp": group.expert_tp, "pp": chosen.pp, "kv_blocks": deployment.blocks},
        "settings": deployment.settings.report(),
        "simulated_s": simulated,
        "wall_s": wall_s,
        "steps": run.sums.steps,
        "tokens": tokens,
        "tokens_per_s": tokens / simulated if simulated else 0.0,
        "output_tokens_per_s": run.output_tokens / simulated if simulated else 0.0,
        "step_ms": run.step.summary(),
        "breakdown_ms": _breakdown(run, deployment),
        "balance": balance,
        "memory": {tier: _peak_bytes(run, deployment)},
        "requests": {
            "source": requests.source,
            "format": requests.format,
            "finished": run.finished,
            "refused": run.refused,
            "excluded": dict(requests.excluded),
            "ttft_ms": run.ttft.summary(),
            "tpot_ms": run.tpot.summary(),
            "latency_ms": run.latency.summary(),
            "goodput": {"share": run.good / run.finished if run.finished else 0.0, "requests_per_s": run.good / simulated if simulated else 0.0},
        },
        "kv": {
            "peak_share": run.kv_peak,
            "preemptions": run.preemptions,
            "recomputed_tokens": run.recomputed_tokens,
            "prefix_hit_rate": run.prefix_tokens / run.prompt_tokens if run.prompt_tokens else 0.0,
            "transfers": run.transfers,
            "transfer_s": run.transfer_s,
        },
        "utilisation": run.sums.busy_s / (simulated * run.instances) if simulated else 0.0,
        "routing": routing.report() if routing is not None else None,
        "provenance": provenance(run, deployment),
        **({} if priced is None else {"cost": priced}),
    }


def _peak_bytes(run: ServingRun, deployment: Deployment) -> float:
    group, chosen = deployment.group, deployment.settings.serving
    weights = float(footprint.weights_L(deployment.model, group).sum()) / chosen.pp + max(footprint.ends_bytes(deployment.model, group.tp, chosen.pp))
    kv = run.kv_peak * deployment.blocks * chosen.block_size * sizes.kv_bytes_per_token(deployment.model, group.tp) / chosen.pp
    return weights + kv


def _breakdown(run: ServingRun, deployment: Deployment) -> dict[str, float]:
    """Return the mean ms of a step in MoE (routed experts, exchanges), in host work, and in the rest."""
    steps = max(run.sums.steps, 1)
    whole, moe, host = run.sums.busy_s / steps * 1e3, run.sums.moe_s / steps * 1e3, deployment.settings.host_overhead_us * 1e-3
    return {"attention_and_dense": whole - moe - host, "moe": moe, "host": host}


def provenance(run: ServingRun, deployment: Deployment) -> dict[str, float]:
    """Return the share of time by class, in a step with the run's mean batch."""
    costs, model, group, sums = deployment.costs, deployment.model, deployment.group, run.sums
    slots = max(sums.steps * (group.dp if deployment.curves.coupled else 1), 1)
    decodes, new, chunks = sums.decodes / slots, sums.prompt_tokens / slots, sums.chunks / slots
    tokens = np.array([decodes * deployment.curves.verify + new])
    moe, layers = len(model.moe_layer_ids), model.num_layers
    parts = [(layers, costs.attention_projections(tokens, group.tp)), (1, costs.head(np.array([decodes + chunks]), group.tp))]
    if sums.decodes:
        batch = np.array([decodes])
        context = np.array([sums.contexts / sums.decodes])
        parts.append((layers, costs.attention_core(phase="decode", sequences=batch, new_tokens=batch, context=context, tp=group.tp)))
    if sums.chunks:
        context = np.array([sums.prompt_contexts / sums.chunks])
        seqs = np.array([max(chunks, 1.0)])
        parts.append((layers, costs.attention_core(phase="prefill", sequences=seqs, new_tokens=np.array([new]), context=context, tp=group.tp)))
    if moe < layers:
        parts.append((layers - moe, costs.dense_ffn(tokens, tp=group.tp)))
    loads = deployment.curves.steps.loads(group)
    if loads is not None:
        parts.append((moe, costs.gate(tokens)))
        parts.append((moe, costs.experts(loads.slot_tokens(tokens * group.dp)[0, 0, :1], expert_tp=group.expert_tp)))
    shares = dict.fromkeys((one.name.lower() for one in Provenance), 0.0)
    for count, timed in parts:
        shares[Provenance(int(np.asarray(timed.provenance).max())).name.lower()] += count * float(np.asarray(timed.seconds).sum())
    total = sum(shares.values())
    return {name: value / total if total else 0.0 for name, value in shares.items()}
