"""Decode Thrift structs in the compact protocol, the language of Parquet's footers and page headers.

A struct becomes a dict from field number to value: int, float, bool, bytes, list or dict. Nothing is allocated that the bytes
at hand do not hold. Source: the Thrift compact protocol specification.
"""

from __future__ import annotations

import struct
from typing import Any

_MAX_DEPTH = 10


class ThriftError(Exception):
    """The bytes are no struct; the message completes a sentence."""


class CompactReader:
    """A cursor over bytes; `at` is the position of the next one."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ThriftError("ends inside a header")
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value, shift = 0, 0
        while True:
            part = self._byte()
            value |= (part & 0x7F) << shift
            if part < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise ThriftError("holds an endless number in a header")

    def _integer(self) -> int:
        value = self._varint()
        value = (value >> 1) ^ -(value & 1)
        if not -(1 << 63) <= value < 1 << 63:
            raise ThriftError("holds a number of more than 64 bits in a header")
        return value

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ThriftError("ends inside a header")
        self.at += count
        return self.data[self.at - count : self.at]

    def _value(self, kind: int, depth: int) -> Any:
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return struct.unpack("<d", self._bytes(8))[0]
        if kind == 8:
            return self._bytes(self._varint())
        if kind == 9:
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ThriftError("holds an unknown type in a header")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 != 15 else self._varint()
        kind = head & 15
        if count > len(self.data) - self.at or depth > _MAX_DEPTH:
            raise ThriftError("holds a list longer than itself in a header")
        if kind in (1, 2):
            return [self._byte() == 1 for _ in range(count)]
        return [self._value(kind, depth + 1) for _ in range(count)]

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Return the struct that starts here."""
        if depth > _MAX_DEPTH:
            raise ThriftError("nests a header too deep")
        fields: dict[int, Any] = {}
        field = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields
            field = field + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            if field in fields or not 0 < field < 1 << 15:
                raise ThriftError("repeats a field in a header")
            fields[field] = kind == 1 if kind in (1, 2) else self._value(kind, depth)
