"""One instance: attention replicas that step together, and the pipeline stages that their batches pass.

Replicas of a MoE model meet in every MoE layer, so a step of an instance ends when its slowest replica ends, and idle replicas take part in vain.
Replicas of a dense model never meet: each is an instance of its own. On S pipeline stages up to S batches (lanes) are in flight; a stage serves one
after another. A batch is formed when the first stage is free.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from moesim.sim.serving.curves import StepCurves, StepTime
from moesim.sim.serving.replica import Replica
from moesim.sim.serving.sequences import Sequence, Work
from moesim.sim.serving.settings import ServingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal instances."""

    curves: StepCurves
    instances: int
    blocks: int
    """KV blocks of an attention replica."""
    settings: ServingSettings | None = None
    """Limits of these instances where they differ from those of the run."""
    host_s: float = 0.0
    """Time per step that no device work hides."""
    draft_s: float = 0.0
    """Time of drafting per step that decodes."""
    swap_s_per_token: float = 0.0
    """Time to move one token's KV entries of a replica between device and host."""
    scale: float = 1.0
    """Factor on the time of every step."""

    def build(self, settings: ServingSettings, id_tokens: int) -> list[Instance]:
        """Return the instances, empty; uncoupled replicas are instances of their own."""
        group = self.curves.group
        count, width = (self.instances, group.dp) if self.curves.coupled else (self.instances * group.dp, 1)
        return [Instance(self, self.settings or settings, width, id_tokens) for _ in range(count)]


@dataclass(slots=True)
class StepSums:
    """Sums over steps of what their batches held."""

    steps: int = 0
    busy_s: float = 0.0
    moe_s: float = 0.0
    """Exchanges and routed experts."""
    prompt_s: float = 0.0
    """In which a stage's devices work on steps that hold prompts, exchanges left out; summed over stages."""
    decode_s: float = 0.0
    """The same for steps that only decode, and for drafting."""
    exchange_s: float = 0.0
    """In which a stage's devices exchange tokens, summed over stages."""
    decodes: int = 0
    contexts: float = 0.0
    """Of decoding sequences."""
    chunks: int = 0
    prompt_tokens: int = 0
    prompt_contexts: int = 0
    """KV lengths at the end of prompt chunks."""

    def add(self, other: StepSums) -> None:
        """Add another's sums."""
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Flight:
    """A step that runs, and those planned after it: they differ in their contexts only, and in their times by the same from one to the next."""

    __slots__ = ("lane", "works", "time", "host_s", "start_s", "device_s", "first_s", "more", "next_s", "growth_s", "until")

    def __init__(self, lane: int, works: list[Work], time: StepTime, host_s: float, start_s: float) -> None:
        self.lane, self.works, self.time = lane, works, time
        self.host_s, self.start_s = host_s, start_s
        self.device_s = 0.0
        """In which devices work on the first step, summed over stages."""
        self.first_s = 0.0
        """When the first step ends."""
        self.more = 0
        """Steps after the first."""
        self.next_s = 0.0
        """How long the second takes."""
        self.growth_s = 0.0
        """How much longer than the one before it every later one takes."""
        self.until = 0.0
        """When the last one ends; an event at another time is void."""

    def end_s(self, step: int) -> float:
        """Return when a step ends; 0: the first."""
        return self.first_s + step * (self.next_s + 0.5 * (step - 1) * self.growth_s)


class Instance:
    """State of one instance."""

    def __init__(self, pool: Pool, settings: ServingSettings, width: int, id_tokens: int) -> None:
        self.pool, self.curves = pool, pool.curves
        self.replicas = [Replica(settings, blocks=pool.blocks, id_tokens=id_tokens, lanes=pool.curves.pp) for _ in range(width)]
        self.idle = list(range(pool.curves.pp))
        """Lanes without a step in flight, the longest idle first."""
        self.free_s = [0.0] * pool.curves.pp
        """When every stage is free."""
        self.until = 0.0
        """End of the latest step; a request that arrives before is seen then."""
        self.step = 0
        """Number of the latest step that was begun by itself: those planned after it count with it."""
        self.flight: Flight | None = None
        """The latest step, if others are planned after it."""
        self.sums = StepSums()
        self._gain, self._sequence_s = settings.acceptance, settings.sequence_us * 1e-6

    def start(self, now: float) -> Flight | None:
        """Form a batch and run it; return its step, or None if nothing can run now."""
        flight = self._form(now)
        if flight is None:
            held = [replica.waiting[0].not_before for replica in self.replicas if replica.waiting and replica.waiting[0].not_before > replica.step]
            if held:  # nothing else runs: there is no step to wait for
                self.step = max(held) - 1
                flight = self._form(now)
        return flight

    def _form(self, now: float) -> Flight | None:
        for replica in self.replicas:
            replica.step = self.step + 1
        for index in self.idle:
            works = [replica.schedule(replica.lanes[index]) for replica in self.replicas]
            sequences = decodes = swapped = 0
            for work in works:
                running = work.decodes + len(work.chunks)
                if running > sequences:
                    sequences = running
                decodes += work.decodes
                if work.swap_tokens > swapped:
                    swapped = work.swap_tokens
            if not sequences:
                continue
            self.step += 1
            pool, time = self.pool, self.curves.step(works)
            # Every replica has a host process of its own.
            flight = Flight(index, works, time, pool.host_s + self._sequence_s * sequences, now)
            at = now + swapped * pool.swap_s_per_token
            if decodes:
                at += pool.draft_s
                flight.device_s = pool.draft_s
            for stage, seconds in enumerate(time.stages):
                seconds *= pool.scale
                at = max(at, self.free_s[stage]) + seconds
                flight.device_s += seconds
                if not stage:
                    at += flight.host_s
                self.free_s[stage] = at
                at += time.hop
            self.idle.remove(index)
            for replica in self.replicas:
                replica.lanes[index].flying = True
            self.until = flight.first_s = flight.until = at - time.hop
            return flight
        return None

    def leap(self, flight: Flight) -> None:
        """Plan the steps after a step as long as only contexts grow, and step times evenly with them: at most up to the one with which a sequence ends.

        Exact up to rounding: no sequence ends or is admitted meanwhile and blocks are free. What comes meanwhile cuts the plan short.
        """
        if len(self.free_s) > 1:
            return
        for work in flight.works:
            if not work.settled:
                return
        gain, pool, time = self._gain, self.pool, flight.time
        count = time.room / gain
        for replica, work in zip(self.replicas, flight.works, strict=True):
            if work.decodes and count >= 1:
                lane = replica.lanes[0]
                count = min(count, min(lane.ends) - lane.steps)
                if count >= 1:
                    count = min(count, replica.supplied(lane))
        if count >= 1:
            flight.growth_s = time.growth * gain * pool.scale
            flight.next_s = flight.device_s + flight.host_s + flight.growth_s
            self.flight = flight
            self._plan(flight, int(count))

    def cut(self, now: float, ahead: int = 0) -> bool:
        """Keep of a plan the steps that have begun before `now`, and `ahead` more; return whether it ends earlier than it did."""
        flight = self.flight
        if flight is None or not flight.more or flight.end_s(flight.more - 1) < now:
            return False
        # A step begins when the one before it ends.
        more = min(bisect_left(range(flight.more), now, key=flight.end_s) + ahead, flight.more)
        if more == flight.more:
            return False
        self._plan(flight, more)
        return True

    def step_end(self, now: float) -> float:
        """Return when the step that runs ends, or the latest one that ran."""
        flight = self.flight
        if flight is None or not flight.more:
            return self.until
        return flight.end_s(bisect_left(range(flight.more), now, key=flight.end_s))

    def first_open(self, now: float) -> int:
        """Return the number of the first step whose batch is not chosen yet, where batches are chosen when the step before begins."""
        if now >= self.until:
            return self.step
        flight = self.flight
        last_begun = flight is None or not flight.more or flight.end_s(flight.more - 1) < now
        return self.step + (2 if last_begun else 1)

    def _plan(self, flight: Flight, more: int) -> None:
        flight.more = more
        self.free_s[0] = self.until = flight.until = flight.end_s(more)

    def finish(self, flight: Flight) -> tuple[list[tuple[Replica, Sequence]], list[Sequence]]:
        """End a flight: return the sequences that have gained a token by their prompt, and those that have ended by decoding."""
        self._book(flight)
        self.flight = None
        first: list[tuple[Replica, Sequence]] = []
        done: list[Sequence] = []
        for replica, work in zip(self.replicas, flight.works, strict=True):
            lane = replica.lanes[flight.lane]
            if work.decodes:
                if flight.more:
                    replica.advance(lane, flight.more)
                done += replica.stepped(lane)
            for one in work.finished_prompts:
                first.append((replica, one))
            lane.flying = False
            if lane.joining:
                for sequence in lane.joining:
                    replica.decode(lane, sequence)
                lane.joining.clear()
        self.idle.append(flight.lane)
        return first, done

    def _book(self, flight: Flight) -> None:
        sums, time, more = self.sums, flight.time, flight.more
        steps, scale = 1 + more, self.pool.scale
        exchange = time.exchange * scale * steps
        seconds = flight.device_s + (flight.until - flight.first_s - flight.host_s * more) - exchange
        sums.steps += steps
        sums.busy_s += flight.until - flight.start_s
        sums.moe_s += exchange + time.experts * scale * steps
        sums.exchange_s += exchange
        prompts = False
        for work in flight.works:
            if work.decodes:
                sums.decodes += work.decodes * steps
                sums.contexts += work.contexts * steps + work.decodes * self._gain * (0.5 * more * steps)
            for size, end, _ in work.chunks:
                prompts = True
                sums.chunks += 1
                sums.prompt_tokens += size
                sums.prompt_contexts += end
        if prompts:
            sums.prompt_s += seconds
        else:
            sums.decode_s += seconds
