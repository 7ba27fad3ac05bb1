"""Placement for few ranks and nodes per token within a layer: experts that fire together sit together.

Layers are independent. First the pairs that a rank (or node, then rank) holds are maximised by swaps. As m experts of a token
on one rank save m - 1 messages, not m·(m-1)/2, swaps are then chosen by the number of messages that they save, which is
counted exactly for every swap. Shapes: T tokens, L layers, K choices, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity.bounds import company_bound_n
from moesim.solvers.affinity.capped import force_cap_LE
from moesim.solvers.affinity.problem import balanced_group_LE, check_ranks, rank_load_LG
from moesim.solvers.affinity.result import FANOUT, AffinityResult, contiguous_LE, make_affinity_result
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.affinity.scores import distinct_L, score_fanout
from moesim.solvers.affinity.swap import SwapTerms, swap_round_nE, swap_search_nE
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
    ranks_per_rack: int = 0
    """Consecutive ranks whose nodes share a rack; 0: all of them."""
    rack_weight: float = 1.0
    """Cost of reaching a rack on top; >= 0, taken as 0 in a single rack."""
    load_slack: float | None = None
    """The busiest rank of a layer may carry this share more than in the best balanced plan found; None: no limit."""

    def __post_init__(self) -> None:
        check_ranks(self.routes.num_experts, self.num_ranks, self.ranks_per_node)
        if self.ranks_per_rack:
            check_ranks(self.routes.num_experts, self.num_ranks, self.ranks_per_rack)
        for name, value in (("node_weight", self.node_weight), ("rack_weight", self.rack_weight), ("load_slack", self.load_slack)):
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(describe("affinity problem", name, value, "must be a number >= 0"))
        object.__setattr__(self, "ranks_per_node", self.ranks_per_node or self.num_ranks)
        if self.num_nodes == 1:
            object.__setattr__(self, "node_weight", 0.0)
        object.__setattr__(self, "ranks_per_rack", self.ranks_per_rack or self.num_ranks)
        if self.ranks_per_rack == self.num_ranks:
            object.__setattr__(self, "rack_weight", 0.0)
        elif self.ranks_per_rack % self.ranks_per_node:
            rule = f"must be a multiple of the {self.ranks_per_node} ranks of a node"
            raise InputError(describe("affinity problem", "ranks_per_rack", self.ranks_per_rack, rule))

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks form."""
        return self.num_ranks // self.ranks_per_node

    @property
    def levels(self) -> list[tuple[int, float]]:
        """(Ranks of a place, weight) of ranks, nodes and racks, those that cost nothing left out."""
        places = ((1, 1.0), (self.ranks_per_node, self.node_weight), (self.ranks_per_rack, self.rack_weight))
        return [(per_place, weight) for per_place, weight in places if weight > 0]


def solve_fanout(problem: FanoutProblem, *, method: str = "co-activation", rounds: int = 10, deadline: Deadline = None) -> AffinityResult:
    """Return a placement whose tokens reach few ranks and nodes. method: `co-activation`, or the baseline `contiguous`.

    rounds: most rounds of swaps by saved messages, >= 0.
    """
    if method not in ("co-activation", "contiguous"):
        raise InputError(describe("affinity", "method", method, "must be 'co-activation' or 'contiguous'"))
    routes, ranks = problem.routes, problem.num_ranks
    plain = contiguous_LE(routes.num_layers, routes.num_experts, ranks)
    company = coactivation_LEE(routes)
    if method == "contiguous":
        return _result(problem, plain, company, solver=method, status="BASELINE", iterations=0)
    load = loads_LE(routes)
    balanced = cap = None
    best = plain
    if problem.load_slack is not None:
        best = balanced = balanced_group_LE(load, ranks)
        cap = rank_load_LG(balanced, load, ranks).max(axis=1) * (1.0 + problem.load_slack)
    group, made, late = _staged(best, problem, company, deadline)
    if cap is not None and balanced is not None:
        terms = SwapTerms(company_nEE=company, load_nE=load, cap_n=cap)
        group, more, cut = swap_search_nE(force_cap_LE(group, ranks, terms, balanced), ranks, terms, deadline=deadline)
        made, late = made + more, late or cut
    better = _cost_L(problem, group) < _cost_L(problem, best)
    group = np.where(better[:, None], group, best)
    group, more, cut = _polish(problem, group, SwapTerms(load_nE=load, cap_n=cap), rounds, deadline)
    return _result(problem, group, company, solver="co-activation", status="TIME_LIMIT" if late or cut else "FEASIBLE", iterations=made + more)


def _polish(problem: FanoutProblem, group_LE: np.ndarray, terms: SwapTerms, rounds: int, deadline: Deadline) -> tuple[np.ndarray, int, bool]:
    """Swap by the messages that tokens save, layer by layer while the true cost falls.

    Several swaps at once may get in each other's way: then only the best one is made.
    """
    best = group_LE.copy()
    cost_L = _cost_L(problem, best)
    open_L = np.arange(len(best))
    for done in range(rounds):
        if not open_L.size:
            return best, done, False
        if expired(deadline):
            return best, done, True
        gain, overlap = _saved(problem, best, open_L)
        some = replace(terms.take(open_L), gain_nEG=gain, overlap_nEE=overlap)
        group, moved = swap_round_nE(best[open_L], problem.num_ranks, some)
        found = _cost_L(problem, group, open_L)
        worse = moved & (found >= cost_L[open_L])
        if worse.any():
            group[worse] = swap_round_nE(best[open_L[worse]], problem.num_ranks, some.take(np.flatnonzero(worse)), single=True)[0]
            found[worse] = _cost_L(problem, group[worse], open_L[worse])
        better = found < cost_L[open_L]
        best[open_L[better]], cost_L[open_L[better]] = group[better], found[better]
        open_L = open_L[better]
    return best, rounds, False


def _saved(problem: FanoutProblem, group_LE: np.ndarray, layers_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the messages [n, E, G] that an expert saves on every rank, and half of what two experts that change places save less [n, E, E].

    An expert saves one for every token that reaches the rank for another choice too, and the weights of its node and rack likewise.
    """
    layers, experts = len(layers_n), problem.routes.num_experts
    gain, overlap = np.zeros((layers, experts, problem.num_ranks)), np.zeros((layers, experts, experts))
    for per_place, weight in problem.levels:
        more, shared = _saved_on(problem.routes, group_LE // per_place, layers_n, problem.num_ranks // per_place)
        gain += weight * np.repeat(more, per_place, axis=2)
        overlap += weight * shared
    return gain, overlap


def _saved_on(routes: TokenRoutes, place_LE: np.ndarray, layers_n: np.ndarray, places: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both for one kind of place: for every layer, tokens with an expert that have another choice on the place [n, E, P].

    A token with both experts of a swap reaches the same places before and after, yet each of the two counts the other as company to
    come: where the first is alone on its place that is one too many.
    """
    experts, (tokens, _, width) = routes.num_experts, routes.experts_TLK.shape
    gain, overlap = np.zeros((len(layers_n), experts, places)), np.zeros((len(layers_n), experts, experts))
    first, second = np.nonzero(~np.eye(width, dtype=bool))
    for row, layer in enumerate(layers_n.tolist()):
        chosen = routes.experts_TLK[:, layer].astype(np.int64)
        valid = np.ones(chosen.shape, dtype=bool) if routes.valid_TLK is None else routes.valid_TLK[:, layer]
        at = place_LE[layer][chosen]
        held = np.bincount((at + np.arange(tokens)[:, None] * places)[valid], minlength=tokens * places).reshape(tokens, places)
        token, expert = np.nonzero(valid)[0], chosen[valid]
        order = np.argsort(expert, kind="stable")
        present, start = np.unique(expert[order], return_index=True)
        gain[row, present] = np.add.reduceat((held > 0)[token[order]], start, axis=0, dtype=np.int64)
        alone = valid & (np.take_along_axis(held, at, axis=1) == 1)
        gain[row, np.arange(experts), place_LE[layer]] = np.bincount(chosen[valid & ~alone], minlength=experts)
        both = alone[:, first] & valid[:, second]
        lonely = np.bincount((chosen[:, first] * experts + chosen[:, second])[both], minlength=experts**2).reshape(experts, experts)
        overlap[row] = (lonely + lonely.T) / 2
    return gain, overlap


def _staged(group_LE: np.ndarray, problem: FanoutProblem, company_LEE: np.ndarray, deadline: Deadline) -> tuple[np.ndarray, int, bool]:
    """Cluster onto the widest places, then inside every one of them onto narrower ones, down to ranks."""
    layers, experts = group_LE.shape
    *wide, widest = [per_place for per_place, _ in problem.levels]
    # `group` holds for every expert the first rank of its place
    group, made, late = swap_search_nE(group_LE // widest, problem.num_ranks // widest, SwapTerms(company_nEE=company_LEE), deadline=deadline)
    group *= widest
    for narrow in wide[::-1]:
        parts, inner = problem.num_ranks // widest, widest // narrow
        member = np.argsort(group, axis=1, kind="stable").reshape(layers * parts, experts // parts)
        row = np.repeat(np.arange(layers), parts)
        inside = company_LEE[row[:, None, None], member[:, :, None], member[:, None, :]]
        local, more, cut = swap_search_nE(contiguous_LE(layers * parts, experts // parts, inner), inner, SwapTerms(company_nEE=inside), deadline=deadline)
        group[row[:, None], member] = local * narrow + (np.arange(layers * parts) % parts * widest)[:, None]
        made, late, widest = made + more, late or cut, narrow
    return group, made, late


def _cost_L(problem: FanoutProblem, group_nE: np.ndarray, layers_n: np.ndarray | None = None) -> np.ndarray:
    """Return float64 [n]: weighted ranks, nodes and racks that the tokens reach in the layers (all of them if None)."""
    return np.asarray(sum(weight * distinct_L(problem.routes, group_nE // per_place, layers_n) for per_place, weight in problem.levels), dtype=np.float64)


def _result(problem: FanoutProblem, group_LE: np.ndarray, company_LEE: np.ndarray, *, solver: str, status: str, iterations: int) -> AffinityResult:
    routes = problem.routes
    score = score_fanout(routes, group_LE, num_ranks=problem.num_ranks, ranks_per_node=problem.ranks_per_node, node_weight=problem.node_weight)
    cells = len(routes) * routes.num_layers
    bound = 0.0
    for per_place, weight in problem.levels:
        bound += weight * float(distinct_bound_L(routes, company_LEE, problem.num_ranks // per_place).sum()) / cells
    racks = float(distinct_L(routes, group_LE // problem.ranks_per_rack).sum()) / cells
    return make_affinity_result(
        FANOUT,
        group_LE,
        ranks=problem.num_ranks,
        load_LE=loads_LE(routes),
        cost=score.cost + problem.rack_weight * racks,
        cost_bound=min(bound, score.cost + problem.rack_weight * racks) if bound <= (score.cost + problem.rack_weight * racks) * (1 + 1e-9) else bound,
        worst=score.choices * sum(weight for _, weight in problem.levels),
        status=status,
        solver=solver,
        iterations=iterations,
        metrics={
            "ranks_per_token": score.ranks,
            "nodes_per_token": score.nodes,
            "remote_ranks_per_token": score.remote_ranks,
            "remote_nodes_per_token": score.remote_nodes,
            "racks_per_token": racks,
        },
    )


def distinct_bound_L(routes: TokenRoutes, company_LEE: np.ndarray, parts: int) -> np.ndarray:
    """Return float64 [L]: distinct places that the tokens of a layer reach at least.

    k choices reach at least k over the experts of a place. With m of them on a place it counts 1 >= 2 m / (j + 1) - m (m - 1) / (j (j + 1)) for every
    whole j > 0 (exact at m = j and j + 1), summed over places: choices and the pairs that share one, which `company_bound_n` limits.
    Source: Dawson and Sankoff (1967), An inequality for probabilities.
    """
    valid = np.ones(routes.experts_TLK.shape, dtype=bool) if routes.valid_TLK is None else routes.valid_TLK
    count_TL = valid.sum(axis=2)
    bound = (-(-count_TL // (routes.num_experts // parts))).sum(axis=0).astype(np.float64)
    pairs_L, choices_L = company_bound_n(company_LEE, parts), count_TL.sum(axis=0)
    for shared in range(1, routes.experts_TLK.shape[2] + 1):
        bound = np.maximum(bound, 2.0 * (choices_L - pairs_L / shared) / (shared + 1))
    return bound
