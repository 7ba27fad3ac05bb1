"""Port loads against a walk of every copy, hop by hop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from moesim.costs.traffic import ALGORITHMS, balanced_counts, devices_per_node, ports
from moesim.errors import CostError

RNG = np.random.Generator(np.random.PCG64(7))


def routed(num_ranks: int, devices: int, tokens: int = 20, experts: int = 48, top_k: int = 4) -> tuple[dict[str, np.ndarray], list[tuple[int, list[int]]]]:
    """Draw tokens; return the three count matrices and the tokens as (source, target ranks of the k experts)."""
    nodes = num_ranks // devices
    counts = {"assign_RR": np.zeros((num_ranks, num_ranks)), "copy_RR": np.zeros((num_ranks, num_ranks)), "node_RN": np.zeros((num_ranks, nodes))}
    drawn = []
    for source in range(num_ranks):
        for _ in range(tokens):
            targets = (RNG.permutation(experts)[:top_k] * num_ranks // experts).tolist()
            drawn.append((source, targets))
            for target in targets:
                counts["assign_RR"][source, target] += 1
            for target in set(targets):
                counts["copy_RR"][source, target] += 1
            for node in {target // devices for target in targets}:
                counts["node_RN"][source, node] += 1
    return counts, drawn


def walk(algorithm: str, devices: int, drawn: list[tuple[int, list[int]]]) -> Counter[tuple[int, int]]:
    """Return the copies on every (from, to) hop."""
    hops: Counter[tuple[int, int]] = Counter()
    for source, targets in drawn:
        index, home = source % devices, source // devices
        if algorithm == "low_latency":
            hops.update((source, target) for target in targets)
        elif algorithm == "direct":
            hops.update((source, target) for target in set(targets))
        elif algorithm == "normal":
            for node in {target // devices for target in targets}:
                relay = node * devices + index
                if node != home:
                    hops[source, relay] += 1
                for target in {target for target in targets if target // devices == node}:
                    if target != relay or node == home:
                        hops[relay, target] += 1
        else:
            for target in set(targets):
                middle = home * devices + target % devices
                if middle != source:
                    hops[source, middle] += 1
                if target != middle or target == source:
                    hops[middle, target] += 1
    return hops


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("num_ranks", "devices"), [(4, 4), (8, 4), (12, 4), (6, 2), (3, 1)])
def test_ports_carry_every_copy_of_a_walk(algorithm: str, num_ranks: int, devices: int) -> None:
    counts, drawn = routed(num_ranks, devices)
    found = ports(algorithm, devices, **counts)
    expected = {name: np.zeros(num_ranks) for name in ("up_out", "up_in", "out_out", "out_in", "local")}
    for (start, end), copies in walk(algorithm, devices, drawn).items():
        if start == end:
            expected["local"][start] += copies
        else:
            kind = "up" if start // devices == end // devices else "out"
            expected[f"{kind}_out"][start] += copies
            expected[f"{kind}_in"][end] += copies
    for name, value in expected.items():
        assert getattr(found, name).tolist() == value.tolist(), name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_sent_is_received_and_combine_is_the_reverse(algorithm: str) -> None:
    counts, _ = routed(8, 4)
    found = ports(algorithm, 4, **counts)
    assert found.up_out.sum() == found.up_in.sum() and found.out_out.sum() == found.out_in.sum()
    back = found.reversed()
    assert (back.up_out == found.up_in).all() and (back.out_in == found.out_out).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_leading_dimensions_are_independent(algorithm: str) -> None:
    cases = [routed(8, 4)[0] for _ in range(6)]
    stacked = ports(algorithm, 4, **{name: np.stack([case[name] for case in cases]).reshape(2, 3, *cases[0][name].shape) for name in cases[0]})
    for i, case in enumerate(cases):
        single = ports(algorithm, 4, **case)
        for name in ("up_out", "up_in", "out_out", "out_in", "local"):
            assert (getattr(stacked, name).reshape(6, 8)[i] == getattr(single, name)).all()


def test_expected_counts_match_drawn_routing() -> None:
    counts, _ = routed(8, 4, tokens=3000, experts=48, top_k=4)
    expected = balanced_counts(num_ranks=8, devices=4, num_experts=48, top_k=4)
    for name, value in expected.items():
        assert counts[name].mean() / 3000 == pytest.approx(value.mean(), rel=0.02), name


def test_a_group_limited_gate_reaches_fewer_nodes() -> None:
    free, limited = (balanced_counts(num_ranks=64, devices=8, num_experts=256, top_k=8, max_nodes=limit)["node_RN"].sum(axis=1)[0] for limit in (None, 4))
    missed = np.prod((224 - np.arange(8)) / (256 - np.arange(8)))
    assert free == pytest.approx(8 * (1 - missed)) and 3.5 < limited < 4.0


def test_ranks_must_fill_their_nodes() -> None:
    assert devices_per_node(4, 8) == 4 and devices_per_node(16, 8) == 8
    with pytest.raises(CostError, match="ranks = 12 must be at most, or a multiple of, the 8 devices"):
        devices_per_node(12, 8)


def test_missing_counts_and_unknown_algorithms_are_named() -> None:
    with pytest.raises(CostError, match="assign_RR is missing"):
        ports("low_latency", 4, assign_RR=None, copy_RR=np.ones((8, 8)), node_RN=None)
    with pytest.raises(CostError, match="node_RN is missing"):
        ports("normal", 4, assign_RR=None, copy_RR=np.ones((8, 8)), node_RN=None)
    with pytest.raises(CostError, match="must be one of normal, low_latency, direct, 2dh"):
        ports("ring", 4, assign_RR=None, copy_RR=np.ones((8, 8)), node_RN=None)
