"""Tables and array kernels behind `loads`: which slot serves a token, and how many distinct places a token goes to.

A slot belongs to one rank, a rank to one node; both are *destinations*, numbered 0..R-1 (ranks) and R..R+N-1 (nodes). A word of
64 bits holds 64 destinations: destination d is bit d // 8 of byte lane d % 8, so OR over a token's K choices makes the set of places,
and one shift-and-mask per eight destinations turns words into byte lanes whose sums over at most 255 tokens are counts.
Shapes: L layers, E experts, S slots, C replica classes, W words, B tokens of a block, Q segments, X groups (pass, source rank), D destinations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moesim.plan import Plan

PHASES = 64
"""Replica shares are honoured in units of 1 / PHASES."""
SEGMENT = 255
"""Tokens that a byte lane can count without overflow."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2^64 / golden ratio: multiplying modulo 2^64 keeps the fraction exact."""
_LANES = np.uint64(0x0101010101010101)


def phases_T(index_T: np.ndarray) -> np.ndarray:
    """Return int64 [T]: floor(64 frac((t + 1) golden)) of every index t, in exact integer arithmetic."""
    return (((index_T.astype(np.uint64) + np.uint64(1)) * _GOLDEN) >> np.uint64(58)).astype(np.int64)


def slot_of_LEP(plan: Plan) -> np.ndarray:
    """Return int64 [L, E, PHASES]: the slot that serves each expert at each phase, by inverse CDF of the shares at (phase + 0.5) / PHASES.

    An expert that its layer does not have is served by slot S, which is none.
    """
    layer, slot = np.nonzero(plan.slot_to_expert_LS >= 0)
    expert = plan.slot_to_expert_LS[layer, slot].astype(np.int64)
    order = np.argsort(layer * plan.num_experts + expert, kind="stable")
    key, slot, share = (layer * plan.num_experts + expert)[order], slot[order], plan.shares_LS()[layer, slot][order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    replicas = np.diff(first, append=key.size)
    upto = np.cumsum(share)
    within = upto - np.repeat(upto[first] - share[first], replicas)
    total = np.repeat(within[first + replicas - 1], replicas)
    # Points (p + 0.5) / PHASES below the CDF; the slack settles ties that rounding of the sum would decide.
    below = np.ceil(PHASES * within / total - 0.5 - 1e-9).astype(np.int64)
    width = np.diff(below, prepend=0)
    width[first] = below[first]
    result = np.full((plan.num_layers * plan.num_experts, PHASES), plan.num_slots, dtype=np.int64)
    result[key[first]] = np.repeat(slot, width).reshape(-1, PHASES)
    return result.reshape(plan.num_layers, plan.num_experts, PHASES)


def replica_classes(slot_LEP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge phases that no layer tells apart; return class_P int64 [PHASES] and the first phase of every class."""
    changes = np.any(slot_LEP[:, :, 1:] != slot_LEP[:, :, :-1], axis=(0, 1))
    class_P = np.concatenate([[0], np.cumsum(changes)])
    return class_P, np.flatnonzero(np.diff(class_P, prepend=-1))


def destination_words_WS(plan: Plan, ranks_per_node: int, num_nodes: int) -> np.ndarray:
    """Return uint64 [W, S + 1]: the bits of every slot's rank and node (no node bits if num_nodes is 0); the last column, of no slot, is 0."""
    rank_S = plan.slot_rank_S.astype(np.int64)
    words = -(-(plan.num_ranks + num_nodes) // 64)
    result = np.zeros((words, plan.num_slots + 1), dtype=np.uint64)
    places = [rank_S] + ([plan.num_ranks + rank_S // ranks_per_node] if num_nodes else [])
    for place_S in places:
        bit_S = (place_S % 8) * 8 + (place_S % 64) // 8
        result[place_S // 64, np.arange(plan.num_slots)] |= np.uint64(1) << bit_S.astype(np.uint64)
    return result


def segment_starts(group_start_X: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut groups of tokens into segments of at most SEGMENT; return the segments' first tokens and every group's first segment."""
    length = np.diff(group_start_X, append=size)
    pieces = -(-length // SEGMENT)
    first = np.cumsum(pieces) - pieces
    starts = np.repeat(group_start_X, pieces) + SEGMENT * (np.arange(int(pieces.sum())) - np.repeat(first, pieces))
    return starts, first


def count_destinations(words_WLB: np.ndarray, num_destinations: int, segment_Q: np.ndarray, first_X: np.ndarray) -> np.ndarray:
    """Return [L, X, D]: how many tokens of each group carry each destination's bit."""
    lane_LQHW = np.empty((words_WLB.shape[1], segment_Q.size, -(-num_destinations // 8)), np.uint64)
    scratch_LB = np.empty(words_WLB.shape[1:], np.uint64)
    for part in range(lane_LQHW.shape[2]):
        words_LB = words_WLB[part // 8]
        if part % 8:
            words_LB = np.right_shift(words_LB, np.uint64(part % 8), out=scratch_LB)
        np.bitwise_and(words_LB, _LANES, out=scratch_LB)
        np.add.reduceat(scratch_LB, segment_Q, axis=1, out=lane_LQHW[..., part])
    lane_LQD = lane_LQHW.astype("<u8", copy=False).view(np.uint8)[..., :num_destinations]
    return lane_LQD if first_X.size == segment_Q.size else np.add.reduceat(lane_LQD, first_X, axis=1, dtype=np.int32)


def transposed_lines(experts_BLK: np.ndarray) -> np.ndarray:
    """Return the block layer by layer, [L, U, B, J] with K = U J: one copy in the widest machine words that hold whole choices of a layer."""
    size, layers, choices = experts_BLK.shape
    item = experts_BLK.dtype.itemsize
    unit = next(width for width in (8, 4, 2, 1) if choices * item % width == 0)
    source = np.ascontiguousarray(experts_BLK).reshape(size, -1).view(f"u{unit}")
    result = np.empty(source.shape[::-1], source.dtype)
    for low in range(0, size, 256):
        np.copyto(result[:, low : low + 256], source[low : low + 256].T)
    return result.view(experts_BLK.dtype).reshape(layers, choices * item // unit, size, unit // item)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Runs of equal keys among the tokens of a block."""

    id_X: np.ndarray
    """int64 [X]: key of every run."""
    start_X: np.ndarray
    """int64 [X]: first token of every run."""
    local_B: np.ndarray
    """int64 [B]: run of every token."""
    offsets: dict[tuple[tuple[int, ...], int, int], np.ndarray] = field(default_factory=dict)
    """Offsets that `histogram` has made for values of one shape."""

    @classmethod
    def of(cls, key_B: np.ndarray) -> Groups:
        """Find the runs of `key_B`, ascending and >= 0."""
        start_X = np.flatnonzero(np.diff(key_B, prepend=-1))
        return cls(id_X=key_B[start_X], start_X=start_X, local_B=np.repeat(np.arange(start_X.size), np.diff(start_X, append=key_B.size)))

    def histogram(self, value_KLB: np.ndarray, bins: int, *, stride: int = 0) -> np.ndarray:
        """Return int64 [L, X, bins]: counts of the values of every layer and run; layer l's values start at l stride. Overwrites `value_KLB`."""
        layers, runs = value_KLB.shape[1], self.start_X.size
        if layers * runs > 1:
            key = (value_KLB.shape, bins, stride)
            if key not in self.offsets:
                # Whole, because adding a broadcast array costs twice as much; few kinds occur per block.
                offset_LB = (np.arange(layers) * (runs * bins - stride))[:, None] + self.local_B * bins
                self.offsets[key] = np.ascontiguousarray(np.broadcast_to(offset_LB, value_KLB.shape))
            value_KLB += self.offsets[key]
        return np.bincount(value_KLB.ravel(), minlength=layers * runs * bins).reshape(layers, runs, bins)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folding:
    """Adds counts of fine bins up to counts of slots and of ranks: lists of source bins, padded with a bin that is always empty."""

    bins: int
    """I + 1: the fine bins and the empty one."""
    slot_LJS: np.ndarray
    """int64 [L or 1, J, S]: the bins that belong to every slot."""
    rank_LJR: np.ndarray
    """int64 [L or 1, J, R]: the bins that belong to every rank."""

    @classmethod
    def of(cls, slot_LI: np.ndarray, rank_S: np.ndarray, num_slots: int) -> Folding:
        """Build from the slot of every fine bin (`num_slots`: none) and the rank of every slot (with R for none)."""
        return cls(bins=slot_LI.shape[1] + 1, slot_LJS=_members(slot_LI, num_slots), rank_LJR=_members(rank_S[slot_LI], int(rank_S[-1])))

    def layers(self, low: int, high: int) -> Folding:
        """Return the part for layers low..high-1."""
        return Folding(bins=self.bins, slot_LJS=self.slot_LJS[low:high], rank_LJR=self.rank_LJR[low:high])

    def slots(self, count_LXI: np.ndarray) -> np.ndarray:
        """Return [L, X, S]."""
        return _gather_sum(count_LXI, self.slot_LJS)

    def ranks(self, count_LXI: np.ndarray) -> np.ndarray:
        """Return [L, X, R]."""
        return _gather_sum(count_LXI, self.rank_LJR)


def _members(key_LI: np.ndarray, num_keys: int) -> np.ndarray:
    """Return int64 [L, J, num_keys]: the positions i with key_LI[l, i] equal to each key, I where there are fewer than J."""
    layers, width = key_LI.shape
    layer, place = np.nonzero(key_LI < num_keys)
    flat = layer * num_keys + key_LI[layer, place]
    order = np.argsort(flat, kind="stable")
    flat, place = flat[order], place[order]
    count = np.bincount(flat, minlength=layers * num_keys)
    turn = np.arange(flat.size) - np.repeat(np.cumsum(count) - count, count)
    result = np.full((layers, int(count.max()), num_keys), width, np.int64)
    result[flat // num_keys, turn, flat % num_keys] = place
    return result


def _gather_sum(count_LXI: np.ndarray, member_LJD: np.ndarray) -> np.ndarray:
    layers, runs, bins = count_LXI.shape
    _, turns, places = member_LJD.shape
    if layers == 1:
        part = count_LXI[0].take(member_LJD[0].ravel(), axis=1)[None]
    else:
        part = count_LXI.ravel().take((np.arange(layers * runs) * bins).reshape(layers, runs, 1) + member_LJD.reshape(-1, 1, turns * places))
    return part if turns == 1 else part.reshape(layers, runs, turns, places).sum(axis=2)


def add_groups(total_PLRD: np.ndarray, group_X: np.ndarray, value_LXD: np.ndarray) -> None:
    """Add [L, X, D] to the rows of the groups (pass, rank) whose ids are pass R + rank."""
    ranks = total_PLRD.shape[2]
    if group_X.size % ranks == 0 and group_X[0] % ranks == 0 and group_X[-1] - group_X[0] == group_X.size - 1:
        low, passes = int(group_X[0]) // ranks, group_X.size // ranks
        total_PLRD[low : low + passes] += value_LXD.reshape(value_LXD.shape[0], passes, ranks, -1).transpose(1, 0, 2, 3)
    else:
        total_PLRD[group_X // ranks, :, group_X % ranks] += value_LXD.transpose(1, 0, 2)


def blocks(counts_X: np.ndarray, block_tokens: int) -> Iterator[tuple[int, int]]:
    """Cut groups of `counts_X` tokens (> 0) into blocks of about `block_tokens`: large groups evenly and alone, small ones together."""
    low = high = 0
    for count in counts_X.tolist():
        if high > low and (high - low + count > block_tokens or 2 * count >= block_tokens):
            yield low, high
            low = high
        high += count
        if 2 * count >= block_tokens:
            pieces = -(-2 * count // (3 * block_tokens))  # up to half as large again, rather than a small rest
            cuts = [low + count * piece // pieces for piece in range(pieces + 1)]
            yield from zip(cuts, cuts[1:], strict=False)
            low = high
    if high > low:
        yield low, high
