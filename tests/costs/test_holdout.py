"""Leave one out on grids: exact on lines, the bend on bends, brute force in between; repeats are noise, borders are not scored."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs.holdout import GRIDS, interpolate, leave_one_out, merge_repeats
from moesim.costs.interpolation import Curve, tiles

Rows = dict[str, np.ndarray]


def curve(x: np.ndarray, seconds: np.ndarray, gpus: int = 8) -> Rows:
    size = len(x)
    return {"op_name": np.array(["all_reduce"] * size, dtype=object), "num_gpus": np.full(size, gpus), "message_bytes": x.astype(float), "latency_s": seconds}


def join(*tables: Rows) -> Rows:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def test_a_line_costs_nothing_a_bend_costs_the_bend_and_the_border_is_not_scored() -> None:
    x = np.arange(1.0, 6.0)
    line, bend = curve(x, 3 * x), curve(x, np.array([1.0, 1.0, 4.0, 1.0, 1.0]), gpus=2)
    predicted, _ = leave_one_out("collective", join(line, bend))
    assert predicted[1:4] == pytest.approx(3 * x[1:4]) and predicted[6:9].tolist() == [2.5, 1.0, 2.5]
    assert np.isnan(predicted[[0, 4, 5, 9]]).all()


def test_the_order_of_rows_does_not_matter() -> None:
    rng = np.random.Generator(np.random.PCG64(0))
    rows = curve(np.arange(1.0, 9), np.arange(1.0, 9) ** 2)
    order = rng.permutation(8)
    predicted, _ = leave_one_out("collective", rows)
    shuffled, _ = leave_one_out("collective", {name: values[order] for name, values in rows.items()})
    assert np.array_equal(predicted[order], shuffled, equal_nan=True)


def test_products_are_predicted_as_the_cost_model_interpolates_them() -> None:
    work = tiles((128, 16), (256, 64), (np.inf, 256))
    m = np.array([16.0, 64, 65, 128, 129, 256, 512, 1024])
    seconds = np.array([1.0, 2, 3, 4, 6, 7, 9, 20])
    rows = {"gemm_dtype": np.array(["fp8"] * 8, dtype=object), "m": m, "n": np.full(8, 128.0), "k": np.full(8, 128.0), "latency_s": seconds}
    predicted, by_axis = leave_one_out("gemm", rows)
    for i in range(1, 7):
        expected = Curve(np.delete(m, i), np.delete(seconds, i), work)(m[i : i + 1]).seconds[0]
        assert by_axis["m"][i] == pytest.approx(expected)
    assert np.isnan(by_axis["n"]).all() and np.array_equal(predicted, by_axis["m"], equal_nan=True)


def test_several_axes_are_averaged_geometrically() -> None:
    batch, step = (axis.ravel() for axis in np.meshgrid([1.0, 2, 3], [0.0, 1, 2], indexing="ij"))
    shape = {name: np.full(9, 8.0) for name in ("num_heads", "num_key_value_heads", "head_dim", "window_size")}
    predicted, by_axis = leave_one_out("attn_generation", {**shape, "batch_size": batch, "step": step, "latency_s": batch + step**2 + 1})
    middle = 4
    assert by_axis["step"][middle] == 5.0 and by_axis["batch_size"][middle] == 4.0 and predicted[middle] == pytest.approx(np.sqrt(20.0))
    assert np.isnan(predicted[[0, 2, 6, 8]]).all() and np.isfinite(predicted[[1, 3, 5, 7]]).all()


def test_repeats_are_averaged_and_their_spread_is_the_floor() -> None:
    rows = curve(np.array([1.0, 1.0, 1.0, 2.0]), np.array([1.0, 3.0, 1.0, 5.0]))
    merged, reasons, floor = merge_repeats("collective", rows)
    assert merged["latency_s"] == pytest.approx([5 / 3, 5.0])
    assert reasons == {"exact duplicate": 1, "repeat of equal inputs, averaged": 1}
    assert floor == pytest.approx((0.4 + 0.8 + 0.4) / 3)
    assert merge_repeats("collective", curve(np.array([1.0, 2.0]), np.ones(2)))[2] is None


def test_looking_up_returns_keys_exactly_and_nothing_beyond_the_table() -> None:
    known = {**curve(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 8.0])), "backend": np.array(["a"] * 3, dtype=object)}
    asked = {**curve(np.array([0.5, 1.0, 3.0, 4.0, 5.0]), np.ones(5)), "backend": np.array(["a"] * 5, dtype=object)}
    predicted, on_key = interpolate("custom_allreduce", known, asked)
    assert predicted[1:4] == pytest.approx([1.0, 5.0, 8.0]) and np.isnan(predicted[[0, 4]]).all() and on_key.tolist() == [False, True, False, True, False]
    asked["backend"][:] = "b"
    assert np.isnan(interpolate("custom_allreduce", known, asked)[0]).all()


def test_every_grid_has_an_axis() -> None:
    assert all(grid.axes and len({name for name, _ in grid.axes}) == len(grid.axes) for grid in GRIDS.values())
