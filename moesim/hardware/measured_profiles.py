"""Profiles of whole layers: LLMServingSim, Frontier and Vidur (see `moesim.hardware.measured_sources` for what a reader is).

LLMServingSim does not state the model's sizes, which come from `facts`; Frontier and Vidur share `time_stats.<operator>.<statistic>`, of which the
median is taken. A zero stands for what was not timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moesim.errors import HardwareError
from moesim.hardware.measured_columns import Columns, Measured, numbers_of, seconds_of, stem_of, text_of

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


def llmservingsim_moe(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
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


def llmservingsim_attention(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
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


def llmservingsim_layers(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
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


def frontier_moe(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tokens, experts, top_k = (numbers_of(columns, name) for name in ("num_tokens", "num_experts", "router_topk"))
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


def frontier_attention(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
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


def frontier_linear(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
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


COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "send_recv", "all_to_all")


def vidur_network(path: Path, columns: Columns, facts: dict[str, float]) -> list[Measured]:
    tables = []
    for name in COLLECTIVES:
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
