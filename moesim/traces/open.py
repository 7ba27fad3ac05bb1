"""Open a trace by whatever names it, and fit it to a model.

A reference is a name in the shipped library, a `moetrace/1` folder, a stored .zip of one, or `synthetic:…`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import canonical_json, sha256_hex
from moesim.traces.archive import MANIFEST
from moesim.traces.routing_trace import SYNTHETIC, MappedSource, RoutingTrace, TokenBatch, TraceShape, check_batch, check_counts


def library() -> dict[str, Path]:
    """Return the shipped traces by name."""
    folder = Path(__file__).parent / "library"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / MANIFEST).is_file()} if folder.is_dir() else {}


def stored_path(trace: RoutingTrace) -> Path:
    """Return where `trace` lies; it does not exist for a trace that is made up."""
    path = Path(trace.source)
    return path if path.exists() else library().get(trace.source, path)


def open_trace(ref: str, *, shape: TraceShape | None = None, seed: int = 0) -> RoutingTrace:
    """Open the trace that `ref` names; `synthetic:…` needs the `shape` of a model.

    Raises TraceError if it does not exist or breaks a rule of its format.
    """
    if ref.startswith(SYNTHETIC):
        from moesim.traces.synth import open_synthetic

        if shape is None:
            raise TraceError(f"{ref}: a synthetic trace takes its layers and experts from a model; give --model")
        return open_synthetic(ref, shape, seed=seed)
    from moesim.traces.reader import open_stored

    path = Path(ref)
    if not path.exists():
        shipped = library()
        if ref not in shipped:
            raise TraceError(f"{ref}: is neither a trace folder, a .zip nor a shipped trace; shipped: {', '.join(shipped) or 'none'}; or synthetic:zipf:1.0 …")
        # Its name, not where it is installed: equal runs give equal files on every machine.
        return replace(open_stored(shipped[ref]), source=ref)
    return open_stored(path)


def check_fits(trace: RoutingTrace, shape: TraceShape, map_layers: str | None = None, *, any_top_k: bool = False) -> RoutingTrace:
    """Return the trace as routing of a model with `shape`, or raise TraceError naming what differs.

    map_layers: None demands equal MoE layers; `cycle` repeats the trace's layers over the model's; `0:3,1:4,…` gives, for
    trace layer row 0, 1 …, the model layer that it plays (every MoE layer of the model exactly once). any_top_k: a routing rule
    will say how many of the recorded candidates a token takes, as it has where one was applied to the trace. A trace of several
    rounds has that many rows per layer and keeps its ids.
    """
    own = trace.shape
    if (any_top_k or trace.rules) and own.num_experts == shape.num_experts:
        shape = replace(shape, top_k=own.top_k, num_groups=own.num_groups, top_k_groups=own.top_k_groups)
    for name, key in (("num_experts", "experts"), ("top_k", "top-k")):
        if getattr(own, name) != getattr(shape, name):
            raise TraceError(
                describe(
                    trace.source, key, getattr(own, name), f"must be the {getattr(shape, name)} of {shape.model}", f"the trace was recorded on {own.model}"
                )
            )
    if trace.rounds > 1:
        if own.num_layers != trace.rounds * shape.num_layers or map_layers is not None:
            rule = f"must be {trace.rounds} rounds of each of the {shape.num_layers} MoE layers of {shape.model}, without --map-layers"
            raise TraceError(describe(trace.source, "layer rows", own.num_layers, rule))
        _check_experts(trace, np.repeat(shape.expert_counts_L, trace.rounds).tolist(), shape.model)
        return trace
    if map_layers is None:
        if own.moe_layer_ids != shape.moe_layer_ids:
            raise TraceError(
                describe(
                    trace.source,
                    f"{own.num_layers} layers",
                    list(own.moe_layer_ids),
                    f"must be the {shape.num_layers} MoE layers of {shape.model}, {list(shape.moe_layer_ids)[:8]}…",
                    "give --map-layers cycle, or --map-layers 0:3,1:4,… (trace layer row:model layer)",
                )
            )
        if own.experts_L is None and shape.experts_L is not None:
            return _narrowed(trace, shape)
        _check_experts(trace, list(shape.expert_counts_L), shape.model)
        return trace if own == shape else replace(trace, shape=shape)
    rows = _layer_rows(trace, shape, map_layers)
    _check_experts(trace, list(shape.expert_counts_L), shape.model, rows)
    note = {"map_layers": map_layers, "mapped_from": list(own.moe_layer_ids)}
    common: dict[str, Any] = {
        "shape": shape,
        "provenance": {**trace.provenance, **note},
        "fingerprint": sha256_hex(canonical_json([trace.fingerprint, rows, list(shape.moe_layer_ids)])),
        "resized": None,
    }
    if trace.kind == "counts":
        assert trace.counts is not None
        counts = trace.counts
        return replace(trace, **common, counts=lambda: np.ascontiguousarray(counts()[:, rows]))
    assert trace.tokens is not None
    return replace(trace, **common, tokens=MappedSource(trace.tokens, lambda batch: batch.take_layers(rows)))


def _check_experts(trace: RoutingTrace, wanted: list[int], model: str, rows: list[int] | None = None) -> None:
    """Raise TraceError unless every layer row that plays a layer has as many experts."""
    own = [trace.shape.expert_counts_L[row] for row in (range(len(wanted)) if rows is None else rows)]
    if own != wanted:
        raise TraceError(describe(trace.source, "experts per layer", own, f"must be the {wanted} of {model}", f"the trace was recorded on {trace.shape.model}"))


def _narrowed(trace: RoutingTrace, shape: TraceShape) -> RoutingTrace:
    """Return a trace that does not say how many experts each layer has as one of `shape`; what it holds is checked as it is read."""

    def checked(batch: TokenBatch) -> TokenBatch:
        check_batch(batch, shape, trace.source)
        return batch

    if trace.kind == "counts":
        assert trace.counts is not None
        counts = trace.counts()
        check_counts(counts, shape, len(counts), trace.source)
        return replace(trace, shape=shape)
    assert trace.tokens is not None
    return replace(trace, shape=shape, tokens=MappedSource(trace.tokens, checked))


def _layer_rows(trace: RoutingTrace, shape: TraceShape, text: str) -> list[int]:
    """Return, for every MoE layer of the model, the layer row of the trace that plays it."""
    own = trace.shape.num_layers
    if text == "cycle":
        return [index % own for index in range(shape.num_layers)]
    played: dict[int, int] = {}
    for pair in text.split(","):
        row, colon, layer = pair.partition(":")
        if not colon or not row.strip().isdecimal() or not layer.strip().isdecimal() or len(pair) > 16:
            raise TraceError(describe("--map-layers", "pair", pair, "must be ROW:LAYER, like 0:3", "or give --map-layers cycle"))
        if int(row) >= own or int(layer) not in shape.moe_layer_ids or int(layer) in played:
            raise TraceError(
                describe(
                    "--map-layers",
                    "pair",
                    pair,
                    f"must name a trace row < {own} and a MoE layer of {shape.model}, once",
                    f"MoE layers: {list(shape.moe_layer_ids)}",
                )
            )
        played[int(layer)] = int(row)
    missing = [layer for layer in shape.moe_layer_ids if layer not in played]
    if missing:
        raise TraceError(describe("--map-layers", "layers without a row", missing, f"must be none: every MoE layer of {shape.model} needs one"))
    return [played[layer] for layer in shape.moe_layer_ids]
