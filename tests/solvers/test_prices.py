"""Prices refute only what no placement reaches, and the counts that answer to them are placements close to the best."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.prices import Prices, paired_counts, pairs_LRC, raise_bound
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from tests.solvers.instances import brute_force_cost, lognormal, zipf


def prices_of(load_NE: np.ndarray, ranks: int, slots: int, high_N: np.ndarray) -> Prices:
    return Prices(load_NE=-np.sort(-load_NE, axis=1), ranks=ranks, slots=slots, total=ranks * slots, high_N=high_N)


def best_pairs(load_E: np.ndarray, ranks: int) -> float:
    """Return the least time of pairs over all counts, largest beside smallest."""
    best = np.inf
    for counts in itertools.product(range(1, ranks + 1), repeat=len(load_E)):
        if sum(counts) == 2 * ranks:
            size = np.sort(np.repeat(load_E / np.array(counts), counts))
            best = min(best, float((size + size[::-1]).max()))
    return best


def refuted_up_to(load_E: np.ndarray, ranks: int, slots: int, high: float, options: int) -> float:
    """Return the largest time refuted from a poor start: that leaves the most to prove."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.solvers.prices.OPTIONS", options)
        low = np.array([load_E.sum() / ranks * 0.5])
        return float(raise_bound(prices_of(load_E[None], ranks, slots, np.array([high])), low, np.array([high]), 1.0)[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=5), st.integers(2, 4), st.floats(1.0, 1.6), st.sampled_from([2, 12]))
def test_what_prices_refute_no_pairs_reach(load: list[int], ranks: int, loose: float, options: int) -> None:
    load_E = np.array(load[: 2 * ranks - 1], dtype=np.float64)
    least = best_pairs(load_E, ranks)
    assert refuted_up_to(load_E, ranks, 2, least * loose, options) <= least * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=6), st.sampled_from([(2, 3), (3, 3), (2, 4)]), st.floats(1.0, 1.6))
def test_what_prices_refute_no_placement_reaches(load: list[int], shape: tuple[int, int], loose: float) -> None:
    ranks, slots = shape
    load_E = np.array(load[: ranks * slots - 1], dtype=np.float64)
    if slots > len(load_E):
        return
    least = brute_force_cost(load_E, [slots] * ranks, [1.0] * ranks)
    assert refuted_up_to(load_E, ranks, slots, least * loose, 12) <= least * (1 + 1e-9)


def test_prices_prove_more_than_the_closed_forms_where_slots_are_few() -> None:
    load = zipf(1, 256, 1.0)
    problem = PlacementProblem(load_KLE=load, num_ranks=72, slots_per_rank_R=np.array(4))
    low = layer_bound_KL(problem)[0]
    assert raise_bound(prices_of(load, 72, 4, low * 1.1), low, low * 1.1, 1.002)[0] > low[0] * 1.05


@pytest.mark.parametrize("seed", range(4))
def test_counts_for_pairs_come_close_to_the_best(seed: int) -> None:
    load = lognormal(1, 6, seed)
    least = best_pairs(load[0], 5)
    prices = prices_of(load, 5, 2, np.array([least * 1.2]))
    counts, time = paired_counts(prices, np.array([least * 0.95]), np.array([least * 1.2]), 0)
    assert least * (1 - 1e-9) <= time[0] <= least * 1.02
    assert counts.sum() == 10 and counts.min() >= 1


def test_pairs_hold_every_copy_and_no_expert_twice() -> None:
    load = np.array([[8.0, 8.0, 4.0, 2.0, 1.0]])
    copies = np.array([[2, 3, 3, 1, 1]])
    table = pairs_LRC(load, copies)
    assert np.bincount(table.ravel(), minlength=5).tolist() == copies[0].tolist()
    assert (table[..., 0] != table[..., 1]).all()


def test_two_slots_per_rank_are_planned_within_three_percent_of_the_bound() -> None:
    result = solve(PlacementProblem(load_KLE=np.stack([zipf(1, 256, 0.6)[0], lognormal(1, 256)[0]]), num_ranks=144, slots_per_rank_R=np.array(2)))
    assert result.gap <= 0.03
