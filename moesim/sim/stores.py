"""Stores: the memory tiers of a machine as a tree, and what lies in them.

A leaf is the fastest memory of a device; the parent of a store is where it is refilled from (SRAM → HBM → DRAM → NVMe or
UFS → remote), so all devices of a node meet in its DRAM. Sizes are whole bytes, rounded up to pages. What is held has a
category (weights, KV, activations, staging, optimizer, gradients). Copies of an object may lie in several stores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil, isfinite

from moesim.errors import InputError, SimulationError, describe
from moesim.hardware.cluster import Cluster, Tier
from moesim.units import format_bytes

CATEGORIES = ("weights", "kv", "activations", "staging", "optimizer", "gradients")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that lies in a store: an expert, or a part of one."""

    layer: int
    expert: int = -1
    """-1: the dense part of the layer."""
    precision: str = ""
    """Empty: the model's own."""
    plane: int = -1
    """Bit plane; -1: all of them."""
    category: str = "weights"
    writable: bool = False
    """True for training state: it has to be written back before it leaves. Read-only weights leave free."""

    def __str__(self) -> str:
        parts = [f"layer {self.layer}", f"expert {self.expert}" if self.expert >= 0 else "dense"]
        parts += [self.precision] if self.precision else []
        parts += [f"plane {self.plane}"] if self.plane >= 0 else []
        return " ".join([*parts, self.category])


@dataclass(slots=True)
class _Held:
    nbytes: int
    pinned: bool


@dataclass(slots=True, eq=False)
class Store:
    """One memory: capacity, residents, pins."""

    name: str
    """`hbm[3]`, `dram[node 0]`."""
    tier: str
    capacity_bytes: int
    read_Bps: float = float("inf")
    write_Bps: float = float("inf")
    latency_s: float = 0.0
    link: str | None = None
    """Link over which this store refills the one below it."""
    parent: Store | None = None
    """Where it is refilled from."""
    page_bytes: int = 1
    used: dict[str, int] = field(default_factory=dict)
    """Category → bytes now."""
    peak: dict[str, int] = field(default_factory=dict)
    """Category → most bytes ever."""
    used_bytes: int = 0
    peak_bytes: int = 0
    _items: dict[Item, _Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (isfinite(self.capacity_bytes) and self.capacity_bytes >= 0):
            raise InputError(describe(f"store {self.name}", "capacity", self.capacity_bytes, "must be finite and >= 0"))
        if self.page_bytes < 1:
            raise InputError(describe(f"store {self.name}", "page_bytes", self.page_bytes, "must be >= 1"))
        self.capacity_bytes = int(self.capacity_bytes)

    @property
    def free_bytes(self) -> int:
        """What is left."""
        return self.capacity_bytes - self.used_bytes

    def __contains__(self, item: Item) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def pages(self, nbytes: float) -> int:
        """Return the bytes that `nbytes` occupy in whole pages."""
        if not (isfinite(nbytes) and nbytes >= 0):
            raise SimulationError(describe(f"store {self.name}", "bytes", nbytes, "must be finite and >= 0"))
        return ceil(nbytes / self.page_bytes) * self.page_bytes

    def reserve(self, category: str, nbytes: float, what: str = "") -> int:
        """Occupy bytes that belong to no Item (a KV pool, activations); return the bytes in whole pages.

        Raises SimulationError if they do not fit.
        """
        size = self.pages(nbytes)
        self._occupy(category, size, what or category)
        return size

    def release(self, category: str, nbytes: float) -> None:
        """Give back what `reserve` occupied. Raises SimulationError if the category holds less."""
        size = self.pages(nbytes)
        if size > self.used.get(category, 0) - sum(held.nbytes for item, held in self._items.items() if item.category == category):
            raise SimulationError(describe(f"store {self.name}", f"release of {category}", size, "is more than is reserved; residency must stay >= 0"))
        self._vacate(category, size)

    def surge(self, category: str, nbytes: float, what: str) -> None:
        """Note that `nbytes` were occupied for a while beside all that is there now. Raises SimulationError if they did not fit."""
        size = self.pages(nbytes)
        self._occupy(category, size, what)
        self._vacate(category, size)

    def put(self, item: Item, nbytes: float, *, pinned: bool = False) -> int:
        """Make `item` resident; return its bytes in whole pages.

        Raises SimulationError if it is there already or does not fit; nothing is evicted here, a cache policy decides who leaves.
        """
        if item in self._items:
            raise SimulationError(f"{item}: is in {self.name} already; one copy per store")
        size = self.pages(nbytes)
        self._occupy(item.category, size, str(item))
        self._items[item] = _Held(size, pinned)
        return size

    def evict(self, item: Item) -> int:
        """Take `item` out; return the bytes that have to be written back to the parent (0 for read-only weights).

        Raises SimulationError if it is not there, is pinned, or must be written back and there is no parent.
        """
        held = self.check_evictable(item)
        del self._items[item]
        self._vacate(item.category, held.nbytes)
        return held.nbytes if item.writable else 0

    def check_evictable(self, item: Item) -> _Held:
        """Raise SimulationError if `evict` would."""
        held = self._held(item)
        if held.pinned:
            raise SimulationError(f"{item}: is pinned in {self.name}; a pinned object must not be evicted, unpin it first")
        if item.writable and self.parent is None:
            size = format_bytes(held.nbytes)
            raise SimulationError(f"{item}: cannot leave {self.name}, {size} of training state must be written back and no tier lies behind it")
        return held

    def pin(self, item: Item, pinned: bool = True) -> None:
        """Keep `item` from being evicted, or allow it again."""
        self._held(item).pinned = pinned

    def bytes_of(self, item: Item) -> int:
        """Return the bytes that `item` occupies here."""
        return self._held(item).nbytes

    def _held(self, item: Item) -> _Held:
        held = self._items.get(item)
        if held is None:
            raise SimulationError(f"{item}: is not in {self.name}; load it first")
        return held

    def _occupy(self, category: str, size: int, what: str) -> None:
        if category not in CATEGORIES:
            raise InputError(describe(f"store {self.name}", "category", category, f"must be one of {', '.join(CATEGORIES)}"))
        missing = self.used_bytes + size - self.capacity_bytes
        if missing > 0:
            held = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in sorted(self.used.items()) if nbytes) or "nothing"
            raise SimulationError(
                f"{what}: does not fit {self.name}, {format_bytes(missing)} are missing; "
                f"residents must be <= {format_bytes(self.capacity_bytes)} and there are {held}"
            )
        self.used[category] = self.used.get(category, 0) + size
        self.used_bytes += size
        self.peak[category] = max(self.peak.get(category, 0), self.used[category])
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _vacate(self, category: str, size: int) -> None:
        self.used[category] = self.used.get(category, 0) - size
        self.used_bytes -= size


class StoreTree:
    """All stores of a machine."""

    def __init__(self, stores: list[Store]) -> None:
        names = [store.name for store in stores]
        if len(set(names)) != len(names):
            raise InputError(describe("stores", "names", names, "must be distinct"))
        self.stores = {store.name: store for store in stores}
        for store in stores:
            self.chain(store)

    @classmethod
    def from_cluster(cls, cluster: Cluster, *, page_bytes: int = 1) -> StoreTree:
        """Build the tree of a Cluster: one store per device or node for every tier.

        Device tiers from small to large, then node tiers from fast to slow: each is refilled from the next.
        """
        own = sorted((tier for tier in cluster.tiers.values() if tier.attached_to == "device"), key=lambda tier: (tier.capacity_bytes, tier.name))
        common = sorted((tier for tier in cluster.tiers.values() if tier.attached_to != "device"), key=lambda tier: (-tier.read_Bps, tier.name))
        stores: list[Store] = []
        for node in range(cluster.num_nodes):
            parent: Store | None = None
            for tier in reversed(common):
                parent = _store(tier, f"{tier.name}[node {node}]", parent, page_bytes)
                stores.append(parent)
            for rank in range(node * cluster.devices_per_node, (node + 1) * cluster.devices_per_node):
                above = parent
                for tier in reversed(own):
                    above = _store(tier, f"{tier.name}[{rank}]", above, page_bytes)
                    stores.append(above)
        return cls(stores)

    def at(self, cluster: Cluster, tier: str, rank: int) -> Store:
        """Return the store of `tier` that `rank` uses. Raises InputError if the machine has none."""
        for name in (f"{tier}[{rank}]", f"{tier}[node {cluster.node_of(rank)}]"):
            if name in self.stores:
                return self.stores[name]
        raise InputError(describe(cluster.name, "tier", tier, f"is not a tier of this machine; it has {', '.join(sorted(cluster.tiers))}"))

    def chain(self, store: Store) -> list[Store]:
        """Return `store` and the stores behind it, nearest first. Raises InputError if they form a circle or lie outside the tree."""
        result: list[Store] = []
        at: Store | None = store
        while at is not None:
            if any(at is other for other in result):
                raise InputError(describe("stores", "parent", at.name, "is refilled from itself; stores must form a tree"))
            if self.stores.get(at.name) is not at:
                raise InputError(describe("stores", "parent", at.name, "is not among the stores of the tree"))
            result.append(at)
            at = at.parent
        return result

    def copies(self, item: Item) -> list[Store]:
        """Return the stores that hold `item`."""
        return [store for store in self.stores.values() if item in store]

    def source(self, item: Item, store: Store) -> list[Store]:
        """Return the stores on the way from the nearest copy behind `store` to it: [store, …, holder].

        Raises SimulationError if no store of the chain holds it.
        """
        chain = self.chain(store)
        for index, other in enumerate(chain):
            if item in other:
                return chain[: index + 1]
        raise SimulationError(f"{item}: has no copy in {', '.join(other.name for other in chain)}; every object must lie in some tier behind its device")

    def evict(self, item: Item, store: Store) -> int:
        """Take `item` out of `store`; training state moves to the parent, where it must fit. Return the bytes written back."""
        held, parent = store.check_evictable(item), store.parent
        if item.writable and parent is not None and item not in parent:
            parent.put(item, held.nbytes)
        return store.evict(item)

    def peaks(self) -> dict[str, int]:
        """Return tier → most bytes in any one store of it."""
        result: dict[str, int] = {}
        for store in self.stores.values():
            result[store.tier] = max(result.get(store.tier, 0), store.peak_bytes)
        return result


def _store(tier: Tier, name: str, parent: Store | None, page_bytes: int) -> Store:
    return Store(
        name=name, tier=tier.name, capacity_bytes=int(tier.capacity_bytes), read_Bps=tier.read_Bps, write_Bps=tier.write_Bps, latency_s=tier.latency_s,
        link=tier.link, parent=parent, page_bytes=page_bytes,
    )  # fmt: skip
