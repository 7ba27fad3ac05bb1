"""`sglang`: dumps of the expert distribution recorder.

- `stat`, `stat_approx`: one .pt of rank 0, logical_count [steps, layers, E], already summed over ranks; the buffer is circular,
  so the order of its windows is not that of time;
- `per_pass`: one .pt per rank, global_physical_count [layers, S] per forward pass: summed over ranks, slots mapped to experts;
- `per_token`: one .pt per rank with topk_ids_of_layer [layers, T, 8] per forward pass: ids are physical slots, -1 pads, and the
  width is 8 whatever the model's top-k; a buffer before its first reset holds 0 instead;
- older .json dumps: logical_count [layers, E].
Layer rows are all hidden layers; dense ones are empty. The slot map of the dump is only right if no rebalance happened
while recording. forward_mode changed its numbering between versions, so the phase comes from extend_seq_lens.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.traces.importers import counts_json
from moesim.traces.importers.common import ImportOptions, counts_trace, hashed, shape_for, tokens_trace
from moesim.traces.routing_trace import DECODE, PREFILL, RoutingTrace, TokenBatch

_PER_RANK = re.compile(r"(expert_distribution_recorder_[\d.]+)_(\d+)\.pt\Z")
MAX_PT_BYTES = 8 << 30
MAX_ELEMENTS = 1 << 29


def load_pt(path: Path) -> Any:
    """Load a .pt of tensors and plain values; never runs code from the file."""
    if not path.is_file() or path.stat().st_size > MAX_PT_BYTES:
        raise TraceError(f"{path}: must be a file of at most {MAX_PT_BYTES >> 30} GiB")
    try:
        import torch
    except ImportError:
        raise InputError(f"{path}: reading a .pt file needs torch; install moesim[runtime], or convert the dump to JSON counts") from None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
                raise TraceError(f"{path}: members are compressed, which torch.save never does; record it again")
        return torch.load(path, map_location="cpu", weights_only=True)
    except TraceError:
        raise
    except Exception as cause:  # the unpickler of a hostile file may raise anything
        raise TraceError(f"{path}: is not a .pt file of tensors ({' '.join(str(cause).split())[:120]}); record it again") from None


def _array(value: Any, place: str, ndim: int) -> np.ndarray:
    """Return an integer tensor (or nested lists) as int64."""
    if hasattr(value, "numel"):
        if value.is_floating_point() or value.is_complex() or value.dim() != ndim or value.numel() > MAX_ELEMENTS:
            raise TraceError(describe(place, "tensor", f"{value.dtype} {list(value.shape)}", f"must be integers with {ndim} dimensions"))
        return np.asarray(value.numpy()).astype(np.int64)
    try:
        result = np.asarray(value)
    except (ValueError, TypeError, OverflowError):
        result = np.empty(0, dtype=object)
    if result.ndim != ndim or result.dtype.kind not in "iu":
        raise TraceError(f"{place}: must be integers with {ndim} dimensions")
    return result.astype(np.int64)


def read(source: Path, options: ImportOptions) -> RoutingTrace:
    """Read recorder dumps: a .pt, a folder of .pt, or an older .json."""
    if source.suffix == ".json":
        return counts_json.read(source, options, "sglang")
    if source.is_dir():
        files = sorted(path for path in source.iterdir() if path.suffix == ".pt")
        if not files:
            raise TraceError(f"{source}: holds no .pt file")
    else:
        files = [source]
        match = _PER_RANK.match(source.name)
        if match:
            others = sorted(path.name for path in source.parent.iterdir() if _PER_RANK.match(path.name) and path != source)
            if others:
                raise TraceError(f"{source}: is the dump of one rank, and {len(others)} others lie beside it; give the folder, because ranks must be summed")
    dumps = {path: load_pt(path) for path in files}
    for path, dump in dumps.items():
        if not isinstance(dump, Mapping) or not ("logical_count" in dump or "records" in dump):
            raise TraceError(f"{path}: is not a dump of the expert distribution recorder (no logical_count, no records)")
    kinds = {"stat" if "logical_count" in dump else "records" for dump in dumps.values()}
    if len(kinds) > 1:
        raise TraceError(f"{source}: mixes stat dumps and per-pass dumps; keep one kind per folder")
    if kinds == {"stat"}:
        return _stat(source, dumps, options)
    place_of, records = _records(dumps)
    slots = _slot_map(dumps)
    if all("topk_ids_of_layer" in record for record in records):
        return _per_token(source, records, slots, options)
    return _per_pass(source, records, slots, place_of, options)


def _stat(source: Path, dumps: Mapping[Path, Any], options: ImportOptions) -> RoutingTrace:
    notes = ["windows come from a circular buffer: their order is not that of time"]
    parts, names = [], []
    for path, dump in dumps.items():
        value = dump["logical_count"]
        nested = isinstance(value, list) and bool(value) and isinstance(value[0], list) and bool(value[0]) and isinstance(value[0][0], list)
        two = len(value.shape) == 2 if hasattr(value, "numel") else not nested
        table = _array(value, f"{path}: logical_count", 2 if two else 3)
        parts.append(table[None] if two else table)
        prefix = f"{path.stem} " if len(dumps) > 1 else ""
        names += [f"{prefix}slot {index}" for index in range(len(parts[-1]))]
    if len({part.shape[1:] for part in parts}) != 1:
        raise TraceError(f"{source}: dumps have different layers or experts; keep the dumps of one model")
    return counts_trace("sglang", source, np.concatenate(parts), names, options, notes)


def _records(dumps: Mapping[Path, Any]) -> tuple[dict[int, Path], list[Any]]:
    """Return the file of every rank and all records sorted by forward pass and rank; refuse gaps and repeats."""
    place_of: dict[int, Path] = {}
    records: list[Any] = []
    for path, dump in dumps.items():
        if not isinstance(dump["records"], Sequence) or not dump["records"]:
            raise TraceError(f"{path}: records is empty; record while requests are served")
        for record in dump["records"]:
            if not isinstance(record, Mapping) or not all(
                isinstance(record.get(key), int) and 0 <= record[key] < 1 << 31 for key in ("forward_pass_id", "rank")
            ):
                raise TraceError(f"{path}: every record needs integers forward_pass_id and rank")
            if place_of.setdefault(record["rank"], path) != path:
                raise TraceError(f"{path}: rank {record['rank']} is also in {place_of[record['rank']].name}; keep the files of one recording in a folder")
            records.append(record)
    ranks = sorted(place_of)
    if ranks != list(range(len(ranks))):
        raise TraceError(
            describe(
                str(next(iter(dumps))),
                "ranks",
                ranks[:16],
                "must be 0, 1 … without a gap",
                "give the folder with the files of all ranks: counts are summed over them",
            )
        )
    records.sort(key=lambda record: (record["forward_pass_id"], record["rank"]))
    keys = [(record["forward_pass_id"], record["rank"], record.get("gatherer_key", "primary")) for record in records]
    if len(set(keys)) != len(keys):
        raise TraceError(f"{next(iter(dumps))}: a forward pass is recorded twice for one rank; keep the files of one recording")
    return place_of, records


def _slot_map(dumps: Mapping[Path, Any]) -> np.ndarray:
    """Return int64 [layers, S]: logical expert of every slot; the same in all files or refused."""
    first: np.ndarray | None = None
    for path, dump in dumps.items():
        if "last_physical_to_logical_map" not in dump:
            raise TraceError(f"{path}: has no last_physical_to_logical_map; slots cannot be mapped to experts")
        table = _array(dump["last_physical_to_logical_map"], f"{path}: last_physical_to_logical_map", 2)
        if not table.size or table.min() < 0 or table.max() > 65535:
            raise TraceError(f"{path}: last_physical_to_logical_map must hold expert ids >= 0")
        if first is not None and not np.array_equal(first, table):
            raise TraceError(f"{path}: last_physical_to_logical_map differs between ranks: a rebalance happened while recording; record with rebalancing off")
        first = table
    assert first is not None
    return first


_MAP_NOTE = "slots mapped to experts through last_physical_to_logical_map: right only if no rebalance happened while recording"


def _per_pass(source: Path, records: Sequence[Any], slots: np.ndarray, place_of: Mapping[int, Path], options: ImportOptions) -> RoutingTrace:
    notes = [f"summed over {len(place_of)} ranks", _MAP_NOTE]
    layers, experts = len(slots), int(slots.max()) + 1
    row = np.arange(layers)[:, None]
    windows: dict[int, np.ndarray] = {}
    for record in records:
        place = f"{place_of[record['rank']]}: forward pass {record['forward_pass_id']}"
        if "global_physical_count" not in record:
            raise TraceError(f"{place}: has no global_physical_count")
        count = _array(record["global_physical_count"], place, 2)
        if count.shape != slots.shape or count.min() < 0:
            raise TraceError(describe(place, "global_physical_count", list(count.shape), f"must be counts >= 0 of {list(slots.shape)}, like the slot map"))
        table = windows.setdefault(record["forward_pass_id"], np.zeros((layers, experts), dtype=np.int64))
        np.add.at(table, (np.broadcast_to(row, slots.shape), slots), count)
    names = [f"forward pass {key}" for key in windows]
    return counts_trace("sglang", source, np.stack(list(windows.values())), names, options, notes)


def _per_token(source: Path, records: Sequence[Any], slots: np.ndarray, options: ImportOptions) -> RoutingTrace:
    notes = [_MAP_NOTE]
    experts = int(slots.max()) + 1
    row = np.arange(len(slots))[:, None, None]
    cubes = []
    for record in records:
        place = f"{source}: forward pass {record['forward_pass_id']}, rank {record['rank']}"
        ids = _array(record["topk_ids_of_layer"], place, 3)
        if len(ids) != len(slots) or (ids.size and (ids.max() >= slots.shape[1] or ids.min() < -1)):
            raise TraceError(
                describe(
                    place,
                    "topk_ids_of_layer",
                    f"{list(ids.shape)}, up to {ids.max(initial=-1)}",
                    f"must be [{len(slots)}, tokens, width] of slots < {slots.shape[1]}, -1 where empty",
                )
            )
        cubes.append(ids)
    widths = {ids.shape[2] for ids in cubes}
    if len(widths) != 1:
        raise TraceError(f"{source}: records have different widths {sorted(widths)}; keep the files of one recording")
    width = widths.pop()
    # several zeros in a row are a buffer before its first reset: no token chooses one slot twice
    chosen = max((int(np.where((ids == 0).sum(axis=2) > 1, 0, (ids >= 0).sum(axis=2)).max(initial=0)) for ids in cubes), default=0)
    k = options.shape.top_k if options.shape else options.top_k or chosen
    if not max(1, chosen) <= k <= width:
        raise TraceError(
            describe(
                str(source),
                "top-k",
                k,
                f"must be in {max(1, chosen)}..{width}: tokens have up to {chosen} experts, the recorder keeps {width}",
                "give --model or --top-k",
            )
        )
    for index, ids in enumerate(cubes):
        ids = ids[:, :, :k]
        valid = (ids >= 0) & ~((ids == 0).sum(axis=2, keepdims=True) > 1)
        cubes[index] = np.where(valid, slots[row, np.maximum(ids, 0)], -1).transpose(1, 0, 2)
    used = np.any([(cube >= 0).any(axis=(0, 2)) for cube in cubes], axis=0)
    layers = list(options.shape.moe_layer_ids) if options.shape else np.flatnonzero(used).tolist()
    if not layers or max(layers) >= len(slots) or set(np.flatnonzero(used).tolist()) - set(layers):
        raise TraceError(
            describe(
                str(source),
                "layers with routing",
                np.flatnonzero(used).tolist()[:8],
                f"must be the MoE layers of the model, {layers[:8]}…",
                "give the model that was recorded",
            )
        )
    if len(layers) < len(slots):
        notes.append(f"{len(slots) - len(layers)} of {len(slots)} layers are dense and left out")
    shape = shape_for(options, str(source), layers=layers, experts_seen=experts, top_k=k, notes=notes)
    batches = []
    for record, cube in zip(records, cubes, strict=True):
        ids = cube[:, layers]
        valid = ids >= 0
        batches.append(_batch(source, record, np.maximum(ids, 0).astype(shape.dtype), None if valid.all() else valid))
    return tokens_trace("sglang", source, batches, shape, options, notes)


def _batch(source: Path, record: Any, experts: np.ndarray, valid: np.ndarray | None) -> TokenBatch:
    """Build the rows of one forward pass of one rank."""
    tokens = len(experts)
    place = f"{source}: forward pass {record['forward_pass_id']}, rank {record['rank']}"
    lengths = record.get("extend_seq_lens")
    lengths = [] if lengths is None else list(lengths)
    positions = record.get("positions")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in lengths) or (lengths and sum(lengths) != tokens):
        raise TraceError(describe(place, "extend_seq_lens", lengths[:8], f"must be lengths that sum to the {tokens} tokens"))
    request = np.repeat(np.arange(len(lengths)), lengths) if lengths else np.arange(tokens)
    position = np.zeros(tokens, dtype=np.int64) if positions is None else _array(positions, f"{place}: positions", 1)
    if len(position) != tokens or (tokens and not 0 <= position.min() <= position.max() < 1 << 32):
        raise TraceError(describe(place, "positions", len(position), f"must be {tokens} numbers >= 0"))
    salt = np.uint64(hashed(f"{record['forward_pass_id']}/{record['rank']}"))
    return TokenBatch(
        step_T=np.full(tokens, record["forward_pass_id"], dtype=np.uint32),
        rank_T=np.full(tokens, record["rank"] & 0xFFFF, dtype=np.uint16),
        request_T=request.astype(np.uint64) ^ salt,
        position_T=position.astype(np.uint32),
        phase_T=np.full(tokens, PREFILL if lengths else DECODE, dtype=np.uint8),
        experts_TLK=np.ascontiguousarray(experts),
        valid_TLK=valid,
    )
