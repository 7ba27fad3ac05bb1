"""Certified lower bounds on the time of the slowest rank in a layer, whatever the placement.

For every window and layer, the largest of:
- mean: the load spread over all ranks in proportion to their speed;
- pigeonhole: more replicas than Σ min(slots, k-1) put k on one rank; extra slots are spent to keep the k-th tier small
  (k = 1 is the heaviest replica, k = 2 the heaviest pair);
- company: the heaviest replica shares its rank with as many others as the rank has further slots, each of another expert;
- partners: a replica above T - x needs `slots` - 1 partners of at most x, or the rank takes longer than T; where extra slots
  cannot make enough of them, T is too small (a Lagrangian relaxation over how every expert is cut, T found by bisection);
- no replicas (S = E): the j heaviest experts and the lightest ones that must fill their ranks, averaged over these ranks.
Replicas of an expert serve equal shares. Rows N = K·L; experts sorted by falling load.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.parts import parts_of
from moesim.solvers.problem import PlacementProblem

MAX_PARTNERED = 4
"""Slots per rank up to which the partner bound can beat the others."""
PRICES = (1.5, 2.0, 3.0, 5.0)
"""Prices of an extra slot tried in the partner bound; any price >= 1 is valid."""
SAFE = 1 - 1e-12
"""Rounds a quotient down before it is rounded up, so that floating-point noise never asks for one copy too many."""
MAX_EXTRA = 512
"""Extra slots up to which the company bound is worth its time."""


def layer_bound_KL(problem: PlacementProblem) -> np.ndarray:
    """Return float64 [K, L]: a time (load / speed) that the slowest rank cannot beat."""
    shape = problem.load_KLE.shape
    if problem.experts_L is not None:
        result = np.empty(shape[:2])
        for part in parts_of(problem):
            result[:, part.layers_n] = layer_bound_KL(part.problem)
        return result
    load_NE = -np.sort(-problem.load_KLE.reshape(-1, shape[2]), axis=1)
    fill = problem.fill_R
    speed = problem.speed_R[fill > 0]
    fill = fill[fill > 0]
    fastest = float(speed.max())
    bound = load_NE.sum(axis=1) / float(speed.sum())
    extra = int(fill.sum()) - shape[2]
    copies_cap = None if problem.allow_duplicates_on_rank else len(fill)
    for k in range(1, int(fill.max()) + 1):
        whole = int(np.minimum(fill, k - 1).sum())
        if whole >= shape[2]:
            break
        # without extra slots the k are known: the lightest k of the heaviest `whole` + 1
        crowd = k * _smallest_peak_N(load_NE[:, whole:], extra) if extra else load_NE[:, whole + 1 - k : whole + 1].sum(axis=1)
        bound = np.maximum(bound, crowd / fastest)
    if copies_cap is not None:
        bound = np.maximum(bound, load_NE[:, 0] / copies_cap / fastest)
    if problem.rigid:
        if extra <= MAX_EXTRA:
            bound = np.maximum(bound, _company_N(load_NE, extra, int(fill.min())) / fastest)
        if 2 <= fill.min() <= MAX_PARTNERED and extra > 0:
            bound = np.maximum(bound, _partners_N(load_NE, extra, int(fill.min()), bound * fastest) / fastest)
        if extra == 0 and fill.min() == fill.max() and speed.min() == speed.max():
            bound = np.maximum(bound, _no_replicas_N(load_NE, len(fill), int(fill[0])) / fastest)
    return bound.reshape(shape[:2])


def _smallest_peak_N(load_NE: np.ndarray, extra: int) -> np.ndarray:
    """Return the least possible max of load / copies with `extra` copies beyond one each."""
    if extra == 0:
        return load_NE[:, 0].copy()
    budget = extra + load_NE.shape[1]
    high = load_NE[:, 0].copy()
    low = load_NE.sum(axis=1) / budget * (1 - 1e-12)
    for _ in range(45):
        middle = (low + high) / 2
        need = np.maximum(np.ceil(load_NE / np.maximum(middle, 1e-300)[:, None]), 1).sum(axis=1)
        fits = need <= budget
        high = np.where(fits, middle, high)
        low = np.where(fits, low, middle)
    # the least peak lies in (low, high] and is load / copies for some expert: round down to the proven side
    return np.where(high > 0, low, 0.0)


def _company_N(load_NE: np.ndarray, extra: int, slots: int) -> np.ndarray:
    """Return a bound on a rank with the heaviest replica and `slots` - 1 replicas of other experts.

    Holding every replica to a peak h takes `spent` extra slots; the others may shrink the company. An expert cut
    n ways has replicas of b = load / n, and d more cuts leave b·n / (n + d) >= b / (1 + d).
    """
    rows, experts = load_NE.shape
    company = min(slots - 1, experts)
    copies = np.ones_like(load_NE)
    row = np.arange(rows)
    peak = np.empty((extra + 1, rows))
    small = np.empty((extra + 1, rows, company))
    for spent in range(extra + 1):
        size = load_NE / copies
        heaviest = size.argmax(axis=1)
        peak[spent] = size[row, heaviest]
        small[spent] = np.partition(size, company - 1, axis=1)[:, :company] if company else 0.0
        copies[row, heaviest] += 1
    if company == 0:
        return peak.min(axis=0)
    cuts = np.ones_like(small)
    for step in range(extra):
        free = small[: extra - step]
        cut = cuts[: extra - step]
        gain = free / cut - free / (cut + 1)
        best = gain.argmax(axis=2)[..., None]
        np.put_along_axis(cut, best, np.take_along_axis(cut, best, axis=2) + 1, axis=2)
    return (peak + (small / cuts).sum(axis=2)).min(axis=0)


def _partners_N(load_NE: np.ndarray, extra: int, slots: int, low_N: np.ndarray) -> np.ndarray:
    """Return a bound at least as large as `low_N`: times T at which replicas larger than T - x would outnumber their partners.

    An expert cut n ways costs price·(n - 1), plus (slots - 1)·n if its replicas are larger than T - x, less n if they are at most x;
    n is at least what keeps them within T. The cheapest n of every expert is the least one, or the least that leaves the
    large, or the least that joins the small. If even these cost more than price·extra, no placement takes T or less.
    """
    rising = load_NE[:, ::-1]
    picks = [pick for pick in (0, 1, 2, 4, 8, 16, 32, 64) if pick < load_NE.shape[1]]
    low, high = low_N.copy(), low_N * 1.5
    for _ in range(9):
        limit = (low + high) / 2
        too_small = np.zeros(len(load_NE), dtype=bool)
        least = np.maximum(np.ceil(load_NE / np.maximum(limit, 1e-300)[:, None] * SAFE), 1)
        for pick in picks:
            # x just below an expert's load: those that it undercuts no longer count as partners
            x = np.maximum(rising[:, pick] * (1 - 1e-9), 1e-300)[:, None]
            top = np.where(limit[:, None] >= 2 * x, limit[:, None] - x, np.inf)
            large = (load_NE * SAFE > least * top) * ((slots - 1.0) * least)
            cut = np.maximum(np.ceil(load_NE / top * SAFE), least)
            small = np.maximum(np.ceil(load_NE / x * SAFE), least)
            for price in PRICES:
                cheapest = np.minimum(price * least + large, price * cut)
                np.minimum(cheapest, (price - 1) * small, out=cheapest)
                too_small |= cheapest.sum(axis=1) - price * load_NE.shape[1] > price * extra * (1 + 1e-9) + 1e-6
        low, high = np.where(too_small, limit, low), np.where(too_small, high, limit)
    return low


def _no_replicas_N(load_NE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Return a bound for equal ranks and one slot per expert: the j heaviest experts sit on some m <= j ranks, filled at best by the lightest."""
    rows = len(load_NE)
    heavy = np.concatenate((np.zeros((rows, 1)), np.cumsum(load_NE, axis=1)), axis=1)
    light = np.concatenate((np.zeros((rows, 1)), np.cumsum(load_NE[:, ::-1], axis=1)), axis=1)
    bound = np.zeros(rows)
    for j in range(1, ranks + 1):
        on = np.arange(-(-j // slots), j + 1)
        bound = np.maximum(bound, ((heavy[:, [j]] + light[:, on * slots - j]) / on).min(axis=1))
    return bound
