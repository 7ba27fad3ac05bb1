"""The loop closed: a deployment serves, a plan is applied, and its trace shows the prediction beside what the ranks counted afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import linear
from tests.runtime.live import EXPERTS, LAYERS, Live, moesim, write_config


def test_after_an_apply_prediction_and_counts_of_the_ranks_are_side_by_side(tmp_path: Path) -> None:
    model = write_config(tmp_path / "model")
    plan = linear(model="model", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=2, kind="round_robin")
    live = Live(model, "--trace-out", str(tmp_path / "trace"), "--window", "17", ranks=2)
    try:
        applied = live.apply(plan)
        time.sleep(1.0)
        now = moesim("compare", live.control, "--model", str(model), "--hardware", "laptop-2", "--steps", "24", "--json")
        refused = moesim("compare", live.control, "--model", str(model), "--hardware", "laptop-2", "--times", "trace")
    finally:
        assert live.close() == 0
    assert applied.returncode == 0, applied.stderr
    found = moesim(
        "compare", str(tmp_path / "trace"), "--model", str(model), "--hardware", "laptop-2", "--plan", str(tmp_path / "model" / "plan.json"), "--json"
    )
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["basis"] == "steps before" and report["map_sha256"] == plan.map_sha256 == json.loads(applied.stdout)["map_sha256"]
    load = report["rank_load"]
    assert load["measured_from"] == "counts of the ranks" and abs(load["balance"]["error"]) < 0.1 and load["mean_abs_error"] < 0.15
    assert abs(report["bytes_per_token"]["error"]) < 0.1 and report["step_ms"]["all"]["mean"]["measured"] > 0
    assert now.returncode == 0, now.stderr
    while_serving = json.loads(now.stdout)
    assert set(while_serving) == set(report) and while_serving["map_sha256"] == plan.map_sha256 and while_serving["basis"] == "steps before"
    load = while_serving["rank_load"]
    assert load["measured_from"] == "counts of the ranks" and abs(load["balance"]["error"]) < 0.15 and load["mean_abs_error"] < 0.2
    assert sum(sum(layer["measured_R"]) for layer in load["layers"]) == pytest.approx(4 * len(LAYERS)), "every token goes to top-k experts in every layer"
    assert abs(while_serving["bytes_per_token"]["error"]) < 0.15 and 0 < while_serving["steps"]["measured"] <= 24
    assert while_serving["tokens"]["predicted"] == while_serving["tokens"]["measured"]
    assert all(one["measured"] > 0 for one in while_serving["stages_ms"].values()) and while_serving["step_ms"]["all"]["mean"]["measured"] > 0
    assert refused.returncode == 2 and "--times" in refused.stderr
