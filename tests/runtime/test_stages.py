"""Stage times: the stages of a step follow one another without a gap, are named like profiler ranges, and reach the trace with their maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import linear  # noqa: E402
from moesim.runtime import capture_spool  # noqa: E402
from moesim.runtime.capture_spool import ROW, Spool, publish  # noqa: E402
from moesim.runtime.model import build_distributed  # noqa: E402
from moesim.runtime.spec import ModelSpec  # noqa: E402
from moesim.runtime.stages import StageClock, watch  # noqa: E402
from moesim.traces.manifest import STAGES  # noqa: E402
from moesim.traces.open import open_trace  # noqa: E402
from moesim.traces.routing_trace import TraceShape  # noqa: E402
from tests.runtime.live import CONFIG, write_config  # noqa: E402

TOKENS = 6


def served(folder: Path, **changes: Any) -> tuple[Any, Any, StageClock]:
    from moesim.runtime.spec import read_spec

    spec: ModelSpec = read_spec(str(write_config(folder, **changes)))
    plan = linear(model=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids, num_ranks=1)
    model, layers = build_distributed(spec, plan, rank=0, group=None)
    clock = StageClock()
    watch(model, layers, clock)
    return model, layers, clock


def step(model: Any, clock: StageClock, number: int = 0) -> np.ndarray:
    clock.start()
    with torch.inference_mode():
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
    return clock.take(number)


def test_the_stages_of_a_step_follow_one_another_without_a_gap(tmp_path: Path) -> None:
    model, _, clock = served(tmp_path, mlp_only_layers=[1])
    rows = step(model, clock, 7)
    moe = ("attention", "router", "dispatch", "experts", "combine")
    wanted = [(0, "other"), *((0, name) for name in moe), (1, "attention"), (1, "dense"), *((2, name) for name in moe), (3, "other")]
    assert [(int(row["layer"]), STAGES[row["stage"]]) for row in rows] == wanted
    assert (rows["t_ns"][1:] == rows["t_ns"][:-1] + rows["dur_ns"][:-1]).all() and (rows["step"] == 7).all()
    experts = rows[rows["stage"] == STAGES.index("experts")]
    assert (experts["tokens"] == TOKENS * CONFIG["num_experts_per_tok"]).all()  # type: ignore[operator]
    again = step(model, clock, 8)
    assert len(again) == len(rows) and again["t_ns"][0] >= rows["t_ns"][-1] + rows["dur_ns"][-1]


def test_watching_changes_no_bit_of_the_output(tmp_path: Path) -> None:
    model, layers, clock = served(tmp_path)
    with torch.inference_mode():
        clock.start()
        watched = model(input_ids=torch.arange(TOKENS)[None]).logits
        for layer in layers:
            layer.stages = None
        assert torch.equal(watched, model(input_ids=torch.arange(TOKENS)[None]).logits)


def test_a_profiler_sees_the_stages_by_name(tmp_path: Path) -> None:
    model, _, clock = served(tmp_path)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, clock)
    names = {event.key for event in profile.key_averages()}
    assert {f"moesim/L{layer}/{stage}" for layer in range(3) for stage in ("attention", "router", "dispatch", "experts", "combine")} <= names


def test_stage_times_and_maps_reach_the_trace_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = TraceShape(model="m", num_experts=4, top_k=1, moe_layer_ids=(0,))
    plans = [linear(model="m", num_experts=4, moe_layer_ids=(0,), num_ranks=2, kind=kind) for kind in ("linear", "round_robin")]
    monkeypatch.setattr(capture_spool, "MAX_KERNEL_ROWS", 2 * 3 * 4)
    for rank in range(2):
        spool = Spool(tmp_path / "spool", rank, shape, ranks=2)
        for number in range(6 - rank):
            rows = np.zeros(3, ROW)
            rows["step"], rows["stage"], rows["t_ns"], rows["dur_ns"] = number, [3, 4, 2], 100 * number + np.arange(3), 10 * rank + np.arange(3)
            spool.add(
                step=number, epoch=number // 3, phase=1, requests=np.arange(2), positions=np.arange(2), experts_LNk=[torch.zeros((2, 1), dtype=torch.int64)],
                start_ns=number, end_ns=number + 1, plan=plans[number // 3], stages=rows,
            )  # fmt: skip
        spool.close()
    publish(tmp_path / "spool", 2, shape, tmp_path / "trace", {})
    trace = open_trace(str(tmp_path / "trace"))
    assert trace.tables is not None
    kernels, steps = trace.tables("kernels"), trace.tables("steps")
    assert kernels is not None and steps is not None
    assert len(steps["step"]) == 10 and sorted(set(kernels["step"].tolist())) == [0, 1, 2, 3], "four steps of three rows fit the bound"
    assert (np.diff(kernels["step"].astype(int)) >= 0).all() and sorted(kernels["dur_ns"].tolist()) == sorted([0, 1, 2, 10, 11, 12] * 4)
    assert [trace.facts["parallel"]["plans"][key]["slot_to_expert"] for key in ("0", "1")] == [plan.slot_to_expert_LS.tolist() for plan in plans]


def test_a_live_capture_drives_a_replay_that_takes_the_time_it_took(tmp_path: Path) -> None:
    """What ranks overlap between steps is lost, hence the tolerance; under another map only its loads' stages change."""
    import time

    from moesim import api
    from tests.runtime.live import Live

    live = Live(write_config(tmp_path / "model"), "--trace-out", str(tmp_path / "trace"), ranks=2)
    deadline = time.monotonic() + 60
    while not (tmp_path / "trace").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert live.close() == 0
    model: dict[str, Any] = {"model": str(tmp_path / "model"), "hardware": "laptop-2"}
    run = api.replay(str(tmp_path / "trace"), **model, times="trace", strict=True)
    facts = run.report["times"]
    assert facts["map"] == "recorded" and facts["waits"] == "separated" and facts["work_share"]["recorded"] == 1
    assert facts["recorded_step_ms"]["mean"] * 0.5 < run.report["step_ms"]["mean"] < facts["recorded_step_ms"]["mean"] * 1.2
    other = api.replay(str(tmp_path / "trace"), **model, times="trace", placement="round_robin")
    assert other.report["times"]["work_share"]["rescaled"] > 0
    assert other.report["breakdown_ms"]["attention"] == pytest.approx(run.report["breakdown_ms"]["attention"])
