"""How many slots a target balance takes: the fewest slots per rank that reach it, and proof that fewer cannot.

Slots per rank are equal on all ranks, as engines want them. The balance need not rise with every slot more, so the search walks upward from the
fewest slots that hold all experts and plans each size until one reaches the target; the certified bound says which sizes were hopeless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import InfeasibleError, InputError, describe
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult
from moesim.solvers.search import Deadline, expired
from moesim.solvers.uneven import solve_parts

MAX_SLOTS_PER_RANK = 64
SHORT = 20
"""Swap rounds of the first plan of every size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redundancy:
    """What a target balance takes."""

    target: float
    slots_per_rank: int
    """Fewest slots per rank at which a placement reaches the target."""
    redundant: int
    """Slots of a layer beyond one per expert."""
    least_possible: int
    """Slots per rank below which the certified bound rules the target out; at least this many are needed."""
    result: PlacementResult
    """The placement that reaches the target."""
    tried: tuple[tuple[int, float, float], ...]
    """(slots per rank, balance reached, certified bound) of every plan made."""


def redundancy_for(problem: PlacementProblem, target: float, *, seed: int = 0, deadline: Deadline = None, most: int = MAX_SLOTS_PER_RANK) -> Redundancy:
    """Return the fewest slots per rank with which `problem` (whose own slots are ignored) is balanced to `target`.

    target: balance in 0..1. most: slots per rank to try at most; the experts of a layer limit them too.
    Raises InputError if the target is no balance, InfeasibleError if no such number of slots reaches it or the deadline is over first.
    """
    if not 0 < target <= 1:
        raise InputError(describe("redundancy", "target", target, "must be a balance in 0..1, above 0"))
    if problem.previous is not None:
        raise InputError("redundancy: a running placement fixes the slots; search for them without it")
    first = -(-problem.num_experts // problem.num_ranks)
    tried: list[tuple[int, float, float]] = []
    least = first
    for slots in range(first, min(most, problem.num_experts) + 1):
        if expired(deadline):
            raise InfeasibleError(f"redundancy: time ran out at {slots} slots per rank, before any placement reached {target:g}; best so far {_best(tried)}")
        sized = replace(problem, slots_per_rank_R=np.full(problem.num_ranks, slots, dtype=np.int64))
        # few rounds are enough for most sizes: those that easily reach the target, and those that cannot
        result = solve_parts(sized, solve_greedy, seed=seed, deadline=deadline, options={"rounds": SHORT, "restarts": 1})
        if result.value < target <= result.bound:
            result = solve_parts(sized, solve_greedy, seed=seed, deadline=deadline)
        tried.append((slots, result.value, result.bound))
        if result.value >= target:
            redundant = slots * problem.num_ranks - problem.num_experts
            return Redundancy(target=target, slots_per_rank=slots, redundant=redundant, least_possible=least, result=result, tried=tuple(tried))
        if result.bound < target and least == slots:
            least = slots + 1
    raise InfeasibleError(f"redundancy: no placement with up to {tried[-1][0]} slots per rank reaches {target:g}; best {_best(tried)}")


def _best(tried: list[tuple[int, float, float]]) -> str:
    if not tried:
        return "none"
    slots, value, _ = max(tried, key=lambda one: one[1])
    return f"{value:.4f} with {slots}"
