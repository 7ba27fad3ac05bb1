"""Trace statistics: the report says what the arrays hold, files repeat byte for byte, and what a trace lacks is left out."""

from __future__ import annotations

import csv
import json
import math
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

from moesim import api
from moesim.cli.main import main
from moesim.errors import InputError


@pytest.fixture(scope="module")
def found() -> api.TraceStatistics:
    traces = [f"synthetic:topics:4,tokens=1024,seed={seed}" for seed in (1, 2, 3)]
    return api.trace_statistics(traces, model="flame-moe-290m", hardware="h100-sxm-8", max_tokens=1024)


def test_the_report_is_what_the_arrays_hold(found: api.TraceStatistics) -> None:
    report = found.report
    assert report["schema"] == "moesim.trace-stats/1" and report["synthetic"] and report["tokens"] == pytest.approx(3 * 1024)
    assert [row["layer"] for row in report["load"]["layers"]] == report["moe_layer_ids"]
    assert report["load"]["gini"] == pytest.approx(found.curves.gini_L.mean())
    assert found.drift is not None and report["drift"]["transfer"] == found.drift.transfer_KK.tolist()  # type: ignore[union-attr]
    own = [report["drift"]["transfer"][index][index] for index in range(3)]
    assert all(own[column] >= report["drift"]["transfer"][row][column] for row in range(3) for column in range(3))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_affinity_stands_beside_its_null(found: api.TraceStatistics) -> None:
    affinity = found.report["affinity"]
    assert affinity["information_bits"] > 2 * affinity["null_information_bits"] and len(affinity["rows"]) == len(found.report["moe_layer_ids"]) - 1
    assert found.report["coactivation"]["information_bits"] > found.report["coactivation"]["null_information_bits"]


def test_no_number_of_slots_reaches_more_than_its_bound(found: api.TraceStatistics) -> None:
    rows = found.report["redundancy"]
    assert rows[0]["extra_slots"] == 0 and len(rows) > 3
    assert all(row["balance_reached"] <= row["balance_bound"] * (1 + 1e-9) for row in rows)


def test_files_repeat_byte_for_byte_and_hold_the_tables(found: api.TraceStatistics, tmp_path: Path) -> None:
    first, second = (found.write(tmp_path / name) for name in ("one", "two"))
    assert {path.name for path in first} == {
        *("stats.json", "layers.csv", "drift.csv", "affinity.csv", "coactivation.csv", "redundancy.csv"),
        *("load_curves.svg", "drift.svg", "affinity.svg", "redundancy.svg"),
    }
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert json.loads((tmp_path / "one/stats.json").read_text()) == found.report
    table = list(csv.DictReader((tmp_path / "one/redundancy.csv").read_text().splitlines()))
    assert [float(row["balance_reached"]) for row in table] == pytest.approx([row["balance_reached"] for row in found.report["redundancy"]], rel=1e-4)
    assert all(xml.parse(path).getroot().tag.endswith("svg") for path in first if path.suffix == ".svg")


def test_what_is_not_there_is_left_out(tmp_path: Path) -> None:
    counts = api.trace_statistics("olmoe-1b-7b-counts", model="olmoe-1b-7b")
    assert counts.report["moe_layer_ids"] == [0, 7, 15]
    assert counts.report["affinity"] is counts.report["redundancy"] is counts.inter_layer is None
    assert counts.drift is not None and counts.drift.transfer_KK is None and counts.report["drift"]["transfer_loss"] is None
    assert "redundancy.svg" not in {path.name for path in counts.write(tmp_path)}
    single = api.trace_statistics("flame-moe-290m", model="flame-moe-290m", max_tokens=100)
    assert single.report["drift"] is None and not math.isnan(single.report["affinity"]["information_bits"])
    with pytest.raises(InputError, match="max_tokens"):
        api.trace_statistics("flame-moe-290m", model="flame-moe-290m", max_tokens=0)


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command_prints_one_object_or_tables(as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["trace", "stats", "flame-moe-290m", "--model", "flame-moe-290m", "--hardware", "h100-sxm-8", "--max-tokens", "200", "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *(["--json"] if as_json else [])])
    said = capsys.readouterr()
    assert stopped.value.code == 0
    if as_json:
        assert len(json.loads(said.out)["files"]) == len(list((tmp_path / "s").iterdir()))
    else:
        assert said.out == "" and "what a choice tells about another" in said.err and "redundant slots" in said.err
