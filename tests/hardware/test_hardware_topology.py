"""The graph: who reaches whom over which links, and what the fabric carries."""

from __future__ import annotations

from dataclasses import replace

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import HardwareError
from moesim.hardware import load_cluster
from moesim.hardware.topology import graph, path

CLUSTERS = ("h100-sxm-8x4", "a100-sxm-8x2", "rtx-pro-6000-2x2", "rtx-4090-2x2", "laptop-2x3", "h800-sxm-4x2")


@pytest.mark.parametrize("name", CLUSTERS)
def test_paths_inside_a_node_use_scale_up_and_paths_between_nodes_both_nics(name: str) -> None:
    cluster = load_cluster(name)
    net = graph(cluster)
    for src in range(cluster.num_ranks):
        for dst in range(cluster.num_ranks):
            hops = path(cluster, src, dst, net=net)
            kinds = [net.nodes[hop.target]["kind"] for hop in hops]
            if src == dst:
                assert hops == ()
            elif cluster.node_of(src) == cluster.node_of(dst):
                assert {hop.link for hop in hops} == {"scale_up"} and len(hops) == 2
                assert sum(hop.latency_s for hop in hops) == pytest.approx(cluster.links["scale_up"].latency_s)
            else:
                share, width = cluster.links["scale_out"].shared_by, cluster.devices_per_node
                nics = [hop.target for hop in hops if net.nodes[hop.target]["kind"] == "nic"]
                assert nics == [f"node{cluster.node_of(rank)}/nic{rank % width // share}" for rank in (src, dst)]
                assert "scale_up" not in {hop.link for hop in hops} and "host" not in kinds and "spine" in kinds
                assert sum(hop.latency_s for hop in hops) == pytest.approx(cluster.links["scale_out"].latency_s)
                assert min(hop.bandwidth_Bps for hop in hops) <= cluster.links["scale_out"].bandwidth_Bps


@given(st.sampled_from(CLUSTERS), st.data())
@settings(max_examples=30, deadline=None)
def test_paths_are_chains_and_reverse_to_themselves(name: str, data: st.DataObject) -> None:
    cluster = load_cluster(name)
    net = graph(cluster)
    src, dst = (data.draw(st.sampled_from(sorted(node for node in net if "rank" in node))) for _ in range(2))
    there, back = path(cluster, src, dst, net=net), path(cluster, dst, src, net=net)
    assert [hop.source for hop in there][1:] == [hop.target for hop in there][:-1]
    assert [(hop.source, hop.target) for hop in there] == [(hop.target, hop.source) for hop in reversed(back)]


def test_every_edge_has_its_attributes_and_every_vertex_its_kind() -> None:
    net = graph(load_cluster("h100-sxm-8x2"))
    for _, _, data in net.edges(data=True):
        assert set(data) == {"link", "bandwidth_Bps", "latency_s"} and data["bandwidth_Bps"] > 0 and data["latency_s"] >= 0
    kinds = {net.nodes[vertex]["kind"] for vertex in net}
    assert kinds == {"gpu", "nvswitch", "pcie_root", "host", "disk", "nic", "leaf", "spine"}
    assert networkx.is_strongly_connected(net)


def test_counts_follow_the_cluster() -> None:
    net = graph(load_cluster("a100-sxm-8x2"))
    kinds = [net.nodes[vertex]["kind"] for vertex in net]
    assert kinds.count("gpu") == 16 and kinds.count("nic") == 16 and kinds.count("nvswitch") == 2 and kinds.count("spine") == 1
    assert kinds.count("pcie_root") == 8  # two GPUs share a PCIe switch


@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_a_node_reaches_the_spine_with_its_nics_over_the_oversubscription(oversubscription: float) -> None:
    cluster = replace(load_cluster("h100-sxm-8x4"), fabric_oversubscription=oversubscription)
    net = graph(cluster)
    assert net["leaf0"]["spine"]["bandwidth_Bps"] == pytest.approx(8 * 50e9 / oversubscription)
    crossing, _ = networkx.maximum_flow(net, "leaf0", "leaf1", capacity="bandwidth_Bps")
    assert crossing == pytest.approx(8 * 50e9 / oversubscription)


def test_host_and_disk_are_reached_over_their_links() -> None:
    cluster = load_cluster("rtx-4090-1")
    assert [hop.link for hop in path(cluster, 0, "node0/host")] == ["host", "host"]
    disk = path(cluster, 0, "node0/disk")
    assert disk[-1].link == "disk" and sum(hop.latency_s for hop in disk) == pytest.approx(cluster.links["disk"].latency_s)


def test_a_single_node_has_no_network() -> None:
    net = graph(load_cluster("h100-sxm-8"))
    assert not {"leaf", "spine", "nic"} & {net.nodes[vertex]["kind"] for vertex in net}


def test_a_missing_vertex_is_named() -> None:
    cluster = load_cluster("h100-sxm-8")
    for end in (8, -1, "node1/host", "rank9"):
        with pytest.raises(HardwareError, match="must be a rank in 0..7"):
            path(cluster, 0, end)


def test_two_lone_ranks_without_a_link_have_no_path() -> None:
    cluster = load_cluster("h100-sxm-2")
    lonely = replace(cluster, links={name: link for name, link in cluster.links.items() if name == "disk"})
    with pytest.raises(HardwareError, match="there is no path from rank0 to rank1"):
        path(lonely, 0, 1)
