"""Naming the groups of every layer: which group goes to which rank, when the groups themselves are settled.

On a flat fabric the cost of a layer pair depends only on the relative labels, so one assignment problem per pair
is exact; with one expert per rank this solves the whole problem exactly. With nodes it is a good start.
Shapes: L layers, E experts, G ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.affinity.descent import neighbour_gain_nEG
from moesim.solvers.assignment import assign


def label_LE(transitions_LEE: np.ndarray, group_LE: np.ndarray, hop_GG: np.ndarray) -> np.ndarray:
    """Return int64 [L, E]: the same groups, those of every layer after the first assigned to the ranks of least hop cost."""
    result = np.array(group_LE, dtype=np.int64)
    ranks = len(hop_GG)
    for layer, table in enumerate(transitions_LEE):
        gain = neighbour_gain_nEG(table[None], result[layer : layer + 2], slice(1, 2), hop_GG)[0]
        cost = -np.stack([gain[group_LE[layer + 1] == one].sum(axis=0) for one in range(ranks)])
        result[layer + 1] = assign(cost)[result[layer + 1]]
    return result
