"""Synthetic routing has the property its name promises, and says that it is synthetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import PHASES, RoutingTrace, concatenate
from moesim.traces.synth import parse_spec
from moesim.traces.writer import write_trace
from tests.traces.helpers import same_rows, shape

KINDS = ("balanced", "zipf:1.0", "power-law:1.2", "markov:0.5", "markov:0.5,skew=1", "topics:4")
FLAT = shape(64, 4, 3)
GROUPED = shape(64, 4, 3, num_groups=8, top_k_groups=2)


def opened(text: str, of: object = FLAT, seed: int = 0) -> RoutingTrace:
    return open_trace(f"synthetic:{text}", shape=of, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", [FLAT, GROUPED], ids=["flat", "grouped"])
def test_experts_are_distinct_in_range_and_in_few_groups(kind: str, of: object) -> None:
    for batch in opened(f"{kind},tokens=500,steps=2,phase=decode", of).batches():
        ids = np.sort(batch.experts_TLK.astype(int), axis=2)
        assert batch.experts_TLK.shape == (500, 3, 4) and (np.diff(ids, axis=2) > 0).all() and ids.max() < 64
        if of is GROUPED:
            groups = ids // 8
            assert (1 + (np.diff(groups, axis=2) > 0).sum(axis=2)).max() <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_fixes_the_trace_and_another_changes_it(kind: str) -> None:
    text = f"{kind},tokens=200,steps=2"
    same_rows(opened(text, seed=1), opened(text, seed=1))
    same_rows(opened(text, seed=1), opened(f"{text},seed=1"))
    assert opened(text, seed=1).fingerprint == opened(f"{text},seed=1").fingerprint != opened(text, seed=2).fingerprint
    one, other = (concatenate(list(opened(text, seed=seed).batches())).experts_TLK for seed in (1, 2))
    assert (one != other).mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_steps_can_be_read_in_any_order(kind: str, phase: str) -> None:
    text = f"{kind},tokens=96,steps=4,requests=12,phase={phase}"
    tokens = opened(text).tokens
    assert tokens is not None
    forward = [tokens.read(step).experts_TLK.copy() for step in range(4)]
    fresh = opened(text).tokens
    assert fresh is not None
    for step in (3, 0, 2, 1):
        np.testing.assert_array_equal(fresh.read(step).experts_TLK, forward[step])


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_specification_describes_the_same_trace(kind: str) -> None:
    one = opened(f"{kind},tokens=100,requests=7", seed=9)
    assert one.is_synthetic and one.synthetic is not None and one.routing == one.synthetic
    again = open_trace(one.synthetic, shape=FLAT)
    assert again.synthetic == one.synthetic
    same_rows(one, again)


def test_a_written_synthetic_trace_stays_labelled(tmp_path: Path) -> None:
    one = opened("zipf:1.0,tokens=100")
    write_trace(one, tmp_path / "t")
    read = open_trace(str(tmp_path / "t"))
    assert read.is_synthetic and read.routing == one.synthetic
    write_trace(read, tmp_path / "copy")
    assert open_trace(str(tmp_path / "copy")).is_synthetic


def test_balanced_is_exact_per_step_and_layer() -> None:
    for of in (FLAT, GROUPED):
        counts = opened("balanced,tokens=512,steps=3", of).counts_WLE()
        assert counts.shape == (3, 3, 64) and (counts == 512 * 4 // 64).all()
    uneven = opened("balanced,tokens=501,steps=2").counts_WLE()
    assert uneven.max() - uneven.min() <= 1 and (uneven.sum(axis=2) == 501 * 4).all()


@pytest.mark.parametrize("exponent", [0.5, 0.8])
def test_zipf_loads_have_the_slope(exponent: float) -> None:
    counts = opened(f"zipf:{exponent},tokens=40000", shape(64, 2, 2)).counts_WLE("all")[0]
    for load in counts:
        ordered = np.sort(load)[::-1]
        free = ordered < 39_000
        slope, offset = np.polyfit(np.log(np.arange(1, 65)[free]), np.log(ordered[free]), 1)
        assert slope == pytest.approx(-exponent, abs=0.03)
        assert np.exp(offset) == pytest.approx(2 * 40000 / (np.arange(1, 65.0) ** -exponent).sum(), rel=0.06)


def test_zipf_zero_is_uniform_and_strong_zipf_saturates() -> None:
    uniform = opened("zipf:0,tokens=20000").counts_WLE("all")
    assert uniform.max() / uniform.mean() < 1.1
    assert opened("zipf:4,tokens=2000").counts_WLE("all").max(axis=2).tolist() == [[2000, 2000, 2000]]


def test_hot_experts_differ_per_layer() -> None:
    for kind in ("zipf:1.0", "markov:0.5,skew=1.0", "power-law:1.2", "topics:2"):
        hot = opened(f"{kind},tokens=4000", shape(64, 2, 12)).counts_WLE("all")[0].argmax(axis=1)
        assert len(set(hot.tolist())) > 6, kind


def test_power_law_loads_follow_the_bounded_pareto() -> None:
    counts = opened("power-law:1.2,tokens=20000,seed=3", shape(256, 1, 40)).counts_WLE("all")[0].astype(float)
    high, power = 0.8 * 20000, -0.2
    share = (np.arange(1, 256) - 0.5) / 255.5
    quantile = (1 + (high**power - 1) * share) ** (1 / power)
    middle = [np.median(np.sort(load)[127:129] / load.sum()) for load in counts]
    # median expert over total: compare the ensemble with draws of the law
    draws = (1 + (high**power - 1) * np.random.Generator(np.random.PCG64(1)).random((2000, 256))) ** (1 / power)
    expected = np.median(draws, axis=1) / draws.sum(axis=1)
    assert np.median(middle) == pytest.approx(np.median(expected), rel=0.3)
    assert quantile[127] == pytest.approx(np.median(draws), rel=0.05)


def _linked(batch: np.ndarray, layer: int) -> float:
    """Share of choices that follow the most common successor of their expert at the same place."""
    table = np.zeros((64, 64))
    for choice in range(batch.shape[2]):
        np.add.at(table, (batch[:, layer, choice].astype(int), batch[:, layer + 1, choice].astype(int)), 1)
    return float(table.max(axis=1).sum() / table.sum())


@pytest.mark.parametrize("of", [FLAT, GROUPED], ids=["flat", "grouped"])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_markov_links_layers_with_the_stated_probability(of: object, skew: float) -> None:
    for persistence in (0.3, 0.9):
        batch = concatenate(list(opened(f"markov:{persistence},tokens=6000,requests=6000,temporal=0,skew={skew}", of).batches())).experts_TLK
        for layer in range(2):
            chance = 0.05 if skew == 0 and of is FLAT else 0.25
            assert persistence - 0.02 < _linked(batch, layer) < persistence + (1 - persistence) * chance + 0.03
    whole = concatenate(list(opened("markov:1,tokens=3000,requests=3000", of).batches())).experts_TLK
    assert _linked(whole, 0) == _linked(whole, 1) == 1.0


def test_markov_links_are_another_bijection_in_every_layer() -> None:
    for of in (FLAT, GROUPED):
        ids = concatenate(list(opened("markov:1,tokens=3000,requests=3000", of).batches())).experts_TLK.astype(int)
        links = []
        for layer in range(2):
            link = np.full(64, -1)
            link[ids[:, layer].ravel()] = ids[:, layer + 1].ravel()
            assert sorted(link.tolist()) == list(range(64))
            assert (link == np.arange(64)).mean() < 0.2
            links.append(link)
        assert (links[0] == links[1]).mean() < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_drawn_anew(kind: str) -> None:
    first, second = opened(f"{kind},tokens=300,steps=2").batches()
    assert (first.experts_TLK != second.experts_TLK).mean() > 0.5


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_markov_repeats_the_previous_token_of_a_request(phase: str) -> None:
    tokens, steps, requests = (4000, 1, 8) if phase == "prefill" else (400, 10, 400)
    one = concatenate(list(opened(f"markov:0,temporal=0.6,tokens={tokens},steps={steps},requests={requests},phase={phase}").batches()))
    order = np.lexsort((one.position_T, one.request_T))
    same_request = np.diff(one.request_T[order].astype(np.int64)) == 0
    same = one.experts_TLK[order][1:, 0] == one.experts_TLK[order][:-1, 0]
    assert same[same_request].mean() == pytest.approx(0.6 + 0.4 / 64, abs=0.02)
    other = one.experts_TLK[order][1:, 1] == one.experts_TLK[order][:-1, 1]
    assert other[same_request].mean() < 0.1  # persistence 0: later layers are drawn afresh


def test_topics_give_requests_routing_of_their_own() -> None:
    one = concatenate(list(opened("topics:2,tokens=8000,requests=16,focus=1,skew=1.5").batches()))
    loads = np.stack([np.bincount(one.experts_TLK[one.request_T == request, 0].ravel(), minlength=64) for request in range(16)]).astype(float)
    like = np.corrcoef(loads)
    assert ((like > 0.9) | (like < 0.7)).all()
    groups = {tuple((row > 0.9).tolist()) for row in like}
    assert len(groups) == 2
    mixed = concatenate(list(opened("topics:2,tokens=8000,requests=16,focus=0,skew=1.5").batches()))
    loads = np.stack([np.bincount(mixed.experts_TLK[mixed.request_T == request, 0].ravel(), minlength=64) for request in range(16)]).astype(float)
    assert np.corrcoef(loads).min() > 0.8


def test_requests_positions_and_phases_are_consistent() -> None:
    prefill = concatenate(list(opened("balanced,tokens=100,steps=2,requests=7").batches()))
    assert len(np.unique(prefill.request_T)) == 14 and (prefill.phase_T == PHASES.index("prefill")).all()
    for request in np.unique(prefill.request_T):
        assert prefill.position_T[prefill.request_T == request].tolist() == list(range(int((prefill.request_T == request).sum())))
    decode = concatenate(list(opened("balanced,tokens=10,steps=3,phase=decode").batches()))
    assert len(np.unique(decode.request_T)) == 10
    assert decode.position_T.tolist() == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("zip:1", "kind"),
        ("zipf", "parameter"),
        ("zipf:-1", "parameter"),
        ("zipf:nan", "parameter"),
        ("zipf:inf", "parameter"),
        ("balanced:1", "not taken"),
        ("markov:1.5", "parameter"),
        ("topics:0", "parameter"),
        ("topics:1.5", "integer"),
        ("balanced,tokens=0", "tokens"),
        ("balanced,tokens=1e3", "tokens"),
        ("balanced,tokens=99999999999", "tokens"),
        ("balanced,tokens=5,tokens=6", "twice"),
        ("balanced,colour=red", "option"),
        ("zipf:1,skew=1", "option"),
        ("topics:2,temporal=1", "option"),
        ("balanced,phase=dummy", "option"),
        ("balanced,tokens=4,requests=5", "requests"),
        ("balanced,", "option"),
        ("balanced,tokens=4000000,steps=1000000", "choices per step"),
    ],
)
def test_a_bad_specification_is_refused(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        open_trace(f"synthetic:{text}", shape=shape(256, 8, 100))


def test_a_synthetic_trace_needs_a_model() -> None:
    with pytest.raises(TraceError, match="--model"):
        open_trace("synthetic:balanced")


def test_defaults_are_the_documented_ones() -> None:
    assert parse_spec("synthetic:balanced").canonical() == "synthetic:balanced,tokens=8192,steps=1,requests=32,seed=0,phase=prefill"
    assert parse_spec("synthetic:balanced,phase=decode").requests == 8192
    assert parse_spec("synthetic:markov:0.5").temporal == 0.5 and parse_spec("synthetic:topics:3").skew == 1.0
