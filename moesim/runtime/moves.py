"""What changes between two placements: which expert is copied from which slot to which.

Pure arithmetic on plans. A slot is addressed by its rank and its index on that rank, so that plans with different
numbers of slots can follow each other. Shapes: L layers (rows of the plan), R ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.files import sha256_hex
from moesim.plan import Plan

MAX_OPS = 32
"""Most sends and receives that one rank has in flight; hundreds at once have hung other systems."""
CHUNK_BYTES = 4 << 20
"""Most bytes of one send."""
JOINED_BYTES = 1 << 20
"""Most bytes of small rows that are put together: few enough to be still in the cache when they are sent."""
LARGE_BYTES = 1 << 18
"""Rows of this size are sent from where they are; smaller ones are put together first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One expert that a slot gets."""

    layer: int
    """Row of the plan."""
    expert: int
    source: int
    """Rank that holds the expert now."""
    source_slot: int
    """Index of the slot on `source`."""
    target: int
    """Rank that gets it; equal to `source` for a copy on the rank."""
    target_slot: int
    """Index of the slot on `target`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Part of the stream of bytes between two ranks."""

    peer: int
    """The other rank."""
    sends: bool
    """Whether this rank sends it."""
    number: int
    """Its place in the stream of the pair."""
    begin: int
    """Its first byte in the stream."""
    end: int
    """One past its last."""


def placement_sha256(plan: Plan) -> str:
    """Return the identity of what dispatch depends on: the map and the shares of replicas."""
    return plan.map_sha256 if plan.share_LS is None else sha256_hex(plan.map_sha256.encode() + plan.share_LS.tobytes())


def local_tables(plan: Plan) -> list[np.ndarray]:
    """Return per rank int32 [L, slots of the rank]."""
    return [plan.slot_to_expert_LS[:, plan.slot_rank_S == rank] for rank in range(plan.num_ranks)]


def moves_between(old: Plan, new: Plan) -> list[Move]:
    """Return the moves that turn `old` into `new`, layer by layer.

    A copy on the same rank is preferred; else the replica whose rank has sent the least so far, in this list.
    """
    before, after = local_tables(old), local_tables(new)
    sent = [0] * old.num_ranks
    result = []
    for layer in range(old.num_layers):
        holders: dict[int, list[tuple[int, int]]] = {}
        for rank, table in enumerate(before):
            for slot, expert in enumerate(table[layer].tolist()):
                holders.setdefault(expert, []).append((rank, slot))
        for rank, table in enumerate(after):
            held = before[rank][layer].tolist()
            for slot, expert in enumerate(table[layer].tolist()):
                if expert < 0 or (slot < len(held) and held[slot] == expert):
                    continue
                source, source_slot = min(holders[expert], key=lambda item: (item[0] != rank, sent[item[0]], item))
                sent[source] += source != rank
                result.append(Move(layer=layer, expert=expert, source=source, source_slot=source_slot, target=rank, target_slot=slot))
    return result


def cut(sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Cut a stream of rows of these sizes into pieces (begin, end): a large row by itself, small ones together."""
    result: list[tuple[int, int]] = []
    begin = end = 0
    for size in sizes:
        if end > begin and (size >= LARGE_BYTES or end + size - begin > JOINED_BYTES):
            result.append((begin, end))
            begin = end
        end += size
        while size >= LARGE_BYTES and begin < end:
            result.append((begin, min(end, begin + CHUNK_BYTES)))
            begin = result[-1][1]
    return [*result, (begin, end)] if end > begin else result


def in_turn(sent: Mapping[int, Sequence[tuple[int, int]]], received: Mapping[int, Sequence[tuple[int, int]]], *, rank: int, size: int) -> list[Chunk]:
    """Return all sends and receives of `rank`, in the order in which all ranks go through them.

    sent, received: pieces by the other rank. Both ends of a chunk have it at the same place, its number and the distance between the ranks, so that
    waiting for the oldest of those under way never ends in a circle.
    """
    ordered = [
        (number, (other - rank if sends else rank - other) % size, Chunk(peer=other, sends=sends, number=number, begin=begin, end=end))
        for sends, streams in ((True, sent), (False, received))
        for other, pieces in streams.items()
        for number, (begin, end) in enumerate(pieces)
    ]
    return [chunk for _, _, chunk in sorted(ordered, key=lambda item: item[:2])]


def chains(moves: Iterable[Move]) -> list[list[Move]]:
    """Order the moves to one rank so that a chain of them needs one staging buffer: for the expert of its first.

    Exchanged with the buffer in turn, every slot leaves in it what the next one gets. What only changes its slot on the rank is copied
    to a buffer if its place keeps it, if another slot gets it too, or to open a circle.
    """
    by_target = {(move.layer, move.target_slot): move for move in moves}
    follower: dict[tuple[int, int], tuple[int, int]] = {}
    for key, move in by_target.items():
        place = move.layer, move.source_slot
        if move.source == move.target and place in by_target:
            follower.setdefault(place, key)
    opened = set(follower.values())
    seen: set[tuple[int, int]] = set()
    result: list[list[Move]] = []
    for first in [*(place for place in by_target if place not in opened), *by_target]:
        chain: list[Move] = []
        at: tuple[int, int] | None = first
        while at is not None and at not in seen:
            seen.add(at)
            chain.append(by_target[at])
            at = follower.get(at)
        result += [chain] if chain else []
    return result


def staging_bytes_R(pairs_RR: np.ndarray) -> np.ndarray:
    """Return int64 [R]: most bytes that every rank needs beside its live weights, if `pairs_RR` are the bytes between ranks.

    What arrives, copies of what changes its slot on the rank (see `chains`: often fewer), and chunks to send.
    """
    away = pairs_RR - np.diag(np.diag(pairs_RR))
    return np.asarray(pairs_RR.sum(0) + np.minimum(away.sum(1), MAX_OPS * CHUNK_BYTES))


def pair_bytes(moves: Sequence[Move], expert_bytes: int, num_ranks: int) -> np.ndarray:
    """Return int64 [R, R]: bytes from every rank (row) to every rank; copies on a rank are on the diagonal."""
    result = np.zeros((num_ranks, num_ranks), np.int64)
    for move in moves:
        result[move.source, move.target] += expert_bytes
    return result
