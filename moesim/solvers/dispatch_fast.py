"""Shares for the hot path: a feasible interior-point method in numpy, all layers in lock step.

Only experts on several ranks have anything to decide. Newton's system is reduced to one symmetric system per layer:
D = x / t per pair, M = diag(s / y + Σ D) - Σ_e (D_e D_eᵀ) / ΣD_e over ranks, bordered by the speeds. Every iterate is a valid split, and
the duality gap Σ x t + Σ s y is at hand, so a layer stops as soon as it is close enough; the set of ranks that the dual
singles out becomes the certificate. Shapes: L layers, R ranks, P pairs to decide, M experts to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.dispatch_core import PLACE, DispatchResult, Replicas, make_dispatch, set_dual_KLR, window_scale_K

TOLERANCE = 5e-3
"""Relative duality gap at which a layer stops."""
MAX_ITERATIONS = 40
STEP = 0.95
"""Part of the way to the boundary that a step goes."""
NEGLIGIBLE = 1e-9
"""Experts with less than this share of a rank's mean load are split equally: they cannot matter."""
CHUNK_CELLS = 1 << 22
"""Matrix cells worked on at a time."""
MAX_FAST_RANKS = 4096


@dataclass(slots=True)
class _Block:
    """Layers whose splits are found together; loads are scaled to 1 per unit of speed."""

    layers: int
    ranks: int
    group_P: np.ndarray
    """int64 [P], ascending: expert to decide of every pair."""
    start_M: np.ndarray
    """int64 [M]: first pair of every expert."""
    layer_M: np.ndarray
    column_M: np.ndarray
    """int64 [M]: number of the expert within its layer."""
    place_P: np.ndarray
    """int64 [P]: layer · R + rank."""
    load_M: np.ndarray
    base_LR: np.ndarray
    """float64 [L, R]: load that is not to be decided."""
    speed_R: np.ndarray

    def by_rank(self, value_P: np.ndarray) -> np.ndarray:
        """Return [L, R]: sums over the pairs of every rank."""
        return np.bincount(self.place_P, weights=value_P, minlength=self.layers * self.ranks).reshape(self.layers, self.ranks)

    def least_step(self, value_P: np.ndarray, change_P: np.ndarray, value_LR: np.ndarray, change_LR: np.ndarray) -> np.ndarray:
        """Return [L] in 0..1: how far every layer may go and stay positive."""
        worst_M = np.minimum.reduceat(change_P / value_P, self.start_M)
        worst = np.minimum((change_LR / value_LR).min(axis=1), 0.0)
        np.minimum.at(worst, self.layer_M, worst_M)
        return np.minimum(1.0, STEP / np.maximum(-worst, 1e-300))

    def solve(self, x: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the loads of pairs [P], the duals of ranks [L, R] and the iterations made, from the split `x` > 0."""
        v, layer_P = self.speed_R, self.layer_M[self.group_P]
        load = self.base_LR + self.by_rank(x)
        busy_L = np.bincount(layer_P, minlength=self.layers) > 0
        z = np.where(busy_L, 1.25 * (load / v).max(axis=1), 1.0 + (load / v).max(axis=1))
        s = z[:, None] * v - load
        y = np.full(s.shape, 1.0 / v.sum())
        t = np.full(x.size, 0.5 / v.sum())
        items = self.ranks + np.bincount(layer_P, minlength=self.layers)
        cell_P = self.place_P * (int(self.column_M.max()) + 1) + self.column_M[self.group_P]
        H = np.zeros((self.layers, self.ranks, int(self.column_M.max()) + 1))
        rhs = np.empty((self.layers, self.ranks, 3))
        rhs[..., 2] = v
        for iteration in range(MAX_ITERATIONS):
            gap = np.bincount(layer_P, weights=x * t, minlength=self.layers) + (s * y).sum(axis=1)
            open_L = busy_L & (gap > tolerance * z)
            if not open_L.any():
                return x, y, iteration
            d = x / t
            d_M = np.add.reduceat(d, self.start_M)
            H.reshape(-1)[cell_P] = d / np.sqrt(d_M)[self.group_P]
            diagonal_LR = s / y + self.by_rank(d)
            # right sides of the pure Newton step and of centring; both are linear in the target
            inverse = 1.0 / t
            inverse_M = np.add.reduceat(inverse, self.start_M)
            rhs[..., 0] = -s - self.by_rank(x - d * (self.load_M / d_M)[self.group_P])
            rhs[..., 1] = 1.0 / y + self.by_rank(inverse - d * (inverse_M / d_M)[self.group_P])
            todo = np.flatnonzero(open_L)
            answer = np.ones(rhs.shape)
            answer[todo] = _solve(diagonal_LR[todo], H[todo], rhs[todo])
            a, c = answer[..., :2], answer[..., 2]
            dz_two = (v @ a) / (c @ v)[:, None]
            dy_two = a - c[..., None] * dz_two[:, None, :]
            mu = gap / items
            sigma_mu = np.zeros(self.layers)
            for centred in (False, True):
                dy = dy_two[..., 0] + dy_two[..., 1] * sigma_mu[:, None]
                dz = dz_two[:, 0] + dz_two[:, 1] * sigma_mu
                dy_P = dy.reshape(-1)[self.place_P]
                target = sigma_mu[layer_P]
                p = target * inverse - x
                du_M = (np.add.reduceat(d * dy_P, self.start_M) - np.add.reduceat(p, self.start_M)) / d_M
                dt = dy_P - du_M[self.group_P]
                dx = p - d * dt
                ds = v * dz[:, None] - self.by_rank(dx)
                primal, dual = self.least_step(x, dx, s, ds), self.least_step(t, dt, y, dy)
                if not centred:
                    ahead = np.bincount(layer_P, weights=(x + primal[layer_P] * dx) * (t + dual[layer_P] * dt), minlength=self.layers)
                    ahead += ((s + primal[:, None] * ds) * (y + dual[:, None] * dy)).sum(axis=1)
                    sigma_mu = np.clip(ahead / gap, 0.0, 1.0) ** 3 * mu
            primal, dual = primal * open_L, dual * open_L
            x, t = x + primal[layer_P] * dx, t + dual[layer_P] * dt
            s, y, z = s + primal[:, None] * ds, y + dual[:, None] * dy, z + primal * dz
        return x, y, MAX_ITERATIONS


def _solve(diagonal_LR: np.ndarray, H_LRC: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Solve (diag - H Hᵀ) answer = rhs per layer, by whichever of R and C is smaller."""
    if H_LRC.shape[2] >= H_LRC.shape[1]:
        matrix = -(H_LRC @ H_LRC.transpose(0, 2, 1))
        every = np.arange(H_LRC.shape[1])
        matrix[:, every, every] += diagonal_LR
        return np.linalg.solve(matrix, rhs)
    scaled, part = H_LRC / diagonal_LR[..., None], rhs / diagonal_LR[..., None]
    matrix = np.eye(H_LRC.shape[2]) - H_LRC.transpose(0, 2, 1) @ scaled
    return part + scaled @ np.linalg.solve(matrix, H_LRC.transpose(0, 2, 1) @ part)


def _split(replicas: Replicas, load_LE: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Return shares of all pairs [P], a score of ranks [L, R] (the dual) and the iterations made."""
    ranks, experts = replicas.num_ranks, replicas.num_experts
    total = load_LE.sum(axis=1)
    unit = np.where(total > 0, total, 1.0) / replicas.speed_R.sum()
    scaled = load_LE / unit[:, None]
    decide_LE = (replicas.ranks_LE > 1) & (scaled > NEGLIGIBLE * replicas.speed_R.min())
    share = replicas.equal_P.copy()
    chosen = decide_LE.ravel()[replicas.key_P]
    pairs = np.flatnonzero(chosen)
    load_P = scaled.ravel()[replicas.key_P]
    fixed = np.bincount(replicas.place_P, weights=np.where(chosen, 0.0, load_P * share), minlength=replicas.num_layers * ranks).reshape(-1, ranks)
    score = fixed / replicas.speed_R
    widest = max(1, int(decide_LE.sum(axis=1).max()))
    step = max(1, CHUNK_CELLS // (ranks * widest))
    most = 0
    for low in range(0, replicas.num_layers, step):
        high = min(low + step, replicas.num_layers)
        here = pairs[np.searchsorted(replicas.key_P[pairs], low * experts) : np.searchsorted(replicas.key_P[pairs], high * experts)]
        if here.size == 0:
            continue
        key = replicas.key_P[here]
        start = np.flatnonzero(np.diff(key, prepend=-1))
        layer_M = key[start] // experts - low
        first = np.searchsorted(layer_M, np.arange(high - low))
        block = _Block(
            layers=high - low,
            ranks=ranks,
            group_P=np.repeat(np.arange(start.size), np.diff(start, append=key.size)),
            start_M=start,
            layer_M=layer_M,
            column_M=np.arange(start.size) - first[layer_M],
            place_P=replicas.place_P[here] - low * ranks,
            load_M=scaled.ravel()[key[start]],
            base_LR=fixed[low:high],
            speed_R=replicas.speed_R,
        )
        x, y, made = block.solve(load_P[here] * share[here], tolerance)
        share[here] = x / block.load_M[block.group_P]
        score[low + np.unique(layer_M)] = y[np.unique(layer_M)]
        most = max(most, made)
    return share, score, most


def solve_fast(replicas: Replicas, load: np.ndarray, *, tolerance: float = TOLERANCE) -> DispatchResult:
    """Split the tokens of one window so that the slowest rank of every layer is within `tolerance` of the optimum.

    load: float [L, E] or [1, L, E], tokens >= 0. tolerance: relative duality gap in 1e-6..1.
    Raises InputError if a value is out of range, or several windows are given.
    """
    if not 1e-6 <= tolerance <= 1.0:
        raise InputError(describe(PLACE, "tolerance", tolerance, "must be in 1e-6..1"))
    load_KLE = replicas.checked_load(load)
    if len(load_KLE) != 1:
        raise InputError(describe(PLACE, "windows", len(load_KLE), "must be 1 for the fast method", "add the windows up, or use the method lp"))
    if replicas.num_ranks > MAX_FAST_RANKS:
        raise InputError(describe(PLACE, "num_ranks", replicas.num_ranks, f"must be <= {MAX_FAST_RANKS} for the fast method", "use the method lp"))
    share, score, made = _split(replicas, load_KLE[0], tolerance)
    dual = set_dual_KLR(replicas, load_KLE[0], score)
    return make_dispatch(replicas, load_KLE, window_scale_K(load_KLE, None), share, dual, solver="dispatch-fast", status="FEASIBLE", iterations=made)
