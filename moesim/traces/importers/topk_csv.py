"""`topk-csv`: one row per layer and token with the chosen experts e0, e1 … (best first) and optionally weights p0, p1 …

Columns: layer, token, e0…, optionally p0… and step, rank, request, position, phase (0 prefill, 1 decode, 2 train, 3 dummy).
With `interleave` N the rows alternate N sequences: request = token mod N, position = token div N. An id of -1 is "no
expert"; a layer that lacks a token has no routing there.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.importers.common import ImportOptions, numeric_table, shape_for, text_lines, tokens_trace, whole
from moesim.traces.routing_trace import PHASES, RoutingTrace, TokenBatch

_TOKEN_COLUMNS = {"step": 2**32 - 1, "rank": 2**16 - 1, "request": 2**53, "position": 2**32 - 1, "phase": 3}


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read a top-k CSV."""
    place, notes = str(source), list[str]()
    lines = text_lines(source)
    header = [name.strip() for name in next(lines, "").lstrip("\ufeff").split(",")]
    k = sum(re.fullmatch(r"e\d+", name) is not None for name in header)
    weights = sum(re.fullmatch(r"p\d+", name) is not None for name in header)
    expected = {"layer", "token", *(f"e{i}" for i in range(k)), *(f"p{i}" for i in range(weights))}
    extra = set(header) - expected
    if len(set(header)) != len(header) or not expected <= set(header) or not k or weights not in (0, k) or not extra <= set(_TOKEN_COLUMNS):
        raise TraceError(describe(place, "header", header[:16], "must be layer, token, e0…, optionally p0… (as many) and step, rank, request, position, phase"))
    table = numeric_table(lines, len(header), place)
    column = {name: table[:, index] for index, name in enumerate(header)}
    layer_N = whole(column["layer"], place, "layer", options.layer_base, 65535 + options.layer_base) - options.layer_base
    token_N = whole(column["token"], place, "token", 0, 2**32 - 1)
    layers, row_N = np.unique(layer_N, return_inverse=True)
    tokens, place_N = np.unique(token_N, return_inverse=True)
    cells = len(tokens) * len(layers)
    if cells * k > max(64 << 20, 64 * len(table) * k):
        raise TraceError(
            describe(place, "tokens × layers", f"{len(tokens)} × {len(layers)}", f"is far more than the {len(table)} rows", "layer and token must be indices")
        )
    cell_N = place_N * len(layers) + row_N
    if len(np.unique(cell_N)) != len(cell_N):
        values, counts = np.unique(cell_N, return_counts=True)
        twice = int(values[np.argmax(counts > 1)])
        raise TraceError(
            describe(
                place, "layer, token", (int(layers[twice % len(layers)]) + options.layer_base, int(tokens[twice // len(layers)])), "appears twice; keep one row"
            )
        )
    ids_NK = np.stack([whole(column[f"e{i}"], place, f"e{i}", -1, 65535) for i in range(k)], axis=1)
    shape = shape_for(options, place, layers=layers.tolist(), experts_seen=max(1, int(ids_NK.max()) + 1), top_k=k, notes=notes)
    experts = np.zeros((cells, k), dtype=shape.dtype)
    valid = np.zeros((cells, k), dtype=bool)
    experts[cell_N] = np.maximum(ids_NK, 0)
    valid[cell_N] = ids_NK >= 0
    if not valid.all():
        notes.append(f"{int((~valid).sum())} of {valid.size} choices are missing")
    cube = (len(tokens), len(layers), k)
    weight_TLK = None
    if weights:
        values_NK = np.stack([column[f"p{i}"] for i in range(k)], axis=1)
        if not np.isfinite(values_NK).all() or np.abs(values_NK).max() > 1e30:
            raise TraceError(f"{place}: weights p0… must be finite numbers")
        flat = np.zeros((cells, k), dtype=np.float32)
        flat[cell_N] = values_NK
        weight_TLK = flat.reshape(cube)
    first_T = np.full(len(tokens), len(table))
    np.minimum.at(first_T, place_N, np.arange(len(table)))

    def of_token(name: str, default: np.ndarray) -> np.ndarray:
        if name not in column:
            return default
        values = whole(column[name], place, name, 0, _TOKEN_COLUMNS[name])
        if (values != values[first_T][place_N]).any():
            raise TraceError(f"{place}: {name} must be the same in all layers of a token")
        return values[first_T]

    if options.interleave > 1:
        notes.append(f"{options.interleave} sequences alternate: request = token mod {options.interleave}, position = token div {options.interleave}")
    batch = TokenBatch(
        step_T=of_token("step", np.zeros(len(tokens), dtype=np.int64)).astype(np.uint32),
        rank_T=of_token("rank", np.zeros(len(tokens), dtype=np.int64)).astype(np.uint16),
        request_T=of_token("request", tokens % options.interleave).astype(np.uint64),
        position_T=of_token("position", tokens // options.interleave).astype(np.uint32),
        phase_T=of_token("phase", np.full(len(tokens), PHASES.index(options.phase))).astype(np.uint8),
        experts_TLK=experts.reshape(cube),
        weights_TLK=weight_TLK,
        valid_TLK=None if valid.all() else valid.reshape(cube),
    )
    return tokens_trace("topk-csv", source, [batch], shape, options, notes)
