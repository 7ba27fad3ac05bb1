"""What changes between two placements: which expert is copied from which slot to which.

Pure arithmetic on plans. A slot is addressed by its rank and its index on that rank, so that plans with different
numbers of slots can follow each other. Shapes: L layers (rows of the plan), R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.files import sha256_hex
from moesim.plan import Plan

MAX_OPS = 32
"""Most sends and receives that one rank has in flight; hundreds at once have hung other systems."""


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


def chunks(moves: Sequence[Move], max_ops: int = MAX_OPS) -> list[list[int]]:
    """Cut the moves between ranks into batches of indices in which no rank takes part in more than `max_ops`."""
    result: list[list[int]] = []
    load: dict[int, int] = {}
    for index, move in enumerate(moves):
        if move.source == move.target:
            continue
        if not result or max(load.get(move.source, 0), load.get(move.target, 0)) >= max_ops:
            result.append([])
            load = {}
        result[-1].append(index)
        for rank in (move.source, move.target):
            load[rank] = load.get(rank, 0) + 1
    return result


def pair_bytes(moves: Sequence[Move], expert_bytes: int, num_ranks: int) -> np.ndarray:
    """Return int64 [R, R]: bytes from every rank (row) to every rank; copies on a rank are on the diagonal."""
    result = np.zeros((num_ranks, num_ranks), np.int64)
    for move in moves:
        result[move.source, move.target] += expert_bytes
    return result
