"""Loads and hypothesis strategies that the solver tests share, and a brute force for small problems."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

from moesim.solvers.problem import PlacementProblem


def zipf(layers: int, experts: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Return [L, E] loads proportional to 1 / rank^exponent, shuffled per layer."""
    generator = np.random.Generator(np.random.PCG64(seed))
    base = np.round(1e6 / np.arange(1, experts + 1) ** exponent)
    return np.stack([generator.permutation(base) for _ in range(layers)])


def lognormal(layers: int, experts: int, seed: int = 0, sigma: float = 0.75) -> np.ndarray:
    """Return [L, E] skewed loads; at 256 experts the hottest is about 6 times the mean."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.round(1e4 * generator.lognormal(0.0, sigma, (layers, experts)))


@st.composite
def problems(draw: st.DrawFn, max_windows: int = 1, even: bool = False, faults: bool = False) -> PlacementProblem:
    """Draw a small solvable problem: any loads (zeros and ties included), uneven slots, unequal speeds."""
    experts = draw(st.integers(1, 9))
    ranks = draw(st.integers(1, 5))
    layers = draw(st.integers(1, 3))
    windows = draw(st.integers(1, max_windows))
    load = draw(st.lists(st.integers(0, 40), min_size=windows * layers * experts, max_size=windows * layers * experts))
    if even:
        slots = [draw(st.integers(-(-experts // ranks), -(-experts // ranks) + 3))] * ranks
    else:
        slots = draw(st.lists(st.integers(0, 5), min_size=ranks, max_size=ranks))
    while sum(min(one, experts) for one in slots) < experts:
        slots[slots.index(min(slots))] += 1
    speeds = draw(st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=ranks, max_size=ranks)))
    return PlacementProblem(
        load_KLE=np.array(load, dtype=np.float64).reshape(windows, layers, experts),
        num_ranks=ranks,
        slots_per_rank_R=np.array(slots),
        device_speed_R=None if speeds is None else np.array(speeds),
        allow_duplicates_on_rank=faults and draw(st.booleans()),
    )


def brute_force_cost(load_E: np.ndarray, slots_per_rank: list[int], speed: list[float]) -> float:
    """Return the least possible time of the slowest rank, by trying every set of experts on every rank."""
    experts = len(load_E)
    choices = [list(itertools.combinations(range(experts), min(count, experts))) for count in slots_per_rank]
    best = np.inf
    for sets in itertools.product(*choices):
        count = np.zeros(experts)
        for held in sets:
            count[list(held)] += 1
        if (count == 0).any():
            continue
        size = load_E / count
        best = min(best, max(size[list(held)].sum() / pace for held, pace in zip(sets, speed, strict=True)))
    return float(best)
