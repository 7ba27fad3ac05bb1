"""Parameters, bytes and FLOPs of every operator of a model, as pure functions of its facts.

Parameters count elements; bytes include the scales of block FP8 and mxfp4; a multiply-add is two FLOPs. `tp` is the number of ranks that share an
attention or FFN; figures are then of one rank. Norms count as parameters and bytes; biases, which a few models have, do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from moesim.errors import ModelError, describe
from moesim.model.moe_model import DTYPE_BYTES, MoEModel

Matrix = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Elements of a model's weights."""

    total: int
    active: int
    """Used by one token, the output head included, the input embedding (a look-up) left out."""
    active_with_embedding: int
    """`active` and the input embedding: the count that some publishers state."""
    embedding: int
    """Input embedding; the head has as many, unless they are tied."""
    expert: int
    """One routed expert of one layer."""
    routed: int
    """All routed experts of all layers."""
    attention: int
    """All layers."""
    dense_ffn: int
    """All dense layers."""
    shared: int
    """Shared experts of all layers."""
    router: int
    """All layers."""
    norms: int


def _split(model: MoEModel, tp: int, what: str, size: int) -> int:
    if isinstance(tp, bool) or not isinstance(tp, int) or tp < 1 or size % tp:
        raise ModelError(describe(model.name, "tp", tp, f"must divide {what} ({size})"))
    return size // tp


def attention_matrices(model: MoEModel, tp: int = 1) -> tuple[Matrix, ...]:
    """Return the [in, out] shapes of one layer's attention projections on one of `tp` ranks.

    Heads are split; the low-rank projections of MLA are replicated, and so are KV heads when there are fewer than ranks.
    Raises ModelError if tp does not divide the number of heads.
    """
    one, hidden = model.attention, model.hidden_size
    heads = _split(model, tp, "num_attention_heads", one.num_heads)
    if one.kind == "mla":
        assert one.kv_lora_rank and one.qk_rope_head_dim and one.qk_nope_head_dim and one.v_head_dim
        queries = ((hidden, one.q_lora_rank), (one.q_lora_rank, heads * one.head_dim)) if one.q_lora_rank else ((hidden, heads * one.head_dim),)
        return (
            *queries,
            (hidden, one.kv_lora_rank + one.qk_rope_head_dim),
            (one.kv_lora_rank, heads * (one.qk_nope_head_dim + one.v_head_dim)),
            (heads * one.v_head_dim, hidden),
        )
    kv_heads = max(1, ceil(one.num_kv_heads / tp))
    return ((hidden, heads * one.head_dim), (hidden, kv_heads * one.head_dim), (hidden, kv_heads * one.head_dim), (heads * one.head_dim, hidden))


def ffn_matrices(model: MoEModel, size: int, tp: int = 1) -> tuple[Matrix, ...]:
    """Return the [in, out] shapes of an FFN of intermediate `size` on one of `tp` ranks."""
    part = _split(model, tp, "the FFN's intermediate size", size)
    up = ((model.hidden_size, part),) * (2 if model.gated_ffn else 1)
    return (*up, (part, model.hidden_size)) if size else ()


def _elements(matrices: tuple[Matrix, ...]) -> int:
    return sum(rows * columns for rows, columns in matrices)


def matrix_bytes(rows: int, columns: int, dtype: str, block: int | None = None) -> float:
    """Return the bytes of one weight matrix with its scales: FP8 has one float32 per block (or per matrix)."""
    if dtype == "fp8":
        return rows * columns + 4.0 * (ceil(rows / block) * ceil(columns / block) if block else 1)
    return rows * columns * DTYPE_BYTES[dtype]


def _bytes(matrices: tuple[Matrix, ...], dtype: str, block: int | None) -> float:
    return sum(matrix_bytes(rows, columns, dtype, block) for rows, columns in matrices)


def parameters(model: MoEModel) -> Parameters:
    """Return how many elements the weights have, in all and per token."""
    moe, layers = len(model.moe_layer_ids), model.num_layers
    expert = _elements(ffn_matrices(model, model.expert_ffn_size)) if moe else 0
    attention = layers * _elements(attention_matrices(model))
    dense = (layers - moe) * _elements(ffn_matrices(model, model.dense_ffn_size))
    shared = moe * _elements(ffn_matrices(model, model.shared_ffn_size))
    router = model.hidden_size * sum(model.expert_counts_L)
    norms = (2 * layers + 1) * model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    routed = sum(model.expert_counts_L) * expert
    common = attention + dense + shared + router + norms
    active = common + moe * model.top_k * expert + embedding
    return Parameters(
        total=common + routed + embedding * (1 if model.tie_embeddings else 2),
        active=active,
        active_with_embedding=active + (0 if model.tie_embeddings else embedding),
        embedding=embedding,
        expert=expert,
        routed=routed,
        attention=attention,
        dense_ffn=dense,
        shared=shared,
        router=router,
        norms=norms,
    )


def expert_bytes(model: MoEModel, dtype: str | None = None) -> float:
    """Return the bytes of one routed expert of one layer, scales included; dtype: another than the model's own."""
    chosen = dtype or model.expert_dtype
    if chosen not in DTYPE_BYTES:
        raise ModelError(describe(model.name, "dtype", chosen, f"must be one of {', '.join(DTYPE_BYTES)}"))
    return _bytes(ffn_matrices(model, model.expert_ffn_size), chosen, model.weight_block) if model.num_experts else 0.0


def attention_weight_bytes(model: MoEModel, tp: int = 1) -> float:
    """Return the bytes of one layer's attention projections on one of `tp` ranks."""
    return _bytes(attention_matrices(model, tp), model.weight_dtype, model.weight_block)


def dense_ffn_bytes(model: MoEModel, tp: int = 1) -> float:
    """Return the bytes of one dense layer's FFN on one of `tp` ranks."""
    return _bytes(ffn_matrices(model, model.dense_ffn_size, tp), model.weight_dtype, model.weight_block)


def shared_ffn_bytes(model: MoEModel, tp: int = 1) -> float:
    """Return the bytes of one MoE layer's shared experts on one of `tp` ranks; they have the experts' dtype."""
    return _bytes(ffn_matrices(model, model.shared_ffn_size, tp), model.expert_dtype, model.weight_block)


def router_bytes(model: MoEModel, experts: int | None = None) -> float:
    """Return the bytes of the router of a MoE layer with so many experts (None: E)."""
    return model.hidden_size * (model.num_experts if experts is None else experts) * DTYPE_BYTES[model.dtype]


def embedding_bytes(model: MoEModel, tp: int = 1) -> float:
    """Return the bytes of the input embedding and the output head (one of them if tied) on one of `tp` ranks."""
    return ceil(model.vocab_size / tp) * model.hidden_size * DTYPE_BYTES[model.dtype] * (1 if model.tie_embeddings else 2)


def norm_bytes(model: MoEModel) -> float:
    """Return the bytes of all norms."""
    return parameters(model).norms * DTYPE_BYTES[model.dtype]


def total_weight_bytes(model: MoEModel) -> float:
    """Return the bytes of all weights in one copy."""
    moe, dense, experts = len(model.moe_layer_ids), model.num_layers - len(model.moe_layer_ids), sum(model.expert_counts_L)
    in_moe_layers = experts * expert_bytes(model) + moe * shared_ffn_bytes(model) + router_bytes(model, experts)
    return model.num_layers * attention_weight_bytes(model) + in_moe_layers + dense * dense_ffn_bytes(model) + embedding_bytes(model) + norm_bytes(model)


def kv_bytes_per_token_layer(model: MoEModel, tp: int = 1) -> float:
    """Return the KV-cache bytes that one token adds in one layer on one of `tp` ranks; MLA keeps its latent on each of them."""
    one = model.attention
    if one.kind == "mla":
        assert one.kv_lora_rank and one.qk_rope_head_dim
        return (one.kv_lora_rank + one.qk_rope_head_dim) * DTYPE_BYTES[model.kv_dtype]
    _split(model, tp, "num_attention_heads", one.num_heads)
    return 2 * max(1, ceil(one.num_kv_heads / tp)) * one.head_dim * DTYPE_BYTES[model.kv_dtype]


def kv_bytes_per_token(model: MoEModel, tp: int = 1) -> float:
    """Return the KV-cache bytes that one token adds in all layers on one of `tp` ranks, as long as no window is full."""
    return model.num_layers * kv_bytes_per_token_layer(model, tp)


def kv_bytes(model: MoEModel, tokens: int, tp: int = 1) -> float:
    """Return the KV-cache bytes of one sequence of `tokens`; layers with a sliding window keep at most the window."""
    windowed = len(model.attention.sliding_layer_ids)
    kept = min(tokens, model.attention.sliding_window or tokens)
    return kv_bytes_per_token_layer(model, tp) * ((model.num_layers - windowed) * tokens + windowed * kept)


def projection_flops(model: MoEModel, tp: int = 1) -> float:
    """Return the FLOPs per token of one layer's attention projections on one of `tp` ranks."""
    return 2.0 * _elements(attention_matrices(model, tp))


def attention_flops(model: MoEModel, context: float, tp: int = 1, *, absorbed: bool = False) -> float:
    """Return the FLOPs per token of one layer's scores and values over `context` cached tokens.

    absorbed: MLA works on the latent, as engines do when decoding, in place of expanded keys and values.
    """
    one = model.attention
    heads = _split(model, tp, "num_attention_heads", one.num_heads)
    if one.kind != "mla":
        return 4.0 * heads * one.head_dim * context
    assert one.kv_lora_rank and one.qk_rope_head_dim and one.v_head_dim
    width = 2 * one.kv_lora_rank + one.qk_rope_head_dim if absorbed else one.head_dim + one.v_head_dim
    return 2.0 * heads * width * context


def expert_flops(model: MoEModel) -> float:
    """Return the FLOPs of one token in one routed expert."""
    return 2.0 * _elements(ffn_matrices(model, model.expert_ffn_size))


def dense_ffn_flops(model: MoEModel, tp: int = 1) -> float:
    """Return the FLOPs per token of one dense layer's FFN on one of `tp` ranks."""
    return 2.0 * _elements(ffn_matrices(model, model.dense_ffn_size, tp))


def shared_ffn_flops(model: MoEModel, tp: int = 1) -> float:
    """Return the FLOPs per token of one MoE layer's shared experts on one of `tp` ranks."""
    return 2.0 * _elements(ffn_matrices(model, model.shared_ffn_size, tp))


def router_flops(model: MoEModel, experts: int | None = None) -> float:
    """Return the FLOPs per token of the router of a MoE layer with so many experts (None: E)."""
    return 2.0 * model.hidden_size * (model.num_experts if experts is None else experts)


def head_flops(model: MoEModel, tp: int = 1) -> float:
    """Return the FLOPs per token of the output head on one of `tp` ranks."""
    return 2.0 * ceil(model.vocab_size / tp) * model.hidden_size


def hidden_bytes(model: MoEModel, dtype: str | None = None) -> float:
    """Return the bytes of one token's hidden state; dtype: another than the activations' own (FP8 adds a float32 scale per block)."""
    chosen = dtype or model.dtype
    scales = 4.0 * ceil(model.hidden_size / model.weight_block) if chosen == "fp8" and model.weight_block else 0.0
    return model.hidden_size * DTYPE_BYTES[chosen] + scales
