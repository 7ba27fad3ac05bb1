"""The solver `descent`: placements for any objective but hops, searched from several starts; and `affinity`, for traffic or hops alone.

Swaps are searched on loads c·a(c), exact while the counts of copies c stay, and on rank loads; for a term that swaps cannot see (a
predicted time, traffic) candidates come from several mixtures of the two, and from traffic planned under several caps on the load.
Every layer keeps the cheapest candidate, the balanced placement of `greedy` among them; random swaps and reassigned slots then
lower the cost itself, whatever it is; where tokens are counted, as far as they are few. Shapes: L layers, E experts, S slots, N trial placements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.solvers import metrics
from moesim.solvers.assignment import align_LS, relabel_LS
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.packing import from_slots_LRC, pack_LRC, to_slots_LS
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import OPTIMAL_GAP, ObjectiveResult, PlacementResult
from moesim.solvers.search import Deadline, expired, improve
from moesim.solvers.state import SearchState
from moesim.solvers.terms import Terms, copies_LE

MIXTURES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Weights of balance in the searches for a term that swaps cannot see."""
SLACKS = (0.05, 0.4)
"""Caps on the busiest rank, over a balanced plan's, under which traffic is planned."""
ROUNDS = 1000
TRIAL_CELLS, PREDICTED_CELLS = 1_000_000, 200_000
"""Slots, over layers, windows and trials, of a round of random moves; fewer where a time is predicted."""
MAX_EACH, EACH_CHOICES = 300, 500_000
"""Rounds of random moves where tokens are counted: at most, and choices counted in all of them."""
MAX_TRIALS = 128
TRIAL_ROUNDS = 60
PATIENCE = 6
"""Rounds without a better placement in any layer after which random moves end."""
FEW_ROUNDS = 8
"""Swap rounds between two looks at the cost, where the swaps do not see all of it."""


def solve_descent(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> ObjectiveResult:
    """Search a placement under the problem's objective; no result is worse than that of `greedy` under the same objective.

    A search cut short by the deadline says TIME_LIMIT. Raises InputError if a predicted time falls where tokens are added.
    """
    terms = Terms(problem)
    start = solve_greedy(problem, seed=seed, deadline=deadline)
    best, moves, late = start.slot_to_expert_LS.copy(), start.iterations, start.status == "TIME_LIMIT"
    cost_L = terms.cost_L(best)
    for table, made, cut in _candidates(terms, best, deadline):
        moves, late = moves + made, late or cut
        other_L = terms.cost_L(table)
        wins = other_L < cost_L * (1 - 1e-12)
        best[wins], cost_L[wins] = table[wins], other_L[wins]
    made, cut = (_try_each if "traffic" in terms.weights else _try_moves)(terms, best, cost_L, seed, deadline)
    moves, late = moves + made, late or cut
    if problem.previous is not None:
        # ranks of different nodes, or that tokens start on, are not interchangeable where tokens count what they reach
        same = problem.objective.weight("traffic") == 0 or (problem.num_nodes == 1 and problem.one_slot_each)
        best = relabel_LS(problem, best) if same else align_LS(best, problem.previous, problem.slots_per_rank_R)
    return score(terms, best, solver="descent", status="TIME_LIMIT" if late else "FEASIBLE", iterations=moves)


def score(terms: Terms, table_LS: np.ndarray, *, solver: str, status: str, iterations: int = 0, bound_L: np.ndarray | None = None) -> ObjectiveResult:
    """Return a placement with its cost, its proof and the honest name of its status. bound_L: a proven cost [L] above that of `terms`, if there is one."""
    cost_L, bound_L = terms.cost_L(table_LS), terms.bound_L() if bound_L is None else bound_L
    if (bound_L > cost_L * (1 + 1e-7) + 1e-300).any():
        assert "latency" in terms.weights, f"bound {bound_L} is above the cost {cost_L}"
        raise InputError("solve: expert_seconds gave a rank less time for more tokens or slots; it must not fall")
    cost, cost_bound = float(cost_L.sum()), float(np.minimum(bound_L, cost_L).sum())
    reference = min(terms.ideal, cost_bound)
    # where nothing at all cannot be ruled out, any cost is infinitely far from it
    value, bound = (reference / cost, reference / cost_bound) if reference > 0 else (float(cost == 0), 1.0)
    gap = (bound - value) / bound
    if status in ("FEASIBLE", "OPTIMAL"):
        status = "OPTIMAL" if gap <= OPTIMAL_GAP else "FEASIBLE"
    return ObjectiveResult(
        slot_to_expert_LS=table_LS,
        objective=terms.problem.objective.name,
        value=value,
        bound=bound,
        gap=gap,
        status=status,
        solver=solver,
        iterations=iterations,
        cost=cost,
        cost_bound=cost_bound,
    )


def _candidates(terms: Terms, start_LS: np.ndarray, deadline: Deadline) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield (placement, moves, cut short): searches with the balanced counts of copies and with those that activate the fewest, per mixture."""
    problem, weights = terms.problem, terms.weights
    blind = bool({"latency", "traffic"} & set(weights))
    seen = weights.get("balance", 0.0) + weights.get("activated", 0.0)
    balanced = copies_LE(problem, start_LS)
    counts = (balanced, _cold_copies_LE(terms)) if problem.objective.decode is not None else (balanced,)
    mixtures = (1.0,) if problem.objective.decode is None else MIXTURES if blind or seen == 0 else (weights.get("balance", 0.0) / seen,)
    for mixture in mixtures:
        scale = np.concatenate(terms.proxy_weights(mixture))
        for copies in counts:
            if expired(deadline):
                yield start_LS, 0, True
                return
            load = np.concatenate((problem.load_KLE, terms.proxy_KLE(copies)))[scale > 0]
            weight_KL = np.repeat(scale[scale > 0][:, None], problem.num_layers, axis=1)
            if len(load) == 0:
                return
            packed_copies = copies.copy()
            packed = pack_LRC(load, weight_KL, packed_copies, problem.fill_R, problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank)
            tables = [packed] if (packed_copies == copies).all() else []
            if (copies == balanced).all():
                tables.append(from_slots_LRC(start_LS, problem.slots_per_rank_R))
            for table in tables:
                yield from _swaps(problem, load, weight_KL, table, blind, deadline)
    if weights.get("traffic", 0.0) > 0:
        yield from _fanouts(problem, start_LS, deadline)


def _swaps(
    problem: PlacementProblem, load: np.ndarray, weight_KL: np.ndarray, table_LRC: np.ndarray, blind: bool, deadline: Deadline
) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield placements along a descent by swaps alone; where swaps do not see the whole cost, at several stages of it."""
    state = SearchState.of(load, weight_KL, table_LRC.copy(), problem.speed_R, allow_duplicates=problem.allow_duplicates_on_rank)
    floor = (metrics.ideal_KL(load, problem.speed_R) * weight_KL).sum(axis=0)
    for rounds in (0, FEW_ROUNDS, 4 * FEW_ROUNDS, ROUNDS) if blind else (ROUNDS,):
        moves, cut = improve(state, floor, max_rounds=rounds, max_deep=0, deadline=deadline)
        yield to_slots_LS(state.table_LRC, problem.slots_per_rank_R), moves, cut
        if cut:
            return


def _fanouts(problem: PlacementProblem, start_LS: np.ndarray, deadline: Deadline) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yield placements for little traffic whose ranks are ever busier; slots left over hold the copies that save most of it."""
    from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
    from moesim.solvers.affinity.replicas import fill_copies

    objective, rank_S = problem.objective, problem.slot_rank_S
    assert objective.routes is not None
    per_rank, rest = divmod(problem.num_experts, problem.num_ranks)
    if not problem.one_slot_each:
        # the balanced placement with its copies given up, and below, where it fits, those of one slot per expert
        table = _without_copies(start_LS)
        made, late = fill_copies(objective.routes, table, rank_S, problem.num_ranks, problem.levels, deadline)
        yield table, made, late
        if rest or int(problem.slots_per_rank_R.min()) < per_rank:
            return
    for slack in SLACKS:
        if expired(deadline):
            yield start_LS, 0, True
            return
        asked = FanoutProblem(
            routes=objective.routes,
            num_ranks=problem.num_ranks,
            ranks_per_node=problem.ranks_per_node,
            node_weight=objective.node_weight,
            ranks_per_rack=problem.ranks_per_rack,
            rack_weight=objective.rack_weight,
            load_slack=slack,
        )
        found = solve_fanout(asked, deadline=deadline)
        table, made, late = found.slot_to_expert_LS, found.iterations, found.status == "TIME_LIMIT"
        if not problem.one_slot_each:
            first = np.concatenate([np.arange(start, start + per_rank) for start in np.cumsum(problem.slots_per_rank_R) - problem.slots_per_rank_R])
            wide = np.full(start_LS.shape, -1, dtype=start_LS.dtype)
            wide[:, first] = table
            more, cut = fill_copies(objective.routes, wide, rank_S, problem.num_ranks, problem.levels, deadline)
            table, made, late = wide, made + more, late or cut
        yield table, made, late


def _without_copies(table_LS: np.ndarray) -> np.ndarray:
    """Return a placement with the first slot of every expert only."""
    result = np.full_like(table_LS, -1)
    for row, kept in zip(table_LS, result, strict=True):
        experts, slots = np.unique(row, return_index=True)
        kept[slots[experts >= 0]] = experts[experts >= 0]
    return result


def _try_moves(terms: Terms, best_LS: np.ndarray, cost_L: np.ndarray, seed: int, deadline: Deadline) -> tuple[int, bool]:
    """Lower the cost in place by the best of many random moves per layer and round; return the moves made and whether time ran out."""
    layers, slots = best_LS.shape
    cells = PREDICTED_CELLS if "latency" in terms.weights else TRIAL_CELLS
    trials = int(np.clip(cells // (layers * slots * terms.problem.num_windows), 1, MAX_TRIALS))
    many, row = terms.repeated(trials), np.arange(layers)
    generator = np.random.Generator(np.random.PCG64(seed))
    made = idle = 0
    for _ in range(TRIAL_ROUNDS):
        if idle == PATIENCE:
            break
        if expired(deadline):
            return made, True
        tables = neighbours(terms, np.repeat(best_LS, trials, axis=0), generator)
        # every second trial is a pair of moves: where no single one helps, two may
        tables[1::2] = neighbours(terms, tables[1::2], generator)
        cost = many.cost_L(tables).reshape(layers, trials)
        at = cost.argmin(axis=1)
        wins = cost[row, at] < cost_L * (1 - 1e-9)
        best_LS[wins], cost_L[wins] = tables.reshape(layers, trials, slots)[row, at][wins], cost[row, at][wins]
        made, idle = made + int(wins.sum()), 0 if wins.any() else idle + 1
    return made, False


def _try_each(terms: Terms, best_LS: np.ndarray, cost_L: np.ndarray, seed: int, deadline: Deadline) -> tuple[int, bool]:
    """Lower the cost in place by random moves, one placement of every layer at a time, as tokens have to be counted anew for each."""
    routes = terms.problem.objective.routes
    assert routes is not None
    generator = np.random.Generator(np.random.PCG64(seed))
    made = 0
    for step in range(min(MAX_EACH, EACH_CHOICES // routes.experts_TLK.size)):
        if expired(deadline):
            return made, True
        tables = neighbours(terms, best_LS, generator)
        if step % 2:
            tables = neighbours(terms, tables, generator)
        other_L = terms.cost_L(tables)
        wins = other_L < cost_L * (1 - 1e-9)
        best_LS[wins], cost_L[wins] = tables[wins], other_L[wins]
        made += int(wins.sum())
    return made, False


def neighbours(terms: Terms, table_NS: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return every placement after a random swap of two slots, or with a replica's slot given to another expert; unchanged where that is not legal."""
    problem = terms.problem
    row, rank_S = np.arange(len(table_NS)), problem.slot_rank_S
    one, other = generator.integers(table_NS.shape[1], size=(2, len(table_NS)))
    mine, theirs = table_NS[row, one], table_NS[row, other]
    copies = copies_LE(problem, table_NS)
    give = (generator.random(len(table_NS)) < 0.5) & (copies[row, mine] > 1) & (copies[row, theirs] < terms.most_copies)

    def lacks(slot: np.ndarray, expert: np.ndarray) -> np.ndarray:
        return ~((rank_S == rank_S[slot][:, None]) & (table_NS == expert[:, None])).any(axis=1) | problem.allow_duplicates_on_rank

    legal = (mine >= 0) & (theirs >= 0) & (mine != theirs) & lacks(one, theirs) & (give | lacks(other, mine))
    result = table_NS.copy()
    result[row[legal], one[legal]] = theirs[legal]
    swapped = legal & ~give
    result[row[swapped], other[swapped]] = mine[swapped]
    return result


def _cold_copies_LE(terms: Terms) -> np.ndarray:
    """Return int64 [L, E]: extra copies where they add the fewest activations."""
    problem = terms.problem
    copies = np.ones((problem.num_layers, problem.num_experts), dtype=np.int64)
    row = np.arange(problem.num_layers)
    for _ in range(int(problem.fill_R.sum()) - problem.num_experts):
        added = np.einsum("k,kle->le", problem.weight_K, terms.proxy_KLE(copies + 1) - terms.proxy_KLE(copies))
        added[copies >= terms.most_copies] = np.inf
        copies[row, added.argmin(axis=1)] += 1
    return copies


def solve_affinity(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Plan for traffic or for hops alone; option `load_slack`: how much busier than in a balanced plan the busiest rank may be (none: no limit)."""
    from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
    from moesim.solvers.affinity.problem import AffinityProblem
    from moesim.solvers.affinity.solve import solve_hops
    from moesim.solvers.affinity.transitions import count_transitions

    objective = problem.objective
    assert objective.routes is not None
    if not problem.one_slot_each:
        raise InputError("solver affinity: needs equal ranks and one slot per expert; leave out the extra slots, or use the solver descent")
    slack = (options or {}).get("load_slack")
    shape: dict[str, Any] = {
        "num_ranks": problem.num_ranks,
        "ranks_per_node": problem.ranks_per_node,
        "node_weight": objective.node_weight,
        "load_slack": None if slack is None else float(slack),
    }
    if objective.alone == "traffic":
        racks: dict[str, Any] = {"ranks_per_rack": problem.ranks_per_rack, "rack_weight": objective.rack_weight}
        return solve_fanout(FanoutProblem(routes=objective.routes, **shape, **racks), deadline=deadline)
    counts = count_transitions(objective.routes)
    return solve_hops(AffinityProblem(transitions_LEE=counts.transitions_LEE, load_LE=counts.load_LE, **shape), seed=seed, deadline=deadline)
