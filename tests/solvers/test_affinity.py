"""Inter-layer affinity: every method against brute force, exact programs and a simple assignment, on small problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import InfeasibleError, InputError
from moesim.solvers.affinity import chain_dp
from moesim.solvers.affinity.bounds import kept_bound_n
from moesim.solvers.affinity.descent import descend, forward, hop_cost
from moesim.solvers.affinity.problem import AffinityProblem, rank_load_LG
from moesim.solvers.affinity.result import HOPS, contiguous_LE, group_of
from moesim.solvers.affinity.solve import load_cap, solve_hops
from moesim.solvers.affinity.transport import transport_nE
from moesim.solvers.assignment import assign
from moesim.solvers.result import to_plan


def clustered(layers: int, experts: int, clusters: int, seed: int = 0, noise: int = 20) -> np.ndarray:
    """Return [L - 1, E, E] transitions that prefer the next layer's members of a hidden cluster."""
    generator = np.random.Generator(np.random.PCG64(seed))
    of = np.stack([generator.permutation(np.arange(experts) % clusters) for _ in range(layers)])
    same = of[:-1, :, None] == of[1:, None, :]
    return np.asarray(generator.integers(0, noise, same.shape) + same * generator.integers(noise, 3 * noise, same.shape), dtype=np.float64)


def problem(table: np.ndarray, ranks: int, **more: object) -> AffinityProblem:
    """Return a problem with the loads that the transitions imply."""
    load = np.concatenate((table.sum(axis=2), table[-1].sum(axis=0)[None]))
    return AffinityProblem(transitions_LEE=table, load_LE=load, num_ranks=ranks, **more)  # type: ignore[arg-type]


def brute_force(one: AffinityProblem) -> float:
    """Return the least hop cost over all placements within the cap."""
    states = [np.array(row) for row in set(itertools.permutations(np.repeat(np.arange(one.num_ranks), one.per_rank).tolist()))]
    _, cap = load_cap(one)
    allowed = []
    for layer in range(one.num_layers):
        peaks = [max(one.load_LE[layer][state == rank].sum() for rank in range(one.num_ranks)) for state in states]
        allowed.append([state for state, peak in zip(states, peaks, strict=True) if cap is None or peak <= cap[layer] * (1 + 1e-9)])
    return min(sum(_pair(one, layer, rows) for layer in range(one.num_layers - 1)) for rows in itertools.product(*allowed))


def _pair(one: AffinityProblem, layer: int, rows: tuple[np.ndarray, ...]) -> float:
    return float((one.transitions_LEE[layer] * one.hop_GG[rows[layer][:, None], rows[layer + 1][None, :]]).sum())


@pytest.mark.parametrize("slack", [None, 0.0, 0.1])
@pytest.mark.parametrize("seed", range(3))
def test_chain_program_equals_brute_force(seed: int, slack: float | None) -> None:
    one = problem(clustered(3, 4, 2, seed), 2, load_slack=slack)
    result = solve_hops(one, method="chain-dp")
    assert result.cost * one.total == pytest.approx(brute_force(one))
    assert result.status == "OPTIMAL" and result.gap == 0.0


@pytest.mark.parametrize("per_node", [0, 2])
def test_orbits_of_the_chain_program_lose_nothing(per_node: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = problem(clustered(4, 8, 4, 5), 4, ranks_per_node=per_node, node_weight=2.5)
    group, cost = chain_dp.solve_chain(one.transitions_LEE, one.hop_GG)
    monkeypatch.setattr(chain_dp, "symmetries", lambda hops: np.arange(len(hops))[None])
    assert cost == pytest.approx(chain_dp.solve_chain(one.transitions_LEE, one.hop_GG)[1])
    assert hop_cost(one.transitions_LEE, group, one.hop_GG) == pytest.approx(cost)


@pytest.mark.parametrize("seed", range(3))
def test_chain_hungarian_equals_brute_force(seed: int) -> None:
    one = problem(clustered(3, 4, 4, seed), 4)
    result = solve_hops(one)
    assert result.solver == "chain-hungarian" and result.status == "OPTIMAL"
    assert result.cost * one.total == pytest.approx(brute_force(one))


@pytest.mark.parametrize(("experts", "ranks"), [(12, 3), (24, 6), (40, 5), (16, 16), (7, 1)])
def test_transport_equals_assignment_with_duplicated_ranks(experts: int, ranks: int) -> None:
    generator = np.random.Generator(np.random.PCG64(experts))
    gain = generator.integers(0, 1000, (5, experts, ranks)).astype(np.float64)
    start = np.stack([generator.permutation(np.arange(experts) // (experts // ranks)) for _ in range(5)])
    group = transport_nE(gain, start)
    for layer in range(5):
        wide = np.repeat(-gain[layer], experts // ranks, axis=1)
        assert gain[layer][np.arange(experts), group[layer]].sum() == pytest.approx(-wide[np.arange(experts), assign(wide)].sum())
        assert (np.bincount(group[layer], minlength=ranks) == experts // ranks).all()


@pytest.mark.parametrize("per_node", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_descent_is_close_to_the_optimum(seed: int, per_node: int) -> None:
    one = problem(clustered(6, 8, 4, seed), 4, ranks_per_node=per_node)
    best, found = solve_hops(one, method="chain-dp"), solve_hops(one, method="descent", seed=seed)
    assert best.cost <= found.cost * (1 + 1e-12)
    assert found.cost <= best.cost * 1.04
    assert found.bound >= best.value - 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_descent_never_raises_the_cost(seed: int) -> None:
    one = problem(clustered(7, 24, 6, seed), 6, ranks_per_node=3)
    generator = np.random.Generator(np.random.PCG64(seed))
    start = np.stack([generator.permutation(row) for row in contiguous_LE(7, 24, 6)])
    cost = hop_cost(one.transitions_LEE, start, one.hop_GG)
    for sweeps in (1, 2, 50):
        group, _, _ = descend(one.transitions_LEE, start, one.hop_GG, sweeps=sweeps)
        now = hop_cost(one.transitions_LEE, group, one.hop_GG)
        assert now <= cost
        cost = now
    grown = forward(one.transitions_LEE, start[0], one.hop_GG)
    assert (np.sort(grown, axis=1) == np.arange(24) // 4).all()


def test_a_planted_chain_is_found_and_certified() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    of = np.stack([generator.permutation(np.arange(32) // 4) for _ in range(6)])
    one = problem((of[:-1, :, None] == of[1:, None, :]).astype(np.float64), 8)
    result = solve_hops(one, method="descent")
    assert result.cost == 0.0 and result.value == 1.0 and result.status == "OPTIMAL"


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bound_is_above_every_placement(ranks: int) -> None:
    table = clustered(2, 8, ranks, ranks)
    bound = float(kept_bound_n(table, ranks).sum())
    group, cost = chain_dp.solve_chain(table, 1.0 - np.eye(ranks)) if ranks < 8 else (contiguous_LE(2, 8, 8), 0.0)
    kept = table.sum() - hop_cost(table, group, 1.0 - np.eye(ranks))
    assert kept <= bound < table.sum()
    flat = np.ones((1, 8, 8))
    assert kept_bound_n(flat, ranks)[0] == pytest.approx(64 / ranks)


@pytest.mark.parametrize("method", ["descent", "chain-dp"])
@pytest.mark.parametrize("slack", [0.0, 0.02, 0.2])
def test_load_cap_is_never_exceeded(method: str, slack: float) -> None:
    one = problem(clustered(5, 8, 4, 9), 4, load_slack=slack)
    result = solve_hops(one, method=method)
    _, cap = load_cap(one)
    assert cap is not None
    assert (rank_load_LG(group_of(result, 4), one.load_LE, 4).max(axis=1) <= cap * (1 + 1e-8)).all()
    assert result.cost >= solve_hops(problem(clustered(5, 8, 4, 9), 4), method="chain-dp").cost - 1e-12


def test_more_slack_buys_fewer_hops() -> None:
    costs = [solve_hops(problem(clustered(5, 8, 4, 2), 4, load_slack=slack)).cost for slack in (0.0, 0.05, 0.5, None)]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]


def test_a_cap_below_every_placement_is_refused() -> None:
    with pytest.raises(InfeasibleError, match="load_slack"):
        chain_dp.solve_chain(clustered(2, 4, 2), 1.0 - np.eye(2), load_LE=np.ones((2, 4)), cap_L=np.full(2, 1.5))


@pytest.mark.parametrize("method", ["chain-dp", "descent"])
def test_names_of_experts_do_not_matter(method: str) -> None:
    table = clustered(5, 8, 4, 4)
    generator = np.random.Generator(np.random.PCG64(1))
    order = np.stack([generator.permutation(8) for _ in range(5)])
    renamed = np.stack([one[np.ix_(a, b)] for one, a, b in zip(table, order, order[1:], strict=False)])
    costs = [solve_hops(problem(one, 4), method=method).cost for one in (table, renamed)]
    assert costs[0] == pytest.approx(costs[1], rel=0 if method == "chain-dp" else 0.03, abs=1e-12)


def test_doubled_counts_change_nothing_but_the_scale() -> None:
    table = clustered(5, 16, 4, 4)
    one, two = (solve_hops(problem(table * scale, 4), method="descent") for scale in (1, 2))
    assert one.cost == pytest.approx(two.cost) and (one.slot_to_expert_LS == two.slot_to_expert_LS).all()


def test_nodes_are_spared_before_ranks() -> None:
    table = clustered(6, 32, 2, 11, noise=10)
    light, heavy = (solve_hops(problem(table, 8, ranks_per_node=4, node_weight=weight), method="descent") for weight in (0.0, 20.0))
    assert heavy.metrics["cross_node_fraction"] < light.metrics["cross_node_fraction"]


def test_clusters_by_load_lose_to_clusters_by_affinity() -> None:
    one = problem(clustered(6, 8, 4, 6), 4)
    contiguous, by_load, best = (solve_hops(one, method=method) for method in ("contiguous", "balance-then-label", "chain-dp"))
    assert best.cost < by_load.cost < contiguous.cost
    assert contiguous.status == by_load.status == "BASELINE"


def test_time_out_is_said_and_still_gives_a_placement() -> None:
    one = problem(clustered(6, 32, 4), 4)
    result = solve_hops(one, method="descent", deadline=lambda: 0.0)
    assert result.status == "TIME_LIMIT"
    assert (np.sort(result.slot_to_expert_LS, axis=1) == np.arange(32)).all()


def test_result_becomes_a_plan_that_names_its_objective() -> None:
    result = solve_hops(problem(clustered(4, 8, 4), 4))
    plan = to_plan(result, model="toy", num_experts=8, moe_layer_ids=range(4), num_ranks=4)
    assert plan.result["objective"] == HOPS and plan.result["status"] == "OPTIMAL"
    assert "context-coherent" in result.applies_to


def test_same_seed_same_answer() -> None:
    one = problem(clustered(5, 16, 4, 8), 4)
    first, again = (solve_hops(one, method="descent", seed=3) for _ in range(2))
    assert first.slot_to_expert_LS.tobytes() == again.slot_to_expert_LS.tobytes()


@pytest.mark.parametrize(
    ("key", "call"),
    [
        ("num_ranks", lambda: problem(clustered(3, 8, 2), 3)),
        ("ranks_per_node", lambda: problem(clustered(3, 8, 2), 4, ranks_per_node=3)),
        ("node_weight", lambda: problem(clustered(3, 8, 2), 4, node_weight=-1.0)),
        ("load_slack", lambda: problem(clustered(3, 8, 2), 4, load_slack=float("nan"))),
        ("transitions", lambda: problem(-clustered(3, 8, 2), 4)),
        ("shapes", lambda: AffinityProblem(transitions_LEE=np.ones((1, 4, 4)), load_LE=np.ones((1, 4)), num_ranks=2)),
        ("method", lambda: solve_hops(problem(clustered(3, 8, 2), 4), method="magic")),
        ("restarts", lambda: solve_hops(problem(clustered(3, 8, 2), 4), restarts=0)),
        ("chain-hungarian", lambda: solve_hops(problem(clustered(3, 8, 2), 4), method="chain-hungarian")),
        ("chain-dp", lambda: solve_hops(problem(clustered(3, 32, 2), 4), method="chain-dp")),
    ],
)
def test_bad_problems_are_refused_by_name(key: str, call: object) -> None:
    with pytest.raises(InputError, match=key):
        call()  # type: ignore[operator]
