"""`trtllm`: the expert statistics folder, meta_info.json and rank{r}.safetensors with keys "{iteration}_{layer}".

Every rank counts its own tokens, so counts are summed over ranks; one window per iteration; layers are true layer indices.
The safetensors header is read here, bounded by the file, so that neither torch nor safetensors is needed.
Source: safetensors format (8-byte little-endian header length, JSON header, raw tensors).
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import parse_json, read_bytes, read_json
from moesim.traces.importers.common import ImportOptions, merge, provenance, shape_for
from moesim.traces.in_memory import from_counts
from moesim.traces.routing_trace import MAX_COUNTS, RoutingTrace

_DTYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4", "F32": "<f4", "F64": "<f8"}
_KEY = re.compile(r"(\d{1,9})_(\d{1,5})\Z")
MAX_FILE_BYTES = 1 << 30


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Return the numeric tensors of a .safetensors file; raise TraceError if its header does not fit its size."""
    data = read_bytes(path, limit=MAX_FILE_BYTES, error=TraceError)
    place = str(path)
    if len(data) < 8:
        raise TraceError(describe(place, "size", f"{len(data)} B", "is too short for a safetensors file"))
    length = struct.unpack_from("<Q", data)[0]
    if length > min(len(data) - 8, 64 << 20):
        raise TraceError(describe(place, "header length", length, f"must be <= {min(len(data) - 8, 64 << 20)} B", "the file is truncated or damaged"))
    header = parse_json(data[8 : 8 + length], f"{place}: header", error=TraceError)
    if not isinstance(header, dict) or len(header) > 1 << 20:
        raise TraceError(f"{place}: header must be an object of tensors")
    body, used = len(data) - 8 - length, 0
    result = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        key = f"{place}: {name}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in _DTYPES:
            raise TraceError(describe(key, "tensor", entry, f"must have shape, data_offsets and a dtype of {list(_DTYPES)}"))
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 4:
            raise TraceError(describe(key, "shape, data_offsets", (shape, offsets), "must be lists of integers >= 0"))
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        count = math.prod(shape)
        if not offsets[0] <= offsets[1] <= body or count * dtype.itemsize != offsets[1] - offsets[0]:
            raise TraceError(
                describe(key, "data_offsets", offsets, f"must hold {count} × {dtype.itemsize} B inside {body} B", "the file is truncated or damaged")
            )
        used += offsets[1] - offsets[0]
        if used > body:
            raise TraceError(f"{place}: tensors overlap; the file is damaged")
        result[name] = np.frombuffer(data, dtype=dtype, count=count, offset=8 + length + offsets[0]).reshape(shape)
    return result


def _naturals(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 48 for item in value)


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read a folder of expert statistics."""
    place, notes = str(source), list[str]()
    if not source.is_dir():
        raise TraceError(f"{place}: must be the folder with meta_info.json and rank*.safetensors")
    meta = read_json(source / "meta_info.json", error=TraceError)
    if not isinstance(meta, dict) or not all(
        isinstance(meta.get(key), int) and not isinstance(meta[key], bool) for key in ("num_experts", "num_experts_per_token")
    ):
        raise TraceError(f"{place}/meta_info.json: must have integers num_experts and num_experts_per_token")
    experts, k = meta["num_experts"], meta["num_experts_per_token"]
    ranks = {int(match.group(1)): path for path in source.iterdir() if (match := re.fullmatch(r"rank(\d{1,6})\.safetensors", path.name))}
    if sorted(ranks) != list(range(len(ranks))) or not ranks:
        raise TraceError(
            describe(
                place,
                "rank files",
                sorted(ranks)[:16],
                "must be rank0.safetensors, rank1.safetensors … without a gap",
                "copy the files of all ranks: counts are summed over them",
            )
        )
    total: dict[tuple[int, int], np.ndarray] = {}
    for rank in sorted(ranks):
        for name, tensor in read_safetensors(ranks[rank]).items():
            match = _KEY.match(name)
            if match is None or tensor.shape != (experts,):
                raise TraceError(describe(str(ranks[rank]), f"tensor {name}", list(tensor.shape), f"must be named iteration_layer and have {experts} entries"))
            key = int(match.group(1)), int(match.group(2))
            values = tensor.astype(np.int64) if tensor.dtype.kind in "iu" else _from_float(tensor, f"{ranks[rank]}: {name}")
            total[key] = total[key] + values if key in total else values
    if not total:
        raise TraceError(f"{place}: the rank files hold no counts")
    iterations, layers = sorted({key[0] for key in total}), sorted({key[1] for key in total})
    if len(iterations) * len(layers) * experts > MAX_COUNTS:
        raise TraceError(
            describe(place, "windows × layers × experts", len(iterations) * len(layers) * experts, f"must be <= {MAX_COUNTS}", "record fewer iterations")
        )
    missing = [key for key in ((i, layer) for i in iterations for layer in layers) if key not in total]
    if missing:
        notes.append(f"{len(missing)} (iteration, layer) pairs are not recorded: counted as 0")
    zero = np.zeros(experts, dtype=np.int64)
    table = np.stack([[total.get((i, layer), zero) for layer in layers] for i in iterations])
    notes.append(f"summed over {len(ranks)} ranks")
    shape = shape_for(options, place, layers=layers, experts_seen=experts, top_k=k, notes=notes, exact_experts=True)
    table, names = merge(table, [f"iteration {i}" for i in iterations], options.merge_windows)
    return from_counts(shape, table, names, source=place, provenance=provenance("trtllm", source, options, notes))


def _from_float(tensor: np.ndarray, place: str) -> np.ndarray:
    if not np.isfinite(tensor).all() or (tensor != np.rint(tensor)).any() or np.abs(tensor).max(initial=0) > 2**48:
        raise TraceError(f"{place}: counts must be whole numbers")
    return tensor.astype(np.int64)
