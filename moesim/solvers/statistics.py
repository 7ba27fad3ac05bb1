"""Numbers that explain a plan: how skewed loads are, how they drift, what affinity there is, what an extra slot buys.

Every function returns a frozen dataclass with arrays for figures and `rows()` for a table; nothing here plans or draws.
Balance is Σ mean / Σ max over ranks (`moesim.balance`); bounds are certified. Loads are tokens or any additive weight.
Shapes: K windows, L MoE layers, E experts, X shares of the experts, N numbers of extra slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from moesim.balance import balance_of
from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.affinity.null import shuffle_choices, shuffle_layers
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.affinity.transitions import coactivation_LEE, count_transitions
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.problem import PlacementProblem

Row: TypeAlias = dict[str, float | int | str]
PLACE = "statistics"


def _loads(load: np.ndarray, axes: int) -> np.ndarray:
    table = np.asarray(load, dtype=np.float64)
    if table.ndim != axes or table.size == 0:
        raise InputError(describe(PLACE, "load shape", table.shape, f"must have {axes} axes, all > 0"))
    if not np.isfinite(table).all() or (table < 0).any():
        raise InputError(describe(PLACE, "load", float(table.min()), "must be finite and >= 0 throughout"))
    return table


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCurves:
    """How unevenly the experts of every layer are used."""

    share_LE: np.ndarray
    """float64 [L, E]: share of the layer's load of every expert, largest first; 0 in a layer without load."""
    top_shares_X: np.ndarray
    """float64 [X]: parts of the experts asked for."""
    top_load_LX: np.ndarray
    """float64 [L, X]: share of the load on the busiest part of the experts."""
    gini_L: np.ndarray
    """float64 [L]: 0 all equal, 1 - 1/E one expert takes everything."""
    cv_L: np.ndarray
    """float64 [L]: standard deviation over mean."""
    max_over_mean_L: np.ndarray
    """float64 [L]: hottest expert over the mean."""

    def rows(self) -> list[Row]:
        """Return one row per layer."""
        result: list[Row] = []
        for layer in range(len(self.share_LE)):
            row: Row = {"layer": layer, "max_over_mean": float(self.max_over_mean_L[layer]), "cv": float(self.cv_L[layer]), "gini": float(self.gini_L[layer])}
            row.update({f"top_{share:g}": float(part) for share, part in zip(self.top_shares_X, self.top_load_LX[layer], strict=True)})
            result.append(row)
        return result


def load_curves(load_LE: np.ndarray, *, top_shares: Sequence[float] = (0.01, 0.05, 0.1, 0.25)) -> LoadCurves:
    """Describe the skew of every layer. top_shares: parts of the experts, in 0..1, rounded up to whole experts."""
    load = _loads(load_LE, 2)
    if not all(0.0 < share <= 1.0 for share in top_shares):
        raise InputError(describe(PLACE, "top_shares", list(top_shares), "must be in 0..1, 0 excluded"))
    experts = load.shape[1]
    total, mean = load.sum(axis=1), load.mean(axis=1)
    some = total > 0
    share = np.divide(-np.sort(-load, axis=1), total[:, None], out=np.zeros_like(load), where=some[:, None])
    taken = np.array([max(1, int(np.ceil(part * experts - 1e-9))) for part in top_shares], dtype=np.int64)
    rank = np.arange(1, experts + 1)
    gini = np.where(some, (share * (experts + 1 - 2 * rank)).sum(axis=1) / experts, 0.0)
    return LoadCurves(
        share_LE=share,
        top_shares_X=np.asarray(top_shares, dtype=np.float64),
        top_load_LX=np.cumsum(share, axis=1)[:, taken - 1],
        gini_L=gini,
        cv_L=np.divide(load.std(axis=1), mean, out=np.zeros(len(load)), where=some),
        max_over_mean_L=np.divide(load.max(axis=1), mean, out=np.ones(len(load)), where=some),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """How far windows are from each other, and what a plan made on one is worth on another."""

    names: tuple[str, ...]
    cosine_KK: np.ndarray
    """float64 [K, K]: cosine of the loads of two windows, averaged over layers."""
    l1_KK: np.ndarray
    """float64 [K, K]: half the L1 distance of the load shares, averaged over layers: the share of the load that moved, 0..1."""
    transfer_KK: np.ndarray | None
    """float64 [K, K]: balance of the plan made on the row's window under the column's load; None: no planner was given."""

    @property
    def transfer_loss(self) -> float:
        """Mean balance on the own window minus that on the others; 0 for one window or without a planner."""
        count = len(self.names)
        if self.transfer_KK is None or count < 2:
            return 0.0
        own = float(np.trace(self.transfer_KK))
        return own / count - (float(self.transfer_KK.sum()) - own) / (count * (count - 1))

    def rows(self) -> list[Row]:
        """Return one row per ordered pair of windows."""
        result: list[Row] = []
        for one, name in enumerate(self.names):
            for other, later in enumerate(self.names):
                row: Row = {"planned_on": name, "scored_on": later, "cosine": float(self.cosine_KK[one, other]), "l1": float(self.l1_KK[one, other])}
                if self.transfer_KK is not None:
                    row["balance"] = float(self.transfer_KK[one, other])
                result.append(row)
        return result


Planner: TypeAlias = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Loads float64 [L, E] → (slot_to_expert int [L, S], slot_rank int [S])."""


def drift(load_KLE: np.ndarray, *, planner: Planner | None = None, names: Sequence[str] | None = None) -> Drift:
    """Compare windows pair by pair. planner: plans on the loads of one window; its plans are scored on all."""
    load = _loads(load_KLE, 3)
    windows = len(load)
    if names is not None and len(names) != windows:
        raise InputError(describe(PLACE, "names", len(names), f"must be one per window, {windows}"))
    share = np.divide(load, load.sum(axis=2, keepdims=True), out=np.zeros_like(load), where=load.sum(axis=2, keepdims=True) > 0)
    length = np.linalg.norm(share, axis=2, keepdims=True)
    unit = np.divide(share, length, out=np.zeros_like(share), where=length > 0)
    l1 = np.stack([np.abs(share - one).sum(axis=2).mean(axis=1) / 2 for one in share])
    transfer = None
    if planner is not None:
        transfer = np.empty((windows, windows))
        for index, one in enumerate(load):
            table, slot_rank = planner(one)
            ranks = int(np.max(slot_rank)) + 1
            time = metrics.rank_time_KLR(table, slot_rank, load, np.ones(ranks))
            transfer[index] = [balance_of(rows).mean_over_max for rows in time]
    return Drift(
        names=tuple(names) if names is not None else tuple(str(index) for index in range(windows)),
        cosine_KK=np.einsum("ale,ble->ab", unit, unit) / load.shape[1],
        l1_KK=l1,
        transfer_KK=transfer,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityStatistics:
    """How much choices depend on each other, beside the same with the dependence shuffled away."""

    kind: str
    """`inter_layer` (row = layer pair) or `coactivation` (row = layer)."""
    information_n: np.ndarray
    """float64 [n]: mutual information of the two choices of a pair, bits."""
    null_information_n: np.ndarray
    """float64 [n]: the same on the shuffled tokens: what the sample size alone feigns."""
    top_share_n: np.ndarray
    """float64 [n]: how often a pair goes to the commonest partner of its first expert."""
    null_top_share_n: np.ndarray
    """float64 [n]: the same on the shuffled tokens."""
    joint_nEE: np.ndarray
    """float64 [n, E, E]: share of every pair of experts among the pairs."""
    null_joint_nEE: np.ndarray
    """float64 [n, E, E]: the same on the shuffled tokens."""

    def rows(self) -> list[Row]:
        """Return one row per layer pair or layer."""
        columns = (self.information_n, self.null_information_n, self.top_share_n, self.null_top_share_n)
        names = ("information_bits", "null_information_bits", "top_share", "null_top_share")
        return [{"row": row, **{name: float(column[row]) for name, column in zip(names, columns, strict=True)}} for row in range(len(self.information_n))]


def inter_layer_affinity(routes: TokenRoutes, *, pairs: str = "all", seed: int = 0) -> AffinityStatistics:
    """Measure the dependence of the choices of consecutive layers, and of the same tokens shuffled per layer."""
    return _affinity(
        "inter_layer", count_transitions(routes, pairs).transitions_LEE, count_transitions(shuffle_layers(routes, seed=seed), pairs).transitions_LEE
    )


def coactivation(routes: TokenRoutes, *, seed: int = 0) -> AffinityStatistics:
    """Measure the dependence of the choices within a layer, and of the same choices traded between tokens."""
    return _affinity("coactivation", coactivation_LEE(routes), coactivation_LEE(shuffle_choices(routes, seed=seed)))


def _affinity(kind: str, table_nEE: np.ndarray, null_nEE: np.ndarray) -> AffinityStatistics:
    joint, null = _joint(table_nEE), _joint(null_nEE)
    return AffinityStatistics(
        kind=kind,
        information_n=_information_n(joint),
        null_information_n=_information_n(null),
        top_share_n=joint.max(axis=2).sum(axis=1),
        null_top_share_n=null.max(axis=2).sum(axis=1),
        joint_nEE=joint,
        null_joint_nEE=null,
    )


def _joint(table_nEE: np.ndarray) -> np.ndarray:
    total = table_nEE.sum(axis=(1, 2), keepdims=True)
    return np.divide(table_nEE, total, out=np.zeros_like(table_nEE), where=total > 0)


def _information_n(joint_nEE: np.ndarray) -> np.ndarray:
    independent = joint_nEE.sum(axis=2, keepdims=True) * joint_nEE.sum(axis=1, keepdims=True)
    ratio = np.divide(joint_nEE, independent, out=np.ones_like(joint_nEE), where=joint_nEE > 0)
    return np.maximum((joint_nEE * np.log2(ratio)).sum(axis=(1, 2)), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotValue:
    """The best balance that any placement could reach with so many extra slots: what redundancy can buy at most."""

    extra_N: np.ndarray
    """int64 [N]: slots of a layer beyond one per expert."""
    bound_NL: np.ndarray
    """float64 [N, L]: upper bound of the balance of every layer."""
    total_N: np.ndarray
    """float64 [N]: upper bound of the balance over all layers."""

    @property
    def gain_per_slot_N(self) -> np.ndarray:
        """float64 [N]: rise of the total bound per slot since the entry before; 0 first."""
        step = np.diff(self.extra_N, prepend=self.extra_N[:1])
        return np.divide(np.diff(self.total_N, prepend=self.total_N[:1]), step, out=np.zeros(len(step)), where=step > 0)

    def rows(self) -> list[Row]:
        """Return one row per number of extra slots."""
        gain = self.gain_per_slot_N
        return [
            {"extra_slots": int(extra), "balance_bound": float(total), "worst_layer_bound": float(worst), "gain_per_slot": float(one)}
            for extra, total, worst, one in zip(self.extra_N, self.total_N, self.bound_NL.min(axis=1), gain, strict=True)
        ]


def slot_value(load_LE: np.ndarray, *, num_ranks: int, extra_slots: Sequence[int] | None = None) -> SlotValue:
    """Bound the balance for growing numbers of extra slots, dealt to ranks as evenly as they go.

    extra_slots: rising numbers >= 0; None: 0 and 1, 2, 4 … per rank up to as many as there are experts.
    Raises InputError if they do not rise, InfeasibleError if experts and extra slots do not fit the ranks.
    """
    load = _loads(load_LE, 2)
    experts = load.shape[1]
    if num_ranks < 1:
        raise InputError(describe(PLACE, "num_ranks", num_ranks, "must be >= 1"))
    if extra_slots is None:
        spare = -experts % num_ranks
        per_rank = [0] + [1 << power for power in range((max(1, experts // num_ranks)).bit_length())]
        extra_slots = [spare + one * num_ranks for one in per_rank]
    extra = np.asarray(extra_slots, dtype=np.int64)
    if extra.ndim != 1 or not extra.size or extra[0] < 0 or (np.diff(extra) <= 0).any():
        raise InputError(describe(PLACE, "extra_slots", list(extra_slots), "must be rising integers >= 0"))
    mean_L = load.sum(axis=1) / num_ranks
    peak = []
    for one in extra.tolist():
        base, more = divmod(experts + one, num_ranks)
        slots = np.full(num_ranks, base)
        slots[:more] += 1
        peak.append(layer_bound_KL(PlacementProblem(load_KLE=load, num_ranks=num_ranks, slots_per_rank_R=slots))[0])
    peak_NL = np.stack(peak)
    bound = np.divide(np.broadcast_to(mean_L, peak_NL.shape), peak_NL, out=np.ones_like(peak_NL), where=peak_NL > 0)
    total = np.divide(mean_L.sum(), peak_NL.sum(axis=1), out=np.ones(len(extra)), where=peak_NL.sum(axis=1) > 0)
    return SlotValue(extra_N=extra, bound_NL=np.minimum(bound, 1.0), total_N=np.minimum(total, 1.0))
