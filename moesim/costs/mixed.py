"""Scores of a batch of both phases: what one kernel for a prompt chunk and decoding sequences takes over a kernel for each phase.

In one call decoding sequences run in tiles made for prompts, and long caches are not split over SMs, so that a mixed batch can take several times the sum.
The factor is that of the device's table of mixed batches, at the cells of its complete grid of powers of two, multilinear between them and that of the
border beyond; 1 where neither the device nor its donor has a table of the head shape.
Shapes: n batches; axes: chunk, cached prefix, decoding sequences, their KV length.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import numpy as np

from moesim.costs.tables import Tables

KIND = "attn_mixed"
AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
Apart = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Seconds of both phases apart, from the four coordinates."""


class MixedBatches:
    """The factor over a grid."""

    def __init__(self, axes: list[np.ndarray], factor: np.ndarray) -> None:
        """axes: ascending coordinates of every axis; factor: one value per combination."""
        self._axes, self._factor = axes, factor
        self._keys: list[list[float]] = [values.tolist() for values in axes]
        self._nested: list[Any] = factor.tolist()

    @classmethod
    def build(cls, tables: Tables, shape: dict[str, int | str], apart: Apart) -> MixedBatches | None:
        """Return the factor of a head shape; None without a complete grid, the device's own or, where the times of both phases are its donor's, that one's."""
        rows = tables.rows(KIND, *AXES, "latency_s", where=shape, transfer=not tables.own("attn_generation"))
        if rows is None:
            return None
        at = np.stack([rows[name] for name in AXES]).astype(np.int64)
        kept = ((at & (at - 1)) == 0).all(axis=0)
        axes = [np.unique(values[kept]) for values in at]
        if kept.sum() != np.prod([len(values) for values in axes]) or min(len(values) for values in axes) < 2:
            return None
        order = np.lexsort(at[::-1, kept])
        cells = at[:, kept][:, order].astype(np.float64)
        factor = rows["latency_s"][kept][order] / apart(*cells)
        return cls([values.astype(np.float64) for values in axes], factor.reshape([len(values) for values in axes]))

    def __call__(self, *coordinates: np.ndarray) -> np.ndarray:
        """Return the factor [n] at four coordinates [n]."""
        low, weight = [], []
        for values, wanted in zip(self._axes, coordinates, strict=True):
            clipped = np.clip(wanted, values[0], values[-1])
            index = np.clip(np.searchsorted(values, clipped, side="right") - 1, 0, len(values) - 2)
            low.append(index)
            weight.append((clipped - values[index]) / (values[index + 1] - values[index]))
        found = np.zeros(np.shape(coordinates[0]))
        for corner in itertools.product((0, 1), repeat=len(self._axes)):
            share = np.prod([w if up else 1.0 - w for up, w in zip(corner, weight, strict=True)], axis=0)
            found = found + share * self._factor[tuple(index + up for index, up in zip(low, corner, strict=True))]
        return found

    def at(self, *coordinates: float) -> float:
        """Return the factor at four single coordinates, far faster than for an array of one."""
        places = []
        for keys, wanted in zip(self._keys, coordinates, strict=True):
            index = min(max(bisect_right(keys, wanted) - 1, 0), len(keys) - 2)
            share = (wanted - keys[index]) / (keys[index + 1] - keys[index])
            places.append((index, min(max(share, 0.0), 1.0)))
        return _within(self._nested, places, 0)


def factor_of(found: MixedBatches | None, chunk: np.ndarray, prefix: np.ndarray, decodes: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Return the factor of batches, 1 for those of one phase and without a table."""
    both = (np.asarray(chunk) > 0) & (np.asarray(decodes) > 0)
    return np.ones(both.shape) if found is None else np.where(both, found(chunk, prefix, decodes, context), 1.0)


def _within(nested: Any, places: list[tuple[int, float]], axis: int) -> float:
    if axis == len(places):
        return float(nested)
    index, share = places[axis]
    low = _within(nested[index], places, axis + 1)
    return low + share * (_within(nested[index + 1], places, axis + 1) - low) if share else low
