"""Headers of the sources of measured tables, and what their columns mean in canonical terms (see `moesim.hardware.measured`).

One reader per header: (path, columns, facts of the model) → tables. Shapes are per device: tensor parallelism (a column, or `tpN` in the path) has
divided heads and FFN widths. Bytes of element-wise operators are what they read and write at two bytes an element.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moesim.hardware.measured_columns import Columns, Measured, numbers_of, seconds_of, stem_of, text_of, words_of
from moesim.hardware.measured_profiles import (
    COLLECTIVES,
    frontier_attention,
    frontier_linear,
    frontier_moe,
    llmservingsim_attention,
    llmservingsim_layers,
    llmservingsim_moe,
    vidur_network,
)
from moesim.hardware.table_layouts import ELEMENT_BYTES, LAYOUTS

# --- tables that this package wrote ------------------------------------------------------------------------------


def _canonical(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    kind = next(kind for kind, names in CANONICAL.items() if all(name in columns for name in names))
    source = stem_of(path).rsplit("_", 1)[-1]
    return [Measured(stem=stem_of(path), kind=kind, part="", source=source if source in SOURCES else "moesim", rows=dict(columns))]


SOURCES = ("infersim", "frontier", "llmservingsim", "vidur")
CANONICAL: dict[str, tuple[str, ...]] = {
    "grouped_gemm": ("moe_dtype", "hidden_size", "inter_size", "slots", "active", "assignments", "latency_s"),
    "attn_mixed": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "num_heads", "latency_s"),
    "attn_context": ("num_key_value_heads", "batch_size", "isl", "prefix", "latency_s"),
    "attn_generation": ("num_key_value_heads", "batch_size", "step", "prefix", "latency_s"),
    "mla_expanded": ("attn_dtype", "num_heads", "batch_size", "isl", "latency_s"),
    "mla_generation": ("attn_dtype", "num_heads", "batch_size", "step", "latency_s"),
    "stage": ("operator", "phase", "batch_size", "num_tokens", "context", "latency_s"),
    "stream": ("operator", "tokens", "moved_bytes", "latency_s"),
    "sampler": ("sequences", "vocab", "latency_s"),
    "collective": ("op_name", "num_gpus", "num_nodes", "message_bytes", "latency_s"),
}
"""Kind → columns of a table that `convert_tables.convert_measured` wrote, where no layout of another source has them."""


# --- aiconfigurator -----------------------------------------------------------------------------------------------


def _aiconfigurator(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    base = {name.removesuffix("_s") if name == "latency_s" else name for name in columns} | {re.sub(r"_s$", "_us", name) for name in columns}
    layout = next(layout for layout in LAYOUTS if layout.columns <= base)
    words = " ".join([stem_of(path), *(str(value) for value in np.unique(columns["op_name"].astype(str))[:4])] if "op_name" in columns else [stem_of(path)])
    generation = "generation" in words or ("context" not in words and "step" in columns and float(np.nanmax(numbers_of(columns, "step"))) > 0)
    rows: Columns = {}
    for name, values in columns.items():
        if name.endswith("_us"):
            rows[name[:-3] + "_s"] = seconds_of(columns, name, 1e-6)
        elif name not in ("latency", "message_bytes"):
            rows[name] = values if name.endswith("_s") or values.dtype.kind != "f" else values
    phase = "generation" if generation else "context"
    kind = {"attention": f"attn_{phase}", "mla": f"mla_{phase}", "wideep_mla": f"wideep_mla_{phase}"}.get(layout.kind, layout.kind)
    if kind in ("deepep_ll", "deepep_normal"):
        return _deepep(path, rows, kind)
    rows["latency_s"] = seconds_of(columns, "latency", layout.latency_unit_s)
    if layout.kind == "moe" and ("deepepmoe" in set(columns["kernel_source"].astype(str)) if "kernel_source" in columns else "wideep" in words):
        kind = f"wideep_moe_{phase}"
    if kind == "moe_a2a":
        return [Measured(stem=stem_of(path), kind=kind, part="", source="aiconfigurator", rows=rows)]
    if kind in ("nccl", "custom_allreduce"):
        dtype = rows["nccl_dtype" if kind == "nccl" else "allreduce_dtype"]
        sizes = np.array([float(ELEMENT_BYTES.get(str(name), 0)) for name in dtype])
        rows["message_bytes"] = np.where(sizes > 0, rows["message_size"] * sizes, np.nan)
        rows["num_nodes"] = np.ones(len(dtype))
        rows.setdefault("op_name", np.full(len(dtype), "all_reduce", dtype=object))
        kind = "collective" if kind == "nccl" else kind
    if kind.startswith("attn_"):
        rows["prefix"] = rows["step"] if phase == "context" else np.zeros(len(rows["latency_s"]))
        rows.setdefault("window_size", np.zeros(len(rows["latency_s"])))
        rows.setdefault("head_dim", np.full(len(rows["latency_s"]), 128.0))
    return [Measured(stem=stem_of(path), kind=kind, part="", source="aiconfigurator", rows=rows)]


def _deepep(path: Path, rows: Columns, kind: str) -> list[Measured]:
    """Return one table per stage."""
    result = []
    for stage in ("dispatch", "combine"):
        time = rows[f"{stage}_avg_t_s" if kind == "deepep_ll" else f"{stage}_transmit_s"]
        keep = {name: values for name, values in rows.items() if not name.startswith(("dispatch_", "combine_"))}
        if kind == "deepep_normal":
            keep["sms"] = rows[f"{stage}_sms"]
        keep["stage"] = np.full(len(time), stage, dtype=object)
        result.append(Measured(stem=stem_of(path), kind=kind, part=stage, source="aiconfigurator", rows={**keep, "latency_s": time}))
    return result


# --- InferSim -----------------------------------------------------------------------------------------------------


def _infersim_gemm(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    rows = {name: columns[name] for name in ("m", "n", "k")}
    rows["latency_s"] = seconds_of(columns, "latency_us", 1e-6)
    rows["gemm_dtype"] = text_of(columns, "dtype", _dtype_by_mfu(2.0 * rows["m"] * rows["n"] * rows["k"], rows["latency_s"], columns, facts))
    return [Measured(stem=stem_of(path), kind="gemm", part="", source="infersim", rows=rows)]


def _dtype_by_mfu(flops: np.ndarray, seconds: np.ndarray, columns: Columns, facts: dict[str, float]) -> str:
    """Return the dtype whose peak the stated utilisation (`mfu`) refers to; DeepGEMM's FP8 where the peaks are not known."""
    mfu = numbers_of(columns, "mfu", 0.0)
    known = (mfu > 0.01) & (seconds > 0)
    if not known.any() or "peak_bfloat16" not in facts:
        return "fp8_block"
    peak = float(np.median(flops[known] / seconds[known] / mfu[known]))
    fp8 = facts.get("peak_fp8", 0.0)
    return "fp8_block" if fp8 and abs(np.log(peak / fp8)) < abs(np.log(peak / facts["peak_bfloat16"])) else "bfloat16"


def _infersim_grouped(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    per_expert, local = columns["tokens_per_expert"], columns["num_local_experts"]
    rows = {
        "hidden_size": columns["hidden_size"],
        "inter_size": columns["intermediate_size"],
        "slots": local,
        "active": local,
        "assignments": local * per_expert,
        "moe_dtype": text_of(columns, "dtype", "fp8_block"),
        "latency_s": seconds_of(columns, "up_proj_us", 1e-6) + seconds_of(columns, "down_proj_us", 1e-6),
    }
    table = Measured(stem=stem_of(path), kind="grouped_gemm", part="", source="infersim", rows=rows)
    # One token per expert is a mean of a random draw: a third of the experts get none, and how many is not stated.
    table.leave_out(per_expert < 2, "tokens_per_expert < 2: how many experts are activated is not stated")
    return [table]


def _infersim_attention(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    words = words_of(path)
    numbers = next(([float(part) for part in word.split("-")] for word in reversed(words) if re.fullmatch(r"\d{1,6}-\d{1,6}-\d{1,6}", word)), None)
    decode = "kv_len" in columns
    count = len(next(iter(columns.values())))
    length = columns["kv_len" if decode else "seq_len"]
    mla = "mla" in words or (numbers is None and bool(facts.get("kv_lora_rank")))
    rows: Columns = {"batch_size": numbers_of(columns, "batch_size", 1.0), "latency_s": seconds_of(columns, "latency_us", 1e-6)}
    rows["kv_cache_dtype"] = text_of(columns, "kv_dtype", "bfloat16")
    rows["attn_dtype"] = text_of(columns, "dtype", "bfloat16")
    rows["step" if decode else "isl"] = length - 1.0 if decode else length
    reason = ""
    if "dsa" in words:
        reason = "sparse attention: the cost model has no such operator"
    elif mla:
        heads = numbers[0] if numbers else facts.get("num_heads", np.nan)
        rows["num_heads"] = np.full(count, heads)
    else:
        shape = numbers or [facts.get("num_heads", np.nan), facts.get("num_kv_heads", np.nan), facts.get("head_dim", np.nan)]
        for name, value in zip(("num_heads", "num_key_value_heads", "head_dim"), shape, strict=True):
            rows[name] = np.full(count, value)
        rows["window_size"], rows["prefix"] = np.zeros(count), np.zeros(count)
    if not reason and np.isnan(rows["num_heads"]).any():
        reason = "head shape is neither in the file's name nor in a model (--model)"
    # Prefill is timed in MLA's expanded form (heads of 128 + 64 and 128), decode in the absorbed one.
    kind = ("mla_generation" if decode else "mla_expanded") if mla else ("attn_generation" if decode else "attn_context")
    table = Measured(stem=stem_of(path), kind=kind, part="", source="infersim", rows=rows)
    if reason:
        table.leave_out(np.ones(count, dtype=bool), reason)
    return [table]


def _unsupported(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    count = len(next(iter(columns.values())))
    table = Measured(stem=stem_of(path), kind="unsupported", part="", source="infersim", rows={"latency_s": np.ones(count)})
    table.leave_out(np.ones(count, dtype=bool), "sparse or linear attention: the cost model has no such operator")
    return [table]


Reader = Callable[[Path, Columns, dict[str, float]], list[Measured]]


def _own(layout_columns: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """Return the source's columns, and those of a converted table."""
    converted = tuple(sorted(re.sub(r"_us$", "_s", "latency_s" if name == "latency" else name) for name in layout_columns))
    return tuple(sorted(layout_columns)), converted


_WRITTEN = tuple(names for kind, names in CANONICAL.items() if not kind.startswith("mla"))
_WRITTEN_MLA = tuple(names for kind, names in CANONICAL.items() if kind.startswith("mla"))
READERS: tuple[tuple[Reader, tuple[tuple[str, ...], ...]], ...] = (
    (_canonical, _WRITTEN),
    *((_aiconfigurator, _own(layout.columns)) for layout in LAYOUTS),
    (_canonical, _WRITTEN_MLA),
    (_infersim_grouped, (("tokens_per_expert", "num_local_experts", "hidden_size", "intermediate_size", "up_proj_us", "down_proj_us"),)),
    (_infersim_gemm, (("m", "n", "k", "latency_us"),)),
    (_infersim_attention, (("batch_size", "kv_len", "latency_us"), ("seq_len", "latency_us"))),
    (_unsupported, (("s_kv", "latency_us"), ("s_q", "s_kv"), ("conv", "gdn_update"), ("chunk_gdn",))),
    (llmservingsim_moe, (("tokens", "activated_experts", "time_us"),)),
    (llmservingsim_attention, (("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),)),
    (llmservingsim_layers, (("layer", "tokens", "time_us"), ("layer", "sequences", "time_us"))),
    (frontier_moe, (("time_stats.moe_*", "num_tokens", "num_experts", "router_topk", "hidden_dim", "expert_hidden_dim"),)),
    (frontier_attention, (("time_stats.attn_*", "n_q_head", "n_kv_head", "n_embd", "batch_size", "prefill_chunk_size", "kv_cache_size"),)),
    (frontier_linear, (("time_stats.*", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens"),)),
    *((vidur_network, ((f"time_stats.{name}.*", "size"), (f"time_stats.{name}.*", "n_embd", "num_tokens"))) for name in COLLECTIVES),
)
"""First match wins: (reader, columns of each header it knows; a trailing * stands for any ending)."""
