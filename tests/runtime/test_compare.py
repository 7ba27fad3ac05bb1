"""Prediction beside measurement: what is equal shows no error, what differs shows its sign, and a plan that never ran is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.errors import InputError, TraceError
from moesim.files import canonical_json, sha256_hex
from moesim.model.hf_config import load_model
from moesim.plan import Plan, linear
from moesim.traces.manifest import STAGES
from moesim.traces.routing_trace import TokenBatch
from moesim.traces.writer import TraceWriter
from tests.runtime.live import EXPERTS, LAYERS, moesim, write_config

RANKS, TOP_K, TOKENS = 2, 4, 12
STEP_NS = 5_000_000


def plan_of(kind: str, model: str = "model") -> Plan:
    return linear(model=model, num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=RANKS, kind=kind)


def stamped(plan: Plan) -> dict[str, Any]:
    content = plan.content()
    return {**content, "sha256": sha256_hex(canonical_json(content))}


def record(
    folder: Path, plans: list[Plan], *, steps_each: int = 4, seed: int = 0, kernels: bool = True, extra_rows: int = 0, tool: str = "moesim test"
) -> Path:
    """Write a run of `RANKS` ranks, `steps_each` steps under every plan, with the counts and times that it would have."""
    rng = np.random.Generator(np.random.PCG64(seed))
    model = load_model(str(folder.parent / "config.json"))
    shape = api.trace_shape(model)
    hot = rng.permutation(EXPERTS)
    steps: dict[str, list[int]] = {name: [] for name in ("step", "rank", "map_epoch", "n_prefill", "n_decode", "t_start_ns", "t_end_ns")}
    rows: dict[str, list[int]] = {name: [] for name in ("step", "rank", "layer", "stage", "t_ns", "dur_ns", "bytes", "tokens")}
    facts = {
        "parallel": {"ep": RANKS, "dp": RANKS, "tp": 1, "plans": {str(epoch): stamped(plan) for epoch, plan in enumerate(plans)}},
        "clock": "CLOCK_MONOTONIC",
    }
    with TraceWriter(folder, shape, provenance={"tool": tool}, facts=facts) as writer:
        for step in range(steps_each * len(plans)):
            epoch, phase = step // steps_each, step % 2
            ids = np.empty((TOKENS * RANKS, len(LAYERS), TOP_K), np.uint8)
            for token in range(len(ids)):
                for layer in range(len(LAYERS)):
                    weight = 1.0 / (1 + np.argsort(hot))
                    ids[token, layer] = rng.choice(EXPERTS, TOP_K, replace=False, p=weight / weight.sum())
            rank_T = np.repeat(np.arange(RANKS), TOKENS)
            writer.append(
                TokenBatch(
                    step_T=np.full(len(ids), step, np.uint32), rank_T=rank_T.astype(np.uint16), request_T=np.arange(len(ids), dtype=np.uint64),
                    position_T=np.full(len(ids), step, np.uint32), phase_T=np.full(len(ids), phase, np.uint8), experts_TLK=ids,
                )
            )  # fmt: skip
            start = 1000 + step * STEP_NS
            home = plans[epoch].slot_rank_S[np.argsort(plans[epoch].slot_to_expert_LS, axis=1)]
            for rank in range(RANKS):
                for name, value in zip(steps, (step, rank, epoch, TOKENS * (1 - phase), TOKENS * phase, start, start + STEP_NS), strict=True):
                    steps[name].append(value)
                at = start
                for layer in LAYERS:
                    to = home[layer][ids[:, layer]]
                    handled, sent = int((to == rank).sum()) + extra_rows, int((to[rank_T == rank] != rank).sum())
                    back = int((to[rank_T != rank] == rank).sum())
                    for stage, moved in (("attention", 0), ("router", 0), ("dispatch", sent), ("experts", 0), ("combine", back)):
                        values = (step, rank, layer, STAGES.index(stage), at, 100_000, moved * model.hidden_size * 4, handled if stage == "experts" else 0)
                        for name, value in zip(rows, values, strict=True):
                            rows[name].append(value)
                        at += 100_000
        writer.add_table("steps", {name: np.array(values) for name, values in steps.items()})
        if kernels:
            writer.add_table("kernels", {name: np.array(values) for name, values in rows.items()})
    return folder


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    write_config(tmp_path)
    return {"model": str(tmp_path / "config.json"), "hardware": "laptop-2"}


def test_a_run_under_one_map_has_no_error_in_what_is_counted(tmp_path: Path, run: dict[str, Any]) -> None:
    report = api.compare(str(record(tmp_path / "t", [plan_of("linear")])), **run)
    assert report["schema"] == "moesim.compare/1" and report["basis"] == "same steps" and report["settings"] == {"dispatch": "low_latency"}
    load = report["rank_load"]
    assert load["measured_from"] == "counts of the ranks" and load["mean_abs_error"] == pytest.approx(0.0, abs=1e-12)
    assert load["balance"]["error"] == pytest.approx(0.0, abs=1e-12) and report["bytes_per_token"]["error"] == pytest.approx(0.0, abs=1e-12)
    assert sum(map(sum, ([layer["measured_R"] for layer in load["layers"]]))) == pytest.approx(TOP_K * len(LAYERS))


def test_step_times_are_those_of_the_stages_with_a_signed_error(tmp_path: Path, run: dict[str, Any]) -> None:
    report = api.compare(str(record(tmp_path / "t", [plan_of("linear")])), **run)
    wall = 5 * len(LAYERS) * 0.1
    for phase in ("all", "prefill", "decode"):
        for figure in ("mean", "p50", "p95"):
            one = report["step_ms"][phase][figure]
            assert one["measured"] == pytest.approx(wall) and one["error"] == pytest.approx((one["predicted"] - wall) / wall)
    assert report["step_ms"]["all"]["mean"]["error"] < 0, "the laptop of the library is faster than 0.1 ms a stage"
    assert report["stages_ms"]["attention"]["measured"] == pytest.approx(0.1 * len(LAYERS))


def test_without_stage_times_steps_and_routes_speak(tmp_path: Path, run: dict[str, Any]) -> None:
    report = api.compare(str(record(tmp_path / "t", [plan_of("linear")], kernels=False)), **run)
    assert report["rank_load"]["measured_from"] == "routes and recorded map" and report["rank_load"]["mean_abs_error"] == pytest.approx(0.0, abs=1e-12)
    assert report["step_ms"]["all"]["mean"]["measured"] == pytest.approx(STEP_NS / 1e6) and report["bytes_per_token"]["measured"] is None


def test_after_an_apply_the_prediction_knows_only_the_steps_before(tmp_path: Path, run: dict[str, Any]) -> None:
    before, after = plan_of("linear"), plan_of("round_robin")
    trace = record(tmp_path / "t", [before, after], steps_each=6)
    after.write(tmp_path / "plan.json")
    report = api.compare(str(trace), plan=tmp_path / "plan.json", **run)
    assert report["basis"] == "steps before" and report["steps"] == {"predicted": 6, "measured": 6}
    assert 0 < report["rank_load"]["mean_abs_error"] < 0.2, "other steps, same habits"
    first = api.compare(str(trace), plan=before, **run)
    assert first["basis"] == "same steps" and first["rank_load"]["mean_abs_error"] == pytest.approx(0.0, abs=1e-12)
    rescaled = api.compare(str(trace), plan=after, times="trace", settings={}, **run)
    measured = rescaled["step_ms"]["all"]["mean"]["measured"]
    assert rescaled["step_ms"]["all"]["mean"]["predicted"] == pytest.approx(measured, rel=0.3)


def test_a_second_trace_is_what_is_measured(tmp_path: Path, run: dict[str, Any]) -> None:
    before, after = plan_of("linear"), plan_of("round_robin")
    first, second = record(tmp_path / "t", [before]), record(tmp_path / "u", [after], seed=1)
    report = api.compare(str(first), after=str(second), plan=after, **run)
    same = api.compare(str(second), plan=after, **run)
    assert report["basis"] == "other trace"
    assert [layer["measured_R"] for layer in report["rank_load"]["layers"]] == [layer["measured_R"] for layer in same["rank_load"]["layers"]]
    assert [layer["predicted_R"] for layer in report["rank_load"]["layers"]] != [layer["predicted_R"] for layer in same["rank_load"]["layers"]]


def test_ranks_that_counted_more_than_was_routed_are_seen(tmp_path: Path, run: dict[str, Any]) -> None:
    report = api.compare(str(record(tmp_path / "t", [plan_of("linear")], extra_rows=6)), **run)
    assert report["rank_load"]["mean_abs_error"] > 0.05 and report["rank_load"]["worst_error"] < 0


def test_a_plan_that_never_ran_is_refused(tmp_path: Path, run: dict[str, Any]) -> None:
    trace = str(record(tmp_path / "t", [plan_of("linear")]))
    with pytest.raises(InputError, match="--after"):
        api.compare(trace, plan=plan_of("round_robin"), **run)
    with pytest.raises(TraceError, match="steps"):
        api.compare("synthetic:zipf:1.0", **run)


def test_a_foreign_trace_keeps_the_default_exchange(tmp_path: Path, run: dict[str, Any]) -> None:
    report = api.compare(str(record(tmp_path / "t", [plan_of("linear")], tool="another")), **run)
    assert report["settings"] == {}


def test_the_command_prints_one_object_or_a_table(tmp_path: Path, run: dict[str, Any]) -> None:
    trace = str(record(tmp_path / "t", [plan_of("linear")]))
    flags = ("--model", run["model"], "--hardware", run["hardware"])
    found = moesim("compare", trace, *flags, "--json")
    assert found.returncode == 0 and json.loads(found.stdout)["schema"] == "moesim.compare/1"
    shown = moesim("compare", trace, *flags)
    assert shown.returncode == 0 and shown.stdout == "" and "step ms, decode, p95" in shown.stderr
    other = replace(plan_of("round_robin"), source="p")
    other.write(tmp_path / "other.json")
    refused = moesim("compare", trace, *flags, "--plan", str(tmp_path / "other.json"))
    assert refused.returncode == 2 and "--after" in refused.stderr


def test_a_captured_run_is_scored_against_its_own_steps_stage_by_stage(tmp_path: Path, run: dict[str, Any]) -> None:
    trace = str(record(tmp_path / "t", [plan_of("linear")]))
    beside = api.compare(trace, **run)
    flags = ("--model", run["model"], "--hardware", run["hardware"])
    found = moesim("validate", "--run", trace, *flags, "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["schema"] == "moesim.validate/1" and report["rows_scored"] == 4 and report["rows_calibrated"] == 0
    assert report["step"]["mean_error"] == beside["step_ms"]["all"]["mean"]["error"] and report["step_decode"]["p50_error"] is not None
    assert set(report["stages_ms"]) == {"attention", "router", "dispatch", "experts", "combine", "other"} and report["stages_ms"] == beside["stages_ms"]
    shown = moesim("validate", "--run", trace, *flags)
    assert shown.returncode == 0 and "step_decode, p50" in shown.stderr and "dispatch" in shown.stderr
    refused = moesim("validate", "--run", trace, "--hardware", run["hardware"])
    assert refused.returncode == 2 and "--model" in refused.stderr
