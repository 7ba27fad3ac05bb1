"""EPLB matches the published example exactly and a loop-by-loop reading of its mechanism everywhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InfeasibleError
from moesim.solvers.eplb import EplbMaps, eplb_maps
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from tests.solvers.instances import lognormal, zipf

LOAD = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
MAP = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def loop_pack(load: list[np.float32], packs: int) -> list[list[int]]:
    """Pack one row, item by item; return the items of every pack in order."""
    if len(load) == packs:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    total = [np.float32(0)] * packs
    for item in sorted(range(len(load)), key=lambda one: -load[one]):
        pack = min((one for one in range(packs) if len(held[one]) < len(load) // packs), key=lambda one: total[one])
        held[pack].append(item)
        total[pack] = np.float32(total[pack] + load[item])
    return held


def loop_eplb(load_E: np.ndarray, slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """Return one layer's map, one decision at a time."""
    if groups % nodes:
        groups = nodes = 1
    load = [np.float32(one) for one in load_E]
    size = len(load) // groups
    sums = np.asarray(load_E, dtype=np.float32).reshape(groups, size).sum(axis=1)
    result = []
    for held in loop_pack(list(sums), nodes):
        experts = [group * size + one for group in held for one in range(size)]
        count = [1] * len(experts)
        copies = list(range(len(experts)))
        for _ in range(slots // nodes - len(experts)):
            most = max(range(len(experts)), key=lambda one: load[experts[one]] / np.float32(count[one]))
            count[most] += 1
            copies.append(most)
        replicas = [np.float32(load[experts[one]] / np.float32(count[one])) for one in copies]
        for pack in loop_pack(replicas, ranks // nodes):
            result += [experts[copies[replica]] for replica in pack]
    return result


def check_inverse(maps: EplbMaps) -> None:
    layers, slots = maps.physical_to_logical_LS.shape
    for layer in range(layers):
        for expert, row in enumerate(maps.logical_to_physical_LEX[layer]):
            listed = row[row >= 0]
            assert len(listed) == maps.expert_count_LE[layer, expert]
            assert (maps.physical_to_logical_LS[layer, listed] == expert).all()
    assert maps.expert_count_LE.sum() == layers * slots


def test_the_published_example_is_reproduced_slot_by_slot() -> None:
    maps = eplb_maps(LOAD, slots=16, groups=4, nodes=2, ranks=8)
    assert maps.physical_to_logical_LS.tolist() == MAP
    check_inverse(maps)


def test_the_balance_of_the_published_example_is_the_published_one() -> None:
    problem = PlacementProblem(load_KLE=LOAD.astype(float), num_ranks=8, slots_per_rank_R=np.array(2), ranks_per_node=4, num_groups=4)
    result = solve(problem, "eplb")
    assert result.slot_to_expert_LS.tolist() == MAP
    layers = [
        solve(PlacementProblem(load_KLE=row[None].astype(float), num_ranks=8, slots_per_rank_R=np.array(2), ranks_per_node=4, num_groups=4), "eplb").value
        for row in LOAD
    ]
    assert layers == pytest.approx([0.828, 0.805], abs=5e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([(12, 16, 4, 2, 8), (12, 16, 4, 3, 8), (8, 8, 1, 1, 4), (16, 24, 8, 4, 8), (16, 16, 4, 4, 4), (6, 12, 3, 1, 3)]),
    st.integers(0, 2**31),
    st.integers(1, 30),
)
def test_every_load_gives_what_the_loops_give(shape: tuple[int, int, int, int, int], seed: int, top: int) -> None:
    experts, slots, groups, nodes, ranks = shape
    load = np.random.Generator(np.random.PCG64(seed)).integers(0, top + 1, (3, experts))
    maps = eplb_maps(load, slots=slots, groups=groups, nodes=nodes, ranks=ranks)
    assert maps.physical_to_logical_LS.tolist() == [loop_eplb(row, slots, groups, nodes, ranks) for row in load]
    check_inverse(maps)


def test_groups_that_do_not_divide_by_the_nodes_use_the_global_form() -> None:
    load = lognormal(2, 24)
    auto = eplb_maps(load, slots=32, groups=3, nodes=2, ranks=8)
    everywhere = eplb_maps(load, slots=32, groups=3, nodes=2, ranks=8, policy="global")
    assert np.array_equal(auto.physical_to_logical_LS, everywhere.physical_to_logical_LS)


def test_the_hierarchical_form_keeps_a_group_on_one_node() -> None:
    maps = eplb_maps(lognormal(4, 64), slots=96, groups=8, nodes=4, ranks=16)
    node_of_slot = np.arange(96) // 24
    for row in maps.physical_to_logical_LS:
        for group in range(8):
            assert len(set(node_of_slot[row // 8 == group])) == 1


def test_zigzag_deals_in_snake_order() -> None:
    load = np.arange(8, 0, -1)[None]
    maps = eplb_maps(load, slots=8, groups=1, nodes=1, ranks=2, zigzag=True)
    assert maps.physical_to_logical_LS.tolist() == [[0, 3, 4, 7, 1, 2, 5, 6]]


def test_zigzag_loses_little_balance_at_deepseek_scale() -> None:
    problem = PlacementProblem(load_KLE=zipf(8, 256, 0.6), num_ranks=32, slots_per_rank_R=np.array(9))
    assert solve(problem, "eplb-zigzag").value > solve(problem, "eplb").value - 0.05


def test_unequal_slots_are_refused_with_the_rule() -> None:
    problem = PlacementProblem(load_KLE=np.ones((1, 4)), num_ranks=2, slots_per_rank_R=np.array([3, 2]))
    with pytest.raises(InfeasibleError, match=r"slots_per_rank.*equal on all ranks"):
        solve(problem, "eplb")
    with pytest.raises(InfeasibleError, match=r"slots = 9 must be a multiple of the 2 ranks"):
        eplb_maps(np.ones((1, 4)), slots=9, groups=1, nodes=1, ranks=2)
