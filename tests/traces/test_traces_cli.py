"""`moesim trace`: every command prints one JSON object, or a table on stderr, and refuses with one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import main
from moesim.traces.open import open_trace
from tests.traces.helpers import same_rows


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["trace", *words])
    code = stop.value.code
    out = capsys.readouterr()
    return 0 if code is None else int(code), out.out, out.err


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    node = json.loads(out)
    assert isinstance(node, dict) and node["schema"].startswith("moesim.trace")
    return node


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    node = report(capsys, "info", "flame-moe-290m")
    assert (node["schema"], node["rows"], node["num_experts"], node["routing"]) == ("moesim.trace-info/1", 1536, 64, "recorded")
    code, out, err = run(capsys, "info", "flame-moe-290m")
    assert code == 0 and out == "" and "flame-moe-290m" in err and "max/mean" in err
    node = report(capsys, "info", "olmoe-1b-7b-counts")
    assert node["windows"][0] == "arxiv" and "sampled" in node["routing"]
    node = report(capsys, "info", "synthetic:balanced,tokens=512", "--model", "flame-moe-290m")
    assert node["imbalance"]["worst"] == 1.0 and node["routing"].startswith("synthetic:balanced")


def test_export_and_import_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, out = tmp_path / "flame.csv.gz", tmp_path / "again"
    report(capsys, "export", "flame-moe-290m", "--format", "topk-csv", "-o", str(table), "--layer-base", "1")
    node = report(
        capsys,
        "import",
        "--format",
        "topk-csv",
        str(table),
        "-o",
        str(out),
        "--model",
        "flame-moe-290m",
        "--layer-base",
        "1",
        "--interleave",
        "8",
        "--provenance",
        "source=here",
    )
    assert node["rows"] == 1536 and "8 sequences alternate" in node["notes"][0]
    same_rows(open_trace("flame-moe-290m"), open_trace(str(out)))
    assert open_trace(str(out)).provenance["source"] == "here"


def test_synth_writes_a_labelled_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = report(
        capsys,
        "synth",
        "zipf:1.0",
        "--model",
        "flame-moe-290m",
        "-o",
        str(tmp_path / "t"),
        "--tokens",
        "300",
        "--steps",
        "2",
        "--seed",
        "5",
        "--phase",
        "decode",
    )
    assert node["rows"] == 600 and node["routing"] == "synthetic:zipf:1,tokens=300,steps=2,requests=300,seed=5,phase=decode"
    assert open_trace(str(tmp_path / "t")).is_synthetic


def test_transform(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = report(
        capsys,
        "transform",
        "flame-moe-290m",
        "-o",
        str(tmp_path / "t"),
        "--layers",
        "1,2",
        "--max-tokens",
        "100",
        "--tokens-per-step",
        "40",
        "--shuffle",
        "layers",
        "--seed",
        "1",
    )
    assert node["rows"] == 100 and node["moe_layer_ids"] == [1, 2]
    assert np.bincount(next(open_trace(str(tmp_path / "t")).batches()).step_T).tolist() == [40, 40, 20]
    node = report(capsys, "transform", "olmoe-1b-7b-counts", "-o", str(tmp_path / "c"), "--model", "olmoe-1b-7b", "--map-layers", "cycle", "--steps", "0:1")
    assert node["moe_layer_ids"] == list(range(16)) and node["rows"] == 2


def test_counts_and_sglang_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report(capsys, "export", "flame-moe-290m", "--format", "sglang", "-o", str(tmp_path / "s.json"), "--model", "flame-moe-290m")
    table = np.array(json.loads((tmp_path / "s.json").read_text())["logical_count"])
    assert table.shape == (9, 64) and table[0].sum() == 0 and table[1].sum() == 1536 * 6
    node = report(capsys, "import", "--format", "counts-json", str(tmp_path / "s.json"), "-o", str(tmp_path / "t"), "--model", "flame-moe-290m")
    assert node["kind"] == "counts" and node["moe_layer_ids"] == list(range(1, 9))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nowhere"], "neither a trace folder"),
        (["info", "synthetic:balanced"], "--model"),
        (["info", "synthetic:balanced", "--model", "llama-3.1-8b"], "no MoE layers"),
        (["import", "--format", "x", "y", "-o", "z"], "must be one of"),
        (["import", "--format", "topk-csv", "y", "-o", "z", "--layer-base", "2"], "must be 0 or 1"),
        (["import", "--format", "counts-csv", "y", "-o", "z", "--where", "model"], "KEY=VALUE"),
        (["export", "flame-moe-290m", "--format", "x", "-o", "z"], "must be one of"),
        (["transform", "flame-moe-290m", "-o", "z", "--map-layers", "cycle"], "--model"),
        (["transform", "flame-moe-290m", "-o", "z", "--steps", "b"], "must be numbers"),
        (["transform", "flame-moe-290m", "-o", "z", "--steps", "3:1"], "FIRST:LAST"),
        (["synth", "zipf", "--model", "flame-moe-290m", "-o", "z"], "parameter"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
