"""Affinity within a load cap: the busiest rank of a layer may carry only so much.

A placement above the cap is brought below it by swaps that pay for load with a multiplier, raised until every layer fits
(a layer that never fits takes its balanced placement); then only swaps that stay below the cap are made.
Shapes: L layers, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moesim.solvers.affinity.descent import neighbour_gain_nEG
from moesim.solvers.affinity.swap import SwapTerms, fits_n, swap_search_nE
from moesim.solvers.search import Deadline, expired

_RAISES = 12
"""Times that the price of load is raised, by a factor of 3 each."""


def force_cap_LE(start_LE: np.ndarray, ranks: int, terms: SwapTerms, balanced_LE: np.ndarray) -> np.ndarray:
    """Return the placement with every layer within its cap; layers that already are stay as they are.

    terms: gain or company, load and cap of every layer. balanced_LE: a placement within the cap.
    """
    group = np.array(start_LE, dtype=np.int64)
    assert terms.load_nE is not None and terms.cap_n is not None
    worth = np.zeros(len(group))
    for part in (terms.gain_nEG, terms.company_nEE):
        if part is not None:
            worth = np.maximum(worth, np.abs(part).max(axis=(1, 2)))
    price = np.maximum(worth, 1e-12) / np.maximum(terms.load_nE.mean(axis=1), 1e-300) / 9
    over = np.flatnonzero(~fits_n(group, terms.load_nE, terms.cap_n, ranks))
    for _ in range(_RAISES):
        if not over.size:
            break
        group[over] = swap_search_nE(group[over], ranks, replace(terms.take(over), penalty_n=price[over]))[0]
        over = over[~fits_n(group[over], terms.load_nE[over], terms.cap_n[over], ranks)]
        price *= 3
    group[over] = balanced_LE[over]
    return group


def capped_descend(
    transitions_LEE: np.ndarray,
    group_LE: np.ndarray,
    hop_GG: np.ndarray,
    load_LE: np.ndarray,
    cap_L: np.ndarray,
    balanced_LE: np.ndarray,
    *,
    sweeps: int = 30,
    deadline: Deadline = None,
) -> tuple[np.ndarray, int, bool]:
    """Return a placement within the cap that no swap improves, the sweeps made, and whether the deadline cut it short."""
    layers, ranks = len(group_LE), len(hop_GG)
    gain = neighbour_gain_nEG(transitions_LEE, group_LE, slice(0, layers, 1), hop_GG)
    group = force_cap_LE(group_LE, ranks, SwapTerms(gain_nEG=gain, load_nE=load_LE, cap_n=cap_L), balanced_LE)
    quiet = 0
    for half in range(2 * sweeps):
        if expired(deadline):
            return group, half // 2, True
        part = slice(half % 2, layers, 2)
        gain = neighbour_gain_nEG(transitions_LEE, group, part, hop_GG)
        better, rounds, _ = swap_search_nE(group[part], ranks, SwapTerms(gain_nEG=gain, load_nE=load_LE[part], cap_n=cap_L[part]))
        quiet = quiet + 1 if rounds <= 1 else 0
        group[part] = better
        if quiet >= 2:
            return group, half // 2 + 1, False
    return group, sweeps, False
