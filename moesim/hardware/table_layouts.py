"""Layouts of aiconfigurator's tables, recognised by columns that only they have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ELEMENT_BYTES = {"half": 2, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1, "float32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A table layout, recognised by columns that only it has."""

    kind: str
    columns: frozenset[str]
    """Source columns that must be there."""
    description: str
    latency_unit_s: float = 1e-3
    """Seconds per unit of the source's `latency` column."""


# Order matters: the first layout whose columns are all there wins.
LAYOUTS = (
    Layout(
        kind="moe_a2a",
        columns=frozenset({"comm_backend", "phase", "latency"}),
        latency_unit_s=1e-6,
        description="Expert dispatch or combine (phase) of one backend; one call; num_tokens per GPU",
    ),
    Layout(
        kind="deepep_ll",
        columns=frozenset({"dispatch_avg_t_us", "combine_avg_t_us"}),
        description="DeepEP low-latency dispatch and combine; num_token per GPU; 8 GPUs a node; Bps is bytes per second of one GPU",
    ),
    Layout(
        kind="deepep_normal",
        columns=frozenset({"dispatch_transmit_us", "combine_transmit_us"}),
        description="DeepEP high-throughput dispatch and combine; num_token per GPU; 8 GPUs a node; *_sms are the SMs given to communication",
    ),
    Layout(
        kind="wideep_moe_eplb",
        columns=frozenset({"rank0_num_tokens", "num_slots", "latency"}),
        description="MoE compute of the timed rank, with and without load balancing; num_tokens of all ranks, dp_num_tokens per rank, "
        "rank0_num_tokens those that reach the timed rank",
    ),
    Layout(
        kind="wideep_mla",
        columns=frozenset({"gemm_type", "num_heads", "isl", "latency"}),
        description="A whole MLA block with its projections, one layer, one GPU; isl is the prompt length, step the KV length before the call",
    ),
    Layout(
        kind="mla",
        columns=frozenset({"mla_dtype", "num_heads", "isl", "latency"}),
        description="MLA attention kernel, one layer, one GPU; isl is the prompt length, step the KV length before the call",
    ),
    Layout(
        kind="attention",
        columns=frozenset({"attn_dtype", "num_key_value_heads", "latency"}),
        description="MHA or GQA kernel, one layer, one GPU; isl is the prompt length, step the KV length before the call; window_size 0: full",
    ),
    Layout(
        kind="moe",
        columns=frozenset({"moe_dtype", "num_experts", "topk", "moe_ep_size", "latency"}),
        description="Fused MoE layer of one GPU; num_tokens, hidden_size, inter_size, topk, num_experts as in the model",
    ),
    Layout(kind="gemm", columns=frozenset({"gemm_dtype", "m", "n", "k", "latency"}), description="Dense matrix product [m,k]·[k,n] on one GPU"),
    Layout(
        kind="nccl",
        columns=frozenset({"nccl_dtype", "num_gpus", "message_size", "latency"}),
        description="NCCL collective inside one node; message_size is the elements of the full buffer, message_bytes its bytes",
    ),
    Layout(
        kind="custom_allreduce",
        columns=frozenset({"allreduce_dtype", "num_gpus", "message_size", "latency"}),
        description="The engine's own all-reduce inside one node; message_size is the elements of the full buffer, message_bytes its bytes",
    ),
)


def recognise(columns: Sequence[str]) -> Layout | None:
    """Return the layout that has these source columns, or None."""
    return next((layout for layout in LAYOUTS if layout.columns <= set(columns)), None)
