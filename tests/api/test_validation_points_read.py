"""Files of end-to-end points that others write: their columns, their gaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim.api.validation_points import validate_points
from moesim.api.validation_points_page import notes
from moesim.api.validation_points_read import Layout, read_points
from moesim.errors import InputError

HEADER = "model,engine,isl,osl,concurrency,tp_size,ttft_ms,tpot_ms"


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join((HEADER, *rows)))
    return path


def test_one_token_has_no_time_per_further_token(tmp_path: Path) -> None:
    read = read_points(write(tmp_path / "p.csv", "m,vllm,100,1,4,1,30,12", "m,vllm,100,1,4,1,,12", "m,vllm,100,2,4,1,30,12"))
    assert [(one.ttft_ms, one.tpot_ms) for one in read.points] == [(30, None), (30, 12)]
    assert [one.reason for one in read.refused] == ["no measured times"]


def test_degrees_and_times_as_benchmarks_name_them(tmp_path: Path) -> None:
    header = "model,engine,random_input_len,random_output_len,max_concurrency,tensor_parallel_size,dp,ep_size,mean_ttft_ms,mean_tpot_ms,note"
    path = tmp_path / "p.csv"
    path.write_text(f"{header}\nm,vllm,100,20,4,1,2,2,30,12,x\n")
    (one,) = (read := read_points(path)).points
    assert (one.prompt, one.output, one.clients, one.ttft_ms, one.tpot_ms) == (100, 20, 4, 30, 12) and one.decode == Layout(1, 2, 1, 1, 2)
    assert read.ignored == ("note",)


def test_one_degree_under_two_names_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("model,isl,osl,tp,tensor_parallel_size,ttft_ms\n")
    with pytest.raises(InputError, match="columns tp and tensor_parallel_size name one degree"):
        read_points(path)


def test_an_engine_that_is_not_known_is_named(tmp_path: Path) -> None:
    report = validate_points(write(tmp_path / "p.csv", "olmoe-1b-7b,tgi,100,8,2,1,30,12", "olmoe-1b-7b,vllm,100,8,2,1,31,12"), hardware="h100-sxm-1")
    assert report["rows_scored"] == 2 and report["engines_assumed"] == {"tgi": 1}
    assert any("engine tgi is not known: 1 rows simulated as vLLM" in line for line in notes(report))


def test_what_is_left_out_is_explained_by_its_first_row(tmp_path: Path) -> None:
    rows = ("nothing-known,vllm,100,8,2,1,30,12", "olmoe-1b-7b,vllm,many,8,2,1,30,12")
    with pytest.raises(InputError, match="no row is left to score.*the first: line 2: model 'nothing-known': is neither in the library"):
        validate_points(write(tmp_path / "none.csv", *rows), hardware="h100-sxm-1")
    report = validate_points(write(tmp_path / "one.csv", *rows, "olmoe-1b-7b,vllm,100,8,2,1,30,12"), hardware="h100-sxm-1")
    assert "excluded: 1 × a cell is no number, the first: line 3: isl = 'many'" in notes(report)
