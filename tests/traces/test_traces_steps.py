"""Cutting a trace into steps loses no token, adds none, and deals them to ranks as stated."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import DUMMY, RoutingTrace, concatenate
from moesim.traces.sampling import inclusion_E
from moesim.traces.steps import StepTokens, iter_steps, sharding
from moesim.traces.writer import write_trace
from tests.traces.helpers import batch, shape, trace

OF = shape()


def bag(request: np.ndarray, position: np.ndarray, experts: np.ndarray) -> Counter[tuple[int, int, bytes]]:
    return Counter((int(r), int(p), e.tobytes()) for r, p, e in zip(request, position, experts, strict=True))


def bag_of(steps: list[StepTokens]) -> Counter[tuple[int, int, bytes]]:
    return sum((bag(s.request_T, s.position_T, s.experts_TLK) for s in steps), Counter())


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    batches = []
    for index in range(draw(st.integers(1, 4))):
        size = draw(st.integers(1, 40))
        steps = np.array(draw(st.lists(st.integers(0, 5), min_size=size, max_size=size)))
        one = batch(OF, size, seed=index, step=np.sort(steps) if draw(st.booleans()) else steps, requests=draw(st.integers(1, 9)))
        phases = np.where(np.random.Generator(np.random.PCG64(index)).random(size) < 0.2, DUMMY, 0).astype(np.uint8)
        batches.append(replace(one, phase_T=phases) if draw(st.booleans()) else one)
    return from_batches(OF, batches, source="drawn")


@settings(deadline=None, max_examples=80)
@given(one=traces(), ranks=st.integers(1, 9), size=st.one_of(st.none(), st.integers(1, 50)))
def test_no_token_is_lost_or_added(one: RoutingTrace, ranks: int, size: int | None) -> None:
    rows = concatenate(list(one.batches()))
    keep = rows.phase_T != DUMMY
    steps = list(iter_steps(one, num_ranks=ranks, tokens_per_step=size))
    assert bag_of(steps) == bag(rows.request_T[keep], rows.position_T[keep], rows.experts_TLK[keep])
    assert [s.step for s in steps] == list(range(len(steps)))
    for step in steps:
        assert len(step.rank_T) > 0 and step.rank_T.dtype == np.int32 and (np.diff(step.rank_T) >= 0).all() and step.rank_T[0] >= 0 and step.rank_T[-1] < ranks
    if size is None:
        assert [len(s.rank_T) for s in steps] == [n for n in (int((rows.step_T[keep] == step).sum()) for step in range(6)) if n]
    else:
        assert all(len(s.rank_T) == size for s in steps[:-1])


@settings(deadline=None, max_examples=40)
@given(one=traces(), ranks=st.integers(1, 9))
def test_a_request_stays_on_its_rank_or_blocks_are_equal(one: RoutingTrace, ranks: int) -> None:
    how = sharding(one, num_ranks=ranks)
    seen: dict[int, int] = {}
    for index, step in enumerate(iter_steps(one, num_ranks=ranks)):
        if index == 0:
            assert how == ("requests" if len(np.unique(step.request_T)) >= ranks else "tokens")
        if how == "requests":
            for request, rank in zip(step.request_T.tolist(), step.rank_T.tolist(), strict=True):
                assert seen.setdefault(request, rank) == rank
        else:
            sizes = np.bincount(step.rank_T, minlength=ranks)
            assert sizes.max() - sizes.min() <= 1


def test_requests_are_dealt_in_order_of_first_appearance() -> None:
    one = batch(OF, 8, step=np.array([0, 0, 0, 0, 1, 1, 1, 1]))
    one = replace(one, request_T=np.array([70, 50, 70, 60, 40, 50, 30, 70], dtype=np.uint64))
    first, second = iter_steps(from_batches(OF, [one], source="x"), num_ranks=2)
    # turns: 70 → 0, 50 → 1, 60 → 2, then 40 → 3, 30 → 4
    assert first.request_T.tolist() == [70, 70, 60, 50] and first.rank_T.tolist() == [0, 0, 0, 1]
    assert second.request_T.tolist() == [30, 70, 40, 50] and second.rank_T.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(first.experts_TLK, one.experts_TLK[[0, 2, 3, 1]])


def test_few_requests_are_cut_into_equal_blocks_in_order() -> None:
    one = trace(OF, 10, requests=2)
    (step,) = iter_steps(one, num_ranks=4)
    assert step.rank_T.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]
    np.testing.assert_array_equal(step.experts_TLK, next(one.batches()).experts_TLK)


def test_dummy_tokens_are_left_out_and_counted() -> None:
    one = batch(OF, 30, step=np.repeat([0, 1, 2], 10))
    phases = np.zeros(30, dtype=np.uint8)
    phases[:10], phases[12:15] = DUMMY, DUMMY
    steps = list(iter_steps(from_batches(OF, [replace(one, phase_T=phases)], source="x"), num_ranks=2))
    assert [(len(s.rank_T), s.num_dummy) for s in steps] == [(7, 13), (10, 0)]


def test_shards_that_ranks_wrote_side_by_side_are_merged(tmp_path: Path) -> None:
    parts = [replace(batch(OF, 60, seed=rank, step=np.arange(60) // 6), rank_T=np.full(60, rank, dtype=np.uint16)) for rank in range(3)]
    steps = list(iter_steps(from_batches(OF, parts, source="x"), num_ranks=1))
    assert len(steps) == 10
    for number, step in enumerate(steps):
        expected = np.concatenate([part.experts_TLK[part.step_T == number] for part in parts])
        np.testing.assert_array_equal(step.experts_TLK, expected)


def test_a_stored_trace_is_cut_like_the_one_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.traces.columns.GROUP_ROWS", 17)
    one = from_batches(OF, [batch(OF, 100, step=np.arange(100) // 9)], source="x")
    write_trace(one, tmp_path / "t")
    for size in (None, 13):
        for a, b in zip(
            iter_steps(one, num_ranks=3, tokens_per_step=size), iter_steps(open_trace(str(tmp_path / "t")), num_ranks=3, tokens_per_step=size), strict=True
        ):
            np.testing.assert_array_equal(a.experts_TLK, b.experts_TLK)
            np.testing.assert_array_equal(a.rank_T, b.rank_T)


def test_missing_choices_travel_with_their_tokens() -> None:
    one = batch(OF, 12)
    valid = np.random.Generator(np.random.PCG64(1)).random(one.experts_TLK.shape) < 0.5
    (step,) = iter_steps(from_batches(OF, [replace(one, valid_TLK=valid)], source="x"), num_ranks=2)
    assert step.valid_TLK is not None
    order = np.argsort(np.arange(12) % 4 % 2, kind="stable")
    np.testing.assert_array_equal(step.valid_TLK, valid[order])


def test_a_synthetic_trace_takes_the_tokens_per_step_unless_it_names_its_own() -> None:
    free = list(iter_steps(open_trace("synthetic:balanced,steps=2", shape=OF), num_ranks=4, tokens_per_step=100))
    assert [len(s.rank_T) for s in free] == [100, 100]
    loads = np.bincount(free[0].experts_TLK[:, 0].ravel(), minlength=16)
    assert loads.max() - loads.min() <= 1
    fixed = list(iter_steps(open_trace("synthetic:balanced,steps=2,tokens=60", shape=OF), num_ranks=4, tokens_per_step=100))
    assert [len(s.rank_T) for s in fixed] == [100, 20]


def test_counts_are_replayed_with_the_recorded_shares() -> None:
    generator = np.random.Generator(np.random.PCG64(4))
    # counts of a real top-2 draw: no expert is in more than every token
    counts = np.stack([[np.bincount(generator.choice(16, (5000, 2), p=np.arange(1, 17) / 136).ravel(), minlength=16) for _ in range(3)] for _ in range(2)])
    one = from_counts(OF, counts, ["a", "b"], source="x")
    steps = list(iter_steps(one, num_ranks=4, seed=3))
    assert [len(s.rank_T) for s in steps] == [5000, 5000] and "sampled" in one.routing
    for window, step in enumerate(steps):
        ids = np.sort(step.experts_TLK, axis=2)
        assert (np.diff(ids.astype(int), axis=2) > 0).all()
        for layer in range(3):
            expected = inclusion_E(counts[window, layer], 2) * 5000
            seen = np.bincount(step.experts_TLK[:, layer].ravel(), minlength=16)
            assert (np.abs(seen - expected) < 5 * np.sqrt(expected + 1)).all()
    again = list(iter_steps(one, num_ranks=4, seed=3))
    other = list(iter_steps(one, num_ranks=4, seed=4))
    np.testing.assert_array_equal(steps[0].experts_TLK, again[0].experts_TLK)
    assert (steps[0].experts_TLK != other[0].experts_TLK).any()
    assert [len(s.rank_T) for s in iter_steps(one, num_ranks=4, tokens_per_step=64)] == [64, 64]


def test_counts_that_no_top_k_could_give_are_refused() -> None:
    counts = np.zeros((1, 3, 16), dtype=np.int64)
    counts[:, :, 5] = 100
    with pytest.raises(TraceError, match="positive weight"):
        list(iter_steps(from_counts(OF, counts, ["a"], source="x"), num_ranks=2))


@pytest.mark.parametrize(
    ("text", "size"), [("requests=8", None), ("requests=8", 32), ("requests=8,tokens=64", None), ("requests=8,tokens=64", 16), ("phase=decode", 6)]
)
@pytest.mark.parametrize("ranks", [2, 8, 9])
def test_the_sharding_that_is_announced_is_the_one_used(text: str, size: int | None, ranks: int) -> None:
    one = open_trace(f"synthetic:balanced,steps=2,{text}", shape=OF)
    step = next(iter(iter_steps(one, num_ranks=ranks, tokens_per_step=size)))
    used = "requests" if len(np.unique(step.request_T)) >= ranks else "tokens"
    assert sharding(one, num_ranks=ranks, tokens_per_step=size) == used


@pytest.mark.parametrize(("ranks", "size"), [(0, None), (2, 0), (2, 1 << 30)])
def test_senseless_sizes_are_refused(ranks: int, size: int | None) -> None:
    with pytest.raises(TraceError, match="tokens_per_step"):
        list(iter_steps(trace(OF), num_ranks=ranks, tokens_per_step=size))
