"""Where a number comes from: the provenance class that travels with every time.

A `Timing` is an array of seconds with a class per element. The classes are ordered from best to worst, so that the class of a
sum is the worst of the parts that matter. `Policy` is the one place that knows `--strict`: a fall-back to a class worse than
`TRACE` is refused there with the table and the key that is missing, and is reported (never silent) otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from moesim.errors import CostError

NEGLIGIBLE_SHARE = 0.1
"""A part below this share of a sum does not decide the class of the sum."""


class Provenance(IntEnum):
    """How a time was obtained; `name.lower()` in reports."""

    MEASURED = 0
    """A grid key of a table, at the table's own distribution."""
    INTERPOLATED = 1
    """Between grid keys of one table."""
    CALIBRATED = 2
    """A model fitted to tables."""
    TRACE = 3
    """A recorded kernel duration."""
    EXTRAPOLATED = 4
    """Transferred from another device."""
    ROOFLINE = 5
    """Peak rates times declared efficiencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Times of one operator on any number of ranks."""

    seconds: np.ndarray
    """float64, any shape."""
    provenance: np.ndarray
    """uint8 codes of `Provenance`, broadcastable to `seconds`."""

    def scaled(self, factor: float, worst: Provenance | None = None) -> Timing:
        """Return the times times `factor`, of class `worst` at best."""
        codes = self.provenance if worst is None else np.maximum(self.provenance, np.uint8(worst))
        return Timing(seconds=self.seconds * factor, provenance=codes)


def timing(seconds: np.ndarray | float, provenance: Provenance | np.ndarray) -> Timing:
    """Build a `Timing` from plain numbers."""
    codes = np.asarray(provenance, dtype=np.uint8)
    return Timing(seconds=np.asarray(seconds, dtype=np.float64), provenance=codes)


def total(*parts: Timing) -> Timing:
    """Add times; the class is the worst among the parts that take at least `NEGLIGIBLE_SHARE` of the sum."""
    seconds = parts[0].seconds
    for part in parts[1:]:
        seconds = seconds + part.seconds
    floor = seconds * NEGLIGIBLE_SHARE
    codes = np.zeros(seconds.shape, dtype=np.uint8)
    for part in parts:
        np.maximum(codes, np.where(part.seconds >= floor, part.provenance, np.uint8(0)), out=codes)
    return Timing(seconds=seconds, provenance=codes)


def zero_where(timed: Timing, empty: np.ndarray) -> Timing:
    """Return the times with 0 s (class measured: nothing is done) where `empty` holds."""
    return Timing(seconds=np.where(empty, 0.0, timed.seconds), provenance=np.where(empty, np.uint8(0), timed.provenance))


@dataclass(slots=True, kw_only=True)
class Policy:
    """Decides whether a fall-back is allowed, and remembers which were taken."""

    strict: bool
    place: str
    """Name of the cluster, for messages."""
    taken: dict[str, str] = field(default_factory=dict)
    """Operator → table and key that were missing."""

    def fall_back(self, operator: str, table: str, missing: str, to: Provenance) -> None:
        """Note that `operator` lacks `missing` in `table`; raise CostError if strict and `to` is worse than a recorded duration."""
        if self.strict and to > Provenance.TRACE:
            kind = f"{'an' if to is Provenance.EXTRAPOLATED else 'a'} {to.name.lower()}"
            raise CostError(
                f"{self.place}: {operator} needs table {table} with {missing}, which is missing; only {kind} estimate is left, and --strict "
                "refuses it: measure the key, choose hardware that has it, or drop --strict"
            )
        self.taken.setdefault(operator, f"{table}: {missing}")
