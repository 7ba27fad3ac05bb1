"""Repair under any objective but balance alone and hops: random moves from the running placement, judged by the objective's own cost.

Every layer walks from the running placement by the best of a few random swaps and reassigned slots a round; every stop is a candidate, and so is
the placement that `descent` makes from scratch. What budget goes to which layer is the knapsack of `repair`.
Shapes: L layers, S slots, N trial placements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from moesim.solvers.assignment import align_LS
from moesim.solvers.objectives import TRIAL_CELLS, neighbours, solve_descent
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.search import Deadline, expired
from moesim.solvers.terms import Terms

ROUNDS, PATIENCE = 400, 12
"""Rounds of random moves at most, and without a better placement in any layer."""
MAX_TRIALS = 32
ONE_BY_ONE = 8
"""Trials a round where placements are priced one after another because tokens are counted."""


def walk(problem: PlacementProblem, terms: Terms, budget: int, seed: int, deadline: Deadline) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield placements [L, S] ever farther from the running one with their costs [L], the last from scratch; whether time ran out."""
    assert problem.previous is not None
    best = problem.previous.copy()
    cost_L = terms.cost_L(best)
    yield best, cost_L, False
    layers, slots = best.shape
    counted = "traffic" in terms.weights
    trials = ONE_BY_ONE if counted else int(np.clip(TRIAL_CELLS // (layers * slots * problem.num_windows), 1, MAX_TRIALS))
    many, row = None if counted else terms.repeated(trials), np.arange(layers)
    generator = np.random.Generator(np.random.PCG64(seed))
    idle = 0
    for _ in range(ROUNDS):
        # a swap moves two slots, a reassigned slot one: layers that have used up the whole budget stay
        open_L = (best != problem.previous).sum(axis=1) < budget
        if idle == PATIENCE or not open_L.any():
            break
        if expired(deadline):
            yield best, cost_L, True
            return
        tables = neighbours(terms, np.repeat(best, trials, axis=0), generator)
        if many is None:
            cost = np.stack([terms.cost_L(tables[one::trials]) for one in range(trials)], axis=1)
        else:
            cost = many.cost_L(tables).reshape(layers, trials)
        at = cost.argmin(axis=1)
        wins = open_L & (cost[row, at] < cost_L * (1 - 1e-9))
        idle = 0 if wins.any() else idle + 1
        if wins.any():
            best, cost_L = best.copy(), cost_L.copy()
            best[wins], cost_L[wins] = tables.reshape(layers, trials, slots)[row, at][wins], cost[row, at][wins]
            best = align_LS(best, problem.previous, problem.slots_per_rank_R)
            yield best, cost_L, False
    if budget >= slots // 4:
        fresh = solve_descent(replace(problem, move_budget_slots=None), seed=seed, deadline=deadline)
        yield fresh.slot_to_expert_LS, terms.cost_L(fresh.slot_to_expert_LS), fresh.status == "TIME_LIMIT"
