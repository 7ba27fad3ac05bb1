"""Collectives against α-β closed forms, message counts, and the bytes that `costs.traffic` puts on every port."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil, log2

import numpy as np
import pytest

from moesim.costs.traffic import ports
from moesim.errors import SimulationError
from moesim.hardware.cluster import Cluster, SizeCurve
from moesim.hardware.load import load_cluster
from moesim.sim.collectives import Collectives
from moesim.sim.evaluate import evaluate
from moesim.sim.ops import Program

UP_ALPHA, UP_BETA, OUT_ALPHA, OUT_BETA = 3e-6, 100e9, 7e-6, 20e9


def machine(devices: int, nodes: int = 1, curve: SizeCurve | None = None, oversubscription: float = 1.0) -> Cluster:
    """A machine with round numbers."""
    cluster = load_cluster("h100-sxm-8")
    flat = curve or SizeCurve()
    up = replace(cluster.links["scale_up"], bandwidth_Bps=UP_BETA, latency_s=UP_ALPHA, efficiency=flat)
    out = replace(cluster.links["scale_out"], bandwidth_Bps=OUT_BETA, latency_s=OUT_ALPHA, efficiency=flat)
    return replace(
        cluster, devices_per_node=devices, num_nodes=nodes, links={**cluster.links, "scale_up": up, "scale_out": out}, fabric_oversubscription=oversubscription
    )


def run(cluster: Cluster, add: Callable[[Collectives], object], sm_share: float = 0.0) -> tuple[float, Collectives]:
    collectives = Collectives(Program(cluster.num_ranks), cluster, sm_share=sm_share)
    add(collectives)
    return float(evaluate(collectives.program, 0.0).finish), collectives


def everyone(cluster: Cluster) -> np.ndarray:
    return np.zeros(cluster.num_ranks, dtype=int)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("m", [1.0, 4096.0, 1e9])
def test_closed_forms_in_a_node(n: int, m: float) -> None:
    cluster = machine(n)
    group = everyone(cluster)
    a, b = UP_ALPHA, UP_BETA
    one = (n - 1) * (a + m / (n * b))
    wanted = {
        ("all_reduce", "ring"): 2 * one,
        ("all_gather", "ring"): one,
        ("reduce_scatter", "ring"): one,
        ("all_reduce", "tree"): 2 * (ceil(log2(n)) * a + m / b) if n > 1 else 0.0,
        ("all_reduce", "in_switch"): 2 * a + m / b if n > 1 else 0.0,
        ("all_gather", "in_switch"): a + (n - 1) / n * m / b if n > 1 else 0.0,
        ("reduce_scatter", "in_switch"): a + (n - 1) / n * m / b if n > 1 else 0.0,
    }
    for (operation, algorithm), seconds in wanted.items():
        took, _ = run(cluster, lambda c, o=operation, a=algorithm: getattr(c, o)(m, group_R=group, algorithm=a))  # type: ignore[misc]
        assert took == pytest.approx(seconds, rel=1e-9, abs=1e-15), (operation, algorithm)


@pytest.mark.parametrize(("devices", "nodes"), [(1, 4), (4, 2), (8, 3)])
def test_closed_forms_across_nodes(devices: int, nodes: int) -> None:
    """Flat rings pay the NIC at every step; two levels pay it for 1/D of the buffer."""
    cluster, m = machine(devices, nodes), 1e8
    n, group = devices * nodes, everyone(cluster)
    slow = OUT_ALPHA + m / (n * OUT_BETA)
    inside = (devices - 1) * (UP_ALPHA + m / (devices * UP_BETA))
    between = (nodes - 1) * (OUT_ALPHA + m / (devices * nodes * OUT_BETA))
    assert run(cluster, lambda c: c.all_reduce(m, group_R=group))[0] == pytest.approx(2 * (n - 1) * slow, rel=1e-9)
    assert run(cluster, lambda c: c.all_reduce(m, group_R=group, algorithm="two_level"))[0] == pytest.approx(2 * (inside + between), rel=1e-9)
    assert run(cluster, lambda c: c.all_gather(m, group_R=group, algorithm="two_level"))[0] == pytest.approx(inside + between, rel=1e-9)
    assert run(cluster, lambda c: c.reduce_scatter(m, group_R=group, algorithm="two_level"))[0] == pytest.approx(inside + between, rel=1e-9)
    tree = 2 * (ceil(log2(n)) * OUT_ALPHA + m / OUT_BETA)
    assert run(cluster, lambda c: c.all_reduce(m, group_R=group, algorithm="tree"))[0] == pytest.approx(tree, rel=1e-9)


def test_groups_work_side_by_side_and_outsiders_stay_out() -> None:
    cluster, m = machine(8), 1e6
    took, collectives = run(cluster, lambda c: c.all_reduce(m, group_R=np.array([0, 0, 1, 1, 1, 1, -1, -1])))
    assert took == pytest.approx(2 * 3 * (UP_ALPHA + m / (4 * UP_BETA)), rel=1e-9)
    assert collectives.bytes_R["scale_up.out"].tolist() == pytest.approx([m, m, 1.5 * m, 1.5 * m, 1.5 * m, 1.5 * m, 0, 0])
    ends = evaluate(collectives.program, 0.0).end
    assert max(float(end[0]) for end in ends) == pytest.approx(2 * (UP_ALPHA + m / (2 * UP_BETA)), rel=1e-9)


@pytest.mark.parametrize("algorithm", ["ring", "two_level"])
@pytest.mark.parametrize("operation", ["all_reduce", "all_gather", "reduce_scatter"])
def test_bytes_sent_are_bytes_received_and_no_fewer_than_the_bound(operation: str, algorithm: str) -> None:
    cluster, m = machine(4, 3), 12e6
    _, collectives = run(cluster, lambda c: getattr(c, operation)(m, group_R=everyone(cluster), algorithm=algorithm))
    for link in ("scale_up", "scale_out"):
        assert collectives.bytes_R[f"{link}.out"].sum() == pytest.approx(collectives.bytes_R[f"{link}.in"].sum())
    moved = collectives.bytes_R["scale_up.out"] + collectives.bytes_R["scale_out.out"]
    assert moved.tolist() == pytest.approx([(2 if operation == "all_reduce" else 1) * 11 / 12 * m] * 12)


def test_a_straggler_of_a_ring_holds_up_its_neighbour_first() -> None:
    """Rank 0 is late by T: rank k misses its first chunk in round k only, so it ends T late, but its first k - 1 rounds are on time."""
    cluster, m, late = machine(4), 4e6, 1.0
    program = Program(4)
    ready = program.local("gemm", np.array([late, 0.0, 0.0, 0.0]))
    Collectives(program, cluster).all_gather(m, group_R=everyone(cluster), deps=[ready])
    times, step = evaluate(program, 0.0), UP_ALPHA + m / (4 * UP_BETA)
    assert [float(times.end[1][rank]) for rank in (1, 2, 3)] == pytest.approx([late + step, step, step])
    assert [float(times.end[2][rank]) for rank in (2, 3)] == pytest.approx([late + 2 * step, 2 * step])
    assert float(times.end[3][3]) == pytest.approx(late + 3 * step)


@pytest.mark.parametrize(("devices", "nodes"), [(4, 1), (8, 4), (4, 16)])
def test_all_to_all_closed_forms_and_message_counts(devices: int, nodes: int) -> None:
    """A balanced exchange of S bytes a rank: R - 1 messages of S/R, or D - 1 of S/D and then N - 1 of S/N."""
    cluster, share = machine(devices, nodes), 1e5
    n = devices * nodes
    pairs = np.full((n, n), share)
    inside, outside = (devices - 1) * share / UP_BETA, (n - devices) * share / OUT_BETA
    for serial in (False, True):
        up_a = UP_ALPHA * (devices - 1 if serial else 1)
        took, collectives = run(cluster, lambda c, s=serial: c.all_to_all(pairs, serial=s))  # type: ignore[misc]
        far = OUT_ALPHA * (n - devices if serial else 1) + outside if nodes > 1 else 0.0
        assert took == pytest.approx(max(up_a + inside, far), rel=1e-9)
        assert collectives.messages_R["scale_up"].tolist() == [devices - 1] * n and collectives.messages_R["scale_out"].tolist() == [n - devices] * n
        took, collectives = run(cluster, lambda c, s=serial: c.all_to_all(pairs, algorithm="2dh", serial=s))  # type: ignore[misc]
        far = OUT_ALPHA * (nodes - 1 if serial else 1) + outside if nodes > 1 else 0.0
        assert took == pytest.approx(up_a + nodes * inside + far, rel=1e-9)
        assert collectives.messages_R["scale_up"].tolist() == [devices - 1] * n and collectives.messages_R["scale_out"].tolist() == [nodes - 1] * n
        assert collectives.bytes_R["scale_out.out"].tolist() == pytest.approx([(n - devices) * share] * n)
    if nodes == 1:
        assert run(cluster, lambda c: c.all_to_all(pairs, algorithm="pairwise"))[0] == pytest.approx((n - 1) * (UP_ALPHA + share / UP_BETA), rel=1e-9)


def test_two_levels_win_where_small_messages_cannot_fill_the_nic_and_not_in_one_node() -> None:
    """The crossover comes from the size curve alone: with a flat curve, or one node, 2dh gains nothing."""
    curve = SizeCurve(size_bytes=(1e3, 1e6), efficiency=(0.05, 1.0))

    def gain(cluster: Cluster) -> float:
        pairs = np.full((cluster.num_ranks,) * 2, 32e6 / cluster.num_ranks)
        return run(cluster, lambda c: c.all_to_all(pairs))[0] / run(cluster, lambda c: c.all_to_all(pairs, algorithm="2dh"))[0]

    gains = [gain(machine(8, nodes, curve)) for nodes in (1, 2, 32)]
    assert gains[0] == pytest.approx(1.0) and gains[1] < 1.0 < gains[2]
    assert gain(machine(8, 32)) < 1.0


def test_bandwidth_follows_the_message_size() -> None:
    curve = SizeCurve(size_bytes=(1e3, 1e5), efficiency=(0.1, 0.9))
    cluster = machine(2, 1, curve)
    for size, efficiency in ((1e2, 0.1), (1e4, 0.5), (1e7, 0.9)):
        took, _ = run(cluster, lambda c, s=size: c.p2p(np.array([0]), np.array([1]), s))  # type: ignore[misc]
        assert took == pytest.approx(UP_ALPHA + size / (UP_BETA * efficiency), rel=1e-9)
    pairs = np.array([[0, 1e6], [0, 0]])
    took, _ = run(cluster, lambda c: c.all_to_all(pairs, messages_RR=np.full((2, 2), 100.0)))
    assert took == pytest.approx(UP_ALPHA + 1e6 / (UP_BETA * 0.5), rel=1e-9)


def test_oversubscription_slows_what_crosses_nodes_only() -> None:
    pairs = np.full((4, 4), 1e6)
    slow = run(machine(2, 2, oversubscription=4.0), lambda c: c.all_to_all(pairs))[0]
    assert slow == pytest.approx(OUT_ALPHA + 2 * 1e6 / (OUT_BETA / 4), rel=1e-9)


@pytest.mark.parametrize("algorithm", ["normal", "low_latency", "direct", "2dh"])
@pytest.mark.parametrize("stage", ["dispatch", "combine"])
def test_expert_exchange_puts_the_bytes_of_the_traffic_model_on_every_port(algorithm: str, stage: str) -> None:
    cluster, token = machine(4, 3), 7168.0
    rng = np.random.Generator(np.random.PCG64(5))
    assign = rng.integers(1, 50, (12, 12))
    copy = np.minimum(assign, rng.integers(1, 50, (12, 12)))
    node = copy.reshape(12, 3, 4).max(axis=2)
    counts = {"assign_RR": assign, "copy_RR": copy, "node_RN": node}
    _, collectives = run(cluster, lambda c: c.expert_exchange(stage, token, algorithm=algorithm, **counts))
    wanted = ports(algorithm, 4, assign_RR=assign, copy_RR=copy, node_RN=node)
    wanted = wanted if stage == "dispatch" else wanted.reversed()
    for port, copies in (("scale_up.out", wanted.up_out), ("scale_up.in", wanted.up_in), ("scale_out.out", wanted.out_out), ("scale_out.in", wanted.out_in)):
        assert collectives.bytes_R[port].tolist() == pytest.approx((copies * token).tolist()), port
    if algorithm == "low_latency":
        assert collectives.messages_R["scale_out"].sum() * token == pytest.approx(collectives.bytes_R["scale_out.out"].sum())


def test_a_pair_without_bytes_costs_nothing() -> None:
    cluster = machine(4)
    pairs = np.zeros((4, 4))
    pairs[0, 1] = 1e6
    took, collectives = run(cluster, lambda c: c.all_to_all(pairs, serial=True))
    assert took == pytest.approx(UP_ALPHA + 1e6 / UP_BETA) and collectives.messages_R["scale_up"].sum() == 1
    assert run(cluster, lambda c: c.all_to_all(np.diag([1e9] * 4)))[0] == 0.0


def test_sparse_gather_moves_only_what_is_needed_and_the_reduction_is_its_mirror() -> None:
    cluster = machine(4)
    need = np.array([[1, 1, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    owner, size = np.array([0, 0, 2]), np.array([1e6, 2e6, 4e6])
    _, gather = run(cluster, lambda c: c.sparse_all_gather(need, owner, size))
    _, reduce = run(cluster, lambda c: c.sparse_reduce_scatter(need, owner, size))
    assert gather.bytes_R["scale_up.out"].tolist() == [4e6, 0, 4e6, 0]
    assert gather.bytes_R["scale_up.in"].tolist() == [0, 2e6, 2e6, 4e6] == reduce.bytes_R["scale_up.out"].tolist()
    dense = np.ones((4, 3), dtype=bool)
    assert run(cluster, lambda c: c.sparse_all_gather(dense, owner, size))[1].bytes_R["scale_up.in"].tolist() == [4e6, 7e6, 3e6, 7e6]


def test_doubling_a_bandwidth_never_hurts() -> None:
    cluster = machine(4, 4)
    links = {name: replace(link, bandwidth_Bps=2 * link.bandwidth_Bps) for name, link in cluster.links.items()}
    pairs = np.random.Generator(np.random.PCG64(2)).uniform(0, 1e6, (16, 16))
    for algorithm in ("direct", "pairwise", "2dh"):
        slow, fast = (run(machine_, lambda c, a=algorithm: c.all_to_all(pairs, algorithm=a))[0] for machine_ in (cluster, replace(cluster, links=links)))  # type: ignore[misc]
        assert fast < slow


def test_communication_that_takes_sms_slows_computation_beside_it_exactly() -> None:
    """A GEMM of 1 s beside an exchange of t s that takes a share c of the SMs ends at 1 + c·t if the exchange is over first."""
    cluster, share, nbytes = machine(2), 0.25, 40e9
    program = Program(2)
    collectives = Collectives(program, cluster, sm_share=share)
    collectives.p2p(np.array([0]), np.array([1]), nbytes)
    gemm = program.local("gemm", np.ones(2))
    seconds = UP_ALPHA + nbytes / UP_BETA
    assert evaluate(program, 0.0).end[gemm].tolist() == pytest.approx([1 + share * seconds] * 2, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.all_gather(1.0, group_R=np.zeros(8, dtype=int), algorithm="tree"), "algorithm = 'tree'"),
        (lambda c: c.all_reduce(1.0, group_R=np.zeros(8, dtype=int), algorithm="in_switch"), "spans nodes"),
        (lambda c: c.all_reduce(1.0, group_R=np.array([0, 0, 0, 0, 0, -1, -1, -1]), algorithm="two_level"), "the same number on every node"),
        (lambda c: c.all_to_all(np.ones((8, 8)), algorithm="hypercube"), "direct, pairwise, 2dh"),
        (lambda c: c.all_to_all(-np.ones((8, 8))), "bytes >= 0"),
        (lambda c: c.p2p(np.array([0, 0]), np.array([1, 2]), 1.0), "at most once"),
        (lambda c: c.all_reduce(1.0, group_R=np.zeros(4, dtype=int)), "group_R"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[Collectives], object], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        run(machine(4, 2), call)
