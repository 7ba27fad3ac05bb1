"""Timelines for Perfetto and chrome://tracing: one process per rank, one track per lane and port, times in µs.

Format: Chrome trace events. Slices (`ph: X`) on lanes and ports, arrows (`s` → `f`) from the send of a message to its receipt, counters (`C`) for tiers and
loads, metadata (`M`) with names. Lanes are serial, so their slices never overlap; a port that two lanes share at once shows one after the other. In
groups of more than `MESSAGE_RANKS` ranks only the messages of the rank that arrives last are drawn: the ones that everybody waits for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.files import write_atomic
from moesim.sim.evaluate import SM
from moesim.sim.ledger import Interval, Ledger

MAX_EVENTS = 200_000
"""Most slices, arrows and counters; whole passes first."""
MESSAGE_RANKS = 8
Event = dict[str, Any]


def write_timeline(ledger: Ledger, path: Path) -> int:
    """Write the kept intervals and counters of `ledger` to `path`; return the number of events."""
    events = timeline_events(ledger)
    write_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":"), allow_nan=False))
    return len(events)


def timeline_events(ledger: Ledger) -> list[Event]:
    """Return metadata, then all events in order of time."""
    passes: list[list[Interval]] = []
    for interval in ledger.intervals():
        if not passes or passes[-1][0].step != interval.step:
            passes.append([])
        passes[-1].append(interval)
    kept = [interval for group in passes for interval in group]
    lanes = sorted({interval.lane for interval in kept})
    ports = sorted({port for interval in kept for port, _, _ in interval.uses} - {SM})
    tids = {name: tid for tid, name in enumerate([*lanes, *(f"port {port}" for port in ports)])}
    events: list[Event] = []
    state = _State(tids, np.full((len(tids), ledger.num_ranks), -np.inf))
    for group in passes:
        fresh = [event for interval in group for event in state.interval(interval)]
        if len(events) + len(fresh) > MAX_EVENTS:
            break
        events += fresh
    for name, levels in sorted(ledger.levels.items()):
        if len(events) + len(levels) * ledger.num_ranks > MAX_EVENTS:
            break
        for at_s, value_R in levels:
            events += [_event("C", name, rank, 0, at_s, args={"value": float(value)}) for rank, value in enumerate(value_R)]
    events.sort(key=lambda event: event["ts"])  # stable: events of one moment stay in order of the program
    return _names(tids, ledger.num_ranks) + events


class _State:
    """What has been drawn so far."""

    def __init__(self, tids: dict[str, int], free_KR: np.ndarray) -> None:
        self.tids, self.free_KR = tids, free_KR
        self.messages = 0

    def interval(self, interval: Interval) -> list[Event]:
        """Return the events of one Op: slices on its lane and ports, and the messages of an exchange."""
        events: list[Event] = []
        tid, args = self.tids[interval.lane], {"step": interval.step, "layer": interval.layer}
        first: dict[int, float] = {}
        last: dict[int, float] = {}
        for rank in range(len(interval.start_R)):
            begin, end = float(interval.start_R[rank]), float(interval.end_R[rank])
            if not (begin < end < np.inf and begin > -np.inf):
                continue
            ready = begin if interval.gate is None else min(max(float(interval.gate[rank]), begin), end)
            if ready > begin:
                events.append(_slice("wait", rank, tid, begin, ready, args))
            if end > ready:
                events.append(_slice(interval.label, rank, tid, ready, end, args))
            first[rank], last[rank] = events[-2 if begin < ready < end else -1]["ts"], round(events[-1]["ts"] + events[-1]["dur"], 4)
            for port, begin_R, end_R in interval.uses:
                if port != SM:
                    events += self._port(interval.label, rank, port, float(begin_R[rank]), float(end_R[rank]), args)
        return events + self._messages(interval, tid, first, last)

    def _port(self, label: str, rank: int, port: str, begin: float, end: float, args: dict[str, int]) -> list[Event]:
        tid = self.tids[f"port {port}"]
        begin = max(begin, float(self.free_KR[tid, rank]))
        if not begin < end < np.inf:
            return []
        self.free_KR[tid, rank] = end
        return [_slice(label, rank, tid, begin, end, args)]

    def _messages(self, interval: Interval, tid: int, first: dict[int, float], last: dict[int, float]) -> list[Event]:
        events: list[Event] = []
        for source, target in _pairs(interval):
            if source in first and target in last and first[source] <= last[target]:
                name = {"cat": "message", "id": self.messages}
                events.append(_flow("s", interval.label, source, tid, first[source], **name))
                events.append(_flow("f", interval.label, target, tid, last[target], bp="e", **name))
                self.messages += 1
        return events


def _pairs(interval: Interval) -> list[tuple[int, int]]:
    """Return (source, target) of the messages to draw."""
    if interval.source_R is not None:
        return [(int(source), target) for target, source in enumerate(interval.source_R) if source >= 0 and source != target]
    if interval.group_R is None or interval.gate is None:
        return []
    pairs = []
    for group in np.unique(interval.group_R):
        ranks = np.flatnonzero(interval.group_R == group).tolist()
        sources = ranks if len(ranks) <= MESSAGE_RANKS else [ranks[int(np.argmax(interval.start_R[ranks]))]]
        pairs += [(source, target) for source in sources for target in ranks if source != target]
    return pairs


def _names(tids: dict[str, int], ranks: int) -> list[Event]:
    events: list[Event] = []
    for rank in range(ranks):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        events += [{"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}} for name, tid in tids.items()]
    return events


def _event(phase: str, name: str, rank: int, tid: int, at_s: float, **more: Any) -> Event:
    return {"ph": phase, "name": name, "pid": rank, "tid": tid, "ts": round(at_s * 1e6, 4), **more}


def _flow(phase: str, name: str, rank: int, tid: int, ts: float, **more: Any) -> Event:
    return {"ph": phase, "name": name, "pid": rank, "tid": tid, "ts": ts, **more}


def _slice(name: str, rank: int, tid: int, begin: float, end: float, args: dict[str, int]) -> Event:
    ts = round(begin * 1e6, 4)
    return {"ph": "X", "name": name, "pid": rank, "tid": tid, "ts": ts, "dur": round(round(end * 1e6, 4) - ts, 4), "args": args}
