"""Tables of one device predicted from another's and two data sheets: nothing is fitted to the target.

    seconds_target = overhead + (seconds_source − overhead) · roof_target / roof_source        roof = max(FLOPs / peak, bytes / bandwidth)
A row keeps the source's efficiency relative to its own roofline, and the overhead that the smallest kernel of the table shows. Products of few
tiles are bound by waves of tiles over the SMs: their compute term is waves · (tile's FLOPs) / (peak of one SM). Collectives scale with the bandwidth
that the links reach (declared efficiency included), each port apart.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moesim.costs.traffic import balanced_counts, ports
from moesim.hardware.cluster import Cluster, Link
from moesim.model.moe_model import DTYPE_BYTES

Work = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]
"""FLOPs, bytes, the dtype that computes, and tiles where few of them bound the time."""
NEXT_DTYPE = {"fp8": "bfloat16", "int8": "bfloat16", "fp4": "fp8", "mxfp4": "bfloat16", "int4": "bfloat16", "bfloat16": "float16", "float16": "float32"}
"""dtype → the one that a device without it computes in."""
COMPUTE_DTYPE = {"fp8_block": "fp8", "w4a16_mxfp4": "bfloat16", "int4_wo": "bfloat16", "float16": "bfloat16", "w4afp8": "fp8", "nvfp4": "fp4"}
"""dtype of a table → the one its products compute in."""
_WEIGHT_BYTES = {"fp8_block": 1.0, "w4a16_mxfp4": 0.53, "int4_wo": 0.5, "w4afp8": 0.5, "nvfp4": 0.56}
TILE = 128.0
GROUP_LIMIT = 4
"""Nodes a token may reach in DeepEP's high-throughput tables."""

NEEDED: dict[str, tuple[str, ...]] = {
    "gemm": ("gemm_dtype", "m", "n", "k"),
    "moe": ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "wideep_moe_generation": ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "wideep_moe_context": ("moe_dtype", "num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size"),
    "grouped_gemm": ("moe_dtype", "hidden_size", "inter_size", "active", "assignments"),
    "attn_context": ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size"),
    "attn_generation": ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype"),
    "mla_context": ("batch_size", "isl", "num_heads"),
    "mla_generation": ("batch_size", "step", "num_heads", "kv_cache_dtype"),
    "wideep_mla_context": ("batch_size", "isl", "num_heads"),
    "wideep_mla_generation": ("batch_size", "isl", "num_heads"),
    "attn_mixed": ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "num_heads", "num_key_value_heads", "head_dim"),
    "stream": ("moved_bytes",),
    "sampler": ("sequences", "vocab"),
    "nccl": ("message_bytes",),
    "collective": ("message_bytes",),
    "custom_allreduce": ("message_bytes",),
    "deepep_ll_1to8nodes": ("node_num", "hidden_size", "num_topk", "num_experts"),
    "deepep_ll_1node": ("node_num", "hidden_size", "num_topk", "num_experts"),
    "deepep_normal_1to8nodes": ("node_num", "hidden_size", "num_topk", "num_experts"),
    "deepep_normal_1node": ("node_num", "hidden_size", "num_topk", "num_experts"),
}
"""Kind of table → the columns its work follows from; other kinds are not transferred."""


def peak_flops(cluster: Cluster, dtype: str) -> float:
    """Return the data sheet's FLOP/s of a dtype; one that the device lacks computes in the next wider."""
    peaks = cluster.device.peak_flops
    name: str | None = COMPUTE_DTYPE.get(dtype, dtype)
    while name is not None and name not in peaks:
        name = NEXT_DTYPE.get(name)
    return peaks[name] if name is not None else min(peaks.values())


def factors(kind: str, rows: Mapping[str, np.ndarray], source: Cluster, target: Cluster) -> np.ndarray:
    """Return roof_target / roof_source of every row."""
    if kind in ("nccl", "collective", "custom_allreduce"):
        return np.full(len(rows["message_bytes"]), _reached(source, "scale_up") / _reached(target, "scale_up"))
    if kind.startswith("deepep"):
        return _exchange(kind, rows, source, target)
    # A kernel for both phases does the work of one after that of the other.
    works = _mixed_works(rows) if kind == "attn_mixed" else (_work(kind, rows),)
    there, here = (sum(_roof(work, cluster) for work in works) for cluster in (source, target))
    return np.asarray(here / np.maximum(there, 1e-30))


def _roof(work: Work, cluster: Cluster) -> np.ndarray:
    flops, moved, dtype, waves = work
    names, code = np.unique(dtype.astype(str), return_inverse=True)
    compute = flops / np.array([peak_flops(cluster, name) for name in names])[code.ravel()]
    if waves is not None:
        sms = cluster.device.num_sms
        compute = compute * np.ceil(waves / sms) * sms / waves
    return np.maximum(compute, moved / cluster.memory.read_Bps)


def weight_bytes(dtype: np.ndarray) -> np.ndarray:
    """Return the bytes of one weight for every dtype name of a table."""
    names, code = np.unique(dtype.astype(str), return_inverse=True)
    return np.array([_WEIGHT_BYTES.get(name, DTYPE_BYTES.get(name, 2.0)) for name in names])[code.ravel()]


def _mixed_works(rows: Mapping[str, np.ndarray]) -> tuple[Work, Work]:
    """Return the work of the prompt chunk, which sees its prefix and half of itself, and that of the decoding sequences."""
    chunk, prefix, decodes, length, heads, kv_heads, width = (rows[name].astype(np.float64) for name in NEEDED["attn_mixed"])
    bfloat = np.full(len(chunk), "bfloat16", dtype=object)
    read = 4 * kv_heads * width  # bytes of a token's keys and values
    prompt = 4 * heads * width * chunk * (prefix + chunk / 2), read * (prefix + chunk) + 4 * chunk * heads * width
    return (*prompt, bfloat, None), (4 * heads * width * decodes * length, read * decodes * length, bfloat, None)


def _work(kind: str, rows: Mapping[str, np.ndarray]) -> Work:
    """Return FLOPs, bytes, the dtype that computes, and tiles where few of them bound the time."""
    r = {name: values.astype(np.float64) if values.dtype.kind in "iu" else values for name, values in rows.items()}
    if kind in ("stream", "sampler"):
        moved = r["moved_bytes"] if kind == "stream" else 4 * r["sequences"] * r["vocab"]
        return np.zeros(len(moved)), moved, np.full(len(moved), "bfloat16", dtype=object), None
    if kind == "gemm":
        m, n, k, width = r["m"], r["n"], r["k"], weight_bytes(r["gemm_dtype"])
        return 2 * m * n * k, n * k * width + m * (k * width + 2 * n), r["gemm_dtype"], np.ceil(m / TILE) * np.ceil(n / TILE)
    if kind in ("moe", "wideep_moe_generation", "wideep_moe_context"):
        slots = r["num_experts"] / r["moe_ep_size"]
        assigned = r["num_tokens"] * r["topk"] / r["moe_ep_size"]
        weights = 3 * r["hidden_size"] * r["inter_size"] / r["moe_tp_size"]
        active = np.minimum(slots, assigned)
        return 2 * weights * assigned, active * weights * weight_bytes(r["moe_dtype"]) + 4 * assigned * r["hidden_size"], r["moe_dtype"], None
    if kind == "grouped_gemm":
        weights = 3 * r["hidden_size"] * r["inter_size"]
        moved = r["active"] * weights * weight_bytes(r["moe_dtype"]) + 4 * r["assignments"] * r["hidden_size"]
        return 2 * weights * r["assignments"], moved, r["moe_dtype"], None
    count = len(r["batch_size"])
    bfloat = np.full(count, "bfloat16", dtype=object)
    batch, heads = r["batch_size"], r["num_heads"]
    cache = weight_bytes(r["kv_cache_dtype"]) if "kv_cache_dtype" in r else np.full(count, 2.0)
    if kind in ("attn_context", "mla_context", "wideep_mla_context"):
        length = r["isl"]
        seen = np.minimum(length, r["window_size"]) if kind == "attn_context" and r["window_size"].any() else length
        seen = np.where(seen > 0, seen, length)
        width = r["head_dim"] if kind == "attn_context" else np.full(count, 160.0)
        flops, moved = 4 * batch * heads * width * length * (seen - seen**2 / (2 * length)), 6 * batch * length * heads * width
        if kind == "wideep_mla_context":
            weights = 7168 * 2112 + heads * (1536 * 192 + 512 * 256 + 128 * 7168)
            flops, moved = flops + 2 * weights * batch * length, moved + weights
        return flops, moved, bfloat, None
    length = r["step"] + 1 if "step" in r else r["isl"]
    if kind == "attn_generation":
        seen = np.where(r["window_size"] > 0, np.minimum(length, r["window_size"]), length)
        flops = 4 * batch * seen * heads * r["head_dim"]
        return flops, 2 * batch * seen * r["num_key_value_heads"] * r["head_dim"] * cache, bfloat, None
    flops, moved = 2 * batch * length * heads * 1088, batch * length * 576 * cache
    if kind == "wideep_mla_generation":
        weights = 7168 * 2112 + heads * (1536 * 192 + 512 * 256 + 128 * 7168)
        flops, moved = flops + 2 * weights * batch, moved + weights
    return flops, moved, bfloat, None


def _reached(cluster: Cluster, name: str) -> float:
    link: Link | None = cluster.links.get(name)
    if link is None:
        return float("inf")
    return link.bandwidth_Bps / max(link.shared_by, 1) * max(link.efficiency.efficiency)


def _exchange(kind: str, rows: Mapping[str, np.ndarray], source: Cluster, target: Cluster) -> np.ndarray:
    """Return the ratio of the busiest port's times under balanced traffic."""
    shapes = np.stack([rows[name].astype(np.int64) for name in ("node_num", "num_topk", "num_experts")], axis=1)
    known, index = np.unique(shapes, axis=0, return_inverse=True)
    ratios = []
    for nodes, top_k, experts in known.tolist():
        normal = "normal" in kind
        counts = balanced_counts(num_ranks=8 * nodes, devices=8, num_experts=experts, top_k=top_k, max_nodes=GROUP_LIMIT if normal else None)
        copies = ports("normal" if normal else "low_latency", 8, **counts)
        up, out = float(copies.up_out[0]), float(copies.out_out[0])
        times = [max(up / _reached(cluster, "scale_up"), out / _reached(cluster, "scale_out")) for cluster in (source, target)]
        ratios.append(times[1] / times[0])
    return np.array(ratios)[index.ravel()]
