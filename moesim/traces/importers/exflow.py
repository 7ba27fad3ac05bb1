"""`exflow`: trace.npy, the first choice of every token and layer as integers [tokens, layers].

Layer rows are numbered 0, 1 … unless a model gives the MoE layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.importers.common import ImportOptions, ids_from_signed, read_npy, shape_for, tokens_trace
from moesim.traces.routing_trace import PHASES, RoutingTrace, TokenBatch


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read a top-1 trace."""
    place, notes = str(source), list[str]()
    array = read_npy(source)
    if array.ndim != 2 or not array.size:
        raise TraceError(describe(place, "shape", list(array.shape), "must be [tokens, layers]", "use --format vllm for [tokens, layers, k]"))
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or (array != np.rint(array)).any() or np.abs(array).max() > 65535:
            raise TraceError(f"{place}: expert ids must be whole numbers")
        array = array.astype(np.int32)
    experts = options.shape.num_experts if options.shape else options.experts
    ids, valid = ids_from_signed(array[:, :, None], experts, place, notes)
    layers = list(options.shape.moe_layer_ids) if options.shape else list(range(array.shape[1]))
    if len(layers) != array.shape[1]:
        raise TraceError(describe(place, "layers", array.shape[1], f"must be the {len(layers)} MoE layers of the model"))
    shape = shape_for(options, place, layers=layers, experts_seen=int(ids.max()) + 1, top_k=1, notes=notes)
    tokens = np.arange(len(array))
    batch = TokenBatch(
        step_T=np.zeros(len(array), dtype=np.uint32),
        rank_T=np.zeros(len(array), dtype=np.uint16),
        request_T=(tokens % options.interleave).astype(np.uint64),
        position_T=(tokens // options.interleave).astype(np.uint32),
        phase_T=np.full(len(array), PHASES.index(options.phase), dtype=np.uint8),
        experts_TLK=ids.astype(shape.dtype),
        valid_TLK=None if valid.all() else valid,
    )
    return tokens_trace("exflow", source, [batch], shape, options, notes)
