"""Pair swaps: two slots of the slowest rank against two slots of another, when no single swap helps.

Only for one window; n chosen layers, P = C·(C-1)/2 slot pairs of a rank, R ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.state import CHUNK_CELLS, STRICT, SearchState

MAX_PAIRS = 200
"""Pairs per rank up to which the search is worth its time: ranks with more slots have fine-grained swaps anyway."""

Move = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def best_pair_swap(state: SearchState, layers_n: np.ndarray, window: int) -> tuple[np.ndarray, Move, Move]:
    """Return `better` [n] and the two swaps (rank, slot, other rank, other slot) that make up the best pair swap."""
    width = state.table_LRC.shape[2]
    first, second = np.triu_indices(width, 1)
    n = len(layers_n)
    zero = np.zeros(n, dtype=np.int64)
    better = np.zeros(n, dtype=bool)
    out = [zero.copy() for _ in range(6)]
    if len(state.load_KLE) == 1 and 0 < len(first) <= MAX_PAIRS:
        step = max(1, CHUNK_CELLS // (len(first) ** 2 * len(state.speed_R)))
        for start in range(0, n, step):
            part = slice(start, start + step)
            found = _best_part(state, layers_n[part], first, second)
            better[part] = found[0]
            for target, values in zip(out, found[1:], strict=True):
                target[part] = values
    rank, other, mine_1, mine_2, their_1, their_2 = out
    return better, (rank, mine_1, other, their_1), (rank, mine_2, other, their_2)


def _best_part(state: SearchState, layers_n: np.ndarray, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, ...]:
    n = len(layers_n)
    row = np.arange(n)
    load, inverse = state.rank_KLR[0, layers_n], 1.0 / state.speed_R
    time = load * inverse
    slow = time.argmax(axis=1)
    values, table, held = state.value_KLRC[0, layers_n], state.table_LRC[layers_n], state.held_LRE[layers_n]
    pair_nRP = values[:, :, first] + values[:, :, second]
    filled = state.filled_RC[layers_n]
    barred = ~(filled[:, :, first] & filled[:, :, second])
    mine_barred = np.repeat(barred[row, slow][:, :, None], len(inverse), axis=2)
    if not state.allow_duplicates:
        on_slow = held[row, slow][row[:, None, None], table] > 0
        barred |= on_slow[:, :, first] | on_slow[:, :, second]
        there = np.take_along_axis(held, np.maximum(table[row, slow], 0)[:, None, :], axis=2).transpose(0, 2, 1) > 0
        mine_barred |= there[:, first] | there[:, second]
    barred[row, slow] = True
    # sending the pair of value a for the pair of value b: slow rank T - a + b, other rank t + a - b
    mine = pair_nRP[row, slow]
    top = load[row, slow]
    if (inverse == inverse[0]).all():
        half = (top[:, None] - load) / 2
        score = np.abs(mine[:, :, None, None] - (pair_nRP + half[:, :, None])[:, None])
        score += ((top[:, None] + load) / 2)[:, None, :, None]
        score *= inverse[0]
    else:
        left = (top[:, None, None, None] - mine[:, :, None, None] + pair_nRP[:, None]) * inverse[slow][:, None, None, None]
        score = np.maximum(left, (load[:, None, :, None] + mine[:, :, None, None] - pair_nRP[:, None]) * inverse[None, None, :, None])
    score += np.where(barred, np.inf, 0.0)[:, None]
    score[mine_barred] = np.inf
    flat = score.reshape(n, -1)
    best = flat.argmin(axis=1)
    mine_pair, other, their_pair = np.unravel_index(best, score.shape[1:])
    better = flat[row, best] < time.max(axis=1) * STRICT
    return better, slow, other, first[mine_pair], second[mine_pair], first[their_pair], second[their_pair]
