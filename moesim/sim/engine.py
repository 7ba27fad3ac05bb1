"""The engine: simpy's clock moves between decision points; what lies between is evaluated as arrays.

An Actor (a simpy process) calls `yield from engine.execute(program)`. The Program is evaluated at once, as if
nothing else happened; if a Flow starts or ends before it is over and changes a rate, or a rank fails, the Program is
evaluated again. Evaluation is pure, so nothing is undone. A rank that fails finishes no Op from then on; once nothing
else can move, `execute` raises `RanksStuck`, which names the ranks that wait and what they wait in. Times in seconds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import simpy

from moesim.errors import SimulationError, describe
from moesim.sim.evaluate import Times, evaluate
from moesim.sim.flows import Allocation, Busy, Flow, Hop, Steps, serve
from moesim.sim.ops import Program
from moesim.sim.timeline import RateTimeline

MAX_DIVISIONS = 64
"""Divisions of the ports among Flows that an Engine remembers."""


class RanksStuck(SimulationError):
    """A Program that cannot end because ranks have failed."""

    ranks: tuple[int, ...] = ()
    """Ranks with an Op that will never end."""
    failed: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    """First such Op of every stuck rank."""
    times: Times
    """Of the Program; inf where nothing ends."""


def _short(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8])
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


@dataclass(slots=True, eq=False)
class _Running:
    """A Program that has started and not yet ended."""

    program: Program
    start_s: float
    ask: bool
    times: Times | None = None
    decided: dict[int, np.ndarray] = field(default_factory=dict)
    busy: dict[Hop, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Port → begin and end of the Jobs on it, as far as somebody wanted to know."""


class Engine:
    """One simulated cluster of `num_ranks` ranks with one clock."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.env = simpy.Environment()
        self.flows: list[Flow] = []
        """In flight, in the order of their start."""
        self.evaluations = 0
        self.stuck: list[RanksStuck] = []
        """Programs that could not end."""
        self._running: list[_Running] = []
        self._rates = RateTimeline(num_ranks)
        self._shared_ports: set[str] = set()
        self._changed = self.env.event()
        self._changed_s = -np.inf
        self._settled_s = 0.0
        self._generation = 0
        self._allocation = Allocation([])
        self._divisions: dict[tuple, Allocation] = {}
        """Of sets of Flows by their paths, classes and weights: a Flow often follows one of its kind."""
        self._steps: Steps | None = None

    @property
    def now(self) -> float:
        """The clock, s."""
        return float(self.env.now)

    # --- programs --------------------------------------------------------------------------------

    def execute(self, program: Program, *, hooks: Literal["ahead", "reached"] = "ahead") -> Generator[Any, Any, Times]:
        """Run `program` from now on; a simpy generator that ends when the last rank has finished, and returns its Times.

        hooks: `ahead` asks them in order of issue, with the times that evaluation expects; `reached` when the clock gets to the first rank that
        reaches the Op, with that time for all ranks. Raises RanksStuck if it cannot end because ranks have failed.
        """
        if program.num_ranks != self.num_ranks:
            raise SimulationError(f"engine: the program is for {program.num_ranks} ranks, the cluster has {self.num_ranks}")
        self._settle()
        run = _Running(program, self.now, hooks == "ahead")
        self._running.append(run)
        try:
            while True:
                stamp = self._rates.stamp()
                times = self._evaluate(run)
                self._schedule_stop()
                end = float(np.max(times.finish))
                wake = min(times.pending.values(), default=end)
                if wake == np.inf:
                    wake = self._last_event(times)
                changed = self._changed
                over = self.env.timeout(max(wake - self.now, 0.0))
                yield over | changed
                while not over.processed and times.spans and self._rates.stamp() == stamp:
                    # One Flow has taken the place of another: the Ops notice nothing.
                    yield over | self._changed
                if not over.processed:
                    continue
                if not times.pending:
                    break
                self._settle()
                for index, first in times.pending.items():
                    hook = program.ops[index].decide
                    if first <= wake and hook is not None:
                        run.decided[index] = np.asarray(hook(np.full(self.num_ranks, self.now)), dtype=np.float64)
        finally:
            self._settle()
            self._running.remove(run)
            if not self._running:
                self._rates.forget_before(self.now)
            self._schedule_stop()
        if end == np.inf:
            stuck = self._describe_stuck(run, times)
            self.stuck.append(stuck)
            raise stuck
        return times

    def execute_passes(self, program: Program) -> Generator[Any, Any, Times]:
        """Run the P independent passes of `program` one after another as one event; Times count from 0 in every pass.

        Raises SimulationError if Flows are in flight or a rank has failed: then passes have to be executed one by one.
        """
        if self.flows or self._running or self._rates.fail_R is not None:
            raise SimulationError("engine: passes side by side need the cluster for themselves; execute them one by one while flows are in flight")
        self.evaluations += 1
        times = evaluate(program, 0.0)
        yield self.env.timeout(float(np.sum(times.finish)))
        return times

    def _evaluate(self, run: _Running) -> Times:
        self.evaluations += 1
        contended = bool(self.flows) or not self._rates.is_plain
        before = run.times if contended and run.times is not None and run.times.spans else None
        run.times = evaluate(run.program, run.start_s, self._rates, run.decided, ask=run.ask, spans=contended, before=before, since=self.now)
        if run.times.finish.size > 1:
            raise SimulationError("engine: a program of several passes cannot meet flows; execute its passes one by one, or use execute_passes")
        run.busy = {}
        return run.times

    def _last_event(self, times: Times) -> float:
        """Return when nothing moves any more: sends to a rank that has failed still run to their end."""
        ends = np.concatenate([np.ravel(end) for spans in times.spans for _, end in spans])
        return max(float(ends[np.isfinite(ends)].max(initial=self.now)), self.now)

    def _describe_stuck(self, run: _Running, times: Times) -> RanksStuck:
        first: dict[int, str] = {}
        for op, end in zip(run.program.ops, times.end, strict=True):
            for rank in np.flatnonzero(np.broadcast_to(end == np.inf, (1, self.num_ranks))[0]).tolist():
                first.setdefault(rank, op.label)
        ranks = tuple(sorted(first))
        labels = tuple(first[rank] for rank in ranks)
        failed = self.failed_ranks
        stuck = RanksStuck(f"program: ranks {_short(ranks)} are stuck in {', '.join(sorted(set(labels)))} because ranks {_short(failed)} have failed")
        stuck.ranks, stuck.failed, stuck.labels, stuck.times = ranks, failed, labels, times
        return stuck

    # --- failures --------------------------------------------------------------------------------

    @property
    def failed_ranks(self) -> tuple[int, ...]:
        """Ranks that have stopped."""
        return () if self._rates.fail_R is None else tuple(np.flatnonzero(np.isfinite(self._rates.fail_R)).tolist())

    def fail_rank(self, rank: int) -> None:
        """Stop `rank` now and for good: its Ops and Flows in flight never finish, nor do receives from sends that it had not ended."""
        if not 0 <= rank < self.num_ranks:
            raise SimulationError(describe("engine", "rank", rank, f"must be in 0..{self.num_ranks - 1} to fail"))
        self._settle()
        self._rates.fail(rank, self.now)
        self._announce()
        for flow in [flow for flow in self.flows if rank in (flow.ranks or [owner for _, owner in flow.path])]:
            flow.lost = True
            self._remove(flow)
        self._flows_changed()

    def restore_ranks(self) -> None:
        """Let all ranks work again, for Programs that start from now on. Raises SimulationError while one runs."""
        if self._running:
            raise SimulationError("engine: ranks can only come back between programs")
        self._rates.fail_R = None

    # --- flows -----------------------------------------------------------------------------------

    def start_flow(self, flow: Flow) -> simpy.Event:
        """Put `flow` in flight now; return the event that fires when it has arrived."""
        if flow.done is not None:
            raise SimulationError(f"flow {flow.name}: has been started before; a flow is in flight once")
        self._settle()
        flow.done, flow.gone = self.env.event(), self.env.event()
        flow.start_s = self.now
        self.flows.append(flow)
        self._flows_changed()
        return flow.done

    def cancel_flow(self, flow: Flow) -> simpy.Event:
        """Take `flow` out of flight at its next chunk border; return the event of its leaving. What has moved stays moved; `done` never fires.

        If the border is its end, it arrives after all. A Flow without chunks leaves at once.
        """
        if flow in self.flows and not flow.cancelled:
            self._settle()
            flow.cancelled = True
            if flow.chunk_bytes is None or flow.at_border:
                self._remove(flow)
            self._flows_changed()
        return flow.gone

    def split_flow(self, flow: Flow) -> Flow | None:
        """Cut `flow` at its next chunk border: it ends there, and the Flow returned, not yet started, carries the rest; None if nothing is left."""
        self._settle()
        border = 0.0 if flow.chunk_bytes is None else flow.border_bytes
        if flow.chunk_bytes is not None and flow.at_border and flow.left_bytes > 0:
            border = max(border - flow.chunk_bytes, 0.0)
        if flow not in self.flows or border <= 0:
            return None
        flow.total_bytes -= border
        flow.left_bytes -= border
        self._flows_changed()
        return Flow(f"{flow.name}.rest", border, flow.path, flow.discipline, flow.priority, flow.weight, flow.chunk_bytes, flow.ranks)

    def _remove(self, flow: Flow) -> None:
        self.flows.remove(flow)
        flow.end_s = self.now if not flow.lost else np.inf
        flow.gone.succeed()

    def _flows_changed(self) -> None:
        """Divide the ports anew; tell the running Programs if that changes a rate of theirs."""
        served = serve(self.flows)
        kinds = tuple((tuple(flow.path.items()), flow.level, flow.weight) for flow in served)
        known = self._divisions.get(kinds)
        if known is None:
            if len(self._divisions) >= MAX_DIVISIONS:
                self._divisions.clear()
            known = self._divisions[kinds] = Allocation(served)
        self._allocation = known.again(served)
        wanted = {port: np.ones(self.num_ranks) for port in self._shared_ports}
        for (port, rank), share in zip(self._allocation.hops, self._allocation.op_share_P.tolist(), strict=True):
            # A port of a node, NIC or root has no Ops: they name the ports of ranks.
            if share < 1 and rank < self.num_ranks:
                wanted.setdefault(port, np.ones(self.num_ranks))[rank] = share
        changed = [self._rates.set(port, self.now, wanted[port]) for port in sorted(wanted)]
        self._shared_ports = {port for port, rates in wanted.items() if (rates < 1).any()}
        if any(changed) or any(run.times is not None and not run.times.spans for run in self._running):
            self._announce()
        self._schedule_stop()

    def _announce(self) -> None:
        self._changed.succeed()
        self._changed = self.env.event()

    def _settle(self) -> None:
        """Book what every Flow has moved since the last decision point."""
        if self._steps is not None and self.now > self._settled_s:
            self._steps.settle(self.now)
        self._settled_s = self.now

    def _schedule_stop(self) -> None:
        """Wait for the first Flow that arrives or gives way, as long as nothing changes."""
        self._generation += 1
        self._steps = None
        if not self.flows:
            return
        self._steps = self._allocation.steps(self._busy(), self.now)
        first, due = self._steps.next_stop()
        if first < np.inf:
            generation = self._generation
            timer = self.env.timeout(max(first - self.now, 0.0))
            timer.callbacks.append(lambda _: self._stop_flows(generation, due))

    def _stop_flows(self, generation: int, due: list[Flow]) -> None:
        if generation != self._generation:
            return
        self._settle()
        for flow in due:
            flow.left_bytes = flow.stop_bytes
        for flow in list(self.flows):
            if flow.is_done:
                flow.left_bytes = 0.0
                self._remove(flow)
                flow.done.succeed()
            elif flow.cancelled and flow.at_border:
                self._remove(flow)
        self._flows_changed()

    def _busy(self) -> dict[Hop, Busy]:
        """Return when running Programs use the ports that Flows cross."""
        result: dict[Hop, Busy] = {}
        for hop in self._allocation.hops:
            parts = [self._intervals(run, hop) for run in self._running if hop[1] < self.num_ranks and run.times is not None and run.times.spans]
            parts = [part for part in parts if len(part[0])]
            if parts:
                result[hop] = Busy.union(np.concatenate([begin for begin, _ in parts]), np.concatenate([end for _, end in parts]))
        return result

    def _intervals(self, run: _Running, hop: Hop) -> tuple[np.ndarray, np.ndarray]:
        """Return begin and end of the Jobs of a running Program on one port of a rank."""
        known = run.busy.get(hop)
        if known is None and run.times is not None:
            port, rank = hop
            spans = [run.times.spans[index][position] for index, position in _jobs_on(run.program, port)]
            begin, end = ([span[side].item(rank if span[side].size > 1 else 0) for span in spans] for side in (0, 1))
            known = run.busy[hop] = np.array(begin), np.array(end)
        return known if known is not None else (np.zeros(0), np.zeros(0))


def _jobs_on(program: Program, port: str) -> list[tuple[int, int]]:
    """Return (op, job) of every Job on `port`."""
    key = ("jobs", len(program.ops), port)
    found = program.cache.get(key)
    if found is None:
        found = program.cache[key] = [(index, place) for index, op in enumerate(program.ops) for place, job in enumerate(op.jobs) if job.port == port]
    return found
