"""Traffic of placements with copies: who serves a choice, which places a token reaches beyond its own, and which copies save most of that.

Token t of a sample starts on rank t mod G. A choice goes to the nearest copy of its expert: on the token's own rank, else in its node, else in its
rack, else anywhere; copies that are equally near take turns (copy t div G, modulo their number, in order of rank). A token pays for every rank,
node and rack that it reaches other than its own. Levels are (ranks of a place, weight) pairs, ranks first.
Shapes: T tokens, K choices, L layers, E experts, G ranks, S slots, N copies at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.search import Deadline, expired

Levels = Sequence[tuple[int, float]]
SEARCH_CHOICES = 1 << 16
"""Choices of a layer by which copies are weighed; the answer is scored on all tokens."""


def held_GE(row_S: np.ndarray, rank_S: np.ndarray, ranks: int, experts: int) -> np.ndarray:
    """Return bool [G, E]: which rank holds which expert."""
    held = np.zeros((ranks, experts), dtype=bool)
    filled = row_S >= 0
    held[rank_S[filled], row_S[filled]] = True
    return held


def serving_TK(chosen_TK: np.ndarray, held: np.ndarray, levels: Levels) -> np.ndarray:
    """Return int64 [T, K]: the rank that serves every choice."""
    ranks = len(held)
    place = np.arange(ranks)
    apart_GG = np.zeros((ranks, ranks), dtype=np.int64)
    for per_place, _ in levels:
        apart_GG += place[:, None] // per_place != place[None, :] // per_place
    most = int(held.sum(axis=0).max())
    turn, home = np.divmod(np.arange(len(chosen_TK)), ranks)
    count_GE, ranked_GEN = np.empty(held.shape, dtype=np.int64), np.empty((*held.shape, most), dtype=np.int64)
    for own in range(ranks):
        apart_EG = np.where(held.T, apart_GG[own], len(levels) + 1)
        near_EG = apart_EG == apart_EG.min(axis=1, keepdims=True)
        count_GE[own] = near_EG.sum(axis=1)
        ranked_GEN[own] = np.argsort(~near_EG, axis=1, kind="stable")[:, :most]
    at = (home[:, None], chosen_TK)
    return np.asarray(ranked_GEN[(*at, turn[:, None] % count_GE[at])])


def _reached_TP(serving: np.ndarray, valid: np.ndarray, per_place: int, places: int) -> np.ndarray:
    """Return int [T, P]: choices of every token that go to every place."""
    key = serving // per_place + np.arange(len(serving))[:, None] * places
    return np.bincount(key[valid], minlength=len(serving) * places).reshape(-1, places)


def _layer(routes: TokenRoutes, layer: int) -> tuple[np.ndarray, np.ndarray]:
    chosen = routes.experts_TLK[:, layer].astype(np.int64)
    return chosen, np.ones(chosen.shape, dtype=bool) if routes.valid_TLK is None else routes.valid_TLK[:, layer]


def remote_cost(chosen: np.ndarray, valid: np.ndarray, held: np.ndarray, levels: Levels) -> float:
    """Return the weighted places other than their own that the tokens of one layer reach, summed over tokens."""
    ranks, serving = len(held), serving_TK(chosen, held, levels)
    home, total = np.arange(len(chosen)) % ranks, 0.0
    for per_place, weight in levels:
        reached = _reached_TP(serving, valid, per_place, ranks // per_place) > 0
        reached[np.arange(len(chosen)), home // per_place] = False
        total += weight * float(reached.sum())
    return total


def remote_L(routes: TokenRoutes, table_LS: np.ndarray, rank_S: np.ndarray, ranks: int, levels: Levels) -> np.ndarray:
    """Return float64 [L]: `remote_cost` of every layer of a placement."""
    return np.array(
        [remote_cost(*_layer(routes, layer), held_GE(row, rank_S, ranks, routes.num_experts), levels) for layer, row in enumerate(np.asarray(table_LS))]
    )


def remote_bound_L(routes: TokenRoutes, rank_slots: int, ranks: int, levels: Levels) -> np.ndarray:
    """Return float64 [L]: `remote_cost` that no placement with at most `rank_slots` experts on a rank beats.

    A place keeps at home, of the choices that start there, at most those of the experts that fit it; a token with choices that leave reaches a
    place for every so many that fit one.
    """
    tokens, _, width = routes.experts_TLK.shape
    result = np.zeros(routes.num_layers)
    home = np.arange(tokens) % ranks
    for layer in range(routes.num_layers):
        chosen, valid = _layer(routes, layer)
        for per_place, weight in levels:
            room, places = rank_slots * per_place, ranks // per_place
            key = (home // per_place)[:, None] * routes.num_experts + chosen
            count_PE = np.bincount(key[valid], minlength=places * routes.num_experts).reshape(places, -1)
            leaving = count_PE.sum() - np.sort(count_PE, axis=1)[:, ::-1][:, :room].sum()
            fewest = np.maximum(-(-valid.sum(axis=1) // room) - 1, 0).sum()
            result[layer] += weight * max(float(leaving) / min(room, width), float(fewest))
    return result


def fill_copies(routes: TokenRoutes, table_LS: np.ndarray, rank_S: np.ndarray, ranks: int, levels: Levels, deadline: Deadline = None) -> tuple[int, bool]:
    """Fill empty slots in place with the copies that save most, then replace copies while that saves more; return the copies set and whether time ran out.

    Every rank fills one slot at a time, all ranks at once; slots whose expert has no other copy are never touched.
    """
    made = 0
    for layer, row in enumerate(table_LS):
        if expired(deadline):
            _fill_rest(table_LS[layer:], rank_S, ranks, routes.num_experts)
            return made, True
        chosen, valid = _layer(routes, layer)
        step = -(-chosen.size // SEARCH_CHOICES)
        # whole rounds of ranks are kept, so that every rank stays the home of equally many
        kept = np.flatnonzero((np.arange(len(chosen)) // ranks) % step == 0)
        chosen, valid = chosen[kept], valid[kept]
        made += _fill(row, chosen, valid, rank_S, ranks, routes.num_experts, levels)
        cost = remote_cost(chosen, valid, held_GE(row, rank_S, ranks, routes.num_experts), levels)
        for turn in range(int(np.bincount(rank_S).max())):
            other = row.copy()
            if not _drop(other, rank_S, ranks, routes.num_experts, turn):
                continue
            set_now = _fill(other, chosen, valid, rank_S, ranks, routes.num_experts, levels)
            found = remote_cost(chosen, valid, held_GE(other, rank_S, ranks, routes.num_experts), levels)
            if found < cost:
                row[:], cost, made = other, found, made + set_now
    return made, False


def _drop(row: np.ndarray, rank_S: np.ndarray, ranks: int, experts: int, turn: int) -> bool:
    """Empty the slot number `turn` of every rank where its expert has another copy; say whether any was."""
    copies = np.bincount(row[row >= 0], minlength=experts)
    dropped = False
    for rank in range(ranks):
        slots = np.flatnonzero(rank_S == rank)
        if turn < len(slots) and row[slots[turn]] >= 0 and copies[row[slots[turn]]] > 1:
            copies[row[slots[turn]]] -= 1
            row[slots[turn]] = -1
            dropped = True
    return dropped


def _fill(row: np.ndarray, chosen: np.ndarray, valid: np.ndarray, rank_S: np.ndarray, ranks: int, experts: int, levels: Levels) -> int:
    made = 0
    while (open_S := row < 0).any():
        held = held_GE(row, rank_S, ranks, experts)
        saved = np.where(held, -np.inf, _saved_GE(chosen, valid, held, levels))
        before = made
        for rank in np.unique(rank_S[open_S]).tolist():
            expert = int(saved[rank].argmax())
            if np.isfinite(saved[rank, expert]):
                row[np.flatnonzero(open_S & (rank_S == rank))[0]] = expert
                made += 1
        if made == before:
            break
    return made


def _fill_rest(table_LS: np.ndarray, rank_S: np.ndarray, ranks: int, experts: int) -> None:
    """Fill empty slots without looking at the tokens, with the experts that the rank lacks, in order."""
    for row in table_LS:
        held = held_GE(row, rank_S, ranks, experts)
        for slot in np.flatnonzero(row < 0):
            lacking = np.flatnonzero(~held[rank_S[slot]])
            if lacking.size:
                row[slot], held[rank_S[slot], lacking[0]] = lacking[0], True


def _saved_GE(chosen: np.ndarray, valid: np.ndarray, held: np.ndarray, levels: Levels) -> np.ndarray:
    """Return float64 [G, E]: cost that a further copy saves, to the tokens of its rank, and of its node where the node has none."""
    ranks, experts = held.shape
    serving, home = serving_TK(chosen, held, levels), np.arange(len(chosen)) % ranks
    alone = np.zeros(chosen.shape)
    for per_place, weight in levels:
        reached = _reached_TP(serving, valid, per_place, ranks // per_place)
        at = serving // per_place
        alone += weight * (valid & (at != (home // per_place)[:, None]) & (np.take_along_axis(reached, at, axis=1) == 1))
    saved = np.bincount((home[:, None] * experts + chosen).ravel(), weights=alone.ravel(), minlength=ranks * experts).reshape(ranks, experts)
    if len(levels) == 1:
        return saved
    per_node, base = levels[1][0], levels[0][1]
    node = home // per_node
    token, choice = np.nonzero(valid & (serving // per_node != node[:, None]))
    there = _reached_TP(serving, valid, 1, ranks) > 0
    for index in range(per_node):
        # the choice moves from another node to this rank of the token's node, which the token may not reach yet
        rank = node[token] * per_node + index
        gain = np.where(rank == home[token], 0.0, alone[token, choice] - base * ~there[token, rank])
        saved += np.bincount(rank * experts + chosen[token, choice], weights=gain, minlength=ranks * experts).reshape(ranks, experts)
    return saved
