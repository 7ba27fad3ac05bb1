"""What a call of grouped expert kernels takes whatever weights it reads: launches, and sorting tokens by expert, which grows with the experts of a layer.

Rows of few tokens activate one expert per choice, so the line through two of them, back to none, is that part. Where a kernel is known by rows of other
numbers of experts than the model's only, it is taken along a line in the number of experts through all its tables of the same width of weights.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.tables import Tables

SAME_WIDTH = {"w4a16_mxfp4": ("w4a16_mxfp4", "int4_wo"), "int4_wo": ("w4a16_mxfp4", "int4_wo")}
"""Dtypes whose kernels read equally many bytes per weight and dequantise them alike."""
FEW = 8
"""Tokens of the larger of the two calls."""


def fixed_s(tables: Tables, dtype: str, kernel: str, experts: np.ndarray) -> np.ndarray | None:
    """Return the seconds of that part for layers of so many `experts` [n]; None unless rows of two numbers of experts tell."""
    names = ("num_experts", "topk", "hidden_size", "inter_size", "moe_tp_size", "num_tokens", "latency_s", "kernel_source")
    known, found = [], []
    for one in SAME_WIDTH.get(dtype, (dtype,)):
        rows = tables.rows("moe", *names, where={"moe_dtype": one, "moe_ep_size": 1, "distribution": "balanced"})
        if rows is None:
            continue
        shapes = np.stack([rows[name] for name in names[:5]], axis=1)
        ran = np.array([kernel in str(source) for source in rows["kernel_source"]])
        for shape in np.unique(shapes[ran], axis=0):
            mine = ran & (shapes == shape).all(axis=1)
            tokens, seconds = rows["num_tokens"][mine], rows["latency_s"][mine]
            if (tokens == 1).any() and (tokens == FEW).any() and FEW * shape[1] <= shape[0]:
                one_s, few_s = float(seconds[tokens == 1].mean()), float(seconds[tokens == FEW].mean())
                known.append(float(shape[0]))
                found.append(max(one_s - (few_s - one_s) / (FEW - 1), 0.0))
    if len(set(known)) < 2:
        return None
    slope, start = np.polyfit(known, found, 1)
    return np.asarray(np.maximum(start + slope * np.asarray(experts, dtype=np.float64), 0.0))


def with_fixed(seconds: np.ndarray, scale: float, tables: Tables, dtype: str, kernel: str, measured: int, wanted: int) -> np.ndarray:
    """Return times [n] of a layer of `measured` experts that, multiplied by `scale`, hold the fixed part of a layer of `wanted` experts, unscaled."""
    fixed = fixed_s(tables, dtype, kernel, np.array([measured, wanted])) if measured != wanted else None
    return seconds if fixed is None else np.asarray(np.maximum(seconds - fixed[0], 0.0) + fixed[1] / scale)
