"""Decode objectives: what they claim is what plain loops find, never worse than balance, and exact on easy cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.solvers.activation import activated_L, serve_once_LS
from moesim.solvers.affinity.routes import TokenRoutes
from moesim.solvers.objective import Decode, ExpertSeconds, Objective
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import recount
from moesim.solvers.registry import SOLVERS, default_solver, solve
from moesim.solvers.result import ObjectiveResult
from moesim.solvers.validate import CheckError, validate
from tests.solvers.instances import lognormal, problems, zipf

DECODE = Decode(tokens=64, top_k=4)


def problem_of(load: np.ndarray, **others: Any) -> PlacementProblem:
    return PlacementProblem(load_KLE=load, **{"num_ranks": 4, "slots_per_rank_R": np.array(10), **others})


def solve_for(
    problem: PlacementProblem, objective: str, decode: Decode, *, expert_seconds: ExpertSeconds | None = None, deadline: Any = None
) -> ObjectiveResult:
    wanted = Objective.parse(objective, decode=decode, expert_seconds=expert_seconds)
    result = solve(replace(problem, objective=wanted), "descent", deadline=deadline)
    assert isinstance(result, ObjectiveResult)
    return result


def cost_of(problem: PlacementProblem, table: np.ndarray, objective: str, decode: Decode) -> float:
    return recount(replace(problem, objective=Objective.parse(objective, decode=decode)), table.tolist())


def seconds(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Weights of likely active slots, and tokens beyond a few."""
    return np.asarray((np.minimum(tokens, 1.0) + 0.01 * tokens).sum(axis=2))


@settings(max_examples=12, deadline=None)
@given(problems(max_windows=2, faults=True), st.sampled_from(["activated", "balance+activated:0.3", "activated:0+balance", "balance"]), st.integers(1, 50))
def test_cost_is_what_plain_loops_find_and_no_less_than_the_bound(problem: PlacementProblem, objective: str, tokens: int) -> None:
    decode = Decode(tokens=tokens, top_k=1)
    result = solve_for(problem, objective, decode)
    assert result.cost == pytest.approx(cost_of(problem, result.slot_to_expert_LS, objective, decode), rel=1e-9, abs=1e-12)
    assert 0 <= result.cost_bound <= result.cost * (1 + 1e-9)
    assert result.value <= result.bound * (1 + 1e-9) <= 1 + 2e-9
    for other in ("greedy", "linear", "random"):
        table = solve(problem, other).slot_to_expert_LS
        assert result.cost_bound <= cost_of(problem, table, objective, decode) * (1 + 1e-9) + 1e-12
        if other == "greedy":
            assert result.cost <= cost_of(problem, table, objective, decode) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("load", [zipf(3, 32, 1.0), lognormal(3, 32)], ids=["zipf", "lognormal"])
def test_skewed_loads_activate_fewer_experts_than_under_balance(load: np.ndarray) -> None:
    problem = problem_of(load)
    balanced = cost_of(problem, solve(problem).slot_to_expert_LS, "activated", DECODE)
    result = solve_for(problem, "activated", DECODE)
    assert result.cost < 0.97 * balanced
    assert result.gap < 0.1


def test_one_token_activates_in_proportion_to_load() -> None:
    # n = 1: a = p, so balance and activation are the same thing
    problem = problem_of(lognormal(2, 32), slots_per_rank_R=np.array(8))
    result = solve_for(problem, "activated", Decode(tokens=1, top_k=1))
    assert result.value == pytest.approx(solve(problem).value, rel=2e-3)
    assert result.value >= solve(problem).value


def test_a_huge_batch_activates_every_slot() -> None:
    problem = problem_of(lognormal(2, 32) + 100, slots_per_rank_R=np.array(8))
    result = solve_for(problem, "activated", Decode(tokens=10**7, top_k=4))
    assert result.cost == pytest.approx(2 * 8)
    assert result.status == "OPTIMAL"


@pytest.mark.parametrize("objective", ["activated", "balance+activated:0.5", "latency"])
def test_uniform_loads_gain_nothing(objective: str) -> None:
    problem = problem_of(np.ones((2, 32)), slots_per_rank_R=np.array(8))
    result = solve_for(problem, objective, DECODE, expert_seconds=seconds)
    linear = solve(problem, "linear").slot_to_expert_LS
    if objective != "latency":
        assert result.cost == pytest.approx(cost_of(problem, linear, objective, DECODE), rel=1e-12)
    else:
        tokens = np.full((2, 4, 8), DECODE.tokens * DECODE.top_k / 32)
        assert result.cost == pytest.approx(float(seconds(tokens, tokens > 0).max(axis=1).sum()))


@pytest.mark.parametrize("objective", ["activated", "latency"])
def test_renaming_experts_leaves_the_cost_unchanged(objective: str) -> None:
    load = lognormal(2, 32)
    order = np.random.Generator(np.random.PCG64(2)).permutation(32)
    first, second = (solve_for(problem_of(one), objective, DECODE, expert_seconds=seconds).cost for one in (load, load[:, order]))
    assert first == pytest.approx(second, rel=2e-3)


def test_predicted_time_is_no_worse_than_that_of_the_balanced_plan_and_repeats() -> None:
    problem = problem_of(zipf(3, 32, 1.0))
    first, second = (solve_for(problem, "latency", DECODE, expert_seconds=seconds) for _ in range(2))
    assert first.slot_to_expert_LS.tobytes() == second.slot_to_expert_LS.tobytes()
    pick = DECODE.pick_KLE(problem.load_KLE)[0]

    def time_of(table: np.ndarray) -> float:
        copies = np.stack([np.bincount(row, minlength=32) for row in table])
        tokens = (np.take_along_axis(DECODE.tokens * pick / copies, table, axis=1)).reshape(3, 4, 10)
        return float(seconds(tokens, tokens > 0).max(axis=1).sum())

    assert first.cost == pytest.approx(time_of(first.slot_to_expert_LS))
    assert first.cost_bound <= first.cost < time_of(solve(problem).slot_to_expert_LS)


def test_weights_trade_balance_for_activation() -> None:
    problem = problem_of(zipf(3, 32, 1.0))
    costs = []
    for weight in (0.0, 0.5, 1.0):
        table = solve_for(problem, f"balance:{weight}+activated", DECODE).slot_to_expert_LS
        costs.append((cost_of(problem, table, "activated", DECODE), cost_of(problem, table, "balance", DECODE)))
    assert costs[0][0] <= costs[1][0] <= costs[2][0]
    assert costs[0][1] >= costs[1][1] >= costs[2][1]


def test_a_faster_rank_holds_more_activated_experts() -> None:
    problem = problem_of(np.ones((1, 12)), num_ranks=2, slots_per_rank_R=np.array([8, 4]), device_speed_R=np.array([2.0, 1.0]))
    assert solve_for(problem, "activated", DECODE).value == pytest.approx(1.0)


def test_one_serving_copy_activates_no_more_than_an_equal_split() -> None:
    problem = problem_of(zipf(3, 32, 1.0))
    table = solve(problem).slot_to_expert_LS
    share = serve_once_LS(problem, table, DECODE)
    assert set(np.unique(share)) == {0.0, 1.0}
    assert (share.sum(axis=1) == 32).all()
    copies = np.stack([np.bincount(row, minlength=32) for row in table])
    equal = activated_L(problem, table, 1 / np.take_along_axis(copies, table, axis=1), DECODE)
    assert equal.sum() == pytest.approx(cost_of(problem, table, "activated", DECODE))
    assert activated_L(problem, table, share, DECODE).sum() < 0.9 * equal.sum()


def test_time_that_runs_out_is_admitted() -> None:
    problem = problem_of(zipf(2, 32, 1.0))
    cut = solve_for(problem, "activated", DECODE, deadline=lambda: -1.0)
    assert cut.status == "TIME_LIMIT"
    assert cut.cost >= solve_for(problem, "activated", DECODE).cost


def test_a_running_plan_lends_its_names() -> None:
    problem = problem_of(zipf(2, 32, 1.0))
    first = solve_for(problem, "activated", DECODE)
    again = solve_for(replace(problem, previous=first.slot_to_expert_LS), "activated", DECODE)
    assert np.array_equal(first.slot_to_expert_LS, again.slot_to_expert_LS)


WRONG = ["activate", "balance+activated:2", "balance+activated:x", "balance+balance", "balance:0.7+activated:0.7", "balance+hops", "latency"]


@pytest.mark.parametrize("objective", WRONG)
def test_unknown_or_incomplete_objectives_are_refused(objective: str) -> None:
    with pytest.raises(InputError):
        solve_for(problem_of(np.ones((1, 8)), slots_per_rank_R=np.array(2)), objective, DECODE)
    with pytest.raises(InputError, match="must not fall"):
        solve_for(problem_of(zipf(1, 32, 1.0)), "latency", DECODE, expert_seconds=lambda tokens, mask: 9.0 / (1 + tokens.sum(axis=2)))
    with pytest.raises(InputError, match="top_k"):
        Decode(tokens=1, top_k=0)


def every_table(problem: PlacementProblem) -> Iterator[list[int]]:
    """Yield every placement of a single layer: every choice of experts on every rank that leaves none out."""
    choices = [list(itertools.combinations(range(problem.num_experts), int(fill))) for fill in problem.fill_R]
    for sets in itertools.product(*choices):
        if len(set(itertools.chain(*sets))) == problem.num_experts:
            yield [expert for held in sets for expert in held]


@pytest.mark.parametrize("slots", [[3, 3], [4, 3], [2, 2, 2], [3, 2, 2]])
@pytest.mark.parametrize("text", ["activated", "balance+activated:0.4", "latency"])
def test_no_placement_of_a_small_problem_beats_the_bound_and_few_the_search(slots: list[int], text: str) -> None:
    objective = Objective.parse(text, decode=Decode(tokens=8, top_k=2), expert_seconds=seconds)
    problem = PlacementProblem(load_KLE=lognormal(1, 6, seed=3, sigma=1.0), num_ranks=len(slots), slots_per_rank_R=np.array(slots), objective=objective)
    result = solve(problem)
    assert isinstance(result, ObjectiveResult)
    least = min(recount(problem, [row]) for row in every_table(problem))
    assert result.cost_bound <= least * (1 + 1e-9) and least <= result.cost * (1 + 1e-9)
    assert result.cost <= 1.03 * least


@pytest.mark.parametrize("solver", ["milp", "cp-sat"])
def test_exact_solvers_find_the_fewest_activations(solver: str) -> None:
    objective = Objective.parse("activated", decode=Decode(tokens=8, top_k=2))
    for seed, slots in ((1, [3, 3, 2]), (2, [4, 4]), (3, [3, 3, 3])):
        problem = PlacementProblem(load_KLE=lognormal(1, 6, seed=seed, sigma=1.2), num_ranks=len(slots), slots_per_rank_R=np.array(slots), objective=objective)
        result = solve(problem, solver)
        assert isinstance(result, ObjectiveResult) and result.status == "OPTIMAL"
        assert result.cost == pytest.approx(min(recount(problem, [row]) for row in every_table(problem)), rel=1e-6)
        assert result.cost <= solve_for(problem, "activated", Decode(tokens=8, top_k=2)).cost * (1 + 1e-9)


def routed(tokens: int = 400, experts: int = 16, layers: int = 2, width: int = 3, seed: int = 0) -> TokenRoutes:
    """Return tokens of one of four topics: choices mostly come from the topic's experts, which are spread over the ids."""
    generator = np.random.Generator(np.random.PCG64(seed))
    topic = generator.integers(0, 4, (tokens, 1, 1))
    score = generator.random((tokens, layers, experts)) + 0.7 * (np.arange(experts) % 4 == topic)
    chosen = np.argsort(-score, axis=2)[:, :, :width].astype(np.uint8)
    return TokenRoutes(experts_TLK=chosen, request_T=np.arange(tokens, dtype=np.uint64), home_T=np.zeros(tokens, dtype=np.int64), num_experts=experts)


def traffic_problem(text: str, ranks_per_node: int = 4, valid: bool = False) -> PlacementProblem:
    routes = routed()
    if valid:
        routes = routes.with_experts(routes.experts_TLK, np.arange(3)[None, None, :] < 1 + np.arange(400)[:, None, None] % 3 + np.zeros((1, 2, 1), dtype=int))
    load = np.stack([np.bincount(routes.experts_TLK[:, layer].ravel(), minlength=16) for layer in range(2)]).astype(float)
    objective = Objective.parse(text, routes=routes, decode=DECODE, expert_seconds=seconds)
    return PlacementProblem(load_KLE=load, num_ranks=4, slots_per_rank_R=np.array(4), ranks_per_node=ranks_per_node, objective=objective)


@pytest.mark.parametrize("text", ["traffic", "hops", "balance+traffic:0.5", "balance:0.2+latency:0.2+activated:0.1+traffic"])
@pytest.mark.parametrize("ranks_per_node", [2, 4])
@pytest.mark.parametrize("valid", [False, True])
def test_traffic_through_the_registry_is_recounted(text: str, ranks_per_node: int, valid: bool) -> None:
    problem = traffic_problem(text, ranks_per_node, valid)
    result: Any = solve(problem)
    assert default_solver(problem) == ("affinity" if text in ("traffic", "hops") else "descent")
    assert result.cost == pytest.approx(recount(problem, result.slot_to_expert_LS.tolist()))
    with pytest.raises(CheckError, match="cost"):
        validate(problem, replace(result, cost=result.cost * 1.01))
    if text != "hops":
        linear: Any = solve(problem, "linear")
        assert linear.status == "BASELINE" and result.cost < linear.cost


def test_weights_trade_balance_for_traffic() -> None:
    costs = []
    for weight in (0.0, 0.5, 1.0):
        rows = solve(traffic_problem(f"balance+traffic:{weight}")).slot_to_expert_LS.tolist()
        costs.append((recount(traffic_problem("balance"), rows), recount(traffic_problem("traffic"), rows)))
    assert costs[0][0] <= costs[1][0] <= costs[2][0] and costs[0][1] > costs[1][1] >= costs[2][1]


def test_hops_need_one_slot_per_expert_and_traffic_tokens_of_the_same_layers() -> None:
    with pytest.raises(InputError, match="one slot per expert"):
        replace(traffic_problem("hops"), slots_per_rank_R=np.array(5))
    with pytest.raises(InputError, match="routes"):
        replace(traffic_problem("traffic"), load_KLE=np.ones((3, 16)))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_every_solver_plans_for_an_objective_scores_it_or_refuses_it(solver: str) -> None:
    problem = replace(problem_of(zipf(1, 12, 1.0), slots_per_rank_R=np.array(4)), objective=Objective.parse("activated", decode=DECODE))
    if solver == "repair":
        with pytest.raises(InputError, match="--from PLAN"):
            solve(problem, solver)
        return
    if solver in ("greedy", "robust", "affinity"):
        with pytest.raises(InputError, match=r"does not plan for activated.*use the solver"):
            solve(problem, solver)
        return
    result = solve(problem, solver)
    assert isinstance(result, ObjectiveResult) and result.objective == "activated"


LIES: list[tuple[dict[str, Any], str]] = [
    ({"cost": 1.0}, "cost"),
    ({"cost_bound": 1e9}, "bound of the cost"),
    ({"bound": 0.99}, "bound"),
    ({"gap": 0.5}, "gap"),
]


@pytest.mark.parametrize(("change", "words"), LIES)
def test_a_lie_about_a_cost_is_refused(change: dict[str, Any], words: str) -> None:
    problem = replace(problem_of(zipf(2, 32, 1.0)), objective=Objective.parse("activated", decode=DECODE))
    with pytest.raises(CheckError, match=words):
        validate(problem, replace(solve(problem), **change))
