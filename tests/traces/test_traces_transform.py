"""Transforms keep what they promise to keep, change the rest, and leave a record of themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import DECODE, RoutingTrace, TokenBatch, concatenate
from moesim.traces.transform import shuffle, split_steps, subset
from tests.traces.helpers import batch, shape

OF = shape()


def rows(trace: RoutingTrace) -> TokenBatch:
    return concatenate(list(trace.batches()))


@pytest.fixture
def one() -> RoutingTrace:
    whole = batch(OF, 60, step=np.arange(60) // 10, requests=5)
    phases = np.where(np.arange(60) < 30, 0, DECODE).astype(np.uint8)
    return from_batches(OF, [replace(whole, phase_T=phases).take(slice(start, start + 20)) for start in (0, 20, 40)], source="x")


def test_subset_keeps_exactly_what_is_asked_for(one: RoutingTrace) -> None:
    whole = rows(one)
    cases: list[tuple[dict[str, object], np.ndarray]] = [
        ({"steps": (1, 3)}, (whole.step_T >= 1) & (whole.step_T <= 3)),
        ({"phases": ["decode"]}, whole.phase_T == DECODE),
        ({"requests": 2}, whole.request_T < 2),
        ({"max_tokens": 25}, np.arange(60) < 25),
        ({"steps": (2, 5), "requests": 1, "max_tokens": 3}, np.isin(np.arange(60), [20, 25, 30])),
    ]
    for selection, keep in cases:
        found = rows(subset(one, **selection))  # type: ignore[arg-type]
        np.testing.assert_array_equal(found.experts_TLK, whole.experts_TLK[keep])
        np.testing.assert_array_equal(found.step_T, whole.step_T[keep])
    picked = subset(one, layers=[3, 1])
    assert picked.shape.moe_layer_ids == (1, 3)
    np.testing.assert_array_equal(rows(picked).experts_TLK, whole.experts_TLK[:, [0, 2]])


def test_subset_of_counts(one: RoutingTrace) -> None:
    counts = np.arange(4 * 3 * 16).reshape(4, 3, 16)
    found = subset(from_counts(OF, counts, list("abcd"), source="x"), layers=[2], steps=(1, 2))
    assert found.window_names == ("b", "c")
    np.testing.assert_array_equal(found.counts_WLE(), counts[1:3, 1:2])
    with pytest.raises(TraceError, match="only layers and steps"):
        subset(from_counts(OF, counts, list("abcd"), source="x"), max_tokens=3)


def test_an_empty_or_wrong_selection_is_refused(one: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="leaves no token"):
        subset(one, steps=(90, 99))
    with pytest.raises(TraceError, match="must be among"):
        subset(one, layers=[0])
    with pytest.raises(TraceError, match="must be among"):
        subset(one, phases=["pre-fill"])


def test_split_steps_numbers_steps_anew(one: RoutingTrace) -> None:
    cut = rows(split_steps(one, 25))
    assert np.bincount(cut.step_T).tolist() == [25, 25, 10]
    np.testing.assert_array_equal(cut.experts_TLK, rows(one).experts_TLK)


def test_shuffled_layers_keep_loads_and_lose_links() -> None:
    linked = open_trace("synthetic:markov:1,tokens=600,steps=2,requests=600", shape=OF)
    null = shuffle(linked, "layers", seed=1)
    np.testing.assert_array_equal(linked.counts_WLE(), null.counts_WLE())

    def follows(trace: RoutingTrace) -> float:
        ids = rows(trace).experts_TLK[:, :, 0].astype(int)
        table = np.zeros((16, 16))
        np.add.at(table, (ids[:, 0], ids[:, 1]), 1)
        return float(table.max(axis=1).sum() / table.sum())

    assert follows(linked) == 1.0 and follows(null) < 0.2
    assert null.is_synthetic and "shuffle(layers, seed=1)" in str(null.synthetic) and null.fingerprint != linked.fingerprint
    np.testing.assert_array_equal(rows(null).experts_TLK, rows(shuffle(linked, "layers", seed=1)).experts_TLK)
    assert (rows(null).experts_TLK != rows(shuffle(linked, "layers", seed=2)).experts_TLK).any()


def test_shuffled_order_keeps_whole_tokens_inside_their_step(one: RoutingTrace) -> None:
    mixed = rows(shuffle(one, "order"))
    whole = rows(one)
    for step in range(6):
        before, after = (sorted(row.tobytes() for row in part.experts_TLK[part.step_T == step]) for part in (whole, mixed))
        assert before == after
    assert (mixed.experts_TLK != whole.experts_TLK).any()
    np.testing.assert_array_equal(mixed.request_T, whole.request_T)


def test_transforms_leave_a_record(one: RoutingTrace) -> None:
    twice = shuffle(subset(one, max_tokens=30), "order")
    assert twice.provenance["transforms"] == ["subset(max_tokens=30)", "shuffle(order, seed=0)"]
    assert twice.provenance["derived_from"] == subset(one, max_tokens=30).fingerprint


def test_an_unknown_shuffle_is_refused(one: RoutingTrace) -> None:
    with pytest.raises(TraceError, match="'layers' or 'order'"):
        shuffle(one, "experts")
