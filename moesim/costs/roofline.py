"""Time from peak rates: the estimate of last resort, and the model of element-wise kernels.

A kernel takes max(FLOPs / reached FLOP/s, bytes / reached bytes/s) plus one launch. The launch and the reached memory bandwidth of element-wise
kernels are calibrated on the device's table of them, else on its smallest and its most memory-bound GEMM, its donor's where it has none; elsewhere
they are the declared ones.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.interpolation import Curve
from moesim.costs.provenance import Policy, Provenance, Timing, timing, zero_where
from moesim.costs.tables import Rows, Tables
from moesim.costs.transfer import NEXT_DTYPE
from moesim.errors import CostError
from moesim.hardware.cluster import Cluster

SAMPLING_PASSES = 4.0
"""Times that sampling reads or writes the logits: scale, maximum, sum, choice."""
SMALL = 1 << 16
"""Elements of a weight that takes no time to read."""


class Roofline:
    """Peak rates of a device and what kernels reach of them."""

    def __init__(self, cluster: Cluster, tables: Tables, policy: Policy) -> None:
        device = cluster.device
        tier = cluster.tiers.get("hbm") or next((tier for tier in cluster.tiers.values() if tier.attached_to == "device"), None)
        tier = tier or next(iter(cluster.tiers.values()), None)
        if tier is None:
            raise CostError(f"{cluster.name}: tiers is empty; a device needs the memory tier that its kernels read from")
        self._device = device
        self._tables = tables
        self._place = cluster.name
        self._policy = policy
        self.memory_Bps = tier.read_Bps
        """Peak bytes/s of the memory that kernels read from."""
        self.reached_Bps = tier.read_Bps * device.memory_efficiency
        self.declared_Bps = tier.read_Bps * device.memory_efficiency
        self.declared_launch_s = device.kernel_launch_s
        self.l2_bytes = device.l2_bytes or 0.0
        self.is_cpu = device.kind == "cpu"
        self.launch_s = device.kernel_launch_s
        self.provenance = Provenance.ROOFLINE
        rows = tables.rows("stream", "moved_bytes", "latency_s", transfer=False)
        if rows is None:
            rows = self._products(tables)
        if rows is None:
            rows = tables.donated("stream", "moved_bytes", "latency_s")
        if rows is not None:
            self.launch_s = float(rows["latency_s"].min())
            rates = rows["moved_bytes"] / rows["latency_s"]
            self.reached_Bps = float(min(rates.max(), tier.read_Bps))
            self.provenance = max(rows.worst, Provenance.CALIBRATED)

    @staticmethod
    def _products(tables: Tables) -> Rows | None:
        """Return matrix-vector products, own or transferred, if they reach down to next to no weights."""
        for transfer in (False, True):
            rows = tables.rows("gemm", "n", "k", "latency_s", where={"gemm_dtype": "bfloat16", "m": 1}, transfer=transfer)
            if rows is not None and (rows["n"] * rows["k"]).min() <= SMALL:
                rows["moved_bytes"] = 2.0 * rows["n"] * rows["k"]
                return rows
        return None

    def flops(self, dtype: str) -> float:
        """Return the FLOP/s that a large GEMM of `dtype` reaches; a dtype that the device lacks computes in the next wider one."""
        peak = self._device.peak_flops
        name: str | None = dtype
        while name is not None and name not in peak:
            name = NEXT_DTYPE.get(name)
        if name is None:
            if not peak:
                raise CostError(f"{self._place}: device.peak_flops is empty; give at least one dtype")
            name = min(peak, key=lambda key: peak[key])
        return peak[name] * self._device.gemm_efficiency

    def kernel(self, flops: np.ndarray | float, moved_bytes: np.ndarray | float, dtype: str) -> Timing:
        """Return the roofline of one kernel; not calibrated."""
        seconds = self.declared_launch_s + np.maximum(np.asarray(flops) / self.flops(dtype), np.asarray(moved_bytes) / self.declared_Bps)
        return timing(seconds, Provenance.ROOFLINE)

    def stream(self, operator: str, moved_bytes: np.ndarray) -> Timing:
        """Return the time of an element-wise kernel that reads and writes `moved_bytes` in all; nothing moved takes no time."""
        if self.provenance > Provenance.CALIBRATED:
            self._policy.fall_back(operator, "gemm", "gemm_dtype=bfloat16, m=1 (to calibrate memory-bound kernels)", self.provenance)
        seconds = np.where(moved_bytes > 0, self.launch_s + moved_bytes / self.reached_Bps, 0.0)
        return timing(seconds, self.provenance)

    def sampling(self, sequences: np.ndarray, vocab: int) -> Timing:
        """Return the time to sample the next token of every sequence from float32 logits over `vocab`; the table's vocabulary scales in proportion."""
        rows = self._tables.rows("sampler", "sequences", "vocab", "latency_s")
        if rows is None:
            return self.stream("sampling", SAMPLING_PASSES * 4.0 * sequences * vocab)
        keys, first = np.unique(rows["sequences"], return_index=True)
        seconds = rows["latency_s"][first]
        scale = vocab / float(rows["vocab"][0])
        timed = Curve(keys.astype(np.float64), seconds[0] + (seconds - seconds[0]) * scale)(np.asarray(sequences, dtype=np.float64))
        worst = rows.worst if scale == 1.0 else max(rows.worst, Provenance.CALIBRATED)
        return zero_where(timed.scaled(1.0, worst), np.asarray(sequences) <= 0)
