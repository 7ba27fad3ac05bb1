"""Distributions: exact while they are kept, within a bin afterwards."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.sim.serving.metrics import Sample


def fill(values: np.ndarray, exact: int) -> Sample:
    sample = Sample(exact)
    for one in values.tolist():
        sample.add(one)
    return sample


def test_few_values_are_exact() -> None:
    values = np.random.default_rng(1).exponential(1.0, 500)
    sample = fill(values, 1000)
    assert sample.percentile(50, 95, 99) == pytest.approx(np.percentile(values, [50, 95, 99]), rel=1e-12)
    assert sample.mean == pytest.approx(values.mean())


def test_many_values_are_right_to_a_bin() -> None:
    values = np.concatenate([np.random.default_rng(2).lognormal(0.0, 2.0, 30_000), np.zeros(100)])
    sample = fill(values, 1000)
    assert sample.percentile(1, 50, 95, 99) == pytest.approx(np.percentile(values, [1, 50, 95, 99], method="lower"), rel=2.5e-3)
    assert sample.percentile(0)[0] == 0.0
    summary = sample.summary()
    assert summary is not None and summary["mean"] == pytest.approx(values.mean() * 1e3)


@pytest.mark.parametrize("exact", [64, 10_000])
def test_a_run_of_values_counts_as_its_values(exact: int) -> None:
    values, runs = Sample(exact), Sample(exact)
    for first, growth, count in [(1.0, 0.0, 40), (2.0, 0.25, 100), (3.0, -0.5, 5), (0.5, 1.0, 1)]:
        runs.extend(first, growth, count)
        for place in range(count):
            values.add(first + place * growth)
    assert runs.count == values.count and runs.total == values.total
    assert runs.percentile(0, 10, 50, 90, 100) == values.percentile(0, 10, 50, 90, 100)


def test_nothing_has_no_summary() -> None:
    assert Sample().summary() is None
