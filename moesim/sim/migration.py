"""Moves experts from one plan to the next while a replay runs: which copies, over which ports, at what cost.

A copy of an expert goes from a live rank that holds it (the same node first, then the one that has sent least), else from the
checkpoint. A rank sends to one rank at a time; a Flow carries all experts of a (source, target) pair and claims both ports. Copies
land in staging memory and are installed at a step border. Bytes, seconds. Shapes: L layers, E experts, R ranks, S slots, M moves.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.errors import HardwareError, InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.plan import Plan
from moesim.sim.balancer import Price
from moesim.sim.engine import Engine
from moesim.sim.flows import Flow, Hop
from moesim.sim.network import Network
from moesim.sim.succession import held_LER

CHECKPOINT = -1
"""Source of a copy that no live rank holds."""
MODES = ("background", "pause")


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationSettings:
    """How experts move. Every default is a declared choice, not a measurement."""

    mode: str = "background"
    """`background`: serving goes on until the copies have arrived; `pause`: it stops from the decision to the installation."""
    discipline: str = "low"
    """Of the Flows: `low` leaves the ports to the exchanges of the passes, `fair` shares them."""
    layers_per_chunk: int = 0
    """Layers that are staged and installed together; 0: all of them."""
    message_s: float = 20e-6
    """Host time to post one expert's transfer, beside the link's latency; reports on serving engines range from this to 12 ms a slot."""
    install_Bps: float | None = None
    """Rate at which a rank copies staged weights in place; None: half of its memory's bandwidth; inf: pointers are swapped."""
    install_slot_s: float | None = None
    """Time per slot written; None: one kernel launch."""
    staging_limit_bytes: float = math.inf
    """Staging buffer of a rank; whatever the memory has left is a limit too."""
    checkpoint_Bps: float | None = None
    """Rate at which the ranks of a node together read the checkpoint; None: the node's `nvme` tier, else its `dram`."""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InputError(describe("migration", "mode", self.mode, f"must be one of {', '.join(MODES)}"))
        if self.discipline not in ("low", "fair"):
            raise InputError(describe("migration", "discipline", self.discipline, "must be low or fair"))
        if self.layers_per_chunk < 0:
            raise InputError(describe("migration", "layers_per_chunk", self.layers_per_chunk, "must be >= 0; 0 means all layers"))
        for name in ("message_s", "install_slot_s"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise InputError(describe("migration", name, value, "must be finite and >= 0"))
        for name in ("install_Bps", "staging_limit_bytes", "checkpoint_Bps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(describe("migration", name, value, "must be > 0"))


@dataclass(frozen=True, slots=True)
class Way:
    """How experts get from one place to another."""

    path: dict[Hop, float]
    """Ports → the bytes/s that their messages reach there."""
    latency_s: float
    """Of one message."""
    ranks: tuple[int, ...]
    """Ranks that it needs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moves:
    """What turns one plan into another."""

    layer_M: np.ndarray
    expert_M: np.ndarray
    source_M: np.ndarray
    """Rank that sends the copy, or CHECKPOINT."""
    target_M: np.ndarray
    written_LR: np.ndarray
    """Slots whose expert changes, copies within the rank included."""

    def rows(self, rows: Sequence[int]) -> Moves:
        """Return the moves of some layers."""
        keep = np.isin(self.layer_M, rows)
        written = np.zeros_like(self.written_LR)
        written[list(rows)] = self.written_LR[list(rows)]
        parts = {name: getattr(self, name)[keep] for name in ("layer_M", "expert_M", "source_M", "target_M")}
        return Moves(written_LR=written, **parts)

    def staging_R(self, expert_bytes: float) -> np.ndarray:
        """Return float64 [R]: bytes that arrive at every rank."""
        return np.bincount(self.target_M, minlength=self.written_LR.shape[1]) * expert_bytes

    def __len__(self) -> int:
        return len(self.layer_M)


def moves_between(old: Plan, new: Plan, *, ranks_per_node: int, alive_R: np.ndarray | None = None) -> Moves:
    """Return the moves from `old` to `new`; alive_R: bool [R], ranks that can still send (None: all)."""
    before, after = held_LER(old), held_LER(new)
    held = before > 0
    if alive_R is not None:
        held &= alive_R
        before = before * alive_R
    layer_M, expert_M, target_M = np.nonzero((after > 0) & ~held)
    source_M = np.full(len(layer_M), CHECKPOINT)
    sent = np.zeros(old.num_ranks, dtype=np.int64)
    for index, (layer, expert, target) in enumerate(zip(layer_M.tolist(), expert_M.tolist(), target_M.tolist(), strict=True)):
        holders = np.flatnonzero(held[layer, expert])
        if len(holders):
            near = holders[holders // ranks_per_node == target // ranks_per_node]
            choice = near if len(near) else holders
            source = int(choice[sent[choice].argmin()])
            sent[source] += 1
            source_M[index] = source
    written = np.maximum(after - before, 0).sum(axis=1)
    return Moves(layer_M=layer_M, expert_M=expert_M, source_M=source_M, target_M=target_M, written_LR=written)


def mixed(old: Plan, new: Plan, rows: Sequence[int]) -> Plan:
    """Return `old` with the rows of `new` for some layers; both have the same slots per rank. All rows: `new` itself."""
    if len(set(rows)) == new.num_layers:
        return new
    table = old.slot_to_expert_LS.copy()
    table[list(rows)] = new.slot_to_expert_LS[list(rows)]
    share = None
    if old.share_LS is not None or new.share_LS is not None:
        share = old.shares_LS().copy()
        share[list(rows)] = new.shares_LS()[list(rows)]
    return replace(new, slot_to_expert_LS=table, share_LS=share)


def checkpoint_rate(cluster: Cluster, settings: MigrationSettings) -> float:
    """Return the bytes/s at which a node reads the checkpoint."""
    if settings.checkpoint_Bps is not None:
        return settings.checkpoint_Bps
    tier = cluster.tiers.get("nvme") or cluster.tiers.get("dram")
    if tier is None:
        raise HardwareError(f"{cluster.name}: has neither tiers.nvme nor tiers.dram; give checkpoint_Bps")
    return tier.read_Bps * (1 if tier.shared else cluster.devices_per_node)


def install_s(cluster: Cluster, written_LR: np.ndarray, expert_bytes: float, settings: MigrationSettings) -> float:
    """Return the pause to put staged experts in place: the slots of the rank that has the most to write."""
    most = float(written_LR.sum(axis=0).max(initial=0))
    rate = cluster.memory.write_Bps / 2 if settings.install_Bps is None else settings.install_Bps
    if math.isinf(rate):
        return 0.0
    each = cluster.device.kernel_launch_s if settings.install_slot_s is None else settings.install_slot_s
    return most * (each + expert_bytes / rate)


@dataclass(slots=True, eq=False)
class Transfer:
    """The Flows of one chunk; a set of simpy processes, one per sending rank and per rank that reads the checkpoint."""

    engine: Engine
    cluster: Cluster
    settings: MigrationSettings
    expert_bytes: float
    moves: Moves
    flows: list[Flow] = field(default_factory=list)
    """All that were started, in order."""
    moved_bytes: float = 0.0
    """That have arrived."""
    start_s: float = 0.0
    done: Any = field(init=False)
    """simpy event: everything has arrived."""
    cancelled: bool = False
    network: Network = field(init=False)

    def __post_init__(self) -> None:
        self.start_s = self.engine.now
        self.network = Network(self.cluster)
        pairs: dict[int, list[tuple[int, int]]] = {}
        ranks = self.cluster.num_ranks
        count_XR = np.zeros((ranks + 1, ranks), dtype=np.int64)
        np.add.at(count_XR, (self.moves.source_M, self.moves.target_M), 1)
        for source, target in np.argwhere(count_XR[:ranks]).tolist():
            pairs.setdefault(source, []).append((target, int(count_XR[source, target])))
        senders = []
        for source, targets in pairs.items():
            targets.sort(key=lambda item, source=source: (item[0] - source) % ranks)  # type: ignore[misc]
            senders.append(self.engine.env.process(self._send(source, targets)))
        senders += [self.engine.env.process(self._send(CHECKPOINT, [(rank, int(count_XR[ranks, rank]))])) for rank in np.flatnonzero(count_XR[ranks]).tolist()]
        self.done = self.engine.env.all_of(senders)

    def cancel(self) -> None:
        """Stop: what has not arrived is dropped, and `done` does not fire."""
        self.cancelled = True
        for flow in self.flows:
            if math.isinf(flow.end_s):
                self.engine.cancel_flow(flow)

    def _send(self, source: int, targets: list[tuple[int, int]]) -> Generator[Any, Any, None]:
        for target, count in targets:
            way = way_of(self.network, source, target, self.expert_bytes, self.settings)
            yield self.engine.env.timeout(count * (way.latency_s + self.settings.message_s))
            if self.cancelled:
                yield self.engine.env.event()
            nbytes = count * self.expert_bytes
            if way.path:
                flow = Flow(f"experts {source}->{target}", nbytes, way.path, self.settings.discipline, ranks=way.ranks)
                self.flows.append(flow)
                yield self.engine.start_flow(flow)
            self.moved_bytes += nbytes


def way_of(network: Network, source: int, target: int, message_bytes: float, settings: MigrationSettings) -> Way:
    """Return the way of one rank's experts to another, or of the checkpoint's, for messages of a size. Raises SimulationError if there is none."""
    cluster = network.cluster
    if source == CHECKPOINT:
        node, tier = cluster.node_of(target), "disk" if "disk" in cluster.links else "host"
        path = dict(network.path(tier, target)) if tier in cluster.links else {}
        latency = network.latency(tier, target) if path else 0.0
        path = {("storage.in", node): checkpoint_rate(cluster, settings), **{hop: rate for hop, rate in path.items() if hop[0] != "storage.in"}}
    else:
        path, latency = dict(network.path(source, target)), network.latency(source, target)
    reached = {hop: rate * network.efficiency(hop, message_bytes) for hop, rate in path.items()}
    # A port without limit takes no time and disturbs nobody.
    ranks = (target,) if source == CHECKPOINT else (source, target)
    return Way({hop: rate for hop, rate in reached.items() if math.isfinite(rate)}, latency, ranks)


def price_of(cluster: Cluster, settings: MigrationSettings, expert_bytes: float, planner_s: float) -> Price:
    """Return what a change is expected to cost on idle links: the installation, and where serving waits for it, planner and copies too."""
    slot_s = install_s(cluster, np.ones((1, 1)), expert_bytes, settings)
    if settings.mode == "background":
        return Price(slot_s=slot_s)
    if cluster.num_ranks == 1:
        return Price(fixed_s=planner_s, slot_s=slot_s)
    way = way_of(Network(cluster), 0, cluster.num_ranks - 1, expert_bytes, settings)
    wire_s = max((expert_bytes / rate for rate in way.path.values()), default=0.0)
    return Price(fixed_s=planner_s, slot_s=slot_s + settings.message_s + way.latency_s + wire_s)
