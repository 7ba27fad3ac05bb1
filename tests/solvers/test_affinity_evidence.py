"""Affinity on tokens: counts and scores against loops, nulls that keep loads, held-out honesty, co-activation placement."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moesim.errors import InputError, TraceError
from moesim.solvers.affinity.bounds import company_bound_n
from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
from moesim.solvers.affinity.null import shuffle_choices, shuffle_layers
from moesim.solvers.affinity.plan import plan_affinity
from moesim.solvers.affinity.problem import rank_load_LG
from moesim.solvers.affinity.result import FANOUT, HOPS, contiguous_LE, group_of
from moesim.solvers.affinity.routes import TokenRoutes, read_routes, split_routes
from moesim.solvers.affinity.scores import distinct_L, score_fanout, score_hops
from moesim.solvers.affinity.transitions import coactivation_LEE, count_transitions, loads_LE, stream_transitions
from moesim.traces.in_memory import from_batches
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import DUMMY, TraceShape
from tests.traces.helpers import batch, trace
from tests.traces.helpers import shape as toy_shape


def routes_of(spec: str, *, layers: int = 6, experts: int = 16, top_k: int = 2) -> TokenRoutes:
    """Return the tokens of a synthetic trace."""
    shape = TraceShape(model="toy", num_experts=experts, top_k=top_k, moe_layer_ids=tuple(range(layers)))
    return read_routes(open_trace(f"synthetic:{spec}", shape=shape))


def test_transitions_equal_a_loop_and_a_stream() -> None:
    of = trace(toy_shape(), 60, seed=2)
    routes = read_routes(of)
    for pairs, width in (("all", 2), ("top1", 1)):
        table = np.zeros((2, 16, 16))
        for token, layer, one, other in itertools.product(range(60), range(2), range(width), range(width)):
            table[layer, routes.experts_TLK[token, layer, one], routes.experts_TLK[token, layer + 1, other]] += 1
        np.testing.assert_array_equal(count_transitions(routes, pairs).transitions_LEE, table)
        np.testing.assert_array_equal(stream_transitions(of, pairs).transitions_LEE, table)
    assert count_transitions(routes).load_LE.sum() == 60 * 3 * 2 and count_transitions(routes).tokens == 60


def test_missing_choices_and_dummies_are_not_counted() -> None:
    of = toy_shape()
    valid = np.ones((20, 3, 2), dtype=bool)
    valid[:, 1, 1] = False
    phase = np.zeros(20, dtype=np.uint8)
    phase[15:] = DUMMY
    routes = read_routes(from_batches(of, [batch(of, 20, valid_TLK=valid, phase_T=phase)], source="toy"))
    assert len(routes) == 15
    assert count_transitions(routes).transitions_LEE.sum(axis=(1, 2)).tolist() == [30, 30]
    assert coactivation_LEE(routes).sum(axis=(1, 2)).tolist() == [30, 0, 30]
    assert distinct_L(routes, np.arange(16)[None].repeat(3, axis=0)).tolist() == [30, 15, 30]


def test_coactivation_and_distinct_ranks_equal_loops() -> None:
    routes = read_routes(trace(toy_shape(top_k=4), 50, seed=3))
    company = np.zeros((3, 16, 16))
    group = contiguous_LE(3, 16, 4)
    reached = np.zeros(3)
    for token, layer in itertools.product(range(50), range(3)):
        chosen = routes.experts_TLK[token, layer].tolist()
        for one, other in itertools.permutations(chosen, 2):
            company[layer, one, other] += 1
        reached[layer] += len({group[layer, expert] for expert in chosen})
    np.testing.assert_array_equal(coactivation_LEE(routes), company)
    np.testing.assert_array_equal(distinct_L(routes, group), reached)
    score = score_fanout(routes, group, num_ranks=4, ranks_per_node=2, node_weight=3.0)
    assert score.ranks == pytest.approx(reached.sum() / 150) and score.remote_ranks == pytest.approx(score.ranks * 0.75)
    assert score.cost == pytest.approx(score.ranks + 3 * score.nodes)


def test_more_ranks_than_bits_of_a_word_are_counted() -> None:
    routes = routes_of("zipf:0.5,tokens=200", layers=2, experts=130, top_k=6)
    assert distinct_L(routes, np.tile(np.arange(130), (2, 1))).tolist() == [1200, 1200]


def test_thinning_covers_the_whole_trace() -> None:
    of = toy_shape()
    whole = from_batches(of, [batch(of, 40, seed=one, step=one) for one in range(5)], source="toy")
    kept = read_routes(whole, max_tokens=50)
    assert len(kept) == 50
    np.testing.assert_array_equal(kept.experts_TLK, read_routes(whole).experts_TLK[::4])


def test_split_keeps_requests_whole_and_loses_no_token() -> None:
    routes = read_routes(trace(toy_shape(), 80, requests=8))
    one, other = split_routes(routes, seed=5)
    assert not set(one.request_T.tolist()) & set(other.request_T.tolist()) and len(one) + len(other) == 80
    with pytest.raises(InputError, match="requests to split"):
        split_routes(read_routes(trace(toy_shape(), 10, requests=1)))


def test_nulls_keep_every_load_and_break_what_they_should() -> None:
    routes = routes_of("topics:4,tokens=3000")
    layers, choices = shuffle_layers(routes), shuffle_choices(routes)
    np.testing.assert_array_equal(loads_LE(layers), loads_LE(routes))
    np.testing.assert_array_equal(loads_LE(choices), loads_LE(routes))
    np.testing.assert_array_equal(coactivation_LEE(layers), coactivation_LEE(routes))
    assert (choices.experts_TLK[:, :, 0] != choices.experts_TLK[:, :, 1]).all()
    table, null = count_transitions(routes).transitions_LEE, count_transitions(layers).transitions_LEE
    load = loads_LE(routes)
    expected = load[:-1, :, None] * load[1:, None, :] / len(routes)
    assert np.abs(null - expected).sum() < 0.4 * np.abs(table - expected).sum()
    assert np.abs(coactivation_LEE(choices) - coactivation_LEE(routes)).sum() > 0.1 * coactivation_LEE(routes).sum()


@pytest.mark.parametrize("objective", [HOPS, FANOUT])
def test_gain_holds_on_unseen_tokens_and_dies_on_the_null(objective: str) -> None:
    routes = routes_of("topics:8,tokens=6000,skew=1.5", experts=32, top_k=4)
    plan = plan_affinity(routes, num_ranks=4, objective=objective, load_slack=0.1, split_by="token")
    evidence = plan.evidence
    assert evidence.gain_held_out > 0.03
    assert evidence.gain_held_out < evidence.gain_in_sample
    assert abs(evidence.gain_null) < 0.15 * evidence.gain_held_out
    assert evidence.gain_from_affinity == pytest.approx(evidence.gain_held_out - evidence.gain_null)
    assert plan.result.objective == evidence.objective == objective and plan.result.applies_to == evidence.applies_to
    assert [row["placement"] for row in evidence.rows()] == ["contiguous", "plan", "gain"]
    assert plan.result.cost == pytest.approx(evidence.plan.in_sample)


@pytest.mark.parametrize("objective", [HOPS, FANOUT])
def test_independent_choices_give_no_gain(objective: str) -> None:
    routes = routes_of("balanced,tokens=8000")
    evidence = plan_affinity(routes, num_ranks=4, objective=objective, split_by="token").evidence
    assert evidence.gain_in_sample > 0
    assert abs(evidence.gain_held_out) < 0.006 * evidence.contiguous.held_out


def test_skew_without_affinity_shows_up_in_the_null() -> None:
    routes = routes_of("zipf:1.0,tokens=8000")
    evidence = plan_affinity(routes, num_ranks=4, split_by="token").evidence
    assert evidence.gain_held_out > 0.02 and abs(evidence.gain_from_affinity) < 0.1 * evidence.gain_held_out


def test_too_few_tokens_over_fit() -> None:
    routes = routes_of("topics:8,tokens=6000", experts=32, top_k=4)
    few = routes.take(np.arange(0, 6000, 40))
    small, large = (plan_affinity(one, num_ranks=8, split_by="token").evidence for one in (few, routes))
    assert small.gain_in_sample - small.gain_held_out > 3 * (large.gain_in_sample - large.gain_held_out)


def test_shipped_trace_has_affinity_between_layers() -> None:
    evidence = plan_affinity(open_trace("flame-moe-290m"), num_ranks=8, load_slack=0.1).evidence
    assert evidence.gain_held_out > 0.05 and abs(evidence.gain_null) < 0.02


@pytest.mark.parametrize("seed", range(3))
def test_fanout_of_one_layer_equals_brute_force(seed: int) -> None:
    routes = routes_of(f"topics:3,tokens=400,seed={seed}", layers=1, experts=6)
    result = solve_fanout(FanoutProblem(routes=routes, num_ranks=2))
    states = {tuple(row) for row in itertools.permutations([0, 0, 0, 1, 1, 1])}
    best = min(int(distinct_L(routes, np.array(row)[None])[0]) for row in states)
    assert result.cost * 400 == pytest.approx(best)
    assert result.value <= result.bound


def test_fanout_bound_is_above_every_pair_count() -> None:
    company = coactivation_LEE(routes_of("topics:3,tokens=500", layers=1, experts=6, top_k=3))
    for parts in (2, 3, 6):
        kept = []
        for row in set(itertools.permutations(np.repeat(np.arange(parts), 6 // parts).tolist())):
            at = np.array(row)
            kept.append(float((company[0] * (at[:, None] == at)).sum()) / 2)
        assert max(kept) <= company_bound_n(company, parts)[0] * (1 + 1e-9) + 1e-9


def test_fanout_keeps_the_load_cap_and_spares_nodes() -> None:
    routes = routes_of("topics:6,tokens=3000", experts=32, top_k=4)
    tight = FanoutProblem(routes=routes, num_ranks=8, ranks_per_node=4, load_slack=0.05)
    result, loose, plain = solve_fanout(tight), solve_fanout(FanoutProblem(routes=routes, num_ranks=8, ranks_per_node=4)), None
    plain = solve_fanout(tight, method="contiguous")
    assert loose.cost < plain.cost and result.metrics["balance"] > loose.metrics["balance"]
    balanced = solve_fanout(FanoutProblem(routes=routes, num_ranks=8, load_slack=0.0))
    load = loads_LE(routes)
    peak = rank_load_LG(group_of(result, 8), load, 8).max(axis=1)
    assert (peak <= 1.0500001 * rank_load_LG(group_of(balanced, 8), load, 8).max(axis=1)).all()
    assert loose.metrics["nodes_per_token"] < plain.metrics["nodes_per_token"]


def test_one_choice_per_token_leaves_nothing_to_gain_within_a_layer() -> None:
    result = solve_fanout(FanoutProblem(routes=routes_of("zipf:1.0,tokens=300", top_k=1), num_ranks=4))
    assert result.cost == 1.0 and result.value == 0.0 and result.gap == 0.0


def test_hop_score_equals_a_loop() -> None:
    routes = read_routes(trace(toy_shape(), 30))
    group = contiguous_LE(3, 16, 4)
    crossed = [0, 0]
    for token, layer, one, other in itertools.product(range(30), range(2), range(2), range(2)):
        ends = group[layer, routes.experts_TLK[token, layer, one]], group[layer + 1, routes.experts_TLK[token, layer + 1, other]]
        crossed[0] += ends[0] != ends[1]
        crossed[1] += ends[0] // 2 != ends[1] // 2
    score = score_hops(count_transitions(routes).transitions_LEE, group, ranks_per_node=2, node_weight=4.0)
    assert (score.cross_rank, score.cross_node) == pytest.approx((crossed[0] / 240, crossed[1] / 240))
    assert score.cost == pytest.approx(score.cross_rank + 4 * score.cross_node)


def test_bad_requests_are_refused_by_name() -> None:
    routes = routes_of("balanced,tokens=64")
    for key, more in (("objective", {"objective": "speed"}), ("num_ranks", {"num_ranks": 3}), ("split", {"split_by": "day"}), ("pairs", {"pairs": "some"})):
        with pytest.raises(InputError, match=key):
            plan_affinity(routes, **{"num_ranks": 4, **more})  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="counts"):
        plan_affinity(open_trace("olmoe-1b-7b-counts"), num_ranks=4)
    with pytest.raises(InputError, match="MoE layers"):
        plan_affinity(routes_of("balanced,tokens=64", layers=1), num_ranks=4, split_by="token")
