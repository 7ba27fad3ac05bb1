"""A recorded run as different recorders write it: spellings of degrees, what the engine settled, broken rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moesim.api.validation import validate_run
from moesim.api.validation_run_read import Run, read_run
from moesim.cli.validate import print_run
from moesim.costs.provenance import Provenance
from moesim.errors import InputError

MODEL = "Qwen/Qwen3-30B-A3B-Instruct-2507"


def row(number: int, **changed: Any) -> dict[str, Any]:
    at = 0.2 * number
    stamps = {"queued_ts": 7.0 + at, "first_token_ts": 7.1 + at, "last_token_ts": 7.4 + at}
    return {"request_id": f"bench-{number}", "input_toks": 100, "output_toks": 9, "arrival_time": 1.7e9 + at, **stamps, **changed}


def run(folder: Path, engine: dict[str, Any], *, lines: list[str] | None = None, **meta: Any) -> Path:
    folder.mkdir()
    (folder / "requests.jsonl").write_text("\n".join(lines if lines is not None else [json.dumps(row(number)) for number in range(4)]))
    (folder / "meta.json").write_text(json.dumps({"engine_kwargs": engine, **meta}))
    return folder


def degrees(found: Run) -> tuple[object, ...]:
    return tuple(found.engine.get(key) for key in ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel"))


@pytest.mark.parametrize(
    ("engine", "meta", "meant"),
    [
        ({"tensor_parallel_size": 1, "data_parallel_size": 2, "enable_expert_parallel": True}, {}, (1, 2, True)),
        ({"tp_size": 1, "dp_size": 2, "ep_size": 2}, {}, (1, 2, 2)),
        ({"tp": "2", "dp": 1, "ep": 2}, {}, (2, 1, 2)),
        ({}, {"data_parallel": 2, "expert_parallel": 2}, (None, 2, 2)),
        ({"data_parallel_size": None}, {"resolved_config": {"parallel_config": {"data_parallel_size": 2, "enable_expert_parallel": True}}}, (None, 2, True)),
    ],
)
def test_degrees_have_many_spellings(tmp_path: Path, engine: dict[str, Any], meta: dict[str, Any], meant: tuple[object, ...]) -> None:
    assert degrees(read_run(run(tmp_path / "run", engine, **meta))) == meant


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"data_parallel_size": 2, "dp": 4}, "data_parallel_size and dp = .* must agree"),
        ({"dp_size": 0}, "dp_size = 0 must be an integer in 1..65536"),
        ({"ep_size": "all"}, "ep_size = 'all' must be an integer in 1..65536, or true or false"),
    ],
)
def test_degrees_that_are_none_are_refused(tmp_path: Path, engine: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_run(run(tmp_path / "run", engine))


def test_the_front_end_counts_the_blocks_of_all_replicas(tmp_path: Path) -> None:
    """vLLM adds up the blocks that its data-parallel engines report; `kv_cache_size_tokens` is that of one."""
    engine, cache = {"dp": 2, "block_size": 16}, {"num_gpu_blocks": 75638, "block_size": 16}
    assert read_run(run(tmp_path / "summed", engine, kv_cache=cache)).blocks == 37819
    settled = {"cache_config": {"kv_cache_size_tokens": 605104}}
    assert read_run(run(tmp_path / "settled", engine, kv_cache=cache, resolved_config=settled)).blocks == 37819
    assert read_run(run(tmp_path / "single", {}, kv_cache=cache)).blocks == 75638
    assert read_run(run(tmp_path / "unknown", {})).blocks is None


@pytest.mark.parametrize(
    ("engine", "meta", "ahead"),
    [
        ({}, {"vllm_version": "0.19.0"}, True),
        ({}, {"vllm_version": "0.13.2"}, False),
        ({"async_scheduling": False}, {"vllm_version": "0.19.0"}, False),
        ({}, {"vllm_version": "0.28.0", "resolved_config": {"scheduler_config": {"async_scheduling": False}}}, False),
        ({}, {}, None),
    ],
)
def test_hosts_that_work_ahead_are_known_by_their_version(tmp_path: Path, engine: dict[str, Any], meta: dict[str, Any], ahead: bool | None) -> None:
    folder = run(tmp_path / "run", {"model": MODEL, **engine}, **meta)
    assert read_run(folder).engine.get("async_scheduling") is ahead
    assert validate_run(folder, hardware="rtx-pro-6000-1")["settings"].get("serving.schedule_ahead", False) is bool(ahead)


def test_a_broken_row_stops_nothing_and_is_named(tmp_path: Path) -> None:
    rows = (row(2), row(0, input_toks=100.0), row(1), row(3, output_toks=0), row(4, arrival_time="noon"))
    lines = [*(json.dumps(one) for one in rows), '{"request_id": "cut o']
    found = read_run(run(tmp_path / "run", {}, lines=lines))
    assert [one.id for one in found.requests] == ["bench-0", "bench-1", "bench-2"], "in order of arrival"
    assert found.excluded == {"impossible row": 3} and "line 4: output tokens = 0 must be in" in found.first_excluded


def test_of_two_rows_with_one_name_the_first_counts(tmp_path: Path) -> None:
    found = read_run(run(tmp_path / "run", {}, lines=[json.dumps(one) for one in (row(0), row(1), row(0, input_toks=7))]))
    assert [one.prompt_tokens for one in found.requests if one.id == "bench-0"] == [row(0)["input_toks"]] and len(found.requests) == 2
    assert found.excluded == {"impossible row": 1} and "line 3: request_id = 'bench-0' must be its own" in found.first_excluded


def test_a_file_without_requests_says_what_its_rows_lack(tmp_path: Path) -> None:
    lines = [json.dumps({key: value for key, value in row(0).items() if key != "arrival_time"})]
    with pytest.raises(InputError, match="line 1: arrival_time is missing"):
        read_run(run(tmp_path / "run", {}, lines=lines))


def test_what_is_assumed_and_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = validate_run(run(tmp_path / "run", {"model": MODEL, "max_num_seqs": 8, "enforce_eager": True}), hardware="rtx-pro-6000-1")
    assert report["assumed"] == {"tensor_parallel_size": 1, "data_parallel_size": 1, "enable_expert_parallel": False, "max_num_batched_tokens": 8192}
    print_run(report)
    said = capsys.readouterr().err
    assert "data_parallel_size 1" in said and "not simulated: enforce_eager" in said and "tp 1, dp 1, ep 1" in said


def test_quantized_weights_are_read_faster(tmp_path: Path) -> None:
    engine = {"model": MODEL, "dp": 2, "ep": 2, "max_num_seqs": 8}
    plain, fp8 = (
        validate_run(run(tmp_path / name, engine | more), hardware="rtx-pro-6000-2")["tpot"]["predicted_ms"]["mean"]
        for name, more in (("plain", {}), ("fp8", {"quantization": "fp8"}))
    )
    assert 0.4 * plain < fp8 < 0.9 * plain
    with pytest.raises(InputError, match="quantization = 'awq' is not that of qwen3-30b-a3b"):
        validate_run(run(tmp_path / "awq", engine | {"quantization": "awq"}), hardware="rtx-pro-6000-2")


def test_an_expert_degree_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expert parallel size = 3 must divide the 2 ranks"):
        validate_run(run(tmp_path / "run", {"model": MODEL, "dp": 2, "ep": 3}), hardware="rtx-pro-6000-2")


def test_exchanges_have_a_class_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.api.serving_report._exchange_class", lambda deployment, tokens: Provenance.TRACE)
    report = validate_run(run(tmp_path / "run", {"model": MODEL, "dp": 2, "ep": 2, "max_num_seqs": 8}), hardware="rtx-pro-6000-2")
    assert 0.01 < report["provenance"]["trace"] < 0.5
    assert sum(report["provenance"].values()) == pytest.approx(1.0)


def test_two_cards_exchange_as_two_such_cards_were_measured(tmp_path: Path) -> None:
    report = validate_run(run(tmp_path / "run", {"model": MODEL, "dp": 2, "ep": 2, "max_num_seqs": 8}), hardware="rtx-pro-6000-2")
    assert not {"all_gather", "reduce_scatter"} & set(report["fallbacks"]) and report["provenance"]["roofline"] == 0
