"""What is exported can be imported again, and what a format cannot hold is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.export import export_trace
from moesim.traces.importers import import_trace
from moesim.traces.importers.common import ImportOptions
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.routing_trace import RoutingTrace
from tests.traces.helpers import batch, same_rows, shape, trace

OF = shape()


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz"])
@pytest.mark.parametrize("base", [0, 1])
def test_topk_csv_round_trip(tmp_path: Path, suffix: str, base: int) -> None:
    one = batch(OF, 40)
    weights = np.random.Generator(np.random.PCG64(0)).random(one.experts_TLK.shape).astype(np.float32)
    held = from_batches(OF, [replace(one, weights_TLK=weights)], source="x")
    path = tmp_path / f"t{suffix}"
    export_trace(held, "topk-csv", path, layer_base=base)
    again = import_trace("topk-csv", path, ImportOptions(layer_base=base, interleave=4, experts=16, name="toy"))
    assert again.shape == OF
    same_rows(held, again)
    first = path.read_bytes()
    export_trace(held, "topk-csv", path, layer_base=base)
    assert path.read_bytes() == first


def test_topk_csv_keeps_steps_ranks_phases_and_gaps(tmp_path: Path) -> None:
    one = batch(OF, 12, step=np.arange(12) // 5, requests=1)
    valid = np.ones(one.experts_TLK.shape, dtype=bool)
    valid[3, 1, 1] = False
    one = replace(
        one,
        valid_TLK=valid,
        rank_T=(np.arange(12) % 3).astype(np.uint16),
        phase_T=(np.arange(12) % 2).astype(np.uint8),
        experts_TLK=np.where(valid, one.experts_TLK, 0).astype(np.uint8),
    )
    held = from_batches(OF, [one], source="x")
    export_trace(held, "topk-csv", tmp_path / "t.csv")
    same_rows(held, import_trace("topk-csv", tmp_path / "t.csv", ImportOptions(experts=16)))


def test_counts_round_trip(tmp_path: Path) -> None:
    for counts in (np.arange(1, 49).reshape(1, 3, 16), np.arange(1, 97).reshape(2, 3, 16)):
        held = from_counts(OF, counts, [f"w{i}" for i in range(len(counts))], source="x")
        export_trace(held, "counts-json", tmp_path / "c.json")
        np.testing.assert_array_equal(import_trace("counts-json", tmp_path / "c.json", ImportOptions(shape=OF)).counts_WLE(), counts)
        notes = export_trace(held, "sglang", tmp_path / "s.json")
        assert "give --model" in notes[0]
        assert export_trace(held, "sglang", tmp_path / "s.json", num_layers=6) == []
        table = np.array(json.loads((tmp_path / "s.json").read_text())["logical_count"])
        assert table.shape[-2:] == (6, 16) and table.ndim == (2 if len(counts) == 1 else 3)
        np.testing.assert_array_equal(import_trace("sglang", tmp_path / "s.json", ImportOptions(shape=OF)).counts_WLE(), counts)
    with pytest.raises(TraceError, match="last MoE layer"):
        export_trace(held, "sglang", tmp_path / "s.json", num_layers=3)


def test_exflow_keeps_the_first_choice(tmp_path: Path) -> None:
    held = trace(OF)
    assert "first of 2" in export_trace(held, "exflow", tmp_path / "trace.npy")[0]
    array = np.load(tmp_path / "trace.npy", allow_pickle=False)
    np.testing.assert_array_equal(array, next(held.batches()).experts_TLK[:, :, 0])


def _with_gap() -> RoutingTrace:
    one = batch(OF, 4)
    valid = np.ones(one.experts_TLK.shape, dtype=bool)
    valid[1, 0] = False
    return from_batches(OF, [replace(one, valid_TLK=valid)], source="x")


def test_what_cannot_be_held_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no first choice"):
        export_trace(_with_gap(), "exflow", tmp_path / "t.npy")
    with pytest.raises(TraceError, match="holds counts"):
        export_trace(from_counts(OF, np.ones((1, 3, 16)), ["a"], source="x"), "topk-csv", tmp_path / "t.csv")
    with pytest.raises(TraceError, match="must be one of"):
        export_trace(trace(OF), "parquet", tmp_path / "t")
    assert list(tmp_path.iterdir()) == []
