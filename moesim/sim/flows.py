"""Flows: transfers in flight beside the Ops of a Program (a migration, a prefetch, a KV transfer).

A Flow claims every port of its path. With `fair` discipline each of n Flows and the Ops of a port get 1/(n + 1) of
it while Ops run, and the Flows get 1/n while none does; with `low` discipline Ops keep the whole port and Flows get
what is left in time. A Flow moves at the rate of its slowest port. Ops count as running on a port between
decision points, so shares are solved once per change of the set of Flows. Bytes, seconds, bytes/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import SimulationError

Hop = tuple[str, int]
"""A port of a rank, like ("scale_out.out", 3)."""
_ROUNDING = 1e-12


@dataclass(slots=True, eq=False)
class Flow:
    """One transfer in flight."""

    name: str
    total_bytes: float
    path: Mapping[Hop, float]
    """Ports on the way → their full bandwidth, bytes/s."""
    discipline: str = "fair"
    """`fair` or `low`."""
    left_bytes: float = field(init=False)
    done: Any = field(init=False, default=None)
    """simpy event that fires when the last byte has arrived."""
    start_s: float = field(init=False, default=0.0)
    end_s: float = field(init=False, default=np.inf)

    def __post_init__(self) -> None:
        if not (np.isfinite(self.total_bytes) and self.total_bytes >= 0):
            raise SimulationError(f"flow {self.name}: bytes = {self.total_bytes} must be finite and >= 0")
        if not self.path or any(not (np.isfinite(rate) and rate > 0) for rate in self.path.values()):
            raise SimulationError(f"flow {self.name}: path = {dict(self.path)} must name at least one port with a bandwidth > 0; the rank pair is unreachable")
        if self.discipline not in ("fair", "low"):
            raise SimulationError(f"flow {self.name}: discipline = {self.discipline!r} must be fair or low")
        self.left_bytes = float(self.total_bytes)


@dataclass(frozen=True, slots=True)
class Busy:
    """Disjoint, increasing intervals in which Ops use a port."""

    begin: np.ndarray
    end: np.ndarray

    @staticmethod
    def union(begin: np.ndarray, end: np.ndarray) -> Busy:
        """Merge intervals that overlap or touch; empty ones vanish."""
        keep = end > begin
        begin, end = begin[keep], end[keep]
        if len(begin) == 0:
            return Busy(begin, end)
        order = np.argsort(begin, kind="stable")
        begin, end = begin[order], np.maximum.accumulate(end[order])
        first = np.r_[True, begin[1:] > end[:-1]]
        return Busy(begin[first], end[np.r_[np.flatnonzero(first)[1:] - 1, len(end) - 1]])

    def at(self, time: np.ndarray) -> np.ndarray:
        """Return bool: is the port busy just after `time`?"""
        if len(self.begin) == 0:
            return np.zeros(len(time), dtype=bool)
        index = np.searchsorted(self.begin, time, side="right") - 1
        return (index >= 0) & (time < self.end[np.maximum(index, 0)])


def claims(flows: list[Flow]) -> dict[Hop, list[Flow]]:
    """Return which Flows claim every port."""
    result: dict[Hop, list[Flow]] = {}
    for flow in flows:
        for hop in flow.path:
            result.setdefault(hop, []).append(flow)
    return result


def op_share(sharing: list[Flow]) -> float:
    """Return the share of a port that Ops keep beside these Flows."""
    return 1.0 / (1 + sum(flow.discipline == "fair" for flow in sharing))


def rate_steps(flow: Flow, sharing: Mapping[Hop, list[Flow]], busy: Mapping[Hop, Busy], now: float) -> tuple[np.ndarray, np.ndarray]:
    """Return (times, rates): from times[i] on the Flow moves at rates[i] bytes/s; the last rate holds for ever."""
    edges = [np.array([now])]
    for hop in flow.path:
        if hop in busy:
            edges += [busy[hop].begin, busy[hop].end]
    times = np.unique(np.concatenate(edges))
    times = times[times >= now]
    rate = np.full(len(times), np.inf)
    for hop, bandwidth in flow.path.items():
        fair = sum(other.discipline == "fair" for other in sharing[hop])
        low = len(sharing[hop]) - fair
        active = busy[hop].at(times) if hop in busy else np.zeros(len(times), dtype=bool)
        if flow.discipline == "fair":
            share = 1.0 / (fair + active)
        else:
            share = np.where(active | (fair > 0), 0.0, 1.0 / low)
        rate = np.minimum(rate, bandwidth * share)
    return times, rate


def moved(times: np.ndarray, rates: np.ndarray, until: float) -> float:
    """Return the bytes moved from times[0] to `until`."""
    edges = np.minimum(np.r_[times[1:], np.inf], until)
    return float((np.maximum(edges - times, 0.0) * rates).sum())


def finish_time(times: np.ndarray, rates: np.ndarray, left_bytes: float) -> float:
    """Return when `left_bytes` have moved; inf if the rate stays 0."""
    if left_bytes <= 0:
        return float(times[0])
    carried = np.r_[0.0, np.cumsum(np.diff(times) * rates[:-1])]
    index = int(np.searchsorted(carried, left_bytes, side="left")) - 1
    rest = left_bytes - carried[index]
    return float(times[index] + rest / rates[index]) if rates[index] > 0 else np.inf


def is_done(flow: Flow) -> bool:
    """Return whether the Flow has nothing left but rounding."""
    return flow.left_bytes <= _ROUNDING * max(flow.total_bytes, 1.0)
