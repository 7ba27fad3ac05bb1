"""Repair a running placement with few moved slots: the best balance that a budget of moves buys.

Every layer walks from the running placement by its best moves per moved slot (a reassigned slot costs one, a swap
two), once with all moves and once with swaps only; a fresh placement, its ranks relabelled by assignment, is the
far end. What budget goes to which layer is then decided exactly (a multiple-choice knapsack over the walks).
Under another objective the walk is that of `repair_terms`. Moved slots are counted as positions whose expert differs from the running placement,
after slots inside a rank are put in order. Options: `risk` (scores the answer; the walks lower the mean), `frontier` (True: also the placement per
budget), `fits` (a callable: placement [L, S] → bool; of the placements along growing budgets, the last before one that does not fit is the answer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.solvers import metrics
from moesim.solvers.assignment import align_LS, relabel_LS
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.greedy import search_table_LRC
from moesim.solvers.packing import from_slots_LRC, to_slots_LS
from moesim.solvers.parts import parts_of
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import FrontierPoint, PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline, expired
from moesim.solvers.state import SearchState

FRONTIER_STEP, FINEST = 1.3, 2000
"""Factor from one budget of the frontier to the next; part of the largest that the first one is."""
MAX_STEPS = 400


@dataclass(slots=True)
class _Points:
    """What one layer can become: moves, cost and placement of every candidate."""

    moves: list[int]
    cost: list[float]
    table_RC: list[np.ndarray]


def solve_repair(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Improve `problem.previous` with at most `problem.move_budget_slots` moved slots."""
    options = options or {}
    risk = str(options.get("risk", "mean"))
    if problem.previous is None:
        raise InputError("solver repair: needs the placement that is running now; give `previous` (--from PLAN)")
    whole = problem.num_layers * problem.num_slots
    budget = whole if problem.move_budget_slots is None else min(problem.move_budget_slots, whole)
    if problem.objective.alone != "balance":
        return _repair_objective(problem, budget, seed, deadline, options)
    weight_KL = cost_weight_KL(problem, problem.weight_K)
    bound_KL = layer_bound_KL(problem)
    limit = budget if risk == "mean" else whole
    found: dict[int, _Points] = {}
    made, late = 0, False
    for part in parts_of(problem):
        at = part.layers_n
        points, steps, late = _candidates(part.problem, bound_KL[:, at], weight_KL[:, at], limit, budget >= problem.num_slots // 4, late, deadline)
        found |= zip(at.tolist(), points, strict=True)
        made += steps
    points = [found[layer] for layer in range(problem.num_layers)]
    chosen = _choose(points, budget)
    if options.get("fits"):
        budget = _largest_fit(problem, points, chosen, budget, options["fits"])
    table = _assemble(problem, points, chosen[budget])
    result = make_result(problem, table, solver="repair", status="TIME_LIMIT" if late else "FEASIBLE", iterations=made, risk=risk, bound_KL=bound_KL)
    if options.get("frontier"):
        result.frontier = _frontier(problem, points, chosen, budget, risk)
    return result


def _repair_objective(problem: PlacementProblem, budget: int, seed: int, deadline: Deadline, options: Mapping[str, Any]) -> PlacementResult:
    """Repair under another objective than balance: the same knapsack over candidates that its own cost judges."""
    from moesim.solvers.objectives import score
    from moesim.solvers.repair_terms import walk
    from moesim.solvers.terms import Terms

    if problem.experts_L is not None:
        raise InputError(f"solver repair: under {problem.objective.name} layers must have equally many experts; repair for balance")
    if str(options.get("risk", "mean")) != "mean":
        raise InputError(f"solver repair: {problem.objective.name} averages windows; leave out the risk")
    terms, late, made = Terms(problem), False, -1
    points = [_Points([], [], []) for _ in range(problem.num_layers)]
    for table, cost_L, cut in walk(problem, terms, budget, seed, deadline):
        late, made = late or cut, made + 1
        moves_L = (table != problem.previous).sum(axis=1)
        for layer, rows in enumerate(from_slots_LRC(table, problem.slots_per_rank_R)):
            point = points[layer]
            if not point.cost or cost_L[layer] < point.cost[0]:
                point.moves.append(int(moves_L[layer]))
                point.cost.append(float(cost_L[layer]))
                point.table_RC.append(rows)
    chosen = _choose(points, budget)
    if options.get("fits"):
        budget = _largest_fit(problem, points, chosen, budget, options["fits"])
    bound_L = terms.bound_L()

    def scored(moves: int) -> PlacementResult:
        table = _assemble(problem, points, chosen[moves])
        return score(terms, table, solver="repair", status="TIME_LIMIT" if late else "FEASIBLE", iterations=made, bound_L=bound_L)

    result = scored(budget)
    if options.get("frontier"):
        result.frontier = _rising(problem, [scored(moves) for moves in _budgets(budget)])
    return result


def _candidates(
    problem: PlacementProblem, bound_KL: np.ndarray, weight_KL: np.ndarray, limit: int, fresh: bool, late: bool, deadline: Deadline
) -> tuple[list[_Points], int, bool]:
    """Return what every layer can become within `limit` moves, the moves tried and whether time ran out; fresh: a placement from scratch too."""
    assert problem.previous is not None
    floor = (bound_KL * weight_KL).sum(axis=0)
    running = from_slots_LRC(problem.previous, problem.slots_per_rank_R)
    state = SearchState.of(problem.load_KLE, weight_KL, running.copy(), problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank)
    points = [_Points([0], [float(cost)], [table]) for cost, table in zip(state.cost_L(), running, strict=True)]
    holes = _fill_holes(problem, state)
    if holes.any():
        _record(points, np.flatnonzero(holes), holes, state)
    made = 0
    for swaps_only in (False, True):
        steps, cut = _walk(points, _copy(state), floor, limit, swaps_only, deadline)
        made, late = made + steps, late or cut
    if not late and fresh:
        late = _add_fresh(problem, points, bound_KL, weight_KL, deadline)
    return points, made, late


def _copy(state: SearchState) -> SearchState:
    return SearchState.of(state.load_KLE, state.weight_KL, state.table_LRC.copy(), state.speed_R, allow_duplicates=state.allow_duplicates)


def _fill_holes(problem: PlacementProblem, state: SearchState) -> np.ndarray:
    """Give every needlessly empty slot to the heaviest expert (per copy) that its rank lacks; return holes filled per layer [L]."""
    filled = np.zeros(problem.num_layers, dtype=np.int64)
    lacking = problem.fill_R[None, :] - (state.table_LRC >= 0).sum(axis=2)
    for layer, rank in np.argwhere(lacking > 0):
        for _ in range(int(lacking[layer, rank])):
            size = (state.load_KLE[:, layer] * state.weight_KL[:, [layer]]).sum(axis=0) / (state.copies_LE[layer] + 1)
            size[state.held_LRE[layer, rank] > 0] -= 0.0 if state.allow_duplicates else np.inf
            expert = int(size.argmax())
            # the last slots of a short rank do not exist: holes are looked for among the rank's own
            slot = int(np.flatnonzero(state.table_LRC[layer, rank, : problem.slots_per_rank_R[rank]] < 0)[0])
            state.table_LRC[layer, rank, slot] = expert
            state.copies_LE[layer, expert] += 1
            state.held_LRE[layer, rank, expert] += 1
            filled[layer] += 1
    if filled.any():
        state.filled_RC = state.table_LRC >= 0
        state.refresh(np.arange(problem.num_layers))
    return filled


def _record(points: list[_Points], layers: np.ndarray, moves_L: np.ndarray, state: SearchState) -> None:
    cost = state.cost_L()
    for layer in layers:
        # a dearer point that is no better will never be chosen
        if cost[layer] < points[layer].cost[0]:
            points[layer].moves.append(int(moves_L[layer]))
            points[layer].cost.append(float(cost[layer]))
            points[layer].table_RC.append(state.table_LRC[layer].copy())


def _walk(points: list[_Points], state: SearchState, floor: np.ndarray, budget: int, swaps_only: bool, deadline: Deadline) -> tuple[int, bool]:
    """Make the best move per moved slot in every layer until none helps or the budget is gone; record every stop."""
    before = SearchState.of(state.load_KLE, state.weight_KL, np.stack([layer.table_RC[0] for layer in points]), state.speed_R).held_LRE.astype(np.int16)
    windows = len(state.load_KLE)
    active = np.flatnonzero(state.cost_L() > floor * (1 + 1e-6))
    fails = np.zeros(len(points), dtype=np.int64)
    made = 0
    for step in range(MAX_STEPS):
        if active.size == 0 or budget == 0:
            break
        if expired(deadline):
            return made, True
        window = step % windows
        now = state.measure(active)
        swap = state.best_swap(active, window)
        gain = np.where(swap[0], now - state.measure_after_swap(active, *swap[1:]), 0.0) / 2
        target = (np.zeros(len(active), dtype=bool),) * 4 if swaps_only else state.best_retarget(active, window)[:4]
        if not swaps_only:
            gain_target = np.where(target[0], now - state.measure_after_retarget(active, *target[1:]), 0.0)
            take = target[0] & (gain_target >= gain)
            state.retarget(active[take], *(part[take] for part in target[1:]))
        else:
            take = target[0]
        swapped = swap[0] & ~take
        state.swap(active[swapped], *(part[swapped] for part in swap[1:]))
        moved = np.maximum(state.held_LRE[active] - before[active], 0).sum(axis=(1, 2))
        changed = take | swapped
        made += int(changed.sum())
        moves_L = np.zeros(len(points), dtype=np.int64)
        moves_L[active] = moved
        _record(points, active[changed & (moved <= budget)], moves_L, state)
        fails[active] = np.where(changed, 0, fails[active] + 1)
        cost = state.cost_L()[active]
        active = active[(fails[active] < windows) & (moved <= budget) & (cost > floor[active] * (1 + 1e-6))]
    return made, False


def _add_fresh(problem: PlacementProblem, points: list[_Points], bound_KL: np.ndarray, weight_KL: np.ndarray, deadline: Deadline) -> bool:
    """Add a placement made from scratch, named as close to the running one as it can be; return whether time ran out."""
    free = replace(problem, move_budget_slots=None)
    table, _, late, _ = search_table_LRC(free, {}, deadline, bound_KL)
    named = relabel_LS(problem, to_slots_LS(table, problem.slots_per_rank_R))
    state = SearchState.of(
        problem.load_KLE, weight_KL, from_slots_LRC(named, problem.slots_per_rank_R), problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank
    )
    _record(points, np.arange(problem.num_layers), (named != problem.previous).sum(axis=1), state)
    return late


def _choose(points: list[_Points], budget: int) -> np.ndarray:
    """Return int16 [B + 1, L]: for every budget the point of every layer that minimises the total cost (an exact knapsack)."""
    best = np.zeros(budget + 1)
    picks = np.zeros((len(points), budget + 1), dtype=np.int32)
    for layer, candidates in enumerate(points):
        after = np.full(budget + 1, np.inf)
        for index in _pareto(candidates):
            moves = candidates.moves[index]
            if moves > budget:
                continue
            total = best[: budget + 1 - moves] + candidates.cost[index]
            wins = total < after[moves:]
            after[moves:][wins] = total[wins]
            picks[layer, moves:][wins] = index
        best = after
    chosen = np.zeros((budget + 1, len(points)), dtype=np.int32)
    left = np.arange(budget + 1)
    for layer in range(len(points) - 1, -1, -1):
        index = picks[layer, left]
        chosen[:, layer] = index
        left = left - np.array(points[layer].moves)[index]
    return chosen


def _pareto(candidates: _Points) -> list[int]:
    order = sorted(range(len(candidates.moves)), key=lambda index: (candidates.moves[index], candidates.cost[index], index))
    kept: list[int] = []
    for index in order:
        if not kept or candidates.cost[index] < candidates.cost[kept[-1]]:
            kept.append(index)
    return kept


def _assemble(problem: PlacementProblem, points: list[_Points], chosen_L: np.ndarray) -> np.ndarray:
    result = np.full((problem.num_layers, problem.num_slots), -1, dtype=np.int32)
    for part in parts_of(problem):
        own, slots = part.problem.previous, part.problem.slots_per_rank_R
        assert own is not None
        table = np.stack([points[layer].table_RC[chosen_L[layer]] for layer in part.layers_n])
        part.put(result, align_LS(to_slots_LS(table, slots), own, slots))
    return result


def _largest_fit(problem: PlacementProblem, points: list[_Points], chosen: np.ndarray, budget: int, fits: Callable[[np.ndarray], bool]) -> int:
    """Return a budget whose placement fits, the next larger one tried not fitting; 0 moves nothing and always fits."""
    low, high = 0, budget + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(_assemble(problem, points, chosen[middle])) else (low, middle)
    return low


def _frontier(problem: PlacementProblem, points: list[_Points], chosen: np.ndarray, budget: int, risk: str) -> list[FrontierPoint]:
    """Return the placements of growing budgets from 0 to `budget`; a point that more moves do not improve is left out."""
    ideal = metrics.ideal_KL(problem.load_KLE, problem.speed_R)
    result: list[FrontierPoint] = []
    for one in _budgets(budget):
        table = _assemble(problem, points, chosen[one])
        peak_KL = metrics.rank_time_KLR(table, problem.slot_rank_S, problem.load_KLE, problem.speed_R).max(axis=2)
        value = metrics.fold_windows(peak_KL, ideal, problem.weight_K, risk)
        if not result or value > result[-1].value:
            result.append(FrontierPoint(slots=int((table != problem.previous).sum()), value=value, slot_to_expert_LS=table))
    return result


def _budgets(budget: int) -> list[int]:
    """Return growing budgets from 0 to `budget`."""
    allowed, following = {0, budget}, max(1, budget // FINEST)
    while following < budget:
        allowed.add(following)
        following = max(following + 1, int(following * FRONTIER_STEP))
    return sorted(allowed)


def _rising(problem: PlacementProblem, results: Sequence[PlacementResult]) -> list[FrontierPoint]:
    """Return the results that are better than all before them."""
    points: list[FrontierPoint] = []
    for one in results:
        if not points or one.value > points[-1].value:
            moved = int((one.slot_to_expert_LS != problem.previous).sum())
            points.append(FrontierPoint(slots=moved, value=one.value, slot_to_expert_LS=one.slot_to_expert_LS))
    return points


def knee(frontier: Sequence[FrontierPoint]) -> int:
    """Return the point that is farthest above the straight line from the first to the last: more moves buy less than the average from there."""
    slots = np.array([point.slots for point in frontier], dtype=np.float64)
    value = np.array([point.value for point in frontier])
    if len(frontier) < 3 or slots[-1] == slots[0] or value[-1] == value[0]:
        return len(frontier) - 1
    return int(((value - value[0]) / (value[-1] - value[0]) - (slots - slots[0]) / (slots[-1] - slots[0])).argmax())
