"""What changes between two placements: which expert is copied from which slot to which.

Pure arithmetic on plans. A slot is addressed by its rank and its index on that rank, so that plans with different
numbers of slots can follow each other. Shapes: L layers (rows of the plan), R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.files import sha256_hex
from moesim.plan import Plan

MAX_OPS = 32
"""Most sends and receives that one rank has in flight; hundreds at once have hung other systems."""
CHUNK_BYTES = 1 << 20
"""Most bytes of one send; what is under way between two ranks stays in the caches."""


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
    begin: int
    """Its first byte in the stream of the pair."""
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


def rounds(sent_R: Sequence[int], received_R: Sequence[int], rank: int, *, chunk: int = CHUNK_BYTES, max_ops: int = MAX_OPS) -> list[list[Chunk]]:
    """Cut what `rank` sends to and receives from every rank into rounds, of which two may be under way at a time.

    sent_R, received_R: bytes. Every rank goes through the pairs in the same order, a few distances between ranks at a time, and both ends of a chunk
    meet it in the same round, so that waiting for one round after another never ends in a circle.
    """
    result: list[list[Chunk]] = []
    size, width = len(sent_R), max(max_ops // 4, 1)  # a send and a receive per distance, twice
    for first in range(1, size, width):
        streams = [
            Chunk(peer=peer, sends=sends, begin=0, end=int(total[peer]))
            for distance in range(first, min(first + width, size))
            for sends, total, peer in ((True, sent_R, (rank + distance) % size), (False, received_R, (rank - distance) % size))
        ]
        for begin in range(0, max(stream.end for stream in streams), chunk):
            result.append([replace(stream, begin=begin, end=min(begin + chunk, stream.end)) for stream in streams if begin < stream.end])
    return result


def staging_bytes_R(pairs_RR: np.ndarray) -> np.ndarray:
    """Return int64 [R]: bytes that every rank needs beside its live weights, if `pairs_RR` are the bytes between ranks: what arrives, and chunks to send."""
    away = pairs_RR - np.diag(np.diag(pairs_RR))
    return np.asarray(pairs_RR.sum(0) + np.minimum(away.sum(1), MAX_OPS // 2 * CHUNK_BYTES))


def pair_bytes(moves: Sequence[Move], expert_bytes: int, num_ranks: int) -> np.ndarray:
    """Return int64 [R, R]: bytes from every rank (row) to every rank; copies on a rank are on the diagonal."""
    result = np.zeros((num_ranks, num_ranks), np.int64)
    for move in moves:
        result[move.source, move.target] += expert_bytes
    return result
