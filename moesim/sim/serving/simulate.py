"""Runs requests through a deployment and collects the times of every one.

Between an arrival, the end of a step and the end of a KV transfer nothing changes, so time jumps from one such event to the next in a heap: exact, and
a tenth of the cost of one process per instance. Everything that happens at one instant (ends first released, arrivals queued) is booked before new steps
start. Requests go to the replica with the lowest load (four per waiting request, one per running one), the first of equals. Requests are read as they
arrive and forgotten when they end, so memory is bounded by what is in flight. An instance plans all steps up to the next end of a sequence at once; what
comes to it meanwhile cuts the plan short, and the event of its old end is void.

With prefill instances a prompt's first token comes from there; its KV cache crosses the link once a decode replica has blocks for it. Transfers leave a
prefill instance, and enter a decode instance, one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf
from typing import Any

from moesim.errors import SimulationError
from moesim.sim.serving.instance import Flight, Instance, Pool, StepSums
from moesim.sim.serving.metrics import Sample
from moesim.sim.serving.replica import Replica
from moesim.sim.serving.sequences import Sequence
from moesim.sim.serving.settings import ServingSettings
from moesim.traces.requests.document import Request, Requests

_END, _READY, _ARRIVE, _WAKE = range(4)


@dataclass(slots=True)
class ServingRun:
    """What a run leaves behind; times in seconds."""

    ttft: Sample = field(default_factory=Sample)
    tpot: Sample = field(default_factory=Sample)
    latency: Sample = field(default_factory=Sample)
    step: Sample = field(default_factory=Sample)
    finished: int = 0
    good: int = 0
    """Finished requests that met the service levels."""
    refused: dict[str, int] = field(default_factory=dict)
    """Reason → requests that no replica can hold."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_tokens: int = 0
    """Prompt tokens that were found in the prefix cache."""
    preemptions: int = 0
    recomputed_tokens: int = 0
    transfers: int = 0
    transfer_s: float = 0.0
    sums: StepSums = field(default_factory=StepSums)
    """Over the steps of all instances."""
    simulated_s: float = 0.0
    kv_peak: float = 0.0
    """Largest share of a replica's KV blocks in use."""
    instances: int = 0


class Simulation:
    """One run."""

    def __init__(
        self,
        requests: Requests,
        settings: ServingSettings,
        decode: Pool,
        *,
        prefill: Pool | None = None,
        transfer_s: Callable[[int], float] | None = None,
        max_context: int = 1 << 30,
        on_finish: Callable[[Request, float, float, float, float], None] | None = None,
    ) -> None:
        """decode: instances that decode, and prefill where `prefill` is None. transfer_s: tokens → seconds to hand a KV cache over. on_finish is told
        request, arrival, when the scheduler saw it, first token and end."""
        self._requests, self._settings = requests, settings
        ids = requests.block_tokens
        self._decode = decode.build(settings, ids)
        self._prefill = prefill.build(settings, ids) if prefill is not None else []
        self._entry = self._prefill or self._decode
        self._transfer_s = transfer_s or (lambda tokens: 0.0)
        self._ports: dict[int, float] = {}
        self._max_context = max_context
        self._blocks = min(pool.blocks for pool in (decode, prefill) if pool is not None)
        self._on_finish = on_finish
        self._heap: list[tuple[float, int, int, Instance | None, Any]] = []
        self._order = 0
        self._dirty: dict[int, Instance] = {}
        self._pending: Iterator[Request] = iter(requests)
        self._upcoming: Request | None = None
        """The next request of an open loop."""
        self._clients = settings.clients or requests.clients or 0
        self.run = ServingRun(instances=len(self._decode) + len(self._prefill))

    def __call__(self) -> ServingRun:
        """Run to the end. Raises SimulationError if requests are left that nothing can move."""
        heap, now = self._heap, 0.0
        if self._clients:
            for _ in range(self._clients):
                self._next_client(0.0)
        else:
            self._upcoming = next(self._pending, None)
        while heap or self._upcoming is not None or self._dirty:
            if heap and heap[0][2] == _END and heap[0][4].until != heap[0][0]:
                heappop(heap)  # its steps have been cut short
                continue
            at = heap[0][0] if heap else inf
            if self._upcoming is not None and self._upcoming.arrival_s < at:
                at = self._upcoming.arrival_s
            if self._dirty and at > now:
                ready, self._dirty = self._dirty, {}
                for instance in ready.values():
                    self._start(instance, now)
                continue
            now = at
            while heap and heap[0][0] <= now:
                _, _, kind, there, what = heappop(heap)
                if kind == _ARRIVE:
                    self._arrive(what, now)
                    continue
                assert there is not None
                if kind == _WAKE:
                    self._dirty[id(there)] = there
                elif kind == _READY:
                    replica, sequence = what
                    self._ready(there, replica, sequence, now)
                elif what.until == now:
                    self._end(there, what, now)
            while self._upcoming is not None and self._upcoming.arrival_s <= now:
                self._arrive(self._upcoming, now)
                self._upcoming = next(self._pending, None)
        return self._total(now)

    def _push(self, at: float, kind: int, instance: Instance | None, what: Any) -> None:
        self._order += 1
        heappush(self._heap, (at, self._order, kind, instance, what))

    # --- events ---------------------------------------------------------------------------------------------------

    def _next_client(self, now: float) -> None:
        request = next(self._pending, None)
        if request is not None:
            self._push(now + self._settings.client_us * 1e-6, _ARRIVE, None, request)

    def _arrive(self, request: Request, now: float) -> None:
        settings = self._settings
        total = request.prompt_tokens + request.output_tokens
        reason = ""
        if total > self._max_context:
            reason = f"longer than {self._max_context} tokens"
        elif -(-(total + settings.draft_tokens) // settings.block_size) > self._blocks:
            reason = f"needs more than the {self._blocks} KV blocks of a replica"
        if reason:
            self.run.refused[reason] = self.run.refused.get(reason, 0) + 1
            if self._clients:
                self._next_client(now)
            return
        sequence = Sequence(request, now)
        if self._prefill and settings.handover == "reserve":
            sequence.reserved = True
            sequence.computed = sequence.target = request.prompt_tokens
            self._queue(self._decode, sequence, now)
        else:
            self._queue(self._entry, sequence, now)

    def _queue(self, instances: list[Instance], sequence: Sequence, now: float) -> None:
        best, chosen, least = instances[0], instances[0].replicas[0], -1
        for instance in instances:
            for replica in instance.replicas:
                load = 4 * len(replica.waiting) + replica.running
                if least < 0 or load < least:
                    best, chosen, least = instance, replica, load
        chosen.waiting.append(sequence)
        ends = best.step_end(now)
        if self._settings.schedule_ahead:
            sequence.not_before = best.first_open(now)
            self._interrupt(best, now, 1)
        else:
            self._interrupt(best, now)
        if ends > sequence.arrival_s and not best.idle:
            sequence.queued_s = ends
        self._dirty[id(best)] = best

    def _start(self, instance: Instance, now: float) -> None:
        while instance.idle and instance.free_s[0] <= now:
            flight = instance.start(now)
            if self._prefill:
                self._moves(instance, now)
            if flight is None:
                return
            instance.leap(flight)
            self._push(flight.until, _END, instance, flight)
        if instance.idle and instance.free_s[0] > now:
            self._push(instance.free_s[0], _WAKE, instance, None)

    def _interrupt(self, instance: Instance, now: float, ahead: int = 0) -> None:
        """End the steps that an instance has planned with the one that runs, or so many later."""
        if instance.cut(now, ahead) and instance.flight is not None:
            self._push(instance.until, _END, instance, instance.flight)

    def _end(self, instance: Instance, flight: Flight, now: float) -> None:
        self._dirty[id(instance)] = instance
        self.run.step.add(flight.first_s - flight.start_s)
        if flight.more:
            self.run.step.extend(flight.next_s, flight.growth_s, flight.more)
        first, done = instance.finish(flight)
        for sequence in done:
            self._finish(sequence, now)
        for replica, sequence in first:
            sequence.generated += 1
            if sequence.first_s < 0:
                sequence.first_s = now
            lane = sequence.lane
            assert lane is not None
            if sequence.generated >= sequence.request.output_tokens:
                replica.leave(lane, sequence)
                if sequence.partner is not None:
                    there, keeper, kept = sequence.partner
                    assert kept.lane is not None
                    keeper.leave(kept.lane, kept)
                    self._dirty[id(there)] = there
                self._finish(sequence, now)
            elif self._prefill and instance.pool is self._prefill[0].pool:
                self._hand_over(instance, replica, sequence, now)
            else:
                replica.decode(lane, sequence)

    def _finish(self, sequence: Sequence, now: float) -> None:
        run, request, settings = self.run, sequence.request, self._settings
        ttft, latency = sequence.first_s - sequence.arrival_s, now - sequence.arrival_s
        run.finished += 1
        run.prompt_tokens += request.prompt_tokens
        run.output_tokens += request.output_tokens
        run.ttft.add(ttft)
        run.latency.add(latency)
        tpot = 0.0
        if request.output_tokens > 1:
            tpot = (now - sequence.first_s) / (request.output_tokens - 1)
            run.tpot.add(tpot)
        if (not settings.slo_ttft_ms or ttft * 1e3 <= settings.slo_ttft_ms) and (not settings.slo_tpot_ms or tpot * 1e3 <= settings.slo_tpot_ms):
            run.good += 1
        if self._on_finish is not None:
            self._on_finish(request, sequence.arrival_s, sequence.queued_s, sequence.first_s, now)
        if request.then is not None:
            self._push(now + request.pause_s, _ARRIVE, None, request.then)
        elif self._clients:
            self._next_client(now)

    # --- prefill and decode instances -----------------------------------------------------------------------------

    def _hand_over(self, instance: Instance, replica: Replica, sequence: Sequence, now: float) -> None:
        if sequence.partner is not None:
            target, _, moved = sequence.partner
        else:
            moved = Sequence(sequence.request, sequence.arrival_s)
            moved.computed = moved.target = sequence.computed
        moved.queued_s, moved.first_s, moved.generated = sequence.queued_s, sequence.first_s, sequence.generated
        moved.source = (instance, replica, sequence)
        if sequence.partner is not None:
            self._transfer(target, sequence.partner[1], moved, now)
        else:
            self._queue(self._decode, moved, now)

    def _moves(self, instance: Instance, now: float) -> None:
        """Start the transfers of sequences that have just been given blocks, and the prompts of those that were given them first."""
        for replica in instance.replicas:
            for sequence in replica.arriving:
                if sequence.reserved:
                    sequence.reserved = False
                    prompt = Sequence(sequence.request, sequence.arrival_s)
                    prompt.partner = (instance, replica, sequence)
                    self._queue(self._prefill, prompt, now)
                else:
                    self._transfer(instance, replica, sequence, now)
            replica.arriving.clear()

    def _transfer(self, instance: Instance, replica: Replica, sequence: Sequence, now: float) -> None:
        source = sequence.source
        assert source is not None
        begin = max(now, self._ports.get(id(source[0]), 0.0), self._ports.get(id(instance), 0.0))
        seconds = self._transfer_s(sequence.computed)
        self._ports[id(source[0])] = self._ports[id(instance)] = begin + seconds
        self.run.transfers += 1
        self.run.transfer_s += seconds
        self._push(begin + seconds, _READY, instance, (replica, sequence))

    def _ready(self, instance: Instance, replica: Replica, sequence: Sequence, now: float) -> None:
        assert sequence.source is not None and sequence.lane is not None
        there, kept, original = sequence.source
        assert original.lane is not None
        kept.leave(original.lane, original)
        sequence.source, sequence.moving = None, False
        if sequence.lane.flying:
            sequence.lane.joining.append(sequence)
            self._interrupt(instance, now)
        else:
            replica.decode(sequence.lane, sequence)
        self._dirty[id(there)] = there
        self._dirty[id(instance)] = instance

    # --- end ------------------------------------------------------------------------------------------------------

    def _total(self, now: float) -> ServingRun:
        run = self.run
        run.simulated_s = now
        for instance in (*self._decode, *self._prefill):
            run.sums.add(instance.sums)
            for replica in instance.replicas:
                if replica.waiting or replica.running:
                    left = len(replica.waiting) + replica.running
                    raise SimulationError(
                        f"serving: {left} requests of a replica wait for KV blocks that nothing frees; give it more blocks or fewer sequences"
                    )
                run.preemptions += replica.preemptions
                run.recomputed_tokens += replica.recomputed_tokens
                run.prefix_tokens += replica.pool.hit_tokens
                run.kv_peak = max(run.kv_peak, replica.pool.peak / replica.pool.capacity)
        return run
