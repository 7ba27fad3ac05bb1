"""A trace is only replayed on a model that it fits, or on layers that the user named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.in_memory import from_counts
from moesim.traces.open import check_fits
from moesim.traces.routing_trace import TraceShape
from tests.traces.helpers import same_rows, shape, trace

OWN = shape(16, 2, 3)
MODEL = TraceShape(model="big", num_experts=16, top_k=2, moe_layer_ids=(3, 4, 5, 6, 7))


def test_an_equal_shape_fits() -> None:
    one = trace(OWN)
    assert check_fits(one, OWN) is one
    renamed = check_fits(one, replace(OWN, model="alias"))
    assert renamed.shape.model == "alias"
    same_rows(one, renamed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 32}, "experts = 16 must be the 32"),
        ({"top_k": 4}, "top-k = 2 must be the 4"),
        ({"moe_layer_ids": (0, 1, 2)}, "3 layers"),
        ({"moe_layer_ids": (1, 2)}, "3 layers"),
    ],
)
def test_what_differs_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        check_fits(trace(OWN), replace(OWN, **change))  # type: ignore[arg-type]


def test_experts_and_top_k_must_agree_even_when_layers_are_mapped() -> None:
    for change in ({"num_experts": 32}, {"top_k": 1}):
        with pytest.raises(TraceError, match="experts|top-k"):
            check_fits(trace(OWN), replace(MODEL, **change), "cycle")  # type: ignore[arg-type]


def test_cycle_repeats_the_layers() -> None:
    one = trace(OWN)
    fitted = check_fits(one, MODEL, "cycle")
    original, mapped = next(one.batches()), next(fitted.batches())
    for row in range(5):
        np.testing.assert_array_equal(mapped.experts_TLK[:, row], original.experts_TLK[:, row % 3])
    assert fitted.shape == MODEL and fitted.fingerprint != one.fingerprint and fitted.provenance["map_layers"] == "cycle"
    np.testing.assert_array_equal(fitted.counts_WLE()[0, 3], one.counts_WLE()[0, 0])


def test_named_layers_are_placed_where_they_are_told() -> None:
    one = trace(OWN)
    fitted = check_fits(one, MODEL, "2:3,1:4,0:5,2:6,1:7")
    for row, source in enumerate((2, 1, 0, 2, 1)):
        np.testing.assert_array_equal(next(fitted.batches()).experts_TLK[:, row], next(one.batches()).experts_TLK[:, source])


def test_counts_are_mapped_like_tokens() -> None:
    counts = np.arange(2 * 3 * 16).reshape(2, 3, 16)
    fitted = check_fits(from_counts(OWN, counts, ["a", "b"], source="x"), MODEL, "cycle")
    np.testing.assert_array_equal(fitted.counts_WLE(), counts[:, [0, 1, 2, 0, 1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0:3", "layers without"),
        ("0:3,1:3", "once"),
        ("3:3", "row < 3"),
        ("0:9", "MoE layer"),
        ("x", "ROW:LAYER"),
        ("0:", "ROW:LAYER"),
        ("-1:3", "ROW:LAYER"),
        ("", "ROW:LAYER"),
    ],
)
def test_a_bad_map_is_refused(text: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        check_fits(trace(OWN), MODEL, text)


@pytest.mark.parametrize(
    "change",
    [
        {"num_experts": 0},
        {"top_k": 17},
        {"moe_layer_ids": ()},
        {"moe_layer_ids": (1, 1)},
        {"moe_layer_ids": (-1,)},
        {"num_groups": 3},
        {"num_groups": 8, "top_k_groups": 0},
        {"num_groups": 16},
    ],
)
def test_an_impossible_shape_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(TraceError, match="shape of toy"):
        replace(OWN, **change)  # type: ignore[arg-type]
