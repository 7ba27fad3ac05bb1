"""Headers of the sources of measured tables, and what their columns mean in canonical terms (see `moesim.hardware.measured`).

One reader per header: (path, columns, facts of the model) → tables. Shapes are per device: tensor parallelism (a column, or `tpN` in the path) has
divided heads and FFN widths. Frontier and Vidur share `time_stats.<operator>.<statistic>`; the median is taken. Bytes of element-wise operators are
what they read and write at two bytes an element.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moesim.errors import HardwareError
from moesim.hardware.convert_tables import ELEMENT_BYTES, LAYOUTS
from moesim.hardware.measured import Columns, Measured, numbers_of, seconds_of, stem_of, text_of, words_of

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
    "stream": ("operator", "tokens", "moved_bytes", "latency_s"),
    "sampler": ("sequences", "vocab", "latency_s"),
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


# --- LLMServingSim ------------------------------------------------------------------------------------------------


def _need(path: Path, facts: dict[str, float], *names: str) -> None:
    missing = [name for name in names if name not in facts]
    if missing:
        raise HardwareError(f"{path}: does not state {', '.join(missing)} of the model that was measured; name it with --model, or put its meta.yaml beside")


def _tp(path: Path) -> float:
    match = re.search(r"(?:^|[_/-])tp(\d{1,3})(?:[_/.-]|$)", "/".join(path.parts[-3:]))
    return float(match.group(1)) if match else 1.0


def _table(path: Path, kind: str, part: str, source: str, rows: Columns) -> Measured:
    return Measured(stem=stem_of(path), kind=kind, part=part, source=source, rows=rows)


def _llmss_moe(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    _need(path, facts, "hidden_size", "expert_ffn_size", "top_k")
    tokens, count = columns["tokens"], len(columns["tokens"])
    rows = {
        "hidden_size": np.full(count, facts["hidden_size"]),
        "inter_size": np.full(count, facts["expert_ffn_size"] / _tp(path)),
        "slots": columns["activated_experts"],
        "active": columns["activated_experts"],
        "assignments": tokens * facts["top_k"],
        "moe_dtype": np.full(count, "fp8_block" if facts.get("expert_bytes") == 1 else "bfloat16", dtype=object),
        "latency_s": seconds_of(columns, "time_us", 1e-6),
    }
    return [_table(path, "grouped_gemm", "", "llmservingsim", rows)]


def _llmss_attention(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    _need(path, facts, "num_heads", "num_kv_heads", "head_dim")
    chunk, prefix, decodes, kv = (columns[name] for name in ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode"))
    seconds, tp = seconds_of(columns, "time_us", 1e-6), _tp(path)
    if facts.get("kv_lora_rank"):
        table = _table(path, "unsupported", "", "llmservingsim", {"latency_s": seconds})
        table.leave_out(np.ones(len(seconds), dtype=bool), "MLA of a mixed batch: what the rows include is not stated")
        return [table]

    def part(name: str, kind: str, keep: np.ndarray, **sizes: np.ndarray) -> Measured:
        count = int(keep.sum())
        rows: Columns = {key: values[keep] for key, values in sizes.items()}
        rows["num_heads"] = np.full(count, facts["num_heads"] / tp)
        rows["num_key_value_heads"] = np.full(count, max(facts["num_kv_heads"] / tp, 1.0))
        rows["head_dim"], rows["window_size"] = np.full(count, facts["head_dim"]), np.zeros(count)
        rows["kv_cache_dtype"] = rows["attn_dtype"] = np.full(count, "bfloat16", dtype=object)
        return _table(path, kind, name, "llmservingsim", {**rows, "latency_s": seconds[keep]})

    one = np.ones(len(chunk))
    both = (chunk > 0) & (decodes > 0)
    return [
        part("decode", "attn_generation", (chunk == 0) & (decodes > 0), batch_size=decodes, step=kv - 1.0, prefix=one * 0),
        part("prefill", "attn_context", (chunk > 0) & (decodes == 0), batch_size=one, isl=chunk, prefix=prefix),
        part("mixed", "attn_mixed", both, prefill_chunk=chunk, kv_prefill=prefix, n_decode=decodes, kv_decode=kv),
    ]


def _gemm_rows(tokens: np.ndarray, n: float | np.ndarray, k: float | np.ndarray, seconds: np.ndarray) -> Columns:
    count = len(tokens)
    return {
        "m": tokens,
        "n": np.full(count, n) if np.ndim(n) == 0 else np.asarray(n),
        "k": np.full(count, k) if np.ndim(k) == 0 else np.asarray(k),
        "gemm_dtype": np.full(count, "bfloat16", dtype=object),
        "latency_s": seconds,
    }


def _stream_rows(operator: str, tokens: np.ndarray, per_token: float | np.ndarray, seconds: np.ndarray) -> Columns:
    return {"operator": np.full(len(tokens), operator, dtype=object), "tokens": tokens, "moved_bytes": tokens * per_token, "latency_s": seconds}


def _llmss_layers(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    _need(path, facts, "hidden_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size")
    layers, seconds, tp = columns["layer"].astype(str), seconds_of(columns, "time_us", 1e-6), _tp(path)
    tokens = columns["tokens" if "tokens" in columns else "sequences"]
    hidden, heads, kv_heads, dim = facts["hidden_size"], facts["num_heads"] / tp, max(facts["num_kv_heads"] / tp, 1.0), facts["head_dim"]
    ffn = facts.get("dense_ffn_size", 0.0) / tp
    gemms = {
        "qkv_proj": ((heads + 2 * kv_heads) * dim, hidden),
        "o_proj": (hidden, heads * dim),
        "gate_up_proj": (2 * ffn, hidden),
        "down_proj": (hidden, ffn),
        "lm_head": (facts["vocab_size"] / tp, hidden),
    }
    if facts.get("kv_lora_rank"):
        gemms = {name: gemms[name] for name in ("lm_head",)}
    # Bytes per token, two bytes an element: what is read and written.
    streams = {
        "embedding": 4.0 * hidden,
        "layernorm": 8.0 * hidden,
        "final_layernorm": 8.0 * hidden,
        "qk_norm": 4.0 * (heads + kv_heads) * dim,
        "rotary_emb": 4.0 * (heads + kv_heads) * dim,
        "act_fn": 6.0 * ffn,
    }
    result, known = [], np.zeros(len(layers), dtype=bool)
    for name in dict.fromkeys(layers.tolist()):
        mine = layers == name
        if name in gemms and min(gemms[name]) > 0:
            result.append(_table(path, "gemm", name, "llmservingsim", _gemm_rows(tokens[mine], *gemms[name], seconds[mine])))
        elif name in streams and streams[name] > 0:
            result.append(_table(path, "stream", name, "llmservingsim", _stream_rows(name, tokens[mine], streams[name], seconds[mine])))
        elif name == "sampler":
            rows = {"sequences": tokens[mine], "vocab": np.full(int(mine.sum()), facts["vocab_size"]), "latency_s": seconds[mine]}
            result.append(_table(path, "sampler", name, "llmservingsim", rows))
        else:
            continue
        known |= mine
    if not known.all():
        names = sorted(set(layers[~known].tolist()))
        rest = _table(path, "unsupported", "other", "llmservingsim", {"latency_s": seconds[~known]})
        rest.leave_out(np.ones(int((~known).sum()), dtype=bool), f"layers without an operator or sizes: {', '.join(names)[:80]}")
        result.append(rest)
    return result


# --- Frontier and Vidur -------------------------------------------------------------------------------------------


def _median(columns: Columns, what: str) -> np.ndarray | None:
    for statistic in ("median", "mean", "min"):
        name = f"time_stats.{what}.{statistic}"
        if name in columns:
            values = seconds_of(columns, name, 1e-3)
            # A zero stands for what was not timed.
            return np.where(values > 0, values, np.nan)
    return None


def _parts(path: Path, source: str, candidates: list[tuple[str, str, np.ndarray | None, Callable[[np.ndarray], Columns]]]) -> list[Measured]:
    result = []
    for part, kind, seconds, rows in candidates:
        if seconds is not None and not np.isnan(seconds).all():
            result.append(_table(path, kind, part, source, rows(seconds)))
    if not result:
        raise HardwareError(f"{path}: every time_stats column is empty; profile again")
    return result


def _frontier_moe(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tokens, experts, top_k = columns["num_tokens"], columns["num_experts"], columns["router_topk"]
    hidden, tp = columns["hidden_dim"], numbers_of(columns, "num_tensor_parallel_workers", 1.0)
    ffn, slots = columns["expert_hidden_dim"] / tp, numbers_of(columns, "num_experts_per_device", None)
    slots = np.where(np.isnan(slots), experts, slots)
    assignments = numbers_of(columns, "total_routed_tokens", None)
    # The older profiles route every token to the experts at hand, too.
    assignments = np.where(np.isnan(assignments), tokens * top_k, assignments)
    used = numbers_of(columns, "expert_utilization", None)
    even = slots * -np.expm1(-assignments / slots)
    active = np.where(np.isnan(used), np.minimum(even, assignments), used * slots)
    dtype = text_of(columns, "profiling_precision", "bfloat16")
    quantised = text_of(columns, "quant_signature", "none")
    dtype = np.where(quantised == "none", dtype, quantised)
    grouped = {"hidden_size": hidden, "inter_size": ffn, "slots": slots, "active": active, "assignments": assignments, "moe_dtype": dtype}

    def streams(operator: str, per_token: np.ndarray) -> Callable[[np.ndarray], Columns]:
        return lambda seconds: _stream_rows(operator, tokens, per_token, seconds)

    per_expert = np.maximum(np.rint(assignments / slots), 1.0)
    gated = np.where(np.isin(columns.get("use_gated", np.full(len(tokens), "True", dtype=object)).astype(str), ("True", "true", "1", "1.0")), 2.0, 1.0)
    gate = _median(columns, "moe_gating_linear")
    gate = _median(columns, "moe_gating") if gate is None else gate
    tables = _parts(
        path,
        "frontier",
        [
            ("moe_grouped_gemm", "grouped_gemm", _median(columns, "moe_grouped_gemm"), lambda seconds: {**grouped, "latency_s": seconds}),
            ("moe_gating_linear", "gemm", gate, lambda seconds: _gemm_rows(tokens, experts, hidden, seconds)),
            ("moe_gating_routing_topk", "stream", _median(columns, "moe_gating_routing_topk"), streams("top_k", 8.0 * experts + 8.0 * top_k)),
            ("moe_shuffling", "stream", _median(columns, "moe_shuffling"), streams("permute", 4.0 * top_k * hidden)),
            ("moe_expert_up_proj", "gemm", _median(columns, "moe_expert_up_proj"), lambda seconds: _gemm_rows(per_expert, gated * ffn, hidden, seconds)),
            ("moe_expert_down_proj", "gemm", _median(columns, "moe_expert_down_proj"), lambda seconds: _gemm_rows(per_expert, hidden, ffn, seconds)),
        ],
    )
    for table in tables:
        if table.kind == "gemm" and not np.isin(dtype, ("bfloat16", "BF16", "float16", "FP16")).all():
            table.leave_out(~np.isin(dtype, ("bfloat16", "BF16", "float16", "FP16")), "quantised GEMM whose scaling is not stated")
    return tables


def _head_dim(columns: Columns, facts: dict[str, float]) -> np.ndarray:
    given = numbers_of(columns, "head_dim", None)
    heads = columns["n_q_head" if "n_q_head" in columns else "n_head"]
    usual = columns["n_embd"] / heads
    if facts.get("num_heads") == heads[0] and facts.get("hidden_size") == columns["n_embd"][0]:
        usual = np.full(len(heads), facts["head_dim"])
    return np.where(np.isnan(given), usual, given)


def _frontier_attention(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tp, dim = numbers_of(columns, "num_tensor_parallel_workers", 1.0), _head_dim(columns, facts)
    batch, chunk, kv = columns["batch_size"], columns["prefill_chunk_size"], columns["kv_cache_size"]
    mixed = columns.get("is_mixed_batch", np.full(len(batch), "False", dtype=object)).astype(str)
    true = columns.get("is_true_mixed_batch", np.full(len(batch), "False", dtype=object)).astype(str)
    uneven = np.isin(mixed, ("True", "1.0")) | np.isin(true, ("True", "1.0"))
    count = len(batch)
    shape: Columns = {
        "num_heads": columns["n_q_head"] / tp,
        "num_key_value_heads": np.maximum(columns["n_kv_head"] / tp, 1.0),
        "head_dim": dim,
        "window_size": np.zeros(count),
        "batch_size": batch,
        "kv_cache_dtype": np.full(count, "bfloat16", dtype=object),
        "attn_dtype": np.full(count, "bfloat16", dtype=object),
    }
    tables = _parts(
        path,
        "frontier",
        [
            ("attn_prefill", "attn_context", _median(columns, "attn_prefill"), lambda s: {**shape, "isl": chunk, "prefix": kv, "latency_s": s}),
            ("attn_decode", "attn_generation", _median(columns, "attn_decode"), lambda s: {**shape, "step": kv, "prefix": kv * 0, "latency_s": s}),
        ],
    )
    for table in tables:
        prefill = table.kind == "attn_context"
        table.leave_out(np.where(chunk > 0, not prefill, prefill), "row of the other phase")
        keep = np.where(chunk > 0, prefill, not prefill)
        table.leave_out(uneven[keep], "sequences of different lengths")
    return tables


def _frontier_linear(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tokens, tp = columns["num_tokens"], numbers_of(columns, "num_tensor_parallel_workers", 1.0)
    hidden, heads, kv_heads = columns["n_embd"], columns["n_head"] / tp, np.maximum(columns["n_kv_head"] / tp, 1.0)
    dim, ffn = _head_dim(columns, facts), columns["n_expanded_embd"] / tp
    gated = np.where(np.isin(columns.get("use_gated_mlp", np.full(len(tokens), "True", dtype=object)).astype(str), ("True", "1.0")), 2.0, 1.0)
    output_gate = np.isin(columns.get("attn_output_gate", np.full(len(tokens), "False", dtype=object)).astype(str), ("True", "1.0"))

    def stream(part: str, operator: str, per_token: np.ndarray) -> tuple[str, str, np.ndarray | None, Callable[[np.ndarray], Columns]]:
        return part, "stream", _median(columns, part), lambda seconds: _stream_rows(operator, tokens, per_token, seconds)

    def product(part: str, n: np.ndarray, k: np.ndarray) -> tuple[str, str, np.ndarray | None, Callable[[np.ndarray], Columns]]:
        return part, "gemm", _median(columns, part), lambda seconds: _gemm_rows(tokens, n, k, seconds)

    return _parts(
        path,
        "frontier",
        [
            product("attn_pre_proj", (heads * np.where(output_gate, 2.0, 1.0) + 2 * kv_heads) * dim, hidden),
            product("attn_post_proj", hidden, heads * dim),
            product("mlp_up_proj", gated * ffn, hidden),
            product("mlp_down_proj", hidden, ffn),
            stream("mlp_act", "act_fn", 2.0 * (gated + 1.0) * ffn),
            stream("attn_rope", "rotary_emb", 4.0 * (heads + kv_heads) * dim),
            stream("emb", "embedding", 4.0 * hidden),
            stream("input_layernorm", "layernorm", 4.0 * hidden),
            stream("post_attention_layernorm", "layernorm", 4.0 * hidden),
            stream("add", "add", 6.0 * hidden),
        ],
    )


_COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send_recv", "all_to_all")


def _vidur_network(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tables = []
    for name in _COLLECTIVES:
        seconds = _median(columns, name)
        if seconds is None:
            continue
        size = columns["size"] if "size" in columns else 2.0 * columns["n_embd"] * columns["num_tokens"]
        workers = numbers_of(columns, "num_workers", 2.0)
        devices = numbers_of(columns, "devices_per_node", None)
        nodes = np.where(np.isnan(devices), 1.0, np.maximum(workers / np.where(devices > 0, devices, 1.0), 1.0))
        op = np.full(len(size), {"all_to_all": "alltoall"}.get(name, name), dtype=object)
        rows = {"op_name": op, "num_gpus": workers, "num_nodes": nodes, "message_bytes": size, "latency_s": seconds}
        table = _table(path, "collective", name, "vidur", rows)
        table.leave_out(size <= 0, "empty message")
        tables.append(table)
    return tables


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
    (_llmss_moe, (("tokens", "activated_experts", "time_us"),)),
    (_llmss_attention, (("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"),)),
    (_llmss_layers, (("layer", "tokens", "time_us"), ("layer", "sequences", "time_us"))),
    (_frontier_moe, (("time_stats.moe_*", "num_tokens", "num_experts", "router_topk", "hidden_dim", "expert_hidden_dim"),)),
    (_frontier_attention, (("time_stats.attn_*", "n_q_head", "n_kv_head", "n_embd", "batch_size", "prefill_chunk_size", "kv_cache_size"),)),
    (_frontier_linear, (("time_stats.*", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", "num_tokens"),)),
    *((_vidur_network, ((f"time_stats.{name}.*", "size"), (f"time_stats.{name}.*", "n_embd", "num_tokens"))) for name in _COLLECTIVES),
)
"""First match wins: (reader, columns of each header it knows; a trailing * stands for any ending)."""
