"""Instances with step times of one's own choice, and a second scheduler that visits every sequence at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import Any, cast

from moesim.costs.group import Group
from moesim.sim.serving.curves import StepCurves, StepTime
from moesim.sim.serving.instance import Pool
from moesim.sim.serving.sequences import Work
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.serving.simulate import ServingRun, Simulation
from moesim.traces.requests.document import Request, Requests

Times = dict[str, tuple[float, float]]
"""Request id → first token, end."""


@dataclass
class ToyCurves:
    """`StepCurves` whose step takes `time_s(prompt tokens, decoding sequences)`, the slowest replica first."""

    time_s: Callable[[int, int], float]
    pp: int = 1
    dp: int = 1
    coupled: bool = False
    verify: int = 1
    group: Group = field(init=False)

    def __post_init__(self) -> None:
        self.group = Group(1, self.dp, 1, 1, 0)

    def step(self, works: list[Work]) -> StepTime:
        slowest = max(self.time_s(sum(chunk[0] for chunk in work.chunks), work.decodes) for work in works)
        return StepTime([slowest / self.pp] * self.pp, 0.0, 0.0, 0.0)


def pool(
    time_s: Callable[[int, int], float], *, blocks: int = 1 << 20, instances: int = 1, pp: int = 1, dp: int = 1, coupled: bool = False, **more: Any
) -> Pool:
    return Pool(curves=cast(StepCurves, ToyCurves(time_s, pp, dp, coupled)), instances=instances, blocks=blocks, **more)


def requests_of(rows: list[Request], block_tokens: int = 0, clients: int | None = None) -> Requests:
    return Requests(source="test", format="run", read=lambda: iter(rows), block_tokens=block_tokens, clients=clients)


def run(rows: list[Request] | Requests, settings: ServingSettings, decode: Pool, **more: Any) -> tuple[ServingRun, Times]:
    """Simulate and return the run with the times of every request."""
    times: Times = {}

    def note(request: Request, arrival: float, queued: float, first: float, end: float) -> None:
        times[request.id] = (first, end)

    asked = rows if isinstance(rows, Requests) else requests_of(rows)
    return Simulation(asked, settings, decode, on_finish=note, **more)(), times


@dataclass
class _Plain:
    request: Request
    tokens: int
    """Prompt, and what was generated."""
    computed: int = 0
    blocks: int = 0
    first: float = -1.0
    decoding: bool = False


def reference(rows: list[Request], settings: ServingSettings, blocks: int, time_s: Callable[[int, int], float]) -> tuple[Times, int]:
    """Mixed batches with chunked prefill, preemption by recomputing, one replica, one stage: the rules of `replica`, sequence by sequence."""
    waiting: list[_Plain] = []
    running: list[_Plain] = []
    coming = list(rows)
    free, now, preempted = blocks, 0.0, 0
    times: Times = {}
    size = settings.block_size

    def grow(one: _Plain, tokens: int) -> bool:
        nonlocal free
        need = ceil(tokens / size) - one.blocks
        if need > free:
            return False
        free -= max(need, 0)
        one.blocks += max(need, 0)
        return True

    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival_s)
        while coming and coming[0].arrival_s <= now:
            waiting.append(_Plain(coming[0], coming[0].prompt_tokens))
            coming.pop(0)
        batch: dict[int, tuple[_Plain, int]] = {}
        budget, evicted = settings.max_num_batched_tokens, False
        for one in sorted(running, key=lambda one: not one.decoding):
            if one not in running:
                continue
            new = min(one.tokens - one.computed, budget)
            if new <= 0:
                continue
            while one in running and not grow(one, one.computed + new):
                victim = running.pop()
                free += victim.blocks
                victim.blocks, victim.computed, victim.decoding = 0, 0, False
                budget += batch.pop(id(victim), (victim, 0))[1]
                waiting.insert(0, victim)
                evicted = True
                preempted += 1
            if one in running:
                batch[id(one)] = (one, new)
                budget -= new
        while not evicted and waiting and budget > 0 and len(running) < settings.max_num_seqs:
            one = waiting[0]
            new = min(one.tokens - one.computed, budget)
            if not grow(one, one.computed + new):
                break
            waiting.pop(0)
            running.append(one)
            batch[id(one)] = (one, new)
            budget -= new
        decodes = sum(one.decoding for one, _ in batch.values())
        now += time_s(sum(new for _, new in batch.values()) - decodes, decodes)
        for one, new in batch.values():
            one.computed += new
            if one.computed == one.tokens:
                one.tokens += 1
                one.decoding = True
                if one.first < 0:
                    one.first = now
                if one.tokens - one.request.prompt_tokens == one.request.output_tokens:
                    times[one.request.id] = (one.first, now)
                    running.remove(one)
                    free += one.blocks
    return times, preempted
