"""Flows: transfers in flight beside the Ops of a Program (a migration, a prefetch, a KV transfer).

The Flows in flight share their ports by weighted max-min, class by class (`shares`); a `fifo` Flow enters its ports only behind those that came
before it. **Constant rates**: on a port that class-0 Flows cross, the Ops keep the share that max-min guarantees one more claim of weight 1,
whatever happens on other ports: 1 / (n + 1) beside n Flows of full speed, more beside a Flow whose narrowest port is slower. So Op rates change only
when a Flow enters or leaves, and Flow rates only then or when the Ops begin or stop to use a port; while they use none, Flows get all of it. Flows
of later classes (`low`) wait for the Ops and for the classes before. Bytes, seconds, bytes/s. Shapes: F flows, P ports, T times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import SimulationError, describe
from moesim.sim.shares import by_class, guaranteed, remaining

Hop = tuple[str, int]
"""A port: its kind and the rank (or node, NIC, PCIe root) whose it is, like ("scale_out.out", 3)."""
DISCIPLINES = ("fair", "low", "fifo")
_ROUNDING = 1e-12
_BORDER = 1e-9
_SAME_UNIT = 1e3


@dataclass(slots=True, eq=False)
class Flow:
    """One transfer in flight."""

    name: str
    total_bytes: float
    path: Mapping[Hop, float]
    """Ports on the way → the bandwidth that this Flow would reach alone, bytes/s; the port's own is the highest that a Flow names."""
    discipline: str = "fair"
    """`fair`: beside the others; `low`: as fair, one class later; `fifo`: on every port behind the `fifo` Flows before it (a serial port)."""
    priority: int = 0
    """Strict class: 0 shares with the Ops, later classes get what is left while no Op uses the port."""
    weight: float = 1.0
    """Share beside the others of its class."""
    chunk_bytes: float | None = None
    """Where it can be cancelled, split or, if `fifo`, made to wait for an earlier class; None: cancelled anywhere, else uninterruptible."""
    ranks: tuple[int, ...] = ()
    """Ranks that it needs; it is lost when one of them fails. Empty: those whose ports it crosses."""
    left_bytes: float = field(init=False)
    done: Any = field(init=False, default=None)
    """simpy event that fires when the last byte has arrived."""
    gone: Any = field(init=False, default=None)
    """simpy event that fires when the Flow has left its ports: it has arrived, was cancelled, or is lost."""
    start_s: float = field(init=False, default=0.0)
    end_s: float = field(init=False, default=np.inf)
    cancelled: bool = field(init=False, default=False)
    lost: bool = field(init=False, default=False)
    stop_bytes: float = field(init=False, default=0.0)
    """Bytes left at which something happens: it has arrived, or reaches the chunk border at which it gives way."""
    serving: bool = field(init=False, default=False)
    """Has entered its ports."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.total_bytes) and self.total_bytes >= 0):
            raise SimulationError(f"flow {self.name}: bytes = {self.total_bytes} must be finite and >= 0")
        if not self.path or any(not (np.isfinite(rate) and rate > 0) for rate in self.path.values()):
            raise SimulationError(f"flow {self.name}: path = {dict(self.path)} must name at least one port with a bandwidth > 0; the rank pair is unreachable")
        if self.discipline not in DISCIPLINES:
            raise SimulationError(describe(f"flow {self.name}", "discipline", self.discipline, f"must be one of {', '.join(DISCIPLINES)}"))
        if self.priority < 0 or not (np.isfinite(self.weight) and self.weight > 0) or not (self.chunk_bytes is None or self.chunk_bytes > 0):
            values = (self.priority, self.weight, self.chunk_bytes)
            raise SimulationError(describe(f"flow {self.name}", "priority, weight, chunk_bytes", values, "must be >= 0, > 0 and > 0"))
        self.left_bytes = float(self.total_bytes)

    @property
    def level(self) -> int:
        """Strict class, counting that `low` is one later."""
        return self.priority + (self.discipline == "low")

    @property
    def border_bytes(self) -> float:
        """Bytes left at the next chunk border; what is left now if it is at one."""
        if self.chunk_bytes is None:
            return self.left_bytes if self.left_bytes == self.total_bytes else 0.0
        chunks = np.ceil((self.total_bytes - self.left_bytes) / self.chunk_bytes - _BORDER)
        return min(max(self.total_bytes - float(chunks) * self.chunk_bytes, 0.0), self.left_bytes)

    @property
    def at_border(self) -> bool:
        """Whether no chunk is under way."""
        return self.left_bytes - self.border_bytes <= _BORDER * min(self.chunk_bytes or self.total_bytes, self.total_bytes)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left but rounding."""
        return self.left_bytes <= _ROUNDING * max(self.total_bytes, 1.0)


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
        starts = np.flatnonzero(begin[1:] > end[:-1]) + 1
        return Busy(begin[np.append(0, starts)], end[np.append(starts - 1, len(end) - 1)])

    def at(self, time: np.ndarray) -> np.ndarray:
        """Return bool: is the port busy just after `time`?"""
        if len(self.begin) == 0:
            return np.zeros(len(time), dtype=bool)
        index = np.searchsorted(self.begin, time, side="right") - 1
        return (index >= 0) & (time < self.end[np.maximum(index, 0)])


def serve(flows: list[Flow]) -> list[Flow]:
    """Mark and return the Flows that use their ports now: all but the `fifo` ones that wait; set the border at which one gives way.

    A `fifo` Flow in the middle of a chunk goes on; otherwise the earliest class goes first, and in it the one that came first.
    """
    queue = [flow for flow in flows if flow.discipline == "fifo"]
    order = sorted(range(len(queue)), key=lambda i: (not (queue[i].serving and not queue[i].at_border), queue[i].level, i))
    taken: set[Hop] = set()
    for flow in flows:
        flow.stop_bytes = flow.border_bytes if flow.cancelled else 0.0
        flow.serving = flow.discipline != "fifo"
    for index in order:
        queue[index].serving = taken.isdisjoint(queue[index].path)
        taken.update(queue[index].path)
    for flow in queue:
        if flow.serving and any(not other.serving and other.level < flow.level and not other.path.keys().isdisjoint(flow.path) for other in queue):
            flow.stop_bytes = flow.border_bytes
    return [flow for flow in flows if flow.serving]


class Allocation:
    """How the ports are divided among a set of Flows and the Ops, until the set changes."""

    def __init__(self, flows: Iterable[Flow]) -> None:
        """Divide the ports. Raises SimulationError if two Flows cannot mean the same port."""
        self.flows = list(flows)
        capacity: dict[Hop, float] = {}
        for flow in self.flows:
            for hop, bandwidth in flow.path.items():
                known = capacity.get(hop, bandwidth)
                if max(known, bandwidth) > _SAME_UNIT * min(known, bandwidth):
                    raise SimulationError(describe(f"flow {flow.name}", f"path[{hop}]", bandwidth, f"B/s must be of the size of the others' {known} B/s"))
                capacity[hop] = max(known, bandwidth)
        self.hops = list(capacity)
        self._column = {hop: index for index, hop in enumerate(self.hops)}
        self._capacity_P = np.array(list(capacity.values()))
        self._use_FP = np.zeros((len(self.flows), len(self.hops)))
        limit_F = np.zeros(len(self.flows))
        for row, flow in enumerate(self.flows):
            limit_F[row] = min(flow.path.values())
            for hop, bandwidth in flow.path.items():
                self._use_FP[row, self._column[hop]] = capacity[hop] / bandwidth
        self._weight_F = np.array([flow.weight for flow in self.flows])
        self._level_F = np.array([flow.level for flow in self.flows], dtype=np.int64)
        self.op_share_P = np.ones(len(self.hops))
        """Share of every port that Ops keep."""
        first_F = self._level_F == 0
        for column, bandwidth in enumerate(self._capacity_P):
            here = first_F & (self._use_FP[:, column] > 0)
            if here.any():
                self.op_share_P[column] = guaranteed(bandwidth, self._use_FP[here, column], self._weight_F[here], limit_F[here]) / bandwidth
        self._known: dict[bytes, np.ndarray] = {}

    def again(self, flows: list[Flow]) -> Allocation:
        """Return the same division for other Flows of equal paths, classes and weights."""
        other = copy(self)
        other.flows = flows
        return other

    def rates(self, busy_P: np.ndarray) -> np.ndarray:
        """Return the rate of every Flow, float64 [F], while Ops use the ports `busy_P`."""
        key = busy_P.tobytes()
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._solve(busy_P)
        return known

    def _solve(self, busy_P: np.ndarray) -> np.ndarray:
        first_F = self._level_F == 0
        room_P = np.where(busy_P, self._capacity_P * (1 - self.op_share_P), self._capacity_P)
        rate_F = np.zeros(len(self.flows))
        rate_F[first_F] = by_class(self._use_FP[first_F], room_P, self._level_F[first_F], self._weight_F[first_F])
        if not first_F.all():
            left_P = np.where(busy_P, 0.0, remaining(self._capacity_P, self._capacity_P - rate_F @ self._use_FP))
            rate_F[~first_F] = by_class(self._use_FP[~first_F], left_P, self._level_F[~first_F], self._weight_F[~first_F])
        return rate_F

    def steps(self, busy: Mapping[Hop, Busy], now: float) -> Steps:
        """Return the rates of all Flows from `now` on, as long as the Ops use the ports as `busy` says."""
        used = [(self._column[hop], spans) for hop, spans in busy.items() if hop in self._column and len(spans.end) and spans.end[-1] > now]
        if not used:
            return Steps(self.flows, np.array([now]), self.rates(np.zeros(len(self.hops), dtype=bool))[None])
        times = np.unique(np.concatenate([np.array([now]), *(edge for _, spans in used for edge in (spans.begin, spans.end))]))
        times = times[(times >= now) & (times < np.inf)]
        busy_TP = np.zeros((len(times), len(self.hops)), dtype=bool)
        which = np.zeros(len(times), dtype=np.int64)
        bits = 0
        for column, spans in used:
            busy_TP[:, column] = now_busy = spans.at(times)
            which, bits = 2 * which + now_busy, bits + 1
            if bits == 62:
                # Renumbering keeps the number of a pattern small, however many ports there are.
                _, which = np.unique(which, return_inverse=True)
                bits = len(times).bit_length()
        _, first, which = np.unique(which, return_index=True, return_inverse=True)
        return Steps(self.flows, times, np.stack([self.rates(busy_TP[row]) for row in first])[which])


@dataclass(frozen=True, slots=True)
class Steps:
    """Piecewise constant rates: from times[i] on Flow f moves at rates[i, f] bytes/s; the last rate holds for ever."""

    flows: list[Flow]
    times: np.ndarray
    rates: np.ndarray

    def settle(self, until: float) -> None:
        """Book what the Flows have moved from times[0] to `until`."""
        if len(self.times) == 1:
            moved = self.rates[0] * (until - self.times[0])
        else:
            moved = self._moved(until)
        for flow, nbytes in zip(self.flows, moved.tolist(), strict=True):
            flow.left_bytes = max(0.0, flow.left_bytes - nbytes)

    def _moved(self, until: float) -> np.ndarray:
        edges = np.minimum(np.append(self.times[1:], np.inf), until)
        return np.maximum(edges - self.times, 0.0) @ self.rates

    def next_stop(self) -> tuple[float, list[Flow]]:
        """Return when the first Flows arrive or reach the border at which they give way, and which; inf if none moves."""
        carried = np.zeros(self.rates.shape)
        np.cumsum(np.diff(self.times)[:, None] * self.rates[:-1], axis=0, out=carried[1:])
        first, due = np.inf, []
        for column, flow in enumerate(self.flows):
            todo = flow.left_bytes - flow.stop_bytes
            if todo <= 0:
                end = float(self.times[0])
            else:
                index = int(np.searchsorted(carried[:, column], todo, side="left")) - 1
                rate = self.rates[index, column]
                end = float(self.times[index] + (todo - carried[index, column]) / rate) if rate > 0 else np.inf
            if end < first:
                first, due = end, [flow]
            elif end == first < np.inf:
                due.append(flow)
        return first, due


def split(flow: Flow, parts: int) -> list[Flow]:
    """Return `parts` Flows that together carry what `flow`, not yet started, would; cut at chunk borders where it has chunks."""
    if parts < 1 or flow.start_s > 0 or flow.left_bytes != flow.total_bytes:
        raise SimulationError(describe(f"flow {flow.name}", "parts", parts, "must be >= 1, of a flow that has not started"))
    edges = np.linspace(0.0, flow.total_bytes, parts + 1)
    if flow.chunk_bytes is not None:
        edges[1:-1] = np.minimum(np.rint(edges[1:-1] / flow.chunk_bytes) * flow.chunk_bytes, flow.total_bytes)
    sizes = [float(size) for size in np.diff(edges)]
    return [
        Flow(f"{flow.name}.{index}", size, flow.path, flow.discipline, flow.priority, flow.weight, flow.chunk_bytes, flow.ranks)
        for index, size in enumerate(sizes)
    ]
