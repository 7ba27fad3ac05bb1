"""Leaves of several nodes: what stays behind one is as fast as on a fabric without oversubscription, what leaves it is not; everywhere alike."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.costs.model import CostModel
from moesim.costs.traffic import balanced_counts
from moesim.errors import MoesimError
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.hardware.topology import graph
from moesim.hardware.topology import path as graph_path
from moesim.model.hf_config import load_model
from moesim.sim.collectives import Collectives
from moesim.sim.evaluate import evaluate
from moesim.sim.network import Network
from moesim.sim.ops import Program


def leaves(nodes_per_leaf: int, oversubscription: float = 4.0, name: str = "h100-sxm-8x4") -> Cluster:
    return replace(load_cluster(name), nodes_per_leaf=nodes_per_leaf, fabric_oversubscription=oversubscription)


@pytest.mark.parametrize("nodes_per_leaf", [1, 2, 4])
def test_ways_are_those_of_the_graph_and_cross_the_spine_only_between_leaves(nodes_per_leaf: int) -> None:
    cluster = leaves(nodes_per_leaf)
    network, net = Network(cluster), graph(cluster)
    for src, dst in ((0, 3), (0, 8), (3, 17), (9, 30)):
        hops = graph_path(cluster, src, dst, net=net)
        way = network.path(src, dst)
        assert min(way.values()) == pytest.approx(min(hop.bandwidth_Bps for hop in hops))
        assert network.latency(src, dst) == pytest.approx(sum(hop.latency_s for hop in hops))
        crosses = src // cluster.ranks_per_leaf != dst // cluster.ranks_per_leaf
        assert any(hop[0] == "leaf.up" for hop in way) == any(hop.target == "spine" for hop in hops) == crosses
    uplink = 8 * nodes_per_leaf * 50e9 / 4
    assert network.capacity["leaf.up", 0] == pytest.approx(uplink) and ("leaf.up", 4 // nodes_per_leaf) not in network.capacity


def ends(cluster: Cluster, exchanged: list[tuple[int, int]] | None = None) -> float:
    """Return the end of an exchange of 64 MB between pairs of ranks, or of a ring over the first two nodes."""
    collectives = Collectives(Program(cluster.num_ranks), cluster)
    if exchanged is None:
        collectives.all_gather(64e6, group_R=np.where(np.arange(cluster.num_ranks) < 2 * cluster.devices_per_node, 0, -1))
    else:
        pairs = np.zeros((cluster.num_ranks,) * 2)
        for src, dst in exchanged:
            pairs[src, dst] = 64e6
        collectives.all_to_all(pairs)
    return float(evaluate(collectives.program, 0.0).finish)


def test_collectives_slow_down_between_leaves_only() -> None:
    behind, flat = leaves(2), leaves(1, 1.0)
    alpha = flat.links["scale_out"].latency_s
    assert ends(behind) == ends(flat) < ends(leaves(1))
    near, far = [(0, 8)], [(0, 16)]
    assert ends(behind, near) == ends(flat, near) == ends(flat, far)
    assert ends(behind, far) - alpha == pytest.approx(4 * (ends(flat, far) - alpha), rel=0.02)
    # three messages behind the leaf and one across share the NIC; the uplink's share takes four times its one
    assert ends(behind, [(0, 8), (0, 9), (0, 10), (0, 16)]) == pytest.approx(ends(flat, [(0, 8), (0, 9), (0, 10), (0, 16)]))


@pytest.mark.parametrize("oversubscription", [2.0, 8.0])
def test_exchanges_behind_one_leaf_cost_what_they_cost_without_oversubscription(oversubscription: float) -> None:
    model = load_model("deepseek-v3")
    counts = balanced_counts(num_ranks=32, devices=8, num_experts=256, top_k=8)
    times = []
    for cluster in (leaves(4, oversubscription), leaves(1, 1.0), leaves(2, oversubscription), leaves(1, oversubscription)):
        costs = CostModel(cluster, model)
        copies = costs.copies("normal", copy_RR=counts["copy_RR"] * 4096, node_RN=counts["node_RN"] * 4096)
        times.append(float(costs.exchange("normal", "dispatch", copies=copies).send_s.max()))
        few = costs.links.collective("all_gather", np.array([64e6]), 16, 2).seconds[0]
        times[-1] += float(few)
    assert times[0] == times[1] < times[2] < times[3]


WRONG: list[tuple[Any, str]] = [(3, "equally full"), (0, "nodes_per_leaf"), (True, "nodes_per_leaf")]


@pytest.mark.parametrize(("leaf", "words"), WRONG)
def test_leaves_are_whole_and_equally_full(tmp_path: Path, leaf: Any, words: str) -> None:
    path = tmp_path / "rack.yaml"
    document = {"format": "moesim.hardware/1", "name": "rack", "extends": "h100-sxm", "devices_per_node": 8, "num_nodes": 4, "fabric_oversubscription": 2}
    path.write_text(json.dumps({**document, "nodes_per_leaf": 2}))
    assert load_cluster(str(path)).ranks_per_leaf == 16
    path.write_text(json.dumps({**document, "nodes_per_leaf": leaf}))
    with pytest.raises(MoesimError, match=words):
        load_cluster(str(path))


def test_one_node_a_leaf_is_what_documents_mean_that_do_not_say() -> None:
    assert load_cluster("h100-sxm-8x4").nodes_per_leaf == 1 and leaves(8).ranks_per_leaf == 32
