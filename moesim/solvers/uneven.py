"""Solving problems whose layers have unequally many experts: every part (see `parts`) as if it were alone, then placements and proofs merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.parts import Part, parts_of
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline

Solve = Callable[..., PlacementResult]
"""A solver, as the registry holds it."""


def solve_parts(
    problem: PlacementProblem, solve: Solve, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None
) -> PlacementResult:
    """Solve every part of a problem; the parts share the time left by their slots. A problem with equal layers is left to the solver."""
    if problem.experts_L is None:
        return solve(problem, seed=seed, deadline=deadline, options=options)
    parts = parts_of(problem)
    table = np.full((problem.num_layers, problem.num_slots), -1, dtype=np.int32)
    answers, cells = [], sum(part.slots_ns.size for part in parts)
    for part in parts:
        answer = solve(part.problem, seed=seed, deadline=_shared(deadline, part.slots_ns.size / cells), options=options)
        cells -= part.slots_ns.size
        part.put(table, answer.slot_to_expert_LS)
        answers.append(answer)
    claims = {answer.status for answer in answers}
    status = next((one for one in ("TIME_LIMIT", "BASELINE") if one in claims), "FEASIBLE")
    facts: dict[str, Any] = {"solver": answers[0].solver, "status": status, "iterations": sum(answer.iterations for answer in answers)}
    if problem.objective.alone != "balance":
        from moesim.solvers.objectives import score
        from moesim.solvers.terms import Terms

        return score(Terms(problem), table, **facts)
    bound_KL = layer_bound_KL(problem)
    proven_L = _proven_L(problem, parts, answers, bound_KL)
    return make_result(problem, table, **facts, risk=str((options or {}).get("risk", "mean")), bound_KL=bound_KL, cost_bound_L=proven_L)


def _shared(deadline: Deadline, share: float) -> Deadline:
    """Return a deadline that leaves the part of the time that others need."""
    if deadline is None:
        return None
    kept = max(deadline(), 0.0) * (1.0 - share)
    return lambda: deadline() - kept


def _proven_L(problem: PlacementProblem, parts: list[Part], answers: list[PlacementResult], bound_KL: np.ndarray) -> np.ndarray:
    """Return float64 [L]: costs under the mean risk whose sum over a part its solver proved, in proportion to the bounds of its layers."""
    weight_KL = cost_weight_KL(problem, problem.weight_K)
    ideal_L = (metrics.ideal_KL(problem.load_KLE, problem.speed_R) * weight_KL).sum(axis=0)
    proven_L = (bound_KL * weight_KL).sum(axis=0)
    for part, answer in zip(parts, answers, strict=True):
        known = float(proven_L[part.layers_n].sum())
        if answer.risk == "mean" and known > 0:
            proven_L[part.layers_n] *= max(1.0, float(ideal_L[part.layers_n].sum()) / answer.bound / known)
    return proven_L
