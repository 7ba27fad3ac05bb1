"""A reference engine: one simpy process per rank and Op, no arrays, nothing shared with `moesim.sim` but the Ops.

Slow and plain on purpose. A Job or a Flow keeps its remaining work and looks again at its rate whenever anything
that could change it has changed.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy

from moesim.sim.flows import Flow
from moesim.sim.ops import Op, Program


class ReferenceEngine:
    def __init__(self) -> None:
        self.env = simpy.Environment()
        self.flows: list[Flow] = []
        self.busy: dict[tuple[str, int], int] = {}
        self.changed = self.env.event()
        self.start: dict[tuple[int, int, int], float] = {}
        self.end: dict[tuple[int, int, int], float] = {}

    def _notify(self) -> None:
        self.changed.succeed()
        self.changed = self.env.event()

    # --- programs --------------------------------------------------------------------------------

    def execute(self, program: Program, name: int = 0) -> Generator[Any, Any, None]:
        finished = {(i, r): self.env.event() for i in range(len(program.ops)) for r in range(program.num_ranks)}
        arrived: dict[tuple[int, int], simpy.Event] = {(i, r): self.env.event() for i in range(len(program.ops)) for r in range(program.num_ranks)}
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
                self.env.process(self._op(name, index, op, rank, waits, arrived, finished, decisions, program))
        yield self.env.all_of(list(finished.values()))

    def _members(self, op: Op, rank: int, program: Program) -> list[int]:
        ranks = [r for r in range(program.num_ranks) if op.ranks_R is None or op.ranks_R[r]]
        return [r for r in ranks if op.group_R is None or op.group_R[r] == op.group_R[rank]]

    def _op(
        self, name: int, index: int, op: Op, rank: int, waits: list[simpy.Event], arrived: Any, finished: Any, decisions: dict[int, Any], program: Program
    ) -> Any:
        for event in waits:
            if not event.processed:
                yield event
        self.start[name, index, rank] = self.env.now
        arrived[index, rank].succeed()
        jobs = []
        for position, job in enumerate(op.jobs):
            work = float(job.work_s[rank])
            if position == 0 and op.decide is not None:
                if index not in decisions:
                    import numpy as np

                    decisions[index] = op.decide(np.full(program.num_ranks, self.env.now))
                work = float(decisions[index][rank])
            gates = [arrived[index, r] for r in self._members(op, rank, program)] if job.side == "recv" else []
            jobs.append(self.env.process(self._job(job.port, rank, work, gates)))
        yield self.env.all_of(jobs)
        self.end[name, index, rank] = self.env.now
        finished[index, rank].succeed()

    def _job(self, port: str, rank: int, work: float, gates: list[simpy.Event]) -> Any:
        for gate in gates:
            if not gate.processed:
                yield gate
        if work == 0:
            return
        self.busy[port, rank] = self.busy.get((port, rank), 0) + 1
        self._notify()
        left = work
        while True:
            rate = 1.0 / (1 + sum(flow.discipline == "fair" and (port, rank) in flow.path for flow in self.flows))
            began = self.env.now
            over = self.env.timeout(left / rate)
            yield over | self.changed
            if over.processed:
                break
            left = max(0.0, left - rate * (self.env.now - began))
        self.busy[port, rank] -= 1
        self._notify()

    # --- flows -----------------------------------------------------------------------------------

    def start_flow(self, flow: Flow) -> None:
        self.flows.append(flow)
        flow.start_s = self.env.now
        self.env.process(self._flow(flow))
        self._notify()

    def _rate(self, flow: Flow) -> float:
        rates = []
        for hop, bandwidth in flow.path.items():
            fair = sum(hop in other.path and other.discipline == "fair" for other in self.flows)
            low = sum(hop in other.path and other.discipline == "low" for other in self.flows)
            active = self.busy.get(hop, 0) > 0
            if flow.discipline == "fair":
                rates.append(bandwidth / (fair + active))
            else:
                rates.append(0.0 if active or fair else bandwidth / low)
        return min(rates)

    def _flow(self, flow: Flow) -> Any:
        left = flow.total_bytes
        while left > 1e-12 * max(flow.total_bytes, 1.0):
            rate = self._rate(flow)
            began = self.env.now
            if rate == 0:
                yield self.changed
                continue
            over = self.env.timeout(left / rate)
            yield over | self.changed
            left = 0.0 if over.processed else left - rate * (self.env.now - began)
        flow.end_s = self.env.now
        self.flows.remove(flow)
        self._notify()
