"""Files of end-to-end points that others write: their columns, their gaps."""

from __future__ import annotations

from pathlib import Path

from moesim.api.validation_points_read import read_points

HEADER = "model,engine,isl,osl,concurrency,tp_size,ttft_ms,tpot_ms"


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join((HEADER, *rows)))
    return path


def test_one_token_has_no_time_per_further_token(tmp_path: Path) -> None:
    read = read_points(write(tmp_path / "p.csv", "m,vllm,100,1,4,1,30,12", "m,vllm,100,1,4,1,,12", "m,vllm,100,2,4,1,30,12"))
    assert [(one.ttft_ms, one.tpot_ms) for one in read.points] == [(30, None), (30, 12)]
    assert [one.reason for one in read.refused] == ["no measured times"]
