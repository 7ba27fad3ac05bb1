"""The Ledger: what ran where and when; every metric, timeline and conservation check is read from it.

Sums per label and step are kept for all passes; the single intervals only for the first `keep_passes`, so that memory
is bounded whatever the length of a trace. Seconds and bytes. Shapes: P passes, R ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moesim.costs.provenance import Provenance
from moesim.sim.evaluate import Times
from moesim.sim.ops import Program

CLASSES = tuple(item.name.lower() for item in Provenance)


@dataclass(frozen=True, slots=True)
class Interval:
    """One Op of one pass on all ranks."""

    step: int
    layer: int
    label: str
    lane: str
    start_R: np.ndarray
    gate: np.ndarray | None
    end_R: np.ndarray


@dataclass(slots=True)
class Ledger:
    """Columnar record of a run."""

    num_ranks: int
    keep_passes: int = 16
    step: list[int] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    by_label: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Label → arrays [P] of mean seconds per rank, one per recorded batch."""
    class_s: np.ndarray = field(default_factory=lambda: np.zeros(len(CLASSES)))
    """Rank-seconds of work by provenance class."""
    _kept: list[tuple[Program, Times, int, int, float, int]] = field(default_factory=list)
    _batches: list[int] = field(default_factory=list)

    def record(self, program: Program, times: Times, *, steps: list[int], begin_s: float, overhead_s: float = 0.0) -> float:
        """Add P passes that ran one after another from `begin_s`; their Times count from 0. Returns when the last one ended."""
        finish_P = np.atleast_1d(times.finish).astype(np.float64) + overhead_s
        passes = len(finish_P)
        start_P = begin_s + np.r_[0.0, np.cumsum(finish_P[:-1])]
        sums: dict[str, np.ndarray] = {}
        ones = np.ones(self.num_ranks)
        for index, op in enumerate(program.ops):
            start, end, gate = times.start[index], times.end[index], times.gate[index]
            length = end - start
            if length.shape != (passes, self.num_ranks):
                length = np.broadcast_to(length, (passes, self.num_ranks))
            if gate is not None:
                wait = np.minimum(gate - start, length)
                sums["straggler_wait"] = sums.get("straggler_wait", 0.0) + wait @ ones
                length = length - wait
            seconds = length @ ones
            sums[op.label] = sums.get(op.label, 0.0) + seconds
            self._count_classes(op.provenance, length, float(seconds.sum()))
        sums["overhead"] = np.full(passes, overhead_s * self.num_ranks)
        for label in set(sums) | set(self.by_label):
            history = self.by_label.setdefault(label, [np.zeros(n) for n in self._batches])
            history.append(np.asarray(sums.get(label, np.zeros(passes))) / self.num_ranks)
        self._batches.append(passes)
        for row in range(min(passes, max(0, self.keep_passes - len(self.step)))):
            self._kept.append((program, times, row, passes, float(start_P[row]), steps[row]))
        self.step += steps
        self.start_s += start_P.tolist()
        self.duration_s += finish_P.tolist()
        return float(start_P[-1] + finish_P[-1])

    def _count_classes(self, provenance: np.ndarray | int, length: np.ndarray, total: float) -> None:
        codes = np.asarray(provenance)
        first = int(codes.flat[0])
        if codes.size == 1 or bool((codes == first).all()):
            self.class_s[first] += total
        else:
            self.class_s += np.bincount(np.broadcast_to(codes, length.shape).ravel(), weights=length.ravel(), minlength=len(CLASSES))

    def intervals(self) -> Iterator[Interval]:
        """Yield the Ops of the kept passes on the run's clock, pass by pass."""
        for program, times, row, passes, offset, step in self._kept:
            for index, op in enumerate(program.ops):
                gate = times.gate[index]
                start, end = (np.broadcast_to(value, (passes, self.num_ranks))[row] + offset for value in (times.start[index], times.end[index]))
                ready = None if gate is None else np.broadcast_to(gate, (passes, self.num_ranks))[row] + offset
                yield Interval(step, op.layer, op.label, op.lane, start, ready, end)

    # --- metrics ---------------------------------------------------------------------------------

    @property
    def simulated_s(self) -> float:
        """Seconds from the first to the last moment of the run."""
        return self.start_s[-1] + self.duration_s[-1] if self.step else 0.0

    def step_ms(self) -> dict[str, float]:
        """Return mean, p50, p95 and p99 of the pass times, ms."""
        values = np.asarray(self.duration_s) * 1e3
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        return {"mean": float(values.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}

    def breakdown_s(self) -> dict[str, np.ndarray]:
        """Return label → [P] mean seconds per rank; with `idle`, labels sum to the pass time when lanes do not overlap."""
        labels = {label: np.concatenate(parts) for label, parts in self.by_label.items()}
        total = np.asarray(self.duration_s)
        used = np.sum(list(labels.values()), axis=0) if labels else np.zeros_like(total)
        labels["idle"] = np.maximum(total - used, 0.0)
        return {label: values for label, values in sorted(labels.items()) if values.any()}

    def provenance(self) -> dict[str, float]:
        """Return class → share of the work's time."""
        total = self.class_s.sum()
        return {name: float(value / total) if total else 0.0 for name, value in zip(CLASSES, self.class_s, strict=True)}
