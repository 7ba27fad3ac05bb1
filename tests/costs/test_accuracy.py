"""Leave-one-out errors of the H100 tables stay within what linear, tile-rounded interpolation reaches."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs.crosscheck import leave_one_out, table_errors
from moesim.costs.interpolation import identity
from moesim.hardware import Cluster

LIMITS = {
    "gemm bfloat16": 0.06,
    "gemm fp8": 0.06,
    "gemm fp8_block": 0.06,
    "prefill attention": 0.06,
    "decode attention": 0.03,
    "decode MLA kernel": 0.03,
    "prefill MLA block": 0.06,
    "decode MLA block": 0.03,
    "experts": 0.03,
    "experts under EP": 0.03,
    "collectives": 0.03,
}


def test_median_errors_of_all_tables_stay_within_their_limits(h100: Cluster) -> None:
    errors = dict(table_errors(h100, sample=24))
    assert {what.split(",")[0] for what in errors} == set(LIMITS)
    for what, found in errors.items():
        assert found.size > 10, what
        assert np.median(found) <= LIMITS[what.split(",")[0]], what


def test_leaving_out_a_key_of_a_line_costs_nothing_and_of_a_bend_costs_the_bend() -> None:
    keys = np.arange(1.0, 6.0)
    assert leave_one_out(keys, 3 * keys, identity) == pytest.approx(0, abs=1e-12)
    assert leave_one_out(keys, np.array([1.0, 1.0, 4.0, 1.0, 1.0]), identity).tolist() == [1.5, 0.75, 1.5]
