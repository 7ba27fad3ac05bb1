"""The coordinator's journal: one checked JSON line per decision, on disk before anybody acts on it.

A line is the first 16 hex digits of the SHA-256 of its JSON, a blank, the JSON. A torn or damaged line ends the journal.
The installed placement is that of the last `commit` without a later `rollback` of the same apply, or of a later `shrink` (ranks were lost).
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, InputError
from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan

KINDS = ("start", "prepare", "commit", "abort", "rollback", "done", "shrink")


class Journal:
    """An append-only file of decisions."""

    def __init__(self, path: Path) -> None:
        """Open or create the journal at `path`; what lies behind a damaged line is cut off."""
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.records, good = _read(path.read_bytes() if path.exists() else b"")
            self._file = path.open("ab")
            self._file.truncate(good)
        except OSError as cause:
            raise InputError(f"{path}: cannot be written ({cause.strerror or cause}); check the journal's folder") from None

    def append(self, kind: str, **fields: Any) -> None:
        """Write a record and wait until it is on disk; raise ApplyError if it cannot get there."""
        assert kind in KINDS
        record = {"kind": kind, **fields}
        body = canonical_json(record)
        start = self._file.tell()
        try:
            self._file.write(sha256_hex(body)[:16].encode() + b" " + body + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as cause:
            with contextlib.suppress(OSError):
                os.truncate(self.path, start)
            raise ApplyError(f"{self.path}: the decision cannot be written ({cause.strerror or cause}); free some space and try again") from None
        self.records.append(record)

    def installed(self) -> Plan | None:
        """Return the plan that the journal says is installed, or None if it names none."""
        undone = {record["apply"] for record in self.records if record["kind"] == "rollback"}
        plans = {record["apply"]: record["plan"] for record in self.records if record["kind"] == "prepare"}
        for record in reversed(self.records):
            if record["kind"] == "commit" and record["apply"] not in undone:
                return Plan.from_content(plans[record["apply"]], str(self.path))
            if record["kind"] in ("start", "shrink"):
                return Plan.from_content(record["plan"], str(self.path))
        return None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
