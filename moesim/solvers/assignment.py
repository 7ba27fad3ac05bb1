"""Naming what is interchangeable so that as little as possible moves: ranks of a layer, slots of a rank.

Relabelling ranks is an assignment problem, solved exactly by shortest augmenting paths over a dense cost matrix
(Jonker and Volgenant, "A shortest augmenting path algorithm for dense and sparse linear assignment problems", 1987).
Only ranks with equal slots and speed are interchangeable. Shapes: L layers, S slots, R ranks, C slots of a rank.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.packing import from_slots_LRC, to_slots_LS
from moesim.solvers.problem import PlacementProblem


def assign(cost_NN: np.ndarray) -> np.ndarray:
    """Return int64 [N]: the column of every row in an assignment of least total cost."""
    cost = np.asarray(cost_NN, dtype=np.float64)
    size = len(cost)
    column_price = cost.min(axis=0)
    reduced = cost - column_price
    row_price = reduced.min(axis=1)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row in range(size):
        tight = np.flatnonzero((reduced[row] <= row_price[row]) & (row_of < 0))
        if tight.size:
            column_of[row], row_of[tight[0]] = tight[0], row
    for start in np.flatnonzero(column_of < 0):
        distance = cost[start] - row_price[start] - column_price
        origin = np.full(size, start)
        done = np.zeros(size, dtype=bool)
        while True:
            column = int(np.where(done, np.inf, distance).argmin())
            shortest = distance[column]
            done[column] = True
            row = row_of[column]
            if row < 0:
                break
            through = shortest + cost[row] - row_price[row] - column_price
            shorter = ~done & (through < distance)
            distance[shorter] = through[shorter]
            origin[shorter] = row
        settled = done & (row_of >= 0)
        row_price[row_of[settled]] += shortest - distance[settled]
        row_price[start] += shortest
        column_price[settled] -= shortest - distance[settled]
        while True:
            row = origin[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
            if row == start:
                break
    return column_of


def relabel_LS(problem: PlacementProblem, table_LS: np.ndarray) -> np.ndarray:
    """Return the same placement with ranks and slots named so that the fewest slots differ from `problem.previous`."""
    assert problem.previous is not None
    slots = problem.slots_per_rank_R
    new, old = from_slots_LRC(table_LS, slots), from_slots_LRC(problem.previous, slots)
    kinds: dict[tuple[int, float], list[int]] = {}
    for rank, kind in enumerate(zip(slots.tolist(), problem.speed_R.tolist(), strict=True)):
        kinds.setdefault(kind, []).append(rank)
    result = new.copy()
    for layer in range(len(new)):
        shared = held_RE(new[layer], problem.num_experts) @ held_RE(old[layer], problem.num_experts).T
        for ranks in kinds.values():
            at = np.array(ranks)
            if len(at) > 1:
                result[layer, at[assign(-shared[np.ix_(at, at)])]] = new[layer, at]
    return align_LS(to_slots_LS(result, slots), problem.previous, slots)


def held_RE(table_RC: np.ndarray, experts: int) -> np.ndarray:
    """Return float64 [R, E]: 1 where a rank holds an expert."""
    held = np.zeros((len(table_RC), experts + 1))
    held[np.arange(len(table_RC))[:, None], table_RC] = 1.0
    return held[:, :experts]


def align_LS(table_LS: np.ndarray, previous_LS: np.ndarray, slots_per_rank_R: np.ndarray) -> np.ndarray:
    """Return the placement with the slots inside every rank ordered so that experts which stay keep their slot."""
    result = np.array(table_LS)
    ends = np.cumsum(slots_per_rank_R)
    for layer, start, end in ((layer, end - count, end) for layer in range(len(result)) for end, count in zip(ends, slots_per_rank_R, strict=True)):
        old, new = previous_LS[layer, start:end].tolist(), result[layer, start:end].tolist()
        if old == new:
            continue
        rest, placed = list(new), [False] * len(old)
        for slot, expert in enumerate(old):
            if expert in rest:
                rest.remove(expert)
                placed[slot] = True
        result[layer, start:end] = [expert if stays else rest.pop(0) for expert, stays in zip(old, placed, strict=True)]
    return result
