"""Which copy of an expert serves a decode batch: one alone activates fewer slots than a split.

See `moesim.solvers.objective.Decode` for how likely a slot is to be active. Shapes: K windows, L layers, E experts, S slots.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.objective import Decode
from moesim.solvers.problem import PlacementProblem


def serve_once_LS(problem: PlacementProblem, table_LS: np.ndarray, decode: Decode) -> np.ndarray:
    """Return float64 [L, S]: shares of 0 and 1 that let one copy of every expert serve all its tokens, on the rank that it burdens least."""
    activity = np.einsum("k,kle->le", problem.weight_K, decode.active(decode.pick_KLE(problem.load_KLE)))
    share = np.zeros(table_LS.shape)
    ranks = problem.slot_rank_S
    for layer, row in enumerate(table_LS):
        load = np.zeros(problem.num_ranks)
        copies = np.bincount(row[row >= 0], minlength=problem.num_experts)
        # experts without a choice first, then the most active
        for expert in np.lexsort((-activity[layer], copies > 1)):
            if not copies[expert]:  # the layer does not have it
                continue
            slots = np.flatnonzero(row == expert)
            burden = (load[ranks[slots]] + activity[layer, expert]) / problem.speed_R[ranks[slots]]
            slot = slots[int(burden.argmin())]
            share[layer, slot] = 1.0
            load[ranks[slot]] += activity[layer, expert]
    return share


def activated_L(problem: PlacementProblem, table_LS: np.ndarray, share_LS: np.ndarray, decode: Decode) -> np.ndarray:
    """Return float64 [L]: expected activated experts at the slowest rank under any shares, averaged over windows."""
    result = np.zeros(problem.num_layers)
    keys = problem.slot_rank_S[None, :] + np.arange(problem.num_layers)[:, None] * problem.num_ranks
    for pick, weight in zip(decode.pick_KLE(problem.load_KLE), problem.weight_K, strict=True):
        active = decode.active(np.take_along_axis(pick, np.maximum(table_LS, 0), axis=1) * share_LS * (table_LS >= 0))
        rank = np.bincount(keys.ravel(), weights=active.ravel(), minlength=problem.num_layers * problem.num_ranks).reshape(-1, problem.num_ranks)
        result += weight * (rank / problem.speed_R).max(axis=1)
    return result
