"""The machine as a graph: devices, switches, PCIe roots, NICs, hosts, disks, leaves and the spine.

Directed edges carry bandwidth_Bps (one direction), latency_s and link (the `Link` whose port they are). Latencies along a path add up to the
link's own. Vertices: `rank3`, `node0/switch` (NVSwitch, or the PCIe fabric of peer-to-peer cards), `node0/pcie1`, `node0/nic1`, `node0/host`,
`node0/disk`, `leaf0`, `spine`. A leaf reaches the spine with the NICs of its nodes together, divided by the oversubscription.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from moesim.errors import HardwareError, describe
from moesim.hardware.cluster import Cluster

if TYPE_CHECKING:
    import networkx


@dataclass(frozen=True, slots=True, kw_only=True)
class Hop:
    """One directed edge of a path."""

    source: str
    target: str
    link: str
    """Name of the link whose port this is."""
    bandwidth_Bps: float
    latency_s: float


def graph(cluster: Cluster) -> networkx.DiGraph:
    """Return the cluster as a new networkx.DiGraph; the cluster's fields say what is there."""
    import networkx

    result: networkx.DiGraph = networkx.DiGraph(name=cluster.name)
    links, width = cluster.links, cluster.devices_per_node

    def join(one: str, other: str, link: str, bandwidth_Bps: float, latency_s: float) -> None:
        for source, target in ((one, other), (other, one)):
            result.add_edge(source, target, link=link, bandwidth_Bps=bandwidth_Bps, latency_s=latency_s)

    for node in range(cluster.num_nodes):
        ranks = [f"rank{node * width + index}" for index in range(width)]
        result.add_nodes_from(ranks, kind=cluster.device.kind, node=node)
        if "scale_up" in links and width > 1:
            link = links["scale_up"]
            switch = f"node{node}/switch"
            result.add_node(switch, kind="nvswitch" if "nvswitch" in link.kind.lower() else "switch", node=node)
            for rank in ranks:
                join(rank, switch, "scale_up", link.bandwidth_Bps, link.latency_s / 2)
        shared_by = links["host"].shared_by if "host" in links else 1
        roots = [f"node{node}/pcie{index}" for index in range(-(-width // shared_by))]
        result.add_nodes_from(roots, kind="pcie_root", node=node)
        for index, rank in enumerate(ranks):
            # A device's own lanes; without a host link (a CPU) the root stands for its I/O hub and is free.
            if "host" in links:
                join(rank, roots[index // shared_by], "host", links["host"].bandwidth_Bps, 0.0)
            else:
                join(rank, roots[index // shared_by], "local", cluster.memory.read_Bps, 0.0)
        if "host" in links:
            result.add_node(f"node{node}/host", kind="host", node=node)
            for root in roots:
                join(root, f"node{node}/host", "host", links["host"].bandwidth_Bps, links["host"].latency_s)
        if "disk" in links:
            link = links["disk"]
            result.add_node(f"node{node}/disk", kind="disk", node=node)
            for root in roots:
                join(root, f"node{node}/disk", "disk", link.bandwidth_Bps, link.latency_s)
        if "scale_out" in links and cluster.num_nodes > 1:
            link = links["scale_out"]
            nics = [f"node{node}/nic{index}" for index in range(-(-width // link.shared_by))]
            result.add_nodes_from(nics, kind="nic", node=node)
            leaf = f"leaf{node // cluster.nodes_per_leaf}"
            # a leaf of one node is part of it, that of several of none
            result.add_node(leaf, kind="leaf", node=node if cluster.nodes_per_leaf == 1 else -1)
            for index in range(width):
                nic, root = nics[index // link.shared_by], roots[index // shared_by]
                if not result.has_edge(root, nic):
                    join(root, nic, "scale_out", link.bandwidth_Bps, 0.0)
            for nic in nics:
                join(nic, leaf, "scale_out", link.bandwidth_Bps, link.latency_s / 2)
            result.add_node("spine", kind="spine", node=-1)
            together = len(nics) * min(cluster.nodes_per_leaf, cluster.num_nodes)
            join(leaf, "spine", "scale_out", link.bandwidth_Bps * together / cluster.fabric_oversubscription, 0.0)
    return result


def path(cluster: Cluster, src: int | str, dst: int | str, *, net: networkx.DiGraph | None = None) -> tuple[Hop, ...]:
    """Return the hops from one rank (or vertex name) to another; empty if they are the same.

    Ranks of one node meet at its switch; ranks of different nodes use the NIC of each. net: the cluster's graph, if it is at hand.
    Raises HardwareError if a vertex does not exist or there is no path.
    """
    import networkx

    net = graph(cluster) if net is None else net
    ends = []
    for key, end in (("src", src), ("dst", dst)):
        vertex = f"rank{end}" if isinstance(end, int) else end
        if vertex not in net:
            raise HardwareError(describe(cluster.name, key, end, f"must be a rank in 0..{cluster.num_ranks - 1} or a vertex like node0/host"))
        ends.append(vertex)
    start, goal = ends
    if start == goal:
        return ()
    across = net.nodes[start]["node"] != net.nodes[goal]["node"]
    own = {_nic_of(cluster, end) for end in ends if end.startswith("rank")}

    def usable(name: str) -> bool:
        # A device forwards nothing; the network is entered only on the way to another node, and by a device through its own NIC.
        data = net.nodes[name]
        if name in (start, goal):
            return True
        if data["kind"] == "nic":
            return across and (name in own or not any(nic.startswith(f"node{data['node']}/") for nic in own))
        return data["kind"] not in ("gpu", "cpu", "disk", "host") and (across or data["kind"] not in ("leaf", "spine"))

    try:
        steps = networkx.shortest_path(networkx.subgraph_view(net, filter_node=usable), start, goal)
    except networkx.NetworkXNoPath:
        raise HardwareError(f"{cluster.name}: there is no path from {start} to {goal}; add the link between them") from None
    return tuple(
        Hop(source=one, target=other, link=net[one][other]["link"], bandwidth_Bps=net[one][other]["bandwidth_Bps"], latency_s=net[one][other]["latency_s"])
        for one, other in zip(steps, steps[1:], strict=False)
    )


def _nic_of(cluster: Cluster, vertex: str) -> str:
    rank = int(vertex.removeprefix("rank"))
    shared_by = cluster.links["scale_out"].shared_by if "scale_out" in cluster.links else 1
    return f"node{cluster.node_of(rank)}/nic{rank % cluster.devices_per_node // shared_by}"
