"""The decode of `offload` as one Program with decide hooks, for links that run copies in order of issue.

The links are lanes (`copy`, `disk`), in which every copy that a gate or a prediction could ask for has its Op; hooks
decide what is asked for when a gate has been reached, and what each Op takes. The decode has the links to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim.engine import Engine
from moesim.sim.evaluate import Times
from moesim.sim.offload_case import Decode, DecodeResult, prepare
from moesim.sim.offload_state import Residency
from moesim.sim.ops import Decide, Program

HOST_PORT, DISK_PORT = "host.in", "disk.in"


class _Copies:
    """Collects the copies that a decision asks for; the hooks of the lanes time them."""

    def __init__(self, num_keys: int) -> None:
        self.arrival = [0.0] * num_keys
        self.staged = [0.0] * num_keys
        self.host_bytes = self.disk_bytes = 0.0
        self.host_free = self.disk_free = 0.0
        """When the links will have run what has been asked for; policies see it, times come from the lanes."""
        self.asked: list[tuple[int, float, float]] = []

    def push(self, key: int, now: float, host_s: float, disk_s: float, nbytes: int, *, demanded: bool) -> None:
        """Ask for a copy."""
        self.asked.append((key, host_s, disk_s))
        begin = max(now, self.host_free, self.staged[key])
        self.host_bytes += nbytes
        if disk_s >= 0:
            self.disk_bytes += nbytes
            self.disk_free = max(now, self.disk_free) + disk_s
            begin = max(now, self.host_free, self.disk_free)
        self.host_free = begin + host_s

    def promote(self, keys: list[int]) -> None:
        pass

    def cancel(self, key: int) -> bool:
        return False

    def cancel_reads(self, key: int) -> bool:
        return False

    def unfinished(self) -> list[int]:
        return []

    def wait_s(self, now: float) -> float:
        return max(0.0, self.host_free - now)


def _hook(function: Callable[[float], float]) -> Decide:
    """Wrap a function of a time into a hook of one rank."""
    return lambda ready: np.array([function(float(ready[0]))])


class DecodeProgram:
    """A Program of one rank and what its hooks decided."""

    def __init__(self, case: Decode) -> None:
        prefetch = case.prefetch
        if case.host.discipline != "fifo":
            raise InputError(describe(f"link {case.host.name}", "discipline", case.host.discipline, "must be fifo in a Program; use OffloadActor for priority"))
        if prefetch is not None and prefetch.device == "cpu" and prefetch.cost_s > 0:
            raise InputError(describe("prefetch", "device", "cpu", "issues at times that a Program cannot order; use OffloadActor"))
        self.case, self.inputs = case, prepare(case)
        self.copies = _Copies(self.inputs.num_keys)
        self.state = Residency(case, self.inputs, self.copies)
        self.program = Program(1)
        self._other_free = 0.0
        self._order: list[tuple[float, int]] = []
        self._last: list[list[int]] = []
        done: list[int] = []
        for position in range(self.inputs.positions):
            done = self._layer(position, done)
            if position % self.inputs.num_layers == self.inputs.num_layers - 1:
                self._last.append(done)

    def _add(self, label: str, lane: str, port: str, deps: list[int], work: float | Callable[[float], float]) -> int:
        layer = self._at % self.inputs.num_layers
        if callable(work):
            return self.program.local(label, np.zeros(1), lane=lane, port=port, deps=deps, layer=layer, decide=_hook(work))
        return self.program.local(label, np.array([work]), lane=lane, port=port, deps=deps, layer=layer)

    def _layer(self, position: int, done: list[int]) -> list[int]:
        self._at = position
        inputs, prefetch = self.inputs, self.case.prefetch
        attention = self._add("attention", "compute", "sm", done, inputs.attention_P[position])
        gate = self._add("gate", "compute", "sm", [attention], inputs.before_P[position] - inputs.attention_P[position])
        width = len(inputs.demand_P[position])
        route = self._add("route", "route", "none", [gate], self._gate(position))
        self._lanes(route, width)
        if prefetch is not None and prefetch.issue == "gate":
            self._predict(position, [gate], 2 * position)
        other = self._add("elsewhere", "other", "other", [route], self._elsewhere)
        if self.case.expert_start == "all":
            waits = self._add("wait", "wait", "none", [route], self._wait_for_all)
            done = [self._add("experts", "compute", "sm", [waits], self._work_of_all(position)), other]
        else:
            experts = []
            for slot in range(width):
                waits = self._add("wait", f"wait{slot}", "none", [route], self._wait_for_one(position, slot))
                experts.append(self._add("experts", "compute", "sm", [waits], self._work_of_one(position, slot)))
            done = [experts[-1] if experts else gate, other]
        done = [*done, self._add("release", "route", "none", done, lambda ready: self._release(position))]
        if prefetch is not None and prefetch.issue == "experts":
            done = [*done, *self._predict(position, done, 2 * position + 1)]
        return done

    def _lanes(self, after: int, width: int) -> None:
        for slot in range(width):
            self._add("read", "disk", DISK_PORT, [after], self._read(slot))
            self._add("load", "copy", HOST_PORT, [after], self._load(slot))

    def _predict(self, position: int, after: list[int], tick: int) -> list[int]:
        prefetch = self.case.prefetch
        assert prefetch is not None
        done: list[int] = []
        for target in range(*self.state.targets(position)):
            if prefetch.cost_s > 0:
                after = [self._add("predict", "compute", "sm", after, prefetch.cost_s)]
                done = after
            issue = self._add("issue", "route", "none", after, self._issue(target, tick))
            self._lanes(issue, len(self.inputs.predicted_P[target]))
        return done

    # --- hooks ---------------------------------------------------------------------------------------

    def _gate(self, position: int) -> Callable[[float], float]:
        def decide(ready: float) -> float:
            self.state.awaited, self.state.elsewhere, self.state.computed_s = {}, [], []
            self.copies.asked = []
            self.state.gate(position, ready, self._other_free)
            self._taken = dict(enumerate(self.copies.asked))
            self._order = []
            return 0.0

        return decide

    def _issue(self, target: int, tick: int) -> Callable[[float], float]:
        def decide(ready: float) -> float:
            self.copies.asked = []
            self.state.prefetch(target, tick, ready)
            self._taken = dict(enumerate(self.copies.asked))
            return 0.0

        return decide

    def _read(self, slot: int) -> Callable[[float], float]:
        def decide(ready: float) -> float:
            if slot not in self._taken or self._taken[slot][2] < 0:
                return 0.0
            key, _, disk_s = self._taken[slot]
            self.copies.staged[key] = ready + disk_s
            return disk_s

        return decide

    def _load(self, slot: int) -> Callable[[float], float]:
        def decide(ready: float) -> float:
            if slot not in self._taken:
                return 0.0
            key, host_s, _ = self._taken[slot]
            taken = max(0.0, self.copies.staged[key] - ready) + host_s
            self.copies.arrival[key] = ready + taken
            return taken

        return decide

    def _elsewhere(self, ready: float) -> float:
        self._other_free = ready + sum(self.state.computed_s)
        return sum(self.state.computed_s)

    def _wait_for_all(self, ready: float) -> float:
        return max([0.0, *(self.copies.arrival[key] - ready for key in self.state.awaited)])

    def _work_of_all(self, position: int) -> Callable[[float], float]:
        pairs = list(zip(self.inputs.demand_P[position], self.inputs.work_P[position], strict=True))
        return lambda ready: sum(seconds for key, seconds in pairs if key not in self.state.elsewhere)

    def _wait_for_one(self, position: int, slot: int) -> Callable[[float], float]:
        def decide(ready: float) -> float:
            if not self._order:
                self._order = sorted(
                    (self.copies.arrival[key] if key in self.state.awaited else ready, index)
                    for index, key in enumerate(self.inputs.demand_P[position]) if key not in self.state.elsewhere
                )  # fmt: skip
            return max(0.0, self._order[slot][0] - ready) if slot < len(self._order) else 0.0

        return decide

    def _work_of_one(self, position: int, slot: int) -> Callable[[float], float]:
        return lambda ready: self.inputs.work_P[position][self._order[slot][1]] if slot < len(self._order) else 0.0

    def _release(self, position: int) -> float:
        self.state.release(2 * position + 1)
        return 0.0

    def result(self, times: Times) -> DecodeResult:
        """Return what happened once the Program has been executed; stalls are not attributed."""
        ends = [max(float(times.end[op][0]) for op in last) for last in self._last]
        start = float(times.start[0][0])
        return self.state.result(np.diff(np.array([start, *ends])), {})


def program_of(case: Decode) -> DecodeProgram:
    """Return `case` as a Program with decide hooks. Raises InputError for links of discipline priority or predictions on the CPU."""
    return DecodeProgram(case)


def decode_program(case: Decode) -> DecodeResult:
    """Return the result of `case` from an Engine of its own with `program_of`: slow, for comparison."""
    engine, built = Engine(1), program_of(case)
    times: list[Times] = []

    def main() -> Generator[Any, Any, None]:
        times.append((yield from engine.execute(built.program)))

    engine.env.process(main())
    engine.env.run()
    return built.result(times[0])
