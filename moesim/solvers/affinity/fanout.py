"""Placement for few ranks and nodes per token within a layer: experts that fire together sit together.

Layers are independent. The pairs that a rank holds are maximised by swaps; as m experts of a token on one rank save m - 1
messages, not m·(m-1)/2, pairs are then weighted by 2/m at the placement found and the search repeats while the true
count falls. Nodes first, then ranks inside. Shapes: T tokens, L layers, K choices, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity.bounds import company_bound_n
from moesim.solvers.affinity.capped import force_cap_LE
from moesim.solvers.affinity.problem import balanced_group_LE, check_ranks, rank_load_LG
from moesim.solvers.affinity.result import FANOUT, AffinityResult, contiguous_LE, make_affinity_result
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.affinity.scores import distinct_L, score_fanout
from moesim.solvers.affinity.swap import SwapTerms, swap_search_nE
from moesim.solvers.affinity.transitions import coactivation_LEE, loads_LE
from moesim.solvers.search import Deadline, expired


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutProblem:
    """Which experts of a layer should share a rank?"""

    routes: TokenRoutes
    """Tokens to plan on."""
    num_ranks: int
    """G, equal ranks; divides the experts."""
    ranks_per_node: int = 0
    """Consecutive ranks that share a node; 0: all of them."""
    node_weight: float = 1.0
    """Cost of reaching a node, where reaching a rank costs 1; >= 0, taken as 0 on a single node."""
    load_slack: float | None = None
    """The busiest rank of a layer may carry this share more than in the best balanced plan found; None: no limit."""

    def __post_init__(self) -> None:
        check_ranks(self.routes.num_experts, self.num_ranks, self.ranks_per_node)
        for name, value in (("node_weight", self.node_weight), ("load_slack", self.load_slack)):
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(describe("affinity problem", name, value, "must be a number >= 0"))
        object.__setattr__(self, "ranks_per_node", self.ranks_per_node or self.num_ranks)
        if self.num_nodes == 1:
            object.__setattr__(self, "node_weight", 0.0)

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks form."""
        return self.num_ranks // self.ranks_per_node


def solve_fanout(problem: FanoutProblem, *, method: str = "co-activation", rounds: int = 4, deadline: Deadline = None) -> AffinityResult:
    """Return a placement whose tokens reach few ranks and nodes. method: `co-activation`, or the baseline `contiguous`.

    rounds: most repetitions with reweighted pairs.
    """
    if method not in ("co-activation", "contiguous"):
        raise InputError(describe("affinity", "method", method, "must be 'co-activation' or 'contiguous'"))
    routes, ranks = problem.routes, problem.num_ranks
    start = contiguous_LE(routes.num_layers, routes.num_experts, ranks)
    company = coactivation_LEE(routes)
    if method == "contiguous":
        return _result(problem, start, company, solver=method, status="BASELINE", iterations=0)
    load = loads_LE(routes)
    balanced = cap = None
    if problem.load_slack is not None:
        balanced = balanced_group_LE(load, ranks)
        cap = rank_load_LG(balanced, load, ranks).max(axis=1) * (1.0 + problem.load_slack)
        start = balanced
    best, made, late = start.copy(), 0, False
    cost_L = _cost_L(problem, best)
    weighted = company
    group = best
    for _ in range(rounds + 1):
        if expired(deadline):
            late = True
            break
        if problem.node_weight > 0:
            group, steps, cut = _two_stage(group, problem, weighted, deadline)
        else:
            group, steps, cut = swap_search_nE(group, ranks, SwapTerms(company_nEE=weighted), deadline=deadline)
        made, late = made + steps, late or cut
        if cap is not None and balanced is not None:
            terms = SwapTerms(company_nEE=weighted, load_nE=load, cap_n=cap)
            group, steps, cut = swap_search_nE(force_cap_LE(group, ranks, terms, balanced), ranks, terms, deadline=deadline)
            made, late = made + steps, late or cut
        found_L = _cost_L(problem, group)
        better = found_L < cost_L
        best[better], cost_L[better] = group[better], found_L[better]
        if not better.any():
            break
        group = best.copy()
        weighted = _reweighted(routes, best)
    return _result(problem, best, company, solver="co-activation", status="TIME_LIMIT" if late else "FEASIBLE", iterations=made)


def _two_stage(group_LE: np.ndarray, problem: FanoutProblem, company_LEE: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, int, bool]:
    """Cluster onto nodes, then inside every node onto its ranks."""
    layers, experts = group_LE.shape
    nodes, per_node = problem.num_nodes, problem.ranks_per_node
    node, steps, cut = swap_search_nE(group_LE // per_node, nodes, SwapTerms(company_nEE=company_LEE), deadline=deadline)
    member = np.argsort(node, axis=1, kind="stable").reshape(layers * nodes, experts // nodes)
    row = np.repeat(np.arange(layers), nodes)
    inside = company_LEE[row[:, None, None], member[:, :, None], member[:, None, :]]
    start = contiguous_LE(layers * nodes, experts // nodes, per_node)
    local, more, late = swap_search_nE(start, per_node, SwapTerms(company_nEE=inside), deadline=deadline)
    result = np.empty_like(group_LE)
    result[row[:, None], member] = local + (np.arange(layers * nodes) % nodes * per_node)[:, None]
    return result, steps + more, cut or late


def _reweighted(routes: TokenRoutes, group_LE: np.ndarray) -> np.ndarray:
    """Return float64 [L, E, E]: co-activation with the pairs of m experts of a token on one rank weighted by 2/m, others by 1."""
    experts, width = routes.num_experts, routes.experts_TLK.shape[2]
    first, second = np.triu_indices(width, 1)
    table = np.zeros((routes.num_layers, experts, experts))
    for layer in range(routes.num_layers):
        chosen = routes.experts_TLK[:, layer].astype(np.int64)
        at = group_LE[layer][chosen]
        if routes.valid_TLK is not None:
            at = np.where(routes.valid_TLK[:, layer], at, -1 - np.arange(width))
        together = (at[:, :, None] == at[:, None, :]).sum(axis=2)
        weight = np.where(at[:, first] == at[:, second], 2.0 / together[:, first], 1.0)
        if routes.valid_TLK is not None:
            weight *= routes.valid_TLK[:, layer, first] & routes.valid_TLK[:, layer, second]
        key = chosen[:, first] * experts + chosen[:, second]
        square = np.bincount(key.ravel(), weights=weight.ravel(), minlength=experts**2).reshape(experts, experts)
        table[layer] = square + square.T
    table[:, np.arange(experts), np.arange(experts)] = 0.0
    return table


def _cost_L(problem: FanoutProblem, group_LE: np.ndarray) -> np.ndarray:
    ranks = distinct_L(problem.routes, group_LE)
    return np.asarray(ranks + problem.node_weight * distinct_L(problem.routes, group_LE // problem.ranks_per_node))


def _result(problem: FanoutProblem, group_LE: np.ndarray, company_LEE: np.ndarray, *, solver: str, status: str, iterations: int) -> AffinityResult:
    routes = problem.routes
    score = score_fanout(routes, group_LE, num_ranks=problem.num_ranks, ranks_per_node=problem.ranks_per_node, node_weight=problem.node_weight)
    cells = len(routes) * routes.num_layers
    bound = 0.0
    for parts, weight in ((problem.num_ranks, 1.0), (problem.num_nodes, problem.node_weight)):
        bound += weight * float(_distinct_bound_L(routes, company_LEE, parts).sum()) / cells
    return make_affinity_result(
        FANOUT,
        group_LE,
        ranks=problem.num_ranks,
        load_LE=loads_LE(routes),
        cost=score.cost,
        cost_bound=min(bound, score.cost) if bound <= score.cost * (1 + 1e-9) else bound,
        worst=score.choices * (1 + problem.node_weight),
        status=status,
        solver=solver,
        iterations=iterations,
        metrics={
            "ranks_per_token": score.ranks,
            "nodes_per_token": score.nodes,
            "remote_ranks_per_token": score.remote_ranks,
            "remote_nodes_per_token": score.remote_nodes,
        },
    )


def _distinct_bound_L(routes: TokenRoutes, company_LEE: np.ndarray, parts: int) -> np.ndarray:
    """Return float64 [L]: distinct places that the tokens of a layer reach at least.

    k choices reach k minus at most one place per pair that shares one, and at least k over the experts of a place.
    """
    valid = np.ones(routes.experts_TLK.shape, dtype=bool) if routes.valid_TLK is None else routes.valid_TLK
    count_TL = valid.sum(axis=2)
    fewest = -(-count_TL // (routes.num_experts // parts))
    return np.maximum(fewest.sum(axis=0), count_TL.sum(axis=0) - company_bound_n(company_LEE, parts))
