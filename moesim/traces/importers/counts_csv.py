"""`counts-csv`: one row per layer and expert with a count, in long form.

Columns layer, expert, count; other columns select rows (`where`) or name windows (`window_column`), and a column that does
neither must be constant, so that counts of different origin are never added up by accident.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.importers.common import ImportOptions, merge, provenance, shape_for, text_lines
from moesim.traces.in_memory import from_counts
from moesim.traces.routing_trace import MAX_COUNTS, RoutingTrace


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read a long table of counts."""
    place, notes = str(source), list[str]()
    try:
        rows = list(csv.reader(text_lines(source), strict=True))
    except csv.Error as cause:
        raise TraceError(f"{place}: is not a readable CSV ({cause}); check the file") from None
    header = [name.strip() for name in rows[0]] if rows else []
    named = {"layer", "expert", "count", *(name for name, _ in options.where), *([options.window_column] if options.window_column else [])}
    if len(set(header)) != len(header) or not named <= set(header):
        raise TraceError(describe(place, "header", header, f"must have the columns {sorted(named)}, each once"))
    at = {name: index for index, name in enumerate(header)}
    ragged = next((number for number, row in enumerate(rows[1:], 2) if len(row) != len(header)), None)
    if ragged is not None:
        raise TraceError(describe(place, f"line {ragged}", len(rows[ragged - 1]), f"must have {len(header)} columns"))
    kept = [row for row in rows[1:] if all(row[at[name]] == value for name, value in options.where)]
    if not kept:
        raise TraceError(describe(place, "where", list(options.where), "selects no row"))
    for name in set(header) - named:
        if len({row[at[name]] for row in kept}) > 1:
            raise TraceError(
                f"{place}: column {name!r} has several values; select one with --where {name}=… or make it the windows with --window-column {name}"
            )
    try:
        layer_N, expert_N, count_N = (np.array([int(row[at[name]]) for row in kept], dtype=np.int64) for name in ("layer", "expert", "count"))
    except (ValueError, OverflowError) as cause:
        raise TraceError(f"{place}: layer, expert and count must be integers ({cause})") from None
    layer_N = layer_N - options.layer_base
    if min(layer_N.min(), expert_N.min(), count_N.min()) < 0 or layer_N.max() > 65535 or expert_N.max() > 65535 or count_N.max() > 1 << 48:
        raise TraceError(f"{place}: layer, expert and count must be >= 0 (layers counted from --layer-base {options.layer_base}) and of sensible size")
    window_N = [row[at[options.window_column]] for row in kept] if options.window_column else ["all"] * len(kept)
    names = list(dict.fromkeys(window_N))
    layers = np.unique(layer_N)
    experts = int(expert_N.max()) + 1
    cells = len(names) * len(layers) * experts
    if cells > MAX_COUNTS:
        raise TraceError(describe(place, "windows × layers × experts", cells, f"must be <= {MAX_COUNTS}"))
    index = {name: number for number, name in enumerate(names)}
    cell_N = (np.array([index[name] for name in window_N]) * len(layers) + np.searchsorted(layers, layer_N)) * experts + expert_N
    if len(np.unique(cell_N)) != len(cell_N):
        raise TraceError(f"{place}: a (window, layer, expert) appears twice; keep one row")
    if len(cell_N) < cells:
        notes.append(f"{cells - len(cell_N)} of {cells} cells are not in the table: counted as 0")
    table = np.zeros(cells, dtype=np.int64)
    table[cell_N] = count_N
    for name, value in options.where:
        notes.append(f"rows with {name} = {value}")
    shape = shape_for(options, place, layers=layers.tolist(), experts_seen=experts, top_k=None, notes=notes)
    counts = np.zeros((len(names), len(layers), shape.num_experts), dtype=np.int64)
    counts[:, :, :experts] = table.reshape(len(names), len(layers), experts)
    counts, names = merge(counts, names, options.merge_windows)
    return from_counts(shape, counts, names, source=place, provenance=provenance("counts-csv", source, options, notes))
