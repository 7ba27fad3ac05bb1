"""Local search: swaps between the slowest rank and the others, then reassigned slots, then pair swaps.

All layers advance together; a layer leaves the search when its cost meets its bound or no move helps. Counts of
moves are fixed, so that the result does not depend on the machine; a deadline only caps them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moesim.solvers.pairs import best_pair_swap
from moesim.solvers.state import SearchState

Deadline = Callable[[], float] | None
CLOSE = 1.0 + 5e-5
"""A layer within this factor of its bound is finished."""


STAGNANT = 1.0 - 2e-5
"""A layer whose cost falls by less than this over a stretch of rounds is finished."""
MIN_PATIENCE = 60


def expired(deadline: Deadline) -> bool:
    """Say whether the time given to a solver is used up."""
    return deadline is not None and deadline() <= 0


def improve(state: SearchState, bound_L: np.ndarray, *, max_rounds: int = 2000, max_deep: int = 40, deadline: Deadline = None) -> tuple[int, bool]:
    """Improve the placement in place until no move helps, the bound is met, or the rounds are used up.

    bound_L: cost below which no layer can get. max_rounds: swap rounds; max_deep: rounds of reassignments and pair swaps per layer.
    Returns the number of moves made and whether the deadline cut the search short.
    """
    windows = len(state.load_KLE)
    layers = len(bound_L)
    moves = 0
    fails = np.zeros(layers, dtype=np.int64)
    deep = np.zeros(layers, dtype=np.int64)
    cost = state.cost_L()
    active = np.nonzero(cost > bound_L * CLOSE)[0]
    # many ranks may be equally slow, so that a layer needs a round for each before its cost falls
    patience = max(MIN_PATIENCE, len(state.speed_R), 8 * windows)
    before = cost
    for step in range(max_rounds):
        if active.size == 0:
            break
        if expired(deadline):
            return moves, True
        if step and step % patience == 0:
            cost = state.cost_L()
            active = active[cost[active] < before[active] * STAGNANT]
            before = cost
            if active.size == 0:
                break
        window = step % windows
        better, *move = state.best_swap(active, window)
        chosen = active[better]
        state.swap(chosen, *(part[better] for part in move))
        moves += chosen.size
        fails[active] += 1
        fails[chosen] = 0
        stalled = active[fails[active] >= windows]
        if stalled.size:
            done, made = _deep_moves(state, stalled, deep, max_deep, deadline)
            moves += made
            fails[stalled] = 0
            active = np.setdiff1d(active, done, assume_unique=True)
        time = state.time_KLR()[:, active].max(axis=2)
        active = active[(time * state.weight_KL[:, active]).sum(axis=0) > bound_L[active] * CLOSE]
    return moves, False


def _deep_moves(state: SearchState, stalled: np.ndarray, deep: np.ndarray, max_deep: int, deadline: Deadline) -> tuple[np.ndarray, int]:
    """Try the dearer moves on layers that no swap improves; return the layers that are finished and the moves made."""
    open_layers = stalled[deep[stalled] < max_deep]
    left, moves = open_layers, 0
    for kind in (_try_pairs, _try_retarget):
        if left.size == 0 or expired(deadline):
            break
        for window in range(len(state.load_KLE)):
            better = kind(state, left, window)
            deep[left[better]] += 1
            moves += int(better.sum())
            left = left[~better]
            if left.size == 0:
                break
    return np.union1d(np.setdiff1d(stalled, open_layers), left), moves


def _try_retarget(state: SearchState, layers_n: np.ndarray, window: int) -> np.ndarray:
    better, *move = state.best_retarget(layers_n, window)
    if better.any():
        state.retarget(layers_n[better], *(part[better] for part in move))
    return better


def _try_pairs(state: SearchState, layers_n: np.ndarray, window: int) -> np.ndarray:
    better, first, second = best_pair_swap(state, layers_n, window)
    chosen = layers_n[better]
    state.swap(chosen, *(part[better] for part in first))
    state.swap(chosen, *(part[better] for part in second))
    return better


def disturb(state: SearchState, layer: int, generator: np.random.Generator) -> None:
    """Make a few random legal moves in a layer: a reassigned slot where there are replicas, else a swap."""
    table, held = state.table_LRC[layer], state.held_LRE[layer]
    at = np.array([layer])
    filled = np.argwhere(table >= 0)
    for _ in range(int(generator.integers(2, 3 + min(len(filled), 24) // 2))):
        (rank, slot), (other, other_slot) = filled[generator.integers(len(filled), size=2)]
        mine, theirs = table[rank, slot], table[other, other_slot]
        fits = state.allow_duplicates or (held[rank, theirs] == 0 and held[other, mine] == 0)
        if state.copies_LE[layer, mine] > 1 and generator.random() < 0.5:
            if state.copies_LE[layer, theirs] < state.cap and (state.allow_duplicates or held[rank, theirs] == 0):
                state.retarget(at, np.array([rank]), np.array([slot]), np.array([theirs]))
        elif rank != other and fits:
            state.swap(at, np.array([rank]), np.array([slot]), np.array([other]), np.array([other_slot]))
