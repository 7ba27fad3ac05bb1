"""Traces held in memory: what importers and transforms build before it is written.

Their fingerprint is a hash of the arrays; on disk a trace has the hash of its manifest instead.
Shapes: W windows, L layers, E experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from moesim.traces.routing_trace import GroupInfo, RoutingTrace, TokenBatch, TraceShape, check_batch, check_counts


class MemorySource:
    """Rows held in memory."""

    def __init__(self, batches: Iterable[TokenBatch]) -> None:
        self._batches = [batch for batch in batches if len(batch)]
        self.groups: Sequence[GroupInfo] = [GroupInfo(rows=len(b), step_min=int(b.step_T.min()), step_max=int(b.step_T.max())) for b in self._batches]

    def read(self, index: int) -> TokenBatch:
        """Return the rows of one unit."""
        return self._batches[index]


def fingerprint_of(shape: TraceShape, parts: Iterable[np.ndarray | None]) -> str:
    """Return a SHA-256 over a shape and arrays, for traces that were not read from a file."""
    digest = hashlib.sha256(f"{shape}{shape.experts_L or ''}".encode())
    for part in parts:
        digest.update(b"-" if part is None else repr((part.dtype.str, part.shape)).encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def from_batches(
    shape: TraceShape, batches: Iterable[TokenBatch], *, source: str, provenance: Mapping[str, Any] | None = None, facts: Mapping[str, Any] | None = None
) -> RoutingTrace:
    """Build a token trace from batches in memory; raise TraceError on an expert id outside 0..E-1."""
    kept = [batch for batch in batches if len(batch)]
    for batch in kept:
        check_batch(batch, shape, source)
    fingerprint = fingerprint_of(shape, (getattr(batch, name) for batch in kept for name in TokenBatch.__dataclass_fields__))
    return RoutingTrace(
        shape=shape,
        kind="tokens",
        num_rows=sum(map(len, kept)),
        provenance=dict(provenance or {}),
        facts=dict(facts or {}),
        fingerprint=fingerprint,
        source=source,
        tokens=MemorySource(kept),
    )


def from_counts(
    shape: TraceShape,
    counts_WLE: np.ndarray,
    names: Sequence[str],
    *,
    source: str,
    provenance: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> RoutingTrace:
    """Build a counts trace; `counts_WLE` holds integers >= 0."""
    table = np.ascontiguousarray(counts_WLE, dtype=np.int64)
    check_counts(table, shape, len(names), source)
    table.setflags(write=False)
    return RoutingTrace(
        shape=shape,
        kind="counts",
        num_rows=len(table),
        provenance=dict(provenance or {}),
        facts=dict(facts or {}),
        fingerprint=fingerprint_of(shape, [table]),
        source=source,
        counts=lambda: table,
        stored_windows=tuple(names),
    )
