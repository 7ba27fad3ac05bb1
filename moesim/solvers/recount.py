"""What a placement costs under an objective, computed a second time: plain loops and set arithmetic, sharing no code with the search.

`rows` None stands for the ideal: a perfect spread, one copy of every expert, equal tokens on all slots, as few places as hold the choices.
The predicted time itself is data of the problem: the same callable is asked, with tokens counted here.
"""

from __future__ import annotations

from collections import Counter
from typing import TypeAlias

import numpy as np

from moesim.solvers.problem import PlacementProblem

Rows: TypeAlias = list[list[int]]


def recount(problem: PlacementProblem, rows: Rows | None) -> float:
    """Return the cost of a placement (or of the ideal) under the problem's objective: in the term's unit, or for a sum relative to the ideal."""
    objective = problem.objective
    if objective.alone is not None:
        return _term(problem, objective.alone, rows)
    total = 0.0
    for term, weight in objective.weights:
        ideal = _term(problem, term, None)
        total += weight * _term(problem, term, rows) / ideal if ideal > 0 else 0.0
    return total


def _term(problem: PlacementProblem, term: str, rows: Rows | None) -> float:
    if term == "traffic":
        return _traffic(problem, rows)
    if term == "hops":
        return _hops(problem, rows or [])
    function = {"balance": _balance, "activated": _activated, "latency": _latency}[term]
    return sum(importance * function(problem, window, rows) for window, importance in zip(problem.load_KLE.tolist(), problem.weight_K.tolist(), strict=True))


def _balance(problem: PlacementProblem, window: list[list[float]], rows: Rows | None) -> float:
    speeds, ranks = problem.speed_R.tolist(), problem.slot_rank_S.tolist()
    slowest = ideal = 0.0
    for layer, loads in enumerate(window):
        ideal += sum(loads) / sum(speeds)
        if rows is not None:
            copies, time = Counter(rows[layer]), [0.0] * len(speeds)
            for rank, expert in zip(ranks, rows[layer], strict=True):
                time[rank] += loads[expert] / copies[expert] / speeds[rank] if expert >= 0 else 0.0
            slowest += max(time)
    return 0.0 if ideal == 0 else 1.0 if rows is None else slowest / ideal


def _picks(problem: PlacementProblem, loads: list[float]) -> list[float]:
    decode, whole = problem.objective.decode, sum(loads)
    assert decode is not None
    return [min(1.0, decode.top_k * load / whole) if whole else 0.0 for load in loads]


def _activated(problem: PlacementProblem, window: list[list[float]], rows: Rows | None) -> float:
    decode, speeds, ranks = problem.objective.decode, problem.speed_R.tolist(), problem.slot_rank_S.tolist()
    assert decode is not None
    total = 0.0
    for layer, loads in enumerate(window):
        pick = _picks(problem, loads)
        if rows is None:
            total += sum(1 - (1 - one) ** decode.tokens for one in pick) / sum(speeds)
            continue
        copies, active = Counter(rows[layer]), [0.0] * len(speeds)
        for rank, expert in zip(ranks, rows[layer], strict=True):
            if expert >= 0:
                active[rank] += (1 - (1 - pick[expert] / copies[expert]) ** decode.tokens) / speeds[rank]
        total += max(active)
    return total


def _latency(problem: PlacementProblem, window: list[list[float]], rows: Rows | None) -> float:
    decode, expert_seconds = problem.objective.decode, problem.objective.expert_seconds
    assert decode is not None and expert_seconds is not None
    slots = problem.slots_per_rank_R.tolist()
    tokens = np.zeros((len(window), len(slots), max(slots)))
    for layer, loads in enumerate(window):
        pick, at, fill = _picks(problem, loads), 0, problem.fill_LR[layer].tolist()
        copies = Counter() if rows is None else Counter(rows[layer])
        for rank, count in enumerate(slots):
            for slot in range(count):
                if rows is None:
                    tokens[layer, rank, slot] = decode.tokens * sum(pick) / sum(fill) if slot < fill[rank] else np.nan
                else:
                    expert = rows[layer][at + slot]
                    tokens[layer, rank, slot] = decode.tokens * pick[expert] / copies[expert] if expert >= 0 else np.nan
            tokens[layer, rank, count:] = np.nan
            at += count
    mask = ~np.isnan(tokens)
    seconds = np.asarray(expert_seconds(np.where(mask, tokens, 0.0), mask)) / problem.speed_R
    return float(seconds.max(axis=1).sum())


def _valid(problem: PlacementProblem) -> tuple[np.ndarray, np.ndarray]:
    routes = problem.objective.routes
    assert routes is not None
    return routes.experts_TLK, np.ones(routes.experts_TLK.shape, dtype=bool) if routes.valid_TLK is None else routes.valid_TLK


def _place_E(problem: PlacementProblem, row: list[int], per_place: int) -> np.ndarray:
    place = np.empty(problem.num_experts, dtype=np.int64)
    for slot, expert in enumerate(row):
        place[expert] = slot // (problem.num_slots // problem.num_ranks) // per_place
    return place


def _levels(problem: PlacementProblem, term: str = "hops") -> list[tuple[int, float]]:
    """Return (ranks of a place, weight) of ranks, on several nodes of nodes, and for traffic on several racks of racks."""
    levels = [(1, 1.0)]
    if problem.ranks_per_node < problem.num_ranks:
        levels.append((problem.ranks_per_node, problem.objective.node_weight))
    if term == "traffic" and problem.ranks_per_rack < problem.num_ranks:
        levels.append((problem.ranks_per_rack, problem.objective.rack_weight))
    return levels


def _traffic(problem: PlacementProblem, rows: Rows | None) -> float:
    """Return places reached per token and layer, ticked off on a board of tokens and places; with copies only those that are not the token's own."""
    experts, valid = _valid(problem)
    total = 0.0
    if rows is not None and (len(rows[0]) != problem.num_experts or len(set(problem.slots_per_rank_R.tolist())) > 1):
        return sum(_remote(problem, row, experts[:, layer].tolist(), valid[:, layer].tolist()) for layer, row in enumerate(rows)) / (len(experts) * len(rows))
    for per_place, weight in _levels(problem, "traffic"):
        if rows is None:
            room = max(1, problem.num_experts * per_place // problem.num_ranks)
            total += weight * float(np.ceil(valid.sum(axis=2) / room).sum())
            continue
        for layer, row in enumerate(rows):
            token, choice = np.nonzero(valid[:, layer])
            reached = np.zeros((len(experts), problem.num_ranks // per_place), dtype=bool)
            reached[token, _place_E(problem, row, per_place)[experts[token, layer, choice]]] = True
            total += weight * float(reached.sum())
    return total / (len(experts) * problem.num_layers)


def _remote(problem: PlacementProblem, row: list[int], experts: list[list[int]], valid: list[list[bool]]) -> float:
    """Return what the tokens of a layer pay for places other than their own: token by token, every choice sent to the nearest copy."""
    levels, ranks = _levels(problem, "traffic"), problem.num_ranks
    holders: dict[int, set[int]] = {}
    for rank, expert in zip(problem.slot_rank_S.tolist(), row, strict=True):
        holders.setdefault(expert, set()).add(rank)
    total = 0.0
    for token, (choices, there) in enumerate(zip(experts, valid, strict=True)):
        home, served = token % ranks, set()
        for expert in {choice for choice, exists in zip(choices, there, strict=True) if exists}:
            apart = {rank: sum(rank // per_place != home // per_place for per_place, _ in levels) for rank in holders[expert]}
            near = sorted(rank for rank, one in apart.items() if one == min(apart.values()))
            served.add(near[token // ranks % len(near)])
        total += sum(weight * len({rank // per_place for rank in served} - {home // per_place}) for per_place, weight in levels)
    return total


def _hops(problem: PlacementProblem, rows: Rows) -> float:
    """Return the weighted share of pairs of consecutive choices on different places: all pairs less those that meet."""
    experts, valid = _valid(problem)
    total, cost = 0.0, 0.0
    for layer in range(problem.num_layers - 1):
        total += float((valid[:, layer].sum(axis=1) * valid[:, layer + 1].sum(axis=1)).sum())
    for per_place, weight in _levels(problem):
        meeting = 0.0
        for layer in range(problem.num_layers - 1):
            held = []
            for one in (layer, layer + 1):
                token, choice = np.nonzero(valid[:, one])
                places = problem.num_ranks // per_place
                key = token * places + _place_E(problem, rows[one], per_place)[experts[token, one, choice]]
                held.append(np.bincount(key, minlength=len(experts) * places))
            meeting += float(held[0] @ held[1])
        cost += weight * (total - meeting)
    return cost / total if total else 0.0


def dearest_way(problem: PlacementProblem) -> float:
    """Return the cost if every choice (for hops: transition) took the dearest way."""
    _, valid = _valid(problem)
    each = sum(weight for per_place, weight in _levels(problem, problem.objective.alone or "") if per_place < problem.num_ranks)
    if problem.objective.alone == "hops":
        return each if problem.num_ranks > 1 else 1.0
    return float(valid.sum()) / (len(valid) * problem.num_layers) * (each or 1.0)
