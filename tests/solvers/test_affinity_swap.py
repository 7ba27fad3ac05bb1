"""Swap search: at its end no swap helps by a plain count of every term, caps hold, and savings are counted exactly."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.solvers.affinity import capped, fanout
from moesim.solvers.affinity.capped import force_cap_LE
from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
from moesim.solvers.affinity.problem import balanced_group_LE
from moesim.solvers.affinity.result import contiguous_LE
from moesim.solvers.affinity.swap import SwapTerms, fits_n, swap_search_nE
from tests.solvers.test_affinity_evidence import routes_of

EXPERTS, RANKS = 12, 3


def terms(seed: int, *, penalty: bool) -> SwapTerms:
    """Return two layers of random gains, company and loads under a cap of 1.1 times the mean."""
    generator = np.random.Generator(np.random.PCG64(seed))
    company = generator.integers(0, 30, (2, EXPERTS, EXPERTS)).astype(np.float64)
    company += company.transpose(0, 2, 1)
    company[:, np.arange(EXPERTS), np.arange(EXPERTS)] = 0.0
    load = generator.integers(1, 20, (2, EXPERTS)).astype(np.float64)
    return SwapTerms(
        gain_nEG=generator.integers(-40, 40, (2, EXPERTS, RANKS)).astype(np.float64),
        company_nEE=company,
        load_nE=load,
        cap_n=load.sum(axis=1) / RANKS * 1.1,
        penalty_n=np.full(2, 7.0) if penalty else None,
    )


def cost(of: SwapTerms, layer: int, group: np.ndarray) -> float:
    """Return the objective of one layer, term by term; inf above a cap without penalty."""
    assert of.gain_nEG is not None and of.company_nEE is not None and of.load_nE is not None and of.cap_n is not None
    total = 0.0
    for expert, other in itertools.product(range(EXPERTS), repeat=2):
        if expert < other and group[expert] == group[other]:
            total -= of.company_nEE[layer, expert, other]
    total -= sum(of.gain_nEG[layer, expert, group[expert]] for expert in range(EXPERTS))
    for rank in range(RANKS):
        over = of.load_nE[layer][group == rank].sum() - of.cap_n[layer]
        if over > 1e-9:
            total += np.inf if of.penalty_n is None else of.penalty_n[layer] * over
    return float(total)


@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_no_swap_is_left_that_helps(seed: int, penalty: bool) -> None:
    of = terms(seed, penalty=penalty)
    assert of.load_nE is not None
    start = balanced_group_LE(of.load_nE, RANKS)
    group, rounds, cut = swap_search_nE(start, RANKS, of, max_rounds=200)
    assert rounds < 200 and not cut
    for layer in range(2):
        reached = cost(of, layer, group[layer])
        assert reached < cost(of, layer, start[layer])
        for one, other in itertools.combinations(range(EXPERTS), 2):
            trial = group[layer].copy()
            trial[one], trial[other] = trial[other], trial[one]
            assert cost(of, layer, trial) >= reached - 1e-6


@pytest.mark.parametrize("raises", [0, 12])
def test_a_layer_that_swaps_cannot_bring_under_the_cap_takes_its_balanced_placement(raises: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capped, "_RAISES", raises)
    of = terms(1, penalty=False)
    assert of.load_nE is not None and of.cap_n is not None
    balanced = balanced_group_LE(of.load_nE, RANKS)
    heavy_first = np.empty((2, EXPERTS), dtype=np.int64)
    np.put_along_axis(heavy_first, np.argsort(-of.load_nE, axis=1), np.tile(np.arange(EXPERTS) // (EXPERTS // RANKS), (2, 1)), axis=1)
    assert not fits_n(heavy_first, of.load_nE, of.cap_n, RANKS).any()
    group = force_cap_LE(heavy_first, RANKS, of, balanced)
    assert fits_n(group, of.load_nE, of.cap_n, RANKS).all()
    assert (group == balanced).all() == (raises == 0)


def test_swaps_by_saved_messages_beat_pairs_alone() -> None:
    problem = FanoutProblem(routes=routes_of("topics:6,tokens=3000", experts=32, top_k=8), num_ranks=8)
    pairs, saved = (solve_fanout(problem, rounds=rounds).cost for rounds in (0, 30))
    assert saved < pairs


@pytest.mark.parametrize("per_node", [0, 2])
def test_a_swap_saves_exactly_what_is_counted_for_it(per_node: int) -> None:
    routes = routes_of("topics:3,tokens=300", layers=1, experts=8, top_k=3)
    problem = FanoutProblem(routes=routes, num_ranks=4, ranks_per_node=per_node, node_weight=2.0)
    group = contiguous_LE(1, 8, 4)
    (gain,), (overlap,) = fanout._saved(problem, group, np.array([0]))
    now = fanout._cost_L(problem, group)[0]
    for one, other in itertools.combinations(range(8), 2):
        g, h = group[0, one], group[0, other]
        if g == h:
            continue
        trial = group.copy()
        trial[0, one], trial[0, other] = h, g
        counted = gain[one, h] + gain[other, g] - gain[one, g] - gain[other, h]
        saved = now - fanout._cost_L(problem, trial)[0]
        assert counted - 2 * overlap[one, other] == pytest.approx(saved)
