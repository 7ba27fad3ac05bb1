"""Scores of a batch of both phases: what one kernel for a prompt chunk and decoding sequences takes over a kernel for each phase.

In one call decoding sequences run in tiles made for prompts, and long caches are not split over SMs, so that a mixed batch can take several times the sum.
The factor is that of the device's table of mixed batches, at the cells of its complete grid of powers of two, multilinear between them and that of the
border beyond; 1 where the device has no table of the head shape. Shapes: n batches; axes: chunk, cached prefix, decoding sequences, their KV length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

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

    @classmethod
    def build(cls, tables: Tables, shape: dict[str, int | str], apart: Apart) -> MixedBatches | None:
        """Return the factor of a head shape; None without a complete grid on this device."""
        rows = tables.rows(KIND, *AXES, "latency_s", where=shape, transfer=False) if tables.own(KIND) else None
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
