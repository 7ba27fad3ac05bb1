"""The Ledger as pandas DataFrames; seconds and bytes. pandas is imported when a frame is asked for.

`steps`: one row per pass with its seconds per label (the mean of its block where the Ledger has merged passes). `ranks`: one row per rank with seconds per
lane, label and port, bytes per port, tokens. `intervals`: one row per Op and rank of the kept passes. `loads`: one row per MoE layer and rank.
`counters`: one row per counter, moment and rank.
Conservation can be read off: `ranks` bytes out and in have the same sum, no lane is taken for longer than `elapsed_s`, labels add up to the step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim.ledger import Ledger

TABLES = ("steps", "ranks", "intervals", "loads", "counters")


def frame(ledger: Ledger, table: str = "steps") -> Any:
    """Return one of `TABLES` as a DataFrame. Raises InputError for another name, or if pandas is not installed."""
    data = columns(ledger, table)
    try:
        import pandas
    except ImportError:
        raise InputError("to_pandas: needs pandas, which is not installed; install moesim[report]") from None
    return pandas.DataFrame(data)


def columns(ledger: Ledger, table: str) -> dict[str, np.ndarray]:
    """Return the columns of one of `TABLES`."""
    if table not in TABLES:
        raise InputError(describe("to_pandas", "table", table, f"must be one of {', '.join(TABLES)}"))
    return {"steps": _steps, "ranks": _ranks, "intervals": _intervals, "loads": _loads, "counters": _counters}[table](ledger)


def _steps(ledger: Ledger) -> dict[str, np.ndarray]:
    block = np.arange(len(ledger.step)) // ledger.sums.block
    result = {"step": np.array(ledger.step), "start_s": np.array(ledger.start_s), "duration_s": np.array(ledger.duration_s)}
    return {**result, **{f"{label}_s": values[block] for label, values in ledger.breakdown_s().items()}}


def _ranks(ledger: Ledger) -> dict[str, np.ndarray]:
    result: dict[str, np.ndarray] = {"rank": np.arange(ledger.num_ranks), "elapsed_s": np.full(ledger.num_ranks, float(np.sum(ledger.duration_s)))}
    for prefix, values in (("lane", ledger.lane_s), ("label", ledger.label_s), ("port", ledger.port_s)):
        result.update({f"{prefix}.{name}_s": values[name] for name in sorted(values)})
    result.update({f"{port}_bytes": value for port, value in sorted(ledger.port_bytes.items())})
    result["load"] = ledger.load_LR.sum(axis=0)
    return {name: values for name, values in result.items() if len(values) == ledger.num_ranks}


def _intervals(ledger: Ledger) -> dict[str, np.ndarray]:
    parts = list(ledger.intervals())
    ranks = ledger.num_ranks
    result: dict[str, np.ndarray] = {
        name: np.repeat(np.array([getattr(part, name) for part in parts], dtype=kind), ranks)
        for name, kind in (("step", np.int64), ("layer", np.int64), ("label", object), ("lane", object))
    }
    result["rank"] = np.tile(np.arange(ranks), len(parts))
    for name in ("start", "end"):
        result[f"{name}_s"] = np.concatenate([getattr(part, f"{name}_R") for part in parts]) if parts else np.zeros(0)
    result["gate_s"] = np.concatenate([np.full(ranks, np.nan) if part.gate is None else part.gate for part in parts]) if parts else np.zeros(0)
    return result


def _loads(ledger: Ledger) -> dict[str, np.ndarray]:
    layers, ranks = ledger.load_LR.shape
    return {
        "layer": np.repeat(np.array(ledger.moe_layer_ids, dtype=np.int64), ranks),
        "rank": np.tile(np.arange(ranks), layers),
        "load": ledger.load_LR.reshape(-1),
    }


def _counters(ledger: Ledger) -> dict[str, np.ndarray]:
    rows = [
        (name, at_s, rank, float(value)) for name, levels in sorted(ledger.levels.items()) for at_s, value_R in levels for rank, value in enumerate(value_R)
    ]
    kinds = {"counter": object, "at_s": np.float64, "rank": np.int64, "value": np.float64}
    return {name: np.array([row[index] for row in rows], dtype=kind) for index, (name, kind) in enumerate(kinds.items())}
