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
from moesim.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAccount:
    """Bytes on the fullest device."""

    tier: str
    capacity_bytes: float
    weights_bytes: float
    kv_bytes: float
    activation_bytes: float

    @property
    def peak_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes


def device_tier(cluster: Cluster) -> str:
    """Return the tier that weights live in: the largest one attached to the device, else the node's DRAM."""
    tiers = [tier for tier in cluster.tiers.values() if tier.attached_to == "device" and tier.name != "sram"]
    return max(tiers, key=lambda tier: tier.capacity_bytes).name if tiers else "dram"


def capacity_bytes(cluster: Cluster, name: str) -> float:
    """Return a device's part of a tier."""
    tier = cluster.tiers[name]
    return tier.capacity_bytes / (cluster.devices_per_node if tier.shared else 1)


def weight_bytes_R(model: MoEModel, plan: Plan, *, attention_tp: int, experts: bool = True) -> np.ndarray:
    """Return float64 [R]: bytes of weights on every rank, with or without its routed experts."""
    fixed = sizes.embedding_bytes(model, attention_tp)
    fixed += model.num_layers * sizes.attention_weight_bytes(model, attention_tp)
    fixed += (model.num_layers - len(model.moe_layer_ids)) * sizes.dense_ffn_bytes(model, attention_tp)
    fixed += len(model.moe_layer_ids) * (sizes.shared_ffn_bytes(model) + sizes.router_bytes(model))
    if model.moe_layer_ids and experts:
        slots_R = np.zeros(plan.num_ranks)
        np.add.at(slots_R, plan.slot_rank_S, (plan.slot_to_expert_LS >= 0).sum(axis=0).astype(float))
        return fixed + slots_R * sizes.expert_bytes(model)
    return np.full(plan.num_ranks, fixed)


def account(cluster: Cluster, model: MoEModel, plan: Plan, *, attention_tp: int, kv_entries: float, tokens: float, experts: bool = True) -> MemoryAccount:
    """Return the account of the fullest device; `kv_entries` and `tokens` are the largest per rank and pass; experts: are the routed ones there?

    Raises PlanError if it exceeds the capacity of the tier.
    """
    name = device_tier(cluster)
    capacity = capacity_bytes(cluster, name)
    weights_R = weight_bytes_R(model, plan, attention_tp=attention_tp, experts=experts)
    rank = int(weights_R.argmax())
    width = 2 * model.hidden_size + max(model.dense_ffn_size, model.top_k * model.expert_ffn_size + model.shared_ffn_size)
    result = MemoryAccount(
        tier=name,
        capacity_bytes=capacity,
        weights_bytes=float(weights_R[rank]),
        kv_bytes=kv_entries * sizes.kv_bytes_per_token(model, attention_tp),
        activation_bytes=tokens * width * DTYPE_BYTES[model.dtype],
    )
    if result.peak_bytes > capacity:
        need = result.peak_bytes - capacity
        remedy = "use more devices, fewer redundant slots or fewer tokens per step"
        if experts and float(weight_bytes_R(model, plan, attention_tp=attention_tp, experts=False)[rank]) + result.kv_bytes + result.activation_bytes < capacity:
            remedy += ", or keep experts in another tier with --set offload.tier=…"
        raise PlanError(
            f"{plan.source}: rank {rank} of {cluster.name} needs {format_bytes(result.peak_bytes)} of {name} (weights {format_bytes(result.weights_bytes)}, "
            f"KV {format_bytes(result.kv_bytes)}, activations {format_bytes(result.activation_bytes)}), must be <= {format_bytes(capacity)}; "
            f"{format_bytes(need)} are missing: {remedy}"
        )
    return result
