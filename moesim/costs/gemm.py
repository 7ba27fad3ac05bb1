"""Dense matrix products [m, k]·[k, n]: table by (m, n, k), else roofline.

Curves in m at the four (n, k) neighbours are blended bilinearly in (n, k), then read at tile-rounded m. Beyond the grid time grows in proportion to
work. Tile edges were chosen by leave-one-out error over the H100 table (see benchmarks/bench_costs.py).
"""

from __future__ import annotations

import numpy as np

from moesim.costs.interpolation import Curve, bracket, identity, tiles
from moesim.costs.provenance import Policy, Provenance, Timing, zero_where
from moesim.costs.roofline import Roofline
from moesim.costs.tables import Tables
from moesim.model.moe_model import DTYPE_BYTES

WORK = {
    "bfloat16": tiles((np.inf, 16)),
    "fp8": tiles((128, 16), (256, 64), (np.inf, 256)),
    "fp8_block": tiles((128, 16), (256, 64), (np.inf, 256)),
}


class Gemm:
    """Times of dense products on one device."""

    def __init__(self, tables: Tables, roofline: Roofline, policy: Policy) -> None:
        self._tables = tables
        self._roofline = roofline
        self._policy = policy
        self._cubes: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None] = {}
        self._curves: dict[tuple[int, int, str], tuple[Curve, Provenance] | None] = {}

    def __call__(self, operator: str, m: np.ndarray, n: int, k: int, dtype: str) -> Timing:
        """Return the time of [m, k]·[k, n] for every m (0 rows: 0 s).

        dtype: `bfloat16`, `fp8` (one scale per tensor or row), `fp8_block`, or any other dtype, for which there is only the roofline.
        """
        m = np.asarray(m, dtype=np.float64)
        key = (n, k, dtype)
        if key not in self._curves:
            self._curves[key] = self._build(n, k, dtype)
        found = self._curves[key]
        if found is None:
            self._policy.fall_back(operator, self._tables.label("gemm"), f"gemm_dtype={dtype}, n={n}, k={k}", Provenance.ROOFLINE)
            plain = "fp8" if dtype == "fp8_block" else dtype
            weight = DTYPE_BYTES.get(plain, 2.0)
            moved = n * k * weight + m * (k * min(weight, 2.0) + n * 2.0)
            return zero_where(self._roofline.kernel(2.0 * m * n * k, moved, plain), m <= 0)
        curve, worst = found
        timed = curve(m)
        return zero_where(Timing(seconds=timed.seconds, provenance=np.maximum(timed.provenance, np.uint8(worst))), m <= 0)

    def _build(self, n: int, k: int, dtype: str) -> tuple[Curve, Provenance] | None:
        if dtype not in self._cubes:
            self._cubes[dtype] = self._cube(dtype)
        cube = self._cubes[dtype]
        if cube is None:
            return None
        n_keys, k_keys, m_keys, seconds = cube
        at_n, at_k = (bracket(keys, np.array(float(size)), identity) for keys, size in ((n_keys, n), (k_keys, k)))
        result = np.zeros(len(m_keys))
        for i, weight_i in ((int(at_n.low), 1.0 - float(at_n.weight)), (int(at_n.low) + 1, float(at_n.weight))):
            for j, weight_j in ((int(at_k.low), 1.0 - float(at_k.weight)), (int(at_k.low) + 1, float(at_k.weight))):
                if weight_i * weight_j > 0:
                    result += weight_i * weight_j * seconds[i, j]
        result *= float(at_n.beyond) * float(at_k.beyond)
        if np.isnan(result).any():
            return None
        if at_n.on_key and at_k.on_key:
            worst = Provenance.MEASURED
        else:
            worst = Provenance.INTERPOLATED if at_n.inside and at_k.inside else Provenance.CALIBRATED
        return Curve(m_keys, result, WORK.get(dtype, identity)), worst

    def _cube(self, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
        rows = self._tables.rows("gemm", "m", "n", "k", "latency_s", where={"gemm_dtype": dtype})
        if rows is None:
            return None
        axes = [np.unique(rows[name]) for name in ("n", "k", "m")]
        seconds = np.full([len(axis) for axis in axes], np.nan)
        seconds[tuple(np.searchsorted(axis, rows[name]) for axis, name in zip(axes, ("n", "k", "m"), strict=True))] = rows["latency_s"]
        if min(seconds.shape) < 2:
            return None
        n_keys, k_keys, m_keys = (axis.astype(np.float64) for axis in axes)
        return n_keys, k_keys, m_keys, seconds
