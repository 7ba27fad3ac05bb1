"""The transportation problem of a layer: every expert to a rank, C to each, for the largest total gain.

Solved exactly, for many layers at once: all improving swaps between disjoint pairs of ranks, then improving cycles of
moves over three and more ranks (Bellman-Ford on the graph of ranks, an edge being the cheapest expert to move).
No improving cycle is left exactly when the assignment is optimal. Shapes: n layers, E experts, G ranks, C = E / G.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 1e-9
"""Relative to the largest gain: a cycle must win more than this."""


def tables_nGC(group_nE: np.ndarray, ranks: int) -> np.ndarray:
    """Return int64 [n, G, C]: the experts of every rank, in rising order."""
    return np.argsort(group_nE, axis=1, kind="stable").reshape(len(group_nE), ranks, -1)


def one_hot_nEG(group_nE: np.ndarray, ranks: int) -> np.ndarray:
    """Return float64 [n, E, G]: 1 where an expert sits on a rank."""
    return (group_nE[..., None] == np.arange(ranks)).astype(np.float64)


def transport_nE(gain_nEG: np.ndarray, start_nE: np.ndarray, *, swaps_only: bool = False) -> np.ndarray:
    """Return int64 [n, E]: the rank of every expert in an assignment of largest gain.

    start_nE: any assignment with equal experts per rank; it is kept where it is already best. swaps_only: stop when no swap helps.
    """
    group = np.array(start_nE, dtype=np.int64)
    if gain_nEG.shape[2] < 2:
        return group
    scale_n = np.maximum(np.abs(gain_nEG).max(axis=(1, 2)), 1e-300) * TOLERANCE
    active = np.arange(len(group))
    while active.size:
        part = group[active]
        moved = _swap(gain_nEG[active], part, scale_n[active])
        if not swaps_only:
            still = np.flatnonzero(~moved)
            if still.size:
                rest = part[still]
                moved[still] = _cycle(gain_nEG[active[still]], rest, scale_n[active[still]])
                part[still] = rest
        group[active] = part
        active = active[moved]
    return group


def _edges(gain_nEG: np.ndarray, group_nE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the least loss [n, G, G] of moving one expert from a rank to another, and the expert."""
    n, experts, ranks = gain_nEG.shape
    table = tables_nGC(group_nE, ranks)
    own = np.take_along_axis(gain_nEG, group_nE[:, :, None], axis=2)
    loss = np.take_along_axis(own - gain_nEG, table.reshape(n, experts, 1), axis=1).reshape(n, ranks, -1, ranks)
    slot = loss.argmin(axis=2)
    least = np.take_along_axis(loss, slot[:, :, None, :], axis=2)[:, :, 0, :]
    least[:, np.arange(ranks), np.arange(ranks)] = np.inf
    return least, np.take_along_axis(table, slot, axis=2)


def _swap(gain_nEG: np.ndarray, group_nE: np.ndarray, least_n: np.ndarray) -> np.ndarray:
    """Make the best swaps between disjoint pairs of ranks in place; return where there was one."""
    edge, mover = _edges(gain_nEG, group_nE)
    return apply_swaps(edge + edge.transpose(0, 2, 1), mover, group_nE, least_n, most=edge.shape[1] // 2)


def apply_swaps(loss_nGG: np.ndarray, mover_nGG: np.ndarray, group_nE: np.ndarray, least_n: np.ndarray, *, most: int) -> np.ndarray:
    """Swap experts between pairs of ranks in place, largest win first, every rank in one swap at most; return where one won more than `least_n`.

    loss_nGG: symmetric, of swapping mover[g, h] for mover[h, g]; changed in place. most: swaps per layer.
    """
    n, ranks, _ = loss_nGG.shape
    row = np.arange(n)
    moved = np.zeros(n, dtype=bool)
    for _ in range(most):
        best = loss_nGG.reshape(n, -1).argmin(axis=1)
        one, other = best // ranks, best % ranks
        go = loss_nGG[row, one, other] < -least_n
        if not go.any():
            break
        layer, one, other = row[go], one[go], other[go]
        mine, theirs = mover_nGG[layer, one, other], mover_nGG[layer, other, one]
        group_nE[layer, mine], group_nE[layer, theirs] = other, one
        for rank in (one, other):
            loss_nGG[layer, rank, :] = np.inf
            loss_nGG[layer, :, rank] = np.inf
        moved |= go
    return moved


def _cycle(gain_nEG: np.ndarray, group_nE: np.ndarray, least_n: np.ndarray) -> np.ndarray:
    """Make one improving cycle of moves per layer in place; return where there was one."""
    edge, mover = _edges(gain_nEG, group_nE)
    n, ranks, _ = edge.shape
    row = np.arange(n)
    # a step must win by more than its share of the tolerance, or rounding would look like an endless improvement
    edge += (least_n / ranks)[:, None, None]
    distance = np.zeros((n, ranks))
    origin = np.full((n, ranks), -1)
    relaxed = np.zeros((n, ranks), dtype=bool)
    for _ in range(ranks):
        through = distance[:, :, None] + edge
        via = through.argmin(axis=1)
        shorter = np.take_along_axis(through, via[:, None, :], axis=1)[:, 0, :]
        relaxed = shorter < distance
        if not relaxed.any():
            return np.zeros(n, dtype=bool)
        distance = np.where(relaxed, shorter, distance)
        origin = np.where(relaxed, via, origin)
    found = relaxed.any(axis=1)
    at = relaxed.argmax(axis=1)
    for _ in range(ranks):
        at = np.where(found, origin[row, at], at)
    open_n, first = found.copy(), at.copy()
    while open_n.any():
        before = np.where(open_n, origin[row, at], 0)
        layer = row[open_n]
        group_nE[layer, mover[layer, before[layer], at[layer]]] = at[layer]
        at = np.where(open_n, before, at)
        open_n &= at != first
    return np.asarray(found)
