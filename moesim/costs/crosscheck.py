"""Leave-one-out errors of the cost tables: how well a grid key is predicted from its neighbours.

Every inner key is left out once and predicted by the same interpolation that the cost model uses. Errors are relative, |predicted / measured − 1|; keys at
the border have a neighbour on one side only and are not scored.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.costs.attention import BLOCK_OFFSET, CORE_OFFSET
from moesim.costs.experts import Balanced, ExpertLaw
from moesim.costs.gemm import WORK
from moesim.costs.interpolation import Curve, Work, identity, quadratic
from moesim.costs.provenance import Provenance
from moesim.costs.tables import Tables
from moesim.hardware.cluster import Cluster


def leave_one_out(keys: np.ndarray, seconds: np.ndarray, work: Work) -> np.ndarray:
    """Return the error at every inner key of one curve."""
    order = np.argsort(keys, kind="stable")
    keys, first = np.unique(keys[order].astype(np.float64), return_index=True)
    seconds = seconds[order][first]
    errors = []
    for i in range(1, len(keys) - 1):
        others = Curve(np.delete(keys, i), np.delete(seconds, i), work)
        errors.append(abs(float(others(keys[i : i + 1]).seconds[0]) / seconds[i] - 1.0))
    return np.array(errors)


def leave_one_out_experts(rows: Balanced) -> np.ndarray:
    """Return the error of the expert law at every inner balanced load."""
    errors = []
    for i in range(1, len(rows.assignments) - 1):
        law = ExpertLaw([Balanced(rows.slots, np.delete(rows.assignments, i), np.delete(rows.seconds, i))], scale=1.0, worst=Provenance.MEASURED)
        errors.append(abs(float(law(balanced_load(rows.assignments[i], rows.slots), None).seconds[0]) / rows.seconds[i] - 1.0))
    return np.array(errors)


def balanced_load(assignments: float, slots: int) -> np.ndarray:
    """Return int64 [1, C]: the load dealt to the slots as evenly as integers allow."""
    quotient, more = divmod(int(assignments), slots)
    return (quotient + (np.arange(slots) < more)).astype(np.int64)[None]


def table_errors(cluster: Cluster, *, engine: str = "sglang", sample: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (what, errors) for every family of tables of a cluster; every `sample`-th curve is scored."""
    tables = Tables(cluster, engine)
    for dtype, work in WORK.items():
        rows = tables.rows("gemm", "m", "n", "k", "latency_s", where={"gemm_dtype": dtype})
        if rows is not None:
            yield f"gemm {dtype}, along m", _curves([rows["n"], rows["k"]], rows["m"], rows["latency_s"], work, sample)
    shape = ("num_heads", "num_key_value_heads", "head_dim", "kv_cache_dtype", "attn_dtype", "window_size")
    families: tuple[tuple[str, str, str, tuple[str, ...], Work, dict[str, int]], ...] = (
        ("prefill attention", "attn_context", "isl", shape, quadratic(CORE_OFFSET), {"window_size": 0}),
        ("decode attention", "attn_generation", "step", shape, identity, {}),
        ("decode MLA kernel", "mla_generation", "step", ("num_heads", "kv_cache_dtype"), identity, {}),
        ("prefill MLA block", "wideep_mla_context", "isl", ("num_heads", "kernel_source"), quadratic(BLOCK_OFFSET), {}),
        ("decode MLA block", "wideep_mla_generation", "isl", ("num_heads", "kernel_source"), identity, {}),
    )
    for name, kind, length, names, work, where in families:
        rows = tables.rows(kind, *names, "batch_size", length, "latency_s", where=where)
        if rows is not None:
            shapes = [rows[column] for column in names]
            yield f"{name}, along length", _curves([*shapes, rows["batch_size"]], rows[length] + (length == "step"), rows["latency_s"], work, sample)
            yield f"{name}, along batch", _curves([*shapes, rows[length]], rows["batch_size"], rows["latency_s"], identity, sample)
    yield from _expert_errors(tables, sample)
    rows = tables.rows("nccl", "op_name", "nccl_dtype", "num_gpus", "message_bytes", "latency_s")
    if rows is not None:
        columns = [rows[name] for name in ("op_name", "nccl_dtype", "num_gpus")]
        yield "collectives, along bytes", _curves(columns, rows["message_bytes"], rows["latency_s"], identity, 1)


def _expert_errors(tables: Tables, sample: int) -> Iterator[tuple[str, np.ndarray]]:
    names = ("kernel_source", "moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    rows = tables.rows("moe", *names, "num_tokens", "latency_s", where={"moe_ep_size": 1, "distribution": "balanced"})
    if rows is not None:
        errors = [
            leave_one_out_experts(Balanced.build(int(rows["num_experts"][mine[0]]), rows["num_tokens"][mine] * rows["topk"][mine], rows["latency_s"][mine]))
            for mine in _groups([rows[name] for name in names], sample)
        ]
        yield "experts, along tokens", np.concatenate(errors)
    rows = tables.rows("wideep_moe_generation", "moe_ep_size", "num_experts", "topk", "num_tokens", "latency_s", where={"distribution": "uniform"})
    if rows is not None:
        errors = []
        for mine in _groups([rows["moe_ep_size"]], 1):
            slots = int(rows["num_experts"][mine[0]] // rows["moe_ep_size"][mine[0]])
            assignments = rows["num_tokens"][mine] * rows["topk"][mine] / rows["moe_ep_size"][mine]
            errors.append(leave_one_out_experts(Balanced.build(slots, assignments, rows["latency_s"][mine])))
        yield "experts under EP, along tokens", np.concatenate(errors)


def _groups(columns: list[np.ndarray], sample: int) -> list[np.ndarray]:
    """Return the row numbers of every distinct combination of the columns."""
    code = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        values, index = np.unique(column.astype(str) if column.dtype == object else column, return_inverse=True)
        code = np.unique(code * len(values) + index.ravel(), return_inverse=True)[1].ravel()
    order = np.argsort(code, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(code[order])) + 1)[::sample]


def _curves(columns: list[np.ndarray], keys: np.ndarray, seconds: np.ndarray, work: Work, sample: int) -> np.ndarray:
    errors = [leave_one_out(keys[mine], seconds[mine], work) for mine in _groups(columns, sample) if len(mine) > 2]
    return np.concatenate(errors) if errors else np.zeros(0)
