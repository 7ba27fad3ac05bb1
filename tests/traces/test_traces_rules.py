"""Routing rules against brute force and the closed forms of the papers; at its trivial value a rule leaves the trace as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.cli.main import main
from moesim.errors import InputError, TraceError
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import check_fits, open_trace
from moesim.traces.routing_trace import RoutingTrace, TokenBatch, TraceShape, concatenate
from moesim.traces.rules import rules_of
from moesim.traces.rules_view import Decision, RouterView, Tally, run
from moesim.traces.transform import apply_rules
from moesim.traces.writer import write_trace
from tests.traces.helpers import same_rows, shape


def router_trace(
    experts: int = 16,
    stored: int = 16,
    layers: int = 2,
    tokens: int = 60,
    steps: int = 1,
    seed: int = 0,
    skew: float = 1.0,
    requests: int = 4,
    order: np.ndarray | None = None,
    **more: Any,
) -> RoutingTrace:
    """Return a trace with softmax weights over all experts, the best `stored` of them kept; order: new id of every expert."""
    generator = np.random.Generator(np.random.PCG64(seed))
    logits = generator.gumbel(size=(tokens, layers, experts)) - skew * np.log1p(np.arange(experts))
    weights = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    best = np.argsort(-weights, axis=2, kind="stable")[..., :stored]
    of = TraceShape(model="toy", num_experts=experts, top_k=stored, moe_layer_ids=tuple(range(1, layers + 1)))
    columns: dict[str, Any] = {
        "step_T": (np.arange(tokens) * steps // tokens).astype(np.uint32),
        "rank_T": (np.arange(tokens) % 3).astype(np.uint16),
        "request_T": (np.arange(tokens) % requests).astype(np.uint64),
        "position_T": (np.arange(tokens) // requests).astype(np.uint32),
        "phase_T": np.zeros(tokens, dtype=np.uint8),
        "experts_TLK": (best if order is None else order[best]).astype(of.dtype),
        "weights_TLK": np.take_along_axis(weights, best, axis=2).astype(np.float32),
    }
    return from_batches(of, [TokenBatch(**(columns | more))], source="toy trace")


def rows(trace: RoutingTrace) -> TokenBatch:
    return concatenate(list(trace.batches()))


def chosen(trace: RoutingTrace) -> list[list[list[int]]]:
    """Return the valid choices of every token and layer, in order."""
    batch = rows(trace)
    valid = np.ones(batch.experts_TLK.shape, dtype=bool) if batch.valid_TLK is None else batch.valid_TLK
    return [
        [[int(e) for e, v in zip(*pair, strict=True) if v] for pair in zip(token, marks, strict=True)]
        for token, marks in zip(batch.experts_TLK, valid, strict=True)
    ]


def sets(trace: RoutingTrace) -> list[list[frozenset[int]]]:
    return [[frozenset(layer) for layer in token] for token in chosen(trace)]


def note_of(trace: RoutingTrace) -> str:
    return str(trace.provenance["notes"][-1])


FULL, FLAME = router_trace(), "flame-moe-290m"
TRIVIAL = [
    ("top_k:16", {}),
    ("top_p:1", {}),
    ("share:1", {}),
    ("grouped:1,16", {}),
    ("grouped:4,4", {}),
    ("top_groups:1,1,16", {}),
    ("top_groups:4,4,16,score=sum2", {}),
    ("mask:none", {}),
    ("mask:3@99,k=16", {}),
    ("null:0", {}),
    ("zero:none", {}),
    ("copy:none+constant:none", {}),
    ("capacity:inf", {}),
    ("capacity:inf,by=weight,per=rank", {}),
    ("capacity:1", {"stored": 16}),
    ("rounds:1", {}),
    ("one_decision", {"layers": 1}),
]


@pytest.mark.parametrize(("rule", "made"), TRIVIAL, ids=[rule for rule, _ in TRIVIAL])
def test_a_rule_at_its_trivial_value_leaves_the_trace_as_it_is(rule: str, made: dict[str, Any]) -> None:
    base = router_trace(**made)
    found = apply_rules(base, rule)
    same_rows(replace(found, tokens=from_batches(found.shape, [replace(rows(found), predicted_TLK=None)], source="x").tokens), base)
    assert found.shape.top_k == 16 and ", 0 dropped" in note_of(found)


COMMUTING = [
    "top_k:3",
    "top_p:0.6",
    "share:0.7",
    "capacity:1",
    "capacity:0.5,k=2",
    "capacity:0.6,by=weight",
    "capacity:1,per=rank",
    "one_decision:2",
    "mask:{3},k=4",
]


@pytest.mark.parametrize("rule", [*COMMUTING, "mask:{3},k=4"])
def test_renaming_experts_commutes_with_a_rule(rule: str) -> None:
    order = np.random.Generator(np.random.PCG64(9)).permutation(16)
    base, renamed = rule.format(*range(16)), rule.format(*order.tolist())
    wanted = [[frozenset(int(order[e]) for e in layer) for layer in token] for token in sets(apply_rules(router_trace(), base))]
    assert sets(apply_rules(router_trace(order=order), renamed)) == wanted


@given(seed=st.integers(0, 999), k=st.integers(1, 6))
@settings(max_examples=25, deadline=None)
def test_top_k_of_the_stored_candidates_is_the_top_k_of_the_router(seed: int, k: int) -> None:
    wanted = [[layer[:k] for layer in token] for token in chosen(router_trace(stored=16, seed=seed, tokens=12))]
    found = apply_rules(router_trace(stored=6, seed=seed, tokens=12), f"top_k:{k}")
    assert chosen(found) == wanted and found.shape.top_k == k


def test_candidates_out_of_order_are_ranked_by_weight() -> None:
    base = rows(FULL)
    mixed = np.random.Generator(np.random.PCG64(3)).permutation(16)
    shuffled = replace(base, experts_TLK=base.experts_TLK[..., mixed], weights_TLK=base.weights_TLK[..., mixed])  # type: ignore[index]
    for rule in ("top_k:4", "top_p:0.5", "share:0.3", "grouped:4,1", "mask:0,k=4", "top_groups:4,2,3,score=sum2"):
        assert sets(apply_rules(from_batches(FULL.shape, [shuffled], source="x"), rule)) == sets(apply_rules(FULL, rule)), rule


def test_missing_choices_come_last_and_are_not_counted() -> None:
    base = rows(FULL)
    valid = np.ones(base.experts_TLK.shape, dtype=bool)
    valid[:, :, 0] = False
    found = apply_rules(from_batches(FULL.shape, [replace(base, valid_TLK=valid)], source="x"), "top_k:2")
    assert chosen(found) == [[layer[1:3] for layer in token] for token in chosen(FULL)]
    assert f"{60 * 2 * 15} choices in" in note_of(found)


# --- dynamic top-p ---------------------------------------------------------------------------------------------------


def unit(weights: list[float], dtype: Any = np.float32) -> RoutingTrace:
    """Return one token and layer with these router probabilities of all experts."""
    of = TraceShape(model="unit", num_experts=len(weights), top_k=len(weights), moe_layer_ids=(0,))
    column = np.zeros(1, dtype=np.uint32)
    return from_batches(
        of,
        [
            TokenBatch(
                step_T=column,
                rank_T=column.astype(np.uint16),
                request_T=column.astype(np.uint64),
                position_T=column,
                phase_T=column.astype(np.uint8),
                experts_TLK=np.arange(len(weights), dtype=np.uint8)[None, None],
                weights_TLK=np.array(weights, dtype=dtype)[None, None],
            )
        ],
        source="unit",
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_top_p_takes_the_fewest_experts_whose_probabilities_reach_p(dtype: Any) -> None:
    halves = [0.5, 0.25, 0.125, 0.125]
    for p, count in ((0.01, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.875, 3), (0.9, 4), (1, 4)):
        assert len(chosen(apply_rules(unit(halves, dtype), f"top_p:{p}"))[0][0]) == count, p
    # 0.7 has no exact binary form; a sum that reaches it to within rounding has reached it
    assert len(chosen(apply_rules(unit([0.7, 0.2, 0.1], dtype), "top_p:0.7"))[0][0]) == 1
    assert len(chosen(apply_rules(unit([0.4, 0.3, 0.2, 0.1], dtype), "top_p:0.9"))[0][0]) == 3


def test_top_p_near_zero_is_top_1_and_grows_with_p() -> None:
    assert sets(apply_rules(FULL, "top_p:0.000001")) == sets(apply_rules(FULL, "top_k:1"))
    before = [[frozenset[int]() for _ in range(2)] for _ in range(60)]
    for p in (0.2, 0.4, 0.6, 0.8, 1):
        now = sets(apply_rules(FULL, f"top_p:{p}"))
        assert all(old <= new for a, b in zip(before, now, strict=True) for old, new in zip(a, b, strict=True))
        before = now


def test_top_p_on_a_recorded_trace_equals_brute_force() -> None:
    trace = open_trace(FLAME)
    batch = rows(trace)
    assert batch.weights_TLK is not None
    found = apply_rules(trace, "top_p:0.3,5")
    sums = np.cumsum(batch.weights_TLK.astype(np.float64), axis=2)
    wanted = np.minimum((sums < 0.3).sum(axis=2) + 1, 5)
    assert [[len(layer) for layer in token] for token in chosen(found)] == wanted.tolist()
    assert f"{wanted.sum()} ffn out" in note_of(found) and f"{wanted.mean():.4f} experts" in note_of(found)


def test_top_p_refuses_what_the_trace_cannot_say() -> None:
    trace = open_trace(FLAME)
    short = int((rows(trace).weights_TLK.sum(axis=2, dtype=np.float64) < 0.4).sum())  # type: ignore[union-attr]
    with pytest.raises(TraceError, match=rf"{short} of 12288 .*hold less than 0.4 .*6 candidates.*top_p:0.4,6"):
        apply_rules(trace, "top_p:0.4")
    with pytest.raises(TraceError, match="candidates per token = 6 must be >= 7"):
        apply_rules(trace, "top_p:0.4,7")
    with pytest.raises(TraceError, match="normalised over the 6 chosen ones.*share:0.4"):
        apply_rules(apply_rules(trace, "renormalise"), "top_p:0.4,6")
    with pytest.raises(TraceError, match="needs the gate weights"):
        apply_rules(open_trace("synthetic:balanced,tokens=64", shape=shape()), "top_p:0.4")


def test_share_drops_what_adds_little() -> None:
    assert chosen(apply_rules(unit([0.4, 0.1, 0.05, 0.05]), "share:0.6"))[0][0] == [0]
    assert chosen(apply_rules(unit([0.4, 0.1, 0.05, 0.05]), "share:0.7"))[0][0] == [0, 1]
    plain, twice = apply_rules(FULL, "share:0.5"), apply_rules(FULL, "renormalise+share:0.5")
    assert sets(plain) == sets(twice)


def test_renormalise_makes_sums_one_and_keeps_ratios() -> None:
    found = rows(apply_rules(FULL, "top_p:0.7+renormalise"))
    before = rows(apply_rules(FULL, "top_p:0.7"))
    assert found.weights_TLK is not None and before.weights_TLK is not None
    np.testing.assert_allclose(found.weights_TLK.sum(axis=2), 1, rtol=1e-5)
    np.testing.assert_allclose(found.weights_TLK, before.weights_TLK / before.weights_TLK.sum(axis=2, keepdims=True), rtol=1e-5)


# --- groups ----------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), groups=st.sampled_from([1, 2, 4, 8]), each=st.integers(1, 2))
@settings(max_examples=25, deadline=None)
def test_grouped_gives_every_group_the_same_load_whatever_the_batch(seed: int, groups: int, each: int) -> None:
    base = router_trace(seed=seed, tokens=7, skew=3.0)
    found = apply_rules(base, f"grouped:{groups},{each}")
    loads = found.counts_WLE("all")[0].reshape(2, groups, -1).sum(axis=2)
    assert (loads == 7 * each).all() and found.shape.top_k == groups * each
    size = 16 // groups
    for token, layers in zip(chosen(base), sets(found), strict=True):
        for ranking, picked in zip(token, layers, strict=True):
            assert picked == {e for g in range(groups) for e in [e for e in ranking if e // size == g][:each]}


def test_plain_top_8_of_64_is_as_imbalanced_as_the_reference_says() -> None:
    """(max - min) / batch over 8 groups of a uniform router, published for MoGE: .67 at batch 16, .34 at 64, .12 at 512."""
    for tokens, wanted in ((16, 0.67), (64, 0.34), (512, 0.12)):
        found = []
        for seed in range(30 if tokens < 512 else 8):
            base = apply_rules(router_trace(experts=64, stored=8, layers=4, tokens=tokens, seed=seed, skew=0.0), "top_k:8")
            load = base.counts_WLE("all")[0].reshape(4, 8, 8).sum(axis=2)
            found.append(((load.max(axis=1) - load.min(axis=1)) / tokens).mean())
        assert np.mean(found) == pytest.approx(wanted, rel=0.08)


def test_grouped_refuses_what_the_trace_cannot_say() -> None:
    with pytest.raises(TraceError, match="12288 of 12288 .*no 1 candidates in each of 8 groups .*6 of 64"):
        apply_rules(open_trace(FLAME), "grouped:8,1")
    with pytest.raises(TraceError, match="must divide the 16 experts"):
        apply_rules(FULL, "grouped:3,1")
    with pytest.raises(TraceError, match="must be <= 4, the experts of a group"):
        apply_rules(FULL, "grouped:4,5")
    with pytest.raises(TraceError, match="lack the best 2 experts of some group"):
        apply_rules(open_trace(FLAME), "top_groups:8,4,2,score=sum2")
    with pytest.raises(TraceError, match="fewer than 6 candidates in their 1 best groups"):
        apply_rules(open_trace(FLAME), "top_groups:8,1,6")


@pytest.mark.parametrize("score", ["max", "sum2"])
def test_top_groups_equals_brute_force(score: str) -> None:
    base = rows(FULL)
    assert base.weights_TLK is not None
    found = chosen(apply_rules(FULL, f"top_groups:4,2,3,score={score}"))
    for token in range(60):
        for layer in range(2):
            weight = dict(zip(base.experts_TLK[token, layer].tolist(), base.weights_TLK[token, layer].tolist(), strict=True))
            members = [sorted((weight[e] for e in range(4 * g, 4 * g + 4)), reverse=True) for g in range(4)]
            worth = [m[0] if score == "max" else m[0] + m[1] for m in members]
            reach = sorted(range(4), key=lambda g: -worth[g])[:2]
            wanted = sorted((e for e in range(16) if e // 4 in reach), key=lambda e: -weight[e])[:3]
            assert found[token][layer] == wanted


def test_top_groups_by_best_expert_needs_only_the_best_candidates() -> None:
    few = apply_rules(router_trace(stored=10), "top_groups:4,4,6")
    assert chosen(few) == chosen(apply_rules(FULL, "top_groups:4,4,6"))


# --- capacity --------------------------------------------------------------------------------------------------------


def reference_capacity(base: TokenBatch, experts: int, places: Callable[[int], int], k: int, per_rank: bool) -> list[list[set[int]]]:
    """Serve choices one by one: first choices of all tokens before second ones, in order of arrival."""
    tokens, layers, stored = base.experts_TLK.shape
    result: list[list[set[int]]] = [[set() for _ in range(layers)] for _ in range(tokens)]
    for layer in range(layers):
        used: dict[tuple[int, int], int] = {}
        for choice in range(stored):
            for token in range(tokens):
                if len(result[token][layer]) == k:
                    continue
                owner = int(base.rank_T[token]) if per_rank else -1
                expert = int(base.experts_TLK[token, layer, choice])
                limit = places(int((base.rank_T == owner).sum()) if per_rank else tokens)
                if used.get((owner, expert), 0) < limit:
                    used[(owner, expert)] = used.get((owner, expert), 0) + 1
                    result[token][layer].add(expert)
    return result


@given(
    seed=st.integers(0, 999), tokens=st.integers(1, 40), k=st.integers(1, 4), factor=st.sampled_from(["0.3", "0.75", "1", "1.25", "2"]), per_rank=st.booleans()
)
@settings(max_examples=60, deadline=None)
def test_capacity_equals_serving_one_by_one(seed: int, tokens: int, k: int, factor: str, per_rank: bool) -> None:
    base = router_trace(experts=8, stored=4, seed=seed, tokens=tokens)
    found = apply_rules(base, f"capacity:{factor},k={k}" + (",per=rank" if per_rank else ""))

    def places(count: int) -> int:
        return math.ceil(Fraction(factor) * k * count / 8)

    wanted = reference_capacity(rows(base), 8, places, k, per_rank)
    assert sets(found) == [[frozenset(layer) for layer in token] for token in wanted]
    kept = sum(len(layer) for token in wanted for layer in token)
    assert f"{kept} ffn out, {tokens * 2 * k - kept} dropped" in note_of(found)


@given(st.integers(0, 999), st.integers(1, 50), st.sampled_from(["0.2", "0.8", "1.5"]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_capacity_by_weight_keeps_the_heaviest_and_among_equals_the_first(seed: int, tokens: int, factor: str, coarse: bool) -> None:
    base = router_trace(experts=8, stored=2, tokens=tokens, seed=seed)
    batch = rows(base)
    assert batch.weights_TLK is not None
    if coarse:
        base = from_batches(base.shape, [replace(batch, weights_TLK=np.ceil(batch.weights_TLK * 4) / np.float32(4))], source="x")
    batch = rows(base)
    picked = sets(apply_rules(base, f"capacity:{factor},by=weight"))
    places = math.ceil(Fraction(factor) * 2 * tokens / 8)
    for layer in range(2):
        for expert in range(8):
            asks = [(-float(batch.weights_TLK[t, layer, c]), t) for t in range(tokens) for c in range(2) if batch.experts_TLK[t, layer, c] == expert]  # type: ignore[index]
            assert {t for _, t in sorted(asks)[:places]} == {t for t in range(tokens) if expert in picked[t][layer]}


def dropped(trace: RoutingTrace) -> int:
    return int(note_of(trace).split(" dropped")[0].rsplit(" ", 1)[1])


@pytest.mark.parametrize("more", ["", ",by=weight", ",per=rank"])
def test_drops_fall_with_the_factor_and_kept_plus_dropped_is_all(more: str) -> None:
    base = router_trace(stored=2, tokens=90)
    counts = []
    for factor in ("0.25", "0.5", "1", "1.5", "2", "4", "8"):
        found = apply_rules(base, f"capacity:{factor}{more}")
        kept = sum(len(layer) for token in chosen(found) for layer in token)
        assert kept + dropped(found) == 90 * 2 * 2
        counts.append(dropped(found))
    assert counts == sorted(counts, reverse=True) and counts[0] > 0 and counts[-1] == 0


def test_nothing_is_dropped_from_the_factor_of_the_largest_load_on() -> None:
    base = router_trace(stored=2, tokens=96)
    most = int(base.counts_WLE("all").max())
    exact = Fraction(most * 16, 2 * 96)
    assert dropped(apply_rules(base, f"capacity:{exact.numerator}/{exact.denominator}")) == 0
    below = Fraction((most - 1) * 16, 2 * 96)
    assert dropped(apply_rules(base, f"capacity:{below.numerator}/{below.denominator}")) > 0


def test_a_balanced_trace_drops_nothing_at_factor_1() -> None:
    even = open_trace("synthetic:balanced,tokens=128,steps=2", shape=shape(experts=16, top_k=2))
    assert dropped(apply_rules(even, "capacity:1")) == 0
    assert dropped(apply_rules(even, "capacity:0.9")) > 0


def test_capacity_holds_in_every_step_and_depends_on_it() -> None:
    base = router_trace(stored=2, tokens=60, steps=3)
    found = apply_rules(base, "capacity:1")
    assert found.counts_WLE("step").max() <= math.ceil(2 * 20 / 16)
    assert dropped(found) != dropped(apply_rules(router_trace(stored=2, tokens=60), "capacity:1"))
    places = math.ceil(2 * 20 / 16) * 16 * 2 * 3
    assert f"{places} places" in note_of(found)


def test_overflow_may_ask_the_next_candidate() -> None:
    drop, ask = apply_rules(router_trace(stored=1), "capacity:1"), apply_rules(router_trace(stored=3), "capacity:1,k=1")
    assert 0 < dropped(ask) < dropped(drop)
    assert all(one <= other for a, b in zip(sets(drop), sets(ask), strict=True) for one, other in zip(a, b, strict=True))


def test_rounding_is_exact() -> None:
    """1.1 · 2 · 50 / 11 is 10 and not a little more, as it is in binary."""
    base = router_trace(experts=11, stored=2, tokens=50, layers=1)
    assert "110 places" in note_of(apply_rules(base, "capacity:1.1"))


# --- expert kinds ----------------------------------------------------------------------------------------------------


def test_null_experts_leave_0_to_k_true_ones_per_token() -> None:
    """AdaMoE: m null experts and a larger k; the mean number of true experts is the trace's, and its loads are those of the true choices."""
    base = router_trace(experts=16, stored=3, skew=0.0, tokens=200)
    found = apply_rules(base, "null:8+renormalise")
    true = [[[e for e in layer if e < 8] for layer in token] for token in chosen(base)]
    assert chosen(found) == true and found.shape.num_experts == 8
    counts = np.array([[len(layer) for layer in token] for token in true])
    assert set(counts.ravel().tolist()) == {0, 1, 2, 3} and f"{counts.mean():.4f} experts" in note_of(found)
    batch = rows(found)
    assert batch.weights_TLK is not None
    np.testing.assert_allclose(batch.weights_TLK.sum(axis=2)[counts > 0], 1, rtol=1e-5)
    assert (batch.weights_TLK[counts == 0] == 0).all()


def test_zero_copy_and_constant_experts_are_counted_by_kind() -> None:
    base = router_trace(experts=12, stored=2)
    found = apply_rules(base, "zero:8/9+copy:10+constant:11")
    load = base.counts_WLE("all")[0].sum(axis=0)
    kinds = f"{load[:8].sum()} ffn, {load[8:10].sum()} zero, {load[10]} copy, {load[11]} constant out"
    assert kinds in note_of(found) and found.shape.num_experts == 8
    np.testing.assert_array_equal(found.counts_WLE("all")[0], base.counts_WLE("all")[0][:, :8])


def test_experts_of_a_kind_in_the_middle_keep_the_ids_of_the_others() -> None:
    base = router_trace(experts=12, stored=2)
    found = apply_rules(base, "zero:3-5")
    assert found.shape.num_experts == 12
    load = base.counts_WLE("all")[0].copy()
    load[:, 3:6] = 0
    np.testing.assert_array_equal(found.counts_WLE("all")[0], load)


def test_choices_beyond_the_experts_that_are_left_are_folded() -> None:
    found = apply_rules(router_trace(experts=8, stored=6, skew=0.0), "null:5")
    assert found.shape.num_experts == 3 and found.shape.top_k == 3
    assert sets(found) == [[frozenset(e for e in layer if e < 3) for layer in token] for token in chosen(router_trace(experts=8, stored=6, skew=0.0))]


@pytest.mark.parametrize("tau", ["0.1", "0.25", "0.5", "0.75", "1"])
def test_places_of_zero_computation_experts_follow_tau(tau: str) -> None:
    """MoE++: g · tau · kT / (tau · N_F + N_Z) places where an expert computes, 1/tau times as many elsewhere."""
    base = router_trace(experts=12, stored=2, tokens=1200, skew=0.0)
    found = apply_rules(base, f"zero:8-11+capacity:1,tau={tau}")
    unit = Fraction(2 * 1200) / (Fraction(tau) * 8 + 4)
    assert found.counts_WLE("step").max() <= math.ceil(unit * Fraction(tau))
    assert f"{math.ceil(unit * Fraction(tau)) * 8 * 2} places" in note_of(found)
    share = Fraction(tau) * 8 / (Fraction(tau) * 8 + 4)
    kept = found.counts_WLE("all").sum() / (2 * 1200 * 2)
    assert kept <= float(share) + 8 / 2400
    # a uniform router asks for 2/3 of the places of experts that compute, so below tau = 1 these are all taken
    assert tau == "1" or kept == pytest.approx(float(share), abs=8 / 2400)


def test_a_trace_of_null_experts_fits_the_model_of_the_true_ones() -> None:
    found = apply_rules(router_trace(experts=12, stored=3), "null:4")
    model = TraceShape(model="true", num_experts=8, top_k=2, moe_layer_ids=(1, 2))
    assert check_fits(found, model).shape.top_k == 3
    with pytest.raises(TraceError, match="top-k = 3"):
        check_fits(router_trace(experts=8, stored=3), model)


# --- masks -----------------------------------------------------------------------------------------------------------


def test_a_mask_holds_for_its_requests_only_and_others_take_the_places() -> None:
    found = chosen(apply_rules(FULL, "mask:0-2@1/3;5@0,k=4"))
    barred = {0: {5}, 1: {0, 1, 2}, 2: set(), 3: {0, 1, 2}}
    for token, layers in enumerate(chosen(FULL)):
        for layer, ranking in enumerate(layers):
            assert found[token][layer] == [e for e in ranking if e not in barred[token % 4]][:4]


def test_a_mask_shifts_load_to_the_others_and_keeps_its_sum() -> None:
    base, found = (apply_rules(FULL, rule).counts_WLE("all")[0] for rule in ("top_k:4", "mask:0,k=4"))
    assert (found[:, 0] == 0).all() and (found[:, 1:] >= base[:, 1:]).all() and found.sum() == base.sum()


def test_a_mask_refuses_when_the_next_candidate_is_not_stored() -> None:
    base = router_trace(stored=4)
    hit = sum(0 in layer for token in chosen(base) for layer in token)
    with pytest.raises(TraceError, match=rf"{hit} of 120 .*fewer than 4 candidates outside the mask.*K <= 3"):
        apply_rules(base, "mask:0")
    assert apply_rules(base, "mask:0,k=3").shape.top_k == 3
    with pytest.raises(InputError, match="expert = 16 must be < 16"):
        apply_rules(base, "mask:16")


# --- layers ----------------------------------------------------------------------------------------------------------


def test_one_decision_holds_for_all_layers_and_is_known_ahead() -> None:
    trace = open_trace(FLAME)
    found = rows(apply_rules(trace, "one_decision:3"))
    wanted = np.repeat(rows(trace).experts_TLK[:, 2:3], 8, axis=1)
    np.testing.assert_array_equal(found.experts_TLK, wanted)
    np.testing.assert_array_equal(found.predicted_TLK, wanted)
    np.testing.assert_array_equal(found.weights_TLK, np.repeat(rows(trace).weights_TLK[:, 2:3], 8, axis=1))  # type: ignore[index]
    with pytest.raises(TraceError, match="LAYER = 0 must be a layer of the trace"):
        apply_rules(trace, "one_decision:0")


def test_rounds_declare_the_rows_of_a_trace() -> None:
    found = apply_rules(router_trace(layers=6), "rounds:2")
    assert found.rounds == 2 and router_trace(layers=6).rounds == 1
    model = TraceShape(model="chain", num_experts=16, top_k=16, moe_layer_ids=(0, 1, 2))
    assert check_fits(found, model).shape.num_layers == 6
    with pytest.raises(TraceError, match="layer rows = 6 must be 2 rounds of each of the 2 MoE layers"):
        check_fits(found, replace(model, moe_layer_ids=(0, 1)))
    with pytest.raises(TraceError, match="must be a multiple of 4"):
        apply_rules(router_trace(layers=6), "rounds:4")


# --- pipelines, provenance, bad input -----------------------------------------------------------------------------------


def test_a_pipeline_is_its_rules_one_after_another() -> None:
    at_once = apply_rules(FULL, "mask:3,k=8 + top_p:0.8,8+capacity:1.5")
    by_turns = apply_rules(apply_rules(apply_rules(FULL, "mask:3,k=8"), "top_p:0.8,8"), "capacity:1.5")
    same_rows(at_once, by_turns)
    assert by_turns.rules == ("mask:3,k=8", "top_p:0.8,8", "capacity:1.5") and at_once.rules == ("mask:3,k=8+top_p:0.8,8+capacity:1.5",)


def test_a_written_result_says_what_was_done(tmp_path: Path) -> None:
    found = apply_rules(open_trace(FLAME), "top_p:0.4,6+capacity:1.25")
    write_trace(found, tmp_path / "t")
    again = open_trace(str(tmp_path / "t"))
    same_rows(found, again)
    assert again.routing == "recorded, routed anew by top_p:0.4,6+capacity:1.25"
    assert again.provenance["derived_from"] == open_trace(FLAME).fingerprint and again.provenance["transforms"] == ["rule(top_p:0.4,6+capacity:1.25)"]
    assert "73728 choices in" in again.provenance["notes"][-1]


def test_the_command_writes_the_trace_and_says_what_was_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["trace", "transform", FLAME, "--max-tokens", "400", "--rule", "top_k:2+capacity:1", "-o", str(tmp_path / "t"), "--json"])
    node = json.loads(capsys.readouterr().out)
    found = open_trace(str(tmp_path / "t"))
    assert node["rows"] == 400 and node["top_k"] == 2 and node["routing"] == "recorded, routed anew by top_k:2+capacity:1"
    assert node["notes"][-1] == note_of(found) and dropped(found) > 0 and found.counts_WLE("all").max() <= math.ceil(400 * 2 / 64)
    with pytest.raises(SystemExit, match="2"):
        main(["trace", "transform", FLAME, "--rule", "top_k:7", "-o", str(tmp_path / "u")])
    assert "candidates per token = 6 must be >= 7" in capsys.readouterr().err and not (tmp_path / "u").exists()


def test_dummies_do_not_take_places() -> None:
    base = rows(router_trace(stored=2))
    phases = np.where(np.arange(60) < 20, 3, 0).astype(np.uint8)
    marked = from_batches(shape(16, 2, 2), [replace(base, phase_T=phases)], source="x")
    alone = from_batches(shape(16, 2, 2), [base.take(slice(20, None))], source="x")
    same_rows(apply_rules(marked, "capacity:1"), apply_rules(alone, "capacity:1"))


def test_predictions_follow_the_choices() -> None:
    base = rows(FULL)
    predicted = from_batches(FULL.shape, [replace(base, predicted_TLK=base.experts_TLK[..., ::-1].copy())], source="x")
    np.testing.assert_array_equal(rows(apply_rules(predicted, "top_k:3")).predicted_TLK, base.experts_TLK[..., ::-1][..., :3])
    assert rows(apply_rules(predicted, "null:2")).predicted_TLK is None


BAD = [
    ("", "must be rules separated"),
    ("top_k:2++capacity:1", "must be rules separated"),
    ("topk:2", "did you mean 'top_k'"),
    ("top_k", "K = '' is missing"),
    ("top_k:0", "must be a whole number in 1..1024"),
    ("top_k:²", "must be a whole number"),
    ("top_k:2,3", "not understood"),
    ("top_k:2,x=1", "not understood"),
    ("top_p:0", "must be a number > 0 and <= 1"),
    ("top_p:1.5", "must be a number > 0"),
    ("top_p:nan", "must be a number > 0"),
    ("top_p:1/0", "must be a number > 0"),
    ("top_p:1e-999999999", "must be a number > 0"),
    ("grouped:4", "K' = '' is missing"),
    ("top_groups:2,3,1", "must be <= 2, the groups"),
    ("top_groups:4,2,2,score=mean", "must be max or sum2"),
    ("capacity:1,by=luck", "must be arrival or weight"),
    ("capacity:1,per=node", "must be step or rank"),
    ("capacity:1,k=1,by=weight", "leave out by=weight"),
    ("capacity:1,k=1,k=2", "given twice"),
    ("capacity:-1", "must be a number > 0"),
    ("zero:5-3", "must be a whole number in 5"),
    ("mask:3@x", "must be request ids"),
    ("mask:a", "must be a whole number"),
    ("one_decision:a", "must be a whole number"),
    ("rounds:99", "in 1..16"),
    ("renormalise:1", "not understood"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_a_bad_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        rules_of(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("top_k:17", "candidates per token = 16 must be >= 17"),
        ("capacity:1,k=17", "candidates per token = 16 must be >= 17"),
        ("null:16", "experts = 16 must be > 16"),
        ("zero:16", "experts = 16 must be > 16"),
        ("zero:0-15", "leaves no expert that computes"),
        ("zero:3+copy:3", "has a kind already"),
    ],
)
def test_a_rule_that_the_trace_cannot_carry_is_refused(rule: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        apply_rules(FULL, rule)


@pytest.mark.parametrize("weight", [float("nan"), -0.1, float("inf")])
def test_weights_that_are_none_are_refused(weight: float) -> None:
    base = rows(FULL)
    assert base.weights_TLK is not None
    weights = base.weights_TLK.copy()
    weights[3, 1, 2] = weight
    trace = from_batches(FULL.shape, [replace(base, weights_TLK=weights)], source="x")
    for rule in ("top_p:0.5", "share:0.5", "capacity:1,by=weight", "renormalise"):
        with pytest.raises(TraceError, match="must be finite and >= 0"):
            apply_rules(trace, rule)


def test_a_token_whose_weights_are_all_zero_keeps_its_first_choice() -> None:
    assert chosen(apply_rules(unit([0.0, 0.0]), "share:0.5"))[0][0] == [0]


def test_counts_are_refused() -> None:
    with pytest.raises(TraceError, match="holds counts"):
        apply_rules(from_counts(shape(), np.ones((1, 3, 16), dtype=np.int64), ["a"], source="x"), "top_k:1")


def view(tokens: int = 4) -> RouterView:
    base = rows(router_trace(tokens=tokens))
    names = ("experts_TLK", "weights_TLK", "rank_T", "request_T", "position_T", "phase_T")
    return RouterView(**{name: getattr(base, name) for name in names}, kind_E=np.zeros(16, dtype=np.uint8), moe_layer_ids=(1, 2))


def test_a_view_counts_the_load_of_every_expert() -> None:
    np.testing.assert_array_equal(view().load_LE, np.full((2, 16), 4))


@pytest.mark.parametrize(
    ("decision", "message"),
    [
        (Decision(experts_TLK=np.full((4, 2, 1), 16, dtype=np.uint8)), r"policy mine: layer 1: expert = 16 must be in 0..15 \(token 0, choice 0\)"),
        (Decision(experts_TLK=np.zeros((3, 2, 1), dtype=np.uint8)), "must be uint8 or uint16 .4 tokens, 2 layers"),
        (Decision(experts_TLK=np.zeros((4, 2, 1))), "float64"),
        (Decision(experts_TLK=np.zeros((4, 2, 1), dtype=np.uint8), valid_TLK=np.ones((4, 2, 2), dtype=bool)), "valid_TLK"),
        (Decision(experts_TLK=np.zeros((4, 2, 1), dtype=np.uint8), weights_TLK=np.ones((4, 2, 1), dtype=bool)), "weights_TLK"),
        (None, "decision = .NoneType. must be a moesim.traces.rules_view.Decision"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused(decision: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        run([("mine", lambda _: decision)], view(), Tally())


def test_an_expert_that_does_not_exist_may_stand_where_no_choice_is() -> None:
    nothing = Decision(experts_TLK=np.full((4, 2, 1), 99, dtype=np.uint8), valid_TLK=np.zeros((4, 2, 1), dtype=bool))
    left = run([("mine", lambda _: nothing), *((rule.name, rule.decide) for rule in rules_of("mask:3+zero:9+capacity:1"))], view(), Tally())
    assert (left.experts_TLK == 0).all() and left.valid_TLK is not None and not left.valid_TLK.any()
