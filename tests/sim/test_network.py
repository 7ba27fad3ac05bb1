"""Ports and paths against the graph of the hardware, which knows nothing of ports, and the textbook shares on them."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from typing import Any

import pytest

from moesim.errors import SimulationError
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.hardware.topology import graph
from moesim.hardware.topology import path as graph_path
from moesim.sim.engine import Engine
from moesim.sim.flows import Flow
from moesim.sim.network import Network, Rail

NAMES = ["h100-sxm-8x4", "a100-sxm-8x2", "rtx-4090-4", "l40s-8x2", "laptop-2x2", "rtx-pro-6000-2"]


def flows_end(cluster: Cluster, *flows: Flow) -> list[float]:
    engine = Engine(cluster.num_ranks)

    def main() -> Generator[Any, Any, None]:
        for flow in flows:
            engine.start_flow(flow)
        yield engine.env.timeout(0)

    engine.env.process(main())
    engine.env.run()
    return [flow.end_s for flow in flows]


@pytest.mark.parametrize("name", NAMES)
def test_narrowest_port_and_latency_are_those_of_the_graph(name: str) -> None:
    """Every pair of ranks: the graph's shortest path has the same narrowest edge, the same latency and the same shared edges."""
    cluster = load_cluster(name)
    network, net = Network(cluster), graph(cluster)
    ranks = [0, 1, cluster.devices_per_node - 1, cluster.num_ranks // 2, cluster.num_ranks - 1]
    for src in ranks:
        for dst in ranks:
            if src == dst:
                continue
            hops = graph_path(cluster, src, dst, net=net)
            path = network.path(src, dst)
            assert min(path.values()) == pytest.approx(min(hop.bandwidth_Bps for hop in hops if hop.link != "local")), (src, dst)
            assert network.latency(src, dst) == pytest.approx(sum(hop.latency_s for hop in hops)), (src, dst)
            assert (("leaf.up", cluster.node_of(src)) in path) == any(hop.target == "spine" for hop in hops)


@pytest.mark.parametrize("name", NAMES)
def test_pairs_share_ports_exactly_where_they_share_edges(name: str) -> None:
    """Two transfers meet in the network if and only if their paths in the graph have an edge in common."""
    cluster = load_cluster(name)
    network, net = Network(cluster), graph(cluster)
    ranks = sorted({0, 1, 2 % cluster.num_ranks, cluster.devices_per_node - 1, cluster.num_ranks // 2, cluster.num_ranks - 1})
    pairs = [(src, dst) for src in ranks for dst in ranks if src != dst]
    edges = {pair: {(hop.source, hop.target) for hop in graph_path(cluster, *pair, net=net)} for pair in pairs}
    for one in pairs:
        for other in pairs:
            mine, theirs = ({hop for hop in network.path(*pair) if hop[0] != "nvswitch"} for pair in (one, other))
            assert bool(mine & theirs) == bool(edges[one] & edges[other]), (one, other)


@pytest.mark.parametrize("name", ["h100-sxm-8x4", "a100-sxm-8x2", "rtx-4090-4"])
@pytest.mark.parametrize("tier", ["host", "disk"])
def test_ways_to_the_tiers_are_those_of_the_graph(name: str, tier: str) -> None:
    cluster = load_cluster(name)
    network = Network(cluster)
    for rank in (0, cluster.num_ranks - 1):
        vertex = f"node{cluster.node_of(rank)}/{tier}"
        hops = graph_path(cluster, vertex, rank)
        assert min(network.path(tier, rank).values()) == pytest.approx(min(hop.bandwidth_Bps for hop in hops))
        assert network.latency(tier, rank) == pytest.approx(sum(hop.latency_s for hop in hops))
        assert len(network.path(rank, tier)) == len(network.path(tier, rank))
        assert not network.path(rank, tier).keys() & network.path(tier, rank).keys()


def test_a_rail_relays_over_nvlink_in_one_of_the_nodes() -> None:
    network = Network(load_cluster("h100-sxm-8x4"))
    wanted: dict[Rail, tuple[int, int]] = {"direct": (3, 9), "source": (1, 9), "target": (3, 11)}
    for rail, (sender, receiver) in wanted.items():
        path = network.path(3, 9, rail=rail)
        assert ("scale_out.out", sender) in path and ("scale_out.in", receiver) in path
        assert (("scale_up.out", 3) in path) == (rail == "source") and (("scale_up.in", 9) in path) == (rail == "target")
    assert network.path(3, 11, rail="source") == network.path(3, 11, rail="target") == network.path(3, 11)


def test_devices_that_share_a_nic_halve_it() -> None:
    cluster = load_cluster("h100-sxm-8x2")
    shared = replace(cluster, links={**cluster.links, "scale_out": replace(cluster.links["scale_out"], shared_by=2)})
    for machine, factor in ((cluster, 1.0), (shared, 2.0)):
        network = Network(machine)
        ends = flows_end(machine, *(Flow(f"{src}", 50e9, network.path(src, src + 8)) for src in (0, 1)))
        assert ends == pytest.approx([factor] * 2)


@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_oversubscription_divides_what_leaves_a_node(oversubscription: float) -> None:
    """Eight NICs of 50 GB/s send at once: the leaf carries 400 GB/s divided by the oversubscription."""
    cluster = replace(load_cluster("h100-sxm-8x2"), fabric_oversubscription=oversubscription)
    network = Network(cluster)
    ends = flows_end(cluster, *(Flow(f"{src}", 50e9, network.path(src, src + 8)) for src in range(8)))
    assert ends == pytest.approx([oversubscription] * 8)
    assert flows_end(cluster, Flow("alone", 50e9, network.path(0, 8))) == pytest.approx([1.0])


def test_devices_that_share_a_pcie_root_halve_it() -> None:
    """Two A100s of a DGX share a root of 25 GB/s; their neighbours have their own."""
    cluster = load_cluster("a100-sxm-8")
    network = Network(cluster)
    assert flows_end(cluster, *(Flow(f"{rank}", 25e9, network.path("host", rank)) for rank in (0, 1, 2))) == pytest.approx([2.0, 2.0, 1.0])


def test_a_disk_is_shared_by_the_whole_node_and_no_other() -> None:
    cluster = load_cluster("h100-sxm-8x2")
    network = Network(cluster)
    ends = flows_end(cluster, *(Flow(f"{rank}", 54.4e9, network.path("disk", rank)) for rank in (0, 7, 8)))
    assert ends == pytest.approx([2.0, 2.0, 1.0], rel=1e-6)


UNREACHABLE = [(0, 1, "scale_up"), (0, 8, "scale_out"), ("disk", 3, "links.disk"), (2, "host", "links.host"), (0, "nvme", "nvme")]


@pytest.mark.parametrize(("src", "dst", "missing"), UNREACHABLE)
def test_an_unreachable_pair_is_named(src: int | str, dst: int | str, missing: str) -> None:
    cluster = replace(load_cluster("h100-sxm-8x2"), links={})
    with pytest.raises(SimulationError, match=f"{src} -> {dst} is unreachable.*{missing}"):
        Network(cluster).path(src, dst)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SimulationError, match=r"rank = 8 must be in 0\.\.7"):
        Network(load_cluster("h100-sxm-8")).path(0, 8)
