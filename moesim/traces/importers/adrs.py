"""`adrs`: expert-load.json, `{"load_history": [{"logical_expert_load": [L][E]}, …]}`, one window per entry.

The published file has 224 MB; it is parsed one entry at a time.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import read_bytes
from moesim.traces.importers.common import ImportOptions, counts_trace
from moesim.traces.importers.counts_json import as_table
from moesim.traces.routing_trace import MAX_COUNTS, RoutingTrace

MAX_JSON_BYTES = 1 << 30
_START = re.compile(r'"load_history"\s*:\s*\[')
_BLANK = re.compile(r"\s*")


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read a history of expert loads."""
    place, notes = str(source), list[str]()
    try:
        text = read_bytes(source, limit=MAX_JSON_BYTES, error=TraceError).decode("utf-8")
    except UnicodeDecodeError:
        raise TraceError(f"{place}: is not UTF-8 text; check the file") from None
    match = _START.search(text)
    if match is None:
        raise TraceError(f"{place}: must hold a list load_history; use --format counts-json for a bare table")
    decoder, at = json.JSONDecoder(), match.end()
    windows: list[np.ndarray] = []
    pending: np.ndarray | None = None
    count = cells = 0
    while True:
        at = _end(_BLANK.match(text, at))
        if at < len(text) and text[at] == "]":
            break
        if count:
            if at >= len(text) or text[at] != ",":
                raise TraceError(f"{place}: load_history[{count}] does not start with a comma; the file is damaged or truncated")
            at = _end(_BLANK.match(text, at + 1))
        try:
            node, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as cause:
            raise TraceError(f"{place}: load_history[{count}] is not valid JSON ({cause}); the file is damaged or truncated") from None
        if not isinstance(node, dict) or "logical_expert_load" not in node:
            raise TraceError(f"{place}: load_history[{count}] must be an object with logical_expert_load")
        table = as_table(node["logical_expert_load"], f"{place}: load_history[{count}]")
        if len(table) != 1 or (pending is not None and table.shape != pending.shape):
            raise TraceError(describe(place, f"load_history[{count}] shape", list(table.shape[-2:]), "must be [layers][experts], the same in all entries"))
        pending = table if count % options.merge_windows == 0 else pending + table
        if count % options.merge_windows == 0:
            windows.append(pending)
            cells += table.size
            if cells > MAX_COUNTS:
                raise TraceError(describe(place, "windows × layers × experts", cells, f"must be <= {MAX_COUNTS}", "give --merge-windows N"))
        else:
            windows[-1] = pending
        count += 1
    if not windows:
        raise TraceError(f"{place}: load_history is empty")
    size = options.merge_windows
    names = [f"window {i}" if size == 1 else f"windows {i * size}..{min(count, i * size + size) - 1}" for i in range(len(windows))]
    return counts_trace("adrs", source, np.concatenate(windows), names, replace(options, merge_windows=1), notes)


def _end(match: re.Match[str] | None) -> int:
    assert match is not None
    return match.end()
