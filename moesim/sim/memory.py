"""Does it fit: bytes per device of weights, KV cache and activations against the capacity of the device tier.

A static account of one deployment; peaks are taken over the passes of a trace. Shapes: R ranks. Bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import PlanError
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.plan import Plan
from moesim.sim.holdings import expert_parameters, held
from moesim.sim.pipeline_settings import PipelineSettings
from moesim.sim.stages import Stages
from moesim.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes on the fullest device."""

    tier: str
    capacity_bytes: float
    weights_bytes: float
    kv_bytes: float
    activation_bytes: float
    training_bytes: float = 0.0
    """Gradients and optimizer state."""

    @property
    def peak_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.training_bytes

    def by_use(self) -> dict[str, dict[str, float]]:
        """Return tier → use → bytes."""
        uses = {"weights": self.weights_bytes, "kv": self.kv_bytes, "activations": self.activation_bytes}
        return {self.tier: uses | ({"training": self.training_bytes} if self.training_bytes else {})}


def device_tier(cluster: Cluster) -> str:
    """Return the tier that weights live in: the largest one attached to the device, else the node's DRAM."""
    tiers = [tier for tier in cluster.tiers.values() if tier.attached_to == "device" and tier.name != "sram"]
    return max(tiers, key=lambda tier: tier.capacity_bytes).name if tiers else "dram"


def capacity_bytes(cluster: Cluster, name: str) -> float:
    """Return a device's part of a tier."""
    tier = cluster.tiers[name]
    return tier.capacity_bytes / (cluster.devices_per_node if tier.shared else 1)


def weight_bytes_R(model: MoEModel, plan: Plan, *, attention_tp: int, stages: Stages | None = None, experts: bool = True) -> np.ndarray:
    """Return float64 [R]: bytes of weights on every rank of all stages, with or without its routed experts."""
    one = sizes.expert_bytes(model) if experts else 0.0
    return np.concatenate([each.dense_bytes + each.slots_R * one for each in held(model, plan, attention_tp=attention_tp, stages=stages)])


def kv_bytes_R(model: MoEModel, plan: Plan, *, attention_tp: int, stages: Stages | None = None) -> np.ndarray:
    """Return float64 [R]: bytes of KV cache that one token takes on every rank of all stages."""
    layers = [each.layers for each in held(model, plan, attention_tp=attention_tp, stages=stages)]
    return np.repeat(layers, plan.num_ranks) * sizes.kv_bytes_per_token_layer(model, attention_tp)


def training_bytes_R(model: MoEModel, plan: Plan, *, attention_tp: int, stages: Stages, settings: PipelineSettings) -> np.ndarray:
    """Return float64 [R]: bytes of gradients and optimizer state on every rank of all stages."""
    shards = stages.ranks // attention_tp if settings.shard_optimizer else 1
    parts = []
    for each in held(model, plan, attention_tp=attention_tp, stages=stages):
        experts = each.slots_R * expert_parameters(model)
        parts.append(settings.gradient_bytes * (each.dense_parameters + experts) + settings.optimizer_bytes * (each.dense_parameters / shards + experts))
    return np.concatenate(parts)


def account(
    cluster: Cluster,
    model: MoEModel,
    plan: Plan,
    *,
    attention_tp: int,
    kv_entries: float,
    tokens: float,
    stages: Stages | None = None,
    training: PipelineSettings | None = None,
    experts: bool = True,
) -> MemoryAccount:
    """Return the account of the fullest device; `kv_entries` and `tokens` are the largest per rank and pass.

    stages: pipeline stages, where there are some; training: the settings of a training step, which has gradients, optimizer state and the
    activations of all micro-batches in flight (nothing is computed again), and no KV cache; experts: are the routed ones there?
    Raises PlanError if it exceeds the tier's capacity.
    """
    name = device_tier(cluster)
    capacity = capacity_bytes(cluster, name)
    weights_R = weight_bytes_R(model, plan, attention_tp=attention_tp, stages=stages, experts=experts)
    layers_R = np.repeat([each.layers for each in held(model, plan, attention_tp=attention_tp, stages=stages)], plan.num_ranks)
    width = 2 * model.hidden_size + max(model.dense_ffn_size, model.top_k * model.expert_ffn_size + model.shared_ffn_size)
    kv_R = kv_entries * kv_bytes_R(model, plan, attention_tp=attention_tp, stages=stages)
    activations_R = np.full(len(weights_R), tokens * width * DTYPE_BYTES[model.dtype])
    state_R = np.zeros(len(weights_R))
    if training is not None and stages is not None:
        state_R = training_bytes_R(model, plan, attention_tp=attention_tp, stages=stages, settings=training)
        per_chunk = layers_R / np.repeat([len(stages.order.chunks_of(stage)) for stage in range(stages.count)], plan.num_ranks)
        in_flight = np.repeat([stages.order.peak_in_flight(stage) for stage in range(stages.count)], plan.num_ranks)
        activations_R = activations_R / stages.order.num_micro * in_flight * per_chunk
        kv_R = np.zeros(len(weights_R))
    rank = int((weights_R + kv_R + activations_R + state_R).argmax())
    result = MemoryAccount(
        tier=name,
        capacity_bytes=capacity,
        weights_bytes=float(weights_R[rank]),
        kv_bytes=float(kv_R[rank]),
        activation_bytes=float(activations_R[rank]),
        training_bytes=float(state_R[rank]),
    )
    if result.peak_bytes > capacity:
        need = result.peak_bytes - capacity
        remedy = "use more devices, fewer redundant slots or fewer tokens per step"
        dense = float(weight_bytes_R(model, plan, attention_tp=attention_tp, stages=stages, experts=False)[rank])
        if experts and (stages is None or stages.count == 1) and result.peak_bytes - result.weights_bytes + dense < capacity:
            remedy += ", or keep experts in another tier with --set offload.tier=…"
        state = f"gradients and optimizer {format_bytes(result.training_bytes)}, " if result.training_bytes else ""
        raise PlanError(
            f"{plan.source}: rank {rank} of {cluster.name} needs {format_bytes(result.peak_bytes)} of {name} (weights {format_bytes(result.weights_bytes)}, "
            f"{state}KV {format_bytes(result.kv_bytes)}, activations {format_bytes(result.activation_bytes)}), must be <= {format_bytes(capacity)}; "
            f"{format_bytes(need)} are missing: {remedy}"
        )
    return result
