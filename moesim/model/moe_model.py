"""The model document in memory: the architecture facts from which bytes and FLOPs of every operator follow.

Frozen; built by `moesim.model.hf_config` from a Hugging Face `config.json`. Layers are numbered from 0.
Sizes are in elements unless a name says bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.counts import normal_counts
from moesim.errors import ModelError, describe

DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "mxfp4": 0.53125, "int4": 0.5}
"""Bytes per element; mxfp4 holds one scale byte per 32 elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of every layer."""

    kind: str
    """`mha`, `gqa` or `mla`."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    sliding_window: int | None = None
    """Window of the layers that have one (gpt-oss: every second layer)."""
    sliding_every: int | None = None
    """Every how many layers a sliding-window layer occurs (nearest integer; exact in `sliding_layer_ids`); None: no such layers."""
    sliding_layer_ids: tuple[int, ...] = ()
    """Layers with the sliding window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEModel:
    """Architecture facts of a transformer with (or without) MoE layers."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    attention: Attention
    dense_ffn_size: int
    """Intermediate size of a dense layer's FFN; 0 if there is none."""
    moe_layer_ids: tuple[int, ...]
    """Layers with experts; empty for a dense model."""
    num_experts: int
    """E, routed experts per MoE layer (the most, where layers differ); 0 for a dense model."""
    top_k: int
    expert_ffn_size: int
    num_shared_experts: int
    shared_ffn_size: int
    """Total intermediate size of the shared experts of a layer; 0 if there are none."""
    num_groups: int
    """Routing groups (DeepSeek-V3: 8); 1 if routing is not limited."""
    top_k_groups: int
    gate_activation: str
    """`softmax` or `sigmoid`."""
    dtype: str
    """Of activations and attention weights."""
    expert_dtype: str
    """Of expert weights: bfloat16, fp8 (block scales), mxfp4."""
    weight_dtype: str
    """Of dense and attention linear weights."""
    kv_dtype: str
    gated_ffn: bool
    """Three matrices per FFN (SwiGLU) if true, else two."""
    tie_embeddings: bool
    max_position: int
    weight_block: int | None = None
    """Edge of the square block that shares one FP8 scale (DeepSeek-V3: 128)."""
    architecture: str = ""
    sha256: str = ""
    source: str = ""
    experts_L: tuple[int, ...] | None = None
    """Routed experts of every MoE layer where they differ (pyramid or pruned models); None: E in all of them."""

    def __post_init__(self) -> None:
        counts = normal_counts(
            self.experts_L,
            self.num_experts,
            len(self.moe_layer_ids),
            lambda value, rule: ModelError(describe(self.source or self.name, "experts per layer", value, rule)),
        )
        object.__setattr__(self, "experts_L", counts)

    @property
    def expert_counts_L(self) -> tuple[int, ...]:
        """Routed experts of every MoE layer."""
        return (self.num_experts,) * len(self.moe_layer_ids) if self.experts_L is None else self.experts_L
