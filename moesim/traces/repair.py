"""What can be saved of a recording that was cut off: the shards that are complete, copied to a new trace.

A recorder publishes every shard whole, and names it in the manifest a moment later; a shard between the two is complete and not yet named. Shards count up to
the first that fails its checks. Of rows behind the last manifest nobody says whether their last step is whole, so that step is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import TraceError
from moesim.files import read_bytes
from moesim.traces.archive import MANIFEST, FolderArchive
from moesim.traces.columns import TableReader
from moesim.traces.manifest import TABLES, Manifest, Shard, parse_manifest, token_spec
from moesim.traces.reader import MAX_MANIFEST_BYTES, StoredTokens, _Store
from moesim.traces.writer import TraceWriter


def repair(folder: Path, target: Path) -> Manifest:
    """Copy what is complete of the trace in `folder` to `target`, marked as unfinished, and return the manifest of that.

    Raises TraceError if the trace is finished and whole, or nothing of it is complete.
    """
    archive = FolderArchive(folder)
    if not (folder / MANIFEST).exists():
        raise TraceError(f"{folder / MANIFEST}: does not exist, so nothing says what the shards hold; record or import the trace again")
    told = parse_manifest(read_bytes(folder / MANIFEST, limit=MAX_MANIFEST_BYTES, error=TraceError), archive.place)
    if told.kind != "tokens":
        raise TraceError(f"{folder}: is a trace of counts, which is written at once; import it again")
    if target.exists() and target.samefile(folder):
        raise TraceError(f"{target}: is the trace that is being read; give another folder")
    named = [shard for shard in told.shards if shard.path.startswith("tokens")]
    whole = [shard for shard in named if _is_whole(archive, told, shard)]
    if whole != named:
        whole = whole[: next(index for index, shard in enumerate(named) if shard not in whole)]
    extra = list(_unnamed(folder, archive, told, len(named))) if whole == named else []
    tables = [shard for shard in told.shards if shard.path.removesuffix(".parquet") in TABLES]
    sound = [shard for shard in tables if _is_whole(archive, told, shard)]
    if not told.provenance.get("unfinished") and whole == named and sound == tables:
        raise TraceError(f"{folder}: is finished and whole; there is nothing to repair")
    cut = bool(extra) or whole != named
    shards = (*whole, *extra)
    if not shards:
        raise TraceError(f"{folder}: holds no complete shard, so nothing can be saved; record it again, with checkpoints closer together")
    rows = sum(shard.rows for shard in shards)
    store = _Store(archive, replace(told, shards=(*shards, *sound), num_rows=rows))
    tokens = StoredTokens(store)
    last = max(group.step_max for group in tokens.groups)
    kept = 0
    with TraceWriter(target, told.shape, columns=told.columns, facts=told.facts) as writer:
        for index in range(len(tokens.groups)):
            batch = tokens.read(index)
            part = batch.take(np.flatnonzero(batch.step_T < last)) if cut else batch
            writer.append(part)
            kept += len(part)
        if not kept:
            raise TraceError(f"{folder}: holds no step that is surely complete, so nothing can be saved; record it again")
        for shard in sound:
            name = shard.path.removesuffix(".parquet")
            table = store.table(name)
            assert table is not None
            keep = table["step"] < last if cut else np.ones(len(table["step"]), bool)
            writer.add_table(name, {key: values[keep] for key, values in table.items()})
        saved = {"rows": kept, "rows_left_out": rows - kept, "shards_unnamed": len(extra), "shards_left_out": len(named) - len(whole)}
        writer.provenance = {**told.provenance, "unfinished": True, "repaired": saved}
    tokens.close()
    assert writer.manifest is not None
    return writer.manifest


def _is_whole(archive: FolderArchive, told: Manifest, shard: Shard) -> bool:
    """Say whether a shard has the bytes and the hash that the manifest names."""
    try:
        store = _Store(archive, told)
        store.check_size(shard)
        store.open(shard).close()
    except TraceError:
        return False
    return True


def _unnamed(folder: Path, archive: FolderArchive, told: Manifest, first: int) -> Iterator[Shard]:
    """Yield the complete shards behind those that the manifest names."""
    import pyarrow.parquet as pq

    while (path := folder / f"tokens-{first:05d}.parquet").is_file():
        try:
            data = path.stat().st_size
            with path.open("rb") as raw:
                digest = hashlib.file_digest(raw, "sha256").hexdigest()
            rows = int(pq.read_metadata(path).num_rows)
            shard = Shard(path=path.name, rows=rows, bytes=data, sha256=digest)
            with archive.open(path.name) as file:
                reader = TableReader(file, token_spec(told.shape, told.columns), rows=rows, place=str(path))
                for group in range(len(reader.groups)):
                    reader.read(group)
        except (TraceError, OSError, ValueError):
            return
        yield shard
        first += 1
