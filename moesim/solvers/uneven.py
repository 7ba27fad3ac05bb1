"""Layers with unequally many experts: a problem cut into parts whose layers are alike, each solved as if it were alone.

The costs of layers add up, so nothing is lost. A part has the experts of its layers and, of every rank, only the slots that these layers fill
(`PlacementProblem.fill_LR`); the other slots stay empty. Its windows weigh by their share of the ideal, so that its mean imbalance is its
part of the whole. Shapes: K windows, n layers of a part, s slots that they fill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline

Solve = Callable[..., PlacementResult]
"""A solver, as the registry holds it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Layers of a problem that have equally many experts and fill the same slots of every rank."""

    layers_n: np.ndarray
    """Layers of the whole problem."""
    slots_ns: np.ndarray
    """Slots of the whole that they fill, in the order of the part's own slots."""
    problem: PlacementProblem
    """The same problem for these layers alone."""

    def of(self, table_LS: np.ndarray) -> np.ndarray:
        """Return [n, s]: this part of a placement."""
        return table_LS[self.layers_n[:, None], self.slots_ns]

    def put(self, table_LS: np.ndarray, own_ns: np.ndarray) -> None:
        """Write this part of a placement."""
        table_LS[self.layers_n[:, None], self.slots_ns] = own_ns


def parts_of(problem: PlacementProblem) -> list[Part]:
    """Return the parts of a problem, in order of their first layers; a problem with equal layers is its only part."""
    layers, slots = problem.num_layers, problem.num_slots
    if problem.experts_L is None:
        every = np.broadcast_to(np.arange(slots), (layers, slots))
        return [Part(layers_n=np.arange(layers), slots_ns=every, problem=problem)]
    fill_LR = problem.fill_LR
    kinds: dict[tuple[int, ...], list[int]] = {}
    for layer, (experts, fill_R) in enumerate(zip(problem.experts_L, fill_LR.tolist(), strict=True)):
        kinds.setdefault((experts, *fill_R), []).append(layer)
    if problem.previous is None:
        place_S = np.arange(slots) - np.searchsorted(problem.slot_rank_S, problem.slot_rank_S)
        filled_LS = place_S < fill_LR[:, problem.slot_rank_S]
    else:
        filled_LS = problem.previous >= 0
    ideal_KL = metrics.ideal_KL(problem.load_KLE, problem.speed_R)
    result = []
    for (experts, *fill), rows in kinds.items():
        at = np.array(rows)
        slots_ns = np.stack([np.flatnonzero(filled_LS[layer]) for layer in rows])
        weight_K = problem.weight_K
        if problem.objective.alone == "balance":
            whole_K = ideal_KL.sum(axis=1)
            shared_K = weight_K * np.divide(ideal_KL[:, at].sum(axis=1), whole_K, out=np.zeros(len(whole_K)), where=whole_K > 0)
            weight_K = shared_K if shared_K.sum() > 0 else weight_K
        own = replace(
            problem,
            load_KLE=problem.load_KLE[:, at, :experts],
            slots_per_rank_R=np.array(fill),
            experts_L=None,
            previous=None if problem.previous is None else problem.previous[at[:, None], slots_ns],
            window_weight_K=weight_K,
        )
        result.append(Part(layers_n=at, slots_ns=slots_ns, problem=own))
    return result


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
