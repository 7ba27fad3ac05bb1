"""Measured tables of a device: Parquet in SI units, read by column.

A folder of `<stem>.parquet` files written by `moesim.hardware.convert_tables`. Numbers come back as int64 or float64 arrays, text as arrays of
`str`; arrays are read-only and shared between callers. `where` keeps the rows whose columns equal the given values, and is applied before the
other columns are decoded to objects. Row order is that of the file.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import HardwareError, describe
from moesim.hardware.cluster import Cluster

MAX_TABLE_BYTES = 512 * 2**20
MAX_ROWS = 20_000_000
_STEM = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def table_names(source: Cluster | Path | str) -> tuple[str, ...]:
    """Return the stems of the tables in a folder, or of a cluster's device (empty if it has none), sorted."""
    folder = _folder(source, required=False)
    return () if folder is None else tuple(sorted(path.stem for path in folder.glob("*.parquet")))


def read_table(
    source: Cluster | Path | str, stem: str, columns: Sequence[str] | None = None, *, where: Mapping[str, str | int | float] | None = None
) -> dict[str, np.ndarray]:
    """Return columns (default: all) of one table as read-only arrays of equal length.

    where: column → value; only rows equal in every named column are kept.
    Raises HardwareError if the cluster has no tables, or the table or a column is missing or damaged.
    """
    path, stamp = _path(source, stem)
    known = _columns(path, stamp)
    wanted = tuple(known if columns is None else columns)
    for name in (*wanted, *(where or {})):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
            raise HardwareError(f"{path}: has no column {name!r}; {hint}")
    if not where:
        return {name: _decoded(path, stamp, name) for name in wanted}
    rows = np.flatnonzero(np.logical_and.reduce([_equal(path, stamp, name, value) for name, value in where.items()]))
    result = {}
    for name in wanted:
        names, values = _column(path, stamp, name)
        result[name] = values[rows] if names is None else names[values[rows]]
        result[name].setflags(write=False)
    return result


def table_metadata(source: Cluster | Path | str, stem: str) -> dict[str, Any]:
    """Return what the table says about itself: kind, description, source, version, licence, units (a dict), num_rows, columns."""
    path, stamp = _path(source, stem)
    file = _open(path, stamp)
    raw = {key.decode(): value.decode("utf-8", "replace") for key, value in (file.schema_arrow.metadata or {}).items() if not key.startswith(b"ARROW:")}
    try:
        units = json.loads(raw.pop("units", "{}"))
    except ValueError:
        units = {}
    return {**raw, "units": units, "num_rows": file.metadata.num_rows, "columns": list(_columns(path, stamp))}


def _folder(source: Cluster | Path | str, *, required: bool = True) -> Path | None:
    if isinstance(source, Cluster):
        if source.tables is None and required:
            raise HardwareError(f"{source.name}: has no measured tables (key `tables`); use a device that has, like h100-sxm, or transfer from one")
        return source.tables
    folder = Path(source)
    if not folder.is_dir():
        raise HardwareError(f"{folder}: is not a folder of Parquet tables; check the path")
    return folder


def _path(source: Cluster | Path | str, stem: str) -> tuple[Path, tuple[int, int]]:
    folder = _folder(source)
    assert folder is not None
    if not stem or not set(stem) <= _STEM or stem.startswith("."):
        raise HardwareError(describe(str(folder), "table", stem, "must be a plain file stem"))
    path = folder / f"{stem}.parquet"
    try:
        status = path.stat()
    except OSError:
        near = difflib.get_close_matches(stem, table_names(folder), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(table_names(folder)) or 'none'}"
        raise HardwareError(f"{folder}: has no table {stem!r}; {hint}") from None
    if status.st_size > MAX_TABLE_BYTES:
        raise HardwareError(describe(str(path), "size", f"{status.st_size} B", f"must be <= {MAX_TABLE_BYTES} B"))
    return path, (status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=64)
def _open(path: Path, stamp: tuple[int, int]) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # In memory: the whole file is small, and a cached handle must not pin a file descriptor.
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as cause:
        raise HardwareError(f"{path}: is not a Parquet table ({' '.join(str(cause).split())}); convert it again") from None
    if file.metadata.num_rows > MAX_ROWS:
        raise HardwareError(describe(str(path), "rows", file.metadata.num_rows, f"must be <= {MAX_ROWS}"))
    return file


@lru_cache(maxsize=64)
def _columns(path: Path, stamp: tuple[int, int]) -> tuple[str, ...]:
    return tuple(_open(path, stamp).schema_arrow.names)


def _numbers(array: Any) -> np.ndarray:
    """Return the values of an Arrow array without nulls from its buffer: `to_numpy` would import pandas."""
    kind = {"double": "float64", "float": "float32", "halffloat": "float16"}.get(str(array.type), str(array.type))
    if kind not in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64"):
        return np.array(array.to_pylist(), dtype=object)
    return np.frombuffer(array.buffers()[1], dtype=kind, count=len(array) + array.offset)[array.offset :]


@lru_cache(maxsize=512)
def _column(path: Path, stamp: tuple[int, int], name: str) -> tuple[np.ndarray | None, np.ndarray]:
    """Return (names, codes) of a text column, or (None, values) of a numeric one."""
    import pyarrow as pa

    try:
        column = _open(path, stamp).read([name], use_threads=False).column(0)
        if column.null_count:
            raise HardwareError(describe(str(path), name, f"{column.null_count} empty cells", "must have a value in every row"))
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.dictionary_encode()
        if pa.types.is_dictionary(column.type):
            chunk = column.unify_dictionaries().combine_chunks()
            chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
            names, values = np.array([*chunk.dictionary.to_pylist(), None], dtype=object)[:-1], _numbers(chunk.indices)
            names.setflags(write=False)
            return names, values
        chunk = column.combine_chunks()
        values = _numbers(chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk)
    except (pa.ArrowException, OSError) as cause:
        raise HardwareError(f"{path}: column {name!r} is damaged ({' '.join(str(cause).split())}); convert the table again") from None
    if values.dtype.kind not in "iuf":
        raise HardwareError(describe(str(path), name, str(values.dtype), "must hold numbers or text"))
    values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    values.setflags(write=False)
    return None, values


@lru_cache(maxsize=512)
def _decoded(path: Path, stamp: tuple[int, int], name: str) -> np.ndarray:
    names, values = _column(path, stamp, name)
    if names is None:
        return values
    text: np.ndarray = names[values]
    text.setflags(write=False)
    return text


def _equal(path: Path, stamp: tuple[int, int], name: str, value: str | int | float) -> np.ndarray:
    names, values = _column(path, stamp, name)
    if names is None:
        if isinstance(value, str):
            raise HardwareError(describe(str(path), name, value, "must be a number: the column holds numbers"))
        return np.asarray(values == value)
    return np.asarray(values == next((code for code, text in enumerate(names) if text == value), -1))
