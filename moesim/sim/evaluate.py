"""The (max, +) evaluation of a Program: start = max(lane free, inputs ready), end = start + work / rate.

Pure: the same Program, start and rates always give the same times, so that a change of rate needs no undo, and what ended before it
is taken over from the evaluation before. Times that will never come are inf: a rank that has failed, whatever waits for it, and an
Op whose hook has not been asked. Vectorised over ranks and, where passes are independent, over passes. Times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.errors import SimulationError
from moesim.sim.ops import Op, Program
from moesim.sim.timeline import RateTimeline, Slowdown

Span = tuple[np.ndarray, np.ndarray]
"""When a Job uses its port: begin and end, [R], [P, R] or the same for all ranks; empty or inf where it never does."""
SM = "sm"
_ROUNDING = 64 * np.finfo(np.float64).eps


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """When every Op ran: lists over Ops of float64 [R] or [P, R]; -inf where a rank does not take part, inf where it never happens."""

    start: list[np.ndarray]
    """When the rank arrived at the Op: lane free and inputs ready."""
    gate: list[np.ndarray | None]
    """When the last rank of its group, or its source, arrived; None for a local Op."""
    end: list[np.ndarray]
    finish: np.ndarray
    """float64 [] or [P]: when the last rank finished the Program."""
    spans: list[tuple[Span, ...]] = field(default_factory=list)
    """When the Jobs of every Op use their ports; kept if asked for."""
    pending: dict[int, float] = field(default_factory=dict)
    """Ops whose hook has to be asked → when the first rank reaches them."""


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


class _Source:
    """Maximum of a rank's own value and that of the one rank it names."""

    def __init__(self, source_R: np.ndarray) -> None:
        self.source_R = np.where(source_R < 0, np.arange(len(source_R)), source_R)

    def max(self, value: np.ndarray) -> np.ndarray:
        return np.maximum(value, value[..., self.source_R])


def evaluate(
    program: Program,
    start: float,
    rates: RateTimeline | None = None,
    decided: dict[int, np.ndarray] | None = None,
    *,
    ask: bool = True,
    spans: bool = False,
    before: Times | None = None,
    since: float = -np.inf,
) -> Times:
    """Return when every Op of `program` runs if it is issued at `start` (s).

    rates: what Flows and failures leave of each port; None: everything. decided: work that hooks have set, by Op index; filled here the first time
    a hook is reached, so that evaluating again asks nothing twice. ask: False leaves hooks to the caller; the Ops that wait for one are `pending`.
    spans: keep when Jobs use their ports. before, since: an earlier evaluation of the same Program and start, and a time before which nothing has
    changed since. Raises SimulationError if hooks are asked where communication slows computation: their times are not known in order of issue.
    """
    decided = {} if decided is None else decided
    rates = None if rates is None or rates.is_plain else rates
    keep = _ended_before(before, since) if before is not None else None
    holding = [index for index, op in enumerate(program.ops) if op.sm_share > 0]
    if not holding:
        return _sweep(program, start, rates, decided, ask, spans, None, before, keep)
    if ask and any(op.decide is not None and index not in decided for index, op in enumerate(program.ops)):
        raise SimulationError("program: hooks beside ops with an sm_share can only be asked on the clock; execute the program with hooks='reached'")
    slow = _slowdown(program, holding, rates, start)
    if before is not None:
        for row, index in enumerate(holding):
            slow.hold(row, before.start[index], before.end[index])
    # Causality makes this end: every round settles at least the next change of speed, and what lies before it is final. One round does if no Op takes
    # SMs while one that was issued before it computes.
    for turn in range(2 * len(program.ops) + 8):
        begin, end = slow.begin.copy(), slow.end.copy()
        times = _sweep(program, start, rates, decided, ask, spans, slow, before, keep)
        if before is None and turn == 0 and not slow.too_late:
            return times
        if np.allclose(begin, slow.begin, rtol=_ROUNDING, atol=0.0) and np.allclose(end, slow.end, rtol=_ROUNDING, atol=0.0):
            return times
    raise SimulationError("program: times do not settle while communication slows computation; this is a bug")


def _beside(program: Program) -> np.ndarray:
    """Return bool [ops, K]: can Op and SM-holding Op k overlap? Not if k waits for the Op: it may begin when the Op ends, never before."""
    key = ("beside", len(program.ops))
    found = program.cache.get(key)
    if found is None:
        waits: list[int] = []  # bit set of the earlier Ops that one waits for on every rank where both take part
        lanes: dict[str, int] = {}
        for index, op in enumerate(program.ops):
            mask = lanes.get(op.lane, 0)
            for dep in op.deps:
                mask |= 1 << dep | (waits[dep] if program.ops[dep].ranks_R is None else 0)
            waits.append(mask)
            lanes[op.lane] = lanes.get(op.lane, 0) | 1 << index | (mask if op.ranks_R is None else 0)
        holding = [index for index, op in enumerate(program.ops) if op.sm_share > 0]
        size = len(program.ops)
        found = program.cache[key] = np.ones((size, len(holding)), dtype=bool)
        for row, k in enumerate(holding):
            bits = np.frombuffer(waits[k].to_bytes(-(-size // 8), "little"), dtype=np.uint8)
            found[:, row] = np.unpackbits(bits, count=size, bitorder="little") == 0
    return found


def _slowdown(program: Program, holding: list[int], rates: RateTimeline | None, start: float) -> Slowdown:
    shape = np.broadcast_shapes((program.num_ranks,), *(job.work_s.shape for op in program.ops for job in op.jobs))
    most: dict[str, float] = {}
    for index in holding:
        op = program.ops[index]
        most[op.lane] = max(most.get(op.lane, 0.0), op.sm_share)
    floor = float(np.prod([1.0 - share for share in most.values()]))
    return Slowdown(shape, [program.ops[index].sm_share for index in holding], floor, rates, start, serial=len(most) == 1)


def _ended_before(before: Times, since: float) -> np.ndarray:
    """Return bool per Op: has it ended on all ranks?"""
    if len({end.shape for end in before.end}) == 1:
        return np.stack(before.end).reshape(len(before.end), -1).max(axis=1) <= since
    return np.array([bool(end.max() <= since) for end in before.end])


def _sweep(
    program: Program,
    start: float,
    rates: RateTimeline | None,
    decided: dict[int, np.ndarray],
    ask: bool,
    keep_spans: bool,
    slow: Slowdown | None,
    before: Times | None,
    keep: np.ndarray | None,
) -> Times:
    free: dict[str, np.ndarray] = {}
    groups = program.cache
    idle = np.full(program.num_ranks, float(start))
    fail_R = rates.fail_R if rates is not None else None
    plain = rates is None and slow is None and ask and not keep_spans
    starts: list[np.ndarray] = []
    gates: list[np.ndarray | None] = []
    ends: list[np.ndarray] = []
    spans: list[tuple[Span, ...]] = []
    pending: dict[int, float] = {}
    beside, row = _beside(program) if slow is not None else np.zeros((len(program.ops), 0), dtype=bool), 0
    for index, op in enumerate(program.ops):
        if before is not None and keep is not None and keep[index]:
            ready, gate, end = before.start[index], before.gate[index], before.end[index]
            if keep_spans:
                spans.append(before.spans[index])
        else:
            ready = free.get(op.lane, idle)
            for dep in op.deps:
                ready = np.maximum(ready, ends[dep])
            if fail_R is not None:
                ready = np.where(ready >= fail_R, np.inf, ready)
            if op.ranks_R is not None:
                ready = np.where(op.ranks_R, ready, -np.inf)
            gate, peers = None, None
            if op.group_R is not None or op.source_R is not None:
                key = id(op.group_R if op.source_R is None else op.source_R)
                peers = groups.get(key)
                if peers is None:
                    peers = groups[key] = _Source(op.source_R) if op.source_R is not None else _Group(op.group_R)  # type: ignore[arg-type]
                gate = peers.max(ready)
            if plain:
                end = _end(op, index, ready, gate, decided)
            elif rates is not None and fail_R is None and slow is None and op.decide is None and op.ranks_R is None:
                end, used = _rated_end(op, ready, gate, rates)
                if keep_spans:
                    spans.append(used)
            else:
                end, used = _shared_end(op, index, ready, gate, peers, rates, slow, beside[index], decided, ask, pending)
                if keep_spans:
                    spans.append(used)
            if op.ranks_R is not None:
                end = np.where(op.ranks_R, end, -np.inf)
        if op.ranks_R is not None:
            free[op.lane] = np.where(op.ranks_R, end, free.get(op.lane, idle))
        else:
            free[op.lane] = end
        if slow is not None and op.sm_share > 0:
            slow.hold(row, ready, end)
            row += 1
        starts.append(ready)
        gates.append(gate)
        ends.append(end)
    finish = np.asarray(float(start)) if not free else np.max(np.stack([np.broadcast_to(lane, _shape(free)) for lane in free.values()]), axis=(0, -1))
    return Times(start=starts, gate=gates, end=ends, finish=finish, spans=spans, pending=pending)


def _shape(free: dict[str, np.ndarray]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(lane.shape for lane in free.values()))


def _end(op: Op, index: int, ready: np.ndarray, gate: np.ndarray | None, decided: dict[int, np.ndarray]) -> np.ndarray:
    end: np.ndarray | None = None
    for position, job in enumerate(op.jobs):
        work = job.work_s
        if position == 0 and op.decide is not None:
            if index not in decided:
                decided[index] = np.asarray(op.decide(ready), dtype=np.float64)
            work = decided[index]
        done = (gate if job.side == "recv" and gate is not None else ready) + work
        end = done if end is None else np.maximum(end, done)
    return end if end is not None else ready


def _rated_end(op: Op, ready: np.ndarray, gate: np.ndarray | None, rates: RateTimeline) -> tuple[np.ndarray, tuple[Span, ...]]:
    """Return what `_shared_end` does where ports are shared and nothing else happens."""
    used: list[Span] = []
    latest: np.ndarray | None = None
    for job in op.jobs:
        begin = gate if gate is not None and job.side == "recv" else ready
        end = rates.finish(job.port, begin, job.work_s)
        used.append((begin, end))
        latest = end if latest is None else np.maximum(latest, end)
    assert latest is not None
    return latest, tuple(used)


def _shared_end(
    op: Op,
    index: int,
    ready: np.ndarray,
    gate: np.ndarray | None,
    peers: _Group | _Source | None,
    rates: RateTimeline | None,
    slow: Slowdown | None,
    beside: np.ndarray,
    decided: dict[int, np.ndarray],
    ask: bool,
    pending: dict[int, float],
) -> tuple[np.ndarray, tuple[Span, ...]]:
    """Return when the Op ends, and when its Jobs use their ports, with ports that are shared, ranks that fail and hooks that wait."""
    fail_R = rates.fail_R if rates is not None else None
    ends: list[np.ndarray] = []
    begins: list[np.ndarray] = []
    for position, job in enumerate(op.jobs):
        begin = gate if job.side == "recv" and gate is not None else ready
        begins.append(begin)
        work = job.work_s
        if position == 0 and op.decide is not None:
            if index not in decided:
                if not ask:
                    first = float(np.min(ready if op.ranks_R is None else ready[..., op.ranks_R], initial=np.inf))
                    if first < np.inf:
                        pending[index] = first
                    ends.append(np.full(ready.shape, np.inf))
                    continue
                decided[index] = np.asarray(op.decide(ready), dtype=np.float64)
            work = decided[index]
        if slow is not None and job.port == SM and op.sm_share == 0:
            ends.append(slow.finish(begin, work, beside))
        elif rates is not None:
            ends.append(rates.finish(job.port, begin, work))
        else:
            ends.append(begin + work)
    if op.ranks_R is not None:
        ends = [np.where(op.ranks_R, end, -np.inf) for end in ends]
    if fail_R is None:
        return _latest(ends), tuple(zip(begins, ends, strict=True))
    # A rank that fails before its sends are over leaves its peers' receives unfinished from then on.
    cut: np.ndarray = np.broadcast_to(fail_R, ready.shape)
    sends = [end for job, end in zip(op.jobs, ends, strict=True) if job.side == "send"]
    lost = cut
    if peers is not None:
        broken = np.where(_latest(sends) > fail_R, fail_R, np.inf) if sends else np.full(ready.shape, np.inf)
        if op.ranks_R is not None:
            broken = np.where(op.ranks_R, broken, np.inf)
        lost = np.minimum(cut, -peers.max(-broken))
    cuts = [lost if job.side == "recv" else cut for job in op.jobs]
    used = tuple((begin, np.minimum(end, border)) for begin, end, border in zip(begins, ends, cuts, strict=True))
    return _latest([np.where(end > border, np.inf, end) for end, border in zip(ends, cuts, strict=True)]), used


def _latest(ends: list[np.ndarray]) -> np.ndarray:
    latest = ends[0]
    for end in ends[1:]:
        latest = np.maximum(latest, end)
    return latest
