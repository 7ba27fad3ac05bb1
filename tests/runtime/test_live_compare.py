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
