"""One instance: attention replicas that step together, and the pipeline stages that their batches pass.

Replicas of a MoE model meet in every MoE layer, so a step of an instance ends when its slowest replica ends, and idle replicas take part in vain.
Replicas of a dense model never meet: each is an instance of its own. On S pipeline stages up to S batches (lanes) are in flight; a stage serves one
after another. A batch is formed when the first stage is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.sim.serving.curves import StepCurves
from moesim.sim.serving.replica import Replica, Sequence, Work
from moesim.sim.serving.settings import ServingSettings

MIN_LEAP, MAX_LEAP = 2, 1 << 10
"""Steps that are worth an array, and those that one array holds at most."""


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
    """A step that runs, or several of which nothing but their contexts differs."""

    __slots__ = ("lane", "works", "until", "ends", "moe_s")

    def __init__(self, lane: int, works: list[Work]) -> None:
        self.lane, self.works = lane, works
        self.until = 0.0
        """When it ends; an event at another time is void."""
        self.ends: np.ndarray | None = None
        """End of every step of several."""
        self.moe_s = (0.0, 0.0)
        """Of each of several: exchanges, routed experts."""


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
        self.flight: Flight | None = None
        """The steps in flight, if they are several."""
        self.sums = StepSums()

    def start(self, now: float) -> tuple[Flight, float] | None:
        """Form a batch and run it; return it with its end, or None if nothing can run now."""
        for index in self.idle:
            works = [replica.schedule(replica.lanes[index]) for replica in self.replicas]
            if not any(work.chunks or work.decodes for work in works):
                continue
            times, hop, moe = self.curves.stages(works)
            pool, sums = self.pool, self.sums
            drafted = pool.draft_s if pool.draft_s and any(work.decodes for work in works) else 0.0
            at = now + drafted
            swapped = max(work.swap_tokens for work in works)
            if swapped:
                at += swapped * pool.swap_s_per_token
            for stage, seconds in enumerate(times):
                at = max(at, self.free_s[stage]) + seconds * pool.scale
                if not stage:
                    at += self._host_s(works)
                self.free_s[stage] = at
                at += hop
            self.idle.remove(index)
            for replica in self.replicas:
                replica.lanes[index].flying = True
            at -= hop
            self.until = at
            sums.steps += 1
            sums.busy_s += at - now
            self._book_work(sum(times) * pool.scale + drafted, moe, 1, any(work.chunks for work in works))
            for work in works:
                sums.decodes += work.decodes
                sums.contexts += work.contexts
                if work.chunks:
                    sums.chunks += len(work.chunks)
                    for size, end, _ in work.chunks:
                        sums.prompt_tokens += size
                        sums.prompt_contexts += end
            return Flight(index, works), at
        return None

    def _book_work(self, seconds: float, moe: tuple[float, float], steps: int, prompts: bool) -> None:
        """Book `seconds` of devices in so many equal steps, and what one of them spends in MoE."""
        sums, exchange = self.sums, moe[0] * self.pool.scale * steps
        sums.moe_s += sum(moe) * self.pool.scale * steps
        sums.exchange_s += exchange
        if prompts:
            sums.prompt_s += seconds - exchange
        else:
            sums.decode_s += seconds - exchange

    def _host_s(self, works: list[Work]) -> float:
        """Return the time of a step that no device work hides; every replica has a host process of its own."""
        each_us = self.replicas[0].settings.sequence_us
        return self.pool.host_s + (each_us * 1e-6 * max(work.decodes + len(work.chunks) for work in works) if each_us else 0.0)

    def leap(self, flight: Flight, end: float) -> float:
        """Plan the steps after the one in flight, which ends at `end`, up to the one with which a sequence ends; return the end of the last.

        Exact up to rounding: no sequence ends or is admitted meanwhile and blocks are free, so of all that a step's time depends on only the contexts
        grow. What comes meanwhile cuts the plan short; `finish` books what is left of it.
        """
        flight.until = end
        if len(self.free_s) > 1 or not all(work.settled for work in flight.works):
            return end
        active = [(replica, replica.lanes[0], work) for replica, work in zip(self.replicas, flight.works, strict=True) if work.decodes]
        count = min(min(lane.ends) - lane.steps for _, lane, _ in active) if active else 0
        if count >= MIN_LEAP:
            count = min(count, MAX_LEAP, *(replica.supplied(lane) for replica, lane, _ in active))
        if count < MIN_LEAP:
            return end
        grown = np.arange(1, count + 1) * self.replicas[0].settings.acceptance
        seconds, flight.moe_s = self.curves.decode_run(flight.works, grown)
        flight.ends = np.cumsum(np.concatenate([[end], seconds * self.pool.scale + (self._host_s(flight.works) + self.pool.draft_s)]))
        self.flight = flight
        return self._until(flight)

    def cut(self, now: float) -> bool:
        """Keep of a plan the steps that have begun before `now`; return whether it ends earlier than it did."""
        flight = self.flight
        if flight is None or flight.ends is None:
            return False
        # A step begins when the one before it ends.
        kept = 1 + int(np.searchsorted(flight.ends[:-1], now, side="left"))
        if kept == len(flight.ends):
            return False
        flight.ends = flight.ends[:kept]
        self._until(flight)
        return True

    def _until(self, flight: Flight) -> float:
        assert flight.ends is not None
        self.free_s[0] = self.until = flight.until = float(flight.ends[-1])
        return flight.until

    def _book(self, flight: Flight, ends: np.ndarray) -> None:
        """Book the steps of a plan but its first, which `start` has booked, and its last, which `finish` does."""
        kept, gain, sums = len(ends) - 1, self.replicas[0].settings.acceptance, self.sums
        sums.steps += kept
        sums.busy_s += float(ends[-1] - ends[0])
        self._book_work(float(ends[-1] - ends[0]) - self._host_s(flight.works) * kept, flight.moe_s, kept, False)
        for replica, work in zip(self.replicas, flight.works, strict=True):
            if work.decodes:
                sums.decodes += work.decodes * kept
                sums.contexts += work.contexts * kept + work.decodes * gain * (kept * (kept + 1) / 2)
                replica.advance(replica.lanes[0], kept)

    def finish(self, flight: Flight) -> tuple[list[tuple[Replica, Sequence]], list[tuple[Replica, Sequence]]]:
        """End a step: return the sequences that have gained a token by their prompt, and those that have ended by decoding."""
        if flight.ends is not None:
            self._book(flight, flight.ends)
            self.flight = None
        first, done = [], []
        for replica, work in zip(self.replicas, flight.works, strict=True):
            lane = replica.lanes[flight.lane]
            if work.decodes:
                done += [(replica, one) for one in replica.stepped(lane)]
            first += [(replica, one) for one in work.finished_prompts]
            lane.flying = False
            for sequence in lane.joining:
                replica.decode(lane, sequence)
            lane.joining.clear()
        self.idle.append(flight.lane)
        return first, done
