"""A reference engine: one simpy process per rank and Op, no arrays, nothing shared with `moesim.sim` but what Ops and Flows declare.

Slow and plain on purpose. A Job or a Flow keeps its remaining work and looks again at its rate whenever anything
that could change it has changed. Shares are found by asking every port in turn.
"""

from __future__ import annotations

from collections.abc import Generator
from math import ceil, inf
from typing import Any

import numpy as np
import simpy

from moesim.sim.flows import Flow
from moesim.sim.ops import Op, Program

Hop = tuple[str, int]


def share_out(claims: list[tuple[float, float, dict[Any, float]]], room: dict[Any, float]) -> list[float]:
    """Max-min: (weight, limit, {port: use per rate}) of every claim → its rate."""
    rates: dict[int, float] = {}
    while len(rates) < len(claims):
        offers = {}
        for port, capacity in room.items():
            open_load = sum(weight * use.get(port, 0.0) for i, (weight, _, use) in enumerate(claims) if i not in rates)
            if open_load > 0:
                taken = sum(rates[i] * use.get(port, 0.0) for i, (_, _, use) in enumerate(claims) if i in rates)
                offers[port] = max(capacity - taken, 0.0) / open_load
        best, who = inf, None
        for i, (weight, limit, use) in enumerate(claims):
            if i not in rates:
                level = min([limit / weight] + [offers[port] for port in use])
                if level < best:
                    best, who = level, i
        assert who is not None
        rates[who] = claims[who][0] * best
    return [rates[i] for i in range(len(claims))]


class ReferenceEngine:
    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.flows: list[Flow] = []
        self.left: dict[Flow, float] = {}
        self.rate: dict[Flow, float] = {}
        self.since: dict[Flow, float] = {}
        self.inside: set[Flow] = set()
        self.cancelled: set[Flow] = set()
        self.busy: dict[Hop, int] = {}
        self.holding: dict[int, list[float]] = {}
        self.dead: set[int] = set()
        self.changed = self.env.event()
        self.start: dict[tuple[int, int, int], float] = {}
        self.end: dict[tuple[int, int, int], float] = {}

    def _notify(self) -> None:
        self.changed.succeed()
        self.changed = self.env.event()

    def fail_rank(self, rank: int) -> None:
        self.dead.add(rank)
        for flow in list(self.flows):
            if any(owner == rank for _, owner in flow.path):
                self.flows.remove(flow)
        self._arbitrate()
        self._notify()

    # --- programs --------------------------------------------------------------------------------

    def execute(self, program: Program, name: int = 0) -> Generator[Any, Any, None]:
        everything = [(i, r) for i in range(len(program.ops)) for r in range(program.num_ranks)]
        finished = {key: self.env.event() for key in everything}
        arrived = {key: self.env.event() for key in everything}
        sent: set[tuple[int, int]] = set()
        decisions: dict[int, Any] = {}
        last: dict[tuple[str, int], int] = {}
        for index, op in enumerate(program.ops):
            for rank in range(program.num_ranks):
                if op.ranks_R is not None and not op.ranks_R[rank]:
                    finished[index, rank].succeed()
                    arrived[index, rank].succeed()
                    continue
                waits = [finished[dep, rank] for dep in op.deps]
                if (op.lane, rank) in last:
                    waits.append(finished[last[op.lane, rank], rank])
                last[op.lane, rank] = index
                self.env.process(self._op(name, index, op, rank, waits, arrived, finished, sent, decisions, program))
        yield self.env.all_of(list(finished.values()))

    def _peers(self, op: Op, rank: int, program: Program) -> list[int]:
        ranks = [r for r in range(program.num_ranks) if op.ranks_R is None or op.ranks_R[r]]
        if op.source_R is not None:
            return [r for r in ranks if r in (rank, op.source_R[rank])]
        if op.group_R is not None:
            return [r for r in ranks if op.group_R[r] == op.group_R[rank]]
        return [rank]

    def _op(
        self,
        name: int,
        index: int,
        op: Op,
        rank: int,
        waits: list[simpy.Event],
        arrived: Any,
        finished: Any,
        sent: set[tuple[int, int]],
        decisions: dict[int, Any],
        program: Program,
    ) -> Any:
        for event in waits:
            if not event.processed:
                yield event
        if rank in self.dead:
            return
        self.start[name, index, rank] = self.env.now
        arrived[index, rank].succeed()
        if op.sm_share:
            self.holding.setdefault(rank, []).append(op.sm_share)
            self._notify()
        jobs, sends = [], []
        for position, job in enumerate(op.jobs):
            work = float(job.work_s[rank])
            if position == 0 and op.decide is not None:
                if index not in decisions:
                    decisions[index] = op.decide(np.full(program.num_ranks, self.env.now))
                work = float(decisions[index][rank])
            peers = self._peers(op, rank, program) if job.side == "recv" else []
            process = self.env.process(self._job(job.port, rank, work, index, peers, arrived, sent, op.sm_share == 0))
            jobs.append(process)
            if job.side == "send":
                sends.append(process)
        yield self.env.all_of(sends)
        sent.add((index, rank))
        yield self.env.all_of(jobs)
        if op.sm_share:
            self.holding[rank].remove(op.sm_share)
            self._notify()
        self.end[name, index, rank] = self.env.now
        finished[index, rank].succeed()

    def _job(self, port: str, rank: int, work: float, index: int, peers: list[int], arrived: Any, sent: set[tuple[int, int]], slowed: bool) -> Any:
        def never() -> bool:
            return rank in self.dead or any(peer in self.dead and (index, peer) not in sent for peer in peers)

        for peer in peers:
            if not arrived[index, peer].processed:
                yield arrived[index, peer]
        if never():
            yield self.env.event()
        if work == 0:
            return
        self.busy[port, rank] = self.busy.get((port, rank), 0) + 1
        self._notify()
        left = work
        while True:
            rate = self._op_share((port, rank))
            if port == "sm" and slowed:
                for share in self.holding.get(rank, []):
                    rate *= 1 - share
            began = self.env.now
            over = self.env.timeout(left / rate)
            yield over | self.changed
            if over.processed:
                break
            left = max(0.0, left - rate * (self.env.now - began))
            if never():
                self.busy[port, rank] -= 1
                self._notify()
                yield self.env.event()
        self.busy[port, rank] -= 1
        self._notify()

    # --- flows -----------------------------------------------------------------------------------

    def _moving(self) -> list[Flow]:
        return [flow for flow in self.flows if flow.discipline != "fifo" or flow in self.inside]

    def _width(self, hop: Hop) -> float:
        return max(flow.path[hop] for flow in self._moving() if hop in flow.path)

    def _op_share(self, hop: Hop) -> float:
        """The share that a claim of weight 1 gets if every flow of class 0 wants its narrowest port's rate."""
        flows = [flow for flow in self._moving() if hop in flow.path and self._level(flow) == 0]
        if not flows:
            return 1.0
        width = self._width(hop)
        claims = [(1.0, inf, {hop: 1.0})] + [(flow.weight, min(flow.path.values()), {hop: width / flow.path[hop]}) for flow in flows]
        return share_out(claims, {hop: width})[0] / width

    @staticmethod
    def _level(flow: Flow) -> int:
        return flow.priority + (1 if flow.discipline == "low" else 0)

    def _rates(self) -> dict[Flow, float]:
        moving = self._moving()
        hops = {hop for flow in moving for hop in flow.path}
        busy = {hop for hop in hops if self.busy.get(hop, 0) > 0}
        result: dict[Flow, float] = {}
        used = dict.fromkeys(hops, 0.0)
        for level in sorted({self._level(flow) for flow in moving}):
            mine = [flow for flow in moving if self._level(flow) == level]
            room = {}
            for hop in hops:
                width = self._width(hop)
                if hop in busy:
                    room[hop] = width * (1 - self._op_share(hop)) if level == 0 else 0.0
                else:
                    room[hop] = width - used[hop]
                    room[hop] = room[hop] if room[hop] > 1e-12 * width else 0.0
            rates = share_out([(flow.weight, inf, {hop: self._width(hop) / rate for hop, rate in flow.path.items()}) for flow in mine], room)
            for flow, rate in zip(mine, rates, strict=True):
                result[flow] = rate
                for hop, bandwidth in flow.path.items():
                    used[hop] += rate * self._width(hop) / bandwidth
        return result

    def _left(self, flow: Flow) -> float:
        return self.left[flow] - self.rate.get(flow, 0.0) * (self.env.now - self.since[flow])

    def _border(self, flow: Flow) -> float:
        """Bytes left at the next chunk border; now's, if it is at one."""
        size = flow.chunk_bytes or flow.total_bytes
        return max(0.0, flow.total_bytes - size * ceil((flow.total_bytes - self._left(flow)) / size - 1e-9))

    def _mid_chunk(self, flow: Flow) -> bool:
        return self._left(flow) - self._border(flow) > 1e-9 * (flow.chunk_bytes or flow.total_bytes)

    def _arbitrate(self) -> None:
        """Let fifo flows in: first those that are in the middle of a chunk, then by class and arrival; one that waits holds up younger ones."""
        queue = [flow for flow in self.flows if flow.discipline == "fifo"]
        ranked = [flow for flow in queue if flow in self.inside and self._mid_chunk(flow)]
        ranked += sorted((flow for flow in queue if flow not in ranked), key=self._level)
        self.inside = set()
        for place, flow in enumerate(ranked):
            if not any(set(flow.path) & set(other.path) for other in ranked[:place]):
                self.inside.add(flow)

    def _stop(self, flow: Flow) -> float:
        waiting = [other for other in self.flows if other.discipline == "fifo" and other not in self.inside]
        gives_way = flow.discipline == "fifo" and any(self._level(other) < self._level(flow) and set(other.path) & set(flow.path) for other in waiting)
        border = flow in self.cancelled or gives_way
        return self._border(flow) if border else 0.0

    def start_flow(self, flow: Flow) -> None:
        flow.start_s = self.env.now
        self.left[flow], self.since[flow] = flow.total_bytes, self.env.now
        self.flows.append(flow)
        self._arbitrate()
        self.env.process(self._flow(flow))
        self._notify()

    def cancel_flow(self, flow: Flow) -> None:
        if flow in self.flows:
            self.cancelled.add(flow)
            if flow.chunk_bytes is None or not self._mid_chunk(flow):
                flow.end_s = self.env.now
                flow.left_bytes = self._left(flow)
                self.flows.remove(flow)
            self._arbitrate()
            self._notify()

    def _flow(self, flow: Flow) -> Any:
        while True:
            self.left[flow], self.since[flow] = self._left(flow), self.env.now
            self.rate[flow] = rate = self._rates().get(flow, 0.0)
            stop = self._stop(flow)
            if rate == 0:
                yield self.changed
            else:
                over = self.env.timeout(max(self.left[flow] - stop, 0.0) / rate)
                yield over | self.changed
                if over.processed and flow in self.flows:
                    self.left[flow], self.since[flow] = stop, self.env.now
                    if stop == 0 or flow in self.cancelled:
                        break
                    self._arbitrate()
                    self._notify()
            if flow not in self.flows:
                return
        flow.end_s = self.env.now
        flow.left_bytes = stop
        self.flows.remove(flow)
        self._arbitrate()
        self._notify()
