"""Distributions that take bounded memory: exact up to a limit, then a histogram whose bins are 0.2 % wide."""

from __future__ import annotations

from array import array
from math import frexp

import numpy as np

EXACT = 1 << 18
"""Values that are kept; their percentiles are exact."""
_BINS = 512
"""Bins per octave."""
PERCENTILES = (50, 95, 99)


class Sample:
    """Values >= 0 of one quantity."""

    def __init__(self, exact: int = EXACT) -> None:
        self.count = 0
        self.total = 0.0
        self._limit = exact
        self._values = array("d")
        self._bins: dict[int, int] = {}

    def add(self, value: float) -> None:
        """Take one value."""
        self.count += 1
        self.total += value
        self._values.append(value)
        if len(self._values) >= self._limit:
            self._empty()

    def extend(self, values: np.ndarray) -> None:
        """Take many values at once."""
        self.count += len(values)
        self.total += float(values.sum())
        self._values.frombytes(np.asarray(values, dtype=np.float64).tobytes())
        if len(self._values) >= self._limit:
            self._empty()

    def _empty(self) -> None:
        for one in self._values:
            key = _bin(one)
            self._bins[key] = self._bins.get(key, 0) + 1
        self._values = array("d")

    @property
    def mean(self) -> float:
        """Mean; 0 of nothing."""
        return self.total / self.count if self.count else 0.0

    def percentile(self, *shares: float) -> list[float]:
        """Return percentiles (0..100): exact and linear between neighbours as long as all values are kept, else the middle of a bin."""
        if not self.count:
            return [0.0 for _ in shares]
        values = np.frombuffer(self._values, dtype=np.float64) if len(self._values) else np.zeros(0)
        if not self._bins:
            return [float(one) for one in np.percentile(values, shares)]
        bins = dict(self._bins)
        for one in values.tolist():
            bins[_bin(one)] = bins.get(_bin(one), 0) + 1
        keys = sorted(bins)
        reached = np.cumsum([bins[key] for key in keys])
        return [_middle(keys[int(np.searchsorted(reached, share / 100 * (self.count - 1), side="right"))]) for share in shares]

    def summary(self, scale: float = 1e3) -> dict[str, float] | None:
        """Return mean, p50, p95 and p99 times `scale`; None of nothing."""
        if not self.count:
            return None
        return {"mean": self.mean * scale} | {f"p{share}": value * scale for share, value in zip(PERCENTILES, self.percentile(*PERCENTILES), strict=True)}


def _bin(value: float) -> int:
    if value <= 0.0:
        return -(1 << 40)
    mantissa, exponent = frexp(value)
    return exponent * _BINS + int((mantissa - 0.5) * 2 * _BINS)


def _middle(key: int) -> float:
    if key == -(1 << 40):
        return 0.0
    exponent, part = divmod(key, _BINS)
    return float((0.5 + (part + 0.5) / (2 * _BINS)) * 2.0**exponent)
