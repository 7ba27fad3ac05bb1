"""Dense matrix products [m, k]·[k, n]: table by (m, n, k), else a few measured shapes that correct an estimate, else roofline.

A full table: curves in m at the four (n, k) neighbours are blended bilinearly in (n, k), then read at tile-rounded m. Beyond the grid time grows in
proportion to work. A table of some shapes only: those are read as they are; another shape takes an estimate (the donor's table, else the roofline)
times what the nearest measured shapes show of it at the same m.
Tile edges were chosen by leave-one-out error over the H100 table (see benchmarks/bench_costs.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moesim.costs.interpolation import Curve, bracket, identity, tiles
from moesim.costs.provenance import Policy, Provenance, Timing, zero_where
from moesim.costs.roofline import Roofline
from moesim.costs.tables import Rows, Tables
from moesim.costs.transfer import COMPUTE_DTYPE
from moesim.model.moe_model import DTYPE_BYTES

WORK = {
    "bfloat16": tiles((np.inf, 16)),
    "fp8": tiles((128, 16), (256, 64), (np.inf, 256)),
    "fp8_block": tiles((128, 16), (256, 64), (np.inf, 256)),
}
NEIGHBOURS = 3
"""Measured shapes that correct the estimate of another."""
CACHED = 1e-3
"""Weight of a shape, among those that correct an estimate, where its weights came from the cache."""
FILLED = 0.5
"""Share of the keys of a grid that make a table a full one."""

Law = Callable[[np.ndarray], Timing]
_Cube = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Provenance]


@dataclass(frozen=True, slots=True)
class _Shapes:
    """The measured curves in m of a table of some shapes."""

    sizes: np.ndarray
    """float64 [shapes, 2]: n, k."""
    curves: tuple[Curve, ...]
    dtype: str
    rows: Provenance = Provenance.MEASURED
    """Class of the rows."""


class Gemm:
    """Times of dense products on one device."""

    def __init__(self, tables: Tables, roofline: Roofline, policy: Policy) -> None:
        self._tables = tables
        self._roofline = roofline
        self._policy = policy
        self._laws: dict[tuple[int, int, str], Law | None] = {}
        self._cubes: dict[tuple[str, bool], _Cube | None] = {}
        self._shapes: dict[str, _Shapes | None] = {}

    def __call__(self, operator: str, m: np.ndarray, n: int, k: int, dtype: str) -> Timing:
        """Return the time of `m` [...] rows (0 rows: 0 s).

        dtype: `bfloat16`, `fp8` (one scale per tensor or row), `fp8_block`, or any other dtype, for which there is only the roofline.
        """
        m = np.asarray(m, dtype=np.float64)
        key = (n, k, dtype)
        if key not in self._laws:
            self._laws[key] = self._build(operator, n, k, dtype)
        law = self._laws[key]
        if law is None:
            self._policy.fall_back(operator, self._tables.label("gemm"), f"gemm_dtype={dtype}, n={n}, k={k}", Provenance.ROOFLINE)
            return zero_where(self._plain(m, n, k, dtype), m <= 0)
        return zero_where(law(m), m <= 0)

    def _plain(self, m: np.ndarray, n: int, k: int, dtype: str) -> Timing:
        plain = "fp8" if dtype == "fp8_block" else dtype
        weight = DTYPE_BYTES.get(plain, 2.0)
        moved = n * k * weight + m * (k * min(weight, 2.0) + n * 2.0)
        return self._roofline.kernel(2.0 * m * n * k, moved, plain)

    def _build(self, operator: str, n: int, k: int, dtype: str) -> Law | None:
        own = self._from_cube(n, k, dtype, transfer=False)
        if own is not None:
            return own
        donor = self._from_cube(n, k, dtype, transfer=True)
        shapes = self._some_shapes(dtype)
        if shapes is not None and (donor is None or shapes.dtype == dtype):
            return self._with_quantising(self._corrected(operator, n, k, dtype, shapes), k, dtype)
        if donor is not None:
            self._policy.fall_back(operator, self._tables.label("gemm"), f"gemm_dtype={dtype}, n={n}, k={k}", Provenance.EXTRAPOLATED)
        return donor

    def _with_quantising(self, law: Law, k: int, dtype: str) -> Law:
        """Return the law with the time to quantise the input, which InferSim's product alone leaves out and the engines' tables include."""
        if not dtype.startswith("fp8") or not (self._tables.stem("gemm") or "").endswith("_infersim"):
            return law

        def whole(m: np.ndarray) -> Timing:
            timed = law(m)
            return Timing(seconds=timed.seconds + 3.0 * m * k / self._roofline.reached_Bps, provenance=timed.provenance)

        return whole

    # --- a full table -----------------------------------------------------------------------------------------

    def _from_cube(self, n: int, k: int, dtype: str, *, transfer: bool) -> Law | None:
        cube = self._cube(dtype, transfer)
        if cube is None:
            return None
        n_keys, k_keys, m_keys, seconds, worst = cube
        at_n, at_k = (bracket(keys, np.array(float(size)), identity) for keys, size in ((n_keys, n), (k_keys, k)))
        result = np.zeros(len(m_keys))
        for i, weight_i in ((int(at_n.low), 1.0 - float(at_n.weight)), (int(at_n.low) + 1, float(at_n.weight))):
            for j, weight_j in ((int(at_k.low), 1.0 - float(at_k.weight)), (int(at_k.low) + 1, float(at_k.weight))):
                if weight_i * weight_j > 0:
                    result += weight_i * weight_j * seconds[i, j]
        result *= float(at_n.beyond) * float(at_k.beyond)
        known = ~np.isnan(result)
        if known.sum() < 2:
            return None
        if not (at_n.on_key and at_k.on_key):
            worst = max(worst, Provenance.INTERPOLATED if at_n.inside and at_k.inside else Provenance.CALIBRATED)
        return _floored(Curve(m_keys[known], result[known], WORK.get(dtype, identity)), worst)

    def _cube(self, dtype: str, transfer: bool) -> _Cube | None:
        if (dtype, transfer) not in self._cubes:
            self._cubes[dtype, transfer] = self._full(dtype, transfer)
        return self._cubes[dtype, transfer]

    def _full(self, dtype: str, transfer: bool) -> _Cube | None:
        names, where = ("m", "n", "k", "latency_s"), {"gemm_dtype": dtype}
        rows = self._tables.donated("gemm", *names, where=where) if transfer else self._tables.rows("gemm", *names, where=where, transfer=False)
        if rows is None:
            return None
        axes = [np.unique(rows[name]) for name in ("n", "k", "m")]
        seconds = np.full([len(axis) for axis in axes], np.nan)
        seconds[tuple(np.searchsorted(axis, rows[name]) for axis, name in zip(axes, ("n", "k", "m"), strict=True))] = rows["latency_s"]
        if min(seconds.shape) < 2 or np.isfinite(seconds).mean() < FILLED:
            return None
        n_keys, k_keys, m_keys = (axis.astype(np.float64) for axis in axes)
        return n_keys, k_keys, m_keys, seconds, rows.worst

    # --- some shapes ------------------------------------------------------------------------------------------

    def _some_shapes(self, dtype: str) -> _Shapes | None:
        """Return the device's own curves of the dtype, else of another; where it has none and its donor no full table, the donor's, transferred."""
        if dtype not in self._shapes:
            found = self._curves_of(dtype, self._tables.rows, transfer=False)
            if found is None and self._cube(dtype, True) is None:
                found = self._curves_of(dtype, self._tables.donated)
            self._shapes[dtype] = found
        return self._shapes[dtype]

    @staticmethod
    def _curves_of(dtype: str, read: Callable[..., Rows | None], **how: bool) -> _Shapes | None:
        names = ("m", "n", "k", "latency_s")
        rows = read("gemm", *names, where={"gemm_dtype": dtype}, **how)
        if rows is None:
            every = read("gemm", *names, "gemm_dtype", **how)
            if every is None:
                return None
            dtype = str(every["gemm_dtype"][0])
            mine = every["gemm_dtype"] == dtype
            rows = Rows({name: every[name][mine] for name in names})
            rows.worst = every.worst
        return replace(_curves(rows, dtype), rows=rows.worst)

    def _corrected(self, operator: str, n: int, k: int, dtype: str, shapes: _Shapes) -> Law:
        distance = np.abs(np.log2(shapes.sizes / np.array([n, k], dtype=np.float64))).sum(axis=1)
        nearest = np.argsort(distance, kind="stable")[:NEIGHBOURS]
        if distance[nearest[0]] == 0 and shapes.dtype == dtype:
            return _floored(shapes.curves[nearest[0]], shapes.rows)
        worst = max(shapes.rows, Provenance.CALIBRATED)
        self._policy.fall_back(operator, self._tables.label("gemm"), f"gemm_dtype={dtype}, n={n}, k={k}", worst)
        near = 1.0 / (distance[nearest] + 0.25) ** 2
        estimate = self._estimate(n, k, dtype)
        # What the measured shapes show of the estimate, at every measured m.
        curves = [shapes.curves[index] for index in nearest.tolist()]
        keys = np.unique(np.concatenate([curve.keys for curve in curves]))
        logs, weights = np.zeros(len(keys)), np.zeros(len(keys))
        for index, curve, weight in zip(nearest.tolist(), curves, near, strict=True):
            other_n, other_k = (int(size) for size in shapes.sizes[index])
            inside = np.clip(keys, curve.keys[0], curve.keys[-1])
            share = weight * np.where(self._cached(other_n, other_k, shapes.dtype, keys), CACHED, 1.0)
            logs += share * np.log(curve(inside).seconds / self._estimate(other_n, other_k, shapes.dtype)(inside).seconds)
            weights += share
        logs /= weights

        def law(m: np.ndarray) -> Timing:
            ratio = np.exp(np.interp(np.log2(np.maximum(m, 1.0)), np.log2(keys), logs))
            return Timing(seconds=estimate(m).seconds * ratio, provenance=np.full(m.shape, worst, dtype=np.uint8))

        return law

    def _cached(self, n: int, k: int, dtype: str, m: np.ndarray) -> np.ndarray:
        """Return where a measured product reads weights that stayed in the cache, which those of a model with many layers do not."""
        if self._cube(dtype, True) is not None:
            return np.zeros(m.shape, dtype=bool)  # the donor's table, with which it is compared, was measured the same way
        width = DTYPE_BYTES.get(COMPUTE_DTYPE.get(dtype, dtype), 2.0)
        reading, computing = n * k * width / self._roofline.memory_Bps, 2.0 * m * n * k / self._roofline.flops(COMPUTE_DTYPE.get(dtype, dtype))
        return (n * k * width <= self._roofline.l2_bytes) & (reading > computing)

    def _estimate(self, n: int, k: int, dtype: str) -> Law:
        donor = self._from_cube(n, k, dtype, transfer=True)
        return donor if donor is not None else lambda m: self._plain(m, n, k, COMPUTE_DTYPE.get(dtype, dtype))


def _floored(curve: Curve, worst: Provenance) -> Law:
    def law(m: np.ndarray) -> Timing:
        timed = curve(m)
        return Timing(seconds=timed.seconds, provenance=np.maximum(timed.provenance, np.uint8(worst)))

    return law


def _curves(rows: Rows, dtype: str) -> _Shapes:
    sizes, index = np.unique(np.stack([rows["n"], rows["k"]], axis=1), axis=0, return_inverse=True)
    curves = []
    for shape in range(len(sizes)):
        mine = index.ravel() == shape
        keys, first = np.unique(rows["m"][mine], return_inverse=True)
        mean = np.bincount(first.ravel(), weights=rows["latency_s"][mine]) / np.bincount(first.ravel())
        curves.append(Curve(keys.astype(np.float64), mean, WORK.get(dtype, identity)))
    return _Shapes(sizes.astype(np.float64), tuple(curves), dtype)
