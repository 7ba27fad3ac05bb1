"""Compile routing into loads: who sends how many tokens to whom in every layer of a forward pass, under a plan.

Input is one expert choice per (token, layer, k); output is per layer and rank pair: assignments, copies after deduplication per
destination rank, copies per destination node, and assignments per slot. Counts only, no times, no bytes.
An expert with several slots is served by the slot at the token's phase (see `_masks`): point t·R + rank of a golden-ratio sequence for token t of
a source rank, as the runtime spreads them; the share of a slot is met within 1/64 (plus 1 / tokens for short sequences).
Shapes: P passes, L MoE layers, R ranks, S slots, N nodes, T tokens, K choices; source axis before destination axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import TraceError, describe
from moesim.plan import Plan
from moesim.sim import _masks
from moesim.sim.pairs import ChosenRanks, PairCounts, Pairs

BLOCK_ENTRIES = 32768
"""(token, expert) entries of a layer handled at a time: bounds the working memory and keeps it in cache."""
CHUNK_ENTRIES = 16384
"""(token, layer, expert) entries per array operation; layers are joined up to it when tokens are few."""
COUNT_WORDS = 32768
"""(token, layer) pairs whose destinations are counted at a time."""
FEW_CLASSES = 8
"""Up to so many replica classes, destinations are looked up by expert; beyond, by slot."""
TABLE_ITEMS = 1 << 22
"""Most items of the tables that look up by expert."""
SPARSE = 4
"""Choices are kept, and pairs not counted, where a pass and layer has so many times fewer choices than rank pairs."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLoads:
    """Loads of P forward passes between ranks, per MoE layer."""

    tokens_PR: np.ndarray
    """int64 [P, R]: tokens whose home is each source rank."""
    routed_PLR: np.ndarray
    """int64 [P, L, R]: valid (token, expert) choices made on each source rank."""
    slot_PLS: np.ndarray
    """int64 [P, L, S]: (token, expert) assignments that every slot receives."""
    pairs: Pairs
    """Who sends to whom."""
    slot_rank_S: np.ndarray
    """int32 [S]: rank that owns every slot."""

    @property
    def num_passes(self) -> int:
        """P."""
        return int(self.tokens_PR.shape[0])

    @property
    def rank_load_PLR(self) -> np.ndarray:
        """int64 [P, L, R]: assignments that each destination rank computes."""
        return _by_rank(self.slot_PLS, self.slot_rank_S, self.tokens_PR.shape[1])

    @property
    def active_PLR(self) -> np.ndarray:
        """int64 [P, L, R]: slots of each rank with at least one assignment (activated experts)."""
        return _by_rank((self.slot_PLS > 0).astype(np.int64), self.slot_rank_S, self.tokens_PR.shape[1])

    @property
    def max_slot_PLR(self) -> np.ndarray:
        """int64 [P, L, R]: assignments of the busiest slot of each rank."""
        starts, ranks = _rank_starts(self.slot_rank_S)
        result = np.zeros((*self.slot_PLS.shape[:2], self.tokens_PR.shape[1]), dtype=np.int64)
        result[..., ranks] = np.maximum.reduceat(self.slot_PLS, starts, axis=2)
        return result

    def one(self, index: int) -> StepLoads:
        """Return the loads of pass `index` alone (P = 1), without copying."""
        row = slice(index, index + 1 or None)
        return StepLoads(
            tokens_PR=self.tokens_PR[row],
            routed_PLR=self.routed_PLR[row],
            slot_PLS=self.slot_PLS[row],
            pairs=self.pairs.one(index),
            slot_rank_S=self.slot_rank_S,
        )


class LoadCompiler:
    """Turns routing into loads under one plan; build it once and call it for every pass."""

    def __init__(self, plan: Plan, *, ranks_per_node: int) -> None:
        """Precompute the tables of `plan`; ranks 0..ranks_per_node-1 share the first node, and so on (>= 1)."""
        if ranks_per_node < 1:
            raise TraceError(describe("routing", "ranks_per_node", ranks_per_node, "must be >= 1"))
        self.plan, self.ranks_per_node = plan, ranks_per_node
        self.num_nodes = -(-plan.num_ranks // ranks_per_node)
        slot_LEP = _masks.slot_of_LEP(plan)
        self._class_P, phase_C = _masks.replica_classes(slot_LEP)
        layers, slots, self._width = plan.num_layers, plan.num_slots, plan.num_experts + 1
        # Expert index E stands for "no choice"; it maps to slot S, which has no destination.
        table = np.full((layers, phase_C.size, self._width), slots, dtype=np.int64)
        table[..., :-1] = slot_LEP[:, :, phase_C].transpose(0, 2, 1)
        self._slot_LCE = table
        self._node_bits = self.num_nodes if 1 < self.num_nodes < plan.num_ranks else 0
        self._word_WS = _masks.destination_words_WS(plan, ranks_per_node, self._node_bits)
        self._rank_S = np.append(plan.slot_rank_S.astype(np.int64), plan.num_ranks)
        self._by_slot = _masks.Folding.of(np.append(np.arange(slots), slots)[None], self._rank_S, slots)
        most_slots = int(np.bincount(plan.slot_rank_S).max())
        items = layers * phase_C.size * (self._width * self._word_WS.shape[0] + most_slots * plan.num_ranks)
        self._by_expert: tuple[_masks.Folding, np.ndarray] | None = None
        if phase_C.size <= FEW_CLASSES and items <= TABLE_ITEMS:
            slot_LI = table.reshape(layers, -1)
            self._by_expert = _masks.Folding.of(slot_LI, self._rank_S, slots), self._word_WS[:, slot_LI]

    def compile(
        self,
        *,
        experts_TLK: np.ndarray,
        rank_T: np.ndarray,
        valid_TLK: np.ndarray | None = None,
        pass_start_P: np.ndarray | None = None,
        block_entries: int = BLOCK_ENTRIES,
    ) -> StepLoads:
        """Compile passes that lie one after another in `experts_TLK`.

        experts_TLK: uint8 or uint16 [T, L, K], logical experts, rows = MoE layers of the plan. rank_T: integers [T] in 0..R-1, ascending within a
        pass. valid_TLK: bool or None (all valid). pass_start_P: first token of every pass, ascending from 0 (None: one pass); passes may be empty.
        Raises TraceError if a shape, an order or a valid expert index breaks these rules.
        """
        starts = np.zeros(1, dtype=np.int64) if pass_start_P is None else np.asarray(pass_start_P, dtype=np.int64)
        self._check(experts_TLK, np.asarray(rank_T), valid_TLK, starts)
        rank_T = np.asarray(rank_T, dtype=np.int64)
        plan, tokens = self.plan, int(rank_T.size)
        passes, ranks, slots, layers = starts.size, plan.num_ranks, plan.num_slots, plan.num_layers
        group_T = np.repeat(np.arange(passes) * ranks, np.diff(starts, append=tokens)) + rank_T
        falls = np.diff(group_T) < 0
        if bool(falls.any()):
            shown = f"a fall at token {int(falls.argmax()) + 1}"
            raise TraceError(describe("routing", "rank_T", shown, "must be ascending within a pass", "sort tokens by source rank"))
        counts_X = np.bincount(group_T, minlength=passes * ranks)
        class_T = None
        if self._slot_LCE.shape[1] > 1:
            index_T = (np.arange(tokens) - np.repeat(np.cumsum(counts_X) - counts_X, counts_X)) * ranks + rank_T
            class_T = self._class_P[_masks.phases_T(index_T)] * self._width
        slot_PLS = np.zeros((passes, layers, slots), np.int64)
        if SPARSE * max(experts_TLK[:, 0].size, 1) < passes * ranks**2:
            pairs: Pairs = self._choices(experts_TLK, valid_TLK, group_T, class_T, slot_PLS)
            chosen_LT = np.full((layers, tokens), experts_TLK.shape[2]) if valid_TLK is None else valid_TLK.sum(axis=2).T
            routed_PLR = np.stack([np.bincount(group_T, chosen_T, minlength=passes * ranks) for chosen_T in chosen_LT], axis=1)
            routed_PLR = routed_PLR.astype(np.int64).reshape(passes, ranks, layers).transpose(0, 2, 1)
        else:
            pairs = counts = PairCounts(
                assign_PLRR=np.zeros((passes, layers, ranks, ranks), np.int32),
                copy_PLRR=np.zeros((passes, layers, ranks, ranks), np.int32),
                node_PLRN=np.zeros((passes, layers, ranks, self.num_nodes), np.int32),
                devices=self.ranks_per_node,
            )
            for low, high in _masks.blocks(counts_X[counts_X > 0], max(1, block_entries // experts_TLK.shape[2])):
                valid = None if valid_TLK is None else valid_TLK[low:high]
                self._block(experts_TLK[low:high], valid, group_T[low:high], None if class_T is None else class_T[low:high], slot_PLS, counts)
            routed_PLR = np.sum(counts.assign_PLRR, axis=3, dtype=np.int64)
        return StepLoads(tokens_PR=counts_X.reshape(passes, ranks), routed_PLR=routed_PLR, slot_PLS=slot_PLS, pairs=pairs, slot_rank_S=plan.slot_rank_S)

    def _choices(
        self, experts_TLK: np.ndarray, valid_TLK: np.ndarray | None, group_T: np.ndarray, class_T: np.ndarray | None, slot_PLS: np.ndarray
    ) -> ChosenRanks:
        """Return the destination of every choice, layer by layer, and add up `slot_PLS`."""
        plan, (tokens, layers, choices) = self.plan, experts_TLK.shape
        passes, slots = len(slot_PLS), plan.num_slots
        rank_LKT = np.empty((layers, choices, tokens), np.min_scalar_type(plan.num_ranks))
        self._check_experts(int((experts_TLK if valid_TLK is None else experts_TLK * valid_TLK).max(initial=0)))
        pass_T = group_T // plan.num_ranks * (slots + 1)
        for layer in range(layers):
            expert_KT = experts_TLK[:, layer].T.astype(np.int64)
            if valid_TLK is not None:
                expert_KT[~valid_TLK[:, layer].T] = plan.num_experts
            slot_KT = self._slot_LCE[layer].ravel()[expert_KT if class_T is None else expert_KT + class_T]
            counts = np.bincount((slot_KT + pass_T).ravel(), minlength=passes * (slots + 1))
            slot_PLS[:, layer] = counts.reshape(passes, slots + 1)[:, :slots]
            rank_LKT[layer] = self._rank_S[slot_KT]
        return ChosenRanks(rank_LKT=rank_LKT, group_T=group_T, num_passes=passes, num_ranks=plan.num_ranks, devices=self.ranks_per_node)

    def _check_experts(self, highest: int) -> None:
        if highest >= self.plan.num_experts:
            remedy = f"the plan was made for {self.plan.model}"
            raise TraceError(describe("routing", "expert", highest, f"must be in 0..{self.plan.num_experts - 1}", remedy))

    def _block(
        self,
        experts_BLK: np.ndarray,
        valid_BLK: np.ndarray | None,
        group_B: np.ndarray,
        class_B: np.ndarray | None,
        slot_PLS: np.ndarray,
        pairs: PairCounts,
    ) -> None:
        """Add the loads of one block of tokens to `slot_PLS` and `pairs`."""
        plan, size, choices = self.plan, group_B.size, experts_BLK.shape[2]
        ranks, slots, row = plan.num_ranks, plan.num_slots, self._slot_LCE[0].size
        if valid_BLK is not None:
            experts_BLK = experts_BLK * valid_BLK
        self._check_experts(int(experts_BLK.max()))
        if valid_BLK is not None:
            # 0 was written where nothing is valid, so adding E there makes E; np.where takes four times as long.
            none = np.min_scalar_type(plan.num_experts).type(plan.num_experts)
            experts_BLK = experts_BLK.astype(none.dtype)
            experts_BLK += ~valid_BLK * none
        group = _masks.Groups.of(group_B)
        passes = _masks.Groups.of(group_B // ranks)
        first_group_Y = np.searchsorted(group.start_X, passes.start_X)
        segment_Q, first_X = _masks.segment_starts(group.start_X, size)
        lines_LUBJ = _masks.transposed_lines(experts_BLK)
        few = size * choices < slots * group.start_X.size
        by_expert = self._by_expert if not few and 2 * group.start_X.size * row <= size * choices else None
        many = min(plan.num_layers, max(1, COUNT_WORDS // size))
        chunk = min(many, max(1, CHUNK_ENTRIES // (size * choices)))
        place_KLB = None
        if class_B is not None or chunk > 1:
            place_LB = (np.arange(chunk) * row)[:, None] + (0 if class_B is None else class_B)
            place_KLB = np.ascontiguousarray(np.broadcast_to(place_LB, (choices, chunk, size)))
        word_WMB = np.empty((self._word_WS.shape[0], many, size), np.uint64)
        slot_MYS = np.empty((many, passes.start_X.size, slots), np.int64)
        assign_MXR = np.empty((many, group.start_X.size, ranks), np.int32)
        for base in range(0, plan.num_layers, many):
            top = min(base + many, plan.num_layers)
            for low in range(base, top, chunk):
                high = min(low + chunk, top)
                here = slice(low - base, high - base)
                index_KLB = self._index(lines_LUBJ[low:high], place_KLB)
                # Indices were checked: mode "clip" only spares the copy that "raise" makes.
                if by_expert:
                    folding, bins_KLB, tables_WI = by_expert[0].layers(low, high), index_KLB, by_expert[1][:, low:high]
                else:
                    folding, bins_KLB, tables_WI = self._by_slot, np.empty_like(index_KLB), self._word_WS
                    self._slot_LCE[low:high].take(index_KLB, out=bins_KLB, mode="clip")
                scratch_KLB = np.empty(index_KLB.shape, np.uint64)
                for word_LB, table in zip(word_WMB[:, here], tables_WI, strict=True):
                    np.bitwise_or.reduce(table.take(bins_KLB, out=scratch_KLB, mode="clip"), axis=0, out=word_LB)
                if few:
                    self._rank_S.take(bins_KLB, out=index_KLB, mode="clip")
                    assign_MXR[here] = group.histogram(index_KLB, ranks + 1)[..., :ranks]
                    slot_MYS[here] = passes.histogram(bins_KLB, slots + 1)[..., :slots]
                else:
                    count_LXI = group.histogram(bins_KLB, folding.bins, stride=row if by_expert else 0)
                    assign_MXR[here] = folding.ranks(count_LXI)
                    slot_MYS[here] = folding.slots(np.add.reduceat(count_LXI, first_group_Y, axis=1))
            word_WLB = word_WMB[:, : top - base]
            count_LXD = _masks.count_destinations(word_WLB, ranks + self._node_bits, segment_Q, first_X)
            slot_PLS[passes.id_X, base:top] += slot_MYS[: top - base].transpose(1, 0, 2)
            _masks.add_groups(pairs.assign_PLRR[:, base:top], group.id_X, assign_MXR[: top - base])
            _masks.add_groups(pairs.copy_PLRR[:, base:top], group.id_X, count_LXD[..., :ranks])
            if self.num_nodes > 1:
                node_LXN = count_LXD[..., ranks if self._node_bits else 0 :]
            elif valid_BLK is None:
                node_LXN = np.broadcast_to(np.diff(group.start_X, append=size)[:, None], (top - base, group.start_X.size, 1))
            else:
                node_LXN = np.add.reduceat((word_WLB != 0).any(axis=0), group.start_X, axis=1, dtype=np.int32)[..., None]
            _masks.add_groups(pairs.node_PLRN[:, base:top], group.id_X, node_LXN)

    def _index(self, lines_LUBJ: np.ndarray, place_KLB: np.ndarray | None) -> np.ndarray:
        """Return int64 [K, l, B]: each choice's place in the tables of these layers: (layer, replica class, expert)."""
        layers, lines, size, width = lines_LUBJ.shape
        index_KLB = np.empty((lines * width, layers, size), np.int64)
        np.copyto(index_KLB.reshape(lines, width, layers, size), lines_LUBJ.transpose(1, 3, 0, 2))
        if place_KLB is not None:
            index_KLB += place_KLB[:, :layers]
        return index_KLB

    def _check(self, experts_TLK: np.ndarray, rank_T: np.ndarray, valid_TLK: np.ndarray | None, starts: np.ndarray) -> None:
        plan, shape = self.plan, experts_TLK.shape
        if experts_TLK.ndim != 3 or experts_TLK.dtype not in (np.uint8, np.uint16) or shape[1] != plan.num_layers or shape[2] < 1:
            rule = f"must be uint8 or uint16 [tokens, {plan.num_layers} layers, top-k]"
            raise TraceError(describe("routing", "experts_TLK", f"{experts_TLK.dtype} {list(shape)}", rule))
        if shape[0] * shape[2] >= 2**31:
            raise TraceError(describe("routing", "tokens x top-k", shape[0] * shape[2], "must be below 2^31", "compile fewer passes at a time"))
        if rank_T.shape != shape[:1] or rank_T.dtype.kind not in "iu":
            raise TraceError(describe("routing", "rank_T", f"{rank_T.dtype} {list(rank_T.shape)}", f"must hold one integer per token, {shape[0]}"))
        if rank_T.size and (int(rank_T.min()) < 0 or int(rank_T.max()) >= plan.num_ranks):
            raise TraceError(describe("routing", "rank_T", [int(rank_T.min()), int(rank_T.max())], f"must be in 0..{plan.num_ranks - 1}"))
        if valid_TLK is not None and (valid_TLK.shape != shape or valid_TLK.dtype != np.bool_):
            raise TraceError(describe("routing", "valid_TLK", f"{valid_TLK.dtype} {list(valid_TLK.shape)}", f"must be bool {list(shape)}"))
        if starts.ndim != 1 or starts.size < 1 or starts[0] != 0 or bool((np.diff(starts, append=shape[0]) < 0).any()):
            raise TraceError(describe("routing", "pass_start_P", starts[:8].tolist(), f"must rise from 0 to at most {shape[0]}"))
        if plan.experts_L is not None and shape[0]:
            highest_L = (experts_TLK if valid_TLK is None else experts_TLK * valid_TLK).max(axis=(0, 2))
            for layer in np.flatnonzero(highest_L >= np.array(plan.experts_L))[:1]:
                rule = f"must be below the {plan.experts_L[layer]} experts of layer {plan.moe_layer_ids[layer]}"
                raise TraceError(describe("routing", "expert", int(highest_L[layer]), rule, f"the plan was made for {plan.model}"))


def _rank_starts(slot_rank_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first slot of every rank that has slots, and those ranks."""
    starts = np.flatnonzero(np.diff(slot_rank_S, prepend=-1))
    return starts, slot_rank_S[starts]


def _by_rank(value_PLS: np.ndarray, slot_rank_S: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return [P, L, R]: the sum of `value_PLS` over the slots of every rank."""
    starts, ranks = _rank_starts(slot_rank_S)
    result = np.zeros((*value_PLS.shape[:2], num_ranks), dtype=value_PLS.dtype)
    result[..., ranks] = np.add.reduceat(value_PLS, starts, axis=2)
    return result
