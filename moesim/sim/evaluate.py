"""The (max, +) evaluation of a Program: start = max(lane free, inputs ready), end = start + work / rate.

Pure: the same Program, start and rates always give the same times, so that a change of rate needs no undo.
Vectorised over ranks and, where passes are independent, over passes. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.sim.ops import Op, Program
from moesim.sim.timeline import RateTimeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When every Op ran: lists over Ops of float64 [R] or [P, R]; -inf where a rank does not take part."""

    start: list[np.ndarray]
    """When the rank arrived at the Op: lane free and inputs ready."""
    gate: list[np.ndarray | None]
    """When the last rank of its group arrived; None for a local Op."""
    end: list[np.ndarray]
    finish: np.ndarray
    """float64 [] or [P]: when the last rank finished the Program."""


class _Group:
    """Maximum within process groups, by the cheapest route that the layout of the groups allows."""

    def __init__(self, group_R: np.ndarray) -> None:
        self.one = bool((group_R == group_R[0]).all())
        self.order = np.argsort(group_R, kind="stable")
        ordered = group_R[self.order]
        self.first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        self.of_R = np.empty(len(group_R), dtype=np.int64)
        self.of_R[self.order] = np.cumsum(np.r_[False, ordered[1:] != ordered[:-1]])

    def max(self, value: np.ndarray) -> np.ndarray:
        if self.one:
            return value.max(axis=-1, keepdims=True)
        return np.maximum.reduceat(value[..., self.order], self.first, axis=-1)[..., self.of_R]


def evaluate(program: Program, start: float, rates: RateTimeline | None = None, decided: dict[int, np.ndarray] | None = None) -> Times:
    """Return when every Op of `program` runs if it is issued at `start` (s).

    rates: what Flows leave of each port; None: everything. decided: work that hooks have set, by Op index;
    filled here the first time a hook is reached, so that evaluating again asks nothing twice.
    """
    decided = {} if decided is None else decided
    free: dict[str, np.ndarray] = {}
    groups: dict[int, _Group] = {}
    idle = np.full(program.num_ranks, float(start))
    starts: list[np.ndarray] = []
    gates: list[np.ndarray | None] = []
    ends: list[np.ndarray] = []
    for index, op in enumerate(program.ops):
        ready = free.get(op.lane, idle)
        for dep in op.deps:
            ready = np.maximum(ready, ends[dep])
        if op.ranks_R is not None:
            ready = np.where(op.ranks_R, ready, -np.inf)
        gate = None
        if op.group_R is not None:
            group = groups.get(id(op.group_R))
            if group is None:
                group = groups[id(op.group_R)] = _Group(op.group_R)
            gate = group.max(ready)
        end = _end(op, index, ready, gate, rates, decided)
        if op.ranks_R is not None:
            end = np.where(op.ranks_R, end, -np.inf)
            free[op.lane] = np.where(op.ranks_R, end, free.get(op.lane, idle))
        else:
            free[op.lane] = end
        starts.append(ready)
        gates.append(gate)
        ends.append(end)
    finish = np.asarray(float(start)) if not free else np.max(np.stack([np.broadcast_to(lane, _shape(free)) for lane in free.values()]), axis=(0, -1))
    return Times(start=starts, gate=gates, end=ends, finish=finish)


def _shape(free: dict[str, np.ndarray]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(lane.shape for lane in free.values()))


def _end(op: Op, index: int, ready: np.ndarray, gate: np.ndarray | None, rates: RateTimeline | None, decided: dict[int, np.ndarray]) -> np.ndarray:
    end: np.ndarray | None = None
    for position, job in enumerate(op.jobs):
        work = job.work_s
        if position == 0 and op.decide is not None:
            if index not in decided:
                decided[index] = np.asarray(op.decide(ready), dtype=np.float64)
            work = decided[index]
        begin = gate if job.side == "recv" and gate is not None else ready
        done = begin + work if rates is None else rates.finish(job.port, np.broadcast_to(begin, np.broadcast_shapes(begin.shape, work.shape)), work)
        end = done if end is None else np.maximum(end, done)
    return end if end is not None else ready
