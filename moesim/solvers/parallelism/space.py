"""The declared space of deployments and its exact enumeration.

A stage group is the R ranks of one pipeline stage: R = tp·dp = ep·expert_tp. An instance is `pp` such groups; a pool is a number of instances with one
role (`mixed`, `prefill`, `decode`). Ranks are contiguous: shards of a head, and shards of an expert, are neighbours. Duplicates by symmetry are left
out: one stage has one micro-batch, a dense model has no expert axes, equal pools are counted, not told apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from moesim.costs.group import Group
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel

MODES = ("mixed", "disaggregated")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """Every value that a degree of freedom may take; None: every value that the consistency rules admit."""

    tp: tuple[int, ...] | None = None
    dp: tuple[int, ...] | None = None
    ep: tuple[int, ...] | None = None
    expert_tp: tuple[int, ...] | None = None
    pp: tuple[int, ...] = (1, 2, 4, 8, 16)
    micro_batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Micro-batches in flight in a pipeline; one stage has one."""
    redundant: tuple[int, ...] = (0, 32, 64)
    """Redundant slots per MoE layer; (experts + redundant) must divide by ep."""
    batch: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
    """Sequences that decode on one attention replica, all micro-batches together."""
    prefill_batch: tuple[int, ...] = (1, 2, 4, 8)
    """Prompts per prefill micro-batch of one attention replica."""
    devices: int | None = None
    """Devices that a deployment uses in all, all of them; None: every device of the cluster."""
    modes: tuple[str, ...] = MODES
    """`mixed`: every instance prefills and decodes; `disaggregated`: one pool each, in every ratio."""
    staging_experts: int = 2
    """Expert buffers that a device keeps free for live rebalancing."""
    memory_share: float = 0.9
    """Share of the device memory that may be planned; runtime, workspaces and fragmentation have the rest."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("modes", "staging_experts", "memory_share", "devices") or value is None:
                continue
            low = 0 if field.name == "redundant" else 1
            good = isinstance(value, tuple) and value and all(isinstance(one, int) and not isinstance(one, bool) and low <= one <= 1 << 20 for one in value)
            if not good or len(set(value)) != len(value):
                raise InputError(describe("space", field.name, value, f"must be a tuple of distinct integers >= {low}"))
        if not self.modes or any(mode not in MODES for mode in self.modes):
            raise InputError(describe("space", "modes", self.modes, f"must be some of {', '.join(MODES)}"))
        if not isinstance(self.staging_experts, int) or not 0 <= self.staging_experts <= 4096:
            raise InputError(describe("space", "staging_experts", self.staging_experts, "must be an integer in 0..4096"))
        if not 0 < self.memory_share <= 1:
            raise InputError(describe("space", "memory_share", self.memory_share, "must be in (0, 1]"))


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """The degrees of one instance."""

    group: Group
    pp: int

    @property
    def devices(self) -> int:
        """Devices of the instance."""
        return self.group.ranks * self.pp


def fills(count: int, devices_per_node: int) -> bool:
    """Return whether `count` neighbouring devices divide a node or fill whole nodes."""
    return devices_per_node % count == 0 or count % devices_per_node == 0


def total_devices(space: Space, cluster: Cluster) -> int:
    """Return the devices that a deployment uses in all; raise InputError if the cluster has fewer."""
    total = cluster.num_ranks if space.devices is None else space.devices
    if isinstance(total, bool) or not isinstance(total, int) or not 1 <= total <= cluster.num_ranks:
        raise InputError(describe("space", "devices", total, f"must be an integer in 1..{cluster.num_ranks}, the devices of {cluster.name}"))
    return total


def groups(space: Space, model: MoEModel, cluster: Cluster, ranks: int) -> Iterator[Group]:
    """Yield every consistent group of `ranks` devices, in order."""
    node = cluster.devices_per_node
    if not fills(ranks, node):
        return
    heads, moe = model.attention.num_heads, bool(model.moe_layer_ids)
    dense = len(model.moe_layer_ids) < model.num_layers
    for tp in _divisors(ranks):
        if heads % tp or (dense and model.dense_ffn_size % tp) or not fills(tp, node) or not _declared(space.tp, tp) or not _declared(space.dp, ranks // tp):
            continue
        if not moe:
            # Replicas of a dense model share nothing: they are instances.
            if tp == ranks and _declared(space.ep, 1) and _declared(space.expert_tp, 1):
                yield Group(tp, 1, 1, 1, 0)
            continue
        for ep in _divisors(ranks):
            shards = ranks // ep
            if model.expert_ffn_size % shards or not fills(shards, node) or not _declared(space.ep, ep) or not _declared(space.expert_tp, shards):
                continue
            for redundant in sorted(space.redundant):
                slots, rest = divmod(model.num_experts + redundant, ep)
                # A rank never holds an expert twice.
                if rest == 0 and slots <= model.num_experts:
                    yield Group(tp, ranks // tp, ep, shards, slots)


def shapes(space: Space, model: MoEModel, cluster: Cluster) -> tuple[Shape, ...]:
    """Return every instance shape that fits into the cluster, in order."""
    largest = total_devices(space, cluster)
    node = cluster.devices_per_node
    result = []
    for pp in sorted(space.pp):
        if pp > model.num_layers:
            continue
        for ranks in range(1, largest // pp + 1):
            if fills(ranks * pp, node):
                result += [Shape(group, pp) for group in groups(space, model, cluster, ranks)]
    return tuple(sorted(set(result)))


def micro_batches(space: Space, pp: int) -> tuple[int, ...]:
    """Return the declared numbers of micro-batches of a pipeline of `pp` stages."""
    return tuple(sorted(space.micro_batches)) if pp > 1 else (1,)


def ratios(total: int, prefill_devices: int, decode_devices: int) -> tuple[tuple[int, int], ...]:
    """Return every (prefill instances, decode instances), both >= 1, that use exactly `total` devices."""
    return tuple(
        (count, (total - count * prefill_devices) // decode_devices)
        for count in range(1, (total - decode_devices) // prefill_devices + 1)
        if (total - count * prefill_devices) % decode_devices == 0
    )


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _declared(values: tuple[int, ...] | None, value: int) -> bool:
    return values is None or value in values
