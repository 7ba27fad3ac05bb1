"""One instance: attention replicas that step together, and the pipeline stages that their batches pass.

Replicas of a MoE model meet in every MoE layer, so a step of an instance ends when its slowest replica ends, and idle replicas take part in vain.
Replicas of a dense model never meet: each is an instance of its own. On S pipeline stages up to S batches (lanes) are in flight; a stage serves one
after another. A batch is formed when the first stage is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.sim.serving.curves import StepCurves
from moesim.sim.serving.replica import Replica, Sequence, Work
from moesim.sim.serving.settings import ServingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal instances."""

    curves: StepCurves
    instances: int
    blocks: int
    """KV blocks of an attention replica."""
    host_s: float = 0.0
    """Time per step that no device work hides."""
    draft_s: float = 0.0
    """Time of drafting per step that decodes."""
    swap_s_per_token: float = 0.0
    """Time to move one token's KV entries of a replica between device and host."""

    def build(self, settings: ServingSettings, id_tokens: int) -> list[Instance]:
        """Return the instances, empty; uncoupled replicas are instances of their own."""
        group = self.curves.group
        count, width = (self.instances, group.dp) if self.curves.coupled else (self.instances * group.dp, 1)
        return [Instance(self, settings, width, id_tokens) for _ in range(count)]


class Flight:
    """A step that runs."""

    __slots__ = ("lane", "works")

    def __init__(self, lane: int, works: list[Work]) -> None:
        self.lane, self.works = lane, works


class Instance:
    """State of one instance."""

    def __init__(self, pool: Pool, settings: ServingSettings, width: int, id_tokens: int) -> None:
        self.pool, self.curves = pool, pool.curves
        self.replicas = [Replica(settings, blocks=pool.blocks, id_tokens=id_tokens, lanes=pool.curves.pp) for _ in range(width)]
        self.idle = list(range(pool.curves.pp))
        """Lanes without a step in flight, the longest idle first."""
        self.free_s = [0.0] * pool.curves.pp
        """When every stage is free."""
        self.steps = 0
        self.busy_s = 0.0
        self.tokens = 0

    def start(self, now: float) -> tuple[Flight, float] | None:
        """Form a batch and run it; return it with its end, or None if nothing can run now."""
        for index in self.idle:
            works = [replica.schedule(replica.lanes[index]) for replica in self.replicas]
            if not any(work.chunks or work.decodes for work in works):
                continue
            times, hop, tokens = self.curves.stages(works)
            pool = self.pool
            at = now + pool.draft_s if pool.draft_s and any(work.decodes for work in works) else now
            swapped = max(work.swap_tokens for work in works)
            if swapped:
                at += swapped * pool.swap_s_per_token
            for stage, seconds in enumerate(times):
                at = max(at, self.free_s[stage]) + seconds
                if not stage:
                    at += pool.host_s
                self.free_s[stage] = at
                at += hop
            self.idle.remove(index)
            self.steps += 1
            self.tokens += tokens
            self.busy_s += at - hop - now
            return Flight(index, works), at - hop
        return None

    def finish(self, flight: Flight) -> tuple[list[tuple[Replica, Sequence]], list[tuple[Replica, Sequence]]]:
        """End a step: return the sequences that have gained a token by their prompt, and those that have ended by decoding."""
        first, done = [], []
        for replica, work in zip(self.replicas, flight.works, strict=True):
            lane = replica.lanes[flight.lane]
            if work.decodes:
                done += [(replica, one) for one in replica.stepped(lane)]
            first += [(replica, one) for one in work.finished_prompts]
        self.idle.append(flight.lane)
        return first, done
