"""Read a `moetrace/1` folder or stored .zip, trusting nothing that has not been checked.

Opening reads the manifest and the footers; a shard's size and SHA-256 are checked before its first row is decoded
(once per opened trace), its page checksums on every read. Memory holds one row group at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.archive import MANIFEST, Archive, FolderArchive, ZipArchive
from moesim.traces.columns import TableReader
from moesim.traces.layout import Spec
from moesim.traces.manifest import TABLES, Manifest, Shard, counts_spec, parse_manifest, token_spec
from moesim.traces.routing_trace import GroupInfo, RoutingTrace, TokenBatch, check_batch, check_counts

MAX_MANIFEST_BYTES = 32 << 20
MAX_TABLE_ROWS = 1 << 24
"""Of a side table, which is decoded whole."""


def open_stored(path: Path) -> RoutingTrace:
    """Open a stored trace; raise TraceError if its manifest or a footer breaks a rule."""
    archive: Archive = FolderArchive(path) if path.is_dir() else ZipArchive(path)
    with archive.open(MANIFEST) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise TraceError(describe(f"{archive.place}/{MANIFEST}", "size", f"> {MAX_MANIFEST_BYTES} B", "is too large for a manifest"))
    manifest = parse_manifest(text, archive.place)
    if manifest.provenance.get("unfinished") and not manifest.num_rows:
        raise TraceError(
            f"{archive.place}: the recording was cut off, or is still going on, before its first checkpoint; save what there is by `moesim trace repair`"
        )
    store = _Store(archive, manifest)
    for shard in manifest.shards:
        store.check_size(shard)
    common: dict[str, Any] = {
        "shape": manifest.shape,
        "kind": manifest.kind,
        "num_rows": manifest.num_rows,
        "provenance": manifest.provenance,
        "facts": manifest.facts,
        "fingerprint": manifest.fingerprint,
        "source": archive.place,
        "tables": store.table,
    }
    synthetic = manifest.provenance.get("synthetic")
    if isinstance(synthetic, str):
        common |= {"is_synthetic": True, "synthetic": synthetic}
    if manifest.kind == "counts":
        return RoutingTrace(**common, counts=store.counts, stored_windows=manifest.windows)
    return RoutingTrace(**common, tokens=StoredTokens(store))


class _Store:
    """The shards of one opened trace."""

    def __init__(self, archive: Archive, manifest: Manifest) -> None:
        self.archive, self.manifest = archive, manifest
        self._verified: set[str] = set()
        self._counts: np.ndarray | None = None

    def place(self, shard: Shard) -> str:
        return f"{self.archive.place}/{shard.path}"

    def check_size(self, shard: Shard) -> None:
        size = self.archive.size(shard.path)
        if size != shard.bytes:
            raise TraceError(
                describe(
                    self.place(shard),
                    "size",
                    f"{size} B",
                    f"must be {shard.bytes} B as in the manifest",
                    "the shard is truncated or was replaced; copy or record it again",
                )
            )

    def open(self, shard: Shard) -> BinaryIO:
        """Return a handle on a shard whose content has been verified through this trace."""
        file = self.archive.open(shard.path)
        if shard.path in self._verified:
            return file
        try:
            digest, left = hashlib.sha256(), shard.bytes
            while left and (part := file.read(min(1 << 20, left))):
                digest.update(part)
                left -= len(part)
            if left or file.read(1):
                raise TraceError(describe(self.place(shard), "size", "another", f"must be {shard.bytes} B as in the manifest", "copy or record it again"))
            if digest.hexdigest() != shard.sha256:
                raise TraceError(
                    describe(
                        self.place(shard),
                        "sha256",
                        digest.hexdigest(),
                        f"must be {shard.sha256} as in the manifest",
                        "the shard is damaged; copy or record it again",
                    )
                )
        except OSError as cause:
            file.close()
            raise TraceError(f"{self.place(shard)}: cannot be read ({cause.strerror or cause}); check the disk") from None
        except TraceError:
            file.close()
            raise
        self._verified.add(shard.path)
        file.seek(0)
        return file

    def reader(self, shard: Shard, spec: Spec) -> TableReader:
        file = self.open(shard)
        try:
            return TableReader(file, spec, rows=shard.rows, place=self.place(shard))
        except TraceError:
            file.close()
            raise

    def whole(self, shard: Shard, spec: Spec) -> dict[str, np.ndarray]:
        """Decode all row groups of a side table."""
        table = self.reader(shard, spec)
        with table.file:
            parts = [table.read(group) for group in range(len(table.groups))]
        empty = {name: np.empty((0, kind) if isinstance(kind, int) else 0, np.uint8 if isinstance(kind, int) else kind) for name, kind in spec.items()}
        return {name: np.concatenate([part[name] for part in parts]) if parts else empty[name] for name in spec}

    def table(self, name: str) -> Mapping[str, np.ndarray] | None:
        """Return a side table (`steps` or `kernels`), or None if the trace has none."""
        if name not in TABLES:
            raise TraceError(describe(self.archive.place, "table", name, f"must be one of {list(TABLES)}"))
        shard = next((s for s in self.manifest.shards if s.path == f"{name}.parquet"), None)
        if shard is not None and shard.rows > MAX_TABLE_ROWS:
            raise TraceError(describe(self.place(shard), "rows", shard.rows, f"must be <= {MAX_TABLE_ROWS}", "record fewer steps"))
        return None if shard is None else self.whole(shard, TABLES[name])

    def counts(self) -> np.ndarray:
        """Return int64 [W, L, E]."""
        if self._counts is None:
            shard = next(s for s in self.manifest.shards if s.path == "counts.parquet")
            shape, windows = self.manifest.shape, len(self.manifest.windows)
            if shard.rows * shape.num_experts > 1 << 24:
                raise TraceError(describe(self.place(shard), "cells", shard.rows * shape.num_experts, f"must be <= {1 << 24}", "merge windows"))
            columns = self.whole(shard, counts_spec(shape))
            window, layer = np.divmod(np.arange(shard.rows), shape.num_layers)
            if (columns["window"] != window).any() or (columns["layer"] != layer).any():
                raise TraceError(f"{self.place(shard)}: rows must be sorted by window and layer row, one each; record it again")
            table = columns["counts"].reshape(-1).view("<i8").reshape(windows, shape.num_layers, shape.num_experts)
            check_counts(table, shape, windows, self.place(shard))
            table.setflags(write=False)
            self._counts = table
        return self._counts


class StoredTokens:
    """The token shards of a stored trace."""

    def __init__(self, store: _Store) -> None:
        self._store = store
        manifest = store.manifest
        self.columns = manifest.columns
        self._spec = token_spec(manifest.shape, manifest.columns)
        self._shards = [shard for shard in manifest.shards if shard.path.startswith("tokens")]
        self._groups: list[GroupInfo] | None = None
        self._where: list[tuple[Shard, int]] = []
        self._open: tuple[str, TableReader] | None = None

    @property
    def groups(self) -> Sequence[GroupInfo]:
        """Row groups in order of arrival; verifies every shard the first time."""
        if self._groups is None:
            groups, where = [], []
            for shard in self._shards:
                reader = self._reader(shard)
                for index, group in enumerate(reader.groups):
                    low, high = group.chunks[0].low, group.chunks[0].high
                    if low is None or high is None:
                        steps = reader.read(index, ["step"])["step"]
                        low, high = int(steps.min()), int(steps.max())
                    groups.append(GroupInfo(rows=group.rows, step_min=low, step_max=high))
                    where.append((shard, index))
            self._groups, self._where = groups, where
        return self._groups

    def _reader(self, shard: Shard) -> TableReader:
        if self._open is None or self._open[0] != shard.path:
            self.close()
            self._open = shard.path, self._store.reader(shard, self._spec)
        return self._open[1]

    def close(self) -> None:
        """Close the shard that is open, if any."""
        if self._open is not None:
            self._open[1].file.close()
            self._open = None

    def __del__(self) -> None:
        self.close()

    def read(self, index: int) -> TokenBatch:
        """Decode one row group and check that its ids are in range."""
        info = self.groups[index]
        shard, group = self._where[index]
        reader = self._reader(shard)
        columns = reader.read(group)
        shape = self._store.manifest.shape
        place = f"{self._store.place(shard)}: row group {group}"
        weights = self._store.manifest.columns.weights
        cube = (info.rows, shape.num_layers, shape.top_k)
        valid = None
        if "valid" in columns:
            valid = np.unpackbits(columns["valid"], axis=1, count=cube[1] * cube[2], bitorder="little").view(bool).reshape(cube)
        batch = TokenBatch(
            step_T=columns["step"],
            rank_T=columns["rank"],
            request_T=columns["request"],
            position_T=columns["position"],
            phase_T=columns["phase"],
            experts_TLK=columns["routes"].reshape(-1).view(shape.dtype).reshape(cube),
            weights_TLK=columns["weights"].reshape(-1).view(f"<f{np.dtype(weights).itemsize}").reshape(cube) if weights else None,
            predicted_TLK=columns["predicted"].reshape(-1).view(shape.dtype).reshape(cube) if "predicted" in columns else None,
            valid_TLK=valid,
        )
        check_batch(batch, shape, place)
        if int(batch.step_T.min()) != info.step_min or int(batch.step_T.max()) != info.step_max:
            raise TraceError(describe(place, "steps", [info.step_min, info.step_max], "claimed by the footer are not those of the rows", "record it again"))
        return batch
