"""What one rank counted step by step: rows received per slot and layer, time, tokens; the source of all balance figures.

Shapes: L layers, E experts, Q the local slots of this rank.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import ApplyError

KEEP_STEPS = 2048


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One served step."""

    step: int
    epoch: int
    received_LQ: np.ndarray
    """int32 [L, Q]: rows received per local slot."""
    compute_s: float
    """Seconds spent on experts."""
    prefill: int
    decode: int
    start_ns: int
    end_ns: int
    exchanged: tuple[int, float]
    """Bytes sent to other ranks, and seconds in exchanges, waiting included."""


class History:
    """The last steps of one rank; written by the serving thread, read by the agent's."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self._records: deque[StepRecord] = deque(maxlen=KEEP_STEPS)
        self._tables: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.rows, self.tokens, self.steps = np.zeros(num_layers, np.int64), 0, 0
        self.exchanged = (0, 0.0)

    def use(self, epoch: int, table_LQ: np.ndarray) -> None:
        """Take int32 [L, Q], the expert of every local slot, as the placement of the steps of `epoch`."""
        with self._lock:
            held = {record.epoch for record in self._records}
            self._tables = {key: table for key, table in self._tables.items() if key in held} | {epoch: table_LQ}

    def add(
        self, step: int, epoch: int, counts: Sequence[tuple[np.ndarray, float]], *, prefill: int, decode: int, start_ns: int,
        exchanged: Sequence[tuple[int, float]] = (),
    ) -> None:  # fmt: skip
        """Record one step."""
        received_LQ = np.stack([rows for rows, _ in counts]).astype(np.int32)
        sent = sum(nbytes for nbytes, _ in exchanged), sum(seconds for _, seconds in exchanged)
        record = StepRecord(step, epoch, received_LQ, sum(seconds for _, seconds in counts), prefill, decode, start_ns, time.monotonic_ns(), sent)
        with self._lock:
            self._records.append(record)
            self.rows += received_LQ.sum(1)
            self.tokens += prefill + decode
            self.steps += 1
            self.exchanged = self.exchanged[0] + sent[0], self.exchanged[1] + sent[1]

    def _between(self, first: int, last: int) -> list[StepRecord]:
        with self._lock:
            return [record for record in self._records if first <= record.step < last]

    def window(self, first: int, last: int) -> dict[str, Any]:
        """Return the sums over the steps in [first, last), and tokens, times and exchanges step by step; raise ApplyError if not all are at hand."""
        records = self._between(first, last)
        if len(records) != last - first:
            raise ApplyError(f"steps {first}..{last - 1} are not all in the history, which holds {len(records)} of them")
        rows_LE = np.zeros((self.num_layers, self.num_experts), np.int64)
        for record in records:
            layer, slot = np.nonzero(self._tables[record.epoch] >= 0)
            np.add.at(rows_LE, (layer, self._tables[record.epoch][layer, slot]), record.received_LQ[layer, slot])
        times = np.array([record.end_ns - record.start_ns for record in records]) / 1e6
        return {
            "rows_LE": rows_LE.tolist(), "compute_s": sum(record.compute_s for record in records), "step_ms": float(times.mean()),
            "epochs": sorted({record.epoch for record in records}), "exchanged": self.exchanged, "steps": self.steps,
            "each": {
                "prefill": [record.prefill for record in records], "decode": [record.decode for record in records], "ms": times.round(4).tolist(),
                "exchanged_bytes": [record.exchanged[0] for record in records], "exchanged_s": [round(record.exchanged[1], 7) for record in records],
            },
        }  # fmt: skip

    def metrics(self) -> dict[str, Any]:
        """Return totals since the start and step times over what is kept."""
        with self._lock:
            times = np.array([record.end_ns - record.start_ns for record in self._records] or [0]) / 1e6
            rows, tokens = self.rows.tolist(), self.tokens
        p50, p99 = np.percentile(times, [50, 99]).tolist()
        return {"tokens": tokens, "rows_L": rows, "step_ms": {"mean": float(times.mean()), "p50": p50, "p99": p99}}
