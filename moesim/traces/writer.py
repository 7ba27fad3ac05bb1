"""Write a `moetrace/1` folder: streaming, crash-safe, and the same bytes for the same rows.

Shards are written under temporary names, fsynced and renamed; the manifest comes last, so that a crash leaves a folder
that readers refuse as unfinished. Rows keep their order of arrival.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.files import write_atomic
from moesim.traces import columns as parquet
from moesim.traces.archive import FILE_NAME, MANIFEST
from moesim.traces.layout import Spec
from moesim.traces.manifest import FACTS, MODEL_FACTS, TABLES, Columns, Manifest, Shard, counts_spec, token_spec
from moesim.traces.open import stored_path
from moesim.traces.routing_trace import RoutingTrace, TokenBatch, TraceShape, check_batch, check_counts, concatenate

SHARD_GROUPS = 16
"""Row groups per shard: about a million tokens."""


class TraceWriter:
    """Writes one trace; use as a context manager: leaving it normally writes the manifest, an exception does not."""

    def __init__(
        self,
        path: Path,
        shape: TraceShape,
        *,
        columns: Columns | None = None,
        provenance: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        shard_groups: int = SHARD_GROUPS,
    ) -> None:
        self.path, self.shape, self.columns = Path(path), shape, columns or Columns()
        self.provenance, self.facts = dict(provenance or {}), dict(facts or {})
        unknown = (set(self.facts) - {*FACTS, "model"}) | (set(self.facts.get("model", {})) - set(MODEL_FACTS))
        if unknown:
            raise TraceError(describe(str(path), "facts", sorted(unknown), f"must be among {[*FACTS, 'model']} and model facts {list(MODEL_FACTS)}"))
        self._spec = token_spec(shape, self.columns)
        self._group_rows = parquet.group_rows(self._spec)
        self._shard_rows = self._group_rows * shard_groups
        self._pending: list[TokenBatch] = []
        self._pending_rows = 0
        self._parquet: Any = None
        self._temporary: Path | None = None
        self._rows_in_shard = 0
        self._shards: list[Shard] = []
        self._tables: list[Shard] = []
        self._windows: tuple[str, ...] = ()
        self._num_rows = 0
        self.manifest: Manifest | None = None
        self._prepare()

    def _prepare(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(os.listdir(self.path))
            strangers = [name for name in names if name != MANIFEST and not FILE_NAME.match(name) and not name.endswith(".tmp")]
            if strangers:
                raise TraceError(f"{self.path}: holds {strangers[0]!r}, which is not part of a trace; give an empty or new folder")
            for name in [name for name in names if name == MANIFEST] + [name for name in names if name != MANIFEST]:
                (self.path / name).unlink()
        except OSError as cause:
            raise InputError(f"{self.path}: cannot be written ({cause.strerror or cause}); check the folder and its permissions") from None

    def append(self, batch: TokenBatch) -> None:
        """Add rows; raise TraceError if they do not have the shape and columns of this trace."""
        if not len(batch):
            return
        check_batch(batch, self.shape, str(self.path))
        for name, wanted in (("weights_TLK", self.columns.weights is not None), ("predicted_TLK", self.columns.predicted)):
            if wanted and getattr(batch, name) is None:
                raise TraceError(describe(str(self.path), name, None, "must be given: the trace was opened with this column"))
        if not self.columns.valid and batch.valid_TLK is not None and not batch.valid_TLK.all():
            raise TraceError(describe(str(self.path), "valid", "False entries", "need a trace opened with Columns(valid=True)"))
        self._pending.append(batch)
        self._pending_rows += len(batch)
        if self._pending_rows >= self._group_rows:
            self._flush(final=False)

    def _flush(self, *, final: bool) -> None:
        if not self._pending:
            return
        rows = concatenate(self._pending) if len(self._pending) > 1 else self._pending[0]
        start = 0
        while len(rows) - start >= self._group_rows or (final and start < len(rows)):
            self._write_group(rows.take(slice(start, start + self._group_rows)))
            start += self._group_rows
        left = rows.take(slice(start, None))
        self._pending, self._pending_rows = ([left], len(left)) if len(left) else ([], 0)

    def _write_group(self, batch: TokenBatch) -> None:
        rows = len(batch)
        values: dict[str, np.ndarray] = {
            "step": batch.step_T,
            "rank": batch.rank_T,
            "request": batch.request_T,
            "position": batch.position_T,
            "phase": batch.phase_T,
        }
        experts = batch.experts_TLK
        valid = batch.valid_TLK if self.columns.valid else None
        if self.columns.valid:
            if valid is None:
                valid = np.ones(experts.shape, dtype=bool)
            experts = np.where(valid, experts, experts.dtype.type(0))
            values["valid"] = np.packbits(valid.reshape(rows, -1), axis=1, bitorder="little")
        values["routes"] = _rows(experts, self.shape.dtype)
        if self.columns.weights:
            assert batch.weights_TLK is not None
            values["weights"] = _rows(batch.weights_TLK, np.dtype(self.columns.weights))
        if self.columns.predicted:
            assert batch.predicted_TLK is not None
            values["predicted"] = _rows(batch.predicted_TLK, self.shape.dtype)
        table = parquet.to_table(self._spec, values)
        try:
            if self._parquet is None:
                self._temporary = self.path / f"tokens-{len(self._shards):05d}.parquet.tmp"
                self._parquet = parquet.open_writer(self._temporary, self._spec)
            self._parquet.write_table(table, row_group_size=rows)
        except OSError as cause:
            raise InputError(f"{self.path}: cannot be written ({cause}); check the free space") from None
        self._rows_in_shard += rows
        self._num_rows += rows
        if self._rows_in_shard >= self._shard_rows:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._parquet is None:
            return
        assert self._temporary is not None
        try:
            self._parquet.close()
            self._parquet = None
            self._shards.append(_publish(self._temporary, self.path / self._temporary.name.removesuffix(".tmp"), self._rows_in_shard))
        except OSError as cause:
            raise InputError(f"{self.path}: cannot be written ({cause}); check the free space") from None
        self._rows_in_shard = 0

    def add_table(self, name: str, values: Mapping[str, np.ndarray]) -> None:
        """Write a side table, `steps` or `kernels`, whole; columns as in `moesim.traces.manifest`."""
        if name not in TABLES or any(shard.path == f"{name}.parquet" for shard in self._tables):
            raise TraceError(describe(str(self.path), "table", name, f"must be one of {list(TABLES)}, once"))
        if set(values) != set(TABLES[name]) or len({len(column) for column in values.values()}) != 1:
            raise TraceError(describe(f"{self.path}: table {name}", "columns", sorted(values), f"must be {list(TABLES[name])} of equal length"))
        self._write_table(name, TABLES[name], values)

    def add_counts(self, counts_WLE: np.ndarray, names: Sequence[str]) -> None:
        """Write the counts that make this a counts trace: int64 [W, L, E] and a name per window."""
        if self._num_rows or self._pending or self._windows:
            raise TraceError(f"{self.path}: a trace holds tokens or counts, not both, and counts once")
        table = np.ascontiguousarray(counts_WLE, dtype="<i8")
        check_counts(table, self.shape, len(names), str(self.path))
        window, layer = np.divmod(np.arange(table.shape[0] * table.shape[1]), table.shape[1])
        self._write_table("counts", counts_spec(self.shape), {"window": window, "layer": layer, "counts": table.reshape(len(window), -1)})
        self._windows = tuple(names)
        self._num_rows = len(names)

    def _write_table(self, name: str, spec: Spec, values: Mapping[str, np.ndarray]) -> None:
        temporary = self.path / f"{name}.parquet.tmp"
        try:
            parquet.write_table(temporary, spec, values)
            self._tables.append(_publish(temporary, self.path / f"{name}.parquet", len(next(iter(values.values())))))
        except OSError as cause:
            raise InputError(f"{self.path}: cannot be written ({cause}); check the free space") from None

    def checkpoint(self) -> None:
        """Make what was appended so far readable: end the shard and write a manifest, marked unfinished, over it; rows may follow."""
        self._end(unfinished=True)

    def close(self) -> Manifest:
        """Write what is pending and then the manifest; return it."""
        self.manifest = self._end(unfinished=False)
        return self.manifest

    def _end(self, *, unfinished: bool) -> Manifest:
        self._flush(final=True)
        self._finish_shard()
        manifest = Manifest(
            kind="counts" if self._windows else "tokens",
            shape=self.shape,
            columns=self.columns,
            windows=self._windows,
            num_rows=self._num_rows,
            provenance={**self.provenance, "unfinished": True} if unfinished else self.provenance,
            shards=(*self._shards, *self._tables),
            facts=self.facts,
        )
        write_atomic(self.path / MANIFEST, manifest.to_json())
        return manifest

    def abort(self) -> None:
        """Leave the folder without a manifest."""
        if self._parquet is not None:
            with contextlib.suppress(OSError):
                self._parquet.close()
            self._parquet = None
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _rows(cube: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    return np.ascontiguousarray(cube.reshape(len(cube), -1), dtype=dtype)


def _publish(temporary: Path, final: Path, rows: int) -> Shard:
    """Fsync and rename a finished file; return its manifest entry."""
    with temporary.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = os.fstat(file.fileno()).st_size
        os.fsync(file.fileno())
    os.replace(temporary, final)
    return Shard(path=final.name, rows=rows, bytes=size, sha256=digest)


def write_trace(trace: RoutingTrace, path: Path) -> Manifest:
    """Write any trace to the folder `path`, replacing a trace that is there; optional columns are kept."""
    provenance = dict(trace.provenance)
    if trace.synthetic is not None:
        provenance["synthetic"] = trace.synthetic
    source = stored_path(trace)
    if source.exists() and Path(path).exists() and source.samefile(path):
        raise TraceError(f"{path}: is the trace that is being read; give another folder")
    if trace.kind == "counts":
        assert trace.counts is not None
        with TraceWriter(path, trace.shape, provenance=provenance, facts=trace.facts) as writer:
            writer.add_counts(trace.counts(), trace.stored_windows)
    else:
        columns = _columns_of(trace)
        with TraceWriter(path, trace.shape, columns=columns, provenance=provenance, facts=trace.facts) as writer:
            for batch in trace.batches():
                writer.append(batch)
            for name in TABLES if trace.tables is not None else ():
                values = trace.tables(name)  # type: ignore[misc]
                if values is not None:
                    writer.add_table(name, values)
    assert writer.manifest is not None and writer.manifest.num_rows == trace.num_rows
    return writer.manifest


def _columns_of(trace: RoutingTrace) -> Columns:
    """Find which optional columns all batches can fill; a `valid` column exists if any choice is missing."""
    known: Columns | None = getattr(trace.tokens, "columns", None)
    if known is not None:
        return known
    weights: str | None = None
    predicted, valid, first = True, False, True
    for batch in trace.batches():
        if first:
            weights = None if batch.weights_TLK is None else batch.weights_TLK.dtype.name
            weights = "float32" if weights == "float64" else weights
            first = False
        elif batch.weights_TLK is None:
            weights = None
        predicted = predicted and batch.predicted_TLK is not None
        valid = valid or (batch.valid_TLK is not None and not batch.valid_TLK.all())
    return Columns(weights=weights, predicted=predicted and not first, valid=valid)
