"""Moves turn one placement into another, batches stay small, and a move that is not needed does not happen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.plan import Plan, linear
from moesim.runtime.moves import CHUNK_BYTES, MAX_OPS, local_tables, moves_between, pair_bytes, placement_sha256, rounds, staging_bytes_R


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


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10**6), st.sampled_from([4, 8, MAX_OPS]))
def test_rounds_carry_every_byte_once_with_few_operations_and_without_waiting_in_a_circle(ranks: int, seed: int, max_ops: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    pairs = generator.integers(0, 50, (ranks, ranks)) * generator.integers(0, 2, (ranks, ranks))
    np.fill_diagonal(pairs, 0)
    todo = [rounds(pairs[rank].tolist(), pairs[:, rank].tolist(), rank, chunk=16, max_ops=max_ops) for rank in range(ranks)]
    carried = np.zeros((ranks, ranks), int)
    for rank, batches in enumerate(todo):
        assert all(len(one) + len(next_one) <= max_ops for one, next_one in pairwise([*batches, []]))
        for chunk in (chunk for batch in batches for chunk in batch if chunk.sends):
            assert chunk.begin % 16 == 0 and 0 < chunk.end - chunk.begin <= 16
            carried[rank, chunk.peer] += chunk.end - chunk.begin
    assert (carried == pairs).all()
    posted: set[tuple[int, int, int]] = set()
    place = [0] * ranks  # every rank posts a round, and goes on when both ends of all its operations are posted
    for _ in range(2 * max(map(len, todo)) * ranks + 1):
        for rank in range(ranks):
            if place[rank] < len(todo[rank]):
                posted |= {(rank, chunk.peer, chunk.begin if chunk.sends else -1 - chunk.begin) for chunk in todo[rank][place[rank]]}
        for rank in range(ranks):
            if place[rank] < len(todo[rank]) and all(
                (chunk.peer, rank, -1 - chunk.begin if chunk.sends else chunk.begin) in posted for chunk in todo[rank][place[rank]]
            ):
                place[rank] += 1
    assert place == [len(batches) for batches in todo]


def test_512_experts_go_in_chunks_of_bounded_size() -> None:
    old = linear(model="m", num_experts=512, moe_layer_ids=(0,), num_ranks=4)
    new = linear(model="m", num_experts=512, moe_layer_ids=(0,), num_ranks=4, kind="random", seed=1)
    pairs = pair_bytes(moves_between(old, new), 100_000, 4)
    for rank in range(4):
        batches = rounds(pairs[rank].tolist(), pairs[:, rank].tolist(), rank)
        assert max(len(batch) for batch in batches) <= MAX_OPS // 2
        assert max(chunk.end - chunk.begin for batch in batches for chunk in batch) <= CHUNK_BYTES
        assert staging_bytes_R(pairs)[rank] <= pairs[:, rank].sum() + MAX_OPS // 2 * CHUNK_BYTES


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
