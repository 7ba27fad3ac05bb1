"""Ranks that leave and join: a masked rank is one of the cluster that takes no tokens and has no slots.

Masking keeps every array and every process group at the size of the cluster, so survivors may be uneven over the nodes.
A masked rank costs nothing and delays nobody. Shapes: R ranks, L MoE layers, E experts, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import InputError, SimulationError, describe
from moesim.plan import Plan
from moesim.sim.batch import Part, Pass, PassShape

FAIL, LEAVE, JOIN = "fail", "leave", "join"


Placer = Callable[[np.ndarray, Plan, np.ndarray], Plan]
"""(loads [K, L, E], running plan, bool [R] ranks that will be live) → the next plan, without experts on the other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """What it takes to lose and to gain ranks. Times are declared inputs, not measurements."""

    detection_s: float = 5.0
    """From a rank's death until the survivors leave the pass in flight: the watchdog's timeout."""
    rebuild_s: float = 0.3
    """To rebuild the process group; serving stands still."""
    init_s: float = 30.0
    """To start the process of a rank that joins, before it loads weights; serving goes on."""
    placer: Placer | None = None
    """Plans for the new set of ranks; None: `refill`, few moves. After a failure it runs once service is back."""
    placer_s: float = 0.0
    """Run time of the placer, s."""

    def __post_init__(self) -> None:
        for name in ("detection_s", "rebuild_s", "init_s", "placer_s"):
            if not 0 <= getattr(self, name) < np.inf:
                raise InputError(describe("membership", name, getattr(self, name), "must be finite and >= 0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Ranks that change at a time."""

    kind: str
    """`fail`: at once, with what is in their memory; `leave`: drained first; `join`: start, load, get experts, then serve."""
    at_s: float
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in (FAIL, LEAVE, JOIN):
            raise InputError(describe("event", "kind", self.kind, f"must be one of {FAIL}, {LEAVE}, {JOIN}"))
        if not 0 <= self.at_s < np.inf:
            raise InputError(describe("event", "at_s", self.at_s, "must be finite and >= 0"))
        if not self.ranks or len(set(self.ranks)) != len(self.ranks) or min(self.ranks) < 0:
            raise InputError(describe("event", "ranks", self.ranks, "must name at least one rank >= 0, each once"))


def ladder(start: int, steps: Sequence[tuple[float, int]]) -> list[Event]:
    """Return the events that take a run from `start` ranks through `steps` (time in s, number of ranks); ranks 0..n-1 serve."""
    events, now, before = [], start, -1.0
    for at_s, count in steps:
        if count < 1 or at_s < before:
            raise InputError(describe("ladder", "step", (at_s, count), "must have at least one rank and come in order of time"))
        if count != now:
            low, high = sorted((now, count))
            events.append(Event(kind=JOIN if count > now else LEAVE, at_s=at_s, ranks=tuple(range(low, high))))
        now, before = count, at_s
    return events


def alive_of(plan: Plan) -> np.ndarray:
    """Return bool [R]: ranks that hold at least one expert."""
    alive = np.zeros(plan.num_ranks, dtype=bool)
    alive[plan.slot_rank_S[(plan.slot_to_expert_LS >= 0).any(axis=0)]] = True
    return alive


def lost_LE(plan: Plan, alive_R: np.ndarray) -> np.ndarray:
    """Return bool [L, E]: experts that no live rank holds."""
    table = np.where(alive_R[plan.slot_rank_S], plan.slot_to_expert_LS, -1)
    return np.asarray((plan.replicas_LE_of(table, plan.num_experts) == 0) & plan.present_LE)


def refill(plan: Plan, alive_R: np.ndarray, load_LE: np.ndarray) -> Plan:
    """Return `plan` over the live ranks with few moves: what is still held stays where it is.

    An expert that no live rank holds goes to an empty slot, else in the place of the least loaded spare replica, else to a new slot on
    the rank with the fewest experts; heaviest first. Live ranks without any expert then take over experts from the fullest ranks
    until counts differ by at most one. Replicas are served in equal shares.
    """
    ranks = [int(rank) for rank in np.flatnonzero(alive_R)]
    if not ranks:
        raise SimulationError("membership: no rank is left; at least one must serve")
    new = [rank for rank in ranks if not alive_of(plan)[rank]]
    tables: list[dict[int, list[int]]] = []
    for row, load_E, present_E in zip(plan.slot_to_expert_LS, load_LE, plan.present_LE, strict=True):
        slots = {rank: row[plan.slot_rank_S == rank].tolist() for rank in ranks}
        _place_lost(slots, load_E[present_E])
        if new:
            _level(slots, new)
        tables.append(slots)
    width = {rank: max(len(slots[rank]) for slots in tables) for rank in ranks}
    table = [[expert for rank in ranks for expert in slots[rank] + [-1] * (width[rank] - len(slots[rank]))] for slots in tables]
    return replace(
        plan, slot_to_expert_LS=np.array(table), slot_rank_S=np.repeat(ranks, [width[rank] for rank in ranks]), share_LS=None, result={}, source="refill"
    )


def _place_lost(slots: dict[int, list[int]], load_E: np.ndarray) -> None:
    copies = np.bincount([expert for held in slots.values() for expert in held if expert >= 0], minlength=len(load_E))
    lost = np.flatnonzero(copies == 0)
    for expert in lost[np.argsort(-load_E[lost], kind="stable")].tolist():
        empty = [(sum(e >= 0 for e in held), rank) for rank, held in slots.items() if -1 in held]
        if empty:
            rank = min(empty)[1]
            slots[rank][slots[rank].index(-1)] = expert
        else:
            spare = [(load_E[e] / copies[e], rank, index) for rank, held in slots.items() for index, e in enumerate(held) if copies[e] > 1]
            if spare:
                _, rank, index = min(spare)
                copies[slots[rank][index]] -= 1
                slots[rank][index] = expert
            else:
                slots[min(slots, key=lambda rank: (len(slots[rank]), rank))].append(expert)
        copies[expert] += 1


def _level(slots: dict[int, list[int]], new: list[int]) -> None:
    def count(rank: int) -> int:
        return sum(expert >= 0 for expert in slots[rank])

    for rank in new:
        slots[rank] = [expert for expert in slots[rank] if expert >= 0]
    while True:
        target = min(new, key=lambda rank: (count(rank), rank))
        source = max(slots, key=lambda rank: (count(rank), -rank))
        movable = [index for index, expert in enumerate(slots[source]) if expert >= 0 and expert not in slots[target]]
        if count(source) - count(target) < 2 or not movable:
            return
        slots[target].append(slots[source][movable[-1]])
        slots[source][movable[-1]] = -1


# --- tokens ---------------------------------------------------------------------------------------------------------


def reshard(item: Pass, alive_R: np.ndarray) -> Pass:
    """Return the pass with the tokens of masked ranks dealt to the live ones, in equal contiguous blocks.

    Sequences, phases and contexts go with the tokens in proportion; a sequence that a block border cuts counts as two parts.
    """
    if alive_R.all():
        return item
    parts = tuple(_part(part, alive_R) for part in item.parts)
    if len(parts) == 1:
        return Pass(item.step, parts[0].shape, parts)
    count_R = np.bincount(np.concatenate([part.rank_T for part in item.parts]), minlength=len(alive_R))
    return Pass(item.step, _shape(item.shape, _deal_RR(count_R, alive_R)), parts)


def _deal_RR(count_R: np.ndarray, alive_R: np.ndarray) -> np.ndarray:
    """Return int64 [R, R]: tokens of every rank (row) that each rank gets."""
    ranks = np.flatnonzero(alive_R)
    deal = np.diag(np.where(alive_R, count_R, 0))
    for turn, rank in enumerate(np.flatnonzero(~alive_R)):
        each, rest = divmod(int(count_R[rank]), len(ranks))
        # The remainder begins at another rank every time, so that it does not pile up on the first.
        deal[rank, ranks] = each + ((np.arange(len(ranks)) - turn * rest) % len(ranks) < rest)
    return deal


def _part(part: Part, alive_R: np.ndarray) -> Part:
    count_R = np.bincount(part.rank_T, minlength=len(alive_R))
    deal_RR = _deal_RR(count_R, alive_R)
    rank_T = np.repeat(np.tile(np.arange(len(alive_R)), len(alive_R)), deal_RR.ravel())
    order = np.argsort(rank_T, kind="stable")
    valid = None if part.valid_TLK is None else part.valid_TLK[order]
    return Part(_shape(part.shape, deal_RR), part.experts_TLK[order], rank_T[order].astype(part.rank_T.dtype), valid)


def _shape(shape: PassShape, deal_RR: np.ndarray) -> PassShape:
    total_R = deal_RR.sum(axis=1)
    share_RR = deal_RR / np.maximum(total_R, 1)[:, None]
    prefill, decode = shape.prefill_seqs_PR @ share_RR, shape.decode_seqs_PR @ share_RR

    def context(seqs_PR: np.ndarray, context_PR: np.ndarray, dealt_PR: np.ndarray) -> np.ndarray:
        return np.divide((seqs_PR * context_PR) @ share_RR, dealt_PR, out=np.zeros_like(dealt_PR), where=dealt_PR > 0)

    return PassShape(
        prefill_tokens_PR=shape.prefill_tokens_PR @ share_RR,
        prefill_seqs_PR=prefill,
        prefill_context_PR=context(shape.prefill_seqs_PR, shape.prefill_context_PR, prefill),
        decode_tokens_PR=shape.decode_tokens_PR @ share_RR,
        decode_seqs_PR=decode,
        decode_context_PR=context(shape.decode_seqs_PR, shape.decode_context_PR, decode),
    )
