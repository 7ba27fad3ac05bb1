"""Schedules of pipeline stages: in which order every stage works on which micro-batch. Pure; no times.

The layers are cut into chunks 0..V-1. A Unit is one micro-batch in one chunk: forward (F), full backward (B), or the backward's two parts,
gradients of the inputs (I) and of the weights (W). A stage does one Step after another; a Step of two Units runs them side by side.
  forward      micro-batches flow through (inference)
  gpipe        all forwards, then all backwards
  1f1b         p-s forwards, then one backward for one forward; at most min(m, p-s) micro-batches are in flight
  interleaved  1f1b over v chunks a stage, stage s holding chunks s, p+s, …
  dualpipe     half of the micro-batches enter at either end; every stage holds two chunks, and a forward runs beside a backward
Shapes: p stages, V chunks, m micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from moesim.errors import InputError, SimulationError, describe

FORWARD, BACKWARD, INPUTS, WEIGHTS = "F", "B", "I", "W"
SCHEDULES = ("forward", "gpipe", "1f1b", "interleaved", "dualpipe")


class Unit(NamedTuple):
    """Work of one micro-batch in one chunk."""

    kind: str
    micro: int
    chunk: int


Step = tuple[Unit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """The order of Units on every stage."""

    name: str
    num_stages: int
    num_chunks: int
    num_micro: int
    orders: tuple[tuple[Step, ...], ...]
    """Stage → its Steps."""

    def stage_of(self, chunk: int, micro: int) -> int:
        """Return the stage that runs `micro` in `chunk`."""
        if self.name == "dualpipe" and micro >= self.num_micro // 2:
            return self.num_stages - 1 - chunk
        return chunk % self.num_stages

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """Return the chunks whose parameters `stage` holds, ascending."""
        if self.name == "dualpipe":
            return tuple(sorted({stage, self.num_stages - 1 - stage}))
        return tuple(range(stage, self.num_chunks, self.num_stages))

    def needs(self, unit: Unit) -> tuple[Unit, ...]:
        """Return the Units whose results `unit` takes; a full backward stands for its part (I)."""
        kind, micro, chunk = unit
        if kind == FORWARD:
            return (Unit(FORWARD, micro, chunk - 1),) if chunk else ()
        if kind == WEIGHTS:
            return (Unit(INPUTS, micro, chunk),)
        before = (Unit(FORWARD, micro, chunk),)
        return (*before, Unit(INPUTS, micro, chunk + 1)) if chunk + 1 < self.num_chunks else before

    def in_order(self) -> Iterator[tuple[int, Step]]:
        """Yield (stage, Step) such that whatever a Unit needs has come before. Raises SimulationError if the stages wait for each other for good."""
        done: set[Unit] = set()
        place = [0] * self.num_stages
        while any(place[stage] < len(order) for stage, order in enumerate(self.orders)):
            moved = False
            for stage, order in enumerate(self.orders):
                step = order[place[stage]] if place[stage] < len(order) else ()
                if step and all(need in done for unit in step for need in self.needs(unit)):
                    place[stage] += 1
                    done.update(step)
                    done.update(Unit(INPUTS, unit.micro, unit.chunk) for unit in step if unit.kind == BACKWARD)
                    moved = True
                    yield stage, step
            if not moved:
                raise SimulationError(f"schedule {self.name}: {self.num_stages} stages with {self.num_micro} micro-batches wait for each other for good")

    def peak_in_flight(self, stage: int) -> int:
        """Return the most (micro-batch, chunk) pairs whose activations `stage` keeps at once: from the forward to the last of the backward."""
        split = {(u.micro, u.chunk) for step in self.orders[stage] for u in step if u.kind == WEIGHTS}
        kept = peak = 0
        for step in self.orders[stage]:
            kept += sum(unit.kind == FORWARD for unit in step)
            peak = max(peak, kept)
            kept -= sum(unit.kind == WEIGHTS or (unit.kind == BACKWARD and (unit.micro, unit.chunk) not in split) for unit in step)
        return peak


def schedule(name: str, *, stages: int, micro_batches: int, virtual: int = 1) -> Schedule:
    """Return the schedule `name` for p stages and m micro-batches; virtual: chunks a stage (`interleaved` only).

    Raises InputError for sizes that the schedule does not have.
    """
    if name not in SCHEDULES:
        raise InputError(describe("--set", "pipeline.schedule", name, f"must be one of {', '.join(SCHEDULES)}"))
    if virtual != 1 and name != "interleaved":
        raise InputError(describe("--set", "pipeline.virtual", virtual, f"must be 1 for the schedule {name}", "use interleaved"))
    if name == "interleaved" and micro_batches % stages:
        raise InputError(describe("--set", "pipeline.micro_batches", micro_batches, f"must be a multiple of the {stages} stages to interleave"))
    if name == "dualpipe" and (stages % 2 or micro_batches % 2 or micro_batches < 2 * stages):
        rule = f"must be even and at least twice the {stages} stages, which must be even, for dualpipe"
        raise InputError(describe("--set", "pipeline.micro_batches", micro_batches, rule))
    order = {"forward": _forward, "gpipe": _gpipe, "1f1b": _one_forward_one_backward, "interleaved": _interleaved, "dualpipe": _dualpipe}[name]
    orders = tuple(tuple(order(stage, stages, micro_batches, virtual)) for stage in range(stages))
    return Schedule(name=name, num_stages=stages, num_chunks=stages * virtual, num_micro=micro_batches, orders=orders)


def _forward(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Step]:
    return ((Unit(FORWARD, number, stage),) for number in range(micro))


def _gpipe(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Step]:
    yield from _forward(stage, stages, micro, virtual)
    yield from ((Unit(BACKWARD, number, stage),) for number in reversed(range(micro)))


def _one_forward_one_backward(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Step]:
    first = min(stages - stage - 1, micro)
    return _alternate([Unit(FORWARD, number, stage) for number in range(micro)], [Unit(BACKWARD, number, stage) for number in range(micro)], first)


def _interleaved(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Step]:
    """One micro-batch per stage passes through all chunks before the next ones enter; the first backward waits for the last chunk."""
    turns = [(group * stages + number, chunk) for group in range(micro // stages) for chunk in range(virtual) for number in range(stages)]
    forwards = [Unit(FORWARD, number, chunk * stages + stage) for number, chunk in turns]
    backwards = [Unit(BACKWARD, number, (virtual - 1 - chunk) * stages + stage) for number, chunk in turns]
    first = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    return _alternate(forwards, backwards, min(first, len(forwards)))


def _alternate(forwards: list[Unit], backwards: list[Unit], first: int) -> Iterator[Step]:
    """Yield `first` forwards, then one forward and one backward in turn, then the other backwards."""
    yield from ((unit,) for unit in forwards[:first])
    for forward, backward in zip(forwards[first:], backwards, strict=False):
        yield (forward,)
        yield (backward,)
    yield from ((unit,) for unit in backwards[len(forwards) - first :])


def _dualpipe(stage: int, stages: int, micro: int, virtual: int) -> Iterator[Step]:
    """The bidirectional schedule of DeepSeek-V3: eight phases, symmetric about the middle of the pipeline.

    `own` are micro-batches that enter at this stage's end of the pipeline, `other` those from the far end. Weight gradients are put off (W) where
    the other stages wait for the gradients of the inputs.
    """
    half, near = stages // 2, min(stage, stages - 1 - stage)
    mirrored = stage != near
    counts: dict[tuple[str, bool], int] = {}
    waiting: list[Unit] = []

    def unit(kind: str, own: bool) -> Unit:
        key = (FORWARD if kind == FORWARD else BACKWARD, own)
        number = counts.get(key, 0)
        counts[key] = number + 1
        second = own == mirrored  # micro-batches m/2.. enter at the last stage
        made = Unit(kind, number + (micro // 2 if second else 0), stages - 1 - stage if second else stage)
        if kind == INPUTS:
            waiting.append(Unit(WEIGHTS, made.micro, made.chunk))
        return made

    edge = half - near - 1
    for _ in range(2 * edge):
        yield (unit(FORWARD, True),)
    for _ in range(near + 1):
        yield (unit(FORWARD, True),)
        yield (unit(FORWARD, False),)
    for _ in range(edge):
        yield (unit(INPUTS, False),)
        yield (waiting.pop(0),)
        yield (unit(FORWARD, False),)
    for turn in range(micro // 2 - stages + near + 1):
        if turn == 0 and near == half - 1:  # the middle stages start a pair of their own: nothing to overlap with yet
            yield (unit(FORWARD, True),)
            yield (unit(BACKWARD, False),)
        else:
            yield (unit(FORWARD, True), unit(BACKWARD, False))
        yield (unit(FORWARD, False), unit(BACKWARD, True))
    for _ in range(edge):
        yield (unit(BACKWARD, False),)
        yield (unit(FORWARD, False), unit(BACKWARD, True))
    put_off = False
    for turn in range(near + 1):
        put_off = put_off or (turn == (near + 1) // 2 and near % 2 == 1)
        yield (unit(INPUTS if put_off else BACKWARD, False),)
        put_off = put_off or (turn == (near + 1) // 2 and near % 2 == 0)
        yield (unit(INPUTS if put_off else BACKWARD, True),)
    for _ in range(edge):
        yield (waiting.pop(0),)
        yield (unit(INPUTS, True),)
    while waiting:
        yield (waiting.pop(0),)
