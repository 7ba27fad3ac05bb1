"""Collectives: NCCL's rows inside a node, rings in between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs import CostModel, Provenance
from moesim.costs.links import NCCL_CALL_S
from moesim.errors import CostError
from moesim.hardware import Cluster
from moesim.hardware.tables import read_table
from moesim.model import MoEModel


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rows_of_the_table_are_reproduced_exactly(h100: Cluster, v3_costs: CostModel, operation: str, ranks: int) -> None:
    rows = read_table(h100, "nccl2.29.2", where={"op_name": operation, "num_gpus": ranks, "nccl_dtype": "half"})
    timed = getattr(v3_costs, operation)(rows["message_bytes"], ranks)
    assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.MEASURED).all()


def test_all_reduce_is_the_faster_of_nccl_and_the_engines_own(h100: Cluster, v3: MoEModel, v3_costs: CostModel) -> None:
    nccl = read_table(h100, "nccl2.29.2", where={"op_name": "all_reduce", "num_gpus": 8, "nccl_dtype": "half"})
    own = read_table(h100, "custom_allreduce_sglang0.5.14", where={"num_gpus": 8, "backend": "sglang_graph"})
    sizes, at, other = np.intersect1d(nccl["message_bytes"], own["message_bytes"], return_indices=True)
    keep = sizes != 1024  # a hiccup of the measurement: ten times its neighbours
    fastest = np.minimum(nccl["latency_s"][at], own["latency_s"][other])
    assert (v3_costs.all_reduce(sizes[keep], 8).seconds == fastest[keep]).all()
    assert v3_costs.all_reduce(np.array([1024.0]), 8).seconds[0] < 5e-6
    assert (CostModel(h100, v3, backend="vllm").all_reduce(sizes[keep], 8).seconds == fastest[keep]).all()


@pytest.mark.parametrize(("ranks", "limit"), [(4, 1e6), (8, 5e5)])
def test_tensorrt_llm_leaves_large_all_reduces_to_nccl(h100: Cluster, v3: MoEModel, v3_costs: CostModel, ranks: int, limit: float) -> None:
    """From the size on at which its strategy AUTO gives up its own kernel, though that would be the faster one; below, it is as fast as the others."""
    costs = CostModel(h100, v3, backend="trtllm")
    rows = read_table(h100, "nccl2.29.2", where={"op_name": "all_reduce", "num_gpus": ranks, "nccl_dtype": "half"})
    large = (rows["message_bytes"] >= limit) & (rows["message_bytes"] < 2**23)
    sizes = rows["message_bytes"][large].astype(float)
    assert large.sum() >= 3 and (costs.all_reduce(sizes, ranks).seconds == rows["latency_s"][large]).all()
    assert (v3_costs.all_reduce(sizes, ranks).seconds < rows["latency_s"][large]).all()
    below = np.array([limit - 1.0, limit / 3])
    assert costs.all_reduce(below, ranks).seconds == pytest.approx(v3_costs.all_reduce(below, ranks).seconds)
    two = np.array([4e6])
    assert costs.all_reduce(two, 2).seconds == v3_costs.all_reduce(two, 2).seconds


def test_the_known_bus_bandwidth_is_reached(v3_costs: CostModel) -> None:
    size = 268435456 * 2
    seconds = v3_costs.all_reduce(np.array([size]), 8).seconds[0]
    assert 2 * 7 / 8 * size / seconds == pytest.approx(445e9, rel=0.01)


def test_nothing_to_send_and_nobody_to_send_to_take_no_time(v3_costs: CostModel, bare: Cluster, v3: MoEModel) -> None:
    for costs in (v3_costs, CostModel(bare, v3)):
        for call in (costs.all_reduce, costs.all_gather, costs.reduce_scatter):
            assert call(np.array([0.0, 1e6]), 8).seconds[0] == 0
            assert call(np.array([1e6]), 1).seconds.tolist() == [0.0]
        assert costs.p2p(np.array([0.0])).seconds.tolist() == [0.0]


def test_other_rank_counts_and_nodes_are_calibrated_and_ordered(v3_costs: CostModel) -> None:
    size = np.array([1e6, 1e8])
    six, eight = v3_costs.all_gather(size, 6), v3_costs.all_gather(size, 8)
    assert (six.provenance == Provenance.CALIBRATED).all() and (six.seconds < eight.seconds).all()
    two, four = (v3_costs.all_reduce(size, 8 * nodes, nodes=nodes) for nodes in (2, 4))
    assert (two.provenance == Provenance.CALIBRATED).all()
    assert (v3_costs.all_reduce(size, 8).seconds < two.seconds).all() and (two.seconds < four.seconds).all()
    # A share of 1/8 of the buffer crosses each NIC, 2(N−1)/N times.
    assert four.seconds[1] > 2 * 3 / 4 * 1e8 / 8 / 50e9


def test_a_ring_without_tables_is_the_closed_form(bare: Cluster, v3: MoEModel) -> None:
    link = bare.links["scale_up"]
    reached = link.bandwidth_Bps * link.efficiency.efficiency[-1]
    timed = CostModel(bare, v3).all_reduce(np.array([1e9]), 8)
    assert timed.seconds[0] == pytest.approx(NCCL_CALL_S + 14 * link.latency_s + 14 / 8 * 1e9 / reached, rel=1e-9)
    assert timed.provenance == Provenance.ROOFLINE


def test_doubling_a_bandwidth_is_never_slower(bare: Cluster, v3: MoEModel) -> None:
    size = 2.0 ** np.arange(8, 31)
    for name in ("scale_up", "scale_out"):
        fast = replace(bare, links={**bare.links, name: replace(bare.links[name], bandwidth_Bps=2 * bare.links[name].bandwidth_Bps)})
        for operation in ("all_reduce", "all_gather", "reduce_scatter"):
            slow_s, fast_s = (getattr(CostModel(cluster, v3), operation)(size, 32, nodes=4).seconds for cluster in (bare, fast))
            assert (fast_s < slow_s).all()


def test_a_message_is_its_row_of_the_table(h100: Cluster, v3_costs: CostModel) -> None:
    rows = read_table(h100, "collective_vidur", where={"op_name": "send_recv", "num_nodes": 1})
    timed = v3_costs.p2p(rows["message_bytes"].astype(float))
    same = timed.seconds == rows["latency_s"]
    # All but the hiccups of the measurement and one size that was timed twice.
    assert same.mean() > 0.98 and (timed.provenance[same] == Provenance.MEASURED).all()


def test_without_a_table_of_messages_one_is_half_of_a_pairs_alltoall(h100: Cluster, v3: MoEModel, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = CostModel(h100, v3)
    monkeypatch.setattr(costs.links, "_messages", lambda: None)
    rows = read_table(h100, "nccl2.29.2", where={"op_name": "alltoall", "num_gpus": 2, "nccl_dtype": "half"})
    timed = costs.p2p(rows["message_bytes"] / 2)
    assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.CALIBRATED).all()


def test_a_message_between_nodes_is_slower_than_inside(v3_costs: CostModel) -> None:
    size = np.array([1e5, 1e8])
    assert (v3_costs.p2p(size, nodes=2).seconds > v3_costs.p2p(size).seconds).all()


def test_uneven_groups_are_refused(v3_costs: CostModel) -> None:
    with pytest.raises(CostError, match="ranks = '9 on 2 nodes' must be the same number on every node"):
        v3_costs.all_reduce(np.array([1.0]), 9, nodes=2)
