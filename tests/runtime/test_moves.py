"""Moves turn one placement into another, batches stay small, and a move that is not needed does not happen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.plan import Plan, linear
from moesim.runtime.moves import MAX_OPS, chunks, local_tables, moves_between, pair_bytes, placement_sha256


def plan_of(experts: int, ranks: int, seed: int, extra: int = 0) -> Plan:
    """Any placement: uneven ranks, replicas, the same expert twice on a rank, empty slots."""
    generator = np.random.Generator(np.random.PCG64(seed))
    slots = experts + extra
    table = np.stack([generator.permutation(np.concatenate([np.arange(experts), generator.integers(-1, experts, extra)])) for _ in range(3)])
    slot_rank = np.sort(generator.integers(0, ranks, slots))
    return Plan(model="m", num_experts=experts, moe_layer_ids=(0, 1, 2), slot_to_expert_LS=table, slot_rank_S=slot_rank, num_ranks=ranks)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 6))
def test_executing_the_moves_gives_the_new_placement(experts: int, ranks: int, seed: int, extra: int, extra_new: int) -> None:
    old, new = plan_of(experts, ranks, seed, extra), plan_of(experts, ranks, seed + 1, extra_new)
    before, after = local_tables(old), local_tables(new)
    memory = [np.full((3, max(a.shape[1], b.shape[1])), -1) for a, b in zip(before, after, strict=True)]
    for rank, table in enumerate(before):
        memory[rank][:, : table.shape[1]] = table
    written = set()
    staged = []
    for move in moves_between(old, new):
        assert memory[move.source][move.layer, move.source_slot] == move.expert, "the source holds it"
        assert before[move.target].shape[1] <= move.target_slot or before[move.target][move.layer, move.target_slot] != move.expert, "no idle move"
        holders = [rank for rank, table in enumerate(before) if move.expert in table[move.layer]]
        assert move.source == move.target or move.target not in holders, "a copy on the rank comes first"
        assert (move.target, move.layer, move.target_slot) not in written
        written.add((move.target, move.layer, move.target_slot))
        staged.append((move, memory[move.source][move.layer, move.source_slot]))
    for move, expert in staged:
        memory[move.target][move.layer, move.target_slot] = expert
    for rank, table in enumerate(after):
        used = table >= 0
        assert (memory[rank][:, : table.shape[1]][used] == table[used]).all()


def test_the_same_placement_needs_no_moves() -> None:
    plan = plan_of(8, 4, 3, extra=4)
    assert moves_between(plan, plan) == []


@pytest.mark.parametrize(("experts", "ranks"), [(512, 2), (512, 4), (64, 8)])
def test_no_rank_takes_part_in_more_than_32_operations_of_a_batch(experts: int, ranks: int) -> None:
    old = linear(model="m", num_experts=experts, moe_layer_ids=(0,), num_ranks=ranks)
    new = linear(model="m", num_experts=experts, moe_layer_ids=(0,), num_ranks=ranks, kind="random", seed=1)
    moves = moves_between(old, new)
    batches = chunks(moves)
    assert sorted(index for batch in batches for index in batch) == [index for index, move in enumerate(moves) if move.source != move.target]
    for batch in batches:
        load = np.bincount([rank for index in batch for rank in (moves[index].source, moves[index].target)])
        assert load.max() <= MAX_OPS


def test_sources_of_replicas_share_the_sending() -> None:
    table = np.array([[0, 0, 0, -1, -1, -1]])
    old = Plan(model="m", num_experts=1, moe_layer_ids=(0,), slot_to_expert_LS=table, slot_rank_S=np.arange(6), num_ranks=6)
    new = Plan(model="m", num_experts=1, moe_layer_ids=(0,), slot_to_expert_LS=np.zeros((1, 6)), slot_rank_S=np.arange(6), num_ranks=6)
    assert sorted(move.source for move in moves_between(old, new)) == [0, 1, 2]


def test_pair_bytes_count_every_move_once() -> None:
    old, new = plan_of(10, 3, 0, 2), plan_of(10, 3, 1, 2)
    moves = moves_between(old, new)
    pairs = pair_bytes(moves, 7, 3)
    assert pairs.sum() == 7 * len(moves)
    assert np.trace(pairs) == 7 * sum(move.source == move.target for move in moves)


def test_shares_are_part_of_the_identity_of_a_placement() -> None:
    table = np.array([[0, 0, 1]])
    plain = Plan(model="m", num_experts=2, moe_layer_ids=(0,), slot_to_expert_LS=table, slot_rank_S=np.arange(3), num_ranks=3)
    shared = Plan(
        model="m", num_experts=2, moe_layer_ids=(0,), slot_to_expert_LS=table, slot_rank_S=np.arange(3), num_ranks=3, share_LS=np.array([[0.9, 0.1, 1.0]])
    )
    assert plain.map_sha256 == shared.map_sha256
    assert placement_sha256(plain) != placement_sha256(shared)
