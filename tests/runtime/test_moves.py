"""Moves turn one placement into another, batches stay small, and a move that is not needed does not happen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.plan import Plan, linear
from moesim.runtime.moves import (
    CHUNK_BYTES,
    JOINED_BYTES,
    LARGE_BYTES,
    MAX_OPS,
    chains,
    cut,
    in_turn,
    local_tables,
    moves_between,
    pair_bytes,
    placement_sha256,
    staging_bytes_R,
)


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


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 6))
def test_exchanges_along_chains_give_the_new_placement_and_backwards_the_old_one(experts: int, ranks: int, seed: int, extra: int, extra_new: int) -> None:
    old, new = plan_of(experts, ranks, seed, extra), plan_of(experts, ranks, seed + 1, extra_new)
    for rank, (before, after) in enumerate(zip(local_tables(old), local_tables(new), strict=True)):
        moves = [move for move in moves_between(old, new) if move.target == rank]
        memory = np.full((3, max(before.shape[1], after.shape[1])), -1)
        memory[:, : before.shape[1]] = before
        start, found = memory.copy(), chains(moves)
        assert sorted((move.layer, move.target_slot) for chain in found for move in chain) == sorted((move.layer, move.target_slot) for move in moves)
        exchanges = [(move.layer, move.target_slot, number) for number, chain in enumerate(found) for move in chain]
        buffers = [chain[0].expert for chain in found]
        for layer, slot, number in exchanges:
            memory[layer, slot], buffers[number] = buffers[number], memory[layer, slot]
        used = after >= 0
        assert (memory[:, : after.shape[1]][used] == after[used]).all()
        for layer, slot, number in reversed(exchanges):
            memory[layer, slot], buffers[number] = buffers[number], memory[layer, slot]
        assert (memory == start).all() and buffers == [chain[0].expert for chain in found]
        assert all(move.source == rank for chain in found for move in chain[1:])


def test_only_what_arrives_a_circle_and_a_second_copy_need_a_buffer() -> None:
    old = Plan(model="m", num_experts=6, moe_layer_ids=(0,), slot_to_expert_LS=np.array([[0, 1, 2, 3, 4, 5]]), slot_rank_S=np.array([0] * 5 + [1]), num_ranks=2)
    new = replace(old, slot_to_expert_LS=np.array([[5, 0, 3, 2, 1, 4]]))  # 5 arrives, 0 and 1 shift, 2 and 3 change places
    found = chains(move for move in moves_between(old, new) if move.target == 0)
    assert [[move.expert for move in chain] for chain in found] == [[5, 0, 1], [3, 2]]
    filled = Plan(model="m", num_experts=2, moe_layer_ids=(0,), slot_to_expert_LS=np.array([[0, 1, 1, 1]]), slot_rank_S=np.zeros(4), num_ranks=1)
    again = replace(filled, slot_to_expert_LS=np.array([[1, 0, 0, 1]]))  # 0 goes to two slots and leaves its own
    assert [[move.target_slot for move in chain] for chain in chains(moves_between(filled, again))] == [[2], [0, 1]]


def test_the_same_placement_needs_no_moves() -> None:
    plan = plan_of(8, 4, 3, extra=4)
    assert moves_between(plan, plan) == []


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(0, 10**6), st.sampled_from([2, 4, MAX_OPS]))
def test_chunks_in_turn_never_end_in_a_circle(ranks: int, seed: int, window: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    counts = generator.integers(0, 6, (ranks, ranks)) * generator.integers(0, 2, (ranks, ranks))
    np.fill_diagonal(counts, 0)
    pieces = [[[(n, n + 1) for n in range(count)] for count in row] for row in counts.tolist()]
    todo = [in_turn(dict(enumerate(pieces[rank])), {other: pieces[other][rank] for other in range(ranks)}, rank=rank, size=ranks) for rank in range(ranks)]
    done = [0] * ranks
    for _ in range(int(counts.sum()) + 1):  # every rank has `window` chunks under way and waits for the oldest
        posted = {
            (rank, chunk.peer, chunk.number) if chunk.sends else (chunk.peer, rank, chunk.number, "awaited")
            for rank in range(ranks)
            for chunk in todo[rank][: done[rank] + window]
        }
        for rank in range(ranks):
            while done[rank] < len(todo[rank]):
                chunk = todo[rank][done[rank]]
                other_end = (rank, chunk.peer, chunk.number, "awaited") if chunk.sends else (chunk.peer, rank, chunk.number)
                if other_end not in posted:
                    break
                done[rank] += 1
    assert done == [len(chunks) for chunks in todo] and sum(done) == 2 * counts.sum()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 3 * CHUNK_BYTES) | st.integers(1, 5000), max_size=60))
def test_cuts_cover_a_stream_in_bounded_pieces_that_hold_one_large_row_or_small_ones(sizes: list[int]) -> None:
    pieces = cut(sizes)
    assert [begin for begin, _ in pieces] == [0, *(end for _, end in pieces[:-1])][: len(pieces)]
    assert (pieces[-1][1] if pieces else 0) == sum(sizes)
    assert all(0 < end - begin <= CHUNK_BYTES for begin, end in pieces)
    assert all(end - begin <= JOINED_BYTES for begin, end in pieces) or max(sizes) >= LARGE_BYTES
    offset = 0
    for size in sizes:
        if size >= LARGE_BYTES:
            assert any(begin == offset for begin, _ in pieces) and any(end == offset + size for _, end in pieces)
        offset += size


def test_staging_is_what_arrives_and_a_bounded_number_of_chunks() -> None:
    old = linear(model="m", num_experts=512, moe_layer_ids=(0,), num_ranks=4)
    new = linear(model="m", num_experts=512, moe_layer_ids=(0,), num_ranks=4, kind="random", seed=1)
    pairs = pair_bytes(moves_between(old, new), 10_000_000, 4)
    assert (staging_bytes_R(pairs) == pairs.sum(0) + MAX_OPS * CHUNK_BYTES).all()


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
