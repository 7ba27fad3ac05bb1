"""Routed experts of a device of an older generation than the one that was measured, for which engines ship no tuned tiles.

    seconds = launch + weights / (BW · e_w) + activations / (BW · e_a) + 2 · weights · padded tokens / (peak · e_t)

Rows of the donor whose kernel ran the engines' default tiles give the launch and the three efficiencies; bandwidth and peak come from the data sheets,
the peak of the same dtype. The terms add up: these tiles load and multiply in the same warps. Tokens of an expert are padded to whole tiles of 16 rows
for few tokens, else 64. No grouped kernel is slower than the products of its experts one after another, which any engine can run instead.
Which rows of the donor ran default tiles shows at large loads: two groups of shapes, one of which takes about three times as long for its FLOPs.
Source: sizes of the default tiles, get_default_config in fused_moe of vLLM (until 0.10) and SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moesim.costs.gemm import Gemm
from moesim.costs.tables import Tables
from moesim.costs.transfer import peak_flops
from moesim.hardware.cluster import Cluster

ENGINE, KERNEL, DTYPE = "sglang", "triton", "bfloat16"
"""Whose rows of the donor hold shapes without tuned tiles."""
FEW_TILE, TILE = 16.0, 64.0
LARGE = 128.0
"""Tokens per expert from which the FLOPs of a row tell its tiles."""
ROUNDS = 50
_NAMES = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "latency_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Balanced loads of one rank; float64 [n] each, or one number for all."""

    hidden: np.ndarray | float
    width: np.ndarray | float
    """Of an expert, per tensor-parallel rank."""
    experts: np.ndarray | float
    tokens: np.ndarray
    assignments: np.ndarray

    @property
    def active(self) -> np.ndarray:
        """Return the experts that have tokens."""
        return np.minimum(self.assignments, self.experts)

    def terms(self, cluster: Cluster) -> np.ndarray:
        """Return [n, 4]: 1, and the seconds of weights, activations and padded tiles at the data sheet's rates."""
        weights = 3.0 * self.hidden * self.width
        tile = np.where(self.tokens <= self.experts, FEW_TILE, TILE)
        padded = self.active * np.ceil(self.assignments / self.active / tile) * tile
        # A row is read and written in both products, its expert's output summed; two bytes an element.
        moved = self.assignments * (6.0 * self.hidden + 6.0 * self.width)
        memory, peak = cluster.memory.read_Bps, peak_flops(cluster, DTYPE)
        return np.stack([np.ones(len(self.tokens)), 2.0 * self.active * weights / memory, moved / memory, 2.0 * weights * padded / peak], axis=1)


def fit(terms: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the coefficients >= 0 of least relative absolute error, by squares that are weighted anew in every round."""
    weight = 1.0 / seconds
    used = np.ones(terms.shape[1], dtype=bool)
    result = np.zeros(terms.shape[1])
    for _ in range(ROUNDS):
        result[:] = 0.0
        result[used] = np.linalg.lstsq(terms[:, used] * weight[:, None], seconds * weight, rcond=None)[0]
        used &= result > 0
        error = np.abs(terms @ result / seconds - 1.0)
        weight = 1.0 / (seconds * np.sqrt(np.maximum(error, 0.01)))
    return np.maximum(result, 0.0)


def default_rows(load: Load, seconds: np.ndarray, terms: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Return which rows are of shapes that ran default tiles: the slower of two groups, by time beyond traffic over that of the FLOPs at peak."""
    count = int(shape.max()) + 1
    large = load.assignments >= LARGE * np.asarray(load.experts)
    each = np.maximum(seconds - terms[:, 1] - terms[:, 2], 1e-3 * seconds) / terms[:, 3]
    logs = np.full(count, -np.inf)
    for one in np.unique(shape[large]).tolist():
        logs[one] = np.log(np.median(each[large & (shape == one)]))
    known = np.isfinite(logs)
    if known.sum() < 2:
        return np.zeros(len(seconds), dtype=bool)
    low, high = float(logs[known].min()), float(logs[known].max())
    for _ in range(ROUNDS):
        slow = known & (logs > 0.5 * (low + high))
        if slow.any() and (known & ~slow).any():
            low, high = float(logs[known & ~slow].mean()), float(logs[slow].mean())
    return np.asarray(slow[shape])


class OlderDevice:
    """Default tiles on a device that computes in no FP8, from a donor that does."""

    def __init__(self, target: Cluster, tables: Tables, product: Gemm) -> None:
        self._target = target
        self._product = product
        self.coefficients: np.ndarray | None = None
        donor = tables.donor
        if donor is None or "fp8" in target.device.peak_flops or "fp8" not in donor.cluster.device.peak_flops:
            return
        where = {"moe_dtype": DTYPE, "distribution": "balanced", "moe_ep_size": 1}
        rows = donor.seen_by(ENGINE).rows("moe", *_NAMES, "kernel_source", where=where, transfer=False)
        if rows is not None:
            self.coefficients = _fitted(rows, donor.cluster)

    def seconds(self, load: Load) -> np.ndarray | None:
        """Return the seconds of every load, all of one shape; None where no table tells."""
        if self.coefficients is None:
            return None
        fused = load.terms(self._target) @ self.coefficients
        each = load.assignments / load.active
        hidden, width = int(load.hidden), int(load.width)
        products = (self._product("experts", each, n, k, DTYPE).seconds for n, k in ((2 * width, hidden), (hidden, width)))
        activation = 6.0 * load.assignments * load.width / self._target.memory.read_Bps
        return np.asarray(np.minimum(fused, load.active * sum(products) + activation))


def _fitted(rows: Mapping[str, np.ndarray], donor: Cluster) -> np.ndarray | None:
    mine = np.array([KERNEL in str(source) for source in rows["kernel_source"]])
    r = {name: rows[name][mine].astype(np.float64) for name in _NAMES}
    if not mine.any():
        return None
    width, assignments = r["inter_size"] / r["moe_tp_size"], r["num_tokens"] * r["topk"]
    load = Load(hidden=r["hidden_size"], width=width, experts=r["num_experts"], tokens=r["num_tokens"], assignments=assignments)
    terms = load.terms(donor)
    shapes = np.stack([r["num_experts"], width, r["hidden_size"], r["topk"]], axis=1)
    slow = default_rows(load, r["latency_s"], terms, np.unique(shapes, axis=0, return_inverse=True)[1].ravel())
    return fit(terms[slow], r["latency_s"][slow]) if slow.sum() > terms.shape[1] else None


def balanced_grid(experts: int, top_k: int) -> np.ndarray:
    """Return total assignments of a rank, from one to 4096 tokens per expert, with both sides of every step of the tiles."""
    few = np.unique(np.round(np.geomspace(1.0, experts, 2 + int(np.log2(experts))))) if experts > 1 else np.ones(1)
    per_expert = np.concatenate([np.arange(1.0, 17.0), [top_k, top_k + 1.0, 24, 32, 48, 64, 65, 96, 128, 129], TILE * 2.0 ** np.arange(2, 7)])
    return np.unique(np.concatenate([few, experts * per_expert]))
