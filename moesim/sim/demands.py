"""What gates demand, by position and key, without any time: the future that oracles see, and hits alone.

Shapes: T steps, L layers, K experts demanded, -1 where there are fewer. A position is step · L + layer, a key layer · E + expert.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from moesim.sim.cache import Cache, CacheSettings, Counts


class Future:
    """The demands to come, for oracle policies."""

    def __init__(self, routes_TLK: np.ndarray, num_experts: int) -> None:
        steps, layers, width = routes_TLK.shape
        position = np.repeat(np.arange(steps * layers), width)
        flat = routes_TLK.reshape(-1)
        keys = (position % layers) * num_experts + flat
        keys, position = keys[flat >= 0], position[flat >= 0]
        order = np.argsort(keys, kind="stable")
        self._positions: list[int] = position[order].tolist()
        self._first: list[int] = np.searchsorted(keys[order], np.arange(layers * num_experts + 1)).tolist()

    def next_use(self, key: int, position: int) -> float:
        """Return the first position after `position` that demands `key`; inf if none does."""
        end = self._first[key + 1]
        index = bisect_right(self._positions, position, self._first[key], end)
        return self._positions[index] if index < end else float("inf")

    def uses_within(self, key: int, position: int, until: int) -> int:
        """Return how many positions in (position, until] demand `key`."""
        low, high = self._first[key], self._first[key + 1]
        return bisect_right(self._positions, until, low, high) - bisect_right(self._positions, position, low, high)


def count_hits(
    routes_TLK: np.ndarray, num_experts: int, settings: CacheSettings, *, expert_bytes: int = 1, predicted_TLK: np.ndarray | None = None, lookahead: int = 1
) -> Counts:
    """Count hits and misses of demands alone, as if every transfer took no time.

    routes_TLK: int, distinct experts of every step and layer, -1 where there are fewer. predicted_TLK: likewise, made `lookahead` layers ahead.
    """
    steps, layers, _ = routes_TLK.shape
    future = Future(routes_TLK, num_experts)
    cache = Cache(settings, num_layers=layers, num_experts=num_experts, bytes_of=[expert_bytes] * (layers * num_experts), future=future)
    demands = keys_by_position(routes_TLK, num_experts)
    predicted = keys_by_position(predicted_TLK, num_experts) if predicted_TLK is not None else None
    counts = Counts()
    for position, keys in enumerate(demands):
        tick = 2 * position
        resident, missing = cache.demand(keys, tick)
        for key in missing:
            cache.admit(key, tick)
        counts.hits += len(resident)
        counts.misses += len(missing)
        target = position + lookahead
        if predicted is not None and target // layers == position // layers:
            for key in predicted[target]:
                if cache.where[key]:
                    cache.hold[key] = max(cache.hold[key], 2 * target)
                elif cache.admit_predicted(key, tick, 2 * target):
                    counts.prefetches += 1
                else:
                    counts.refused_prefetches += 1
        cache.release(tick + 1)
    counts.useless_prefetches = cache.useless + len(cache.unused)
    counts.cold_misses = cache.cold
    return counts


def keys_by_position(experts_TLK: np.ndarray, num_experts: int) -> list[list[int]]:
    """Return the keys of every position, without the -1 that fill up."""
    steps, layers, _ = experts_TLK.shape
    keys = np.where(experts_TLK >= 0, experts_TLK + np.arange(layers)[None, :, None] * num_experts, -1).reshape(steps * layers, -1)
    if not (keys < 0).any():
        return keys.tolist()
    return [[key for key in row if key >= 0] for row in keys.tolist()]
