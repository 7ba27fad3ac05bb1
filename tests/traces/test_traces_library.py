"""The shipped traces are what their README says, and can be made again by the importer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from moesim.traces.export import export_trace
from moesim.traces.importers import import_trace
from moesim.traces.importers.common import ImportOptions
from moesim.traces.open import library, open_trace
from moesim.traces.routing_trace import concatenate
from moesim.traces.steps import iter_steps, sharding
from moesim.traces.summary import summarise
from moesim.traces.writer import write_trace
from tests.traces.helpers import same_rows


def test_the_library_is_complete() -> None:
    assert list(library()) == ["byte-moe", "flame-moe-290m", "olmoe-1b-7b-counts"]
    notice = (library()["flame-moe-290m"].parent / "NOTICE").read_text()
    for name, folder in library().items():
        provenance = open_trace(name).provenance
        assert name in notice and provenance["licence"] == "Apache-2.0"
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1 << 20
        if name != "byte-moe":  # imported, not recorded here
            assert str(provenance["source"]).split()[-1] in notice  # the commit
            assert "/" not in json.loads((folder / "manifest.json").read_text())["provenance"]["file"]


def test_flame_is_real_top_6_routing_of_eight_sequences() -> None:
    trace = open_trace("flame-moe-290m")
    assert trace.shape.moe_layer_ids == tuple(range(1, 9)) and (trace.shape.num_experts, trace.shape.top_k) == (64, 6)
    rows = concatenate(list(trace.batches()))
    assert len(rows) == 1536 and not trace.is_synthetic and trace.routing == "recorded"
    assert rows.experts_TLK[0, 0].tolist() == [34, 28, 21, 47, 3, 12]
    assert rows.weights_TLK is not None and rows.weights_TLK[0, 0].tolist() == pytest.approx(
        [0.099801, 0.052281, 0.041714, 0.038429, 0.032560, 0.029556], abs=1e-7
    )
    assert (np.diff(rows.weights_TLK, axis=2) <= 0).all()  # best first
    ids = np.sort(rows.experts_TLK.astype(int), axis=2)
    assert (np.diff(ids, axis=2) > 0).all() and ids.max() < 64
    for request in range(8):
        assert rows.position_T[rows.request_T == request].tolist() == list(range(192))
    # neighbours in a sequence share experts; uniform choice would share 6 · 6 / 64 = 0.56
    table = np.zeros((1536, 8, 64), dtype=bool)
    np.put_along_axis(table, rows.experts_TLK.astype(int), True, axis=2)

    def overlap(distance: int) -> float:
        return float((table[distance:] & table[:-distance]).sum(axis=2).mean())

    assert overlap(8) == pytest.approx(1.27, abs=0.01) and overlap(16) == pytest.approx(0.88, abs=0.01) and overlap(1) == pytest.approx(0.62, abs=0.01)


def test_flame_is_dealt_by_request_up_to_eight_ranks() -> None:
    trace = open_trace("flame-moe-290m")
    assert sharding(trace, num_ranks=8) == "requests" and sharding(trace, num_ranks=16) == "tokens"
    (step,) = iter_steps(trace, num_ranks=8)
    assert np.bincount(step.rank_T).tolist() == [192] * 8 and all(len(np.unique(step.request_T[step.rank_T == rank])) == 1 for rank in range(8))


def test_olmoe_counts_are_those_of_six_domains() -> None:
    trace = open_trace("olmoe-1b-7b-counts")
    assert trace.kind == "counts" and trace.shape.moe_layer_ids == (0, 7, 15) and (trace.shape.num_experts, trace.shape.top_k) == (64, 8)
    assert trace.window_names == ("arxiv", "book", "c4", "github", "wikipedia", "tulu")
    counts = trace.counts_WLE()
    assert counts[0, 0, :2].tolist() == [204013, 19281]
    tokens = counts.sum(axis=2) / 8
    assert (tokens[:5] == 208_896).all() and (tokens[5] == 205_243).all()
    (small, *_) = iter_steps(trace, num_ranks=4, tokens_per_step=2000)
    loads = np.bincount(small.experts_TLK[:, 0].ravel(), minlength=64)
    expected = counts[0, 0] / tokens[0, 0] * 2000
    assert (np.abs(loads - expected) < 6 * np.sqrt(expected + 1)).all()


def test_the_shipped_shard_is_what_the_importer_writes(tmp_path: Path) -> None:
    shipped = open_trace("flame-moe-290m")
    export_trace(shipped, "topk-csv", tmp_path / "flame.csv.gz", layer_base=1)
    again = import_trace("topk-csv", tmp_path / "flame.csv.gz", ImportOptions(layer_base=1, interleave=8, experts=64, name="flame-moe-290m"))
    assert again.shape == shipped.shape
    same_rows(shipped, again)
    write_trace(again, tmp_path / "t")
    old, new = (folder / "tokens-00000.parquet" for folder in (library()["flame-moe-290m"], tmp_path / "t"))
    if pq.read_metadata(old).created_by == pq.read_metadata(new).created_by:
        assert old.read_bytes() == new.read_bytes()


def test_a_summary_reports_what_a_plain_count_gives() -> None:
    report = summarise(open_trace("flame-moe-290m"))
    counts = open_trace("flame-moe-290m").counts_WLE("all")[0]
    assert report["imbalance"]["per_layer"] == pytest.approx((counts.max(axis=1) / counts.mean(axis=1)).tolist(), abs=1e-6)
    assert (report["rows"], report["steps"], report["requests"], report["phases"]) == (1536, 1, 8, {"prefill": 1536})
    size = sum(path.stat().st_size for path in library()["flame-moe-290m"].iterdir())
    assert report["bytes"] == size and report["bytes_per_token_layer"] == pytest.approx(size / (1536 * 8), abs=1e-4)


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, moesim.traces.open, moesim.traces.steps, moesim.traces.synth, moesim.traces.writer, moesim.traces.reader\n"
        "import moesim.traces.importers, moesim.traces.transform\n"
        "heavy = {'pyarrow', 'pandas', 'torch', 'numba', 'ortools', 'pulp', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from moesim.traces.open import open_trace\n"
        "list(open_trace('flame-moe-290m').batches())\n"
        "heavy = {'pandas', 'torch', 'pyarrow.dataset'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
