"""Decoding with experts behind a link: per step and layer attention → gate → loads, beside prefetches → experts.

`decode` evaluates the recurrence over steps × layers on one device without an event loop; `offload_program` says the
same to the Engine. Times come in as numbers, arrays or callables, so nothing here knows a cost table. The gate of a
layer decides what is loaded; predictions issue prefetches when a gate has decided or when a layer's experts have run.
Seconds, bytes. Shapes: T steps (decoded tokens or batches), L layers, K experts, E experts per layer, P = T · L.
"""

from __future__ import annotations

from collections import deque
from math import inf

import numpy as np

from moesim.sim.offload_case import CopyLink, Decode, DecodeResult, Inputs, Prefetch, prepare
from moesim.sim.offload_state import CAUSES, Residency
from moesim.sim.transfers import FifoPath, PriorityPath

__all__ = ["CopyLink", "Decode", "DecodeResult", "Prefetch", "decode"]


def make_path(case: Decode, inputs: Inputs) -> FifoPath | PriorityPath:
    """Return the links of `case`."""
    if case.host.discipline == "fifo":
        return FifoPath(inputs.num_keys)
    return PriorityPath(inputs.num_keys, host_chunk=case.host.chunk_bytes, disk_chunk=case.disk.chunk_bytes if case.disk is not None else None)


def decode(case: Decode) -> DecodeResult:
    """Return when every step of `case` ends and what moved. Raises InputError or SimulationError if something does not fit."""
    return Recurrence(case).run()


class Recurrence:
    """The fast path: what a device does about one position after the other.

    `run` steps through all of them; who has gates of its own (a rank of an expert-parallel group) calls `layer` in order of positions, then `finish`.
    """

    def __init__(self, case: Decode) -> None:
        self.case, self.inputs = case, prepare(case)
        self.path = make_path(case, self.inputs)
        self.state = Residency(case, self.inputs, self.path)
        self.stall_s = dict.fromkeys(CAUSES, 0.0)
        self.wait_P: list[float] = []
        """By position, seconds from the gate in which no expert ran."""
        self.work_P: list[float] = []
        """By position, seconds in which experts ran."""
        self._other_free = 0.0
        self._pending: deque[tuple[float, int]] = deque()
        """(when its prediction is ready, position) of prefetches to come, in order of time."""
        prefetch = case.prefetch
        self._at_gate, self._at_end = (prefetch is not None and prefetch.issue == issue for issue in ("gate", "experts"))
        self._each_starts = case.expert_start == "each"

    def run(self) -> DecodeResult:
        """Decode all steps, one after another."""
        inputs, layer, clock = self.inputs, self.layer, 0.0
        last = inputs.num_layers - 1
        ends = [0.0]
        for position, before in enumerate(inputs.before_P):
            clock = layer(position, clock + before)
            if position % inputs.num_layers == last:
                ends.append(clock)
        return self.finish(np.diff(np.asarray(ends)))

    def finish(self, step_s: np.ndarray) -> DecodeResult:
        """Let what was issued run to its end, and return what happened."""
        self._issue_until(inf, self.inputs.positions, 2 * self.inputs.positions)
        self.path.finish()
        return self.state.result(step_s, self.stall_s)

    def layer(self, position: int, gate: float) -> float:
        """Return when the device is done with `position`, whose gate has decided at `gate`."""
        path, state, pending = self.path, self.state, self._pending
        chunked = path.chunked
        if pending:
            self._issue_until(gate, position, 2 * position - 1)
        if chunked:
            path.advance(gate)
        calm = state.gate(position, gate, self._other_free)
        free = gate
        computed = 0.0
        if not calm and state.computed_s:
            computed = self._other_free = max(self._other_free, gate) + sum(state.computed_s)
        if self._at_gate:
            free = self._predict(position, gate, 2 * position)
        if calm:
            work = self.inputs.work_sum_P[position]
            clock = free + work
        else:
            if chunked:
                while not path.drain(gate, pending[0][0] if pending else inf):
                    self._issue_until(pending[0][0], position + 1, 2 * position)
            clock, work = self._each(position, gate, free) if self._each_starts else self._all(position, free)
            if computed > clock:
                self.stall_s["compute"] += computed - clock
                clock = computed
        if pending:
            self._issue_until(clock, position + 1, 2 * position)
        if chunked and state.staging:
            path.advance(clock)
        state.release(2 * position + 1)
        if self._at_end:
            if chunked:
                path.advance(clock)
            clock = self._predict(position, clock, 2 * position + 1)
        self.wait_P.append(clock - gate - work)
        self.work_P.append(work)
        return clock

    def _predict(self, position: int, now: float, tick: int) -> float:
        """Issue the prefetches that `position` is the first to predict; return when the device is free."""
        prefetch = self.case.prefetch
        assert prefetch is not None
        free = now
        first, last = self.state.targets(position)
        for target in range(first, last):
            if prefetch.cost_s == 0:
                self.state.prefetch(target, tick, now)
            elif prefetch.device == "gpu":
                free += prefetch.cost_s
                self._pending.append((free, target))
            else:
                self._other_free = max(self._other_free, now) + prefetch.cost_s
                self._pending.append((self._other_free, target))
        return free

    def _issue_until(self, until: float, position: int, tick: int) -> None:
        """Issue the prefetches whose predictions are ready by `until`; those for positions before `position` come too late."""
        while self._pending and self._pending[0][0] <= until:
            ready, target = self._pending.popleft()
            if target < position:
                self.state.counts.late_predictions += len(self.inputs.predicted_P[target])
            else:
                self.path.advance(ready)
                self.state.prefetch(target, tick, ready)

    def _all(self, position: int, free: float) -> tuple[float, float]:
        """Return when the experts have run and how long, if they start together."""
        state, arrival = self.state, self.path.arrival
        now = free
        waits = [(arrival[key], cause) for key, cause in state.awaited.items()]
        if len(waits) > 1:
            waits.sort()
        for end, cause in waits:
            if end > now:
                self.stall_s[cause] += end - now
                now = end
        total = self.inputs.work_sum_P[position]
        if state.elsewhere:
            keys, work = self.inputs.demand_P[position], self.inputs.work_P[position]
            total = sum(seconds for key, seconds in zip(keys, work, strict=True) if key not in state.elsewhere)
        return now + total, total

    def _each(self, position: int, gate: float, free: float) -> tuple[float, float]:
        """Return when the experts have run and how long, if each starts when it is there."""
        state, arrival = self.state, self.path.arrival
        keys, work = self.inputs.demand_P[position], self.inputs.work_P[position]
        queue = [(arrival[key] if key in state.awaited else gate, index, key) for index, key in enumerate(keys) if key not in state.elsewhere]
        now, total = free, 0.0
        for end, index, key in sorted(queue):
            if end > now:
                self.stall_s[state.awaited[key]] += end - now
                now = end
            now += work[index]
            total += work[index]
        return now, total
