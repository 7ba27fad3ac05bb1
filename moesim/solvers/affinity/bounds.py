"""Certified upper bounds on what any placement with equal experts per rank can keep together.

`kept_bound`: transition weight of a layer pair that stays on a rank. Of these the smallest counts:
- degree: an expert shares its rank with C experts of the other layer; Lagrange multipliers on rows and columns;
- spectrum: the co-location matrix is 1/G everywhere plus a part of rank G - 1 and norm C that ignores the mean.
`company_bound` is the same for pairs inside a layer. Shapes: n layer pairs or layers, E experts, G ranks, C = E / G.
"""

from __future__ import annotations

import numpy as np

SAFETY = 1e-7
"""Relative room for rounding in singular values."""


def kept_bound_n(weight_nEE: np.ndarray, ranks: int, rounds: int = 6) -> np.ndarray:
    """Return float64 [n]: no placement keeps more of the weight of a layer pair than this."""
    size = weight_nEE.shape[1] // ranks
    total = weight_nEE.sum(axis=(1, 2))
    row = np.zeros(weight_nEE.shape[:2])
    best = total.copy()
    for _ in range(rounds):
        column = _threshold(weight_nEE - row[:, :, None], size, axis=1)
        row = _threshold(weight_nEE - column[:, None, :], size, axis=2)
        over = np.maximum(weight_nEE - row[:, :, None] - column[:, None, :], 0.0).sum(axis=(1, 2))
        bound = over + size * (row.sum(axis=1) + column.sum(axis=1))
        if (bound >= best * (1 - 1e-6)).all():
            break
        best = np.minimum(best, bound)
    centred = weight_nEE - weight_nEE.mean(axis=1, keepdims=True)
    centred = centred - centred.mean(axis=2, keepdims=True)
    if ranks > 1:
        # the roots of the eigenvalues of A·Aᵀ cost half of a singular value decomposition; `SAFETY` covers what the squares lose
        square = np.linalg.eigvalsh(np.matmul(centred, centred.transpose(0, 2, 1)))[:, weight_nEE.shape[1] - ranks + 1 :]
        values = np.sqrt(np.maximum(square, 0.0)) + SAFETY * np.sqrt(np.maximum(square[:, -1:], 0.0))
        best = np.minimum(best, total / ranks + size * values.sum(axis=1))
    return best


def _threshold(weight_nEE: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Return the value between the C-th and the next largest weight along an axis, which minimises the dual there."""
    experts = weight_nEE.shape[axis]
    if size >= experts:
        return np.asarray(weight_nEE.min(axis=axis))
    two = np.partition(weight_nEE, (experts - size - 1, experts - size), axis=axis)
    return np.asarray(two.take([experts - size - 1, experts - size], axis=axis).mean(axis=axis))


def company_bound_n(company_nEE: np.ndarray, ranks: int) -> np.ndarray:
    """Return float64 [n]: no placement puts more weight of expert pairs (each counted once) on common ranks than this.

    company_nEE: symmetric, with a diagonal of 0.
    """
    experts = company_nEE.shape[1]
    size = experts // ranks
    total = company_nEE.sum(axis=(1, 2))
    if size < 2:
        return np.zeros(len(total))
    nearest = np.partition(company_nEE, experts - size, axis=2)[:, :, experts - size + 1 :]
    best = np.minimum(total, nearest.sum(axis=(1, 2)))
    centred = company_nEE - company_nEE.mean(axis=1, keepdims=True)
    centred = centred - centred.mean(axis=2, keepdims=True)
    if ranks > 1:
        values = np.maximum(np.linalg.eigvalsh((centred + centred.transpose(0, 2, 1)) / 2)[:, experts - ranks + 1 :], 0.0)
        best = np.minimum(best, total / ranks + size * (values.sum(axis=1) + SAFETY * values[:, -1] * ranks))
    return best / 2
