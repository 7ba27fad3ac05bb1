"""The published integer programs agree with the chain program on tiny cases, and never claim what they did not prove."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.solvers.affinity.oracles import solve_exflow_ilp, solve_moetuner_ilp, tail_of
from moesim.solvers.affinity.result import group_of
from moesim.solvers.affinity.solve import solve_hops
from moesim.solvers.affinity.transport import one_hot_nEG
from tests.solvers.test_affinity import clustered, problem

pytest.importorskip("pulp")
pytest.importorskip("highspy")


@pytest.mark.parametrize(("experts", "ranks", "layers"), [(4, 2, 3), (6, 3, 3)])
def test_exflow_program_agrees_with_the_chain_program(experts: int, ranks: int, layers: int) -> None:
    one = problem(clustered(layers, experts, ranks, 1), ranks)
    result = solve_exflow_ilp(one)
    assert result.status == "OPTIMAL"
    assert result.cost == pytest.approx(solve_hops(one, method="chain-dp").cost)


def test_a_program_stopped_early_is_not_optimal() -> None:
    one = problem(clustered(8, 16, 4, 2), 4)
    result = solve_exflow_ilp(one, seconds=0.5)
    assert result.status == "TIME_LIMIT" and result.gap > 0.01
    assert result.bound >= solve_hops(one, method="descent").value


def test_moetuner_clusters_balance_and_names_minimise_the_tail() -> None:
    one = problem(clustered(3, 6, 3, 3), 3)
    answer = solve_moetuner_ilp(one)
    assert answer.proven and answer.result.status in ("BASELINE", "OPTIMAL")
    deviation = 0.0
    for load in one.load_LE:
        states = set(itertools.permutations([0, 0, 1, 1, 2, 2]))
        deviation += min(sum(abs(load[np.array(row) == rank].sum() - load.sum() / 3) for rank in range(3)) for row in states)
    assert answer.load_deviation == pytest.approx(deviation)
    held = one_hot_nEG(group_of(answer.result, 3), 3)
    traffic = np.matmul(held[:-1].transpose(0, 2, 1), np.matmul(one.transitions_LEE, held[1:]))
    names = [np.array(row) for row in itertools.permutations(range(3))]
    best = min(tail_of(traffic, np.stack(rows)) for rows in itertools.product(names, repeat=3))
    assert answer.tail == pytest.approx(best)


def test_programs_refuse_what_they_do_not_state() -> None:
    with pytest.raises(InputError, match="exflow-ilp"):
        solve_exflow_ilp(problem(clustered(3, 8, 2), 4, ranks_per_node=2))
    with pytest.raises(InputError, match="variables"):
        solve_exflow_ilp(problem(clustered(58, 64, 2), 32))
