"""Walk the page headers of a Parquet column chunk before anything is decoded.

The footer's sizes do not bound what decoding produces, and a page may claim any size; here every page must state
a checksum, and the pages together may not exceed what the rows can need. Parquet page headers are Thrift structs in
the compact protocol. Source: apache/parquet-format, parquet.thrift (PageHeader) and the Thrift compact protocol.
"""

from __future__ import annotations

from typing import BinaryIO

_WINDOW = 1 << 16


class BadPage(Exception):
    """The page headers break a rule; the message completes a sentence."""


class _Compact:
    """A reader of the Thrift compact protocol over a byte string."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise BadPage("ends inside a page header")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value, shift = 0, 0
        while True:
            part = self.byte()
            value |= (part & 0x7F) << shift
            if part < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise BadPage("holds an endless number in a page header")

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def skip(self, kind: int, depth: int = 0) -> None:
        if depth > 8:
            raise BadPage("nests a page header too deep")
        if kind in (1, 2):
            return
        if kind == 3:
            self.byte()
        elif kind in (4, 5, 6):
            self.varint()
        elif kind == 7:
            self.advance(8)
        elif kind == 8:
            self.advance(self.varint())
        elif kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 != 15 else self.varint()
            for _ in range(min(count, _WINDOW)):
                self.byte() if head & 15 in (1, 2) else self.skip(head & 15, depth + 1)
        elif kind == 12:
            self.struct(depth + 1)
        else:
            raise BadPage("holds an unknown type in a page header")

    def advance(self, count: int) -> None:
        if count > len(self.data) - self.at:
            raise BadPage("ends inside a page header")
        self.at += count

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Return the integer fields of a struct; nested structs appear as field · 100 + inner field."""
        fields: dict[int, int] = {}
        field = 0
        while True:
            head = self.byte()
            if head == 0:
                return fields
            field = field + (head >> 4) if head >> 4 else self.zigzag()
            kind = head & 15
            if kind in (4, 5, 6):
                fields[field] = self.zigzag()
            elif kind == 12 and depth == 0:
                fields.update({field * 100 + inner: value for inner, value in self.struct(1).items()})
            else:
                self.skip(kind, depth)


def check_pages(file: BinaryIO, *, start: int, length: int, rows: int, width: int) -> None:
    """Raise BadPage unless the pages in `file[start : start + length]` hold `rows` values of about `width` bytes.

    Every page must carry a checksum; the uncompressed pages may take twice the plain size plus 64 KiB.
    """
    at, end, values, plain = start, start + length, 0, 0
    limit = 2 * rows * width + (64 << 10)
    while at < end:
        file.seek(at)
        reader = _Compact(file.read(min(_WINDOW, end - at)))
        header = reader.struct()
        kind, uncompressed, compressed = header.get(1, -1), header.get(2, -1), header.get(3, -1)
        if kind not in (0, 2, 3) or uncompressed < 0 or compressed < 0:
            raise BadPage("holds a page of an unknown kind")
        if 4 not in header:
            raise BadPage("holds a page without a checksum")
        plain += uncompressed
        count = header.get({0: 501, 2: 701, 3: 801}[kind], -1)
        if not 0 <= count <= rows:
            raise BadPage(f"holds a page of {count} values in a group of {rows} rows")
        if kind != 2:
            values += count
        if plain > limit:
            raise BadPage(f"decodes to more than {limit} B")
        at += reader.at + compressed
    if at != end or values != rows:
        raise BadPage(f"holds {values} values instead of {rows}")
