"""Placements for decode: balance the experts that a batch activates, or the time that a cost function predicts.

In decode a rank's time is that of reading the weights of its activated experts. A token picks expert e of a layer with probability
p = top_k · load / Σ load (at most 1); a slot that serves the share s of its expert's tokens is active in a batch of n tokens with
probability a = 1 - (1 - p·s)^n. Objectives, each summed over layers and averaged over windows:
- `activated`: largest Σ a over a rank's slots, divided by its speed;
- `balance+activated:W`: W · (largest rank load / ideal) + (1 - W) · (largest activated / ideal), both of the whole model;
- `latency`: largest time of a rank, as a callable predicts it from the expected tokens of every slot.
Splitting an expert c ways never lowers c·a, so one copy each, spread in proportion to speed, is the bound ("mean-based").
Swaps are searched on loads c·a(c), exact while the counts of copies c stay. Shapes: K windows, L layers, E experts, S slots, R ranks, C slots of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.activation import Decode
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.packing import from_slots_LRC, pack_LRC, to_slots_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import OPTIMAL_GAP, PlacementResult
from moesim.solvers.search import Deadline, expired, improve
from moesim.solvers.state import SearchState

ExpertSeconds = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [L, R, C], mask [L, R, C] of filled slots) → seconds [L, R]; must not fall when tokens or slots are added."""
PROXY_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of balance in the proxies that the latency search swaps on."""
ROUNDS = 1000
FEW_ROUNDS = 8
"""Swap rounds between two looks at the predicted time."""


@dataclass(slots=True, kw_only=True)
class ObjectiveResult(PlacementResult):
    """A placement with its cost under the objective; `value` is ideal / cost, `bound` ideal / `cost_bound`."""

    cost: float
    """activated: expected experts at the slowest rank, summed over layers; latency: seconds; weighted sum: 1 is ideal."""
    cost_bound: float
    """No placement of the problem costs less under an equal split (for latency: if the callable keeps its promise)."""


def parse(objective: str) -> float:
    """Return the weight of balance in an objective other than latency; raise InputError if it is unknown."""
    if objective == "activated":
        return 0.0
    name, _, text = objective.partition(":")
    try:
        weight = float(text or 0.5) if name == "balance+activated" else -1.0
    except ValueError:
        weight = -1.0
    if not 0.0 <= weight <= 1.0:
        raise InputError(describe("solve", "objective", objective, "must be activated, latency or balance+activated:W with 0 <= W <= 1"))
    return weight


def solve_objective(
    problem: PlacementProblem, objective: str, decode: Decode, *, expert_seconds: ExpertSeconds | None = None, seed: int = 0, deadline: Deadline = None
) -> ObjectiveResult:
    """Search a placement under an objective, starting from the balanced ones; no result is worse than `greedy` under the objective.

    expert_seconds: the predicted time of every rank, for `latency`. deadline: seconds left; a search cut short says TIME_LIMIT.
    Raises InputError if the objective is unknown, lacks its callable or has one that falls, or the problem has a move budget.
    """
    if problem.move_budget_slots is not None:
        raise InputError(describe("solve", "objective", objective, "cannot keep a budget of moved slots", "use the solver repair"))
    if objective == "latency" and expert_seconds is None:
        raise InputError(describe("solve", "expert_seconds", None, "must be given for the objective latency"))
    model = _Model(problem, decode, objective, expert_seconds)
    start = solve_greedy(problem, seed=seed, deadline=deadline)
    best, moves, late = start.slot_to_expert_LS.copy(), start.iterations, start.status == "TIME_LIMIT"
    cost_L = model.cost_L(best)
    for table, made, cut in _candidates(model, best, deadline):
        moves, late = moves + made, late or cut
        other_L = model.cost_L(table)
        wins = other_L < cost_L * (1 - 1e-12)
        best[wins], cost_L[wins] = table[wins], other_L[wins]
    bound_L = model.bound_L()
    if (bound_L > cost_L * (1 + 1e-7)).any():
        assert objective == "latency", f"bound {bound_L} is above the cost {cost_L}"
        raise InputError("solve: expert_seconds gave a rank less time for more tokens or slots; it must not fall")
    bound_L = np.minimum(bound_L, cost_L)
    if problem.previous is not None:
        from moesim.solvers.assignment import relabel_LS

        best = relabel_LS(problem, best)
    cost, cost_bound = float(model.cost_L(best).sum()), float(bound_L.sum())
    ideal = cost_bound if objective == "latency" else min(float(model.ideal_L.sum()), cost_bound)
    value, bound = (ideal / cost, ideal / cost_bound) if cost_bound > 0 else (1.0, 1.0)
    gap = (bound - value) / bound
    status = "TIME_LIMIT" if late else "OPTIMAL" if gap <= OPTIMAL_GAP else "FEASIBLE"
    return ObjectiveResult(
        slot_to_expert_LS=best,
        objective=objective,
        value=value,
        bound=bound,
        gap=gap,
        status=status,
        solver="objective",
        iterations=moves,
        cost=cost,
        cost_bound=cost_bound,
    )


class _Model:
    """Costs of a problem under an objective, per layer."""

    def __init__(self, problem: PlacementProblem, decode: Decode, objective: str, expert_seconds: ExpertSeconds | None) -> None:
        self.problem, self.decode, self.expert_seconds = problem, decode, expert_seconds if objective == "latency" else None
        self.weight = 0.0 if objective == "latency" else parse(objective)
        self.pick_KLE = decode.pick_KLE(problem.load_KLE)
        self.scale = self.scales(self.weight) if objective != "activated" else (np.zeros(problem.num_windows), problem.weight_K)
        balance, active = (parts.mean(axis=2) for parts in self._ideals())
        self.ideal_L = self.scale[0] @ balance + self.scale[1] @ active

    def _ideals(self) -> tuple[np.ndarray, np.ndarray]:
        speed = float(self.problem.speed_R.sum())
        return self.problem.load_KLE.sum(axis=2, keepdims=True) / speed, self.decode.active(self.pick_KLE).sum(axis=2, keepdims=True) / speed

    def scales(self, weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the weights [K] of rank loads and of activations in a weighted sum."""
        balance, active = (parts.sum(axis=(1, 2)) for parts in self._ideals())
        share, none = self.problem.weight_K, np.zeros(self.problem.num_windows)
        return (
            np.divide(weight * share, balance, out=none.copy(), where=balance > 0),
            np.divide((1 - weight) * share, active, out=none, where=active > 0),
        )

    def copies_LE(self, table_LS: np.ndarray) -> np.ndarray:
        flat = np.arange(len(table_LS))[:, None] * (self.problem.num_experts + 1) + table_LS + 1
        return np.bincount(flat.ravel(), minlength=len(table_LS) * (self.problem.num_experts + 1)).reshape(len(table_LS), -1)[:, 1:]

    def proxy_KLE(self, copies_LE: np.ndarray) -> np.ndarray:
        """Return c·a(c): loads that, split among the copies, are the activations of the slots."""
        return copies_LE * self.decode.active(self.pick_KLE / np.maximum(copies_LE, 1))

    def cost_L(self, table_LS: np.ndarray) -> np.ndarray:
        problem = self.problem
        if self.expert_seconds is not None:
            seconds = np.zeros(problem.num_layers)
            table, copies = from_slots_LRC(table_LS, problem.slots_per_rank_R), self.copies_LE(table_LS)
            index = np.maximum(table, 0).reshape(len(table), -1)
            for pick, weight in zip(self.pick_KLE, problem.weight_K, strict=True):
                tokens = np.take_along_axis(self.decode.tokens * pick / copies, index, axis=1).reshape(table.shape) * (table >= 0)
                seconds += weight * (np.asarray(self.expert_seconds(tokens, table >= 0)) / problem.speed_R).max(axis=1)
            return seconds
        rank, speed = problem.slot_rank_S, problem.speed_R
        balance = metrics.rank_time_KLR(table_LS, rank, problem.load_KLE, speed).max(axis=2)
        active = metrics.rank_time_KLR(table_LS, rank, self.proxy_KLE(self.copies_LE(table_LS)), speed).max(axis=2)
        return np.asarray(self.scale[0] @ balance + self.scale[1] @ active)

    def bound_L(self) -> np.ndarray:
        """Return float64 [L]: a cost that no placement beats: the mean, and the hottest expert cut into as many copies as there may be."""
        problem = self.problem
        ranks = problem.fill_R > 0
        cap = int(problem.fill_R.sum()) if problem.allow_duplicates_on_rank else int(ranks.sum())
        fastest = float(problem.speed_R[ranks].max())
        if self.expert_seconds is not None:
            tokens = self.decode.tokens * self.pick_KLE.max(axis=2) / cap
            shape = (problem.num_layers, problem.num_ranks, 1)
            mask = np.ones(shape, dtype=bool)
            seconds = [np.asarray(self.expert_seconds(np.broadcast_to(one[:, None, None], shape).copy(), mask)).min(axis=1) for one in tokens]
            return np.asarray(problem.weight_K @ np.stack(seconds)) / fastest
        hottest = self.decode.active(self.pick_KLE.max(axis=2) / cap) / fastest
        active = np.maximum(self._ideals()[1][..., 0], hottest)
        return np.asarray(self.scale[0] @ layer_bound_KL(problem) + self.scale[1] @ active)


def _candidates(model: _Model, start_LS: np.ndarray, deadline: Deadline) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield (placement, moves, cut short): searches with the balanced counts of copies and with those that activate the fewest, per weight."""
    problem = model.problem
    every = PROXY_WEIGHTS if model.expert_seconds is not None else (model.weight,)
    for weight in every:
        scale = model.scales(weight)
        for copies in (model.copies_LE(start_LS), _cold_copies_LE(model)):
            if expired(deadline):
                yield start_LS, 0, True
                return
            load = np.concatenate((problem.load_KLE, model.proxy_KLE(copies)))
            weight_KL = np.repeat(np.concatenate(scale)[:, None], problem.num_layers, axis=1)
            keep = np.concatenate(scale) > 0
            load, weight_KL = load[keep], weight_KL[keep]
            if len(load) == 0:
                return
            same = problem.allow_duplicates_on_rank
            packed_copies = copies.copy()
            packed = pack_LRC(load, weight_KL, packed_copies, problem.fill_R, problem.speed_R, allow_duplicates=same)
            tables = [packed] if (packed_copies == copies).all() else []
            if (copies == model.copies_LE(start_LS)).all():
                tables.append(from_slots_LRC(start_LS, problem.slots_per_rank_R))
            for table in tables:
                yield from _swaps(model, load, weight_KL, table, deadline)


def _swaps(model: _Model, load: np.ndarray, weight_KL: np.ndarray, table_LRC: np.ndarray, deadline: Deadline) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield placements along a descent by swaps alone; for a predicted time, at several stages of it."""
    problem = model.problem
    state = SearchState.of(load, weight_KL, table_LRC.copy(), problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank)
    floor = (metrics.ideal_KL(load, problem.speed_R) * weight_KL).sum(axis=0)
    stages = (0, FEW_ROUNDS, 4 * FEW_ROUNDS, ROUNDS) if model.expert_seconds is not None else (ROUNDS,)
    for rounds in stages:
        moves, cut = improve(state, floor, max_rounds=rounds, max_deep=0, deadline=deadline)
        yield to_slots_LS(state.table_LRC, problem.slots_per_rank_R), moves, cut
        if cut:
            return


def _cold_copies_LE(model: _Model) -> np.ndarray:
    """Return int64 [L, E]: extra copies where they add the fewest activations."""
    problem = model.problem
    copies = np.ones((problem.num_layers, problem.num_experts), dtype=np.int64)
    cap = int(problem.fill_R.sum()) if problem.allow_duplicates_on_rank else int((problem.fill_R > 0).sum())
    row = np.arange(problem.num_layers)
    for _ in range(int(problem.fill_R.sum()) - problem.num_experts):
        added = np.einsum("k,kle->le", problem.weight_K, model.proxy_KLE(copies + 1) - model.proxy_KLE(copies))
        added[copies >= cap] = np.inf
        copies[row, added.argmin(axis=1)] += 1
    return copies


def recompute(problem: PlacementProblem, table_LS: np.ndarray, objective: str, decode: Decode) -> float:
    """Return the cost of a placement by plain loops that share nothing with the search (not for `latency`)."""
    weight = parse(objective)
    speeds, ranks = problem.speed_R.tolist(), problem.slot_rank_S.tolist()
    total = 0.0
    for window, importance in zip(problem.load_KLE.tolist(), problem.weight_K.tolist(), strict=True):
        slowest_load = slowest_active = ideal_load = ideal_active = 0.0
        for loads, row in zip(window, table_LS.tolist(), strict=True):
            load_R, active_R = [0.0] * len(speeds), [0.0] * len(speeds)
            whole = sum(loads)
            pick = [min(1.0, decode.top_k * load / whole) if whole else 0.0 for load in loads]
            for rank, expert in zip(ranks, row, strict=True):
                if expert >= 0:
                    copies = row.count(expert)
                    load_R[rank] += loads[expert] / copies / speeds[rank]
                    active_R[rank] += (1 - (1 - pick[expert] / copies) ** decode.tokens) / speeds[rank]
            slowest_load, slowest_active = slowest_load + max(load_R), slowest_active + max(active_R)
            ideal_load += whole / sum(speeds)
            ideal_active += sum(1 - (1 - one) ** decode.tokens for one in pick) / sum(speeds)
        if objective == "activated":
            total += importance * slowest_active
        elif ideal_load > 0:
            total += importance * (weight * slowest_load / ideal_load + (1 - weight) * slowest_active / ideal_active)
    return total
