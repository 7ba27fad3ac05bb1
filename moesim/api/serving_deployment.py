"""How a model is served on a machine: the degrees of an instance, what the steps cost under a trace's routing, the KV blocks that fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.api.documents import trace_of
from moesim.costs import footprint
from moesim.costs.group import Group
from moesim.costs.group_loads import Placement, capped_LE, linear_placement
from moesim.costs.model import CostModel
from moesim.costs.step import StepModel
from moesim.errors import InputError, PlanError, describe
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
from moesim.traces.routing_trace import RoutingTrace
from moesim.units import format_bytes


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
    use: str = ""
    """What reports say of it; empty: that loads are even, or drawn."""

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
        use = self.use or ("even loads" if self.is_even else "loads drawn per batch")
        return {"source": self.source, "kind": self.kind, "synthetic": self.synthetic, "use": use}


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

    def pool(self, instances: int, scale: float = 1.0, *, decodes: bool = True) -> Pool:
        """Return that many instances whose steps take `scale` times their time; decodes: whether they make tokens, which need room."""
        chosen, tp = self.settings.serving, self.group.tp
        if not decodes:
            chosen = replace(chosen, admission_reserve=0.0)
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
            prefill=first.pool(chosen.prefill_instances, scale, decodes=False) if chosen.prefill_instances else None,
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
    expert_kernel: str = "",
    strict: bool = False,
    seed: int = 0,
    like: Deployment | None = None,
) -> Deployment:
    """Build a deployment; expert_kernel: see `CostModel`; like: one that differs in degrees and limits only, whose step times are used further.

    Raises PlanError if it does not fit the cluster or the model not into memory.
    """
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
    costs = like.costs if like is not None else CostModel(cluster, model, strict=strict, backend=backend, expert_kernel=expert_kernel)
    assign = routing.assign_LE if routing is not None else np.zeros((0, 0))
    draw = None if routing is None or routing.is_even else seed
    steps = like.curves.steps if like is not None else StepModel(model, cluster, costs, assign, placement, draw_seed=draw, all2all=chosen.all2all)
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
        narrow = sum(layer in windowed for layer in layers.tolist()) % len(layers)  # where no layer keeps everything, they share all that is left
        kept = min(narrow * per_layer * float(model.attention.sliding_window or 0) * chosen.max_num_seqs, left * narrow / len(layers))
        blocks = int((left - kept) / ((len(layers) - narrow) * per_layer * chosen.block_size))
        fewest = blocks if fewest is None else min(fewest, blocks)
    assert fewest is not None
    if fewest < 1:
        raise PlanError(f"{cluster.name}: no KV block of {chosen.block_size} tokens fits beside the weights of {model.name}; use more devices")
    return fewest


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
