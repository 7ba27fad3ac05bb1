"""`vllm`: the routed experts that the server returns per request, [tokens, layers, k] of int16 or 8-bit ids.

A .npy is one request; an .npz or a folder of .npy files holds one per array, in order of name. The keys
`prompt_routed_experts` and `routed_experts` of one .npz are the prompt and the generated tokens of one request.
The last token of a request is never routed: its row is absent, and where a server wrote an empty one it is dropped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.importers.common import ImportOptions, hashed, ids_from_signed, read_npy, read_npz, shape_for, tokens_trace
from moesim.traces.routing_trace import DECODE, PHASES, PREFILL, RoutingTrace, TokenBatch

_PAIR = ("prompt_routed_experts", "routed_experts")


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read returned routed experts."""
    notes: list[str] = []
    parts = [(name, array, phase, start) for name, array, phase, start in _arrays(source, options)]
    known = options.shape.num_experts if options.shape else options.experts
    requests, dropped = [], 0
    for name, array, phase, start in parts:
        place = f"{source}[{name}]"
        if array.ndim != 3 or not array.size:
            raise TraceError(describe(place, "shape", list(array.shape), "must be [tokens, layers, k]", "use --format exflow for [tokens, layers]"))
        ids, valid = ids_from_signed(array, known, place, notes)
        empty: np.ndarray = ~np.asarray(valid.any(axis=(1, 2)))
        if empty[-1]:
            last = len(empty) - int(np.argmin(empty[::-1])) if not empty.all() else 0
            dropped += len(empty) - last
            ids, valid = ids[:last], valid[:last]
        requests.append((name, ids, valid, phase, start))
    if dropped:
        notes.append(f"{dropped} tokens at the end of requests have no routing: dropped")
    notes.append(f"the last token of each of the {len({hashed(name) for name, *_ in requests})} requests has no routing in this format")
    widths = {ids.shape[1:] for _, ids, *_ in requests}
    if len(widths) != 1:
        raise TraceError(describe(str(source), "layers and k", sorted(widths), "must be the same in all requests"))
    rows, k = widths.pop()
    layers, keep = _layers(rows, requests, options, str(source), notes)
    seen = max((int(ids.max(initial=0)) for _, ids, *_ in requests), default=0) + 1
    shape = shape_for(options, str(source), layers=layers, experts_seen=seen, top_k=k, notes=notes)
    complete = all(valid[:, keep].all() for _, _, valid, *_ in requests)
    batches = []
    for name, ids, valid, phase, start in requests:
        count = len(ids)
        if count:
            batches.append(
                TokenBatch(
                    step_T=np.zeros(count, dtype=np.uint32),
                    rank_T=np.zeros(count, dtype=np.uint16),
                    request_T=np.full(count, hashed(name), dtype=np.uint64),
                    position_T=np.arange(start, start + count, dtype=np.uint32),
                    phase_T=np.full(count, phase, dtype=np.uint8),
                    experts_TLK=ids[:, keep].astype(shape.dtype),
                    valid_TLK=None if complete else np.ascontiguousarray(valid[:, keep]),
                )
            )
    return tokens_trace("vllm", source, batches, shape, options, notes, dropped=dropped)


def _arrays(source: Path, options: ImportOptions) -> list[tuple[str, np.ndarray, int, int]]:
    """Return (request name, array, phase, first position) of every array of the source."""
    phase = PHASES.index(options.phase)
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix == ".npy" and path.is_file())
        if not files:
            raise TraceError(f"{source}: holds no .npy file; give a .npy, an .npz or a folder of .npy")
        return [(path.stem, read_npy(path), phase, 0) for path in files]
    if source.suffix == ".npz":
        arrays = read_npz(source)
        if not arrays:
            raise TraceError(f"{source}: holds no array")
        if set(arrays) == set(_PAIR):
            prompt, generated = (arrays[key] for key in _PAIR)
            return [(source.stem, prompt, PREFILL, 0), (source.stem, generated, DECODE, len(prompt))]
        return [(name, arrays[name], phase, 0) for name in sorted(arrays)]
    return [(source.stem, read_npy(source), phase, 0)]


def _layers(
    rows: int, requests: list[tuple[str, np.ndarray, np.ndarray, int, int]], options: ImportOptions, place: str, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Return the model layer of every row kept, and which rows are kept: rows are MoE layers, or all layers."""
    if options.shape is None:
        used = np.any([valid.any(axis=(0, 2)) for _, _, valid, *_ in requests], axis=0)
        keep = np.flatnonzero(used).tolist()
        if not keep:
            raise TraceError(f"{place}: no token has any routing")
        if len(keep) < rows:
            notes.append(f"{rows - len(keep)} of {rows} layer rows have no routing: taken for dense layers")
        return keep, keep
    layers = list(options.shape.moe_layer_ids)
    if rows == len(layers):
        return layers, list(range(rows))
    if rows <= max(layers):
        raise TraceError(describe(place, "layer rows", rows, f"must be the {len(layers)} MoE layers or all layers of {options.shape.model} (> {max(layers)})"))
    notes.append(f"{rows} rows are all layers of the model; {rows - len(layers)} dense rows left out")
    return layers, layers
