"""Each sampler draws distinct experts with the law that it states."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.traces.sampling import balanced_grouped_TK, balanced_TK, fill_TK, inclusion_E, proportional_grouped_TK, proportional_TK


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def distinct(table_TK: np.ndarray) -> bool:
    return bool((np.diff(np.sort(table_TK, axis=1), axis=1) > 0).all())


@settings(deadline=None)
@given(tokens=st.integers(1, 200), experts=st.integers(1, 40), k=st.integers(1, 40), seed=st.integers(0, 99))
def test_balanced_loads_differ_by_at_most_one(tokens: int, experts: int, k: int, seed: int) -> None:
    k = min(k, experts)
    table = balanced_TK(rng(seed), tokens, experts, k)
    assert table.shape == (tokens, k) and distinct(table)
    loads = np.bincount(table.ravel(), minlength=experts)
    assert len(loads) == experts and loads.max() - loads.min() <= 1


def test_balanced_choices_are_shuffled() -> None:
    table = balanced_TK(rng(), 4096, 64, 8)
    pairs = np.zeros((64, 64))
    for a in range(8):
        for b in range(8):
            np.add.at(pairs, (table[:, a], table[:, b]), 1)
    off = pairs[~np.eye(64, dtype=bool)]
    assert off.min() > 20  # all pairs meet: expected 4096 · 56 / (64 · 63) = 57
    for part in np.array_split(table, 8):  # no run of tokens is confined to few experts
        assert len(np.unique(part)) == 64


def test_balanced_routing_respects_groups_and_stays_exact() -> None:
    table = balanced_grouped_TK(rng(), 1024, 256, 8, 8, 4)
    assert distinct(table)
    assert {len(set(row)) for row in (table // 32).tolist()} == {4}
    assert set(np.bincount(table.ravel(), minlength=256).tolist()) == {32}


@settings(deadline=None, max_examples=50)
@given(size=st.integers(1, 6), groups=st.integers(1, 6), seed=st.integers(0, 99), data=st.data())
def test_grouped_samplers_never_exceed_the_groups(size: int, groups: int, seed: int, data: st.DataObject) -> None:
    top = data.draw(st.integers(1, groups))
    k = data.draw(st.integers(1, top * size))
    weights = rng(seed).random(size * groups) + 0.01
    for table in (
        balanced_grouped_TK(rng(seed), 50, size * groups, k, groups, top),
        proportional_grouped_TK(rng(seed), 50, weights, k, groups, top),
        fill_TK(rng(seed), np.full((50, k), -1), np.cumsum(weights) / weights.sum(), groups, top),
    ):
        assert table.shape == (50, k) and distinct(table) and table.min() >= 0 and table.max() < size * groups
        assert max(len(set(row)) for row in (table // size).tolist()) <= top


@settings(deadline=None)
@given(weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=30), k=st.integers(1, 30))
def test_inclusion_is_proportional_below_the_cap(weights: list[float], k: int) -> None:
    array = np.array(weights)
    array[array < 1e-3] = 0
    if (array > 0).sum() < k:
        with pytest.raises(ValueError, match="positive weight"):
            inclusion_E(array, k)
        return
    share = inclusion_E(array, k)
    assert share.sum() == pytest.approx(k) and share.max() <= 1 + 1e-12 and (share[array == 0] == 0).all()
    free = (share < 1 - 1e-9) & (array > 0)
    if free.any():
        scale = (share[free] / array[free]).max()
        np.testing.assert_allclose(share[free], scale * array[free], rtol=1e-9)
        assert (scale * array[share >= 1 - 1e-9] >= 1 - 1e-6).all()


@settings(deadline=None)
@given(experts=st.integers(1, 40), k=st.integers(1, 40), zeros=st.integers(0, 20), seed=st.integers(0, 99), power=st.floats(0, 6))
def test_proportional_rows_are_distinct_and_never_hold_a_zero_weight(experts: int, k: int, zeros: int, seed: int, power: float) -> None:
    weights = np.arange(1, experts + 1) ** -power
    weights[: min(zeros, experts - 1)] = 0
    k = min(k, int((weights > 0).sum()))
    table = proportional_TK(rng(seed), 100, weights, k)
    assert table.shape == (100, k) and distinct(table) and (weights[table] > 0).all()


@pytest.mark.parametrize("grouped", [False, True])
def test_proportional_frequencies_match_the_inclusion_probabilities(grouped: bool) -> None:
    tokens, k = 40_000, 4
    # a permutation of mild weights, so that neither an expert nor a group reaches its cap
    weights = rng(3).permutation(np.linspace(1, 3, 32))
    table = proportional_grouped_TK(rng(), tokens, weights, k, 4, 2) if grouped else proportional_TK(rng(), tokens, weights, k)
    expected = inclusion_E(weights, k) * tokens
    seen = np.bincount(table.ravel(), minlength=32)
    sigma = np.sqrt(expected * (1 - expected / tokens))
    assert (np.abs(seen - expected) < 5 * sigma).all()
    assert np.abs(seen - expected).max() > 0.01 * sigma.min()  # it is a sample, not a quota


def test_every_pair_of_experts_can_meet() -> None:
    table = proportional_TK(rng(), 20_000, np.ones(16), 4)
    pairs = np.zeros((16, 16))
    for a in range(4):
        for b in range(4):
            np.add.at(pairs, (table[:, a], table[:, b]), 1)
    off = pairs[~np.eye(16, dtype=bool)]
    assert off.mean() == pytest.approx(20_000 * 12 / 240)
    assert off.min() / off.mean() > 0.75 and off.max() / off.mean() < 1.25


def test_fill_keeps_what_is_chosen_and_draws_the_rest_by_weight() -> None:
    weights = np.arange(1.0, 9.0)
    chosen = np.tile(np.array([3, -1, 5]), (50_000, 1))
    table = fill_TK(rng(), chosen, np.cumsum(weights) / weights.sum())
    assert (table[:, 0] == 3).all() and (table[:, 2] == 5).all() and distinct(table)
    allowed = np.array([0, 1, 2, 4, 6, 7])
    expected = weights[allowed] / weights[allowed].sum() * 50_000
    seen = np.bincount(table[:, 1], minlength=8)[allowed]
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected)).all()


def test_fill_ends_under_extreme_skew() -> None:
    weights = np.arange(1.0, 65.0) ** -10
    table = fill_TK(rng(), np.full((200, 64), -1), np.cumsum(weights) / weights.sum())
    assert (np.sort(table, axis=1) == np.arange(64)).all()
