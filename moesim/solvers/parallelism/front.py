"""Pareto fronts of points that minimise every column, and the test that prunes.

A point is dominated if another is no worse in every column and better in one; equal points are kept once, the one with the smallest key. A bound that is
dominated cannot hide a point of the front, because the same point dominates everything at or above the bound. Shapes: N points, D columns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK = 1 << 22
"""Comparisons made at once."""


def dominated_N(values_ND: np.ndarray, front_FD: np.ndarray) -> np.ndarray:
    """Return bool [N]: is a point strictly dominated by one of the front?"""
    result = np.zeros(len(values_ND), dtype=bool)
    if not len(front_FD) or not len(values_ND):
        return result
    step = max(1, BLOCK // len(front_FD))
    for start in range(0, len(values_ND), step):
        part = values_ND[start : start + step]
        no_worse = np.ones((len(part), len(front_FD)), dtype=bool)
        better = np.zeros((len(part), len(front_FD)), dtype=bool)
        for column in range(values_ND.shape[1]):
            no_worse &= front_FD[None, :, column] <= part[:, None, column]
            better |= front_FD[None, :, column] < part[:, None, column]
        result[start : start + step] = (no_worse & better).any(axis=1)
    return result


def nondominated(values_ND: np.ndarray) -> np.ndarray:
    """Return the indices of the points that none dominates, equal ones included, in lexicographic order."""
    order = np.lexsort(values_ND.T[::-1])
    kept: list[int] = []
    left = order
    while len(left):
        # The lexicographically first point is dominated by none of the others.
        first = values_ND[left[0]]
        same = (values_ND[left] == first).all(axis=1)
        kept += left[same].tolist()
        left = left[~same & (values_ND[left] < first).any(axis=1)]
    return np.array(kept, dtype=np.int64)


@dataclass(slots=True)
class Front:
    """A growing front; every point carries an item, a tuple that also orders equal points."""

    columns: int
    values_FD: np.ndarray = field(init=False)
    items: list[tuple[Any, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values_FD = np.zeros((0, self.columns))

    def add(self, values_ND: np.ndarray, items: list[tuple[Any, ...]]) -> bool:
        """Merge points into the front; return whether it has changed."""
        alive = ~self.dominates(values_ND)
        if not alive.any():
            return False
        kept = np.flatnonzero(alive)
        kept = kept[nondominated(values_ND[kept])]
        best: dict[tuple[float, ...], tuple[Any, ...]] = {}
        stay = ~dominated_N(self.values_FD, values_ND[kept])
        for index in np.flatnonzero(stay).tolist():
            best[tuple(self.values_FD[index].tolist())] = self.items[index]
        for index in kept.tolist():
            place = tuple(values_ND[index].tolist())
            if place not in best or items[index] < best[place]:
                best[place] = items[index]
        self.values_FD = np.array(list(best), dtype=np.float64)
        self.items = list(best.values())
        return True

    def dominates(self, values_ND: np.ndarray) -> np.ndarray:
        """Return bool [N]: is a point (or a bound) strictly dominated?"""
        return dominated_N(values_ND, self.values_FD)
