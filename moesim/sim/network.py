"""The ports of a Cluster and the way between two of them, as Hops that Flows and Ops name.

A port is one direction of one piece of hardware, with its bandwidth in bytes/s. Ports of a rank (Ops use them too):
  scale_up.out/in  NVLink, or the card's peer-to-peer port      scale_out.out/in  its way to the network (the NIC itself unless NICs are shared)
  host.out/in      its own PCIe lanes                           disk.out/in       its way to the disk
Ports of a node n, NIC, or PCIe root, numbered over the cluster:
  nvswitch  all ports of a node at once       nic.out/in  a NIC that several devices share      pcie.up/down  a root to the host
  storage.out/in  a node's disk
Ports of a leaf: leaf.up/down, to the spine: the NICs of its nodes together, divided by the oversubscription. Nodes of one leaf do not use them.
The same machine as `hardware.topology`, without a graph: a path of a few thousand ranks costs microseconds. Devices of different nodes use the NIC
of each (`direct`), or that of equal index, a rail, and NVLink in the source's (`source`) or target's node (`target`). Latencies in seconds.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from moesim.errors import SimulationError, describe
from moesim.hardware.cluster import Cluster, Link
from moesim.sim.flows import Hop

Rail = Literal["direct", "source", "target"]
LINK_TIERS = {"host": "host", "disk": "disk"}


class Network:
    """Named ports of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._up = cluster.links.get("scale_up") if cluster.devices_per_node > 1 else None
        self._out = cluster.links.get("scale_out") if cluster.num_nodes > 1 else None
        self._host, self._disk = cluster.links.get("host"), cluster.links.get("disk")
        self.nics_per_node = -(-cluster.devices_per_node // self._out.shared_by) if self._out is not None else 0
        self.roots_per_node = -(-cluster.devices_per_node // self._host.shared_by) if self._host is not None else 0
        self.capacity: dict[Hop, float] = {}
        """Every port → bytes/s."""
        self._name_ports()

    def _name_ports(self) -> None:
        cluster, ports = self.cluster, self.capacity
        width = cluster.devices_per_node
        for rank in range(cluster.num_ranks):
            for name, link in (("scale_up", self._up), ("scale_out", self._out), ("host", self._host), ("disk", self._disk)):
                if link is not None:
                    ports[f"{name}.out", rank] = ports[f"{name}.in", rank] = link.bandwidth_Bps
        for node in range(cluster.num_nodes):
            if self._up is not None:
                ports["nvswitch", node] = self._up.bandwidth_Bps * width
            if self._out is not None:
                together = self.nics_per_node * min(cluster.nodes_per_leaf, cluster.num_nodes)
                uplink = self._out.bandwidth_Bps * together / cluster.fabric_oversubscription
                leaf = node // cluster.nodes_per_leaf
                ports["leaf.up", leaf] = ports["leaf.down", leaf] = uplink
                for nic in range(self.nics_per_node) if self._out.shared_by > 1 else ():
                    index = node * self.nics_per_node + nic
                    ports["nic.out", index] = ports["nic.in", index] = self._out.bandwidth_Bps
            for root in range(self.roots_per_node):
                if self._host is not None:
                    index = node * self.roots_per_node + root
                    ports["pcie.up", index] = ports["pcie.down", index] = self._host.bandwidth_Bps
            if self._disk is not None:
                ports["storage.out", node] = ports["storage.in", node] = self._disk.bandwidth_Bps

    # --- where ranks sit -------------------------------------------------------------------------

    def nic_of(self, rank: int) -> int:
        """Return the NIC of a rank, numbered over the cluster; its index in the node is the rail."""
        width = self.cluster.devices_per_node
        shared_by = self._out.shared_by if self._out is not None else 1
        return rank // width * self.nics_per_node + rank % width // shared_by

    def root_of(self, rank: int) -> int:
        """Return the PCIe root of a rank, numbered over the cluster."""
        width = self.cluster.devices_per_node
        shared_by = self._host.shared_by if self._host is not None else 1
        return rank // width * self.roots_per_node + rank % width // shared_by

    # --- paths -----------------------------------------------------------------------------------

    def path(self, src: int | str, dst: int | str, *, rail: Rail = "direct") -> dict[Hop, float]:
        """Return the ports from one rank to another, or between a rank and a tier (`host`, `disk`; the rank's own node) → bytes/s, in order.

        Empty from a rank to itself. Raises SimulationError naming the pair if it is unreachable.
        """
        if isinstance(src, str) or isinstance(dst, str):
            return self._to_tier(src, dst)
        self._check(src)
        self._check(dst)
        if src == dst:
            return {}
        width = self.cluster.devices_per_node
        if src // width == dst // width:
            return self._inside(src, dst)
        if rail == "source":
            relay = src // width * width + dst % width
            return {**(self._inside(src, relay) if relay != src else {}), **self._between(relay, dst)}
        if rail == "target":
            relay = dst // width * width + src % width
            return {**self._between(src, relay), **(self._inside(relay, dst) if relay != dst else {})}
        return self._between(src, dst)

    def latency(self, src: int | str, dst: int | str, *, rail: Rail = "direct") -> float:
        """Return the latency of the path: every link on it once."""
        names = [hop[0] for hop in self.path(src, dst, rail=rail)]
        total = 0.0
        for name, link in (("scale_up.out", self._up), ("scale_out.out", self._out), ("pcie.up", self._host), ("pcie.down", self._host)):
            total += link.latency_s if name in names and link is not None else 0.0
        return total + (self._disk.latency_s if self._disk is not None and any(name.startswith("storage") for name in names) else 0.0)

    def efficiency(self, hop: Hop, message_bytes: float) -> float:
        """Return the share of a port's bandwidth that messages of a size reach."""
        kind = hop[0].partition(".")[0]
        link = {"scale_up": self._up, "scale_out": self._out, "nic": self._out, "leaf": self._out, "host": self._host, "pcie": self._host}.get(kind, self._disk)
        if link is None:
            return 1.0
        return float(np.interp(math.log(max(message_bytes, 1.0)), np.log(link.efficiency.size_bytes), link.efficiency.efficiency))

    def _take(self, *hops: Hop) -> dict[Hop, float]:
        return {hop: self.capacity[hop] for hop in hops if hop in self.capacity}

    def _inside(self, src: int, dst: int) -> dict[Hop, float]:
        if self._up is None:
            raise self._unreachable(src, dst, "links.scale_up")
        return self._take(("scale_up.out", src), ("nvswitch", src // self.cluster.devices_per_node), ("scale_up.in", dst))

    def _between(self, src: int, dst: int) -> dict[Hop, float]:
        if self._out is None:
            raise self._unreachable(src, dst, "links.scale_out")
        leaves = [rank // self.cluster.ranks_per_leaf for rank in (src, dst)]
        spine: list[Hop] = [("leaf.up", leaves[0]), ("leaf.down", leaves[1])] if leaves[0] != leaves[1] else []
        return self._take(
            ("host.out", src), ("scale_out.out", src), ("nic.out", self.nic_of(src)), *spine,
            ("nic.in", self.nic_of(dst)), ("scale_out.in", dst), ("host.in", dst),
        )  # fmt: skip

    def _to_tier(self, src: int | str, dst: int | str) -> dict[Hop, float]:
        reading = isinstance(src, str)
        rank, tier = (dst, src) if reading else (src, dst)
        if isinstance(rank, str) or isinstance(tier, int):
            raise self._unreachable(src, dst, "a path that starts or ends at a rank")
        self._check(rank)
        way = "in" if reading else "out"
        link = self.cluster.links.get(tier)
        if tier not in LINK_TIERS or link is None:
            raise self._unreachable(src, dst, f"links.{tier}")
        node = rank // self.cluster.devices_per_node
        if tier == "host":
            hops: list[Hop] = [("pcie.down" if reading else "pcie.up", self.root_of(rank)), (f"host.{way}", rank)]
        else:
            hops = [(f"storage.{way}", node), (f"disk.{way}", rank), (f"host.{way}", rank)]
        return self._take(*(hops if reading else reversed(hops)))

    def _check(self, rank: int) -> None:
        if not 0 <= rank < self.cluster.num_ranks:
            raise SimulationError(describe(self.cluster.name, "rank", rank, f"must be in 0..{self.cluster.num_ranks - 1}"))

    def _unreachable(self, src: int | str, dst: int | str, missing: str) -> SimulationError:
        return SimulationError(f"{self.cluster.name}: {src} -> {dst} is unreachable; it needs {missing}")


def port_link(cluster: Cluster, name: str) -> Link:
    """Return the Link `name` of the cluster. Raises SimulationError if it has none."""
    link = cluster.links.get(name)
    if link is None:
        raise SimulationError(f"{cluster.name}: links.{name} is missing; ranks that exchange data need it")
    return link
