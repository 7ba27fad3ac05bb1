"""Loads of a group: whole tokens are conserved, and port loads equal those of the full rank-pair matrices."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs.group import Group
from moesim.costs.group_loads import GroupLoads
from moesim.costs.traffic import balanced_counts, ports
from moesim.errors import InputError
from moesim.solvers.parallelism import Workload, linear_placement, packed_placement
from tests.solvers.parallelism_toys import tiny


def loads(group: Group, *, node: int, routing: Any = "balanced", experts: int = 8, top_k: int = 2, placement: Any = packed_placement) -> GroupLoads:
    assign = Workload(prompt_tokens=1, output_tokens=1, routing=routing).assign_LE(tiny(experts=experts, top_k=top_k))
    return GroupLoads(assign, top_k, group, devices_per_node=node, placement=placement)


def matrices(one: GroupLoads, tokens: float, node: int) -> dict[str, np.ndarray]:
    """Return the counts of every pair of ranks: only ranks with the same shard of their experts talk."""
    group, ranks = one.group, one.group.ranks
    nodes = max(1, ranks // node)
    rank, by_node = one.hits
    result = {"assign_RR": np.zeros((ranks, ranks)), "copy_RR": np.zeros((ranks, ranks)), "node_RN": np.zeros((ranks, nodes))}
    for source, target in itertools.product(range(ranks), repeat=2):
        if source % group.expert_tp == target % group.expert_tp:
            result["assign_RR"][source, target] = tokens * one.rank_LX[0, target // group.expert_tp]
            result["copy_RR"][source, target] = tokens * rank[0, target // group.expert_tp]
            column = target // group.expert_tp // one.column_devices
            result["node_RN"][source, target * nodes // ranks] = tokens * by_node[0, column]
    return result


@pytest.mark.parametrize("routing", ["balanced", "zipf:1.0"])
@pytest.mark.parametrize("algorithm", ["normal", "low_latency", "direct"])
@pytest.mark.parametrize(
    ("group", "node"),
    [
        (Group(1, 8, 8, 1, 1), 4),
        (Group(1, 8, 4, 2, 2), 4),
        (Group(1, 8, 2, 4, 4), 4),
        (Group(2, 4, 8, 1, 2), 2),
        (Group(1, 8, 2, 4, 4), 2),
        (Group(1, 4, 4, 1, 2), 8),
        (Group(1, 4, 2, 2, 4), 4),
    ],
)
def test_ports_equal_those_of_the_rank_pair_matrices(group: Group, node: int, algorithm: str, routing: str) -> None:
    one = loads(group, node=node, routing=routing)
    expected = ports(algorithm, min(node, group.ranks), **matrices(one, 7.0, node))
    found = one.ports(algorithm, np.array([7.0, 14.0]))
    for name in ("up_out", "up_in", "out_out", "out_in", "local"):
        assert getattr(found, name).shape == (2, 1, group.ranks)
        np.testing.assert_allclose(getattr(found, name)[0, 0], getattr(expected, name), rtol=1e-9, atol=1e-9, err_msg=name)
        np.testing.assert_allclose(getattr(found, name)[1], 2 * getattr(found, name)[0])


def test_balanced_hits_equal_the_closed_form() -> None:
    one = loads(Group(1, 32, 32, 1, 8), node=8, experts=256, top_k=8)
    expected = balanced_counts(num_ranks=32, devices=8, num_experts=256, top_k=8)
    np.testing.assert_allclose(one.hits[0], expected["copy_RR"][:1], rtol=1e-9)
    np.testing.assert_allclose(one.hits[1], expected["node_RN"][:1], rtol=1e-9)


def test_skewed_hits_equal_enumeration_of_all_choices() -> None:
    one = loads(Group(1, 4, 4, 1, 2), node=2, routing="zipf:1.0", top_k=3)
    odds = one.slot_LS[0] / np.maximum(1 - one.slot_LS[0], 1e-3)
    sets = list(itertools.combinations(range(8), 3))
    weight = np.array([odds[list(chosen)].prod() for chosen in sets])
    for rank in range(4):
        hit = np.array([any(slot // 2 == rank for slot in chosen) for chosen in sets])
        assert one.hits[0][0, rank] == pytest.approx(weight[hit].sum() / weight.sum())
    for node in range(2):
        hit = np.array([any(slot // 4 == node for slot in chosen) for chosen in sets])
        assert one.hits[1][0, node] == pytest.approx(weight[hit].sum() / weight.sum())


@given(st.lists(st.floats(0.01, 10.0), min_size=8, max_size=8), st.integers(1, 500), st.sampled_from([(1, 8), (2, 4), (4, 3), (2, 6)]))
@settings(max_examples=60, deadline=None)
def test_tokens_are_conserved_and_near_their_expectation(weights: list[float], tokens: int, split: tuple[int, int]) -> None:
    ep, slots = split
    one = loads(Group(1, ep, ep, 1, slots), node=8, routing=np.tile(weights, (3, 1)))
    counts = one.slot_tokens(np.array([tokens]))
    assert counts.shape == (1, 3, ep, slots) and counts.min() >= 0
    assert (counts.sum(axis=(2, 3)) == 2 * tokens).all()
    assert np.abs(counts[0].reshape(3, -1) - tokens * one.slot_LS).max() <= 1.0 + 1e-6
    busiest = (counts > 0).sum(axis=3).max(axis=2)
    assert (one.surely_active_nL(np.array([tokens])) <= busiest).all()


def test_balanced_tokens_are_even() -> None:
    counts = loads(Group(1, 4, 4, 1, 2), node=8).slot_tokens(np.array([4, 5, 64]))
    assert (counts.max(axis=(2, 3)) - counts.min(axis=(2, 3)) <= 1).all()


def test_replication_lowers_the_load_of_the_busiest_rank() -> None:
    plain, more = (loads(Group(1, 4, 4, 1, slots), node=8, routing="zipf:1.0").imbalance_L[0] for slots in (2, 4))
    assert 1.0 <= more < plain
    unbalanced = loads(Group(1, 4, 4, 1, 2), node=8, routing="zipf:1.0", placement=linear_placement).imbalance_L[0]
    assert plain < unbalanced


def test_no_expert_is_chosen_more_than_once_by_a_token() -> None:
    assign = Workload(prompt_tokens=1, output_tokens=1, routing="zipf:3.0").assign_LE(tiny(experts=8, top_k=4))
    assert assign.max() == 1.0 and assign.sum() == pytest.approx(4.0) and (np.diff(assign[0]) <= 1e-12).all()


def test_bad_routing_and_placements_are_refused() -> None:
    group = Group(1, 4, 4, 1, 2)
    for routing, words in (("zipf:x", "zipf:S"), ("other", "zipf:S"), (np.ones((2, 8)), r"must be \[3, 8\]"), (-np.ones((3, 8)), ">= 0")):
        with pytest.raises(InputError, match=words):
            loads(group, node=4, routing=routing)
    with pytest.raises(InputError, match="expert 7 has no slot|has no slot"):
        loads(group, node=4, placement=lambda load, ranks, slots: np.zeros((1, 8), dtype=int))
    with pytest.raises(InputError, match="shape"):
        loads(group, node=4, placement=lambda load, ranks, slots: np.zeros((1, 5), dtype=int))
