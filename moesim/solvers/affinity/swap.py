"""Swap search in many layers at once: experts of two ranks change places while that pays.

Minimised per layer: -Σ_e gain[e, rank of e] - Σ over ranks of the company of their experts + penalty · Σ over ranks of the
load above the cap. `company` is symmetric (co-activation); a layer without penalty and with a cap never leaves the cap.
Swaps between disjoint pairs of ranks add up exactly, so up to G / 2 are made per round.
Shapes: n layers, E experts, G ranks, C = E / G experts per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.solvers.affinity.problem import rank_load_LG
from moesim.solvers.affinity.transport import TOLERANCE, apply_swaps, one_hot_nEG, tables_nGC
from moesim.solvers.search import Deadline, expired

CAP_SLACK = 1e-9
"""Relative rounding room when a load is compared with its cap."""
_CHUNK_CELLS = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapTerms:
    """What a swap changes; None: the term is absent."""

    gain_nEG: np.ndarray | None = None
    """float64: gain of every expert on every rank."""
    company_nEE: np.ndarray | None = None
    """float64, symmetric, zero diagonal: gain of two experts on one rank."""
    overlap_nEE: np.ndarray | None = None
    """float64, symmetric: half of what the gains overstate when two experts change places."""
    load_nE: np.ndarray | None = None
    """float64: load of every expert."""
    cap_n: np.ndarray | None = None
    """float64: most load of a rank; needs `load_nE`."""
    penalty_n: np.ndarray | None = None
    """float64: cost of a unit of load above the cap; None: a swap may not raise any rank above the cap."""

    def take(self, rows: np.ndarray) -> SwapTerms:
        """Return the terms of some layers."""
        parts = (self.gain_nEG, self.company_nEE, self.overlap_nEE, self.load_nE, self.cap_n, self.penalty_n)
        gain, company, overlap, load, cap, penalty = (None if part is None else part[rows] for part in parts)
        return SwapTerms(gain_nEG=gain, company_nEE=company, overlap_nEE=overlap, load_nE=load, cap_n=cap, penalty_n=penalty)

    def scale_n(self, n: int) -> np.ndarray:
        """Return float64 [n]: a win that is certainly more than rounding."""
        scale = np.full(n, 1e-300)
        for part in (self.gain_nEG, self.company_nEE):
            if part is not None:
                scale = np.maximum(scale, np.abs(part).reshape(n, -1).max(axis=1))
        if self.penalty_n is not None and self.load_nE is not None:
            scale = np.maximum(scale, self.penalty_n * self.load_nE.max(axis=1))
        return scale * TOLERANCE


def swap_search_nE(start_nE: np.ndarray, ranks: int, terms: SwapTerms, *, max_rounds: int = 2000, deadline: Deadline = None) -> tuple[np.ndarray, int, bool]:
    """Return a placement that no swap improves, the rounds made, and whether the deadline cut it short."""
    group = np.array(start_nE, dtype=np.int64)
    active = np.arange(len(group) if ranks > 1 else 0)
    for done in range(max_rounds):
        if not active.size:
            return group, done, False
        if expired(deadline):
            return group, done, True
        group[active], moved = swap_round_nE(group[active], ranks, terms.take(active))
        active = active[moved]
    return group, max_rounds, False


def swap_round_nE(group_nE: np.ndarray, ranks: int, terms: SwapTerms, *, single: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the placement after one round of swaps, and bool [n]: layers with a swap. single: only the best swap of every layer."""
    group = np.array(group_nE, dtype=np.int64)
    moved = np.zeros(len(group), dtype=bool)
    step = max(1, _CHUNK_CELLS // group.shape[1] ** 2)
    for start in range(0, len(group), step):
        part, some = group[start : start + step], terms.take(np.arange(start, min(start + step, len(group))))
        loss, mover = _best_swaps(part, ranks, some)
        moved[start : start + step] = apply_swaps(loss, mover, part, some.scale_n(len(part)), most=1 if single else ranks // 2)
    return group, moved


def _best_swaps(group_nE: np.ndarray, ranks: int, terms: SwapTerms) -> tuple[np.ndarray, np.ndarray]:
    """Return the least loss [n, G, G] of a swap between two ranks, and the expert that leaves the first for the second."""
    n, experts = group_nE.shape
    size = experts // ranks
    table = tables_nGC(group_nE, ranks)
    order = table.reshape(n, experts)
    gain = np.zeros((n, experts, ranks)) if terms.gain_nEG is None else terms.gain_nEG
    if terms.company_nEE is not None:
        gain = gain + np.matmul(terms.company_nEE, one_hot_nEG(group_nE, ranks))
    gain = np.take_along_axis(gain, order[:, :, None], axis=1)
    own = np.repeat(np.arange(ranks), size)
    half = np.repeat(gain[:, np.arange(experts), own][:, :, None] - gain, size, axis=2)
    fixed = np.zeros((n, ranks))
    if terms.load_nE is not None and terms.cap_n is not None:
        load = np.take_along_axis(terms.load_nE, order, axis=1)
        excess = load.reshape(n, ranks, size).sum(axis=2) - terms.cap_n[:, None]
        after = np.repeat(excess, size, axis=1)[:, :, None] + load[:, None, :] - load[:, :, None]
        if terms.penalty_n is None:
            half += np.where(after > terms.cap_n[:, None, None] * CAP_SLACK, np.inf, 0.0)
        else:
            half += np.maximum(after, 0.0) * terms.penalty_n[:, None, None]
            fixed = np.maximum(excess, 0.0) * terms.penalty_n[:, None]
    loss = half + half.transpose(0, 2, 1)
    for shared in (terms.company_nEE, terms.overlap_nEE):
        if shared is not None:
            loss += 2.0 * shared[np.arange(n)[:, None, None], order[:, :, None], order[:, None, :]]
    flat = loss.reshape(n, ranks, size, ranks, size).transpose(0, 1, 3, 2, 4).reshape(n, ranks, ranks, size * size)
    slot = flat.argmin(axis=3)
    best = np.take_along_axis(flat, slot[..., None], axis=3)[..., 0] - fixed[:, :, None] - fixed[:, None, :]
    one, other = np.triu_indices(ranks, 1)
    mover = np.zeros((n, ranks, ranks), dtype=np.int64)
    row = np.arange(n)[:, None]
    mover[:, one, other] = table[row, one, slot[:, one, other] // size]
    mover[:, other, one] = table[row, other, slot[:, one, other] % size]
    symmetric = np.full_like(best, np.inf)
    symmetric[:, one, other] = best[:, one, other]
    return symmetric, mover


def fits_n(group_nE: np.ndarray, load_nE: np.ndarray, cap_n: np.ndarray, ranks: int) -> np.ndarray:
    """Return bool [n]: layers whose busiest rank is within the cap."""
    return np.asarray(rank_load_LG(group_nE, load_nE, ranks).max(axis=1) <= cap_n * (1 + 10 * CAP_SLACK))
