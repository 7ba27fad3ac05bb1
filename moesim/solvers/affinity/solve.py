"""Solve the inter-layer affinity problem with the method that its size allows.

`chain-hungarian`: exact, one expert per rank on a flat fabric. `chain-dp`: exact, few placements per layer. `descent`: exact
re-solves of layers from several starts, with a certified gap. `balance-then-label` (clusters by load, labels by
transitions) and `contiguous` are the baselines. `auto` takes the first that fits.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity import chain_dp
from moesim.solvers.affinity.bounds import kept_bound_n
from moesim.solvers.affinity.capped import capped_descend
from moesim.solvers.affinity.descent import descend, forward, hop_cost
from moesim.solvers.affinity.labels import label_LE
from moesim.solvers.affinity.problem import AffinityProblem, balanced_group_LE, rank_load_LG
from moesim.solvers.affinity.result import HOPS, AffinityResult, contiguous_LE, make_affinity_result
from moesim.solvers.affinity.scores import score_hops
from moesim.solvers.affinity.two_stage import two_stage_LE
from moesim.solvers.search import Deadline, expired

METHODS = ("auto", "chain-dp", "chain-hungarian", "descent", "balance-then-label", "contiguous")
_SIZES = ((50_000, 20), (500_000, 4))
"""Layers × experts² up to which so many starts are tried; one beyond."""


def solve_hops(
    problem: AffinityProblem, *, method: str = "auto", seed: int = 0, restarts: int | None = None, sweeps: int = 50, deadline: Deadline = None
) -> AffinityResult:
    """Return a placement of low hop cost.

    restarts: starts of the descent, >= 1; None: by size. sweeps: most passes over the layers per start.
    Raises InputError if the method is unknown or does not fit the problem.
    """
    if method not in METHODS:
        raise InputError(describe("affinity", "method", method, f"must be one of {', '.join(METHODS)}"))
    if restarts is not None and restarts < 1:
        raise InputError(describe("affinity", "restarts", restarts, "must be >= 1"))
    chosen = _method(problem) if method == "auto" else method
    hops, table = problem.hop_GG, problem.transitions_LEE
    balanced, cap = load_cap(problem) if chosen not in ("contiguous", "balance-then-label") else (None, None)
    if chosen == "contiguous":
        group = contiguous_LE(problem.num_layers, problem.num_experts, problem.num_ranks)
        return hops_result(problem, group, solver=chosen, status="BASELINE")
    if chosen == "balance-then-label":
        group = label_LE(table, balanced_group_LE(problem.load_LE, problem.num_ranks), hops)
        return hops_result(problem, group, solver=chosen, status="BASELINE")
    if chosen == "chain-hungarian":
        if problem.per_rank != 1 or not _flat(hops):
            raise InputError(describe("affinity", "method", method, "needs one expert per rank and equal costs between all ranks", "use descent"))
        group = label_LE(table, contiguous_LE(problem.num_layers, problem.num_experts, problem.num_ranks), hops)
        return hops_result(problem, group, solver=chosen, status="OPTIMAL", proven=True)
    if chosen == "chain-dp":
        if not chain_dp.fits(problem.num_layers, problem.num_experts, problem.num_ranks, hops):
            states = chain_dp.num_states(problem.num_experts, problem.num_ranks)
            raise InputError(describe("affinity", "placements of a layer", states, "are too many for chain-dp", "use descent"))
        group, _ = chain_dp.solve_chain(table, hops, load_LE=problem.load_LE if cap is not None else None, cap_L=cap)
        return hops_result(problem, group, solver=chosen, status="OPTIMAL", proven=True)
    return _descent(problem, seed, restarts or _restarts(problem), sweeps, balanced, cap, deadline)


def load_cap(problem: AffinityProblem) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the balanced placement int64 [L, E] and the cap float64 [L] on a rank's load; None where there is no cap."""
    if problem.load_slack is None:
        return None, None
    balanced = balanced_group_LE(problem.load_LE, problem.num_ranks)
    return balanced, rank_load_LG(balanced, problem.load_LE, problem.num_ranks).max(axis=1) * (1.0 + problem.load_slack)


def _flat(hop_GG: np.ndarray) -> bool:
    off = hop_GG[~np.eye(len(hop_GG), dtype=bool)]
    return off.size == 0 or bool((off == off[0]).all())


def _method(problem: AffinityProblem) -> str:
    if problem.per_rank == 1 and _flat(problem.hop_GG):
        return "chain-hungarian"
    return "chain-dp" if chain_dp.fits(problem.num_layers, problem.num_experts, problem.num_ranks, problem.hop_GG) else "descent"


def _restarts(problem: AffinityProblem) -> int:
    work = problem.num_layers * problem.num_experts**2
    return next((count for limit, count in _SIZES if work <= limit), 1)


def _descent(
    problem: AffinityProblem, seed: int, restarts: int, sweeps: int, balanced: np.ndarray | None, cap: np.ndarray | None, deadline: Deadline
) -> AffinityResult:
    """Try several starts and keep the best; the contiguous placement is the answer if time is up before the first."""
    table, hops, ranks = problem.transitions_LEE, problem.hop_GG, problem.num_ranks
    generator = np.random.Generator(np.random.PCG64(seed))
    first = np.arange(problem.num_experts) // problem.per_rank
    best = contiguous_LE(problem.num_layers, problem.num_experts, ranks) if balanced is None else label_LE(table, balanced, hops)
    lowest, total, late = hop_cost(table, best, hops), 0, False
    for attempt in range(restarts):
        if expired(deadline):
            late = True
            break
        if problem.num_nodes > 1 and problem.node_weight > 0:
            group, made, cut = two_stage_LE(table, first, ranks=ranks, ranks_per_node=problem.ranks_per_node, deadline=deadline)
            total, late = total + made, late or cut
        else:
            group = forward(table, first, hops)
        group, made, cut = descend(table, group, hops, sweeps=sweeps, deadline=deadline)
        total, late = total + made, late or cut
        starts = [group]
        if balanced is not None and cap is not None:
            # on large problems the balanced placement is a poor start that costs as much as the good one
            starts = [group] + ([best] if attempt == 0 and restarts > 1 else [])
        for start in starts:
            found = start
            if balanced is not None and cap is not None:
                found, made, cut = capped_descend(table, start, hops, problem.load_LE, cap, balanced, deadline=deadline)
                total, late = total + made, late or cut
            cost = hop_cost(table, found, hops)
            if cost < lowest:
                best, lowest = found, cost
        first = generator.permutation(first)
    return hops_result(problem, best, solver="descent", status="TIME_LIMIT" if late else "FEASIBLE", iterations=total)


def hops_result(
    problem: AffinityProblem, group_LE: np.ndarray, *, solver: str, status: str, iterations: int = 0, proven: bool = False, cost_bound: float = 0.0
) -> AffinityResult:
    """Score a placement against a certified bound.

    proven: the placement is a proven optimum. cost_bound: total cost that a solver proved to be a lower bound.
    """
    total, hops = problem.total, problem.hop_GG
    cost = hop_cost(problem.transitions_LEE, group_LE, hops)
    bound = cost if proven else max(cost_bound, hop_bound(problem))
    score = score_hops(problem.transitions_LEE, group_LE, ranks_per_node=problem.ranks_per_node, node_weight=problem.node_weight)
    unit = total if total > 0 else 1.0
    return make_affinity_result(
        HOPS,
        group_LE,
        ranks=problem.num_ranks,
        load_LE=problem.load_LE,
        cost=cost / unit,
        cost_bound=min(bound, cost) / unit if bound <= cost * (1 + 1e-6) else bound / unit,
        worst=problem.worst_hop if total > 0 else 0.0,
        status=status,
        solver=solver,
        iterations=iterations,
        metrics={"cross_rank_fraction": score.cross_rank, "cross_node_fraction": score.cross_node},
    )


def hop_bound(problem: AffinityProblem) -> float:
    """Return a total hop cost below which no placement gets, with or without a load cap."""
    bound = 0.0
    for parts, weight in ((problem.num_ranks, 1.0), (problem.num_nodes, problem.node_weight)):
        if parts > 1 and weight > 0:
            bound += weight * max(0.0, problem.total - float(kept_bound_n(problem.transitions_LEE, parts).sum()))
    return bound
