"""Who is resident while a model decodes through memory tiers, and what every gate and prediction does about it.

Shared by the formulations of `offload`: a `Residency` takes the decisions in their order, asks a path for the copies and
never advances a clock. Positions and keys as in `offload_case`, ticks as in `cache`.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim import policies
from moesim.sim.cache import CACHED, Cache, CacheSettings, Counts
from moesim.sim.demands import Future
from moesim.sim.offload_case import Decode, DecodeResult, Inputs
from moesim.sim.policies import COMPUTE, LOAD, MISS_ACTIONS, PRECISION, MissView
from moesim.sim.stores import Store
from moesim.sim.transfers import NO_DISK

CAUSES = ("late_hit", "miss", "disk_miss", "compute")


class Path(Protocol):
    """What `Residency` asks of the links; see `transfers`."""

    arrival: list[float]

    @property
    def host_bytes(self) -> float: ...
    @property
    def disk_bytes(self) -> float: ...
    def push(self, key: int, now: float, host_s: float, disk_s: float, nbytes: int, *, demanded: bool) -> None: ...
    def promote(self, keys: list[int]) -> None: ...
    def cancel(self, key: int) -> bool: ...
    def cancel_reads(self, key: int) -> bool: ...
    def unfinished(self) -> list[int]: ...
    def wait_s(self, now: float) -> float: ...


class Residency:
    """Who is in device and host memory, and what every gate and prediction does about it."""

    def __init__(self, case: Decode, inputs: Inputs, path: Path) -> None:
        self.case, self.inputs, self.path = case, inputs, path
        self.counts = Counts()
        future = Future(np.asarray(case.routes_TLK), case.num_experts)
        self.device = self._cache(case.cache, case.device_store, "device", future)
        self.host: Cache | None = None
        if case.host_cache is not None:
            self.host = self._cache(case.host_cache, case.host_store, "host", future)
            self.host.on_leave = self._left_host
        if case.host.discipline == "priority":
            self.device.on_leave = self._left_device
        policy = policies.get("miss", case.miss)
        self._miss = None if policy.name == LOAD else policy
        self._cancel_wrong = case.prefetch is not None and case.prefetch.cancel_wrong
        self._staged = case.prefetch is not None and case.prefetch.into == "staging"
        self._across = case.prefetch is not None and case.prefetch.across_steps
        self._reach = 1 + case.prefetch.lookahead if case.prefetch is not None else 0
        self._issued = 0
        self.host_hits = self.host_misses = 0
        self.now = 0.0
        self.awaited: dict[int, str] = {}
        """Keys that the last gate waits for → why."""
        self.elsewhere: list[int] = []
        """Keys that do not run on the device."""
        self.computed_s: list[float] = []
        """Times of those that the other device computes."""

    def _cache(self, settings: CacheSettings, store: Store | None, tier: str, future: Future) -> Cache:
        return Cache(
            settings, num_layers=self.inputs.num_layers, num_experts=self.case.num_experts, bytes_of=self.inputs.bytes_of, future=future,
            tier=tier if store is None else store.tier, room_bytes=float("inf") if store is None else store.free_bytes,
        )  # fmt: skip

    @property
    def staging(self) -> bool:
        """Whether anything is staged."""
        return bool(self.device.staged) or (self.host is not None and bool(self.host.staged))

    # --- decisions -----------------------------------------------------------------------------------

    def gate(self, position: int, now: float, other_free: float = 0.0) -> bool:
        """Demand what the gate of `position` has chosen at `now`; return True if all of it is there."""
        tick, path = 2 * position, self.path
        arrival, counts = path.arrival, self.counts
        resident, missing = self.device.demand(self.inputs.demand_P[position], tick)
        late = [key for key in resident if arrival[key] > now]
        counts.hits += len(resident) - len(late)
        self.now = now
        if not late and not missing and not self._cancel_wrong:
            return True
        self.awaited = dict.fromkeys(late, "late_hit")
        self.elsewhere, self.computed_s = [], []
        counts.late_hits += len(late)
        counts.misses += len(missing)
        if late:
            if self.host is not None:
                self._hold_in_host(late, tick + 1)
            path.promote(late)
        if self._cancel_wrong:
            for key in path.unfinished():
                if self.device.hold[key] <= tick:
                    self.device.discard(key)
        for key in missing:
            if self._miss is None:
                self._load(key, tick, now)
            else:
                self._handle(key, position, now, other_free)
        return not late and not missing

    def _handle(self, key: int, position: int, now: float, other_free: float) -> None:
        inputs, case = self.inputs, self.case
        index = inputs.demand_P[position].index(key)
        layer, expert = divmod(key, case.num_experts)
        tokens = inputs.tokens_P[position][index]
        in_host = self.host is None or self.host.where[key] == CACHED
        compute_s = float(case.compute_s(layer, expert, tokens)) if case.compute_s is not None and in_host else None
        assert self._miss is not None
        action = self._miss.function(
            MissView(
                layer=layer,
                expert=expert,
                tokens=tokens,
                weight_above=inputs.above_P[position][index],
                work_s=inputs.work_P[position][index],
                load_s=inputs.host_s[key] + (0.0 if in_host else inputs.disk_s[key]),
                load_wait_s=self.path.wait_s(now),
                low_s=inputs.low_s[key] if inputs.low_s else None,
                compute_s=compute_s,
                compute_wait_s=max(0.0, other_free - now) + sum(self.computed_s),
            )  # fmt: skip
        )
        impossible = (action == COMPUTE and compute_s is None) or (action == PRECISION and not inputs.low_s)
        if action not in MISS_ACTIONS or impossible:
            rule = f"is not possible for {self.device.name_of(key)}" if impossible else f"must be one of {', '.join(MISS_ACTIONS)}"
            raise InputError(describe(f"policy {self._miss.name} (hook miss)", "action", action, rule))
        if action == LOAD:
            self._load(key, 2 * position, now)
        elif action == PRECISION:
            self.counts.low_precision += 1
            self.device.admit(key, 2 * position, inputs.low_bytes[key])
            self.path.push(key, now, inputs.low_s[key], NO_DISK, inputs.low_bytes[key], demanded=True)
            self.awaited[key] = "miss"
        else:
            self.elsewhere.append(key)
            if action == COMPUTE:
                assert compute_s is not None
                self.counts.computed += 1
                self.computed_s.append(compute_s)
            else:
                self.counts.skipped += 1

    def _load(self, key: int, tick: int, now: float) -> None:
        self.device.admit(key, tick)
        disk_s = NO_DISK if self.host is None else self._read(key, tick, tick + 1)
        self.path.push(key, now, self.inputs.host_s[key], disk_s, self.inputs.bytes_of[key], demanded=True)
        self.awaited[key] = "miss" if disk_s < 0 else "disk_miss"

    def _read(self, key: int, tick: int, hold: int) -> float:
        """Bring `key` to host memory; return the time of its disk read, `NO_DISK` if it is there."""
        assert self.host is not None
        _, missing = self.host.demand((key,), tick)
        if missing:
            self.host.admit(key, tick)
        if self.host.hold[key] < hold:
            self.host.hold[key] = hold
        self.host_hits += not missing
        self.host_misses += len(missing)
        return self.inputs.disk_s[key] if missing else NO_DISK

    def targets(self, position: int) -> tuple[int, int]:
        """Return the positions [first, last) that `position` is the first to predict."""
        first = self._issued if self._issued > position else position + 1
        last = position + self._reach
        end = self.inputs.positions if self._across else position - position % self.inputs.num_layers + self.inputs.num_layers
        if last > end:
            last = end
        if last > first:
            self._issued = last
        return first, last

    def prefetch(self, target: int, tick: int, now: float) -> None:
        """Issue at `now` the copies that the prediction for position `target` lacks."""
        device, inputs, path = self.device, self.inputs, self.path
        where, hold, due = device.where, device.hold, 2 * target
        for key in inputs.predicted_P[target]:
            if where[key]:
                if hold[key] < due:
                    hold[key] = due
                if self.host is not None and path.arrival[key] > now:
                    self._hold_in_host([key], due)
            elif device.admit_predicted(key, tick, due, staged=self._staged):
                self.counts.prefetches += 1
                disk_s = NO_DISK if self.host is None else self._read(key, tick, due)
                path.push(key, now, inputs.host_s[key], disk_s, inputs.bytes_of[key], demanded=False)
            else:
                self.counts.refused_prefetches += 1

    def release(self, tick: int) -> None:
        """Empty the staging buffers that nobody waits for any more."""
        self.device.release(tick)
        if self.host is not None:
            self.host.release(tick)

    # --- who leaves ----------------------------------------------------------------------------------

    def _hold_in_host(self, keys: list[int], tick: int) -> None:
        assert self.host is not None
        for key in keys:
            if self.host.where[key] and self.host.hold[key] < tick:
                self.host.hold[key] = tick

    def _left_device(self, key: int) -> None:
        """A copy to the device that is under way has lost its place: stop it, and its disk read too."""
        if self.path.cancel_reads(key):
            self.counts.cancelled_prefetches += 1
            if self.host is not None:
                self.host.discard(key)
        elif self.path.cancel(key):
            self.counts.cancelled_prefetches += 1

    def _left_host(self, key: int) -> None:
        """A disk read has lost its place: the device cannot get the expert either."""
        if self.path.cancel_reads(key):
            self.counts.cancelled_prefetches += 1
            self.device.discard(key)

    # --- the end -------------------------------------------------------------------------------------

    def result(self, step_s: np.ndarray, stall_s: dict[str, float]) -> DecodeResult:
        """Return what happened; the stores are told what was needed. Raises SimulationError if it did not fit."""
        case, peaks = self.case, {self.device.tier: self.device.peak_bytes}
        self.counts.useless_prefetches = self.device.useless + len(self.device.unused)
        self.counts.cold_misses = self.device.cold
        moved = {case.host.name: self.path.host_bytes}
        if case.device_store is not None:
            case.device_store.surge("weights", self.device.peak_bytes, "experts")
        if self.host is not None and case.disk is not None:
            peaks[self.host.tier] = self.host.peak_bytes
            moved[case.disk.name] = self.path.disk_bytes
            if case.host_store is not None:
                case.host_store.surge("weights", self.host.peak_bytes, "experts")
        return DecodeResult(
            step_s=step_s, counts=self.counts, stall_s=stall_s, moved_bytes=moved, peak_bytes=peaks, host_hits=self.host_hits, host_misses=self.host_misses
        )
