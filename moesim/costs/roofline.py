"""Time from peak rates: the estimate of last resort, and the model of element-wise kernels.

A kernel takes max(FLOPs / reached FLOP/s, bytes / reached bytes/s) plus one launch. On a device with a GEMM table the launch and the reached
memory bandwidth of element-wise kernels are calibrated on its smallest and its most memory-bound GEMM; elsewhere they are the declared ones.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.provenance import Policy, Provenance, Timing, timing
from moesim.costs.tables import Tables
from moesim.errors import CostError
from moesim.hardware.cluster import Cluster

_NEXT_DTYPE = {"fp8": "bfloat16", "int8": "bfloat16", "fp4": "fp8", "mxfp4": "bfloat16", "int4": "bfloat16", "bfloat16": "float16", "float16": "float32"}
"""dtype → the one that a device without it computes in."""


class Roofline:
    """Peak rates of a device and what kernels reach of them."""

    def __init__(self, cluster: Cluster, tables: Tables, policy: Policy) -> None:
        device = cluster.device
        tier = cluster.tiers.get("hbm") or next((tier for tier in cluster.tiers.values() if tier.attached_to == "device"), None)
        tier = tier or next(iter(cluster.tiers.values()), None)
        if tier is None:
            raise CostError(f"{cluster.name}: tiers is empty; a device needs the memory tier that its kernels read from")
        self._device = device
        self._place = cluster.name
        self._policy = policy
        self.memory_Bps = tier.read_Bps
        """Peak bytes/s of the memory that kernels read from."""
        self.reached_Bps = tier.read_Bps * device.memory_efficiency
        self.declared_Bps = tier.read_Bps * device.memory_efficiency
        self.declared_launch_s = device.kernel_launch_s
        self.is_cpu = device.kind == "cpu"
        self.launch_s = device.kernel_launch_s
        self.provenance = Provenance.ROOFLINE
        rows = tables.rows("gemm", "n", "k", "latency_s", where={"gemm_dtype": "bfloat16", "m": 1})
        if rows is not None:
            self.launch_s = float(rows["latency_s"].min())
            rates = 2.0 * rows["n"] * rows["k"] / rows["latency_s"]
            self.reached_Bps = float(min(rates.max(), tier.read_Bps))
            self.provenance = Provenance.CALIBRATED

    def flops(self, dtype: str) -> float:
        """Return the FLOP/s that a large GEMM of `dtype` reaches; a dtype that the device lacks computes in the next wider one."""
        peak = self._device.peak_flops
        name: str | None = dtype
        while name is not None and name not in peak:
            name = _NEXT_DTYPE.get(name)
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
        if self.provenance is Provenance.ROOFLINE:
            self._policy.fall_back(operator, "gemm", "gemm_dtype=bfloat16, m=1 (to calibrate memory-bound kernels)", Provenance.ROOFLINE)
        seconds = np.where(moved_bytes > 0, self.launch_s + moved_bytes / self.reached_Bps, 0.0)
        return timing(seconds, self.provenance)
