"""Replay with pipeline stages, training, chunks, rounds and interference, end to end."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.errors import CostError, InputError, PlanError
from moesim.model.hf_config import load_model
from moesim.plan import linear
from moesim.traces.open import open_trace
from moesim.traces.transform import apply_rules

FLAME: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-8"}
PREFILL = "synthetic:zipf:0.8,tokens=8192,steps=3,phase=prefill"


def replay(trace: str = PREFILL, **settings: Any) -> api.Replay:
    return api.replay(trace, **FLAME, settings={key.replace("__", "."): str(value) for key, value in settings.items()})


def wanted(stages: int = 2, ranks: int = 4) -> Any:
    model = load_model("flame-moe-290m")
    plan = linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=ranks)
    return replace(plan, parallel=replace(plan.parallel, pp=stages))


def test_two_stages_keep_tokens_balance_and_bytes(tmp_path: Path) -> None:
    one, two = replay(), replay(pipeline__stages=2)
    report = two.report
    assert report["tokens"] == one.report["tokens"] == 3 * 8192 and report["placement"]["ranks"] == 4
    assert (two.load_LE == one.load_LE).all()
    # Balance of a layer is over the four ranks of its stage: that of a plan for four ranks.
    four = api.replay(PREFILL, model="flame-moe-290m", hardware="h100-sxm-4")
    assert report["balance"]["mean_over_max"] == pytest.approx(four.report["balance"]["mean_over_max"], rel=0.02)
    # Half of the layers a rank, with twice the experts of each: less is replicated.
    assert report["memory"]["hbm"] < one.report["memory"]["hbm"]
    sent = 3 * 8192 * 1024 * 2
    assert sum(report["bytes"].values()) - sum(four.report["bytes"].values()) == pytest.approx(sent)
    assert report["breakdown_ms"]["p2p"] > 0 and report["breakdown_ms"]["idle"] > one.report["breakdown_ms"].get("idle", 0.0)
    two.write(tmp_path)
    rows = list(csv.DictReader((tmp_path / "steps.csv").read_text().splitlines()))
    assert len(rows) == 3 and float(rows[0]["p2p_ms"]) > 0
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    layers = {rank: {e["args"]["layer"] for e in events if e["ph"] == "X" and e["pid"] == rank and e["name"] == "experts"} for rank in (0, 7)}
    assert max(layers[0]) < min(layers[7])


def test_a_plan_with_stages_and_the_setting_agree(tmp_path: Path) -> None:
    wanted().write(tmp_path / "plan.json")
    by_plan = api.replay(PREFILL, **FLAME, plan=tmp_path / "plan.json")
    by_setting = replay(pipeline__stages=2)
    for run, name in ((by_plan, "a"), (by_setting, "b")):
        run.write(tmp_path / name)
    assert (tmp_path / "a" / "steps.csv").read_bytes() == (tmp_path / "b" / "steps.csv").read_bytes()
    assert by_plan.report["step_ms"] == by_setting.report["step_ms"] and by_plan.report["memory"] == by_setting.report["memory"]


def test_more_micro_batches_leave_less_bubble_in_large_passes() -> None:
    tokens = "synthetic:balanced,tokens=131072,steps=1,phase=prefill"
    times = [replay(tokens, pipeline__stages=4, pipeline__micro_batches=m).report["step_ms"]["mean"] for m in (1, 4, 16)]
    assert times[0] > 1.5 * times[1] > 1.5 * times[2]


def test_a_training_step_is_forward_backward_gradients_and_optimizer() -> None:
    forward, step = replay(), replay(pipeline__train="true")
    parts, plain = step.report["breakdown_ms"], forward.report["breakdown_ms"]
    assert parts["experts_backward"] == parts["experts_weights"] == pytest.approx(parts["experts"]) == pytest.approx(plain["experts"])
    assert parts["combine_backward"] == pytest.approx(parts["dispatch"], rel=0.1) and parts["dispatch_backward"] == pytest.approx(parts["combine"], rel=0.1)
    assert parts["gradients"] > 0 and parts["optimizer"] > 0
    assert sum(step.report["bytes"].values()) == pytest.approx(2 * sum(forward.report["bytes"].values()))
    assert step.report["memory_by_use"]["hbm"]["training"] > 5 * step.report["memory_by_use"]["hbm"]["weights"]
    assert step.report["provenance"]["extrapolated"] > 0.2 > forward.report["provenance"]["extrapolated"]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "dualpipe"])
def test_schedules_train_on_two_stages(schedule: str) -> None:
    options: dict[str, Any] = {"pipeline__schedule": schedule, "pipeline__virtual": 2 if schedule == "interleaved" else 1}
    report = replay(pipeline__stages=2, pipeline__train="true", pipeline__micro_batches=8, **options).report
    assert report["tokens"] == 3 * 8192 and report["breakdown_ms"]["gradients"] > 0
    assert ("stage_gradients" in report["breakdown_ms"]) == (schedule == "dualpipe")


def test_schedules_rank_as_published() -> None:
    """Large steps on four stages: interleaving shrinks the bubble of 1f1b, which needs less memory than gpipe at the same time."""
    options: dict[str, Any] = {"pipeline__stages": 4, "pipeline__train": "true", "pipeline__micro_batches": 8}
    tokens = "synthetic:balanced,tokens=131072,steps=1,phase=train"
    run = {name: replay(tokens, pipeline__schedule=name, **options).report for name in ("gpipe", "1f1b")}
    run["interleaved"] = replay(tokens, pipeline__schedule="interleaved", pipeline__virtual=2, **options).report
    assert run["interleaved"]["step_ms"]["mean"] < run["1f1b"]["step_ms"]["mean"]
    assert run["1f1b"]["step_ms"]["mean"] == pytest.approx(run["gpipe"]["step_ms"]["mean"], rel=0.05)
    assert run["1f1b"]["memory_by_use"]["hbm"]["activations"] == pytest.approx(run["gpipe"]["memory_by_use"]["hbm"]["activations"] / 2)


def test_chunks_help_large_passes_and_cost_small_ones() -> None:
    large, small = "synthetic:balanced,tokens=131072,steps=1,phase=prefill", "synthetic:balanced,tokens=256,steps=1,phase=decode"
    times = {tokens: [replay(tokens, pipeline__chunks=r).report["step_ms"]["mean"] for r in (1, 2, 8)] for tokens in (large, small)}
    assert times[large][1] < times[large][0] and times[small][2] > times[small][1] > times[small][0]


def test_chunks_move_the_same_bytes() -> None:
    one, four = (replay(pipeline__chunks=r).report["bytes"] for r in (1, 4))
    assert {key: pytest.approx(value) for key, value in one.items()} == four


def test_interference_slows_overlapped_passes_alone() -> None:
    tokens = "synthetic:balanced,tokens=65536,steps=2,phase=prefill"
    alone = [replay(tokens, comm_sm_share=share).report["step_ms"]["mean"] for share in (0.0, 0.3)]
    beside = [replay(tokens, micro_batches=2, comm_sm_share=share).report["step_ms"]["mean"] for share in (0.0, 0.15, 0.3)]
    assert alone[0] == pytest.approx(alone[1], rel=1e-12) and beside[0] < beside[1] < beside[2]


def test_rounds_take_their_rows_of_the_trace() -> None:
    """A trace of eight layers as two rounds of four, on a model of four MoE layers."""
    model = load_model("flame-moe-290m")
    short = replace(model, num_layers=5, moe_layer_ids=model.moe_layer_ids[:4])
    trace = apply_rules(open_trace("flame-moe-290m"), "rounds:2")
    result = api.replay(trace, model=short, hardware="h100-sxm-8", settings={"rounds": "2"})
    plain = api.replay("flame-moe-290m", **FLAME)
    assert (result.load_LE == plain.load_LE).all() and result.report["tokens"] == plain.report["tokens"]
    moved = [run.report["breakdown_ms"] for run in (result, plain)]
    assert moved[0]["experts"] == pytest.approx(moved[1]["experts"]) and moved[0]["attention"] < moved[1]["attention"]
    with pytest.raises(InputError, match="rounds"):
        api.replay(trace, model=short, hardware="h100-sxm-8")
    with pytest.raises(InputError, match="rounds"):
        api.replay("flame-moe-290m", **FLAME, settings={"rounds": "2"})


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"pipeline__stages": 2, "pipeline__train": "true", "pipeline__schedule": "dualpipe", "pipeline__micro_batches": 4}
    for name in ("a", "b"):
        replay(**options).write(tmp_path / name)
    for file in ("metrics.json", "steps.csv", "timeline.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_passes_side_by_side_are_passes_one_by_one() -> None:
    together = replay(pipeline__stages=2).ledger.duration_s
    steps = [replay(PREFILL.replace("steps=3", f"steps={n}"), pipeline__stages=2).ledger.duration_s[-1] for n in (1, 2, 3)]
    assert np.allclose(together, steps, rtol=1e-12)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    wanted().write(tmp_path / "plan.json")
    for settings, error, what in (
        ({"pipeline.stages": "3"}, InputError, "must divide the 8 devices"),
        ({"pipeline.stages": "2", "offload.cache": "lru"}, InputError, "offload"),
        ({"pipeline.stages": "16"}, InputError, "must divide the 8 devices"),
        ({"comm_sm_share": "0.2", "offload.tier": "dram"}, InputError, "another tier"),
        ({"pipeline.stages": "2", "change.balancer": "periodic:2"}, InputError, "plans change"),
    ):
        with pytest.raises(error, match=what):
            api.replay(PREFILL, **FLAME, settings=settings)
    with pytest.raises(InputError, match="one pipeline stage"):
        api.replay(PREFILL, **FLAME, placement="eplb", settings={"pipeline.stages": "2"})
    with pytest.raises(PlanError, match="2 pipeline stages"):
        api.replay(PREFILL, model="flame-moe-290m", hardware="h100-sxm-4", plan=tmp_path / "plan.json")
    with pytest.raises(CostError, match="--strict"):
        api.replay(PREFILL, **FLAME, strict=True, settings={"pipeline.train": "true"})
    split = replace(wanted(1, 8), parallel=replace(wanted(1, 8).parallel, expert_tp=2))
    with pytest.raises(PlanError, match="expert_tp"):
        api.replay(PREFILL, **FLAME, plan=split)


def test_a_training_step_that_does_not_fit_says_what_it_needs() -> None:
    with pytest.raises(PlanError, match="gradients and optimizer"):
        api.replay("synthetic:balanced,tokens=64,steps=1", model="deepseek-v3", hardware="h100-sxm-8x4", settings={"pipeline.train": "true"})
