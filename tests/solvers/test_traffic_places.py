"""Traffic over ranks, nodes and racks, with and without copies of experts: against every placement, hand-counted cases and a second count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers.affinity.fanout import FanoutProblem, distinct_bound_L, solve_fanout
from moesim.solvers.affinity.replicas import fill_copies, remote_bound_L, remote_L
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.affinity.scores import distinct_L
from moesim.solvers.affinity.transitions import coactivation_LEE
from moesim.solvers.objective import Objective
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import recount
from moesim.solvers.registry import default_solver, solve
from moesim.solvers.result import ObjectiveResult


def routed(tokens: int, experts: int, width: int, *, topics: int = 2, seed: int = 0, layers: int = 1, valid: bool = False) -> TokenRoutes:
    """Return tokens whose choices mostly come from the experts of one topic."""
    generator = np.random.Generator(np.random.PCG64(seed))
    topic = generator.integers(0, topics, (tokens, 1, 1))
    score = generator.random((tokens, layers, experts)) + 0.7 * (np.arange(experts) % topics == topic)
    chosen = np.argsort(-score, axis=2)[:, :, :width].astype(np.uint8)
    exists = np.arange(width)[None, None, :] < 1 + np.arange(tokens)[:, None, None] % width + np.zeros((1, layers, 1), dtype=int) if valid else None
    return TokenRoutes(
        experts_TLK=chosen, request_T=np.arange(tokens, dtype=np.uint64), home_T=np.zeros(tokens, dtype=np.int64), num_experts=experts, valid_TLK=exists
    )


def problem_of(routes: TokenRoutes, ranks: int, slots: int | list[int], text: str = "traffic", **others: Any) -> PlacementProblem:
    load = np.stack([np.bincount(routes.experts_TLK[:, layer].ravel(), minlength=routes.num_experts) for layer in range(routes.num_layers)])
    weights = {key: others.pop(key) for key in ("node_weight", "rack_weight") if key in others}
    objective = Objective.parse(text, routes=routes, **weights)
    return PlacementProblem(load_KLE=load.astype(float), num_ranks=ranks, slots_per_rank_R=np.array(slots), objective=objective, **others)


def every_table(problem: PlacementProblem) -> Iterator[list[int]]:
    """Yield every placement of a single layer."""
    choices = [list(itertools.combinations(range(problem.num_experts), int(fill))) for fill in problem.fill_R]
    for sets in itertools.product(*choices):
        if len(set(itertools.chain(*sets))) == problem.num_experts:
            yield [expert for held in sets for expert in held]


SMALL = [
    (2, 3, 4, {}),
    (3, 2, 5, {}),
    (2, [3, 2], 4, {}),
    (4, 2, 5, {"ranks_per_node": 2}),
    (4, 1, 4, {"ranks_per_node": 1, "ranks_per_rack": 2}),
    (4, 2, 4, {"ranks_per_node": 1, "ranks_per_rack": 2, "rack_weight": 3.0}),
    (4, 2, 8, {"ranks_per_node": 1, "ranks_per_rack": 2, "node_weight": 0.5}),
]


@pytest.mark.parametrize(("ranks", "slots", "experts", "places"), SMALL)
@pytest.mark.parametrize("valid", [False, True])
def test_no_placement_of_a_small_problem_beats_the_bound_and_few_the_search(
    ranks: int, slots: int | list[int], experts: int, places: dict[str, Any], valid: bool
) -> None:
    problem = problem_of(routed(41, experts, 3, valid=valid), ranks, slots, **places)
    result: Any = solve(problem)
    costs = [recount(problem, [row]) for row in every_table(problem)]
    least = min(costs)
    bound = result.cost_bound if isinstance(result, ObjectiveResult) else result.cost * (1 - result.gap)
    assert result.cost == pytest.approx(recount(problem, result.slot_to_expert_LS.tolist()))
    assert bound <= least * (1 + 1e-9) and least <= result.cost * (1 + 1e-9)
    # within a quarter of the way from the best to the average placement
    assert result.cost <= least + 0.25 * (np.mean(costs) - least)


def test_a_choice_goes_to_the_nearest_copy_and_equal_ones_take_turns() -> None:
    # expert 0 on ranks 0, 2, 4; ranks in pairs are nodes, all tokens choose expert 0: home 0, 2 and 4 stay, 1, 3, 5 stay in their node, 6 and 7 leave it
    routes = TokenRoutes(
        experts_TLK=np.zeros((8, 1, 1), dtype=np.uint8), request_T=np.arange(8, dtype=np.uint64), home_T=np.zeros(8, dtype=np.int64), num_experts=2
    )
    rank_S = np.arange(8)
    table = np.array([[0, 1, 0, 1, 0, 1, 1, 1]])
    assert remote_L(routes, table, rank_S, 8, [(1, 1.0)]).tolist() == [5.0]
    assert remote_L(routes, table, rank_S, 8, [(1, 1.0), (2, 10.0)]).tolist() == [5.0 + 20.0]
    # racks of four: 6 and 7 find the copy on rank 4 in their own rack, and with rank 4 empty none
    assert remote_L(routes, table, rank_S, 8, [(1, 1.0), (2, 10.0), (4, 100.0)]).tolist() == [25.0]
    table[0, 4] = 1
    assert remote_L(routes, table, rank_S, 8, [(1, 1.0), (2, 10.0), (4, 100.0)]).tolist() == [6.0 + 40.0 + 400.0]


@pytest.mark.parametrize("valid", [False, True])
@pytest.mark.parametrize("places", [{}, {"ranks_per_node": 2}, {"ranks_per_node": 2, "ranks_per_rack": 4, "node_weight": 0.0}])
def test_two_counts_of_traffic_with_copies_agree(valid: bool, places: dict[str, Any]) -> None:
    problem = problem_of(routed(203, 16, 4, layers=2, valid=valid), 8, 3, **places)
    assert default_solver(problem) == "descent"
    for solver in ("linear", "random"):
        result: Any = solve(problem, solver)
        routes = problem.objective.routes
        assert routes is not None
        cost = remote_L(routes, result.slot_to_expert_LS, problem.slot_rank_S, 8, problem.levels).sum() / (len(routes) * 2)
        assert cost == pytest.approx(recount(problem, result.slot_to_expert_LS.tolist()), rel=1e-12)
        assert (remote_bound_L(routes, 3, 8, problem.levels).sum() / (len(routes) * 2)) <= cost


def test_an_expert_on_every_rank_costs_nothing() -> None:
    problem = problem_of(routed(64, 6, 3), 3, 6)
    result: Any = solve(problem)
    assert result.cost == 0.0 and result.value == 1.0 and result.status == "OPTIMAL"


def test_where_nothing_is_proven_the_gap_says_so() -> None:
    # one choice a token, ranks that could hold all experts but one
    problem = problem_of(routed(64, 6, 1, topics=1), 3, 5)
    result: Any = solve(problem)
    assert 0 < result.cost_bound <= result.cost and result.status != "OPTIMAL" or result.gap == 0


def test_copies_save_traffic_and_more_copies_more() -> None:
    routes, costs = routed(400, 32, 4, topics=4, layers=2), []
    for slots in (9, 10, 12, 16):
        problem = problem_of(routes, 4, slots, ranks_per_node=2)
        result: Any = solve(problem)
        plain = solve(replace(problem, objective=Objective())).slot_to_expert_LS.tolist()
        assert result.cost < recount(problem, plain)
        costs.append(result.cost)
    assert costs == sorted(costs, reverse=True)


def test_filling_touches_no_slot_of_an_only_copy_and_leaves_no_expert_twice_on_a_rank() -> None:
    routes = routed(100, 8, 3)
    rank_S = np.repeat(np.arange(4), 4)
    for late in (False, True):
        table = np.full((1, 16), -1)
        table[0, ::4], table[0, 1::4] = np.arange(4), np.arange(4, 8)
        fixed = table.copy()
        made, cut = fill_copies(routes, table, rank_S, 4, [(1, 1.0)], (lambda: -1.0) if late else None)
        assert cut == late and (made == 0) == late
        assert late or sorted(np.unique(table).tolist()) == list(range(8))
        assert all(len(set(row)) == 4 for row in table.reshape(4, 4).tolist())
        if late:
            assert np.array_equal(table[fixed >= 0], fixed[fixed >= 0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("ranks", "width"), [(2, 4), (4, 4), (4, 6)])
def test_the_bound_of_distinct_places_holds_for_random_placements_and_beats_pairs_alone(seed: int, ranks: int, width: int) -> None:
    routes = routed(300, 16, width, topics=4, seed=seed, layers=2)
    bound = distinct_bound_L(routes, coactivation_LEE(routes), ranks)
    generator = np.random.Generator(np.random.PCG64(seed))
    for _ in range(50):
        group = np.stack([generator.permutation(16) % ranks for _ in range(2)])
        assert (bound <= distinct_L(routes, group) + 1e-9).all()
    best = solve_fanout(FanoutProblem(routes=routes, num_ranks=ranks))
    assert bound.sum() <= best.cost * len(routes) * 2 * (1 + 1e-9)


def test_three_stages_gather_what_belongs_to_a_rack() -> None:
    # topics of eight experts: two racks of two nodes of two ranks, two experts each; a topic is half a rack's ranks wide
    routes = routed(500, 16, 4, topics=2, layers=1, seed=3)
    flat = FanoutProblem(routes=routes, num_ranks=8, ranks_per_node=2, node_weight=1.0)
    racks = replace(flat, ranks_per_rack=4, rack_weight=5.0)
    first, second = solve_fanout(flat), solve_fanout(racks)
    assert second.metrics["racks_per_token"] < 1.1
    assert second.cost == pytest.approx(
        second.metrics["ranks_per_token"] + second.metrics["nodes_per_token"] + 5.0 * second.metrics["racks_per_token"], rel=1e-12
    )
    alone = replace(flat, ranks_per_rack=8)
    assert np.array_equal(solve_fanout(alone).slot_to_expert_LS, first.slot_to_expert_LS)


def test_racks_are_whole_nodes() -> None:
    with pytest.raises(InputError, match="multiple of the 2 ranks of a node"):
        problem_of(routed(10, 8, 2), 4, 2, ranks_per_node=2, ranks_per_rack=3)
    with pytest.raises(InputError, match="multiple of the 2 ranks of a node"):
        FanoutProblem(routes=routed(10, 12, 2), num_ranks=6, ranks_per_node=2, ranks_per_rack=3)
    with pytest.raises(InputError, match="one slot per expert"):
        problem_of(routed(10, 8, 2, layers=2), 4, 3, "hops")
    with pytest.raises(InputError, match="solver descent"):
        solve(problem_of(routed(10, 8, 2), 4, 3), "affinity")
