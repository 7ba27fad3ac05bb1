"""Timelines for Perfetto and chrome://tracing: one process per rank, one thread per lane, times in µs.

Format: Chrome trace events, complete events (`ph: X`) with metadata naming processes and threads.
"""

from __future__ import annotations

import json
from pathlib import Path

from moesim.files import write_atomic
from moesim.sim.ledger import Ledger

MAX_EVENTS = 200_000


def write_timeline(ledger: Ledger, path: Path) -> int:
    """Write the kept intervals of `ledger` to `path`; return the number of events (at most `MAX_EVENTS`, whole passes first)."""
    kept = list(ledger.intervals())
    lanes = sorted({interval.lane for interval in kept})
    events: list[dict[str, object]] = []
    for rank in range(ledger.num_ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events += [{"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": lane}} for tid, lane in enumerate(lanes)]
    per_interval = 2 * ledger.num_ranks
    count = 0
    for interval in kept:
        if count + per_interval > MAX_EVENTS:
            break
        tid = lanes.index(interval.lane)
        for rank in range(ledger.num_ranks):
            begin, end = float(interval.start_R[rank]), float(interval.end_R[rank])
            if not end > begin:
                continue
            args = {"step": interval.step, "layer": interval.layer}
            if interval.gate is not None:
                ready = min(max(float(interval.gate[rank]), begin), end)
                if ready > begin:
                    events.append(_event("wait", rank, tid, begin, ready, args))
                    count += 1
                begin = ready
            events.append(_event(interval.label, rank, tid, begin, end, args))
            count += 1
    write_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")))
    return count


def _event(name: str, rank: int, tid: int, begin: float, end: float, args: dict[str, int]) -> dict[str, object]:
    return {"ph": "X", "name": name, "pid": rank, "tid": tid, "ts": round(begin * 1e6, 4), "dur": round((end - begin) * 1e6, 4), "args": args}
