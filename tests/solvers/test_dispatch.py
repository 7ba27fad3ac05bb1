"""Shares of a fixed placement: exact against enumerated rank sets, fast within its tolerance, local without losing balance."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, PlanError
from moesim.plan import Plan
from moesim.solvers.dispatch import (
    DispatchResult,
    Replicas,
    copies_of,
    dispatch_fast,
    dispatch_local,
    dispatch_lp,
    dual_bound_L,
    held_out,
    solve_dispatch,
    solve_equal,
    with_shares,
)
from moesim.solvers.dispatch_fast import TOLERANCE, solve_fast
from tests.solvers.instances import lognormal, zipf

Case = tuple[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray | None]
"""Loads, slots, ranks of slots, number of ranks, speeds."""


@st.composite
def cases(draw: st.DrawFn, windows: int = 0, nodes: bool = False) -> Case:
    """Draw small placements: any replicas, an expert twice on a rank, empty slots, ranks without slots, zero loads, unequal speeds."""
    experts, layers = draw(st.integers(1, 7)), draw(st.integers(1, 3))
    ranks = draw(st.sampled_from([2, 4])) if nodes else draw(st.integers(1, 5))
    extra = draw(st.integers(0, 8))
    table = []
    for _ in range(layers):
        row = [*range(experts), *(draw(st.integers(-1, experts - 1)) for _ in range(extra))]
        table.append(draw(st.permutations(row)))
    slot_rank = sorted(draw(st.lists(st.integers(0, ranks - 1), min_size=experts + extra, max_size=experts + extra)))
    count = max(windows, 1) * layers * experts
    values = draw(st.lists(st.one_of(st.just(0.0), st.integers(1, 50).map(float), st.floats(1e-9, 1e4)), min_size=count, max_size=count))
    load = np.array(values).reshape((windows, layers, experts) if windows else (layers, experts))
    speeds = draw(st.one_of(st.none(), st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=ranks, max_size=ranks)))
    return load, np.array(table), np.array(slot_rank), ranks, None if speeds is None else np.array(speeds)


def best_time_L(case: Case) -> list[float]:
    """Return the least slowest time of every layer: the set of ranks that must serve most per speed, over all sets."""
    load, table, slot_rank, ranks, speed_R = case
    speed = np.ones(ranks) if speed_R is None else speed_R
    result = []
    for row, weights in zip(table, load, strict=True):
        homes = [{int(rank) for rank, expert in zip(slot_rank, row, strict=True) if expert == one} for one in range(len(weights))]
        sets = [set(chosen) for size in range(1, ranks + 1) for chosen in itertools.combinations(range(ranks), size)]
        result.append(
            max(sum(float(w) for w, home in zip(weights, homes, strict=True) if home <= chosen) / sum(float(speed[r]) for r in chosen) for chosen in sets)
        )
    return result


def slowest_L(case: Case, share_LS: np.ndarray) -> list[float]:
    """Return the slowest time of every layer by plain loops."""
    load, table, slot_rank, ranks, speed_R = case
    result = []
    for row, weights, shares in zip(table, load, share_LS, strict=True):
        time = [0.0] * ranks
        for rank, expert, share in zip(slot_rank, row, shares, strict=True):
            if expert >= 0:
                time[rank] += float(weights[expert]) * float(share) / (1.0 if speed_R is None else float(speed_R[rank]))
        result.append(max(time))
    return result


def check_shares(case: Case, share_LS: np.ndarray) -> None:
    """Assert that shares are valid: 0 where empty, >= 0, 1 per expert."""
    load, table = case[:2]
    assert (share_LS >= 0).all() and (share_LS[table < 0] == 0).all()
    for row, shares in zip(table, share_LS, strict=True):
        for expert in range(load.shape[-1]):
            assert shares[row == expert].sum() == pytest.approx(1.0, abs=1e-9)


def running(layers: int = 4, experts: int = 32, ranks: int = 8, slots: int = 48, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return a placement with random replicas, [L, S] and [S]; no expert twice on a rank."""
    generator = np.random.Generator(np.random.PCG64(seed))
    table = np.empty((layers, slots), dtype=np.int64)
    for row in table:
        deal = generator.permutation(experts)
        extra = slots // ranks - experts // ranks
        for rank in range(ranks):
            own = deal[rank::ranks]
            others = np.setdiff1d(np.arange(experts), own)
            row[rank * (slots // ranks) : (rank + 1) * (slots // ranks)] = np.concatenate([own, generator.choice(others, extra, replace=False)])
    return table, np.repeat(np.arange(ranks), slots // ranks)


# --- exact ------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(cases())
def test_lp_reaches_the_best_over_all_sets_of_ranks_and_proves_it(case: Case) -> None:
    result = dispatch_lp(*case)
    check_shares(case, result.share_LS)
    best = best_time_L(case)
    np.testing.assert_allclose(result.time_L, best, rtol=1e-6)
    np.testing.assert_allclose(result.bound_L, best, rtol=1e-6)
    np.testing.assert_allclose(slowest_L(case, result.share_LS), result.time_L, rtol=1e-9)
    assert result.status == "OPTIMAL" and 0 <= result.gap <= 1e-6


def test_two_ranks_that_share_one_expert_level_out() -> None:
    # expert 0 lives on both ranks, 1 on rank 0, 2 on rank 1: 10 tokens fill up 2 and 6 to 9 each
    result = dispatch_lp(np.array([[10.0, 2.0, 6.0]]), np.array([[0, 1, 0, 2]]), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(result.share_LS, [[0.7, 1.0, 0.3, 1.0]], atol=1e-9)
    assert result.value == pytest.approx(9.0)
    np.testing.assert_allclose(result.dual_KLR, [[[0.5, 0.5]]])


def test_an_expert_too_small_to_level_goes_to_the_emptier_rank() -> None:
    result = dispatch_lp(np.array([[3.0, 2.0, 8.0]]), np.array([[0, 1, 0, 2]]), np.array([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(result.share_LS, [[1.0, 1.0, 0.0, 1.0]], atol=1e-7)
    assert result.value == pytest.approx(8.0) and result.bound == 8.0
    np.testing.assert_allclose(result.dual_KLR, [[[0.0, 1.0]]])


def test_a_rank_of_twice_the_speed_serves_twice_the_tokens() -> None:
    for solve in (dispatch_lp, dispatch_fast):
        result = solve(np.array([[9.0]]), np.array([[0, 0]]), np.array([0, 1]), 2, np.array([2.0, 1.0]))
        np.testing.assert_allclose(result.share_LS, [[2 / 3, 1 / 3]], atol=0.01)
        assert result.value == pytest.approx(3.0, rel=TOLERANCE)


def test_a_chain_of_experts_passes_load_along() -> None:
    # ranks in a line, expert i on ranks i and i + 1, all load on expert 0's end: the level reaches the far end
    ranks = 12
    table = np.array([[slot for i in range(ranks) for slot in (i, max(i - 1, 0))]])
    load = np.array([[100.0, *[10.0] * (ranks - 1)]])
    table[0, 1] = -1
    for result in (dispatch_lp(load, table, np.repeat(np.arange(ranks), 2), ranks), dispatch_fast(load, table, np.repeat(np.arange(ranks), 2), ranks)):
        assert result.value == pytest.approx(50.0, rel=TOLERANCE)
        assert result.bound == pytest.approx(50.0, rel=1e-9)


def test_where_the_equal_split_is_among_the_best_it_stays() -> None:
    table, slot_rank = np.array([[0, 1, 0, 1, 2, 3]]), np.array([0, 0, 1, 1, 2, 2])
    result = dispatch_lp(np.array([[4.0, 6.0, 1.0, 1.0]]), table, slot_rank, 3)
    np.testing.assert_allclose(result.share_LS, [[0.5, 0.5, 0.5, 0.5, 1.0, 1.0]], atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(cases())
def test_the_gentle_split_is_as_good_and_moves_no_more_tokens(case: Case) -> None:
    load, table, slot_rank, ranks, speed = case
    equal = solve_equal(Replicas.of(table, slot_rank, ranks, load.shape[1], speed), load).share_LS
    gentle, corner = (dispatch_lp(*case, gentle=one) for one in (True, False))
    np.testing.assert_allclose(gentle.time_L, corner.time_L, rtol=1e-6)
    moved = [(np.take_along_axis(load, np.maximum(table, 0), axis=1) * np.abs(one.share_LS - equal)).sum() for one in (gentle, corner)]
    assert moved[0] <= moved[1] + 1e-6 * load.sum()


@settings(max_examples=30, deadline=None)
@given(cases(windows=3))
def test_one_split_for_several_windows_is_proven_and_no_worse_than_any_single_window_split(case: Case) -> None:
    load, table, slot_rank, ranks, speed = case
    result = dispatch_lp(*case)
    check_shares(case, result.share_LS)
    assert result.status == "OPTIMAL"
    replicas = Replicas.of(table, slot_rank, ranks, load.shape[2], speed)
    np.testing.assert_allclose(dual_bound_L(replicas, load, result.dual_KLR), result.bound_L, rtol=1e-6, atol=1e-12)
    totals = load.sum(axis=(1, 2))
    if (totals == 0).any():
        return
    for split in (dispatch_lp(load[0], table, slot_rank, ranks, speed), solve_equal(replicas, load[1])):
        other = sum(totals.mean() / total * sum(slowest_L((window, *case[1:]), split.share_LS)) for window, total in zip(load, totals, strict=True)) / 3
        assert result.value <= other * (1 + 1e-6)


# --- the certificate --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_no_certificate_whatsoever_bounds_more_than_the_optimum(case: Case, random: object) -> None:
    load, table, slot_rank, ranks, speed = case
    replicas = Replicas.of(table, slot_rank, ranks, load.shape[1], speed)
    generator = np.random.Generator(np.random.PCG64(int(random.random() * 2**32)))  # type: ignore[attr-defined]
    dual = generator.exponential(size=(1, len(load), ranks))
    dual /= (dual @ replicas.speed_R)[..., None]
    assert (dual_bound_L(replicas, load[None], dual) <= np.array(best_time_L(case)) * (1 + 1e-9)).all()


def test_the_certificate_names_the_ranks_that_hold_the_layer_up() -> None:
    # experts 0 and 1 live on ranks 0 and 1 only
    table, ranks = np.array([[0, 1, 0, 1, 2, 3]]), np.array([0, 0, 1, 1, 2, 2])
    for solve in (dispatch_lp, dispatch_fast):
        dual = solve(np.array([[7.0, 5.0, 1.0, 1.0]]), table, ranks, 3).dual_KLR
        np.testing.assert_allclose(dual, [[[0.5, 0.5, 0.0]]])


# --- fast -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(cases())
def test_fast_is_within_its_tolerance_of_the_optimum_in_every_layer(case: Case) -> None:
    result = dispatch_fast(*case)
    check_shares(case, result.share_LS)
    best = np.array(best_time_L(case))
    assert (result.time_L >= best * (1 - 1e-9)).all()
    assert (result.time_L <= best * (1 + 1.01 * TOLERANCE)).all()
    assert (result.bound_L <= best * (1 + 1e-9)).all()
    np.testing.assert_allclose(slowest_L(case, result.share_LS), result.time_L, rtol=1e-9)


@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
def test_fast_comes_as_close_as_asked(tolerance: float) -> None:
    table, slot_rank = running(layers=6, experts=64, ranks=16, slots=96)
    load = lognormal(6, 64, seed=3)
    exact, fast = dispatch_lp(load, table, slot_rank, 16), dispatch_fast(load, table, slot_rank, 16, tolerance=tolerance)
    assert 1 - 1e-9 <= fast.value / exact.value <= 1 + tolerance
    assert fast.gap <= tolerance


def test_layers_solved_in_blocks_come_out_as_if_solved_together(monkeypatch: pytest.MonkeyPatch) -> None:
    table, slot_rank = running()
    load = zipf(4, 32, 1.0)
    together = dispatch_fast(load, table, slot_rank, 8)
    monkeypatch.setattr("moesim.solvers.dispatch_fast.CHUNK_CELLS", 300)
    apart = dispatch_fast(load, table, slot_rank, 8)
    np.testing.assert_allclose(apart.share_LS, together.share_LS, atol=1e-6)


def test_more_ranks_than_replicated_experts_take_the_other_system() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    load = generator.lognormal(0, 1.5, (5, 24))
    table = np.array([[*range(24), *generator.choice(24, 8, replace=False)] for _ in range(5)])
    case: Case = (load, table, np.arange(32), 32, None)
    exact, fast = dispatch_lp(*case), dispatch_fast(*case)
    assert 1 - 1e-9 <= fast.value / exact.value <= 1 + TOLERANCE


# --- both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lp", "fast", "equal"])
def test_a_uniform_load_without_replicas_is_served_as_it_lies(method: str) -> None:
    plan = plan_of(np.tile(np.arange(8), (2, 1)), np.repeat(np.arange(4), 2), 4)
    result = solve_dispatch(plan, np.full((2, 8), 5.0), method)
    assert (result.share_LS == 1.0).all()
    assert result.value == result.bound == 20.0 and result.balance == 1.0


@pytest.mark.parametrize("method", ["lp", "fast"])
def test_experts_without_load_are_split_equally(method: str) -> None:
    plan = plan_of(np.array([[0, 1, 0, 1], [0, 1, 0, 1]]), np.array([0, 0, 1, 1]), 2)
    result = solve_dispatch(plan, np.array([[8.0, 0.0], [0.0, 0.0]]), method)
    np.testing.assert_allclose(result.share_LS[:, [1, 3]], 0.5)
    assert (result.share_LS[1] == 0.5).all() and result.time_L[1] == 0.0


@pytest.mark.parametrize("method", ["lp", "fast"])
def test_slots_of_an_expert_on_one_rank_serve_alike(method: str) -> None:
    plan = plan_of(np.array([[0, 0, 0, 1]]), np.array([0, 0, 1, 1]), 2)
    share = solve_dispatch(plan, np.array([[10.0, 4.0]]), method).share_LS
    assert share[0, 0] == share[0, 1]
    np.testing.assert_allclose(share, [[0.35, 0.35, 0.3, 1.0]], atol=0.01)


@pytest.mark.parametrize("solve", [dispatch_lp, dispatch_fast])
def test_renaming_experts_leaves_the_value_unchanged(solve: object) -> None:
    table, slot_rank = running(seed=4)
    load = lognormal(4, 32, seed=5)
    order = np.random.Generator(np.random.PCG64(2)).permutation(32)
    renamed = np.argsort(order)[table]
    one, two = (solve(*each, slot_rank, 8) for each in ((load, table), (load[:, order], renamed)))  # type: ignore[operator]
    np.testing.assert_allclose(one.time_L, two.time_L, rtol=1e-6)
    np.testing.assert_allclose(one.bound_L, two.bound_L, rtol=1e-9)


@pytest.mark.parametrize("solve", [dispatch_lp, dispatch_fast])
def test_the_unit_of_the_load_does_not_matter(solve: object) -> None:
    table, slot_rank = running(seed=6)
    load = lognormal(4, 32, seed=7)
    one, large, small = (solve(load * unit, table, slot_rank, 8) for unit in (1.0, 2.0**300, 2.0**-300))  # type: ignore[operator]
    np.testing.assert_allclose(one.share_LS, large.share_LS, atol=1e-9)
    np.testing.assert_allclose(one.share_LS, small.share_LS, atol=1e-9)


def test_the_same_input_gives_the_same_bytes() -> None:
    table, slot_rank = running(seed=8)
    load = zipf(4, 32, 0.9)
    for solve in (dispatch_lp, dispatch_fast):
        assert solve(load, table, slot_rank, 8).share_LS.tobytes() == solve(load, table, slot_rank, 8).share_LS.tobytes()


# --- near the source --------------------------------------------------------------------------------------------


@st.composite
def sourced(draw: st.DrawFn) -> tuple[Case, np.ndarray]:
    """Draw a case and its loads by source rank."""
    load, table, slot_rank, ranks, speed = draw(cases(nodes=True))
    seed = draw(st.integers(0, 2**32))
    part = np.random.Generator(np.random.PCG64(seed)).dirichlet(np.full(ranks, 0.5), load.shape)
    by_source = np.ascontiguousarray((load[..., None] * np.where(part < 0.05, 0.0, part)).transpose(0, 2, 1))
    return (by_source.sum(axis=1), table, slot_rank, ranks, speed), by_source


@settings(max_examples=60, deadline=None)
@given(sourced(), st.sampled_from([0.0, 0.05]), st.sampled_from(["fast", "lp"]))
def test_near_shares_keep_balance_and_agree_with_their_sum(drawn: tuple[Case, np.ndarray], tolerance: float, method: str) -> None:
    case, load_LRE = drawn
    load, table, slot_rank, ranks, speed = case
    result = dispatch_local(load_LRE, table, slot_rank, ranks, speed, ranks_per_node=2, tolerance=tolerance, method=method)
    check_shares(case, result.dispatch.share_LS)
    assert (result.dispatch.time_L <= np.array(best_time_L(case)) * (1 + 1.01 * TOLERANCE) * (1 + tolerance) * (1 + 1e-6)).all()
    for rank in range(ranks):
        check_shares(case, result.source_share_LRS[:, rank])
    for node in range(ranks // 2):
        check_shares(case, result.node_share_LNS[:, node])
    for layer, row in enumerate(table):
        for slot, expert in enumerate(row):
            if expert >= 0 and load[layer, expert] > 1e-6 * load[layer].sum():
                served = (load_LRE[layer, :, expert] * result.source_share_LRS[layer, :, slot]).sum()
                assert served == pytest.approx(load[layer, expert] * result.dispatch.share_LS[layer, slot], rel=1e-6, abs=1e-6 * load[layer].sum())


@settings(max_examples=60, deadline=None)
@given(sourced())
def test_for_given_totals_nearest_first_is_the_best_transport(drawn: tuple[Case, np.ndarray]) -> None:
    # the program with the same totals cannot do better; with free totals it may, and the fast method never beats it
    case, load_LRE = drawn
    _, table, slot_rank, ranks, speed = case
    fast = dispatch_local(load_LRE, table, slot_rank, ranks, speed, ranks_per_node=2, tolerance=0.0)
    exact = dispatch_local(load_LRE, table, slot_rank, ranks, speed, ranks_per_node=2, tolerance=1.01 * TOLERANCE, node_cost=4.0, method="lp")
    cost = [one.remote + 3.0 * one.internode for one in (fast, exact)]
    assert cost[1] <= cost[0] + 1e-5 * fast.choices


def test_copies_are_counted_as_plain_loops_count_them() -> None:
    generator = np.random.Generator(np.random.PCG64(3))
    table, slot_rank = running(layers=2, experts=8, ranks=4, slots=12)
    load = generator.integers(0, 9, (2, 4, 8)).astype(float)
    split = dispatch_local(load, table, slot_rank, 4, ranks_per_node=2)
    for share, found in ((split.source_share_LRS, (split.remote, split.internode)), (None, (split.equal_remote, split.equal_internode))):
        remote = internode = 0.0
        for layer, source, slot in itertools.product(range(2), range(4), range(12)):
            expert, rank = table[layer, slot], slot_rank[slot]
            part = 1.0 / (table[layer] == expert).sum() if share is None else share[layer, source, slot]
            remote += part * load[layer, source, expert] * (rank != source)
            internode += part * load[layer, source, expert] * (rank // 2 != source // 2)
        assert found == pytest.approx((remote, internode))
    assert split.remote < split.equal_remote and split.internode < split.equal_internode


def test_an_expert_on_every_rank_under_even_load_never_leaves_home() -> None:
    load = np.full((1, 4, 2), 3.0)
    table, slot_rank = np.array([[0, 1] * 4]), np.repeat(np.arange(4), 2)
    result = dispatch_local(load, table, slot_rank, 4, ranks_per_node=2, tolerance=0.0)
    assert result.remote == pytest.approx(0.0, abs=1e-9) and result.equal_remote == pytest.approx(18.0)
    np.testing.assert_allclose(result.source_share_LRS[0, :, ::2], np.eye(4), atol=1e-9)


def test_the_whole_is_remote_where_the_only_slot_is_elsewhere() -> None:
    replicas = Replicas.of(np.array([[0]]), np.array([3]), 4, 1)
    assert copies_of(replicas, np.array([[[1.0], [2.0], [4.0], [8.0]]]), np.ones((1, 1)), ranks_per_node=2) == (7.0, 3.0)


# --- plans and drift --------------------------------------------------------------------------------------------


def plan_of(table: np.ndarray, slot_rank: np.ndarray, ranks: int) -> Plan:
    """Wrap a placement as a plan."""
    return Plan(
        model="m", num_experts=int(table.max()) + 1, moe_layer_ids=tuple(range(len(table))), slot_to_expert_LS=table, slot_rank_S=slot_rank, num_ranks=ranks
    )


def test_a_plan_takes_shares_and_keeps_its_placement() -> None:
    table, slot_rank = running()
    plan, load = plan_of(table, slot_rank, 8), lognormal(4, 32)
    result = solve_dispatch(plan, load)
    other = with_shares(plan, result.share_LS, result)
    assert other.map_sha256 == plan.map_sha256 and other.sha256 != plan.sha256
    np.testing.assert_allclose(other.rank_load_LR(load).max(axis=1), result.time_L, rtol=1e-9)
    assert other.result["dispatch"]["status"] == "OPTIMAL"
    assert with_shares(other, None).sha256 == plan.sha256
    with pytest.raises(PlanError, match="must sum to 1"):
        with_shares(plan, np.zeros_like(result.share_LS))


def test_shares_are_scored_on_the_window_after_the_one_they_were_found_on() -> None:
    table, slot_rank = running()
    load = np.stack([lognormal(4, 32, seed=0), lognormal(4, 32, seed=0), lognormal(4, 32, seed=1)])
    drift = held_out(load, table, slot_rank, 8)
    assert drift.held_out_W[0] == pytest.approx(drift.current_W[0], rel=1e-9)
    assert drift.held_out_W[1] < drift.current_W[1] and (drift.equal_W <= drift.current_W * (1 + 1e-9)).all()
    plan = with_shares(plan_of(table, slot_rank, 8), solve_dispatch(plan_of(table, slot_rank, 8), load[1]).share_LS)
    rank_load = plan.rank_load_LR(load[2])
    assert drift.held_out_W[1] == pytest.approx(rank_load.mean(axis=1).sum() / rank_load.max(axis=1).sum(), rel=1e-9)


# --- refusals ---------------------------------------------------------------------------------------------------

TABLE, RANKS, LOAD = np.array([[0, 1, 0]]), np.array([0, 0, 1]), np.array([[2.0, 1.0]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load": [[np.nan, 1.0]]}, r"load of window 0, layer 0, expert 0 = nan must be finite and >= 0"),
        ({"load": [[1.0, -1.0]]}, r"load of window 0, layer 0, expert 1 = -1.0 must be finite and >= 0"),
        ({"load": [1.0, 2.0]}, r"load shape"),
        ({"load": [[1.0, 1.0], [1.0, 1.0]]}, r"load shape"),
        ({"load": [[1e300, 1e300]]}, r"must be <= 1e200"),
        ({"load": [[1.0, 1.0, 1.0]]}, r"no slot for expert 2"),
        ({"slot_to_expert_LS": np.array([[0, 1, 2]])}, r"slot_to_expert = \[0, 2\] must be in 0..1"),
        ({"slot_rank_S": np.array([0, 0, 2])}, r"slot_rank = \[0, 2\] must be in 0..1"),
        ({"slot_rank_S": np.array([0, 0])}, r"one integer per slot"),
        ({"speed_R": np.array([1.0, 0.0])}, r"speed = \[1.0, 0.0\] must be 2 finite number\(s\) > 0"),
    ],
)
@pytest.mark.parametrize("solve", [dispatch_lp, dispatch_fast])
def test_bad_input_is_refused_by_name(solve: object, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve(**{"load": LOAD, "slot_to_expert_LS": TABLE, "slot_rank_S": RANKS, "num_ranks": 2, **change})  # type: ignore[operator]


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(InputError, match="windows = 2 must be 1 for the fast method"):
        dispatch_fast(np.stack([LOAD, LOAD]), TABLE, RANKS, 2)
    with pytest.raises(InputError, match="tolerance = 0.0"):
        dispatch_fast(LOAD, TABLE, RANKS, 2, tolerance=0.0)
    with pytest.raises(InputError, match="window_weight"):
        dispatch_lp(LOAD, TABLE, RANKS, 2, window_weight_K=np.array([-1.0]))
    with pytest.raises(InputError, match="method = 'magic' must be one of equal, fast, lp"):
        solve_dispatch(plan_of(TABLE, RANKS, 2), LOAD, "magic")
    with pytest.raises(InputError, match="windows = 1 must be >= 2"):
        held_out(LOAD[None], TABLE, RANKS, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_LRE": np.full((1, 2, 2), np.nan)}, "load of layer 0, source rank 0, expert 0 = nan"),
        ({"load_LRE": np.ones((1, 3, 2))}, "load by source, shape"),
        ({"ranks_per_node": 3}, "ranks_per_node = 3 must divide the 2 ranks"),
        ({"tolerance": -0.1}, "tolerance = -0.1 must be finite and >= 0"),
        ({"node_cost": 0.5}, "node_cost = 0.5 must be finite and >= 1"),
        ({"method": "magic"}, "method = 'magic' must be fast or lp"),
    ],
)
def test_bad_sources_are_refused_by_name(change: dict[str, object], message: str) -> None:
    common = {"load_LRE": np.ones((1, 2, 2)), "slot_to_expert_LS": TABLE, "slot_rank_S": RANKS, "num_ranks": 2, "ranks_per_node": 1}
    with pytest.raises(InputError, match=message):
        dispatch_local(**{**common, **change})  # type: ignore[arg-type]


def test_a_missing_solver_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(InputError, match=r'pip install "moesim\[solvers\]", or use the method fast'):
        dispatch_lp(LOAD, TABLE, RANKS, 2)
    assert isinstance(dispatch_fast(LOAD, TABLE, RANKS, 2), DispatchResult)


def test_replicas_are_built_once_and_serve_many_batches() -> None:
    table, slot_rank = running()
    replicas = Replicas.of(table, slot_rank, 8, 32)
    for seed in range(3):
        load = lognormal(4, 32, seed=seed)
        assert solve_fast(replicas, load).share_LS.tobytes() == dispatch_fast(load, table, slot_rank, 8).share_LS.tobytes()
