"""The exact optimum of a chain of layers by dynamic programming over placements of one layer (Viterbi).

A state is a placement of one layer. Costs do not change when ranks are renamed by a symmetry of the fabric, in all layers
alike, so the best cost of reaching a state is computed once per orbit. Feasible for a few thousand states:
8 experts on 2 ranks (70), on 4 (2520, 105 orbits), 12 on 2 (924), 9 on 3 (1680), for any usual number of layers.
Shapes: L layers, E experts, G ranks, P states, Q orbits.
"""

from __future__ import annotations

import itertools
import math

import numpy as np

from moesim.errors import InfeasibleError
from moesim.solvers.affinity.swap import CAP_SLACK
from moesim.solvers.affinity.transport import one_hot_nEG

MAX_STATES = 40_000
MAX_WORK = 400_000_000
"""State pairs, over all layers, up to which the program is worth its time: a few seconds."""
_CHUNK_CELLS = 1 << 19


def num_states(experts: int, ranks: int) -> int:
    """Return the number of placements of one layer with equal experts per rank."""
    return math.factorial(experts) // math.factorial(experts // ranks) ** ranks


def symmetries(hop_GG: np.ndarray) -> np.ndarray:
    """Return int64 [n, G]: renamings of ranks that leave every hop cost as it is (all of them up to 6 ranks, else only none)."""
    ranks = len(hop_GG)
    if ranks > 6:
        return np.arange(ranks)[None]
    every = np.array(list(itertools.permutations(range(ranks))))
    return every[[bool((hop_GG[np.ix_(one, one)] == hop_GG).all()) for one in every]]


def fits(layers: int, experts: int, ranks: int, hop_GG: np.ndarray) -> bool:
    """Say whether the program is small enough to be solved in seconds."""
    states = num_states(experts, ranks)
    return states <= MAX_STATES and layers * states * (states // len(symmetries(hop_GG)) + 1) <= MAX_WORK


def states_PE(experts: int, ranks: int) -> np.ndarray:
    """Return int64 [P, E]: all placements of one layer in lexicographic order."""
    states = np.zeros((1, 0), dtype=np.int64)
    for _ in range(experts):
        room = (states[:, :, None] == np.arange(ranks)).sum(axis=1) < experts // ranks
        row, rank = np.nonzero(room)
        states = np.concatenate((states[row], rank[:, None]), axis=1)
    return states


def solve_chain(
    transitions_LEE: np.ndarray, hop_GG: np.ndarray, *, load_LE: np.ndarray | None = None, cap_L: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Return a placement int64 [L, E] of least total hop cost and that cost.

    load_LE, cap_L: if given, no rank of a layer may carry more than the cap. Raises InfeasibleError if a layer has no such placement.
    """
    experts, ranks = transitions_LEE.shape[1], len(hop_GG)
    states = states_PE(experts, ranks)
    power = ranks ** np.arange(experts, dtype=np.int64)[::-1]
    code_P = states @ power
    first_P = np.min(np.stack([renaming[states] @ power for renaming in symmetries(hop_GG)]), axis=0)
    orbit_codes, orbit_P = np.unique(first_P, return_inverse=True)
    head_QE = states[np.searchsorted(code_P, orbit_codes)]
    one_hot_PEG = one_hot_nEG(states, ranks)
    flat_XP = np.ascontiguousarray(one_hot_PEG.reshape(len(states), -1).T)
    barred = _barred_LP(one_hot_PEG, load_LE, cap_L, len(transitions_LEE) + 1)
    best_LQ = [np.where(barred[0], np.inf, 0.0)[np.searchsorted(code_P, orbit_codes)]]
    for layer, table in enumerate(transitions_LEE):
        reach_P = np.where(barred[layer], np.inf, best_LQ[-1][orbit_P])
        cost_Q = np.empty(len(head_QE))
        step = max(1, _CHUNK_CELLS // len(states))
        for start in range(0, len(head_QE), step):
            cost_QP = _pull(table, head_QE[start : start + step], hop_GG) @ flat_XP
            cost_QP += reach_P
            cost_Q[start : start + step] = cost_QP.min(axis=1)
        best_LQ.append(np.where(barred[layer + 1][np.searchsorted(code_P, orbit_codes)], np.inf, cost_Q))
    total = float(best_LQ[-1].min())
    if not np.isfinite(total):
        raise InfeasibleError("affinity: no placement with equal experts per rank keeps the load cap in every layer; raise load_slack")
    group = np.empty((len(transitions_LEE) + 1, experts), dtype=np.int64)
    group[-1] = head_QE[int(best_LQ[-1].argmin())]
    for layer in range(len(transitions_LEE) - 1, -1, -1):
        reach_P = np.where(barred[layer], np.inf, best_LQ[layer][orbit_P])
        group[layer] = states[int((reach_P + (_pull(transitions_LEE[layer], group[layer + 1][None], hop_GG) @ flat_XP)[0]).argmin())]
    return group, total


def _pull(table_EE: np.ndarray, next_nE: np.ndarray, hop_GG: np.ndarray) -> np.ndarray:
    """Return float64 [n, E·G]: cost of every expert on every rank, given placements of the next layer."""
    flow = np.matmul(table_EE, one_hot_nEG(next_nE, len(hop_GG)))
    return (flow @ hop_GG.T).reshape(len(next_nE), -1)


def _barred_LP(one_hot_PEG: np.ndarray, load_LE: np.ndarray | None, cap_L: np.ndarray | None, layers: int) -> np.ndarray:
    if load_LE is None or cap_L is None:
        return np.zeros((layers, len(one_hot_PEG)), dtype=bool)
    return np.stack([np.einsum("peg,e->pg", one_hot_PEG, load).max(axis=1) > cap * (1 + 10 * CAP_SLACK) for load, cap in zip(load_LE, cap_L, strict=True)])
