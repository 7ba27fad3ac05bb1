"""Caches of experts: who is resident, who leaves, and how often the gate found what it wanted.

Decisions depend on the order of demands and predictions, never on the clock, so a faster link changes when an expert
arrives and not which one stays. An expert is a key (layer · E + expert). A tick is 2 · position when a gate has decided
and 2 · position + 1 when its experts have run; `hold` is the tick from which a key may leave: a demanded expert stays
until it has run, a predicted one until the gate of its layer, a pinned one for ever. What finds no room is staged:
kept in a buffer beside the cache for its one use. Shapes: T steps, L layers, K demands.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from moesim.errors import InputError, SimulationError, describe
from moesim.sim import policies
from moesim.sim.policies import CacheView, Oracle, Policy
from moesim.units import format_bytes

SCOPES = ("layer", "global", "device")
ABSENT, CACHED, STAGED = 0, 1, 2
_FOREVER = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """How the expert cache of one memory tier works."""

    slots: int | tuple[int, ...] | None = None
    """Experts per pool; one number, or one per pool (layer)."""
    capacity_bytes: float | tuple[float, ...] | None = None
    """Bytes per pool; exactly one of `slots` and `capacity_bytes`."""
    scope: str = "layer"
    """A pool for every `layer`, one `global` pool, or one for every `device`."""
    policy: str | Policy = "lru"
    initial: tuple[tuple[int, int], ...] = ()
    """(layer, expert) resident at the start, oldest first."""
    pins: tuple[tuple[int, int], ...] = ()
    """(layer, expert) resident at the start and never evicted."""
    staging_slots: int | None = None
    """Buffers for experts that find no room; None: as many as the tier has room for."""
    device_LE: np.ndarray | None = None
    """int [L, E]: device that holds an expert, for the scope `device`."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise InputError(describe("cache", "scope", self.scope, f"must be one of {', '.join(SCOPES)}"))
        if (self.slots is None) == (self.capacity_bytes is None):
            raise InputError(describe("cache", "slots", self.slots, "or capacity_bytes must be given, one of the two"))
        if self.staging_slots is not None and self.staging_slots < 0:
            raise InputError(describe("cache", "staging_slots", self.staging_slots, "must be >= 0"))
        if (self.scope == "device") != (self.device_LE is not None):
            raise InputError(describe("cache", "device_LE", "given" if self.device_LE is not None else None, "must be given for scope device, and only then"))


@dataclass(slots=True)
class Counts:
    """What happened to the demands of the gate and to the prefetches."""

    hits: int = 0
    """In place when the gate had decided."""
    late_hits: int = 0
    """On their way by a prefetch: the rest of the transfer is waited for."""
    misses: int = 0
    """Neither."""
    useless_prefetches: int = 0
    """Experts that were prefetched and never used."""
    prefetches: int = 0
    """Transfers issued by predictions."""
    cancelled_prefetches: int = 0
    """Of them, stopped before the last chunk."""
    refused_prefetches: int = 0
    """Predictions that found no room."""
    late_predictions: int = 0
    """Predictions that were ready only after the gate of their layer; not issued."""
    cold_misses: int = 0
    """Of the misses, those that found a free slot; a convention counts them as hits (`cold_start: free`)."""
    computed: int = 0
    """Of the misses, computed on another device."""
    low_precision: int = 0
    """Of the misses, loaded at low precision."""
    skipped: int = 0
    """Of the misses, left out."""

    @property
    def demands(self) -> int:
        """Experts that gates have chosen."""
        return self.hits + self.late_hits + self.misses

    @property
    def hit_rate(self) -> float:
        """Hits / demands; late hits are not hits."""
        return self.hits / self.demands if self.demands else 0.0

    def report(self) -> dict[str, float]:
        """Return all counts and the hit rate."""
        return {**{field.name: getattr(self, field.name) for field in fields(self)}, "hit_rate": self.hit_rate}


class Cache:
    """The experts of one memory tier.

    bytes_of: bytes of every key. room_bytes: what the tier has left for cache and staging together.
    """

    def __init__(
        self,
        settings: CacheSettings,
        *,
        num_layers: int,
        num_experts: int,
        bytes_of: Sequence[int],
        tier: str = "hbm",
        room_bytes: float = float("inf"),
        future: Oracle | None = None,
    ) -> None:
        self.tier = tier
        self.num_layers, self.num_experts = num_layers, num_experts
        self.policy = policies.get("cache", settings.policy)
        self.future = future if self.policy.needs_future else None
        if self.policy.needs_future and future is None:
            raise InputError(describe(f"cache of {tier}", "policy", self.policy.name, "needs the demands to come; use lru, lfu or fifo"))
        self.room_bytes = room_bytes
        self.staging_slots = settings.staging_slots
        self.by_slots = settings.slots is not None
        self.bytes_of = bytes_of
        keys = num_layers * num_experts
        self.pool_of, self.capacity = self._pools(settings)
        self.pools: list[OrderedDict[int, None]] = [OrderedDict() for _ in self.capacity]
        self.staged: dict[int, None] = {}
        self.used = [0] * len(self.capacity)
        self.where = [ABSENT] * keys
        self.hold = [0] * keys
        self.held_bytes = [0] * keys
        self.last_used, self.uses, self.inserted = [-1] * keys, [0] * keys, [0] * keys
        self.unused: set[int] = set()
        """Prefetched and not used yet."""
        self.useless = self.cold = self.insertions = 0
        self.bytes_now = self.peak_bytes = self.staging_bytes = self.peak_staging_bytes = 0
        self._wanted: Sequence[int] = ()
        self.on_leave: Callable[[int], None] | None = None
        """Called with every key that leaves."""
        self._touches = self.policy.order != "insertion"
        self._observed = not self.policy.order
        self._one_leaves = self.by_slots and bool(self.policy.order)
        for place in (*settings.pins, *settings.initial):
            self._start(place)
        for layer, expert in settings.pins:
            self.hold[layer * num_experts + expert] = _FOREVER

    def _pools(self, settings: CacheSettings) -> tuple[list[int], list[int]]:
        layers, experts = self.num_layers, self.num_experts
        if settings.scope == "layer":
            pool_of = np.repeat(np.arange(layers), experts)
        elif settings.scope == "global":
            pool_of = np.zeros(layers * experts, dtype=np.int64)
        else:
            pool_of = np.asarray(settings.device_LE).reshape(-1)
            if pool_of.shape != (layers * experts,) or pool_of.min(initial=0) < 0:
                raise InputError(describe(f"cache of {self.tier}", "device_LE", settings.device_LE, f"must be [{layers}, {experts}] with devices >= 0"))
        count = layers if settings.scope == "layer" else int(pool_of.max(initial=0)) + 1
        name = "slots" if self.by_slots else "capacity_bytes"
        given = settings.slots if self.by_slots else settings.capacity_bytes
        capacity = list(given) if isinstance(given, tuple) else [given] * count
        if len(capacity) != count or any(not (value is not None and value >= 0) for value in capacity):
            raise InputError(describe(f"cache of {self.tier}", name, given, f"must be >= 0, one number or one per pool ({count})"))
        return pool_of.tolist(), [int(min(value or 0, float(_FOREVER))) for value in capacity]

    def _start(self, place: tuple[int, int]) -> None:
        layer, expert = place
        if not (0 <= layer < self.num_layers and 0 <= expert < self.num_experts):
            raise InputError(describe(f"cache of {self.tier}", "initial", place, f"must be (layer < {self.num_layers}, expert < {self.num_experts})"))
        key = layer * self.num_experts + expert
        if self.where[key] == CACHED:
            return
        size = 1 if self.by_slots else self.bytes_of[key]
        missing = self.used[self.pool_of[key]] + size - self.capacity[self.pool_of[key]]
        if missing > 0:
            unit = f"{missing} slots" if self.by_slots else format_bytes(missing)
            raise InputError(f"{self.name_of(key)}: does not fit the cache of {self.tier}, {unit} are missing; initial and pinned experts must fit together")
        self._insert(key, self.bytes_of[key])

    def name_of(self, key: int) -> str:
        """Return `layer 3 expert 5`."""
        return f"layer {key // self.num_experts} expert {key % self.num_experts}"

    # --- demands and predictions ---------------------------------------------------------------------

    def demand(self, keys: Sequence[int], tick: int) -> tuple[list[int], list[int]]:
        """Note that the gate at `tick` wants `keys`; return those resident or on their way, and those that are missing."""
        resident: list[int] = []
        missing: list[int] = []
        where, hold, unused = self.where, self.hold, self.unused
        self._wanted = keys
        for key in keys:
            if hold[key] <= tick:
                hold[key] = tick + 1
        if self._observed:
            for key in keys:
                self.uses[key] += 1
                self.last_used[key] = tick >> 1
        for key in keys:
            place = where[key]
            if place == ABSENT:
                missing.append(key)
                continue
            resident.append(key)
            unused.discard(key)
            if place == STAGED:
                self._promote(key, tick)
            elif self._touches:
                self.pools[self.pool_of[key]].move_to_end(key)
        return resident, missing

    def admit(self, key: int, tick: int, nbytes: int | None = None) -> None:
        """Make room for a demanded key that is missing, if need be in the buffer of the prefetch that is wanted last.

        Raises SimulationError if neither cache nor staging has any.
        """
        size = self.bytes_of[key] if nbytes is None else nbytes
        pool = self.pool_of[key]
        free = self.used[pool] + (1 if self.by_slots else size) <= self.capacity[pool]
        self.cold += free
        if free or self._make_room(pool, 1 if self.by_slots else size, tick):
            self._insert(key, size)
        elif not self._stage(key, size):
            awaited = [other for other in self.staged if other not in self._wanted]
            if awaited:
                last = max(awaited, key=lambda other: (self.hold[other] <= tick, self.hold[other]))
                self.hold[last] = 0
                self.discard(last)
            if not awaited or not self._stage(key, size):
                missing = max(0.0, self.bytes_now + size - self.room_bytes) or size
                slots = "any number of" if self.staging_slots is None else self.staging_slots
                raise SimulationError(
                    f"{self.name_of(key)}: finds no room in {self.tier}, {format_bytes(missing)} are missing; cache and staging must be "
                    f"<= {format_bytes(self.room_bytes)} in {slots} staging slots, and all residents are pinned or in use: give more room or staging_slots"
                )

    def admit_predicted(self, key: int, tick: int, target: int, *, staged: bool = False) -> bool:
        """Make room for a predicted key that is absent and keep it until tick `target`; return whether there is any.

        staged: in a staging buffer; when it is used it moves to the cache from there.
        """
        size = self.bytes_of[key]
        pool, need = self.pool_of[key], 1 if self.by_slots else size
        if not staged and (self.used[pool] + need <= self.capacity[pool] or self._make_room(pool, need, tick)):
            self._insert(key, size)
        elif not self._stage(key, size):
            return False
        self.hold[key] = target
        self.unused.add(key)
        return True

    def release(self, tick: int) -> None:
        """Empty the staging buffers that nobody waits for any more."""
        if self.staged:
            for key in [key for key in self.staged if self.hold[key] <= tick]:
                self.discard(key)

    def discard(self, key: int) -> None:
        """Take `key` out, wherever it is."""
        place = self.where[key]
        if place == ABSENT:
            return
        if place == CACHED:
            pool = self.pool_of[key]
            del self.pools[pool][key]
            self.used[pool] -= 1 if self.by_slots else self.held_bytes[key]
        else:
            del self.staged[key]
            self.staging_bytes -= self.held_bytes[key]
        self.where[key] = ABSENT
        self.bytes_now -= self.held_bytes[key]
        if key in self.unused:
            self.unused.discard(key)
            self.useless += 1
        if self.on_leave is not None:
            self.on_leave(key)

    # --- room ------------------------------------------------------------------------------------------

    def _insert(self, key: int, nbytes: int) -> None:
        pool = self.pool_of[key]
        self.pools[pool][key] = None
        self.used[pool] += 1 if self.by_slots else nbytes
        self.where[key] = CACHED
        if self._observed:
            self.insertions += 1
            self.inserted[key] = self.insertions
        self._occupy(key, nbytes)

    def _occupy(self, key: int, nbytes: int) -> None:
        self.held_bytes[key] = nbytes
        self.bytes_now += nbytes
        if self.bytes_now > self.peak_bytes:
            self.peak_bytes = self.bytes_now
            if self.bytes_now > self.room_bytes:
                raise SimulationError(
                    f"{self.name_of(key)}: does not fit {self.tier}, {format_bytes(self.bytes_now - self.room_bytes)} are missing; "
                    f"cache and staging must be <= {format_bytes(self.room_bytes)}: give fewer slots or a shorter lookahead"
                )

    def _stage(self, key: int, nbytes: int) -> bool:
        if (self.staging_slots is not None and len(self.staged) >= self.staging_slots) or self.bytes_now + nbytes > self.room_bytes:
            return False
        self.staged[key] = None
        self.where[key] = STAGED
        self.staging_bytes += nbytes
        if self.staging_bytes > self.peak_staging_bytes:
            self.peak_staging_bytes = self.staging_bytes
        self._occupy(key, nbytes)
        return True

    def _promote(self, key: int, tick: int) -> None:
        """Move a staged expert that is used into the cache if room can be made; nothing crosses a link."""
        pool, nbytes = self.pool_of[key], self.held_bytes[key]
        need = 1 if self.by_slots else nbytes
        if self.used[pool] + need <= self.capacity[pool] or self._make_room(pool, need, tick):
            del self.staged[key]
            self.staging_bytes -= nbytes
            self.bytes_now -= nbytes
            self._insert(key, nbytes)

    def _make_room(self, pool: int, need: int, tick: int) -> bool:
        """Evict until `need` units fit; evict nobody if that cannot be."""
        missing = self.used[pool] + need - self.capacity[pool]
        if need > self.capacity[pool]:
            return False
        hold = self.hold
        if self._one_leaves:
            for key in self.pools[pool]:
                if hold[key] <= tick:
                    self.discard(key)
                    return True
            return False
        victims: list[int] = []
        if self.policy.order:
            for key in self.pools[pool]:
                if hold[key] <= tick:
                    victims.append(key)
                    missing -= 1 if self.by_slots else self.held_bytes[key]
                    if missing <= 0:
                        break
        else:
            candidates = [key for key in self.pools[pool] if hold[key] <= tick]
            while missing > 0 and candidates:
                victim = self._ask(pool, candidates, tick >> 1)
                candidates.remove(victim)
                victims.append(victim)
                missing -= 1 if self.by_slots else self.held_bytes[victim]
        if missing > 0:
            return False
        for key in victims:
            self.discard(key)
        return True

    def _ask(self, pool: int, candidates: list[int], position: int) -> int:
        view = CacheView(
            pool=pool, position=position, num_layers=self.num_layers, num_experts=self.num_experts, candidates=tuple(candidates),
            last_used=self.last_used, uses=self.uses, inserted=self.inserted, future=self.future,
        )  # fmt: skip
        victim = self.policy.function(view)
        if isinstance(victim, bool) or not isinstance(victim, (int, np.integer)) or victim not in candidates:
            shown = ", ".join(f"{key} ({self.name_of(key)})" for key in candidates[:4]) + (" …" if len(candidates) > 4 else "")
            rule = f"must be one of the evictable experts of pool {pool}: {shown}"
            raise InputError(describe(f"policy {self.policy.name} (hook cache)", "victim", victim, rule))
        return int(victim)
