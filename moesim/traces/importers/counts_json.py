"""`counts-json`: expert counts as JSON, [layers, experts] or [windows, layers, experts].

Bare, or under `logical_count` (as SGLang writes and reads), `counts` or `logical_expert_load`. Rows are the MoE layers, or all
layers of the model with zeros in the dense ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import read_json
from moesim.traces.importers.common import ImportOptions, counts_trace
from moesim.traces.routing_trace import RoutingTrace

KEYS = ("logical_count", "counts", "logical_expert_load")
MAX_JSON_BYTES = 256 << 20


def read(source: Path, options: ImportOptions, form: str = "counts-json") -> RoutingTrace:
    """Read a JSON table of counts."""
    place, notes = str(source), list[str]()
    node = read_json(source, limit=MAX_JSON_BYTES, error=TraceError)
    if isinstance(node, dict):
        found = [key for key in KEYS if key in node]
        if len(found) != 1:
            raise TraceError(describe(place, "keys", sorted(node)[:8], f"must contain exactly one of {list(KEYS)}"))
        if node.get("physical_to_logical_map") is not None:
            raise TraceError(f"{place}: holds a placement beside counts; give a file of counts")
        place, node = f"{place}: {found[0]}", node[found[0]]
    table = as_table(node, place)
    names = ["all"] if len(table) == 1 else [f"window {index}" for index in range(len(table))]
    return counts_trace(form, source, table, names, options, notes, place=str(source))


def as_table(node: Any, place: str) -> np.ndarray:
    """Return [W, rows, E] of nested lists of numbers."""
    try:
        table = np.asarray(node)
    except (ValueError, TypeError, OverflowError):
        table = np.empty(0, dtype=object)
    if table.ndim == 2:
        table = table[None]
    if table.ndim != 3 or not table.size or table.dtype.kind not in "iuf":
        raise TraceError(f"{place}: must be [layers][experts] or [windows][layers][experts] of numbers, with rows of equal length")
    return table
