"""The hardware document in memory: devices, tiers, links and how they hang together.

SI units throughout (bytes, bytes/s, seconds, FLOP/s, watts); every bandwidth is per direction and per device.
A `Cluster` is `num_nodes` equal nodes of `devices_per_node` equal devices; rank r is device r % devices_per_node
of node r // devices_per_node. Frozen; built by `moesim.hardware.load`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

POWER_STATES = ("compute", "memory", "communication")
"""States of a device by which energy is counted, beside idling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCurve:
    """Share of a link's bandwidth that a message of a given size reaches; linear in log size between points."""

    size_bytes: tuple[float, ...] = (1.0,)
    efficiency: tuple[float, ...] = (1.0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A kind of port that every device (or node) has."""

    name: str
    """`scale_up` (NVLink, or PCIe peer to peer), `scale_out` (NIC), `host` (PCIe to DRAM), `disk`."""
    bandwidth_Bps: float
    """Bytes per second, one direction, one device."""
    latency_s: float
    """Seconds from the first byte sent to the first byte received, small message."""
    duplex: bool = True
    discipline: str = "fair"
    """`fair` (max-min), `serial` or `priority`."""
    shared_by: int = 1
    """Devices of a node that share one such port."""
    efficiency: SizeCurve = field(default_factory=SizeCurve)
    kind: str = ""
    """For people: `NVLink 4`, `ConnectX-7`, `PCIe 5 x16`."""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """A memory tier."""

    name: str
    """`hbm`, `dram`, `nvme`, `sram`."""
    capacity_bytes: float
    read_Bps: float
    write_Bps: float
    latency_s: float = 0.0
    attached_to: str = "device"
    """`device` or `node`."""
    shared: bool = False
    """True where all devices of a node share one such tier."""
    link: str | None = None
    """Link that a transfer between this tier and the device occupies."""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator (or CPU socket)."""

    name: str
    kind: str
    """`gpu` or `cpu`."""
    peak_flops: Mapping[str, float]
    """dtype (`float32 bfloat16 float16 fp8 int8 fp4`) → dense peak, FLOP/s."""
    num_sms: int
    gemm_efficiency: float
    """Share of peak that a large GEMM reaches; used by the roofline only."""
    memory_efficiency: float
    """Share of the memory bandwidth that a streaming kernel reaches; used by the roofline only."""
    kernel_launch_s: float
    """Fixed time of one kernel inside a captured graph."""
    power_idle_w: float | None = None
    power_peak_w: float | None = None
    power_state_w: Mapping[str, float] | None = None
    """`compute`, `memory`, `communication` → watts of the device in that state; None: not declared."""
    source: str = ""
    l2_bytes: float | None = None
    """Last-level cache on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A validated machine: `num_nodes` nodes of `devices_per_node` devices."""

    name: str
    device: Device
    tiers: Mapping[str, Tier]
    links: Mapping[str, Link]
    devices_per_node: int
    num_nodes: int
    nodes_per_leaf: int = 1
    """Consecutive nodes behind one leaf switch (a rack), which they reach without oversubscription."""
    fabric_oversubscription: float = 1.0
    """Bandwidth of a leaf's nodes divided by what its uplink to the spine carries when all send (1: non-blocking)."""
    tables: Path | None = None
    """Folder of measured Parquet tables of this device, or None."""
    calibrated_from: str | None = None
    """Library device whose tables, transferred, stand in for those that this device lacks."""
    price_per_hour: float | None = None
    """Dollars per device and hour."""
    sha256: str = ""
    """SHA-256 of the resolved description."""
    warnings: tuple[str, ...] = ()
    source: str = ""

    @property
    def num_ranks(self) -> int:
        """Devices in all."""
        return self.devices_per_node * self.num_nodes

    @property
    def memory(self) -> Tier:
        """The device's own memory: `hbm`, or `dram` on a CPU."""
        return self.tiers["hbm" if "hbm" in self.tiers else "dram"]

    @property
    def ranks_per_leaf(self) -> int:
        """Consecutive ranks behind one leaf switch."""
        return min(self.nodes_per_leaf, self.num_nodes) * self.devices_per_node

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.devices_per_node
