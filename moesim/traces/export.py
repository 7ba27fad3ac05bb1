"""Write a trace in the formats of other tools: `topk-csv`, `counts-json`, `sglang`, `exflow`.

An export that loses something says so in the notes that it returns. Files are written whole or not at all.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import write_atomic
from moesim.traces.routing_trace import DUMMY, RoutingTrace, TokenBatch

FORMATS = ("topk-csv", "counts-json", "sglang", "exflow")


def export_trace(trace: RoutingTrace, form: str, path: Path, *, layer_base: int = 0, num_layers: int | None = None) -> list[str]:
    """Write `trace` to `path`; return notes on what the format cannot hold.

    num_layers: `sglang` only, rows to write (all hidden layers of the model); default: up to the last MoE layer.
    """
    if form == "topk-csv":
        return _topk_csv(trace, path, layer_base)
    if form == "counts-json":
        _, counts = trace.windows()
        node: object = counts[0].tolist() if len(counts) == 1 else counts.tolist()
        write_atomic(path, json.dumps(node, separators=(",", ":")) + "\n")
        return []
    if form == "sglang":
        return _sglang(trace, path, num_layers)
    if form == "exflow":
        return _exflow(trace, path)
    raise TraceError(describe("export", "format", form, f"must be one of {list(FORMATS)}"))


def _topk_csv(trace: RoutingTrace, path: Path, layer_base: int) -> list[str]:
    """Rows sorted by layer, then by order of arrival; `token` numbers the tokens."""
    batches = list(trace.batches())
    k, shape = trace.shape.top_k, trace.shape
    weighted = bool(batches) and all(batch.weights_TLK is not None for batch in batches)
    plain = all(not batch.step_T.any() and not batch.rank_T.any() and not (batch.phase_T != batches[0].phase_T[0]).any() for batch in batches)
    header = ["layer", "token", *(f"e{i}" for i in range(k)), *(f"p{i}" for i in range(k) if weighted), *([] if plain else ["step", "rank", "phase"])]

    def lines() -> Iterator[str]:
        yield ",".join(header)
        for row, layer in enumerate(shape.moe_layer_ids):
            token = 0
            for batch in batches:
                yield from _csv_rows(batch, row, layer + layer_base, token, weighted, plain)
                token += len(batch)

    text = "\n".join(lines()) + "\n"
    data = text.encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0, filename="") as file:
            file.write(data)
        data = packed.getvalue()
    write_atomic(path, data)
    return ["topk-csv holds no request ids and positions: import with --interleave where sequences alternate"]


def _csv_rows(batch: TokenBatch, row: int, layer: int, first: int, weighted: bool, plain: bool) -> Iterator[str]:
    ids = batch.experts_TLK[:, row].astype(np.int64)
    if batch.valid_TLK is not None:
        ids = np.where(batch.valid_TLK[:, row], ids, -1)
    weights = batch.weights_TLK[:, row] if weighted and batch.weights_TLK is not None else None
    for index, chosen in enumerate(ids.tolist()):
        parts = [str(layer), str(first + index), *map(str, chosen)]
        if weights is not None:
            parts += [np.format_float_positional(value, unique=True, trim="0") for value in weights[index]]
        if not plain:
            parts += [str(batch.step_T[index]), str(batch.rank_T[index]), str(batch.phase_T[index])]
        yield ",".join(parts)


def _sglang(trace: RoutingTrace, path: Path, num_layers: int | None) -> list[str]:
    ids = trace.shape.moe_layer_ids
    rows = num_layers or max(ids) + 1
    if rows <= max(ids):
        raise TraceError(describe(trace.source, "layers", rows, f"must be > {max(ids)}, the last MoE layer"))
    _, counts = trace.windows()
    table = np.zeros((len(counts), rows, trace.shape.num_experts), dtype=np.int64)
    table[:, list(ids)] = counts
    node = table[0].tolist() if len(table) == 1 else table.tolist()
    write_atomic(path, json.dumps({"logical_count": node}, separators=(",", ":")) + "\n")
    return [] if num_layers else [f"wrote {rows} layer rows; the server wants one per hidden layer: give --model"]


def _exflow(trace: RoutingTrace, path: Path) -> list[str]:
    parts = []
    for batch in trace.batches():
        if batch.valid_TLK is not None and not batch.valid_TLK[:, :, 0].all():
            raise TraceError(f"{trace.source}: some tokens have no first choice, which trace.npy cannot hold; select a part without them")
        parts.append(batch.experts_TLK[batch.phase_T != DUMMY, :, 0].astype(np.int64))
    array = np.concatenate(parts)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    write_atomic(path, buffer.getvalue())
    return [] if trace.shape.top_k == 1 else [f"only the first of {trace.shape.top_k} choices is kept"]
