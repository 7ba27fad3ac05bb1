"""Serving through the API: reports, plans, memory, and a recorded run judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesim import api
from moesim.api.documents import cluster_of, model_of
from moesim.api.serving_deployment import Deployment, deployment_of, group_with, kv_blocks, routing_of
from moesim.api.validation import read_run, shipped_runs, validate_run
from moesim.costs.group import Group
from moesim.errors import InputError, PlanError
from moesim.model import sizes
from moesim.plan import linear
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request
from moesim.traces.requests.open import open_requests

FEW = "synthetic:poisson:8,prompt=100-900,output=20-60,n=60"


def serve(requests: str = FEW, *, trace: str = "synthetic:zipf:0.6", model: str = "qwen3-30b-a3b", hardware: str = "h100-sxm-4", **more: Any) -> dict[str, Any]:
    return api.serve(requests, trace=trace, model=model, hardware=hardware, **more).report


def test_the_report_says_what_was_served() -> None:
    report = serve(settings={"attention_tp": "2", "serving.max_num_seqs": "32", "serving.max_num_batched_tokens": "1024"})
    assert report["schema"] == "moesim.replay/1" and report["deployment"] | {"kv_blocks": 0} == {
        "tp": 2,
        "dp": 2,
        "ep": 4,
        "expert_tp": 1,
        "pp": 1,
        "kv_blocks": 0,
    }
    asked = report["requests"]
    assert asked["finished"] == 60 and set(asked["ttft_ms"]) == {"mean", "p50", "p95", "p99"}
    assert asked["ttft_ms"]["mean"] < asked["latency_ms"]["mean"]
    assert sum(report["provenance"].values()) == pytest.approx(1.0)
    assert report["routing"]["use"] == "loads drawn per batch" and 0 < report["balance"]["mean_over_max"] < 1
    json.dumps(report, allow_nan=False)


def test_routing_decides_the_times() -> None:
    """Many tokens on many ranks wait for the busiest; few tokens on one rank read fewer experts the more alike they choose."""

    def moe(requests: str, hardware: str) -> list[float]:
        traces = ("synthetic:balanced", "synthetic:zipf:0.6", "synthetic:zipf:1.2")
        return [serve(requests, trace=trace, hardware=hardware)["breakdown_ms"]["moe"] for trace in traces]

    many, few = moe("synthetic:closed:800,prompt=64,output=20,n=1600", "h100-sxm-4"), moe("synthetic:closed:8,prompt=1,output=99,n=16", "h100-sxm-1")
    assert many[0] < many[1] < many[2]
    assert few[0] > few[1] > few[2]


def test_a_plan_that_balances_makes_skewed_routing_cheaper() -> None:
    trace = "synthetic:zipf:1.0"
    assert serve(trace=trace, placement="eplb")["breakdown_ms"]["moe"] < serve(trace=trace)["breakdown_ms"]["moe"]


def test_a_plan_for_other_ranks_is_refused() -> None:
    model = model_of("qwen3-30b-a3b")
    plan = linear(model=model.name, num_experts=128, moe_layer_ids=model.moe_layer_ids, num_ranks=8)
    with pytest.raises(PlanError, match="ranks = 8 must be the 4 expert-parallel ranks"):
        serve(plan=plan)


def test_settings_of_traced_passes_are_refused() -> None:
    with pytest.raises(InputError, match="micro_batches = 'a value' acts on traced passes"):
        serve(settings={"micro_batches": "2"})


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match="devices = 4 must divide by 3 stages"):
        serve(settings={"serving.instances": "3"})


def test_twice_the_bandwidth_of_prefill_instances_changes_the_first_token_only_there() -> None:
    mixed = serve(settings={"serving.instances": "4"})
    split = serve(settings={"serving.instances": "2", "serving.prefill_instances": "2"})
    assert split["kv"]["transfers"] == 60 and mixed["kv"]["transfers"] == 0
    assert split["kv"]["transfer_s"] > 0


def test_prefill_instances_may_have_degrees_of_their_own() -> None:
    cluster, model = cluster_of("h100-sxm-8"), model_of("llama-3.1-8b")
    requests = open_requests("synthetic:fixed:2,prompt=4000,output=50,n=20")
    decode = Settings.parse({"serving.prefill_instances": "1", "serving.max_num_seqs": "64"})

    def build(tp: int) -> Deployment:
        return deployment_of(cluster, model, decode, group=group_with(model, tp=tp, dp=1, expert_tp=1), routing=None)

    one, four = build(1), build(4)
    alike, faster = one.run(requests), one.run(requests, prefill=four)
    assert faster.ttft.mean < 0.6 * alike.ttft.mean
    assert faster.transfers == alike.transfers == 20
    assert faster.tpot.mean == pytest.approx(alike.tpot.mean, rel=0.02)


def test_kv_blocks_fill_what_weights_leave() -> None:
    cluster, model = cluster_of("h100-sxm-8"), model_of("llama-3.1-8b")
    chosen = Settings.parse({"serving.max_num_batched_tokens": "2048"}).serving
    blocks = kv_blocks(cluster, model, Group(1, 1, 1, 1, 0), chosen)
    left = 0.9 * cluster.memory.capacity_bytes - sizes.total_weight_bytes(model) - blocks * 16 * sizes.kv_bytes_per_token(model)
    assert 0 < left < 0.3e9 + 16 * sizes.kv_bytes_per_token(model)
    with pytest.raises(PlanError, match="llama-3.1-70b with tp 1, ep 1, pp 1 needs .* use more devices"):
        kv_blocks(cluster, model_of("llama-3.1-70b"), Group(1, 1, 1, 1, 0), chosen)


def test_where_all_layers_have_a_window_they_share_all_that_is_left() -> None:
    cluster, wide = cluster_of("h100-sxm-8"), model_of("llama-3.1-8b")
    chosen = Settings.parse({"serving.max_num_batched_tokens": "2048"}).serving
    narrow = replace(wide, attention=replace(wide.attention, sliding_window=4096, sliding_every=1, sliding_layer_ids=tuple(range(wide.num_layers))))
    assert kv_blocks(cluster, narrow, Group(1, 1, 1, 1, 0), chosen) == kv_blocks(cluster, wide, Group(1, 1, 1, 1, 0), chosen)


def test_files_are_the_same_for_equal_runs(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        served = api.serve(FEW, trace="synthetic:zipf:0.6", model="qwen3-30b-a3b", hardware="h100-sxm-4", keep_rows=True)
        assert [path.name for path in served.write(folder)] == ["metrics.json", "requests.csv"]
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in ("metrics.json", "requests.csv"))
    assert len((folders[0] / "requests.csv").read_text().splitlines()) == 61


# --- a recorded run -------------------------------------------------------------------------------------------------


def record(folder: Path, deployment: Deployment, engine: dict[str, Any], delay: float = 1.0) -> Path:
    """Write what a deployment would have measured, its times stretched by `delay`."""
    rows: list[dict[str, Any]] = []

    def note(request: Request, arrival: float, queued: float, first: float, end: float) -> None:
        stamps = {"queued_ts": 100 + queued, "first_token_ts": 100 + queued + (first - queued) * delay, "last_token_ts": 100 + queued + (end - queued) * delay}
        lengths = {"input_toks": request.prompt_tokens, "output_toks": request.output_tokens}
        rows.append({"request_id": request.id, "arrival_time": 1.7e9 + arrival, **lengths, **stamps})

    deployment.run(open_requests("synthetic:poisson:20,prompt=100-900,output=20-60,n=80"), on_finish=note)
    folder.mkdir()
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps({"engine_kwargs": engine}))
    return folder


@pytest.fixture(scope="module")
def two_ranks() -> tuple[Deployment, dict[str, Any]]:
    """Qwen3-30B-A3B on two replicas that share the experts."""
    cluster, model = cluster_of("h100-sxm-2"), model_of("qwen3-30b-a3b")
    engine = {"model": "qwen3-30b-a3b", "data_parallel_size": 2, "enable_expert_parallel": True, "max_num_seqs": 16, "max_num_batched_tokens": 512, "seed": 1}
    settings = Settings.parse({"serving.max_num_seqs": "16", "serving.max_num_batched_tokens": "512", "serving.all2all": "gather"})
    routing = routing_of("synthetic:balanced", model)
    return deployment_of(cluster, model, settings, group=group_with(model, tp=1, dp=2, expert_tp=1), routing=routing), engine


def test_a_run_of_the_simulator_itself_has_no_error(tmp_path: Path, two_ranks: tuple[Deployment, dict[str, Any]]) -> None:
    report = validate_run(record(tmp_path / "run", *two_ranks), hardware="h100-sxm-2", requests_trace="synthetic:balanced")
    assert report["schema"] == "moesim.validate/1" and report["deployment"] | {"kv_blocks": 0} == {
        "tp": 1,
        "dp": 2,
        "ep": 2,
        "expert_tp": 1,
        "pp": 1,
        "kv_blocks": 0,
    }
    for name in ("ttft", "tpot", "latency", "throughput"):
        assert abs(report[name]["mean_error"]) < 1e-3 and abs(report[name]["p99_error"]) < 1e-3, name
    assert report["rows_scored"] == 80 and report["rows_calibrated"] == 0 and report["rows_excluded"] == {}
    assert report["routing"]["source"].startswith("synthetic:balanced") and report["ignored"] == ["seed"]
    assert report["sensitivity"]["latency"] >= 1.0


def test_the_sign_of_an_error_is_that_of_prediction_minus_measurement(tmp_path: Path, two_ranks: tuple[Deployment, dict[str, Any]]) -> None:
    report = validate_run(record(tmp_path / "run", *two_ranks, delay=1.25), hardware="h100-sxm-2", requests_trace="synthetic:balanced")
    assert report["ttft"]["mean_error"] == pytest.approx(-0.2, abs=1e-3)
    assert report["latency"]["p99_error"] == pytest.approx(-0.2, abs=1e-3)
    assert report["tpot"]["median_abs_error"] == pytest.approx(0.2, abs=1e-3)


def test_impossible_rows_are_left_out_and_listed(tmp_path: Path, two_ranks: tuple[Deployment, dict[str, Any]]) -> None:
    folder = record(tmp_path / "run", *two_ranks)
    lines = (folder / "requests.jsonl").read_text().splitlines()
    broken = [
        json.dumps(json.loads(lines[0]) | {"request_id": "x", "output_toks": -3}),
        json.dumps(json.loads(lines[0]) | {"request_id": "y", "last_token_ts": None}),
    ]
    (folder / "requests.jsonl").write_text("\n".join([*lines, *broken]))
    assert validate_run(folder, hardware="h100-sxm-2")["rows_excluded"] == {"impossible row": 1, "no measured times": 1}


def test_too_few_devices_and_missing_files_are_named(tmp_path: Path, two_ranks: tuple[Deployment, dict[str, Any]]) -> None:
    folder = record(tmp_path / "run", *two_ranks)
    with pytest.raises(PlanError, match="devices = 1 must be >= 2"):
        validate_run(folder, hardware="h100-sxm-1")
    with pytest.raises(InputError, match="shipped: .*rtx-pro-6000_llama-3.1-8b"):
        read_run(tmp_path / "nothing")
    (folder / "meta.json").write_text("{}")
    with pytest.raises(InputError, match="engine_kwargs is missing"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "hardware", "ttft"), [("rtx-pro-6000_llama-3.1-8b", "rtx-pro-6000-1", 0.05), ("rtx-pro-6000_qwen3-32b-tp2", "rtx-pro-6000-2", 0.08)]
)
def test_the_shipped_runs_are_predicted(name: str, hardware: str, ttft: float) -> None:
    """On one card, and tensor-parallel over PCIe with a queue that grows for half of the run."""
    assert name in shipped_runs()
    report = validate_run(name, hardware=hardware)
    assert report["rows_scored"] == 300 and report["routing"] is None
    for quantity, bound in (("ttft", ttft), ("tpot", 0.05), ("latency", 0.05)):
        assert abs(report[quantity]["mean_error"]) <= bound and abs(report[quantity]["p99_error"]) <= 0.06, quantity
    assert 1.2 < report["sensitivity"]["ttft"] < 4.0


def test_small_times_to_the_first_token_show_that_batches_are_chosen_ahead() -> None:
    """The first 128 requests of the run wait for steps, not for others: with batches chosen at the end of a step their times are a third too short."""
    ahead, late = (
        validate_run("rtx-pro-6000_llama-3.1-8b", hardware="rtx-pro-6000-1", settings={"serving.schedule_ahead": value})["ttft"]["p90_abs_error"]
        for value in ("true", "false")
    )
    assert ahead < 0.2 and late > 0.4
