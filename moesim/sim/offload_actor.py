"""The decode of `offload` as Actors of the Engine: the decoder and every link are simpy processes, a copy is a Flow per chunk.

Says everything that `offload.decode` can, and shares its ports with other Flows (a migration, a KV transfer), which that
cannot. Rank 0 of the Engine decodes. Slow: an event per chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

import numpy as np

from moesim.sim.engine import Engine
from moesim.sim.flows import Flow
from moesim.sim.offload_case import CopyLink, Decode, DecodeResult, prepare
from moesim.sim.offload_program import DISK_PORT, HOST_PORT
from moesim.sim.offload_state import Residency
from moesim.sim.ops import Program


@dataclass(slots=True, eq=False)
class _Job:
    """One copy on one link."""

    key: int
    order: int
    demanded: bool
    seconds: float
    nbytes: int
    chunks: int
    share: float
    """Of the copy that a full chunk is."""
    after: _Job | None
    """Disk read that has to be over first."""
    begun: int = 0
    """Chunks."""
    over: bool = False

    @property
    def ready(self) -> bool:
        return self.after is None or self.after.over

    @property
    def next_share(self) -> float:
        return self.share if self.begun + 1 < self.chunks else 1.0 - self.share * (self.chunks - 1)


class _LinkActor:
    """Serves the jobs of one link chunk by chunk; a chunk is a Flow."""

    def __init__(self, engine: Engine, link: CopyLink, port: str, arrived: Callable[[_Job], None]) -> None:
        self.engine, self.link, self.port, self.arrived = engine, link, port, arrived
        self.queue: list[_Job] = []
        """In order of issue; a job leaves when its last chunk begins."""
        self.latest: dict[int, _Job] = {}
        self.moved_bytes = 0.0
        self.busy_until = 0.0
        self._current: _Job | None = None
        self._wake = engine.env.event()
        engine.env.process(self._run())

    def put(self, key: int, order: int, seconds: float, nbytes: int, after: _Job | None, demanded: bool) -> _Job:
        """Queue a copy."""
        size = self.link.chunk_bytes
        chunks = 1 if size is None or nbytes <= size else ceil(nbytes / size - 1e-9)
        job = _Job(key, order, demanded, seconds, nbytes, chunks, 1.0 if size is None or chunks == 1 else size / nbytes, after)
        self.queue.append(job)
        self.latest[key] = job
        self.wake()
        return job

    def waiting(self, key: int) -> _Job | None:
        """Return the job of `key` that has chunks to begin."""
        job = self.latest.get(key)
        return job if job is not None and job in self.queue else None

    def wake(self) -> None:
        """Look at the queue again."""
        if not self._wake.triggered:
            self._wake.succeed()

    def _next(self) -> _Job | None:
        if self.link.discipline == "fifo":
            return self.queue[0] if self.queue and self.queue[0].ready else None
        best = min((job for job in self.queue if job.ready), key=lambda job: (not job.demanded, job.order), default=None)
        current = self._current
        if current is not None and current in self.queue and best is not None and current.demanded >= best.demanded:
            return current
        return best

    def _run(self) -> Generator[Any, Any, None]:
        while True:
            job = self._next()
            if job is None:
                self._wake = self.engine.env.event()
                yield self._wake
                continue
            self._current = job
            share, last = job.next_share, job.begun + 1 == job.chunks
            job.begun += 1
            if last:
                self.queue.remove(job)
            seconds = job.seconds * share
            self.busy_until = self.engine.now + seconds
            if seconds > 0:
                yield self.engine.start_flow(Flow(f"copy {job.key}", seconds, {(self.port, 0): 1.0}))
            self.moved_bytes += job.nbytes * share
            if last:
                job.over = True
                self.arrived(job)


class OffloadActor:
    """A decoder on rank 0 of an Engine; `yield from actor.run()` in a simpy process, then `result()`."""

    def __init__(self, case: Decode, engine: Engine) -> None:
        self.case, self.engine, self.inputs = case, engine, prepare(case)
        self.arrival = [0.0] * self.inputs.num_keys
        self._host = _LinkActor(engine, case.host, HOST_PORT, self._at_device)
        self._disk = _LinkActor(engine, case.disk, DISK_PORT, self._at_host) if case.disk is not None else None
        self.state = Residency(case, self.inputs, self)
        self._orders = 0
        self._arrived = engine.env.event()
        self._other_free = 0.0
        self._gates = 0
        self._tick = -1
        self._ends: list[float] = []

    # --- the path that decisions ask -----------------------------------------------------------------

    @property
    def host_bytes(self) -> float:
        """Bytes moved to the device."""
        return self._host.moved_bytes

    @property
    def disk_bytes(self) -> float:
        """Bytes read from the disk."""
        return self._disk.moved_bytes if self._disk is not None else 0.0

    def push(self, key: int, now: float, host_s: float, disk_s: float, nbytes: int, *, demanded: bool) -> None:
        """Issue a copy."""
        self._orders += 1
        self.arrival[key] = inf
        read = self._disk.latest.get(key) if self._disk is not None else None
        if disk_s >= 0 and self._disk is not None:
            read = self._disk.put(key, self._orders, disk_s, nbytes, None, demanded)
        self._host.put(key, self._orders, host_s, nbytes, read, demanded)

    def promote(self, keys: list[int]) -> None:
        """Make prefetches demanded."""
        for link in (self._host, self._disk):
            for key in keys:
                job = link.waiting(key) if link is not None else None
                if job is not None:
                    job.demanded = True

    def cancel(self, key: int) -> bool:
        """Stop a prefetch at the next chunk border."""
        stopped = False
        for link in (self._disk, self._host):
            job = link.waiting(key) if link is not None and link.link.discipline == "priority" else None
            stopped = link is not None and job is not None and not job.demanded
            if stopped and link is not None and job is not None:
                link.queue.remove(job)
                del link.latest[key]
        return stopped

    def cancel_reads(self, key: int) -> bool:
        """Stop a prefetch whose disk read is not over."""
        job = self._disk.waiting(key) if self._disk is not None and self.case.host.discipline == "priority" else None
        return job is not None and not job.demanded and self.cancel(key)

    def unfinished(self) -> list[int]:
        """Return the prefetches that can still be cancelled."""
        return [job.key for job in self._host.queue if not job.demanded]

    def wait_s(self, now: float) -> float:
        """Return how long a copy demanded now would wait for the link."""
        jobs = [job for job in self._host.queue if job.demanded or self.case.host.discipline == "fifo"]
        return max(0.0, self._host.busy_until - now) + sum(job.seconds * (1 - job.share * job.begun) for job in jobs)

    def _at_host(self, job: _Job) -> None:
        self._host.wake()

    def _at_device(self, job: _Job) -> None:
        if self._host.latest.get(job.key) is job:
            self.arrival[job.key] = self.engine.now
        self._arrived.succeed()
        self._arrived = self.engine.env.event()

    # --- the decoder ---------------------------------------------------------------------------------

    def run(self) -> Generator[Any, Any, None]:
        """Decode all steps."""
        case, inputs, state = self.case, self.inputs, self.state
        self._start = self.engine.now
        prefetch = case.prefetch
        for position in range(inputs.positions):
            attention = inputs.attention_P[position]
            yield from self._compute(("attention", attention), ("gate", inputs.before_P[position] - attention))
            gate, self._gates, self._tick = self.engine.now, position + 1, 2 * position
            state.awaited, state.elsewhere, state.computed_s = {}, [], []
            state.gate(position, gate, self._other_free)
            computed = 0.0
            if state.computed_s:
                computed = self._other_free = max(self._other_free, gate) + sum(state.computed_s)
            awaited, elsewhere = dict(state.awaited), list(state.elsewhere)
            if prefetch is not None and prefetch.issue == "gate":
                yield from self._predict(position)
            keys = [(index, key) for index, key in enumerate(inputs.demand_P[position]) if key not in elsewhere]
            yield from (self._each(position, keys, awaited) if case.expert_start == "each" else self._all(position, keys, awaited))
            if computed > self.engine.now:
                yield self.engine.env.timeout(computed - self.engine.now)
            self._tick = 2 * position + 1
            state.release(self._tick)
            if prefetch is not None and prefetch.issue == "experts":
                yield from self._predict(position)
            if position % inputs.num_layers == inputs.num_layers - 1:
                self._ends.append(self.engine.now)

    def _compute(self, *parts: tuple[str, float]) -> Generator[Any, Any, None]:
        program = Program(self.engine.num_ranks)
        mine = np.arange(self.engine.num_ranks) == 0
        for label, seconds in parts:
            program.local(label, np.where(mine, seconds, 0.0), ranks_R=mine)
        yield from self.engine.execute(program)

    def _predict(self, position: int) -> Generator[Any, Any, None]:
        prefetch = self.case.prefetch
        assert prefetch is not None
        for target in range(*self.state.targets(position)):
            if prefetch.cost_s == 0:
                self.state.prefetch(target, self._tick, self.engine.now)
            elif prefetch.device == "gpu":
                yield from self._compute(("predict", prefetch.cost_s))
                self.state.prefetch(target, self._tick, self.engine.now)
            else:
                self._other_free = max(self._other_free, self.engine.now) + prefetch.cost_s
                self.engine.env.process(self._later(self._other_free - self.engine.now, target))

    def _later(self, delay: float, target: int) -> Generator[Any, Any, None]:
        yield self.engine.env.timeout(delay)
        if target < self._gates:
            self.state.counts.late_predictions += len(self.inputs.predicted_P[target])
        else:
            self.state.prefetch(target, self._tick, self.engine.now)

    def _all(self, position: int, keys: list[tuple[int, int]], awaited: dict[int, str]) -> Generator[Any, Any, None]:
        while any(self.arrival[key] > self.engine.now for key in awaited):
            yield self._arrived
        yield from self._compute(("experts", sum(self.inputs.work_P[position][index] for index, _ in keys)))

    def _each(self, position: int, keys: list[tuple[int, int]], awaited: dict[int, str]) -> Generator[Any, Any, None]:
        while keys:
            here = [(self.arrival[key] if key in awaited else 0.0, index, key) for index, key in keys if self.arrival[key] <= self.engine.now]
            if not here:
                yield self._arrived
                continue
            _, index, key = min(here)
            keys.remove((index, key))
            yield from self._compute(("experts", self.inputs.work_P[position][index]))

    def result(self) -> DecodeResult:
        """Return what happened; stalls are not attributed."""
        return self.state.result(np.diff(np.array([self._start, *self._ends])), {})


def decode_events(case: Decode) -> DecodeResult:
    """Return the result of `case` from an Engine of its own with an `OffloadActor`: slow, for comparison."""
    engine = Engine(1)
    actor = OffloadActor(case, engine)
    engine.env.process(actor.run())
    engine.env.run()
    return actor.result()
