"""What the dispatch solvers share: the problem by (layer, expert, rank) pairs, the certificate, and the answer.

The placement stays; what is chosen is the share of an expert's tokens that each of its slots serves. A rank's time is its
load divided by its speed and the layer waits for the slowest rank. Several windows share one split; their slowest times are
averaged, every window scaled to the same total load.
Certificate: weights y >= 0 with Σ_r speed_r y_kr = α_k. Whatever the split, Σ_k α_k · slowest_k >= Σ_e min over the ranks
of e of Σ_k load_ke y_kr. For one window the best y is uniform on a set of ranks: these ranks alone must serve every expert
that lives nowhere else.
Shapes: K windows, L layers, E experts, S slots, R ranks, P pairs of an expert and a rank that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe

PLACE = "dispatch"
MAX_CELLS = 1 << 27
OPTIMAL_GAP = 1e-6
"""A split may be called OPTIMAL only if its gap is at most this."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replicas:
    """Where every expert can be served: what a split depends on besides the load. Build once per placement."""

    num_layers: int
    num_experts: int
    num_ranks: int
    speed_R: np.ndarray
    """float64 [R]: relative speed of every rank, > 0."""
    pair_LS: np.ndarray
    """int64 [L, S]: pair of every slot; P for an empty slot."""
    key_P: np.ndarray
    """int64 [P], ascending: layer · E + expert of every pair."""
    place_P: np.ndarray
    """int64 [P]: layer · R + rank of every pair."""
    slots_P: np.ndarray
    """int64 [P]: slots that make up a pair, 1 unless a rank holds the expert twice."""
    slots_LE: np.ndarray
    """int64 [L, E]: slots of every expert."""
    ranks_LE: np.ndarray
    """int64 [L, E]: distinct ranks of every expert."""

    @classmethod
    def of(cls, slot_to_expert_LS: np.ndarray, slot_rank_S: np.ndarray, num_ranks: int, num_experts: int, speed_R: np.ndarray | None = None) -> Replicas:
        """Index a placement.

        slot_to_expert_LS: int [L, S], -1 where empty. slot_rank_S: int [S] in 0..R-1. speed_R: float [R] > 0; None: all equal.
        Raises InputError if a shape, an expert, a rank or a speed is wrong, or an expert has no slot.
        """
        table, ranks = np.asarray(slot_to_expert_LS), np.asarray(slot_rank_S)
        if table.ndim != 2 or table.size == 0 or table.dtype.kind not in "iu":
            raise InputError(describe(PLACE, "slot_to_expert", f"{table.dtype} {list(table.shape)}", "must be integers [layers, slots], both > 0"))
        layers, slots = table.shape
        if ranks.shape != (slots,) or ranks.dtype.kind not in "iu":
            raise InputError(describe(PLACE, "slot_rank", f"{ranks.dtype} {list(ranks.shape)}", f"must be one integer per slot, {slots}"))
        if num_ranks < 1 or ranks.min() < 0 or ranks.max() >= num_ranks:
            raise InputError(describe(PLACE, "slot_rank", [int(ranks.min()), int(ranks.max())], f"must be in 0..{num_ranks - 1}"))
        if table.min() < -1 or table.max() >= num_experts:
            raise InputError(describe(PLACE, "slot_to_expert", [int(table.min()), int(table.max())], f"must be in 0..{num_experts - 1}, or -1 where empty"))
        if layers * max(num_experts, num_ranks) > MAX_CELLS:
            raise InputError(describe(PLACE, "layers x experts", layers * num_experts, f"must be <= {MAX_CELLS}"))
        speed = np.ones(num_ranks) if speed_R is None else np.array(speed_R, dtype=np.float64)
        if speed.shape != (num_ranks,) or not np.isfinite(speed).all() or (speed <= 0).any() or speed.max() > 1e6 * speed.min():
            raise InputError(describe(PLACE, "speed", speed.tolist(), f"must be {num_ranks} finite number(s) > 0 within a factor of 1e6"))
        full = table >= 0
        layer, slot = np.nonzero(full)
        code = (layer * num_experts + table[full].astype(np.int64)) * num_ranks + ranks[slot]
        codes, pair, held = np.unique(code, return_inverse=True, return_counts=True)
        key, rank = np.divmod(codes, num_ranks)
        pair_LS = np.full((layers, slots), codes.size, dtype=np.int64)
        pair_LS[full] = pair.reshape(-1)
        copies = np.bincount(key, weights=held, minlength=layers * num_experts).astype(np.int64).reshape(layers, num_experts)
        if not copies.all():
            where = np.argwhere(copies == 0)[0]
            raise InputError(
                f"{PLACE}: layer {where[0]} has no slot for expert {where[1]} ({int((copies == 0).sum())} missing in all); every expert needs at least one slot"
            )
        return cls(
            num_layers=layers,
            num_experts=num_experts,
            num_ranks=num_ranks,
            speed_R=speed,
            pair_LS=pair_LS,
            key_P=key,
            place_P=key // num_experts * num_ranks + rank,
            slots_P=held,
            slots_LE=copies,
            ranks_LE=np.bincount(key, minlength=layers * num_experts).reshape(layers, num_experts),
        )

    @property
    def equal_P(self) -> np.ndarray:
        """float64 [P]: share of every pair if all slots of an expert serve the same."""
        return self.slots_P / self.slots_LE.ravel()[self.key_P]

    def share_LS(self, share_P: np.ndarray) -> np.ndarray:
        """Return float64 [L, S]: shares of pairs spread over their slots, 0 on empty slots."""
        return np.append(share_P / self.slots_P, 0.0)[self.pair_LS]

    def normal_P(self, share_P: np.ndarray) -> np.ndarray:
        """Return shares >= 0 that sum to 1 per expert; an expert without any gets the equal split."""
        share = np.maximum(share_P, 0.0)
        total = np.bincount(self.key_P, weights=share)[self.key_P]
        return np.where(total > 1e-12, share / np.maximum(total, 1e-12), self.equal_P)

    def time_KLR(self, load_KLE: np.ndarray, share_P: np.ndarray) -> np.ndarray:
        """Return float64 [K, L, R]: load of every rank divided by its speed."""
        shape = (self.num_layers, self.num_ranks)
        size = self.num_layers * self.num_ranks
        rows = [np.bincount(self.place_P, weights=load.ravel()[self.key_P] * share_P, minlength=size).reshape(shape) for load in load_KLE]
        return np.stack(rows) / self.speed_R

    def checked_load(self, load: np.ndarray) -> np.ndarray:
        """Return float64 [K, L, E], below 1e-200 as 0; raise InputError unless the loads fit the placement and are finite and >= 0."""
        values = np.array(load, dtype=np.float64)
        values = values[None] if values.ndim == 2 else values
        if values.ndim != 3 or values.shape[0] < 1 or values.shape[1:] != (self.num_layers, self.num_experts):
            raise InputError(describe(PLACE, "load shape", np.shape(load), f"must be [windows, layers, experts] or [{self.num_layers}, {self.num_experts}]"))
        if values.size > MAX_CELLS:
            raise InputError(describe(PLACE, "load size", values.size, f"must be <= {MAX_CELLS} numbers", "merge windows"))
        bad = ~np.isfinite(values) | (values < 0)
        if bad.any():
            k, row, expert = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(describe(PLACE, f"load of window {k}, layer {row}, expert {expert}", float(values[k, row, expert]), "must be finite and >= 0"))
        if values.max() > 1e200:
            raise InputError(describe(PLACE, "load", float(values.max()), "must be <= 1e200 tokens"))
        values[values < 1e-200] = 0.0
        return values


def experts_of(load: np.ndarray) -> int:
    """Return E, the length of the last axis of a load; raise InputError if it has none."""
    shape = np.shape(load)
    if len(shape) not in (2, 3) or 0 in shape:
        raise InputError(describe(PLACE, "load shape", shape, "must be [windows, layers, experts] or [layers, experts], all > 0"))
    return int(shape[-1])


def window_scale_K(load_KLE: np.ndarray, weight_K: np.ndarray | None) -> np.ndarray:
    """Return float64 [K]: α, the weight of a window's slowest times; 1 for a single window. Raises InputError if weights are wrong."""
    windows = len(load_KLE)
    weight = np.ones(windows) if weight_K is None else np.array(weight_K, dtype=np.float64)
    if weight.shape != (windows,) or not np.isfinite(weight).all() or (weight < 0).any() or weight.sum() <= 0:
        raise InputError(describe(PLACE, "window_weight", weight.tolist(), f"must be {windows} finite number(s) >= 0 with a positive sum"))
    weight = weight / weight.sum()
    total = load_KLE.sum(axis=(1, 2))
    return np.where(total > 0, weight * (weight @ total) / np.where(total > 0, total, 1.0), 0.0)


def dual_bound_L(replicas: Replicas, load_KLE: np.ndarray, dual_KLR: np.ndarray) -> np.ndarray:
    """Return float64 [L]: the least weighted slowest time of any split, proven by `dual_KLR` alone.

    dual_KLR: float64 [K, L, R] >= 0; a window's weight α_k is what Σ_r speed_r · dual comes to, equal in every layer.
    """
    price = np.zeros(replicas.key_P.size)
    for load, dual in zip(load_KLE, np.maximum(dual_KLR, 0.0), strict=True):
        price += load.ravel()[replicas.key_P] * dual.ravel()[replicas.place_P]
    starts = np.flatnonzero(np.diff(replicas.key_P, prepend=-1))
    return np.minimum.reduceat(price, starts).reshape(replicas.num_layers, replicas.num_experts).sum(axis=1)


def critical_LR(replicas: Replicas, load_LE: np.ndarray, score_LR: np.ndarray) -> np.ndarray:
    """Return bool [L, R]: of the sets {ranks that score at least t}, the one that must serve most load per speed.

    Never weaker than the bound of `score_LR` taken as a certificate: that bound is an average over these sets.
    """
    layers, ranks = score_LR.shape
    order = np.argsort(-score_LR, axis=1, kind="stable")
    position = np.empty_like(order)
    np.put_along_axis(position, order, np.broadcast_to(np.arange(ranks), order.shape), axis=1)
    starts = np.flatnonzero(np.diff(replicas.key_P, prepend=-1))
    last = np.maximum.reduceat(position.ravel()[replicas.place_P], starts).reshape(layers, -1)
    bins = (last + np.arange(layers)[:, None] * ranks).ravel()
    inside = np.bincount(bins, weights=load_LE.ravel(), minlength=layers * ranks).reshape(layers, ranks).cumsum(axis=1)
    best = (inside / replicas.speed_R[order].cumsum(axis=1)).argmax(axis=1)
    return position <= best[:, None]


def set_dual_KLR(replicas: Replicas, load_LE: np.ndarray, score_LR: np.ndarray) -> np.ndarray:
    """Return float64 [1, L, R]: the certificate that lies on `critical_LR`."""
    chosen = critical_LR(replicas, load_LE, score_LR)
    return (chosen / (chosen @ replicas.speed_R)[:, None])[None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchResult:
    """Shares of a fixed placement with their proof. Times are loads divided by relative speed."""

    share_LS: np.ndarray
    """float64 [L, S]: share of its expert's tokens that a slot serves, 0 where empty."""
    time_L: np.ndarray
    """float64 [L]: time of the slowest rank, averaged over windows scaled to equal load."""
    bound_L: np.ndarray
    """float64 [L]: certified lower bound of `time_L` over all splits of this placement."""
    dual_KLR: np.ndarray
    """float64 [K, L, R]: the certificate: `dual_bound_L` recomputes `bound_L` from it."""
    ideal: float
    """Σ over layers of the time if the load could be spread over all ranks."""
    status: str
    """OPTIMAL (gap <= 1e-6), FEASIBLE, or BASELINE for the equal split."""
    solver: str
    iterations: int = 0

    @property
    def value(self) -> float:
        """Σ over layers of the slowest rank's time: what a pass waits for."""
        return float(self.time_L.sum())

    @property
    def bound(self) -> float:
        """Certified lower bound of `value`."""
        return float(self.bound_L.sum())

    @property
    def gap(self) -> float:
        """(value - bound) / value, 0 without load."""
        return (self.value - self.bound) / self.value if self.value > 0 else 0.0

    @property
    def balance(self) -> float:
        """Σ ideal / Σ slowest: 1 is perfect (the balance of `moesim.balance` at equal speeds)."""
        return self.ideal / self.value if self.value > 0 else 1.0

    def facts(self) -> dict[str, object]:
        """Return what a plan records about its shares."""
        return {"solver": self.solver, "value": self.value, "bound": self.bound, "gap": self.gap, "balance": self.balance, "status": self.status}


def make_dispatch(
    replicas: Replicas, load_KLE: np.ndarray, scale_K: np.ndarray, share_P: np.ndarray, dual_KLR: np.ndarray, *, solver: str, status: str, iterations: int = 0
) -> DispatchResult:
    """Score shares and certificate; OPTIMAL and FEASIBLE are what the gap proves, whatever the solver claims."""
    share = replicas.normal_P(share_P)
    time_L = scale_K @ replicas.time_KLR(load_KLE, share).max(axis=2)
    bound_L = dual_bound_L(replicas, load_KLE, dual_KLR)
    assert (bound_L <= time_L * (1 + 1e-9)).all(), f"{solver}: a bound lies above the value it bounds"
    bound_L = np.minimum(bound_L, time_L)
    if status != "BASELINE":
        status = "OPTIMAL" if (time_L - bound_L).sum() <= OPTIMAL_GAP * time_L.sum() else "FEASIBLE"
    ideal = float(scale_K @ load_KLE.sum(axis=(1, 2)) / replicas.speed_R.sum())
    return DispatchResult(
        share_LS=replicas.share_LS(share), time_L=time_L, bound_L=bound_L, dual_KLR=dual_KLR, ideal=ideal, status=status, solver=solver, iterations=iterations
    )
