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
    inputs = prepare(case)
    path = make_path(case, inputs)
    state = Residency(case, inputs, path)
    return _Recurrence(case, inputs, path, state).run()


class _Recurrence:
    """The fast path: one loop over positions."""

    def __init__(self, case: Decode, inputs: Inputs, path: FifoPath | PriorityPath, state: Residency) -> None:
        self.case, self.inputs, self.path, self.state = case, inputs, path, state
        self.stall_s = dict.fromkeys(CAUSES, 0.0)
        self.other_free = 0.0
        self.pending: deque[tuple[float, int]] = deque()
        """(when its prediction is ready, position) of prefetches to come, in order of time."""

    def run(self) -> DecodeResult:
        inputs, path, state, pending = self.inputs, self.path, self.state, self.pending
        before, chunked = inputs.before_P, path.chunked
        prefetch = self.case.prefetch
        at_gate, at_end = prefetch is not None and prefetch.issue == "gate", prefetch is not None and prefetch.issue == "experts"
        each = self.case.expert_start == "each"
        layers = inputs.num_layers
        sum_P = inputs.work_sum_P
        ends: list[float] = []
        clock = 0.0
        for position in range(inputs.positions):
            gate = clock + before[position]
            if pending:
                self._issue_until(gate, position, 2 * position - 1)
            if chunked:
                path.advance(gate)
            calm = state.gate(position, gate, self.other_free)
            free = gate
            if not calm and state.computed_s:
                self.other_free = max(self.other_free, gate) + sum(state.computed_s)
                computed = self.other_free
            else:
                computed = 0.0
            if at_gate:
                free = self._predict(position, gate, 2 * position)
            if calm:
                clock = free + sum_P[position]
            else:
                if chunked:
                    while not path.drain(gate, pending[0][0] if pending else inf):
                        self._issue_until(pending[0][0], position + 1, 2 * position)
                clock = self._each(position, gate, free) if each else self._all(position, free)
                if computed > clock:
                    self.stall_s["compute"] += computed - clock
                    clock = computed
            if pending:
                self._issue_until(clock, position + 1, 2 * position)
            if chunked and state.staging:
                path.advance(clock)
            state.release(2 * position + 1)
            if at_end:
                if chunked:
                    path.advance(clock)
                clock = self._predict(position, clock, 2 * position + 1)
            if position % layers == layers - 1:
                ends.append(clock)
        self._issue_until(inf, inputs.positions, 2 * inputs.positions)
        path.finish()
        return state.result(np.diff(np.asarray([0.0, *ends])), self.stall_s)

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
                self.pending.append((free, target))
            else:
                self.other_free = max(self.other_free, now) + prefetch.cost_s
                self.pending.append((self.other_free, target))
        return free

    def _issue_until(self, until: float, position: int, tick: int) -> None:
        """Issue the prefetches whose predictions are ready by `until`; those for positions before `position` come too late."""
        while self.pending and self.pending[0][0] <= until:
            ready, target = self.pending.popleft()
            if target < position:
                self.state.counts.late_predictions += len(self.inputs.predicted_P[target])
            else:
                self.path.advance(ready)
                self.state.prefetch(target, tick, ready)

    def _all(self, position: int, free: float) -> float:
        """Return when the experts have run, if they start together."""
        state, arrival = self.state, self.path.arrival
        now = free
        waits = [(arrival[key], cause) for key, cause in state.awaited.items()]
        if len(waits) > 1:
            waits.sort()
        for end, cause in waits:
            if end > now:
                self.stall_s[cause] += end - now
                now = end
        if not state.elsewhere:
            return now + self.inputs.work_sum_P[position]
        keys, work = self.inputs.demand_P[position], self.inputs.work_P[position]
        return now + sum(seconds for key, seconds in zip(keys, work, strict=True) if key not in state.elsewhere)

    def _each(self, position: int, gate: float, free: float) -> float:
        """Return when the experts have run, if each starts when it is there."""
        state, arrival = self.state, self.path.arrival
        keys, work = self.inputs.demand_P[position], self.inputs.work_P[position]
        queue = [(arrival[key] if key in state.awaited else gate, index, key) for index, key in enumerate(keys) if key not in state.elsewhere]
        now = free
        for end, index, key in sorted(queue):
            if end > now:
                self.stall_s[state.awaited[key]] += end - now
                now = end
            now += work[index]
        return now
