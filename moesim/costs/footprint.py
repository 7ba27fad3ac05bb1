"""Bytes of one device, exactly: weights, KV cache, activations and staging, by layer and by pipeline stage.

Weights are those of `moesim.model.sizes`, scales and norms included: attention and dense FFN split over tp, experts over expert_tp, shared experts and
router on every rank, the input embedding on the first stage and the head on the last. KV holds the concurrent sequences at full length.
Shapes: S stages, L layers. Bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moesim.costs.group import Group
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES, MoEModel


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """The account of one device of one stage."""

    stage: int
    layers: tuple[int, int]
    """First layer and the one after the last."""
    weights_bytes: float
    kv_bytes: float
    activation_bytes: float
    staging_bytes: float
    capacity_bytes: float

    @property
    def used_bytes(self) -> float:
        """All of it."""
        return self.weights_bytes + self.kv_bytes + self.activation_bytes + self.staging_bytes

    @property
    def missing_bytes(self) -> float:
        """Bytes that the device lacks; 0 if it fits."""
        return max(0.0, self.used_bytes - self.capacity_bytes)

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON."""
        return {
            "stage": self.stage,
            "layers": list(self.layers),
            "weights_bytes": self.weights_bytes,
            "kv_bytes": self.kv_bytes,
            "activation_bytes": self.activation_bytes,
            "staging_bytes": self.staging_bytes,
            "used_bytes": self.used_bytes,
            "capacity_bytes": self.capacity_bytes,
        }


def capacity_bytes(cluster: Cluster, share: float) -> float:
    """Return the bytes of one device that may be planned."""
    tier = cluster.memory
    return share * tier.capacity_bytes / (cluster.devices_per_node if tier.shared else 1)


def slot_bytes(model: MoEModel, expert_tp: int) -> float:
    """Return the bytes of one rank's part of one routed expert, scales included."""
    return sum(sizes.matrix_bytes(*matrix, model.expert_dtype, model.weight_block) for matrix in sizes.ffn_matrices(model, model.expert_ffn_size, expert_tp))


@lru_cache(maxsize=4096)
def _weights(model: MoEModel, tp: int, expert_tp: int, slots: int) -> tuple[float, ...]:
    norms = 2 * model.hidden_size * DTYPE_BYTES[model.dtype]
    common = sizes.attention_weight_bytes(model, tp) + norms
    moe_ids = set(model.moe_layer_ids)
    dense = common + (sizes.dense_ffn_bytes(model, tp) if len(moe_ids) < model.num_layers else 0.0)
    moe = common + (sizes.shared_ffn_bytes(model) + sizes.router_bytes(model) + slots * slot_bytes(model, expert_tp) if moe_ids else 0.0)
    return tuple(moe if layer in moe_ids else dense for layer in range(model.num_layers))


def weights_L(model: MoEModel, group: Group) -> np.ndarray:
    """Return float64 [L]: bytes of weights of every layer on one device."""
    return np.array(_weights(model, group.tp, group.expert_tp, group.slots))


def ends_bytes(model: MoEModel, tp: int, stages: int) -> tuple[float, float]:
    """Return the bytes beside the layers on the first and on the last stage: embedding, head, final norm. Tied weights are kept once if one stage has both."""
    one = sizes.embedding_bytes(model, tp) / (1 if model.tie_embeddings else 2)
    final = model.hidden_size * DTYPE_BYTES[model.dtype]
    if stages == 1 and model.tie_embeddings:
        return one, final
    return one, one + final


def kv_L(model: MoEModel, tp: int, tokens: int) -> np.ndarray:
    """Return float64 [L]: KV bytes of one sequence of `tokens` on one device, layer by layer; a sliding window keeps at most itself."""
    per_token = sizes.kv_bytes_per_token_layer(model, tp)
    kept = np.full(model.num_layers, float(tokens))
    if model.attention.sliding_window:
        kept[list(model.attention.sliding_layer_ids)] = min(tokens, model.attention.sliding_window)
    return per_token * kept


def activation_bytes(model: MoEModel, group: Group, tokens: float | np.ndarray) -> np.ndarray:
    """Return the bytes of activations of a pass with `tokens` on every attention replica: two hidden states of the replica's tokens, and the widest FFN."""
    moe = (tokens / np.float64(group.tp)) * (model.top_k * model.expert_ffn_size + model.shared_ffn_size if model.moe_layer_ids else 0)
    dense = tokens * np.float64(model.dense_ffn_size / group.tp)
    return np.asarray((2.0 * tokens * model.hidden_size + np.maximum(moe, dense)) * DTYPE_BYTES[model.dtype])


def staging_bytes(model: MoEModel, group: Group, experts: int) -> float:
    """Return the bytes kept free on every device to receive experts while serving."""
    return experts * slot_bytes(model, group.expert_tp) if model.moe_layer_ids else 0.0


def stage_accounts(
    model: MoEModel, group: Group, bounds: tuple[int, ...], *, sequences: float, tokens_each: int, pass_tokens: float, staging_experts: int, capacity: float
) -> tuple[StageMemory, ...]:
    """Return the account of one device of every stage; all devices of a stage hold the same.

    bounds: S + 1 layer indices. sequences: those whose KV one attention replica holds, each of `tokens_each`. pass_tokens: tokens of a replica in one
    micro-batch.
    """
    stages = len(bounds) - 1
    weights, kv = weights_L(model, group), kv_L(model, group.tp, tokens_each)
    first, last = ends_bytes(model, group.tp, stages)
    result = []
    for stage in range(stages):
        low, high = bounds[stage], bounds[stage + 1]
        ends = (first if stage == 0 else 0.0) + (last if stage == stages - 1 else 0.0)
        result.append(
            StageMemory(
                stage=stage,
                layers=(low, high),
                weights_bytes=float(weights[low:high].sum()) + ends,
                kv_bytes=float(kv[low:high].sum() * sequences),
                activation_bytes=float(activation_bytes(model, group, pass_tokens)),
                staging_bytes=staging_bytes(model, group, staging_experts),
                capacity_bytes=capacity,
            )
        )
    return tuple(result)
