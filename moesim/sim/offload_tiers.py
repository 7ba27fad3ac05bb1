"""The memory tiers that a replay with offloaded experts uses: who lies where, what fits, and the links in between.

Every rank has its device memory, an equal part of what the devices of a node share, and serial links of its own. A tier
on the link `disk` is cached by host memory where the node has one. Bytes, seconds.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from moesim.costs.model import CostModel
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES
from moesim.sim.build import ProgramBuilder
from moesim.sim.cache import CacheSettings
from moesim.sim.memory import MemoryAccount, account, capacity_bytes
from moesim.sim.offload_case import CopyLink
from moesim.sim.offload_demand import Demand, Demands, held_RLE
from moesim.sim.offload_settings import OffloadSettings
from moesim.sim.stores import Store
from moesim.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """What the machine offers to one run."""

    dense: MemoryAccount
    """What device memory holds beside experts."""
    expert_bytes: float
    low_bytes: float | None
    home: str
    """Tier that every expert lies in."""
    home_bytes: float
    """Experts in the fullest one."""
    host_tier: str | None
    """Tier that caches experts of a disk; None: they come straight from their home."""
    host: CopyLink
    disk: CopyLink | None
    caches: tuple[CacheSettings, ...]
    """Of every rank's device memory."""
    host_caches: tuple[CacheSettings, ...] | None

    def stores(self, rank: int, cluster: Cluster) -> tuple[Store, Store | None]:
        """Return the rank's device memory, with all but experts in it, and its part of host memory."""
        device = Store(name=f"{self.dense.tier}[{rank}]", tier=self.dense.tier, capacity_bytes=int(self.dense.capacity_bytes))
        for category, nbytes in (("weights", self.dense.weights_bytes), ("kv", self.dense.kv_bytes), ("activations", self.dense.activation_bytes)):
            device.reserve(category, nbytes)
        if self.host_tier is None:
            return device, None
        return device, Store(name=f"{self.host_tier}[{rank}]", tier=self.host_tier, capacity_bytes=int(capacity_bytes(cluster, self.host_tier)))


def tiers_of(builder: ProgramBuilder, demands: Demands, *, kv_entries: float, tokens: float) -> Tiers:
    """Lay out the tiers of a run. Raises InputError naming the tier, what it needs and what it has, if the model does not fit."""
    cluster, model, plan, settings = builder.cluster, builder.model, builder.plan, builder.settings.offload
    dense = account(cluster, model, plan, attention_tp=builder.tp, kv_entries=kv_entries, tokens=tokens, experts=False)
    home, host_tier = _chain(cluster, dense.tier, settings.tier)
    whole = sizes.expert_bytes(model)
    low = sizes.parameters(model).expert * settings.low_bits / 8 if settings.low_bits else None
    held = held_RLE(plan)
    home_bytes = _home_bytes(cluster, home, held) * (whole + (low or 0.0))
    capacity = cluster.tiers[home].capacity_bytes
    if home_bytes > capacity:
        raise _too_small(home, "the experts", home_bytes, capacity, "use a larger tier, like nvme")
    host = _link(builder.costs, host_tier or home, settings)
    count_R = [int(count) for count in held.sum(axis=(1, 2))]
    widest_R = [demand.widest for demand in demands.of_rank]
    host_caches = None
    if host_tier is not None:
        room = capacity_bytes(cluster, host_tier)
        fitting = int(room // whole)
        wanted = fitting if settings.host_slots < 0 else settings.host_slots
        if wanted > fitting:
            raise _too_small(host_tier, f"offload.host_slots = {wanted}", wanted * whole, room, f"give at most {fitting} slots a device")
        host_caches = tuple(CacheSettings(slots=min(wanted, count), scope="global", policy=settings.host_cache) for count in count_R)
    free = dense.capacity_bytes - dense.peak_bytes
    caches = tuple(_cache(settings, dense.tier, free, whole, plan.num_layers, *pair) for pair in zip(count_R, widest_R, strict=True))
    if settings.start == "frequent":
        caches = tuple(replace(cache, initial=_frequent(cache, demand, whole)) for cache, demand in zip(caches, demands.of_rank, strict=True))
    return Tiers(
        dense=dense, expert_bytes=whole, low_bytes=low, home=home, home_bytes=home_bytes, host_tier=host_tier, host=host,
        disk=_link(builder.costs, home, settings) if host_tier is not None else None, caches=caches, host_caches=host_caches,
    )  # fmt: skip


def _chain(cluster: Cluster, device: str, name: str) -> tuple[str, str | None]:
    """Return the tier of this name, and the host memory in front of it if it is a disk."""
    outer = {tier.name: tier for tier in cluster.tiers.values() if tier.link in cluster.links and tier.name != device}
    if name not in outer:
        rule = f"must be a tier of {cluster.name} behind a link: {', '.join(sorted(outer)) or 'it has none'}"
        raise InputError(describe("--set", "offload.tier", name, rule, "see `moesim hardware show`"))
    if outer[name].link == "host":
        return name, None
    return name, next((tier.name for tier in outer.values() if tier.link == "host"), None)


def _home_bytes(cluster: Cluster, home: str, held_RLE: np.ndarray) -> float:
    """Return how many experts the fullest home holds: of a node, if its devices share one, each expert once."""
    if not cluster.tiers[home].shared:
        return float(held_RLE.sum(axis=(1, 2)).max())
    by_node = held_RLE.reshape(cluster.num_nodes, cluster.devices_per_node, *held_RLE.shape[1:]).any(axis=1)
    return float(by_node.sum(axis=(1, 2)).max())


def _link(costs: CostModel, tier: str, settings: OffloadSettings) -> CopyLink:
    chunk = settings.amount("chunk_bytes")
    return CopyLink(
        load_s=lambda nbytes: float(costs.tier_copy(tier, np.array(nbytes)).seconds), discipline=settings.discipline, chunk_bytes=chunk,
        name=costs.cluster.tiers[tier].link or tier,
    )  # fmt: skip


def _cache(settings: OffloadSettings, tier: str, free: float, whole: float, layers: int, count: int, widest: int) -> CacheSettings:
    """Return the cache of a device that has `free` bytes, holds `count` experts and loads at most `widest` for one layer."""
    scope = "global" if settings.scope == "device" else "layer"
    pools = 1 if scope == "global" else layers
    if widest * whole > free:
        raise _too_small(tier, f"the {widest} experts that one layer of a pass wants", widest * whole, free, "use fewer tokens per step or more devices")
    policy = settings.cache or "lru"
    if settings.slots >= 0:
        most = min(settings.slots, -(-count // pools)) * pools
        if most * whole > free:
            rule = f"offload.slots = {settings.slots} ({settings.scope})"
            raise _too_small(tier, rule, most * whole, free, f"give at most {int(free // whole) // pools} slots")
        return CacheSettings(slots=settings.slots, scope=scope, policy=policy)
    given = settings.amount("bytes")
    # One layer's loads keep room beside the cache, so that they fit whatever it protects.
    size = min(count * whole, free - widest * whole) if given is None else given
    if size > free:
        raise _too_small(tier, f"offload.bytes = {settings.bytes}", size, free, "give fewer bytes")
    if scope == "global":
        return CacheSettings(capacity_bytes=size, scope=scope, policy=policy)
    each, more = divmod(int(size // whole), layers)
    return CacheSettings(slots=tuple(each + (layer < more) for layer in range(layers)), scope=scope, policy=policy)


def _frequent(cache: CacheSettings, demand: Demand, whole: float) -> tuple[tuple[int, int], ...]:
    """Return the (layer, expert) pairs that the passes want most, as many as the pools hold; the most wanted is the last to leave."""
    layers = demand.experts_TLW.shape[1]
    used: Counter[tuple[int, int]] = Counter()
    for layer in range(layers):
        values, counts = np.unique(demand.experts_TLW[:, layer], return_counts=True)
        used.update({(layer, expert): count for expert, count in zip(values.tolist(), counts.tolist(), strict=True) if expert >= 0})
    slots = int(np.max(cache.capacity_bytes or 0.0) // whole) if cache.slots is None else cache.slots
    left = list(slots) if isinstance(slots, tuple) else [slots] * layers
    chosen = []
    for place, _ in sorted(used.items(), key=lambda item: (-item[1], item[0])):
        pool = 0 if cache.scope == "global" else place[0]
        if left[pool] > 0:
            left[pool] -= 1
            chosen.append(place)
    return tuple(reversed(chosen))


def _too_small(tier: str, what: str, need: float, free: float, remedy: str) -> InputError:
    return InputError(f"{tier}: {what} need {format_bytes(need)}, must be <= {format_bytes(free)}, what is free there; {remedy}")


def computing_s(builder: ProgramBuilder, tiers: Tiers, tokens: int) -> float:
    """Return the time of one expert on the host's CPU: its weights read or its FLOPs done, whichever is longer, and the activations there and back."""
    cluster, model, settings = builder.cluster, builder.model, builder.settings.offload
    memory = tiers.host_tier or tiers.home
    source = cluster.tiers[memory]
    read_s = tiers.expert_bytes / (source.read_Bps / (cluster.devices_per_node if source.shared else 1))
    flops_s = tokens * sizes.expert_flops(model) / (settings.amount("cpu_flops") or np.inf)
    way_s = float(builder.costs.tier_copy(memory, np.array(tokens * model.hidden_size * DTYPE_BYTES[model.dtype])).seconds)
    return max(read_s, flops_s) + 2 * way_s
