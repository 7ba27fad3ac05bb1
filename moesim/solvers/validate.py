"""The independent check of a solver's answer: plain loops over slots, sharing no code with solvers and metrics.

A result that claims what does not hold raises `CheckError`; nothing is believed until it passed here. What an objective other than
balance costs is computed anew by `moesim.solvers.recount`. A bound is checked against the value only: it is proven where it is made.
"""

from __future__ import annotations

import math
from collections import Counter

from moesim.errors import MoesimError, describe
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import dearest_way, recount
from moesim.solvers.result import OPTIMAL_GAP, ObjectiveResult, PlacementResult

TOLERANCE = 1e-9


class CheckError(MoesimError):
    """A solver's answer does not hold what it says."""


def validate(problem: PlacementProblem, result: PlacementResult, *, may_duplicate: bool = False) -> None:
    """Check placement, value, bound, gap, status and move budget; raise CheckError naming the first thing that is wrong.

    may_duplicate: accept an expert twice on a rank, as planners that ignore the rule produce.
    """
    place = f"solver {result.solver}"
    rows = [[int(expert) for expert in row] for row in result.slot_to_expert_LS]
    if len(rows) != problem.num_layers or any(len(row) != problem.num_slots for row in rows):
        raise CheckError(describe(place, "placement shape", result.slot_to_expert_LS.shape, f"must be {(problem.num_layers, problem.num_slots)}"))
    bounds = _rank_slices(problem)
    for layer, row in enumerate(rows):
        _check_layer(problem, place, layer, row, bounds, may_duplicate or problem.allow_duplicates_on_rank)
    _check_moves(problem, place, rows)
    if result.share_LS is not None:
        _check_shares(place, rows, result.share_LS.tolist())
    value = _value(problem, rows, bounds, result.risk) if problem.objective.alone == "balance" else _value_of_cost(problem, place, rows, result)
    if not math.isclose(value, result.value, rel_tol=1e-9):
        raise CheckError(describe(place, "value", result.value, f"must be what the placement gives, {value}"))
    if not (value <= result.bound * (1 + TOLERANCE) and result.bound <= 1 + TOLERANCE):
        raise CheckError(describe(place, "bound", result.bound, f"must lie between the value {value} and 1"))
    gap = (result.bound - result.value) / result.bound if result.bound else 0.0
    if not math.isclose(result.gap, gap, abs_tol=1e-12):
        raise CheckError(describe(place, "gap", result.gap, f"must be (bound - value) / bound = {gap}"))
    if result.status not in ("OPTIMAL", "FEASIBLE", "TIME_LIMIT", "BASELINE"):
        raise CheckError(describe(place, "status", result.status, "must be OPTIMAL, FEASIBLE, TIME_LIMIT or BASELINE"))
    if result.status == "OPTIMAL" and result.gap > OPTIMAL_GAP:
        raise CheckError(describe(place, "status", "OPTIMAL", f"must come with a gap <= {OPTIMAL_GAP}, here {result.gap}"))


def _value_of_cost(problem: PlacementProblem, place: str, rows: list[list[int]], result: PlacementResult) -> float:
    """Check the cost that a result claims under another objective than balance; return the value that follows from it."""
    claimed, cost = getattr(result, "cost", math.nan), recount(problem, rows)
    if not math.isclose(claimed, cost, rel_tol=1e-9, abs_tol=1e-12):
        raise CheckError(describe(place, f"cost ({problem.objective.name})", claimed, f"must be what the placement gives, {cost}"))
    if not isinstance(result, ObjectiveResult):
        worst = dearest_way(problem)
        return 1.0 - cost / worst if worst > 0 else 1.0
    if not 0 <= result.cost_bound <= cost * (1 + TOLERANCE):
        raise CheckError(describe(place, "bound of the cost", result.cost_bound, f"must be in 0..{cost}"))
    if cost == 0:
        return 1.0
    reference = min(recount(problem, None), result.cost_bound)
    if not math.isclose(result.bound, reference / result.cost_bound if reference else 1.0, rel_tol=1e-9):
        raise CheckError(describe(place, "bound", result.bound, f"must be the ideal {reference} over the least cost {result.cost_bound}"))
    return reference / cost


def _rank_slices(problem: PlacementProblem) -> list[tuple[int, int]]:
    slices, start = [], 0
    for count in problem.slots_per_rank_R.tolist():
        slices.append((start, start + count))
        start += count
    return slices


def _check_layer(problem: PlacementProblem, place: str, layer: int, row: list[int], slices: list[tuple[int, int]], may_duplicate: bool) -> None:
    experts = problem.num_experts if problem.experts_L is None else problem.experts_L[layer]
    wrong = [expert for expert in row if not -1 <= expert < experts]
    if wrong:
        raise CheckError(describe(place, f"expert in layer {layer}", wrong[0], f"must be in 0..{experts - 1}, or -1"))
    missing = sorted(set(range(experts)) - set(row))
    if missing:
        raise CheckError(f"{place}: layer {layer} has no slot for expert {missing[0]} ({len(missing)} missing in all)")
    keeps_faults = problem.previous is not None and problem.move_budget_slots is not None
    for rank, (start, end) in enumerate(slices):
        held = Counter(expert for expert in row[start:end] if expert >= 0)
        before = Counter(int(expert) for expert in problem.previous[layer, start:end]) if keeps_faults and problem.previous is not None else Counter()
        needed = end - start if problem.allow_duplicates_on_rank else min(end - start, experts)
        if problem.experts_L is not None:
            needed = _fill(problem, layer, rank, slices)
            if sum(held.values()) > needed:
                raise CheckError(describe(place, f"filled slots of rank {rank} in layer {layer}", sum(held.values()), f"must be {needed}"))
        empty = needed - sum(held.values())
        if empty > 0 and empty > before[-1]:
            raise CheckError(describe(place, f"empty slots of rank {rank} in layer {layer}", empty, "must be 0"))
        if may_duplicate:
            continue
        twice = [expert for expert, count in held.items() if count > max(1, before[expert])]
        if twice:
            raise CheckError(f"{place}: rank {rank} holds expert {twice[0]} {held[twice[0]]} times in layer {layer}; at most one copy is allowed")


def _fill(problem: PlacementProblem, layer: int, rank: int, slices: list[tuple[int, int]]) -> int:
    """Return the slots of a rank that a layer fills where layers differ: those that it fills now, or its experts and the extra slots dealt in turn."""
    assert problem.experts_L is not None
    if problem.previous is not None:
        start, end = slices[rank]
        return sum(int(expert) >= 0 for expert in problem.previous[layer, start:end])
    twice = problem.allow_duplicates_on_rank
    widths = [end - start for start, end in slices]
    extra = sum(width if twice else min(width, problem.num_experts) for width in widths) - problem.num_experts
    experts = problem.experts_L[layer]
    room = [width if twice else min(width, experts) for width in widths]
    fill, left = [0] * len(room), min(experts + extra, sum(room))
    while left:
        for one in range(len(room)):
            if left and fill[one] < room[one]:
                fill[one], left = fill[one] + 1, left - 1
    return fill[rank]


def _check_moves(problem: PlacementProblem, place: str, rows: list[list[int]]) -> None:
    if problem.move_budget_slots is None or problem.previous is None:
        return
    moved = sum(new != int(old) for row, before in zip(rows, problem.previous, strict=True) for new, old in zip(row, before, strict=True))
    if moved > problem.move_budget_slots:
        raise CheckError(describe(place, "moved slots", moved, f"must be <= the budget of {problem.move_budget_slots}"))


def _check_shares(place: str, rows: list[list[int]], shares: list[list[float]]) -> None:
    for layer, (row, share) in enumerate(zip(rows, shares, strict=True)):
        total: dict[int, float] = {}
        for expert, part in zip(row, share, strict=True):
            if not 0 <= part <= 1 + TOLERANCE or (expert < 0 and part):
                raise CheckError(describe(place, f"share in layer {layer}", part, "must be in 0..1, and 0 on empty slots"))
            total[expert] = total.get(expert, 0.0) + part
        for expert, whole in total.items():
            if expert >= 0 and abs(whole - 1) > 1e-6:
                raise CheckError(describe(place, f"shares of expert {expert} in layer {layer}", whole, "must sum to 1"))


def _value(problem: PlacementProblem, rows: list[list[int]], slices: list[tuple[int, int]], risk: str) -> float:
    """Return 1 / risk of the windows' Σ slowest / Σ perfectly spread time."""
    speeds = problem.speed_R.tolist()
    copies = [Counter(row) for row in rows]
    imbalance = []
    for window in problem.load_KLE:
        slowest = ideal = 0.0
        for row, count, loads in zip(rows, copies, window.tolist(), strict=True):
            per_copy = [load / max(count[expert], 1) for expert, load in enumerate(loads)]
            slowest += max(
                sum(per_copy[expert] for expert in row[start:end] if expert >= 0) / speed for (start, end), speed in zip(slices, speeds, strict=True)
            )
            ideal += math.fsum(loads) / sum(speeds)
        imbalance.append(slowest / ideal if ideal > 0 else 1.0)
    weighted = sorted(zip(imbalance, problem.weight_K.tolist(), strict=True), reverse=True)
    if risk == "mean":
        return 1 / sum(ratio * weight for ratio, weight in weighted)
    if risk == "worst":
        return 1 / max(ratio for ratio, weight in weighted if weight > 0)
    left = tail = float(risk.removeprefix("cvar:"))
    total = 0.0
    for ratio, weight in weighted:
        part = min(weight, left)
        total, left = total + ratio * part, left - part
    return (tail - left) / total
