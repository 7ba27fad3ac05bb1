"""Distributions that take bounded memory: exact up to a limit, then a histogram whose bins are 0.2 % wide."""

from __future__ import annotations

from array import array

import numpy as np

EXACT = 1 << 18
"""Values that are kept; their percentiles are exact."""
_BINS = 512
"""Bins per octave."""
_ZERO = -(1 << 40)
"""Bin of 0."""
PERCENTILES = (50, 95, 99)


class Sample:
    """Values >= 0 of one quantity."""

    def __init__(self, exact: int = EXACT) -> None:
        self.total = 0.0
        self._limit = exact
        self._values = array("d")
        self._runs: list[tuple[float, float, int]] = []
        """First value, growth and number of values that grow evenly."""
        self._in_runs = 0
        self._binned = 0
        self._bins: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Take one value."""
        self.total += value
        self._values.append(value)
        if len(self._values) >= self._limit:
            self._empty()

    def extend(self, first: float, growth: float, count: int) -> None:
        """Take so many values, each larger by `growth` than the one before."""
        self.total += count * (first + 0.5 * (count - 1) * growth)
        self._runs.append((first, growth, count))
        self._in_runs += count
        if self._in_runs >= self._limit:
            self._empty()

    def _unbinned(self) -> np.ndarray:
        """Return the values that are kept."""
        first, growth, count = np.array(self._runs).reshape(-1, 3).T
        counts = count.astype(np.int64)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return np.concatenate([self._values, np.repeat(first, counts) + place * np.repeat(growth, counts)])

    def _empty(self) -> None:
        keys, counts = np.unique(_bins(self._unbinned()), return_counts=True)
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            self._bins[key] = self._bins.get(key, 0) + count
        self._binned = self.count
        self._values, self._runs, self._in_runs = array("d"), [], 0

    @property
    def count(self) -> int:
        """Values taken."""
        return self._binned + len(self._values) + self._in_runs

    @property
    def mean(self) -> float:
        """Mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, *shares: float) -> list[float]:
        """Return percentiles (0..100): exact and linear between neighbours as long as all values are kept, else the middle of a bin."""
        if not self.count:
            return [0.0 for _ in shares]
        if not self._bins:
            return [float(one) for one in np.percentile(self._unbinned(), shares)]
        bins = dict(self._bins)
        for key in _bins(self._unbinned()).tolist():
            bins[key] = bins.get(key, 0) + 1
        keys = sorted(bins)
        reached = np.cumsum([bins[key] for key in keys])
        return [_middle(keys[int(np.searchsorted(reached, share / 100 * (self.count - 1), side="right"))]) for share in shares]

    def summary(self, scale: float = 1e3) -> dict[str, float] | None:
        """Return mean, p50, p95 and p99 times `scale`; None of nothing."""
        if not self.count:
            return None
        return {"mean": self.mean * scale} | {f"p{share}": value * scale for share, value in zip(PERCENTILES, self.percentile(*PERCENTILES), strict=True)}


def _bins(values: np.ndarray) -> np.ndarray:
    mantissa, exponent = np.frexp(values)
    bins = exponent.astype(np.int64) * _BINS + ((mantissa - 0.5) * 2 * _BINS).astype(np.int64)
    return np.where(values > 0.0, bins, _ZERO)


def _middle(key: int) -> float:
    if key == _ZERO:
        return 0.0
    exponent, part = divmod(key, _BINS)
    return float((0.5 + (part + 0.5) / (2 * _BINS)) * 2.0**exponent)
