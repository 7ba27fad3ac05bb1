"""Check a Parquet file's footer and page headers before a decoder sees them.

A decoder trusts the footer: an unknown codec aborts the process, and sizes in it do not bound what decoding produces. Here the
footer must describe exactly the columns of a table (required, fixed width, zstd), every page must carry a checksum,
and the pages of a column may not decode to more than its rows can need.
Source: apache/parquet-format, parquet.thrift (FileMetaData, PageHeader).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from moesim.traces.thrift import CompactReader, ThriftError

Spec = Mapping[str, "np.dtype[Any] | int"]
"""Column → NumPy dtype, or the bytes of a FixedSizeBinary."""
MAX_FOOTER_BYTES = 64 << 20
MAX_GROUP_ROWS = 1 << 20
MAX_GROUP_BYTES = 192 << 20
"""A reader refuses a row group that decodes to more."""
_WINDOW = 1 << 16
_CONVERTED = {"uint8": 11, "uint16": 12, "uint32": 13, "uint64": 14, "int64": 18}
_ENCODINGS = {0, 2, 3, 4, 8}
"""PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY."""
_CODECS = {6}
"""ZSTD."""


class BadLayout(Exception):
    """The file breaks a rule; the message completes a sentence that begins with its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One column of one row group."""

    start: int
    length: int
    low: int | None
    """Smallest value that the footer claims; None if it claims none."""
    high: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One row group: its rows and a chunk per column."""

    rows: int
    chunks: tuple[Chunk, ...]


def width_of(kind: np.dtype[Any] | int) -> int:
    """Return the bytes of one value."""
    return kind if isinstance(kind, int) else kind.itemsize


def read_footer(file: BinaryIO, spec: Spec, *, rows: int) -> list[Group]:
    """Return the row groups of a Parquet file that must hold `rows` rows of the table `spec`, or raise BadLayout."""
    size = file.seek(0, os.SEEK_END)
    if size < 12:
        raise BadLayout("is too short for a Parquet file")
    file.seek(0)
    head = file.read(4)
    file.seek(size - 8)
    length, magic = struct.unpack("<I4s", file.read(8))
    if head != b"PAR1" or magic != b"PAR1":
        raise BadLayout("does not begin and end like a Parquet file")
    if length > min(size - 12, MAX_FOOTER_BYTES):
        raise BadLayout(f"claims a footer of {length} B")
    file.seek(size - 8 - length)
    try:
        footer = CompactReader(file.read(length)).struct()
        return _groups(footer, spec, rows, size - 8 - length)
    except ThriftError as cause:
        raise BadLayout(str(cause)) from None
    except (KeyError, TypeError, AttributeError, IndexError, struct.error):
        raise BadLayout("has a footer that lacks a field") from None


def _groups(footer: dict[int, Any], spec: Spec, rows: int, end: int) -> list[Group]:
    if not set(footer) <= {1, 2, 3, 4, 5, 6, 7}:
        raise BadLayout("has a footer with unknown fields")
    _check_schema(footer[2], spec)
    if footer[3] != rows:
        raise BadLayout(f"holds {footer[3]} rows instead of the {rows} in the manifest")
    row_bytes = sum(width_of(kind) for kind in spec.values())
    most = min(MAX_GROUP_ROWS, MAX_GROUP_BYTES // row_bytes)
    groups = []
    for node in footer[4]:
        count = node[3]
        if not isinstance(count, int) or not 0 < count <= most:
            raise BadLayout(f"has a row group of {count} rows; it must have 1..{most}")
        if len(node[1]) != len(spec):
            raise BadLayout(f"has {len(node[1])} columns in a row group instead of {len(spec)}")
        groups.append(Group(rows=count, chunks=tuple(_chunk(chunk, name, kind, count, end) for chunk, (name, kind) in zip(node[1], spec.items(), strict=True))))
    if sum(group.rows for group in groups) != rows:
        raise BadLayout(f"has row groups that do not add up to {rows} rows")
    return groups


def _check_schema(elements: list[dict[int, Any]], spec: Spec) -> None:
    names = [element[4].decode("utf-8", "replace") for element in elements[1:]]
    if names != list(spec) or elements[0].get(5) != len(spec):
        raise BadLayout(f"has the columns {names[:12]} instead of {list(spec)}")
    for element, (name, kind) in zip(elements[1:], spec.items(), strict=True):
        fits = set(element) <= {1, 2, 3, 4, 6, 10} and element.get(3) == 0
        if isinstance(kind, int):
            fits = fits and element[1] == 7 and element[2] == kind and not {6, 10} & set(element)
        else:
            fits = fits and element[1] == (2 if kind.itemsize == 8 else 1) and 2 not in element
            signed = kind.kind == "i"
            plain = signed and not {6, 10} & set(element)
            logical = {10: {1: kind.itemsize * 8, 2: signed}}
            fits = fits and (plain or (element.get(6) == _CONVERTED[kind.name] and element.get(10, logical) == logical))
        if not fits:
            raise BadLayout(f"must hold {name} as a required column of {'binary' if isinstance(kind, int) else kind.name} values of {width_of(kind)} B")


def _chunk(node: dict[int, Any], name: str, kind: np.dtype[Any] | int, rows: int, end: int) -> Chunk:
    meta = node[3]
    if not set(node) <= {2, 3} or not set(meta) <= {1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 16}:
        raise BadLayout(f"has unknown fields in column {name}")
    physical = 7 if isinstance(kind, int) else 2 if kind.itemsize == 8 else 1
    if meta[1] != physical or not set(meta[2]) <= _ENCODINGS or meta[4] not in _CODECS or meta[5] != rows or meta[3] != [name.encode()]:
        raise BadLayout(f"must hold column {name} as {rows} values in zstd pages")
    if any(set(entry) != {1, 2, 3} or entry[1] not in (0, 2, 3) or entry[2] not in _ENCODINGS or not 0 <= entry[3] <= rows + 1 for entry in meta.get(13, [])):
        raise BadLayout(f"has unknown pages in column {name}")
    start = min(meta[9], meta.get(11, meta[9]))
    length = meta[7]
    limit = _limit(rows, kind)
    if start < 4 or length < 0 or start + length > end or not 0 <= meta[6] <= limit or meta[9] < start or meta[9] >= start + max(1, length):
        raise BadLayout(f"has column {name} outside of its pages")
    low = high = None
    statistics = meta.get(12, {})
    if not set(statistics) <= {1, 2, 3, 4, 5, 6, 7, 8} or statistics.get(3, 0) != 0 or len(statistics.get(5, b"")) != len(statistics.get(6, b"")):
        raise BadLayout(f"has wrong statistics in column {name}")
    if 5 in statistics and not isinstance(kind, int):
        low, high = (_number(statistics[field], kind) for field in (6, 5))
    return Chunk(start=start, length=length, low=low, high=high)


def _number(data: bytes, kind: np.dtype[Any]) -> int:
    if len(data) != max(4, kind.itemsize):
        raise BadLayout("has statistics of a wrong width")
    return int.from_bytes(data, "little", signed=kind.kind == "i")


def _limit(rows: int, kind: np.dtype[Any] | int) -> int:
    # dictionary columns decode through 4-byte indices; pages and headers need room of their own
    return 2 * rows * max(width_of(kind), 4) + (64 << 10)


def check_pages(file: BinaryIO, chunk: Chunk, kind: np.dtype[Any] | int, *, rows: int) -> None:
    """Raise BadLayout unless the pages of a chunk hold `rows` values, are checksummed, and decode to a bounded size."""
    at, end, values, plain = chunk.start, chunk.start + chunk.length, 0, 0
    limit = _limit(rows, kind)
    while at < end:
        file.seek(at)
        reader = CompactReader(file.read(min(_WINDOW, end - at)))
        try:
            header = reader.struct()
            page = header.get(1)
            inner = header[{0: 5, 2: 7, 3: 8}[page]]  # type: ignore[index]
            uncompressed, compressed, count = header[2], header[3], inner[1]
            good = uncompressed >= 0 and compressed >= 0 and 0 <= count <= rows and (page != 0 or inner[2] in _ENCODINGS)
        except (KeyError, TypeError, IndexError, AttributeError):
            raise BadLayout("holds a page of an unknown kind") from None
        except ThriftError as cause:
            raise BadLayout(str(cause)) from None
        if not good or (page == 0 and not (inner.get(3) in (3, 4) and inner.get(4) in (3, 4))):
            raise BadLayout("holds a page header with impossible values")
        if 4 not in header:
            raise BadLayout("holds a page without a checksum")
        plain += uncompressed
        values += count if page != 2 else 0
        if plain > limit:
            raise BadLayout(f"decodes to more than {limit} B")
        at += reader.at + compressed
    if at != end or values != rows:
        raise BadLayout(f"holds {values} values instead of {rows}")
