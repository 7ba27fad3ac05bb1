"""The bound is a bound: below the best of every small problem, and tight where a closed form is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.problem import PlacementProblem
from tests.solvers.instances import brute_force_cost


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=6),
    st.lists(st.integers(1, 4), min_size=2, max_size=3),
    st.lists(st.sampled_from([1.0, 1.0, 2.0]), min_size=3, max_size=3),
)
def test_no_placement_beats_the_bound(load: list[int], slots: list[int], speed: list[float]) -> None:
    load_E = np.array(load, dtype=np.float64)
    while sum(min(one, len(load)) for one in slots) < len(load):
        slots[0] += 1
    pace = speed[: len(slots)]
    problem = PlacementProblem(load_KLE=load_E[None], num_ranks=len(slots), slots_per_rank_R=np.array(slots), device_speed_R=np.array(pace))
    assert layer_bound_KL(problem)[0, 0] <= brute_force_cost(load_E, slots, pace) * (1 + 1e-9)


def bound_of(load: list[float], ranks: int, slots: int) -> float:
    return float(layer_bound_KL(PlacementProblem(load_KLE=np.array([load]), num_ranks=ranks, slots_per_rank_R=np.array(slots)))[0, 0])


def test_an_even_load_is_bounded_by_its_mean() -> None:
    assert bound_of([1.0] * 8, 4, 2) == 2.0


def test_without_replicas_the_heaviest_expert_takes_the_lightest_along() -> None:
    assert bound_of([10.0, 1.0, 2.0, 3.0], 2, 2) == 11.0


def test_two_slots_per_rank_without_replicas_fold_heavy_onto_light() -> None:
    # best: 9+1, 8+2, 7+6: the third heaviest meets the third lightest
    assert bound_of([9.0, 8.0, 7.0, 6.0, 2.0, 1.0], 3, 2) == 13.0


def test_replicas_let_a_heavy_expert_be_shared() -> None:
    assert bound_of([12.0, 0.0], 3, 1) == pytest.approx(6.0)


def test_the_heaviest_replica_bounds_where_the_slots_are_few() -> None:
    # one extra slot halves 100; the mean is 52
    assert bound_of([100.0, 1.0, 1.0, 1.0, 1.0], 2, 3) == pytest.approx(52.0)
    assert bound_of([100.0, 90.0, 1.0, 1.0], 5, 1) == pytest.approx(90.0)
