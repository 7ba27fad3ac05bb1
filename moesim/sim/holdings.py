"""What the ranks of a deployment hold: bytes and parameters of weights, by pipeline stage. Shapes: R ranks of all stages, L MoE layers, S slots."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.plan import Plan
from moesim.sim.stages import Stages


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What every rank of one stage holds."""

    layers: int
    dense_bytes: float
    """Weights that all data-parallel ranks have: attention, dense FFNs, shared experts, routers, embedding, head."""
    dense_parameters: float
    slots_R: np.ndarray
    """float64 [ranks of the stage]: slots with an expert, over the layers of the stage."""


def held(model: MoEModel, plan: Plan, *, attention_tp: int, stages: Stages | None = None) -> list[Held]:
    """Return what the ranks of every stage hold; stages None: one stage with all layers."""
    table, result = plan.slot_to_expert_LS >= 0, []
    for stage in range(1 if stages is None else stages.count):
        layers = range(model.num_layers) if stages is None else stages.layers_of(stage)
        rows = [row for row, layer in enumerate(model.moe_layer_ids) if layer in layers]
        dense, moe = len(layers) - len(rows), len(rows)
        ends = (stages is None or stages.holds(stage, 0)) + (stages is None or stages.holds(stage, -1))
        # Both ends on one stage may share a table; the account of a model counts one table if they do, else two.
        embeddings = sizes.embedding_bytes(model, attention_tp) * (min(ends, 1) if model.tie_embeddings else ends / 2)
        fixed = embeddings + len(layers) * sizes.attention_weight_bytes(model, attention_tp) + dense * sizes.dense_ffn_bytes(model, attention_tp)
        count = embeddings / DTYPE_BYTES[model.dtype] + len(layers) * _elements(sizes.attention_matrices(model, attention_tp))
        count += dense * _elements(sizes.ffn_matrices(model, model.dense_ffn_size, attention_tp))
        slots_R = np.zeros(plan.num_ranks)
        if moe:
            experts = sum(model.expert_counts_L[row] for row in rows)
            fixed += moe * sizes.shared_ffn_bytes(model) + sizes.router_bytes(model, experts)
            count += moe * _elements(sizes.ffn_matrices(model, model.shared_ffn_size)) + model.hidden_size * experts
            np.add.at(slots_R, plan.slot_rank_S, table[rows].sum(axis=0).astype(float))
        result.append(Held(layers=len(layers), dense_bytes=fixed, dense_parameters=count, slots_R=slots_R))
    return result


def expert_parameters(model: MoEModel) -> int:
    """Return the parameters of one routed expert of one layer."""
    return _elements(sizes.ffn_matrices(model, model.expert_ffn_size)) if model.num_experts else 0


def _elements(matrices: Iterable[sizes.Matrix]) -> int:
    return sum(rows * columns for rows, columns in matrices)
