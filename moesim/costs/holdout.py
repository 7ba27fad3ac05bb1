"""Leave one out over measured tables: every row predicted from its neighbours on the axes of its grid.

A kind of table has key columns that must be equal (`groups`) and axes along which it is interpolated, in the work that the cost model uses. A row is
predicted from the nearest row on either side of it, axis by axis, the row itself left out; several axes are averaged geometrically. A row at the border
of every axis has no such neighbours and only calibrates. Signed errors are predicted / measured − 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from moesim.costs.attention import BLOCK_OFFSET, CORE_OFFSET
from moesim.costs.experts import TILE
from moesim.costs.gemm import WORK

Columns = Mapping[str, np.ndarray]
AxisWork = Callable[[np.ndarray, Columns], np.ndarray]


def _size(x: np.ndarray, rows: Columns) -> np.ndarray:
    return x


def _quadratic(offset: float) -> AxisWork:
    return lambda x, rows: x * (x + offset)


def _product_rows(x: np.ndarray, rows: Columns) -> np.ndarray:
    result = x.copy()
    for dtype, work in WORK.items():
        mine = rows["gemm_dtype"] == dtype
        result[mine] = work(x[mine])
    return result


def _routed_work(x: np.ndarray, rows: Columns) -> np.ndarray:
    """Return assignments plus a tile for every expert that a random choice activates: reading its weights takes as long as a tile of tokens."""
    slots = rows["num_experts"] / rows["moe_ep_size"]
    assignments = x * rows["topk"] / rows["moe_ep_size"]
    return np.asarray(TILE * slots * -np.expm1(-assignments / slots) + assignments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How the rows of one kind of table hang together."""

    groups: tuple[str, ...]
    """Columns that must be equal, as far as the table has them."""
    axes: tuple[tuple[str, AxisWork], ...]
    """Columns along which time is interpolated."""


_SHAPE = ("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype", "attn_dtype", "kernel_source", "beam_width", "prefix")
_MLA = ("num_heads", "kv_cache_dtype", "mla_dtype", "gemm_type", "tp_size", "kernel_source")
_MOE = ("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "distribution", "kernel_source")
GRIDS: dict[str, Grid] = {
    "gemm": Grid(groups=("gemm_dtype", "kernel_source"), axes=(("m", _product_rows), ("n", _size), ("k", _size))),
    "grouped_gemm": Grid(groups=("moe_dtype", "hidden_size", "inter_size", "slots", "active"), axes=(("assignments", _size),)),
    "moe": Grid(groups=_MOE, axes=(("num_tokens", _routed_work),)),
    "wideep_moe_generation": Grid(groups=_MOE, axes=(("num_tokens", _routed_work),)),
    "wideep_moe_eplb": Grid(
        groups=("op_name", "moe_kernel", *_MOE[:-1], "num_slots"),
        axes=(("rank0_num_tokens", _size),),
    ),
    "attn_context": Grid(groups=_SHAPE, axes=(("isl", _quadratic(CORE_OFFSET)), ("batch_size", _size))),
    "attn_generation": Grid(groups=_SHAPE, axes=(("step", _size), ("batch_size", _size))),
    "attn_mixed": Grid(groups=_SHAPE[:6], axes=(("kv_decode", _size), ("n_decode", _size), ("kv_prefill", _size), ("prefill_chunk", _size))),
    "mla_context": Grid(groups=_MLA, axes=(("isl", _quadratic(CORE_OFFSET)), ("batch_size", _size))),
    "mla_expanded": Grid(groups=_MLA, axes=(("isl", _quadratic(CORE_OFFSET)), ("batch_size", _size))),
    "mla_generation": Grid(groups=_MLA, axes=(("step", _size), ("batch_size", _size))),
    "wideep_mla_context": Grid(groups=_MLA, axes=(("isl", _quadratic(BLOCK_OFFSET)), ("batch_size", _size))),
    "wideep_mla_generation": Grid(groups=_MLA, axes=(("isl", _size), ("batch_size", _size))),
    "collective": Grid(groups=("op_name", "nccl_dtype", "num_gpus", "num_nodes"), axes=(("message_bytes", _size),)),
    "custom_allreduce": Grid(groups=("backend", "kernel_source", "num_gpus"), axes=(("message_bytes", _size),)),
    "deepep_ll": Grid(groups=("node_num", "hidden_size", "num_topk", "num_experts", "stage"), axes=(("num_token", _size),)),
    "deepep_normal": Grid(groups=("node_num", "hidden_size", "num_topk", "num_experts", "stage", "sms"), axes=(("num_token", _size),)),
    "moe_a2a": Grid(
        groups=("comm_backend", "phase", "comm_dtype", "ep_size", "node_num", "hidden_size", "topk", "num_experts", "sms"), axes=(("num_tokens", _size),)
    ),
    "stream": Grid(groups=("operator",), axes=(("moved_bytes", _size),)),
    "sampler": Grid(groups=("vocab",), axes=(("sequences", _size),)),
}
"""Kind of table → its grid; kinds that are not here are not predicted."""


def codes_of(rows: Columns, names: tuple[str, ...]) -> np.ndarray:
    """Return one integer per row, equal where all the named columns (as far as they are there) are equal."""
    code = np.zeros(len(next(iter(rows.values()))), dtype=np.int64)
    for name in names:
        if name in rows:
            column = rows[name]
            values, index = np.unique(column.astype(str) if column.dtype == object else column, return_inverse=True)
            if len(values) > 1:
                code = np.unique(code * len(values) + index.ravel(), return_inverse=True)[1].ravel()
    return code


def merge_repeats(kind: str, rows: Columns) -> tuple[dict[str, np.ndarray], dict[str, int], float | None]:
    """Return rows of distinct keys (repeats averaged), what was merged, and the repeat noise: mean |time / mean of equal inputs − 1|, None without repeats."""
    grid = GRIDS[kind]
    code = codes_of(rows, (*grid.groups, *(name for name, _ in grid.axes)))
    seconds = rows["latency_s"]
    distinct, first, index, count = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    mean = np.bincount(index.ravel(), weights=seconds) / count
    merged = {name: values[first] for name, values in rows.items()}
    merged["latency_s"] = mean
    again = count[index.ravel()] > 1
    floor = float(np.abs(seconds[again] / mean[index.ravel()][again] - 1.0).mean()) if again.any() else None
    same = again & (np.abs(seconds - seconds[first][index.ravel()]) <= 1e-9 * seconds)
    same[first] = False
    reasons = {"exact duplicate": int(same.sum()), "repeat of equal inputs, averaged": int(len(seconds) - len(distinct) - same.sum())}
    return merged, {reason: n for reason, n in reasons.items() if n}, floor


def leave_one_out(kind: str, rows: Columns) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return every row's prediction from the others (NaN: no neighbours), over all axes and by axis; keys must be distinct."""
    grid = GRIDS[kind]
    by_axis = {}
    for name, work in grid.axes:
        others = tuple(other for other, _ in grid.axes if other != name)
        by_axis[name] = _along(rows, codes_of(rows, (*grid.groups, *others)), name, work)
    stacked = np.log(np.stack(list(by_axis.values())))
    known = np.isfinite(stacked)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    count = known.sum(axis=0)
    return np.where(count > 0, np.exp(total / np.maximum(count, 1)), np.nan), by_axis


def _along(rows: Columns, group: np.ndarray, axis: str, work: AxisWork) -> np.ndarray:
    x = rows[axis].astype(np.float64)
    done = work(x, rows)
    order = np.lexsort((x, group))
    inner = np.zeros(len(x), dtype=bool)
    inner[1:-1] = (group[order][:-2] == group[order][1:-1]) & (group[order][2:] == group[order][1:-1])
    middle = np.flatnonzero(inner)
    left, at, right = order[middle - 1], order[middle], order[middle + 1]
    scale = np.where(done[right] > done[left], done[right] - done[left], x[right] - x[left])
    weight = np.where(done[right] > done[left], done[at] - done[left], x[at] - x[left]) / scale
    result = np.full(len(x), np.nan)
    result[at] = rows["latency_s"][left] * (1.0 - weight) + rows["latency_s"][right] * weight
    return result


def interpolate(kind: str, known: Columns, queries: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Return the time of every query from rows of equal groups and other axes, along the first axis, and whether it is a key; NaN where there is none."""
    grid = GRIDS[kind]
    axis, work = grid.axes[0]
    shared = tuple(name for name in (*grid.groups, *(other for other, _ in grid.axes[1:])) if name in known and name in queries and name != "kernel_source")
    count = len(queries["latency_s"])
    needed = {*shared, axis, "latency_s"}
    if kind == "gemm":
        needed.add("gemm_dtype")
    both = {name: np.concatenate([_plain(known[name]), _plain(queries[name])]) for name in sorted(needed)}
    group = codes_of(both, shared)
    x = both[axis].astype(np.float64)
    done = work(x, both)
    size = len(x) - count
    # Known rows of equal key are averaged.
    pair = np.stack([group[:size].astype(np.float64), x[:size]], axis=1)
    keys, index = np.unique(pair, axis=0, return_inverse=True)
    seconds = np.bincount(index.ravel(), weights=known["latency_s"]) / np.bincount(index.ravel())
    place = np.zeros(len(keys))
    place[index.ravel()] = done[:size]
    result, on_key = np.full(count, np.nan), np.zeros(count, dtype=bool)
    starts = {int(code): (int(low), int(high)) for code, low, high in zip(*_runs(keys[:, 0]), strict=True)}
    wanted = group[size:]
    order = np.argsort(wanted, kind="stable")
    for code, low, high in zip(*_runs(wanted[order].astype(np.float64)), strict=True):
        if int(code) not in starts:
            continue
        first, last = starts[int(code)]
        at = order[low:high]
        xs, ws, ts = keys[first:last, 1], place[first:last], seconds[first:last]
        q, w = x[size:][at], done[size:][at]
        inside = (q >= xs[0]) & (q <= xs[-1])
        # Work never falls with size; the size itself decides inside one tile.
        nudge = 1e-9 * max(float(ws[-1]), 1.0) / max(float(xs[-1]), 1.0)
        result[at] = np.where(inside, np.interp(w + nudge * q, ws + nudge * xs, ts), np.nan)
        on_key[at] = np.isin(q, xs)
    return result, on_key


def _plain(values: np.ndarray) -> np.ndarray:
    return values if values.dtype == object else values.astype(np.float64)


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return value, start and end of every run of equal values."""
    if not len(values):
        return values, np.zeros(0, dtype=int), np.zeros(0, dtype=int)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1])
    return values[starts], starts, np.concatenate([starts[1:], [len(values)]])
