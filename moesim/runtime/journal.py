"""The coordinator's journal: one checked JSON line per decision, on disk before anybody acts on it.

A line is the first 16 hex digits of the SHA-256 of its JSON, a blank, the JSON. A torn or damaged line ends the journal.
The installed placement is that of the last `commit` without a later `rollback` or `abort` of the same apply, or of a later `shrink` (ranks were lost).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, InputError
from moesim.files import canonical_json, read_bytes, sha256_hex
from moesim.plan import Plan

KINDS = ("start", "prepare", "commit", "abort", "rollback", "done", "shrink")
MAX_BYTES = 1 << 30


class Journal:
    """An append-only file of decisions."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path`; what lies behind a damaged line is cut off."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            self.records, good = _read(b"" if is_new else read_bytes(path, limit=MAX_BYTES))
            self._file = path.open("ab", buffering=0)  # a buffer would keep what could not be written, and write it later
            self._file.truncate(good)
            self._good = good
            if is_new:
                _reach_disk(path.parent)
        except OSError as cause:
            raise InputError(f"{path}: cannot be written ({cause.strerror or cause}); check the journal's folder") from None

    def append(self, kind: str, **fields: Any) -> None:
        """Write a record and wait until it is on disk; raise ApplyError if it cannot get there."""
        assert kind in KINDS
        record = {"kind": kind, **fields}
        body = canonical_json(record)
        line = sha256_hex(body)[:16].encode() + b" " + body + b"\n"
        try:
            self._file.truncate(self._good)  # of what an earlier failure may have left
            written = 0
            while written < len(line):
                written += os.write(self._file.fileno(), line[written:])
            os.fsync(self._file.fileno())
        except OSError as cause:
            with contextlib.suppress(OSError):
                self._file.truncate(self._good)
            raise ApplyError(f"{self.path}: the decision cannot be written ({cause.strerror or cause}); free some space and try again") from None
        self._good += len(line)
        self.records.append(record)

    def installed(self) -> Plan | None:
        """Return the plan that the journal says is installed, or None if it names none."""
        prepared: dict[int, Any] = {}
        now, before, applied = None, None, None
        for record in self.records:
            kind = record["kind"]
            if kind in ("start", "shrink"):
                now, applied = record["plan"], None
            elif kind == "prepare":
                prepared[record["apply"]] = record["plan"]
            elif kind == "commit":
                now, before, applied = prepared[record["apply"]], now, record["apply"]
            elif kind in ("rollback", "abort") and record["apply"] == applied:
                now, applied = before, None
        return None if now is None else Plan.from_content(now, str(self.path))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _reach_disk(folder: Path) -> None:
    """Wait until the names in `folder` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the records up to the first damaged line, and the bytes they take."""
    records, good = [], 0
    for line in data.splitlines(keepends=True):
        stamp, _, body = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or sha256_hex(body)[:16].encode() != stamp:
            break
        records.append(json.loads(body))
        good += len(line)
    return records, good
