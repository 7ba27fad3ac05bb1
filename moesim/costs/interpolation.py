"""Interpolation in work: linear between grid keys, on tile-rounded sizes.

A GPU works in tiles, so 65 rows cost what 80 or 128 do: a curve is linear in `work(x)`, the size rounded up to the tile, and in x itself
where two keys fall into one tile. Every grid key is reproduced exactly. Below the first key the first value holds (launch-bound);
above the last one a curve's time grows in proportion to work, a grid's linearly with the slope of its last cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.costs.provenance import Provenance, Timing

Work = Callable[[np.ndarray], np.ndarray]
_MEASURED, _INTERPOLATED, _CALIBRATED = (np.uint8(code) for code in (Provenance.MEASURED, Provenance.INTERPOLATED, Provenance.CALIBRATED))


def identity(x: np.ndarray) -> np.ndarray:
    """Return x: work in proportion to size, without tiles."""
    return x


def tiles(*steps: tuple[float, float]) -> Work:
    """Return a work function that rounds up to `tile` below `limit`, for steps (limit, tile) with growing limits; the last limit is infinity."""

    def work(x: np.ndarray) -> np.ndarray:
        limit, tile = steps[-1]
        result = np.ceil(x / tile) * tile
        for limit, tile in reversed(steps[:-1]):
            result = np.where(x <= limit, np.ceil(x / tile) * tile, result)
        return result

    return work


def quadratic(offset: float) -> Work:
    """Return work of causal attention in the prompt length, x·(x + offset): the offset stands for the parts linear in x."""
    return lambda x: x * (x + offset)


@dataclass(frozen=True, slots=True)
class Bracket:
    """Position of queries on an axis: between keys `low` and `low + 1`, at `weight`; `beyond` scales time above the last key."""

    low: np.ndarray
    weight: np.ndarray
    beyond: np.ndarray
    on_key: np.ndarray
    inside: np.ndarray


def bracket(keys: np.ndarray, query: np.ndarray, work: Work, *, extend: bool = False) -> Bracket:
    """Locate `query` on the sorted axis `keys` (at least one key); `extend` lets the weight exceed 1 above the last key instead of scaling."""
    if len(keys) == 1:
        shape = query.shape
        growth = np.maximum(work(query) / work(keys[:1].astype(np.float64)), 1.0)
        return Bracket(np.zeros(shape, dtype=np.intp), np.zeros(shape), growth, query == keys[0], query == keys[0])
    low = np.clip(np.searchsorted(keys, query, side="right") - 1, 0, len(keys) - 2)
    left, right = keys[low], keys[low + 1]
    inner = np.clip(query, keys[0], np.inf if extend else keys[-1])
    work_left, work_right, work_query = work(left), work(right), work(inner)
    same = work_right <= work_left
    weight = np.where(same, inner - left, work_query - work_left) / np.where(same, right - left, work_right - work_left)
    last = float(work(keys[-1:].astype(np.float64))[0])
    beyond = np.ones(query.shape) if extend else np.where(query > keys[-1], work(np.maximum(query, keys[-1])) / last, 1.0)
    return Bracket(low, weight, beyond, (query == left) | (query == right), (query >= keys[0]) & (query <= keys[-1]))


@dataclass(frozen=True, slots=True)
class Curve:
    """Time against one size."""

    keys: np.ndarray
    """Sorted, distinct sizes."""
    seconds: np.ndarray
    work: Work = identity

    def __call__(self, query: np.ndarray) -> Timing:
        """Return the time at every size of `query`."""
        at = bracket(self.keys, query, self.work)
        high = np.minimum(at.low + 1, len(self.keys) - 1)
        # The two-product form returns the grid value exactly at weight 0 and 1.
        seconds = (self.seconds[at.low] * (1.0 - at.weight) + self.seconds[high] * at.weight) * at.beyond
        return Timing(seconds=seconds, provenance=np.where(at.on_key, _MEASURED, np.where(at.inside, _INTERPOLATED, _CALIBRATED)))

    def seconds_at(self, query: np.ndarray) -> np.ndarray:
        """Return the seconds alone; where work is size, one library interpolation instead of a dozen array passes."""
        if self.work is not identity or len(self.keys) == 1:
            return self(query).seconds
        seconds = np.interp(query, self.keys, self.seconds)
        return seconds * np.maximum(query / self.keys[-1], 1.0) if query.size and query.max() > self.keys[-1] else seconds


@dataclass(frozen=True, slots=True)
class Grid:
    """Time against two sizes; cells that were not measured are filled by proportion and count as calibrated."""

    rows: np.ndarray
    columns: np.ndarray
    seconds: np.ndarray
    """float64 [rows, columns], complete."""
    measured: np.ndarray
    """bool [rows, columns]."""
    row_work: Work = identity
    column_work: Work = identity

    @classmethod
    def build(cls, row: np.ndarray, column: np.ndarray, seconds: np.ndarray, *, row_work: Work = identity, column_work: Work = identity) -> Grid:
        """Arrange samples on their grid (repeated keys are averaged) and fill the holes in proportion to work."""
        rows, row_index = np.unique(row, return_inverse=True)
        columns, column_index = np.unique(column, return_inverse=True)
        shape = (len(rows), len(columns))
        flat = row_index * shape[1] + column_index
        count = np.bincount(flat, minlength=shape[0] * shape[1]).reshape(shape)
        sums = np.bincount(flat, weights=seconds, minlength=shape[0] * shape[1]).reshape(shape)
        measured = count > 0
        table = np.where(measured, sums / np.maximum(count, 1), np.nan)
        down, across = row_work(rows.astype(np.float64)), column_work(columns.astype(np.float64))
        # Holes lie at large rows × columns, where time is linear in work along a row.
        for j in range(2, shape[1]):
            step = (table[:, j - 1] - table[:, j - 2]) * (across[j] - across[j - 1]) / (across[j - 1] - across[j - 2])
            table[:, j] = np.where(np.isnan(table[:, j]), table[:, j - 1] + np.maximum(step, 0.0), table[:, j])
        for i in range(1, shape[0]):
            table[i] = np.where(np.isnan(table[i]), table[i - 1] * (down[i] / down[i - 1]), table[i])
        for i in range(shape[0] - 2, -1, -1):
            table[i] = np.where(np.isnan(table[i]), table[i + 1], table[i])
        return cls(rows.astype(np.float64), columns.astype(np.float64), table, measured, row_work, column_work)

    def __call__(self, row: np.ndarray, column: np.ndarray) -> Timing:
        """Return the time at every pair of sizes."""
        row, column = np.broadcast_arrays(row, column)
        down, across = bracket(self.rows, row, self.row_work, extend=True), bracket(self.columns, column, self.column_work, extend=True)
        seconds, at_edge = np.zeros(row.shape), np.zeros(row.shape)
        known = down.inside & across.inside
        for i, weight_i, edge_i in _corners(down, len(self.rows)):
            for j, weight_j, edge_j in _corners(across, len(self.columns)):
                seconds = seconds + weight_i * weight_j * self.seconds[i, j]
                at_edge = at_edge + edge_i * edge_j * self.seconds[i, j]
                known = known & (self.measured[i, j] | (weight_i * weight_j == 0))
        # Noise must not make a larger size cheaper than the border of the grid.
        seconds = np.where(down.inside & across.inside, seconds, np.maximum(seconds, at_edge) * down.beyond * across.beyond)
        codes = np.where(known, np.where(down.on_key & across.on_key, _MEASURED, _INTERPOLATED), _CALIBRATED)
        return Timing(seconds=seconds, provenance=codes)


def _corners(at: Bracket, keys: int) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...]:
    """Return (index, weight, weight when held at the border) of both neighbours."""
    edge = np.minimum(at.weight, 1.0)
    return (at.low, 1.0 - at.weight, 1.0 - edge), (np.minimum(at.low + 1, keys - 1), at.weight, edge)


def drop_spikes(keys: np.ndarray, seconds: np.ndarray, factor: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Leave out inner points more than `factor` times both neighbours: a hiccup of the measurement, not a property of the size."""
    if len(keys) < 3:
        return keys, seconds
    spike = np.zeros(len(keys), dtype=bool)
    spike[1:-1] = (seconds[1:-1] > factor * seconds[:-2]) & (seconds[1:-1] > factor * seconds[2:])
    return keys[~spike], seconds[~spike]
