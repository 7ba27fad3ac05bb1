"""A recorded run of a MoE model on two attention replicas that share its experts over PCIe, as LLMServingSim records one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.api.documents import cluster_of, model_of
from moesim.api.served_routing import FAMILIES, served_routing
from moesim.api.serving_deployment import deployment_of, group_with
from moesim.api.validation import validate_run
from moesim.cli.validate import print_run
from moesim.sim.serving.sequences import Work
from moesim.sim.settings import Settings

ENGINE = {
    "model": "Qwen/Qwen3-30B-A3B",
    "tensor_parallel_size": 1,
    "data_parallel_size": 2,
    "enable_expert_parallel": True,
    "max_num_seqs": 128,
    "max_num_batched_tokens": 2048,
    "max_model_len": None,
    "dtype": "bfloat16",
    "kv_cache_dtype": "auto",
    "seed": 42,
}


def made_up(folder: Path, requests: int = 200, **changed: Any) -> Path:
    """Write a run folder with plausible lengths; its times are invented, only its shape matters."""
    generator = np.random.Generator(np.random.PCG64(3))
    at, rows = 0.0, []
    for number in range(requests):
        at += float(generator.exponential(0.1))
        prompt, output = (int(np.clip(generator.lognormal(mean, 0.9), 4, 4000)) for mean in (6.2, 5.2))
        stamps = {"queued_ts": 50.0 + at, "scheduled_ts": 50.0 + at, "first_token_ts": 50.1 + at, "last_token_ts": 50.1 + at + 0.02 * output}
        rows.append({"request_id": f"bench-{number}", "input_toks": prompt, "output_toks": output, "arrival_time": 1.7e9 + at, **stamps})
    folder.mkdir()
    (folder / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    meta = {"schema_version": 1, "model": ENGINE["model"], "vllm_version": "0.19.0", "engine_kwargs": {**ENGINE, **changed}, "num_requests": requests}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def test_it_runs_from_end_to_end_and_says_what_was_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, began = made_up(tmp_path / "run"), time.process_time()
    report = validate_run(folder, hardware="rtx-pro-6000-2")
    assert time.process_time() - began < 6.0, "about one second on an idle core"
    assert report["rows_scored"] == 200
    assert {name: report["deployment"][name] for name in ("tp", "dp", "ep", "expert_tp")} == dict(tp=1, dp=2, ep=2, expert_tp=1)
    assert report["settings"]["serving.all2all"] == "gather", "what vLLM does unless it is given a library of exchange kernels"
    assert report["routing"]["source"] == FAMILIES["Qwen3"] and report["routing"]["use"].startswith("assumed: ")
    assert report["rows_calibrated"] == 0
    at_once = validate_run(folder, hardware="rtx-pro-6000-2", settings={"serving.schedule_ahead": "false"})
    assert at_once["sensitivity"]["ttft"] == pytest.approx(1.0, abs=0.1), "nobody queues"
    assert 1.0 < report["sensitivity"]["ttft"] < 1.6, "who waits for a step more meets more company"
    assert 1.0 < report["sensitivity"]["tpot"] < 2.0, "slower steps have more requests in them"
    assert not any(name.startswith("exchange") for name in report["fallbacks"]), "exchange kernels have no part in it"
    print_run(report)
    said = capsys.readouterr()
    assert "d/d(step time)" in said.out + said.err and "assumed: experts as popular" in said.out + said.err


def test_equal_runs_give_equal_reports(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "run", requests=40)
    first, second = ({key: value for key, value in validate_run(folder, hardware="rtx-pro-6000-2").items() if key != "wall_s"} for _ in range(2))
    assert json.dumps(first) == json.dumps(second)


def test_served_routing_touches_fewer_experts_than_balanced_routing(tmp_path: Path) -> None:
    folder = made_up(tmp_path / "run", requests=40)
    served, even = (validate_run(folder, hardware="rtx-pro-6000-2", requests_trace=one)["tpot"]["predicted_ms"]["mean"] for one in (None, "synthetic:balanced"))
    assert 0.5 * even < served < 0.97 * even


def test_a_faster_link_shortens_what_all_ranks_gather(tmp_path: Path) -> None:
    """Both replicas wait for the exchange in every layer, so NVLink instead of PCIe speeds steps up; without expert parallelism likewise."""
    cluster, model = cluster_of("rtx-pro-6000-2"), model_of("qwen3-30b-a3b")
    settings, group = Settings.parse({"serving.all2all": "gather", "serving.max_num_batched_tokens": "2048"}), group_with(model, tp=1, dp=2, expert_tp=1)
    curves = deployment_of(cluster, model, settings, group=group, routing=served_routing(model)).curves
    exchange = curves._moe["prefill"][0]
    # Each rank sends its 2,048 rows of 2,048 bf16 values and gets as many results back, per layer, over 55 GB/s in each direction; NCCL was measured
    # to reach 30.2 GB/s of it gathering so much and 25.8 GB/s scattering.
    wire = model.num_layers * 2 * 2048 * 2048 * 2 / 55e9
    assert exchange(2048) == pytest.approx(wire / 2 * (55 / 30.2 + 55 / 25.8), rel=0.02)


def test_an_idle_replica_takes_part_in_vain() -> None:
    """A step with one idle replica lasts as long as the busy one's work and the exchange of both; idle replicas add no experts' work."""
    cluster, model = cluster_of("rtx-pro-6000-2"), model_of("qwen3-30b-a3b")
    settings, group = Settings.parse({"serving.all2all": "gather", "serving.max_num_batched_tokens": "2048"}), group_with(model, tp=1, dp=2, expert_tp=1)
    curves = deployment_of(cluster, model, settings, group=group, routing=served_routing(model)).curves
    assert curves.coupled

    def work(decodes: int) -> Work:
        one = Work()
        one.decodes, one.contexts = decodes, 500.0 * decodes
        return one

    alone = curves.step([work(16), work(0)])
    both = curves.step([work(16), work(16)])
    halves = curves.step([work(8), work(8)])
    assert alone.stages < both.stages and alone.exchange + alone.experts < both.exchange + both.experts
    assert alone.exchange + alone.experts >= halves.exchange + halves.experts, "the busiest replica's rows are what the exchange waits for"
    assert alone.stages > halves.stages, "attention of sixteen is not halved by a replica that idles"
