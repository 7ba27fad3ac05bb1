"""`moesim replay --requests` and `moesim validate --run` as users call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.cli.main import main


def call(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = 0
    try:
        main(list(words))
    except SystemExit as end:
        code = int(end.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def report(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    code, out, err = call(capsys, *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def test_requests_drive_a_replay(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["replay", "synthetic:zipf:1.0", "--model", "qwen3-30b-a3b", "--hardware", "h100-sxm-2", "--requests", "synthetic:fixed:20,prompt=50,output=5,n=30"]
    found = report(capsys, *words, "--out", str(tmp_path), "--set", "serving.max_num_seqs=8")
    assert found["schema"] == "moesim.replay/1" and found["requests"]["finished"] == 30
    assert set(found["requests"]["latency_ms"]) == {"mean", "p50", "p95", "p99"} and found["settings"]["serving.max_num_seqs"] == 8
    assert len((tmp_path / "requests.csv").read_text().splitlines()) == 31
    code, out, err = call(capsys, *words)
    assert code == 0 and not out and "ttft" in err and "goodput" in err


def test_a_dense_model_needs_no_routing(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, "replay", "synthetic:balanced", "--model", "llama-3.1-8b", "--hardware", "h100-sxm-1", "--requests", "azure-conv-2023")
    assert found["requests"]["finished"] == 1000 and found["routing"] is None and found["balance"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--requests", "nowhere.csv"], "nowhere.csv: is neither a file of requests nor a shipped one"),
        (["--requests", "azure-conv-2023", "--tokens-per-step", "64"], "do not go with --requests"),
        (["--requests", "azure-conv-2023", "--set", "serving.max_num_seq=4"], "did you mean 'serving.max_num_seqs'"),
    ],
)
def test_wrong_words_end_in_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = call(capsys, "replay", "synthetic:balanced", "--model", "qwen3-30b-a3b", "--hardware", "h100-sxm-2", *words)
    assert (code, out) == (2, "") and message in err and "Traceback" not in err


def test_a_recorded_run_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["validate", "--run", "rtx-pro-6000_llama-3.1-8b", "--model", "llama-3.1-8b", "--hardware", "rtx-pro-6000-1"]
    found = report(capsys, *words)
    assert found["schema"] == "moesim.validate/1" and found["rows_calibrated"] == 0
    assert {"n", "mean_error", "mean_abs_error", "median_abs_error", "p90_abs_error", "p99_error"} <= set(found["ttft"])
    code, out, err = call(capsys, *words)
    assert code == 0 and not out and "d/d(step time)" in err and "peer: LLMServingSim" in err
