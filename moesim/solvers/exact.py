"""Exact solvers for small problems: one integer program per layer, proven or honestly not.

Both minimise a layer's cost Σ_k weight·(time of the slowest rank) over copies and placement, a copy's time being load / c for
`balance` and the chance that a batch activates it for `activated`. Binary n[e, c]: expert e has c copies; y[e, c, r]: of which y sit
on rank r. Symmetry: ranks with equal slots and speed are ordered by load. The heuristic solution is the warm start and caps the size
of a copy. Costs are scaled so that a perfectly balanced layer costs 1. Only the mean risk over windows separates by layer; `worst`
and `cvar` are for the solver greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.greedy import search_table_LRC
from moesim.solvers.objectives import score, solve_descent
from moesim.solvers.packing import from_slots_LRC, to_slots_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import OPTIMAL_GAP, PlacementResult, cost_weight_KL, make_result
from moesim.solvers.search import Deadline
from moesim.solvers.terms import Terms

MAX_VARIABLES = 200_000
"""Variables of one layer beyond which an exact solver cannot be expected to help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerModel:
    """One layer as an integer program."""

    size_KEN: np.ndarray
    """float64 [K, E, N]: load of one copy of an expert that has n + 1, scaled: a perfectly balanced window takes time 1."""
    weight_K: np.ndarray
    """float64 [K], summing to 1."""
    fill_R: np.ndarray
    speed_R: np.ndarray
    copies: tuple[range, ...]
    """Possible numbers of copies of every expert."""
    most_per_rank: int
    """1, or more where a rank may hold an expert twice."""
    floor_K: np.ndarray
    """Lower bound on the slowest rank's time in every window."""
    hint_RC: np.ndarray
    """Known placement, ranks of a kind by falling load."""
    hint_cost: float

    def sizes_KE(self, table_RC: np.ndarray) -> np.ndarray:
        """Return float64 [K, E]: load of a copy of every expert in a placement."""
        experts = self.size_KEN.shape[1]
        copies = np.maximum(np.bincount(table_RC[table_RC >= 0], minlength=experts), 1)
        return np.asarray(self.size_KEN[:, np.arange(experts), copies - 1])

    def rank_kinds(self) -> list[tuple[int, int]]:
        """Return pairs of consecutive equal ranks, the first of which is to carry at least the load of the second."""
        last: dict[tuple[int, float], int] = {}
        pairs = []
        for rank, kind in enumerate(zip(self.fill_R.tolist(), self.speed_R.tolist(), strict=True)):
            if kind in last:
                pairs.append((last[kind], rank))
            last[kind] = rank
        return pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerAnswer:
    """What an exact solver found in a layer."""

    table_RC: np.ndarray | None
    bound: float
    """Proven lower bound of the scaled cost."""
    proven: bool
    """The solver ran to its end."""
    steps: int


LayerSolver = Callable[[LayerModel, float | None], LayerAnswer]


def solve_layers(problem: PlacementProblem, name: str, deadline: Deadline, solve_layer: LayerSolver) -> PlacementResult:
    """Solve layer by layer, dividing the time that is left equally among the layers that are left."""
    terms = Terms(problem)
    if problem.objective.alone == "activated":
        weight_KL = np.repeat(problem.weight_K[:, None], problem.num_layers, axis=1)
        start = solve_descent(replace(problem, previous=None), deadline=deadline).slot_to_expert_LS
        table, bound_KL, ideal_KL = from_slots_LRC(start, problem.slots_per_rank_R), terms.active_bound_KL(), terms.active_KL()
    else:
        weight_KL = cost_weight_KL(problem, problem.weight_K)
        table, _, _, bound_KL = search_table_LRC(problem, {}, deadline, layer_bound_KL(problem))
        ideal_KL = metrics.ideal_KL(problem.load_KLE, problem.speed_R)
    cost, floor = terms.cost_L(to_slots_LS(table, problem.slots_per_rank_R)), (bound_KL * weight_KL).sum(axis=0)
    proven_cost = floor.copy()
    cut, steps = False, 0
    for layer in range(problem.num_layers):
        scale = float((ideal_KL[:, layer] * weight_KL[:, layer]).sum())
        if cost[layer] <= floor[layer] * (1 + OPTIMAL_GAP / 2) or scale == 0:
            continue
        left = None if deadline is None else deadline() / (problem.num_layers - layer)
        if left is not None and left <= 0:
            cut = True
            break
        model = _layer_model(terms, layer, table[layer], bound_KL, weight_KL, ideal_KL, float(cost[layer]) / scale)
        answer = solve_layer(model, left)
        steps += answer.steps
        cut |= not answer.proven
        proven_cost[layer] = max(floor[layer], answer.bound * scale)
        if answer.table_RC is not None and _cost(model, answer.table_RC) < model.hint_cost:
            table[layer] = answer.table_RC
    # without a deadline only a limit on work can have stopped a layer
    status = "TIME_LIMIT" if cut and deadline is not None else "FEASIBLE"
    slots = to_slots_LS(table, problem.slots_per_rank_R)
    if problem.previous is not None:
        from moesim.solvers.assignment import relabel_LS

        slots = relabel_LS(problem, slots)
    if problem.objective.alone == "activated":
        return score(terms, slots, solver=name, status=status, iterations=steps, bound_L=proven_cost)
    return make_result(problem, slots, solver=name, status=status, iterations=steps, bound_KL=bound_KL, cost_bound_L=proven_cost)


def _layer_model(
    terms: Terms, layer: int, hint_RC: np.ndarray, bound_KL: np.ndarray, weight_KL: np.ndarray, ideal_KL: np.ndarray, hint_cost: float
) -> LayerModel:
    problem = terms.problem
    loaded = (ideal_KL[:, layer] > 0) & (weight_KL[:, layer] > 0)
    ideal = ideal_KL[loaded, layer]
    weight = weight_KL[loaded, layer] * ideal
    weight = weight / weight.sum()
    fill, speed = problem.fill_R, problem.speed_R
    extra = int(fill.sum()) - problem.num_experts
    most = extra + 1 if problem.allow_duplicates_on_rank else min(extra + 1, int((fill > 0).sum()))
    size = terms.copy_size_KEN(layer, most)[loaded] / ideal[:, None, None]
    fewest = np.ones(problem.num_experts, dtype=np.int64)
    for k, share in enumerate(weight):
        # no copy may by itself make a window slower than what the hint leaves room for
        others = float(weight @ (bound_KL[loaded, layer] / ideal)) - share * float(bound_KL[loaded, layer][k] / ideal[k])
        room = (hint_cost - others) / share * float(speed.max()) * (1 + 1e-9)
        fewest = np.maximum(fewest, 1 + (size[k] > room * (1 + 1e-9)).sum(axis=1))
    copies = tuple(range(int(low), max(most, int(low)) + 1) for low in np.minimum(fewest, most))
    if sum(len(one) for one in copies) * (problem.num_ranks + 1) > MAX_VARIABLES:
        raise InputError(
            describe(
                "exact solver",
                "variables",
                sum(len(one) for one in copies) * (problem.num_ranks + 1),
                f"must be <= {MAX_VARIABLES} per layer",
                "use the solver greedy, whose gap is certified",
            )
        )
    order = np.arange(problem.num_ranks)
    held = size[:, np.arange(problem.num_experts), np.bincount(hint_RC[hint_RC >= 0], minlength=problem.num_experts) - 1]
    rank_load = np.where(hint_RC >= 0, (weight @ held)[np.maximum(hint_RC, 0)], 0.0).sum(axis=1)
    for kind in {(int(slots), float(pace)) for slots, pace in zip(fill, speed, strict=True)}:
        members = np.flatnonzero((fill == kind[0]) & (speed == kind[1]))
        order[members] = members[np.argsort(-rank_load[members], kind="stable")]
    return LayerModel(
        size_KEN=size,
        weight_K=weight,
        fill_R=fill,
        speed_R=speed,
        copies=copies,
        most_per_rank=most if problem.allow_duplicates_on_rank else 1,
        floor_K=bound_KL[loaded, layer] / ideal,
        hint_RC=hint_RC[order],
        hint_cost=hint_cost,
    )


def _cost(model: LayerModel, table_RC: np.ndarray) -> float:
    time = np.where(table_RC >= 0, model.sizes_KE(table_RC)[:, np.maximum(table_RC, 0)], 0.0).sum(axis=2) / model.speed_R
    return float(model.weight_K @ time.max(axis=1))


def table_of(copies_on_RE: np.ndarray, width: int) -> np.ndarray:
    """Return int32 [R, C]: experts of every rank, given how many copies of each it holds."""
    table = np.full((len(copies_on_RE), width), -1, dtype=np.int32)
    for rank, row in enumerate(copies_on_RE):
        held = np.repeat(np.arange(len(row)), row)
        table[rank, : len(held)] = held
    return table


def threads_of(options: Mapping[str, Any] | None) -> int:
    """Return the option `threads`, 1 if not given: more make a run faster but not repeatable."""
    from moesim.solvers.greedy import int_option

    return int_option(options or {}, "threads", 1, 1, 256)
