"""Curves and grids reproduce their keys and follow tile-rounded work between them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.costs.interpolation import Curve, Grid, drop_spikes, identity, quadratic, tiles
from moesim.costs.provenance import Provenance

SIZES = st.lists(st.integers(1, 5000), min_size=2, max_size=8, unique=True).map(sorted)


@given(SIZES, st.sampled_from([identity, tiles((np.inf, 64)), tiles((128, 16), (np.inf, 256)), quadratic(512.0)]))
def test_every_key_of_a_curve_is_reproduced_exactly(sizes: list[int], work: object) -> None:
    keys = np.array(sizes, dtype=np.float64)
    seconds = np.sqrt(keys) * 1e-6
    timed = Curve(keys, seconds, work)(keys)  # type: ignore[arg-type]
    assert (timed.seconds == seconds).all()
    assert (timed.provenance == Provenance.MEASURED).all()


@given(SIZES, st.lists(st.floats(0.5, 1e4), min_size=2, max_size=9))
def test_a_rising_curve_stays_rising_between_and_beyond_its_keys(sizes: list[int], queries: list[float]) -> None:
    keys = np.array(sizes, dtype=np.float64)
    curve = Curve(keys, 1e-6 * keys, tiles((np.inf, 64)))
    assert (np.diff(curve(np.array(sorted(queries))).seconds) >= -1e-18).all()


def test_sizes_in_one_tile_cost_what_its_last_size_costs() -> None:
    curve = Curve(np.array([64.0, 128.0, 192.0]), np.array([1.0, 2.0, 3.0]), tiles((np.inf, 64)))
    assert curve(np.array([65.0, 100.0, 128.0, 129.0])).seconds.tolist() == [2.0, 2.0, 2.0, 3.0]


def test_classes_of_a_curve_inside_and_outside_its_keys() -> None:
    codes = Curve(np.array([10.0, 20.0]), np.array([1.0, 2.0]))(np.array([5.0, 10.0, 15.0, 20.0, 40.0])).provenance
    assert [Provenance(int(code)).name for code in codes] == ["CALIBRATED", "MEASURED", "INTERPOLATED", "MEASURED", "CALIBRATED"]


def test_beyond_the_last_key_a_curve_grows_with_work() -> None:
    assert Curve(np.array([10.0, 20.0]), np.array([1.0, 2.0]))(np.array([40.0])).seconds[0] == pytest.approx(4.0)


def test_a_grid_is_exact_on_keys_and_fills_holes_along_the_row() -> None:
    row, column = np.array([1, 1, 1, 2, 2]), np.array([10, 20, 40, 10, 20])
    grid = Grid.build(row, column, np.array([1.0, 2.0, 4.0, 2.0, 4.0]))
    timed = grid(np.array([1.0, 2.0, 2.0, 1.5, 2.0]), np.array([40.0, 20.0, 40.0, 15.0, 80.0]))
    assert timed.seconds == pytest.approx([4.0, 4.0, 8.0, 2.25, 16.0])
    assert timed.provenance.tolist() == [0, 0, Provenance.CALIBRATED, Provenance.INTERPOLATED, Provenance.CALIBRATED]


def test_repeated_keys_of_a_grid_are_averaged() -> None:
    grid = Grid.build(np.array([1, 1, 1, 2, 2]), np.array([1, 1, 2, 1, 2]), np.array([1.0, 3.0, 4.0, 4.0, 8.0]))
    assert grid(np.array(1.0), np.array(1.0)).seconds == 2.0


def test_work_of_a_prompt_is_quadratic_between_keys() -> None:
    seconds = Grid.build(np.array([1, 1, 2, 2]), np.array([1000, 2000, 1000, 2000]), np.array([1.0, 4.0, 2.0, 8.0]), column_work=quadratic(0.0))
    assert seconds(np.array(1.0), np.array(1500.0)).seconds == pytest.approx(2.25)


def test_a_spike_is_dropped_and_a_step_is_kept() -> None:
    keys, seconds = drop_spikes(np.arange(5.0), np.array([1.0, 30.0, 1.1, 9.0, 9.5]))
    assert keys.tolist() == [0.0, 2.0, 3.0, 4.0] and seconds.tolist() == [1.0, 1.1, 9.0, 9.5]
