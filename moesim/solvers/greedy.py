"""The default solver: greedy copies and packing for all layers in lock step, then a local search to the bound.

Experts are first put into a canonical order (falling load), so that renaming them changes nothing. With several
windows the search lowers the risk measure over windows; for `worst` and `cvar` it is rerun with the weights of the
windows moved towards the bad ones, and the best placement seen is kept.
Options: `risk` (mean, worst, cvar:ALPHA), `rounds` (swap rounds), `restarts` (further counts of copies tried where a gap stays).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.packing import capped_copies_LE, copies_LE, pack_LRC, to_slots_LS
from moesim.solvers.prices import Prices, paired_counts, pairs_LRC, priceable, raise_bound
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline, disturb, expired, improve
from moesim.solvers.state import SearchState

RESTARTS: tuple[tuple[float, bool], ...] = ((0.9, False), (0.85, True), (0.95, False), (0.8, True), (1.0, False))
"""Further ways to count copies: (largest copy as a share of the mean rank, spread leftovers over light experts)."""
PEAK_START = ((0.0, False),)
"""With several windows: copies by each expert's largest load instead; the bound is too weak there to tell when more would help."""
RESTART_GAP = 1.002
"""Layers whose cost exceeds their bound by this factor are worth a restart."""
MAX_KICKS = 20
MAX_COPIES = 24
PATIENCE = 4
"""Disturbed restarts in a row that improve no layer before the search gives up."""
PRICE_BUDGET = 24_000_000
"""Prices of moves after which no further restart begins; a count, so that results do not depend on the machine."""
RISK_ROUNDS = 3
"""Reruns with moved window weights for a risk measure other than the mean."""


def int_option(options: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    """Return an integer option within low..high, or raise InputError."""
    value = options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(describe("solver options", key, value, f"must be an integer in {low}..{high}"))
    return value


def _canonical_order(problem: PlacementProblem) -> np.ndarray:
    """Return [L, E]: experts by falling weighted load, ties by the load of every window; only true twins keep their own order."""
    load = problem.load_KLE
    key = (load * problem.weight_K[:, None, None]).sum(axis=0)
    order = np.empty(key.shape, dtype=np.int64)
    for layer in range(key.shape[0]):
        order[layer] = np.lexsort((*(-load[k, layer] for k in range(len(load))), -key[layer]))
    return order


@dataclass(slots=True)
class _Search:
    """One problem in canonical expert order, with what its searches have in common."""

    problem: PlacementProblem
    load_KLE: np.ndarray
    bound_KL: np.ndarray
    rounds: int
    deadline: Deadline
    seed: int
    moves: int = 0
    late: bool = False
    priced: int = 0

    def pack(self, copies: np.ndarray, weight_KL: np.ndarray, layers: np.ndarray) -> np.ndarray:
        problem = self.problem
        return pack_LRC(
            self.load_KLE[:, layers], weight_KL[:, layers], copies, problem.fill_R, problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank
        )

    def improve(self, table_LRC: np.ndarray, weight_KL: np.ndarray, layers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Search from a placement of some layers; return the better one and the time of every window's slowest rank."""
        weight = weight_KL[:, layers]
        state = SearchState.of(self.load_KLE[:, layers], weight, table_LRC, self.problem.speed_R, allow_duplicates=self.problem.allow_duplicates_on_rank)
        made, cut = improve(state, (self.bound_KL[:, layers] * weight).sum(axis=0), max_rounds=self.rounds, deadline=self.deadline)
        self.moves, self.late, self.priced = self.moves + made, self.late or cut, self.priced + state.priced
        return state.table_LRC, state.time_KLR().max(axis=2)

    def from_scratch(self, weight_KL: np.ndarray, restarts: int) -> tuple[np.ndarray, np.ndarray]:
        """Pack and search all layers, then try other counts of copies on the layers that stay off their bound."""
        problem, fill = self.problem, self.problem.fill_R
        scaled = self.load_KLE * weight_KL[..., None]
        mean, slots = scaled.sum(axis=0), int(fill.sum())
        cap = slots if problem.allow_duplicates_on_rank else int((fill > 0).sum())
        every = np.arange(problem.num_layers)
        start = self.pack(copies_LE(mean, slots, cap), weight_KL, every)
        priced = bool(restarts) and self.rounds > 0 and priceable(problem)
        if priced and int(fill.max()) == 2:
            layers, paired = self._price(SearchState.of(self.load_KLE, weight_KL, start, problem.speed_R).time_KLR().max(axis=2)[0])
            if layers.size:
                start[layers] = paired
        table, peak_KL = self.improve(start, weight_KL, every)
        floor = (self.bound_KL * weight_KL).sum(axis=0) * RESTART_GAP
        windows = problem.num_windows > 1
        for target, spread in PEAK_START if windows else RESTARTS[:restarts]:
            layers = np.flatnonzero((peak_KL * weight_KL).sum(axis=0) > floor)
            if slots == problem.num_experts or layers.size == 0 or self.priced > PRICE_BUDGET:
                break
            if expired(self.deadline):
                self.late = True
                break
            if target == 0.0:
                copies = copies_LE(scaled[:, layers].max(axis=0), slots, cap)
            else:
                copies = capped_copies_LE(mean[layers], slots, cap, floor[layers] / RESTART_GAP * target, spread=spread)
            other, other_KL = self.improve(self.pack(copies, weight_KL, layers), weight_KL, layers)
            wins = ((other_KL - peak_KL[:, layers]) * weight_KL[:, layers]).sum(axis=0) < 0
            table[layers[wins]], peak_KL[:, layers[wins]] = other[wins], other_KL[:, wins]
        if priced:
            layers, paired = self._price(peak_KL[0])
            if layers.size:
                other, other_KL = self.improve(paired, weight_KL, layers)
                wins = other_KL[0] < peak_KL[0, layers]
                table[layers[wins]], peak_KL[:, layers[wins]] = other[wins], other_KL[:, wins]
            floor = (self.bound_KL * weight_KL).sum(axis=0) * RESTART_GAP
        self._kick(table, peak_KL, weight_KL, floor)
        return table, peak_KL

    def _price(self, peak_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Raise the bound of layers that stay off it and, with two slots per rank, choose copies together with the pairs.

        Returns the layers whose pairs beat `peak_L`, and their tables.
        """
        fill, speed, nothing = self.problem.fill_R[self.problem.fill_R > 0], self.problem.speed_R[0], np.zeros(0, dtype=np.int64)
        layers = np.flatnonzero(peak_L > self.bound_KL[0] * RESTART_GAP)
        if not layers.size or expired(self.deadline):
            return nothing, nothing
        load, high = self.load_KLE[0, layers], peak_L[layers] * speed
        prices = Prices(load_NE=load, ranks=len(fill), slots=int(fill.min()), total=int(fill.sum()), high_N=high)
        low = raise_bound(prices, self.bound_KL[0, layers] * speed, high, RESTART_GAP)
        self.bound_KL[0, layers] = low / speed
        if fill.max() > 2 or len(fill) < self.problem.num_ranks:
            return nothing, nothing
        copies, time = paired_counts(prices, low, high, self.seed)
        found = np.flatnonzero(time < high)
        return layers[found], pairs_LRC(load[found], copies[found]) if found.size else nothing

    def _kick(self, table: np.ndarray, peak_KL: np.ndarray, weight_KL: np.ndarray, floor: np.ndarray) -> None:
        """Disturb the best placement of layers that stay off their bound and search again; small problems get more tries."""
        generator = np.random.Generator(np.random.PCG64(self.seed))
        idle = 0
        for _ in range(MAX_KICKS):
            layers = np.flatnonzero((peak_KL * weight_KL).sum(axis=0) > floor)
            if layers.size == 0 or self.rounds == 0 or idle == PATIENCE or self.priced > PRICE_BUDGET:
                break
            # few layers are disturbed in several ways at once: a search costs the same for many as for one
            copies = int(np.clip(MAX_COPIES // layers.size, 1, MAX_COPIES))
            if expired(self.deadline):
                self.late = True
                break
            many = np.repeat(layers, copies)
            state = SearchState.of(
                self.load_KLE[:, many], weight_KL[:, many], table[many], self.problem.speed_R, allow_duplicates=self.problem.allow_duplicates_on_rank
            )
            for layer in range(many.size):
                disturb(state, layer, generator)
            other, other_KL = self.improve(state.table_LRC, weight_KL, many)
            cost = (other_KL * weight_KL[:, many]).sum(axis=0).reshape(-1, copies)
            best = cost.argmin(axis=1) + np.arange(layers.size) * copies
            wins = cost.min(axis=1) < (peak_KL[:, layers] * weight_KL[:, layers]).sum(axis=0)
            table[layers[wins]], peak_KL[:, layers[wins]] = other[best[wins]], other_KL[:, best[wins]]
            idle = 0 if wins.any() else idle + 1


def search_table_LRC(
    problem: PlacementProblem, options: Mapping[str, Any], deadline: Deadline, bound_KL: np.ndarray, *, seed: int = 0
) -> tuple[np.ndarray, int, bool, np.ndarray]:
    """Return the placement table [L, R, C], the moves made, whether the deadline cut the search short, and `bound_KL`, raised where prices prove more."""
    risk = str(options.get("risk", "mean"))
    order = _canonical_order(problem)
    search = _Search(
        problem, np.take_along_axis(problem.load_KLE, order[None], axis=2), bound_KL.copy(), int_option(options, "rounds", 2000, 0, 10**6), deadline, seed
    )
    weight_K = problem.weight_K
    ideal_KL = metrics.ideal_KL(problem.load_KLE, problem.speed_R)
    table, peak_KL = search.from_scratch(cost_weight_KL(problem, weight_K), int_option(options, "restarts", len(RESTARTS), 0, len(RESTARTS)))
    if problem.num_windows > 1 and risk != "mean":
        every = np.arange(problem.num_layers)
        current, weights, value = table, weight_K, metrics.fold_windows(peak_KL, ideal_KL, weight_K, risk)
        for step in range(RISK_ROUNDS):
            weights = 0.5 * weights + 0.5 * metrics.risk_weights(metrics.imbalance_K(peak_KL, ideal_KL), weight_K, risk)
            # other weights may ask for other copies: should the first round find nothing from here, it starts from scratch
            for fresh in (False, True) if step == 0 else (False,):
                weight_KL = cost_weight_KL(problem, weights)
                current, peak_KL = search.from_scratch(weight_KL, 0) if fresh else search.improve(current.copy(), weight_KL, every)
                now = metrics.fold_windows(peak_KL, ideal_KL, weight_K, risk)
                if now > value:
                    value, table = now, current
                    break
    named = np.take_along_axis(order, np.maximum(table, 0).reshape(len(table), -1), axis=1).reshape(table.shape)
    return np.where(table >= 0, named, -1).astype(np.int32), search.moves, search.late, search.bound_KL


def solve_greedy(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Place experts by greedy packing and local search; the seed is that of the disturbed restarts."""
    options = options or {}
    table, moves, late, bound_KL = search_table_LRC(problem, options, deadline, layer_bound_KL(problem), seed=seed)
    slots = to_slots_LS(table, problem.slots_per_rank_R)
    if problem.previous is not None:
        from moesim.solvers.assignment import relabel_LS

        slots = relabel_LS(problem, slots)
    status = "TIME_LIMIT" if late else "FEASIBLE"
    return make_result(problem, slots, solver="greedy", status=status, iterations=moves, risk=str(options.get("risk", "mean")), bound_KL=bound_KL)
