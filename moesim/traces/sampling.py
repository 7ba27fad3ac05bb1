"""Draw k distinct experts per token, with a stated law and without Python loops over tokens.

- `balanced_TK`: every expert equally often, exactly as far as divisibility allows;
- `proportional_TK`: expert e is among a token's k with probability exactly π_e = k · w_e / Σw, capped at 1
  (systematic sampling in a random order that changes every 16 tokens);
- `fill_TK`: complete partly chosen rows by successive draws without replacement.
With routing groups a token touches at most M of G groups. Shapes: T tokens, K choices, E experts, G groups.
"""

from __future__ import annotations

import math

import numpy as np

_UNIT = 1 << 24
"""One whole inclusion, in the integer arithmetic of systematic sampling: distinctness is then exact, not a rounding matter."""
_BLOCK = 16
"""Tokens that share one random order of the experts."""


def balanced_TK(generator: np.random.Generator, tokens: int, experts: int, k: int) -> np.ndarray:
    """Return int64 [T, K]: a shuffled round robin, so that loads differ by at most 1 and a row never repeats an expert."""
    # whole cycles of one permutation: E/g tokens use K/g cycles, so no token straddles two permutations
    g = math.gcd(experts, k)
    per_block, cycles = experts // g, k // g
    blocks = -(-tokens // per_block)
    order = generator.permuted(np.tile(np.arange(experts), (blocks, 1)), axis=1)
    table = np.tile(order, (1, cycles)).reshape(blocks * per_block, k)[:tokens]
    return generator.permutation(table, axis=0)


def balanced_grouped_TK(generator: np.random.Generator, tokens: int, experts: int, k: int, groups: int, top_groups: int) -> np.ndarray:
    """Return int64 [T, K] like `balanced_TK`, where a token touches `top_groups` of the groups.

    Loads differ by at most 1 where `top_groups` divides k and the groups' visits divide evenly.
    """
    size = experts // groups
    visits = balanced_TK(generator, tokens, groups, top_groups)
    part_TM = _split_k(generator, tokens, k, top_groups)
    result = np.empty((tokens, k), dtype=np.int64)
    start_TM = np.cumsum(part_TM, axis=1) - part_TM
    for group in range(groups):
        token, place = np.nonzero(visits == group)
        part, start = part_TM[token, place], start_TM[token, place]
        for count in np.unique(part):
            rows = np.flatnonzero(part == count)
            chosen = balanced_TK(generator, len(rows), size, int(count)) + group * size
            result[token[rows, None], start[rows, None] + np.arange(count)] = chosen
    return generator.permuted(result, axis=1)


def _split_k(generator: np.random.Generator, tokens: int, k: int, parts: int) -> np.ndarray:
    """Return int64 [T, parts] that sum to k and differ by at most 1, the larger parts at random places."""
    base = np.full((tokens, parts), k // parts)
    base[:, : k % parts] += 1
    return generator.permuted(base, axis=1) if k % parts else base


def inclusion_E(weights_E: np.ndarray, k: int) -> np.ndarray:
    """Return float64 [E]: π_e = min(1, c · w_e) with c such that they sum to k.

    Raises ValueError if fewer than k weights are positive.
    """
    weights = np.asarray(weights_E, dtype=np.float64)
    if (weights > 0).sum() < k:
        raise ValueError(f"{int((weights > 0).sum())} experts have a positive weight, top-{k} needs at least {k}")
    result = np.zeros_like(weights)
    capped = np.zeros(len(weights), dtype=bool)
    while True:
        free = ~capped
        result[free] = weights[free] * ((k - capped.sum()) / weights[free].sum())
        result[capped] = 1.0
        # a hair over 1 is rounding: capping it could leave no weight for the rest
        over = free & (result > 1 + 1e-9)
        if not over.any():
            return np.minimum(result, 1.0)
        capped |= over


def _to_units(inclusion_E: np.ndarray, k: int) -> np.ndarray:
    """Round inclusion probabilities to integers that sum to k · _UNIT and are at most _UNIT each."""
    exact = inclusion_E * _UNIT
    units = np.minimum(np.floor(exact).astype(np.int64), _UNIT)
    short = k * _UNIT - int(units.sum())
    assert 0 <= short <= len(units) + k, "inclusion probabilities must sum to k"
    room = np.flatnonzero((units < _UNIT) & (inclusion_E > 0))
    order = room[np.argsort(-(exact - units)[room], kind="stable")]
    while short > 0:
        chosen = order[:short]
        units[chosen] += 1
        short -= len(chosen)
        order = order[units[order] < _UNIT]
    return units


def proportional_TK(generator: np.random.Generator, tokens: int, weights_E: np.ndarray, k: int) -> np.ndarray:
    """Return int64 [T, K] where expert e occurs in a row with probability `inclusion_E(weights_E, k)[e]`."""
    units = _to_units(inclusion_E(weights_E, k), k)
    experts = len(units)
    blocks = -(-tokens // _BLOCK)
    order = generator.permuted(np.tile(np.arange(experts), (blocks, 1)), axis=1)
    upper = np.cumsum(units[order], axis=1) + np.arange(blocks)[:, None] * (k * _UNIT)
    block_T = np.arange(tokens) // _BLOCK
    points = (generator.integers(0, _UNIT, size=tokens) + block_T * (k * _UNIT))[:, None] + np.arange(k) * _UNIT
    place = np.searchsorted(upper.ravel(), points.ravel(), side="right")
    return order.ravel()[place].reshape(tokens, k)


def proportional_grouped_TK(generator: np.random.Generator, tokens: int, weights_E: np.ndarray, k: int, groups: int, top_groups: int) -> np.ndarray:
    """Return int64 [T, K] like `proportional_TK`, in two stages: `top_groups` groups, then experts inside them.

    Inclusion is exactly proportional where no group is needed in more than every token and no expert more often than
    its group allows; otherwise the caps apply stage by stage.
    """
    size = len(weights_E) // groups
    by_group = np.asarray(weights_E, dtype=np.float64).reshape(groups, size)
    most = -(-k // top_groups)
    usable = (by_group > 0).sum(axis=1) >= most
    if usable.sum() < top_groups:
        raise ValueError(f"only {int(usable.sum())} groups have {most} experts with a positive weight, {top_groups} are needed")
    chosen = proportional_TK(generator, tokens, np.where(usable, by_group.sum(axis=1), 0.0), top_groups)
    part_TM = _split_k(generator, tokens, k, top_groups)
    start_TM = np.cumsum(part_TM, axis=1) - part_TM
    result = np.empty((tokens, k), dtype=np.int64)
    for group in np.flatnonzero(usable):
        token, place = np.nonzero(chosen == group)
        part, start = part_TM[token, place], start_TM[token, place]
        for count in np.unique(part):
            if count:
                rows = np.flatnonzero(part == count)
                drawn = proportional_TK(generator, len(rows), by_group[group], int(count)) + group * size
                result[token[rows, None], start[rows, None] + np.arange(count)] = drawn
    return generator.permuted(result, axis=1)


def fill_TK(generator: np.random.Generator, chosen_TK: np.ndarray, cumulative_E: np.ndarray, groups: int = 1, top_groups: int = 1) -> np.ndarray:
    """Replace every -1 of `chosen_TK` by a draw from `cumulative_E` that the row does not hold yet.

    cumulative_E: increasing, last entry 1. A draw that would open more than `top_groups` groups is rejected and repeated;
    after 32 rounds the rest is drawn from the exact conditional distribution.
    """
    result = chosen_TK.copy()
    experts = len(cumulative_E)
    size = experts // groups
    for column in range(result.shape[1]):
        waiting = np.flatnonzero(result[:, column] < 0)
        for _ in range(32):
            if not len(waiting):
                break
            draw = np.minimum(np.searchsorted(cumulative_E, generator.random(len(waiting)), side="right"), experts - 1)
            rows = result[waiting]
            good = ~(rows == draw[:, None]).any(axis=1)
            if groups > 1:
                good &= _group_fits(rows, draw, size, groups, top_groups)
            result[waiting[good], column] = draw[good]
            waiting = waiting[~good]
        if len(waiting):
            result[waiting, column] = _exact_draw(generator, result[waiting], cumulative_E, size, groups, top_groups)
    return result


def _groups_used(rows: np.ndarray, size: int, groups: int) -> np.ndarray:
    used = np.zeros((len(rows), groups), dtype=bool)
    row, column = np.nonzero(rows >= 0)
    used[row, rows[row, column] // size] = True
    return used


def _group_fits(rows: np.ndarray, draw: np.ndarray, size: int, groups: int, top_groups: int) -> np.ndarray:
    used = _groups_used(rows, size, groups)
    return used[np.arange(len(rows)), draw // size] | (used.sum(axis=1) < top_groups)


def _exact_draw(generator: np.random.Generator, rows: np.ndarray, cumulative_E: np.ndarray, size: int, groups: int, top_groups: int) -> np.ndarray:
    weight = np.tile(np.diff(cumulative_E, prepend=0.0) + 1e-300, (len(rows), 1))
    row, column = np.nonzero(rows >= 0)
    weight[row, rows[row, column]] = 0.0
    if groups > 1:
        used = _groups_used(rows, size, groups)
        allowed = used | (used.sum(axis=1) < top_groups)[:, None]
        weight *= np.repeat(allowed, size, axis=1)
    # the smallest of independent exponential clocks rings for e with probability ∝ weight
    with np.errstate(divide="ignore"):
        clock = generator.standard_exponential(weight.shape) / weight
    return np.argmin(clock, axis=1)
