"""Dispatch and combine: the table at balance, the ports' loads everywhere else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs import ALGORITHMS, CostModel, ExchangeTiming, Provenance
from moesim.costs.exchange import _Reference
from moesim.costs.interpolation import Curve
from moesim.costs.traffic import balanced_counts
from moesim.errors import CostError
from moesim.hardware import Cluster, load_cluster
from moesim.hardware.tables import read_table
from moesim.model import MoEModel, load_model


def balanced(costs: CostModel, algorithm: str, stage: str, nodes: int, tokens: float, *, devices: int = 8, limit: int | None = None) -> ExchangeTiming:
    model = costs.model
    counts = balanced_counts(num_ranks=nodes * devices, devices=devices, num_experts=model.num_experts, top_k=model.top_k, max_nodes=limit)
    return costs.exchange(algorithm, stage, assign_RR=counts["assign_RR"] * tokens, copy_RR=counts["copy_RR"] * tokens, node_RN=counts["node_RN"] * tokens)


@pytest.mark.parametrize(
    ("algorithm", "stem", "latency"),
    [
        ("low_latency", "deepep_ll_1to8nodes_sglang0.5.6", "avg_t_s"),
        ("normal", "deepep_normal_1to8nodes_sglang0.5.6", "transmit_s"),
    ],
)
@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_every_balanced_grid_point_takes_the_tables_time(v3_costs: CostModel, h100: Cluster, algorithm: str, stem: str, latency: str, stage: str) -> None:
    rows = read_table(h100, stem)
    mine = rows["num_experts"] == 256
    if algorithm == "normal":
        mine &= rows[f"{stage}_sms"] == 20
    assert mine.sum() > 50
    for index in np.flatnonzero(mine):
        timed = balanced(v3_costs, algorithm, stage, int(rows["node_num"][index]), float(rows["num_token"][index]), limit=4 if algorithm == "normal" else None)
        expected = rows[f"{stage}_{latency}"][index]
        assert timed.send_s == pytest.approx(expected, rel=1e-9) and timed.recv_s == pytest.approx(expected, rel=1e-9)
        assert (timed.provenance == Provenance.MEASURED).all()


def test_one_node_tables_of_other_shapes_are_found(h100: Cluster, qwen_costs: CostModel) -> None:
    where = {"hidden_size": 4096, "num_topk": 8, "num_experts": 128, "combine_sms": 20, "num_token": 4096}
    rows = read_table(h100, "deepep_normal_1node_sglang0.5.12", where=where)
    timed = balanced(qwen_costs, "normal", "combine", 1, 4096)
    assert timed.send_s[0] == pytest.approx(rows["combine_transmit_s"][0]) and timed.provenance[0] == Provenance.MEASURED


def test_between_keys_interpolated_other_sizes_calibrated(v3_costs: CostModel, qwen_costs: CostModel) -> None:
    assert balanced(v3_costs, "low_latency", "dispatch", 4, 100).provenance[0] == Provenance.INTERPOLATED
    assert balanced(v3_costs, "low_latency", "dispatch", 3, 128).provenance[0] == Provenance.CALIBRATED
    assert balanced(v3_costs, "normal", "dispatch", 1, 128, devices=4).provenance[0] == Provenance.CALIBRATED
    assert balanced(qwen_costs, "normal", "dispatch", 4, 4096).provenance[0] == Provenance.CALIBRATED


def test_three_nodes_lie_between_two_and_four(v3_costs: CostModel) -> None:
    two, three, four = (balanced(v3_costs, "low_latency", "combine", nodes, 128).send_s[0] for nodes in (2, 3, 4))
    assert two < three < four


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_more_tokens_take_longer_and_none_take_no_time(v3_costs: CostModel, algorithm: str) -> None:
    times = [balanced(v3_costs, algorithm, "dispatch", 4, tokens).send_s[0] for tokens in (0, 256, 1024, 4096, 400000)]
    assert times[0] == 0 and (np.diff(times) > 0).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_permuting_ranks_within_nodes_and_nodes_permutes_times(v3_costs: CostModel, algorithm: str) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    copy = rng.integers(0, 900, (16, 16)).astype(np.float64)
    node = np.maximum(copy.reshape(16, 2, 8).max(axis=-1), copy.reshape(16, 2, 8).sum(axis=-1) * 0.4)
    order = np.concatenate([np.arange(8, 16), np.arange(8)])
    first = v3_costs.exchange(algorithm, "combine", assign_RR=copy, copy_RR=copy, node_RN=node)
    second = v3_costs.exchange(algorithm, "combine", assign_RR=copy[order][:, order], copy_RR=copy[order][:, order], node_RN=node[order][:, ::-1])
    assert second.send_s == pytest.approx(first.send_s[order]) and second.recv_s == pytest.approx(first.recv_s[order])


def test_a_hot_rank_receives_longer_than_the_others(v3_costs: CostModel) -> None:
    copy = np.full((32, 32), 100.0)
    copy[:, 5] = 1000
    timed = v3_costs.exchange("low_latency", "dispatch", assign_RR=copy)
    assert timed.recv_s.argmax() == 5 and timed.recv_s[5] > 3 * np.delete(timed.recv_s, 5).max()
    back = v3_costs.exchange("low_latency", "combine", assign_RR=copy)
    assert back.send_s.argmax() == 5


def test_traffic_to_remote_nodes_costs_more_than_inside(v3_costs: CostModel) -> None:
    near, far = np.zeros((2, 16, 16))
    near[:8, :8] = near[8:, 8:] = 500
    far[:8, 8:] = far[8:, :8] = 500
    inside = v3_costs.exchange("low_latency", "dispatch", assign_RR=near)
    outside = v3_costs.exchange("low_latency", "dispatch", assign_RR=far)
    assert outside.send_s.max() > 2 * inside.send_s.max()
    assert inside.bytes["inter_node"] == 0 and outside.bytes["intra_node"] == 0


def test_both_ports_of_a_high_throughput_rank_join_as_a_root_of_squares(v3_costs: CostModel) -> None:
    copy, node = np.zeros((16, 16)), np.zeros((16, 2))
    copy[:8, :8], node[:8, 1] = 60000.0, 60000.0
    inside, outside, both = (
        v3_costs.exchange("normal", "dispatch", copy_RR=copies, node_RN=nodes).send_s[0] for copies, nodes in ((copy, 0 * node), (0 * copy, node), (copy, node))
    )
    assert both == pytest.approx(np.hypot(inside, outside), rel=0.03) and both > 1.1 * max(inside, outside)


def test_a_number_of_nodes_without_a_table_takes_the_neighbours_rate_and_the_least_time_between_theirs(v3_costs: CostModel, h100: Cluster) -> None:
    two, three, four = (balanced(v3_costs, "normal", "combine", nodes, 1, limit=4).send_s[0] for nodes in (2, 3, 4))
    assert two < three < four
    # Large sizes: the three nodes' NIC carries 14336 bytes a copy at the port's rate, beside what is forwarded inside.
    tokens = 100000.0
    timed = balanced(v3_costs, "normal", "combine", 3, tokens)
    out = timed.port_bytes["inter_out"][0]
    assert 0.8 < out / h100.links["scale_out"].bandwidth_Bps / timed.send_s[0] <= 1.0


def test_bytes_count_every_copy_once_and_balance(v3_costs: CostModel) -> None:
    timed = balanced(v3_costs, "normal", "dispatch", 4, 128, limit=4)
    for kind, name in (("intra", "intra_node"), ("inter", "inter_node")):
        assert timed.port_bytes[f"{kind}_out"].sum() == pytest.approx(timed.port_bytes[f"{kind}_in"].sum())
        assert timed.bytes[name] == pytest.approx(timed.port_bytes[f"{kind}_out"].sum())
    counts = balanced_counts(num_ranks=32, devices=8, num_experts=256, top_k=8)
    assert timed.bytes["inter_node"] == pytest.approx(counts["node_RN"][0, 0] * 3 * 128 * 32 * (7168 + 4 * 56))


def test_payload_is_fp8_with_scales_for_fp8_models_and_bf16_back(v3_costs: CostModel, qwen_costs: CostModel) -> None:
    assert v3_costs.payload_bytes("dispatch") == 7168 + 224 and v3_costs.payload_bytes("combine") == 14336
    assert qwen_costs.payload_bytes("dispatch") == qwen_costs.payload_bytes("combine") == 8192


def test_a_single_rank_exchanges_nothing(v3_costs: CostModel, bare: Cluster, v3: MoEModel) -> None:
    for costs in (v3_costs, CostModel(bare, v3)):
        for algorithm in ALGORITHMS:
            timed = costs.exchange(algorithm, "dispatch", assign_RR=np.full((1, 1), 80.0), copy_RR=np.full((1, 1), 10.0), node_RN=np.full((1, 1), 10.0))
            assert timed.send_s.tolist() == timed.recv_s.tolist() == [0.0] and timed.bytes["local"] > 0


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_without_tables_a_faster_link_is_never_slower(bare: Cluster, v3: MoEModel, algorithm: str) -> None:
    base = balanced(CostModel(bare, v3), algorithm, "dispatch", 4, 512)
    assert (base.provenance == Provenance.ROOFLINE).all()
    for name in ("scale_up", "scale_out"):
        links = {**bare.links, name: replace(bare.links[name], bandwidth_Bps=2 * bare.links[name].bandwidth_Bps)}
        faster = balanced(CostModel(replace(bare, links=links), v3), algorithm, "dispatch", 4, 512)
        assert (faster.send_s <= base.send_s).all()
    assert (faster.send_s < base.send_s).all()  # the NIC is what limits four nodes


def test_oversubscription_slows_the_scale_out_link(bare: Cluster, v3: MoEModel) -> None:
    slow = CostModel(replace(bare, fabric_oversubscription=2.0), v3)
    assert balanced(slow, "direct", "dispatch", 4, 4096).send_s[0] > 1.8 * balanced(CostModel(bare, v3), "direct", "dispatch", 4, 4096).send_s[0]


def test_leading_dimensions_are_kept(v3_costs: CostModel) -> None:
    pairs = np.random.Generator(np.random.PCG64(2)).integers(0, 9, (3, 5, 16, 16)).astype(np.float64)
    timed = v3_costs.exchange("low_latency", "dispatch", assign_RR=pairs)
    assert timed.send_s.shape == timed.provenance.shape == (3, 5, 16) and timed.bytes["intra_node"].shape == (3, 5)
    one = v3_costs.exchange("low_latency", "dispatch", assign_RR=pairs[2, 3])
    assert timed.send_s[2, 3] == pytest.approx(one.send_s)


def test_wrong_stage_and_missing_counts_are_refused(v3_costs: CostModel) -> None:
    with pytest.raises(CostError, match="stage = 'gather' must be one of dispatch, combine"):
        v3_costs.exchange("normal", "gather", copy_RR=np.ones((8, 8)))
    with pytest.raises(CostError, match="give the counts"):
        v3_costs.exchange("normal", "dispatch")


def test_ranks_without_a_link_are_an_error_that_names_it(bare: Cluster, v3: MoEModel) -> None:
    lonely = replace(bare, links={name: link for name, link in bare.links.items() if name != "scale_out"})
    with pytest.raises(CostError, match="links.scale_out is missing"):
        balanced(CostModel(lonely, v3), "direct", "dispatch", 4, 16)


def test_a_laptop_exchanges_by_roofline() -> None:
    timed = balanced(CostModel(load_cluster("laptop-4"), load_model("tiny-moe")), "direct", "dispatch", 1, 64, devices=4)
    assert (timed.send_s > 0).all() and (timed.provenance == Provenance.ROOFLINE).all()


def test_low_latency_kernels_take_part_of_the_exchange(v3_costs: CostModel) -> None:
    for stage in ("dispatch", "combine"):
        for tokens in (1, 16, 128):
            timed = balanced(v3_costs, "low_latency", stage, 8, tokens)
            assert timed.send_kernel_s is not None and timed.receive_kernel_s is not None
            assert (timed.send_kernel_s + timed.receive_kernel_s <= np.minimum(timed.send_s, timed.recv_s) * (1 + 1e-12)).all()
    # What DeepEP's contributors measured for 128 tokens on 16 GPUs (another GPU): dispatch 25 + 11 us, combine 38-42 + 10 us.
    for stage, send, receive in (("dispatch", 25e-6, 10.6e-6), ("combine", 40e-6, 10.2e-6)):
        timed = balanced(v3_costs, "low_latency", stage, 2, 128)
        assert timed.send_kernel_s is not None and timed.send_kernel_s[0] == pytest.approx(send, rel=0.15)
        assert timed.receive_kernel_s is not None and timed.receive_kernel_s[0] == pytest.approx(receive, rel=0.15)


def test_other_exchanges_have_no_kernels_that_leave(v3_costs: CostModel) -> None:
    timed = balanced(v3_costs, "normal", "dispatch", 2, 128, limit=4)
    assert timed.send_kernel_s is None and timed.receive_kernel_s is None


@pytest.mark.parametrize(
    ("seconds", "expected"), [([2.0, 3.0, 5.0, 9.0], 1.0), ([2.0, 3.0, 2.0, 2.0], 0.25), ([4.0], 4.0)], ids=["rising", "flat by noise", "one size"]
)
def test_a_rate_is_read_from_any_table_of_times(seconds: list[float], expected: float) -> None:
    curve = Curve(keys=np.array([1.0, 2.0, 4.0, 8.0][: len(seconds)]), seconds=np.array(seconds))
    assert _Reference(curve=curve, up=1.0, out=0.0, shape=(1, 1, 1, 1, 1), worst=Provenance.MEASURED).slope == pytest.approx(expected)
