"""The engine: simpy's clock moves between decision points; what lies between is evaluated as arrays.

An Actor (a simpy process) calls `yield from engine.execute(program)`. The Program is evaluated at once, as if
nothing else happened; if a Flow starts or ends before it is over, the rates change from that moment on and the
Program is evaluated again. Evaluation is pure, so nothing is undone. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy

from moesim.errors import SimulationError
from moesim.sim.evaluate import Times, evaluate
from moesim.sim.flows import Busy, Flow, Hop, claims, finish_time, is_done, moved, op_share, rate_steps
from moesim.sim.ops import Program
from moesim.sim.timeline import RateTimeline


@dataclass(slots=True, eq=False)
class _Running:
    """A Program that has started and not yet ended."""

    program: Program
    start_s: float
    times: Times
    decided: dict[int, np.ndarray]


class Engine:
    """One simulated cluster of `num_ranks` ranks with one clock."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.env = simpy.Environment()
        self.flows: list[Flow] = []
        self.evaluations = 0
        self._running: list[_Running] = []
        self._rates = RateTimeline(num_ranks)
        self._ports_touched: set[str] = set()
        self._changed = self.env.event()
        self._settled_s = 0.0
        self._generation = 0

    @property
    def now(self) -> float:
        """The clock, s."""
        return float(self.env.now)

    # --- programs --------------------------------------------------------------------------------

    def execute(self, program: Program) -> Generator[Any, Any, Times]:
        """Run `program` from now on; a simpy generator that ends when the last rank has finished, and returns its Times."""
        self._settle()
        run = _Running(program, self.now, None, {})  # type: ignore[arg-type]
        self._running.append(run)
        while True:
            self._evaluate(run)
            self._schedule_flow_end()
            end = float(np.max(run.times.finish))
            changed = self._changed
            over = self.env.timeout(max(end - self.now, 0.0))
            yield over | changed
            if over.processed:
                break
        self._settle()
        self._running.remove(run)
        if not self._running:
            self._rates.forget_before(self.now)
        self._schedule_flow_end()
        return run.times

    def execute_passes(self, program: Program) -> Generator[Any, Any, Times]:
        """Run the P independent passes of `program` one after another as one event; Times count from 0 in every pass.

        Raises SimulationError if Flows are in flight: then passes have to be executed one by one.
        """
        if self.flows or self._running:
            raise SimulationError("engine: passes side by side need the cluster for themselves; execute them one by one while flows are in flight")
        self.evaluations += 1
        times = evaluate(program, 0.0)
        yield self.env.timeout(float(np.sum(times.finish)))
        return times

    def _evaluate(self, run: _Running) -> None:
        self.evaluations += 1
        run.times = evaluate(run.program, run.start_s, self._rates if self._ports_touched else None, run.decided)

    # --- flows -----------------------------------------------------------------------------------

    def start_flow(self, flow: Flow) -> simpy.Event:
        """Put `flow` in flight now; return the event that fires when it has arrived."""
        self._settle()
        flow.done = self.env.event()
        flow.start_s = self.now
        self.flows.append(flow)
        self._flows_changed()
        return flow.done

    def cancel_flow(self, flow: Flow) -> None:
        """Take `flow` out of flight; what has been moved stays moved and its event never fires."""
        self._settle()
        if flow in self.flows:
            self.flows.remove(flow)
            flow.end_s = self.now
            self._flows_changed()

    def _flows_changed(self) -> None:
        sharing = claims(self.flows)
        self._ports_touched |= {port for port, _ in sharing}
        for port in sorted(self._ports_touched):
            rate = np.ones(self.num_ranks)
            for (name, rank), flows in sharing.items():
                if name == port:
                    rate[rank] = op_share(flows)
            self._rates.set(port, self.now, rate)
        self._changed.succeed()
        self._changed = self.env.event()
        self._schedule_flow_end()

    def _settle(self) -> None:
        """Book what every Flow has moved since the last decision point."""
        if self.flows and self.now > self._settled_s:
            sharing, busy = claims(self.flows), self._busy()
            for flow in self.flows:
                times, rates = rate_steps(flow, sharing, busy, self._settled_s)
                flow.left_bytes = max(0.0, flow.left_bytes - moved(times, rates, self.now))
        self._settled_s = self.now

    def _schedule_flow_end(self) -> None:
        self._generation += 1
        if not self.flows:
            return
        sharing, busy = claims(self.flows), self._busy()
        ends = [finish_time(*rate_steps(flow, sharing, busy, self.now), flow.left_bytes) for flow in self.flows]
        first = min(ends)
        if np.isfinite(first):
            due = [flow for flow, end in zip(self.flows, ends, strict=True) if end == first]
            self.env.process(self._end_flows(self._generation, max(first - self.now, 0.0), due))

    def _end_flows(self, generation: int, delay: float, due: list[Flow]) -> Generator[Any, Any, None]:
        yield self.env.timeout(delay)
        if generation != self._generation:
            return
        self._settle()
        for flow in [flow for flow in self.flows if flow in due or is_done(flow)]:
            self.flows.remove(flow)
            flow.left_bytes = 0.0
            flow.end_s = self.now
            flow.done.succeed()
        self._flows_changed()

    def _busy(self) -> dict[Hop, Busy]:
        """Return when running Programs use the ports that Flows claim."""
        hops = {hop for flow in self.flows for hop in flow.path}
        intervals: dict[Hop, list[tuple[np.ndarray, np.ndarray]]] = {hop: [] for hop in hops}
        for run in self._running:
            if run.times is None:
                continue
            for port in {port for port, _ in hops}:
                begin, end = self._port_intervals(run, port)
                for name, rank in hops:
                    if name == port and len(begin):
                        intervals[(name, rank)].append((begin[:, rank], end[:, rank]))
        return {hop: Busy.union(np.concatenate([b for b, _ in parts]), np.concatenate([e for _, e in parts])) for hop, parts in intervals.items() if parts}

    def _port_intervals(self, run: _Running, port: str) -> tuple[np.ndarray, np.ndarray]:
        """Return [J, R] begin and end of the Jobs of a running Program on `port`."""
        begins, ends = [], []
        for index, op in enumerate(run.program.ops):
            for position, job in enumerate(op.jobs):
                if job.port != port:
                    continue
                work = run.decided.get(index, job.work_s) if position == 0 else job.work_s
                gate = run.times.gate[index]
                begin = np.broadcast_to(gate if job.side == "recv" and gate is not None else run.times.start[index], (self.num_ranks,))
                begin = begin if op.ranks_R is None else np.where(op.ranks_R, begin, run.start_s)
                work = work if op.ranks_R is None else np.where(op.ranks_R, work, 0.0)
                begins.append(begin)
                ends.append(self._rates.finish(port, begin, work))
        empty = np.zeros((0, self.num_ranks))
        return (np.stack(begins), np.stack(ends)) if begins else (empty, empty)
