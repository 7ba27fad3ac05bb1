"""Placements that look at no load: `linear` blocks, `round_robin`, seeded `random`.

Extra slots go to experts in turn (0, 1, 2, …). Every expert gets its copies on different ranks, unless
the problem allows otherwise; ranks with unequal slots are filled in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.solvers.packing import to_slots_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, make_result
from moesim.solvers.search import Deadline


def _deal(fill_R: np.ndarray, experts: int, order: np.ndarray, round_robin: bool, allow_duplicates: bool) -> np.ndarray:
    """Return int32 [R, C]: experts in `order` dealt to ranks in blocks or in turn, then the extra slots filled in turn."""
    ranks = len(fill_R)
    table = np.full((ranks, int(fill_R.max())), -1, dtype=np.int32)
    # first copies: each rank's part in proportion to its slots
    ends = np.floor(np.cumsum(fill_R) * experts / fill_R.sum() + 0.5).astype(np.int64)
    owned = np.diff(np.concatenate(([0], ends)))
    if round_robin:
        turn = np.lexsort((np.repeat(np.arange(ranks), owned), np.concatenate([np.arange(count) for count in owned])))
        rank_of = np.repeat(np.arange(ranks), owned)[turn]
    else:
        rank_of = np.repeat(np.arange(ranks), owned)
    used = np.zeros(ranks, dtype=np.int64)
    for expert, rank in zip(order, rank_of, strict=True):
        table[rank, used[rank]] = expert
        used[rank] += 1
    held = [set(row[:count].tolist()) for row, count in zip(table, used, strict=True)]
    following = 0
    for rank in range(ranks):
        while used[rank] < fill_R[rank]:
            turn_order = np.roll(order, -following)
            expert = int(turn_order[0]) if allow_duplicates else next(int(one) for one in turn_order if int(one) not in held[rank])
            table[rank, used[rank]] = expert
            used[rank] += 1
            held[rank].add(expert)
            following = (following + 1) % experts
    return table


def _solve(problem: PlacementProblem, name: str, seed: int) -> PlacementResult:
    generator = np.random.Generator(np.random.PCG64(seed))
    experts = problem.num_experts
    rows = []
    for _ in range(problem.num_layers if name == "random" else 1):
        order = generator.permutation(experts) if name == "random" else np.arange(experts)
        rows.append(_deal(problem.fill_R, experts, order, name == "round_robin", problem.allow_duplicates_on_rank))
    table = np.stack(rows) if name == "random" else np.repeat(np.stack(rows), problem.num_layers, axis=0)
    return make_result(problem, to_slots_LS(table, problem.slots_per_rank_R), solver=name, status="BASELINE")


def solve_linear(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Consecutive experts on the same rank."""
    return _solve(problem, "linear", seed)


def solve_round_robin(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Consecutive experts on consecutive ranks."""
    return _solve(problem, "round_robin", seed)


def solve_random(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """A seeded random order of experts in every layer."""
    return _solve(problem, "random", seed)
