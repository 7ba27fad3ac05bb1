"""What the importers share: options, the shape of the result, hostile-file limits, warm-up detection.

An importer never guesses silently: what it inferred or changed is listed in the trace's `provenance["notes"]`.
Shapes: T tokens, L layers, K choices, E experts, W windows.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import read_bytes
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.routing_trace import DUMMY, PHASES, PREFILL, RoutingTrace, TokenBatch, TraceShape

MAX_ARRAY_BYTES = 2 << 30
MAX_CSV_BYTES = 4 << 30
GZIP_RATIO = 200
"""A .gz that inflates further than this is a bomb; real tables reach about 20."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What the caller knows about the source."""

    shape: TraceShape | None = None
    """Shape of the model; the layers of the trace must be among its MoE layers."""
    name: str | None = None
    """Name of the model where no shape is given."""
    experts: int | None = None
    top_k: int | None = None
    layer_base: int = 0
    """Number of the first layer of the model in the source, 0 or 1."""
    interleave: int = 1
    """Sequences whose tokens alternate in the source."""
    phase: str = "prefill"
    keep_warmup: bool = False
    """Do not mark identical tokens at the start as dummies."""
    where: tuple[tuple[str, str], ...] = ()
    """Rows of a CSV to keep: column and value."""
    window_column: str | None = None
    """Column of a CSV whose values name the windows."""
    merge_windows: int = 1
    """Consecutive windows to add up."""
    provenance: tuple[tuple[str, str], ...] = ()
    """What the caller knows about the origin: source, licence, hardware, date."""

    def __post_init__(self) -> None:
        if self.layer_base not in (0, 1):
            raise TraceError(describe("import", "layer_base", self.layer_base, "must be 0 or 1"))
        for name in ("interleave", "merge_windows"):
            if getattr(self, name) < 1:
                raise TraceError(describe("import", name, getattr(self, name), "must be >= 1"))
        if self.phase not in PHASES[:3]:
            raise TraceError(describe("import", "phase", self.phase, f"must be one of {list(PHASES[:3])}"))


def provenance(form: str, source: Path, options: ImportOptions, notes: Sequence[str]) -> dict[str, Any]:
    """Return the origin of an imported trace: format, file name and hash, and what was decided."""
    result: dict[str, Any] = {"tool": "moesim", "imported_from": form, "file": source.name, "notes": list(notes)}
    if source.is_file():
        with source.open("rb") as file:
            result["file_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    taken = sorted({"synthetic", "derived_from", "transforms", *result} & {key for key, _ in options.provenance})
    if taken:
        raise TraceError(describe("import", "provenance keys", taken, "are set by the importer", "choose other names, like source or licence"))
    return {**dict(options.provenance), **result}


def shape_for(
    options: ImportOptions, place: str, *, layers: Sequence[int], experts_seen: int, top_k: int | None, notes: list[str], exact_experts: bool = False
) -> TraceShape:
    """Return the shape of an imported trace.

    layers: model layer of every row. experts_seen: 1 + largest id, or the width of a table (`exact_experts`).
    top_k: choices per token in the source, None if it cannot be seen there.
    """
    if options.shape is not None:
        model = options.shape
        if options.experts not in (None, model.num_experts) or options.top_k not in (None, model.top_k):
            raise TraceError(
                describe(
                    "import",
                    "experts, top-k",
                    (options.experts, options.top_k),
                    f"must agree with {model.model}: {model.num_experts}, {model.top_k}",
                    "leave them out",
                )
            )
        if experts_seen > model.num_experts or (exact_experts and experts_seen != model.num_experts):
            raise TraceError(
                describe(place, "experts", experts_seen, f"must be the {model.num_experts} experts of {model.model}", "give the model that was recorded")
            )
        if top_k not in (None, model.top_k):
            raise TraceError(describe(place, "top-k", top_k, f"must be the {model.top_k} of {model.model}", "give the model that was recorded"))
        strange = [layer for layer in layers if layer not in model.moe_layer_ids]
        if strange:
            raise TraceError(
                describe(
                    place,
                    "layers",
                    strange[:8],
                    f"must be MoE layers of {model.model}, {list(model.moe_layer_ids)[:8]}…",
                    "give --layer-base 1 if the source counts from 1",
                )
            )
        if len(layers) < model.num_layers:
            notes.append(f"{len(layers)} of the {model.num_layers} MoE layers of {model.model} are recorded")
        return model.of_layers([model.moe_layer_ids.index(layer) for layer in layers], tuple(layers))
    experts = options.experts
    if experts is None:
        experts = experts_seen
        if not exact_experts:
            notes.append(f"experts inferred as 1 + largest id = {experts}")
    elif experts_seen > experts or (exact_experts and experts_seen != experts):
        raise TraceError(describe(place, "experts", experts_seen, f"must be the {experts} given", "correct --experts"))
    if top_k is None:
        top_k = options.top_k
        if top_k is None:
            raise TraceError(f"{place}: counts do not show how many experts a token chooses; give --model or --top-k")
    elif options.top_k not in (None, top_k):
        raise TraceError(describe(place, "top-k", top_k, f"must be the {options.top_k} given", "correct --top-k"))
    return TraceShape(model=options.name or "unknown", num_experts=experts, top_k=top_k, moe_layer_ids=tuple(layers))


def moe_rows(table_WLE: np.ndarray, options: ImportOptions, place: str, notes: list[str]) -> tuple[list[int], np.ndarray]:
    """Return the model layers and the counts [W, L, E] of the MoE layers of a table that may hold dense layers as zero rows."""
    rows = table_WLE.shape[1]
    used = table_WLE.any(axis=(0, 2))
    if options.shape is not None:
        layers = list(options.shape.moe_layer_ids)
        if rows == len(layers):
            return layers, table_WLE
        if rows <= max(layers):
            raise TraceError(
                describe(
                    place,
                    "layer rows",
                    rows,
                    f"must be the {len(layers)} MoE layers or all layers of {options.shape.model} (> {max(layers)})",
                    "give the model that was recorded",
                )
            )
        extra = [row for row in np.flatnonzero(used).tolist() if row not in layers]
        if extra:
            raise TraceError(
                describe(place, "layers with counts", extra[:8], f"must be MoE layers of {options.shape.model}", "give the model that was recorded")
            )
        notes.append(f"{rows} rows are all layers of the model; {rows - len(layers)} dense rows without counts left out")
        return layers, table_WLE[:, layers]
    layers = np.flatnonzero(used).tolist()
    if not layers:
        raise TraceError(f"{place}: all counts are 0; record again while requests are served")
    if len(layers) < rows:
        notes.append(f"{rows - len(layers)} of {rows} rows have no counts: taken for dense layers")
    return layers, table_WLE[:, layers]


def counts_trace(
    form: str, source: Path, table_WLE: np.ndarray, names: Sequence[str], options: ImportOptions, notes: list[str], *, place: str | None = None
) -> RoutingTrace:
    """Build the counts trace of a table [W, rows, E]: MoE rows selected, empty windows dropped, windows merged."""
    place = place or str(source)
    if table_WLE.ndim != 3 or not table_WLE.size:
        raise TraceError(describe(place, "counts shape", list(table_WLE.shape), "must be [windows, layers, experts]"))
    if table_WLE.dtype.kind == "f":
        if not (np.isfinite(table_WLE).all() and (table_WLE == np.rint(table_WLE)).all()):
            raise TraceError(f"{place}: counts must be whole numbers; give token counts, not shares")
        table_WLE = np.rint(np.clip(table_WLE, -1, 2.0**49)).astype(np.int64)
    if table_WLE.dtype.kind not in "iu" or table_WLE.min() < 0:
        raise TraceError(f"{place}: counts must be integers >= 0")
    table_WLE = table_WLE.astype(np.int64, copy=False)
    filled: np.ndarray = np.asarray(table_WLE.any(axis=(1, 2)))
    if not filled.all() and filled.any():
        notes.append(f"{int((~filled).sum())} windows without counts left out")
        table_WLE, names = table_WLE[filled], [name for name, keep in zip(names, filled, strict=True) if keep]
    layers, table_WLE = moe_rows(table_WLE, options, place, notes)
    table_WLE, names = merge(table_WLE, names, options.merge_windows)
    shape = shape_for(options, place, layers=layers, experts_seen=table_WLE.shape[2], top_k=None, notes=notes, exact_experts=True)
    return from_counts(shape, table_WLE, names, source=place, provenance=provenance(form, source, options, notes))


def merge(table_WLE: np.ndarray, names: Sequence[str], size: int) -> tuple[np.ndarray, list[str]]:
    """Add up runs of `size` windows."""
    if size == 1:
        return table_WLE, list(names)
    starts = list(range(0, len(table_WLE), size))
    ends = [min(start + size, len(names)) - 1 for start in starts]
    merged = [names[start] if start == end else f"{names[start]} .. {names[end]}" for start, end in zip(starts, ends, strict=True)]
    return np.add.reduceat(table_WLE, starts, axis=0), merged


def tokens_trace(
    form: str, source: Path, batches: Sequence[TokenBatch], shape: TraceShape, options: ImportOptions, notes: list[str], *, dropped: int = 0
) -> RoutingTrace:
    """Build the token trace of imported batches: warm-up marked, repeated experts reported."""
    batches = list(batches)
    if batches and not options.keep_warmup:
        batches[0], count = mark_warmup(batches[0], shape)
        if count:
            notes.append(f"{count} identical tokens at the start taken for warm-up and marked as dummies")
    repeated = sum(repeats(batch) for batch in batches)
    if repeated:
        notes.append(f"{repeated} of the recorded choices repeat an expert of the same token and layer")
    return from_batches(shape, batches, source=str(source), provenance=provenance(form, source, options, notes), facts={"dropped_rows": dropped})


def repeats(batch: TokenBatch) -> int:
    """Return how many choices repeat an earlier choice of the same token and layer."""
    if batch.experts_TLK.shape[2] == 1:
        return 0
    ids = batch.experts_TLK.astype(np.int32)
    if batch.valid_TLK is not None:
        ids = np.where(batch.valid_TLK, ids, -1 - np.arange(ids.shape[2], dtype=np.int32))
    ids.sort(axis=2)
    return int((np.diff(ids, axis=2) == 0).sum())


def mark_warmup(batch: TokenBatch, shape: TraceShape) -> tuple[TokenBatch, int]:
    """Return the batch with identical tokens at its start marked as dummies, and their number.

    A run of at least 4 tokens that choose the same experts in every layer, too long to be chance (64 bits), is a
    server's warm-up. First tokens of different prompts may be equal (a begin-of-text token) and are left alone.
    """
    same = (batch.experts_TLK == batch.experts_TLK[:1]).all(axis=(1, 2))
    run = len(same) if same.all() else int(np.argmin(same))
    bits = shape.num_layers * math.log2(math.comb(shape.num_experts, shape.top_k)) if shape.top_k < shape.num_experts else 0.0
    if run < 4 or (run - 1) * bits < 64:
        return batch, 0
    if (batch.phase_T[:run] == PREFILL).all() and (batch.position_T[:run] == 0).all() and len(np.unique(batch.request_T[:run])) == run:
        return batch, 0
    phase = batch.phase_T.copy()
    phase[:run] = DUMMY
    return replace(batch, phase_T=phase), run


def hashed(text: str) -> int:
    """Return the 64-bit id of a request that had a name."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def ids_from_signed(array: np.ndarray, experts: int | None, place: str, notes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids as int32, valid) of recorded expert ids of any integer width.

    A negative id is "no expert", except in int8, where 128..255 wrap to -128..-1: those are unwrapped. In 8 bits, 255 is
    the sentinel -1 unless the model has 256 experts; rows that repeat one id (unwritten buffers) have no routing.
    """
    if array.dtype.kind not in "iu":
        raise TraceError(describe(place, "dtype", str(array.dtype), "must be an integer type"))
    if array.size and array.dtype.itemsize >= 4 and (int(array.max()) >= 1 << 20 or int(array.min()) < -(1 << 20)):
        raise TraceError(describe(place, "expert id", [int(array.min()), int(array.max())], "must be below 2^20"))
    ids = array.astype(np.int32)
    if array.dtype == np.int8 and (ids < -1).any():
        notes.append("ids were stored as signed 8-bit: 128..255 unwrapped")
        ids = ids & 0xFF
        if experts is not None and experts <= 128:
            raise TraceError(
                describe(place, "expert id", int(ids.max()), f"must be < {experts}", "the ids are negative in 8 bits; this is another model or a damaged file")
            )
    elif array.dtype == np.int8 and experts is not None and experts > 255:
        ids = ids & 0xFF
    if array.dtype.itemsize == 1:
        sentinel = ids == 255
        if sentinel.any() and (experts is None or experts <= 255):
            if experts is None and (ids[~sentinel].max(initial=0) >= 128 or array.shape[2] == 1):
                raise TraceError(f"{place}: id 255 is either an expert or 'no expert', which 8 bits cannot tell; give --experts or --model")
            notes.append(f"{int(sentinel.sum())} ids of 255 taken for 'no expert'")
            ids[sentinel] = -1
    valid = ids >= 0
    if ids.shape[2] > 1:
        unwritten = (ids == ids[:, :, :1]).all(axis=2)
        if (unwritten & valid[:, :, 0]).any():
            notes.append(f"{int((unwritten & valid[:, :, 0]).sum())} token-layers repeat one id in all choices: taken for unwritten")
        valid &= ~unwritten[:, :, None]
    return np.where(valid, ids, 0), valid


# --- bounded reading --------------------------------------------------------------------------------


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a .csv or .csv.gz; raise TraceError on a bomb or on bytes that are not text."""
    if not path.is_file():
        raise TraceError(f"{path}: {'is a folder, not a file' if path.is_dir() else 'does not exist'}; check the path")
    packed = path.stat().st_size
    limit = min(MAX_CSV_BYTES, max(4 << 20, packed * GZIP_RATIO))
    seen = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(1 << 20):
                seen += len(line)
                if seen > limit:
                    raise TraceError(describe(str(path), "size", f"> {limit} B", "is too large", "split the file"))
                if len(line) == 1 << 20:
                    raise TraceError(describe(str(path), "line length", len(line), "is not a table's"))
                text = line.decode("utf-8").strip()
                if text:
                    yield text
    except (OSError, EOFError, UnicodeDecodeError, ValueError) as cause:
        raise TraceError(f"{path}: is not a readable CSV ({cause}); check the file") from None
    except zlib.error as cause:
        raise TraceError(f"{path}: is a damaged .gz ({cause}); copy it again") from None


def numeric_table(lines: Iterator[str], columns: int, place: str) -> np.ndarray:
    """Return float64 [rows, columns] of comma-separated numbers."""
    first = next(lines, None)
    if first is None:
        raise TraceError(f"{place}: has no rows")
    try:
        table = np.loadtxt(itertools.chain([first], lines), delimiter=",", dtype=np.float64, comments=None, ndmin=2)
    except ValueError as cause:
        raise TraceError(f"{place}: {str(cause).splitlines()[0][:160]}; every row must have {columns} numbers") from None
    if table.shape[1] != columns:
        raise TraceError(describe(place, "columns", table.shape[1], f"must be {columns} as in the header"))
    return table


def whole(values: np.ndarray, place: str, key: str, low: int, high: int) -> np.ndarray:
    """Return int64 of floats that must be whole numbers in low..high."""
    good = (values >= low) & (values <= high) & (values == np.rint(values))
    if not good.all():
        row = int(np.argwhere(~good)[0][0])
        raise TraceError(describe(place, f"row {row + 1}: {key}", values[~good].flat[0], f"must be a whole number in {low}..{high}"))
    return values.astype(np.int64)


def read_npy(path: Path) -> np.ndarray:
    """Read a .npy file whose header tells the truth about its size; never unpickles."""
    size = path.stat().st_size if path.is_file() else 0
    return parse_npy(read_bytes(path, limit=MAX_ARRAY_BYTES, error=TraceError) if size else read_bytes(path, error=TraceError), str(path))


def parse_npy(data: bytes, place: str) -> np.ndarray:
    """Return the array in the bytes of a .npy file."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file, max_header_size=10000)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, IndexError, KeyError) as cause:
        raise TraceError(f"{place}: is not a .npy array ({str(cause).splitlines()[0][:120] if str(cause) else type(cause).__name__}); check the file") from None
    if dtype.hasobject or dtype.kind not in "iuf":
        raise TraceError(describe(place, "dtype", str(dtype), "must be a plain number; pickled objects are never loaded"))
    count = math.prod(shape)
    if len(shape) > 4 or count * dtype.itemsize != len(data) - file.tell():
        raise TraceError(
            describe(place, "shape", list(shape), f"must describe the {len(data) - file.tell()} B that follow", "the file is truncated or damaged")
        )
    array = np.frombuffer(data, dtype=dtype, count=count, offset=file.tell())
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz within limits; never unpickles."""
    result = {}
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            total = sum(info.file_size for info in infos)
            if len(infos) > 100_000 or total > min(MAX_ARRAY_BYTES, max(64 << 20, path.stat().st_size * GZIP_RATIO)):
                raise TraceError(describe(str(path), "unpacked size", f"{total} B in {len(infos)} arrays", "is too large"))
            for info in infos:
                with archive.open(info) as member:
                    data = member.read(info.file_size + 1)
                if len(data) != info.file_size:
                    raise TraceError(describe(f"{path}[{info.filename}]", "size", len(data), f"must be {info.file_size} B"))
                result[info.filename.removesuffix(".npy")] = parse_npy(data, f"{path}[{info.filename}]")
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as cause:
        raise TraceError(f"{path}: is not a readable .npz ({cause}); check the file") from None
    except zlib.error as cause:
        raise TraceError(f"{path}: is a damaged .npz ({cause}); copy it again") from None
    return result
