"""Measured closed loops: what is repaired, what is left out and why, and what errors amount to."""

from __future__ import annotations

import csv
import gzip
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.api.documents import model_of
from moesim.api.error_summary import error_summary
from moesim.api.published.loads import SKEW
from moesim.api.served_routing import served_routing
from moesim.api.validation_points import calibrates, excluded, validate_points, without_copies
from moesim.api.validation_points_fit import fit_overheads
from moesim.api.validation_points_page import write_page
from moesim.api.validation_points_read import Layout, Point, read_points, shipped_points, unfold
from moesim.api.validation_points_run import Overhead, Overheads, Runner, read_overheads
from moesim.api.validation_points_scores import choice, error_floor, kendall, ranking, throughput
from moesim.errors import InputError
from moesim.sim.serving.instance import Instance
from moesim.traces.open import open_trace

HEADER = (
    "id,backend,backend_version,model_path,mode,isl,osl,gemm_quant_mode,batch_size,tp_size,pp_size,attention_dp_size,moe_tp_size,moe_ep_size,"
    "silicon_ttft_ms,silicon_tpot_ms"
)
PLAIN = "2026_01_01_x_c4_{n},vllm,1,llama-3.1-8b,agg,256,32,,4,1,1,1,1,1,{ttft},{tpot}"
NONE = Overheads()


def write(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def point(**more: Any) -> Point:
    base: dict[str, Any] = {"id": "2026_01_01_a", "model": "m", "backend": "vllm", "version": "1", "weights": "", "prompt": 100, "output": 10, "clients": 4}
    return Point(**{**base, "decode": Layout(1, 1, 1, 1, 1), "ttft_ms": 10.0, "tpot_ms": 1.0, **more})


@pytest.mark.parametrize(
    ("stored", "meant"),
    [
        (Layout(4, 4, 1, 1, 16), Layout(4, 1, 1, 1, 4)),  # tp4_ep4, stored as tp4 dp4 ep16
        (Layout(1, 8, 1, 8, 8), Layout(1, 8, 1, 1, 8)),
        (Layout(8, 1, 1, 1, 8), Layout(8, 1, 1, 1, 8)),
        (Layout(8, 1, 1, 8, 1), Layout(8, 1, 1, 8, 1)),
        (Layout(4, 1, 1, 1, 1), Layout(4, 1, 1, 1, 1)),
    ],
)
def test_degrees_stored_as_products_are_undone(stored: Layout, meant: Layout) -> None:
    assert unfold(stored) == meant
    assert unfold(meant) == meant


def test_only_rows_of_that_collection_are_undone(tmp_path: Path) -> None:
    row = "{id},vllm,1,minimax-m2.5,agg,1024,64,fp8,1,4,1,4,1,16,100,10"
    read = read_points(write(tmp_path / "p.csv", [row.format(id="2026_04_06_a_c4_tp4_ep4_1"), row.format(id="mine_c4_x")]))
    assert [one.decode for one in read.points] == [Layout(4, 1, 1, 1, 4), Layout(4, 4, 1, 1, 16)]
    assert read.points[0].repairs and not read.points[1].repairs


def test_clients_come_from_the_id_else_from_the_batch(tmp_path: Path) -> None:
    rows = [
        "run_c32_tp1,vllm,1,m,agg,10,10,,8,1,1,4,1,1,1,1",
        "run_tp1,vllm,1,m,agg,10,10,,8,1,1,4,1,1,1,1",
        "run_c_tp1,vllm,1,m,agg,10,10,,8,1,1,4,1,1,1,1",
        "run_c192_tp4,vllm,1,m,agg,10,10,,48,4,1,,1,1,1,1",
    ]
    read = read_points(write(tmp_path / "p.csv", rows))
    assert [one.clients for one in read.points] == [32, 32, 192]
    assert [(one.id, one.reason) for one in read.refused] == [("run_c_tp1", "clients not stated")]
    assert read.points[2].decode == Layout(1, 4, 1, 1, 1)


def test_impossible_rows_are_listed_and_stop_nothing(tmp_path: Path) -> None:
    rows = [
        PLAIN.format(n=1, ttft=20, tpot=8),
        PLAIN.format(n=2, ttft="nan", tpot=""),
        PLAIN.format(n=3, ttft=-1, tpot=8),
        PLAIN.format(n=4, ttft="x", tpot=8),
        PLAIN.format(n=5, ttft=20, tpot=9).replace("llama-3.1-8b", "no-such-model"),
        PLAIN.format(n=6, ttft=21, tpot=9).replace("llama-3.1-8b", "deepseek-v3"),
        PLAIN.format(n=7, ttft=22, tpot=9).replace(",256,32,", ",256,,"),
        PLAIN.format(n=8, ttft=22, tpot=9).replace("_c4_", "_c400_"),
    ]
    report = validate_points(write(tmp_path / "p.csv", rows), hardware="h100-sxm-8", overheads=NONE)
    assert report["rows_scored"] == 1 and report["rows"][0]["id"].endswith("_1")
    assert report["rows_excluded"] == {
        "a cell is no number": 1,
        "a value is impossible": 1,
        "a value is missing": 1,
        "cannot be simulated": 1,
        "clients >= 256": 1,
        "no measured times": 1,
        "unknown model": 1,
    }
    assert all(one["id"] and one["reason"] for one in report["excluded"])


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_path is missing"):
        read_points(write(tmp_path / "a.csv", ["1,2"], "isl,osl"))
    with pytest.raises(InputError, match="silicon_ttft_ms"):
        read_points(write(tmp_path / "b.csv", ["1,2,3"], "model_path,isl,osl"))
    with pytest.raises(InputError, match="appears twice"):
        read_points(write(tmp_path / "c.csv", ["1,2"], "isl,isl"))
    (tmp_path / "d.csv").write_bytes(gzip.compress(b"\xff\xfe\x00")[:-3])
    with pytest.raises(InputError, match="neither UTF-8"):
        read_points(tmp_path / "d.csv")


def test_copies_and_disagreeing_rows_are_left_out() -> None:
    one, copy, near, far = point(filled=1), point(id="b", filled=2), point(id="c", ttft_ms=10.4), point(id="d", tpot_ms=2.0)
    kept, refused = without_copies([one, copy, near, far])
    assert [row.id for row in kept] == ["b", "c", "d"] and refused[0].detail == "b"
    kept, refused = excluded(kept, kept)
    assert all(row.tpot_ms is None and row.ttft_ms is not None for row in kept)
    assert {row.reason for row in refused} == {"equal inputs disagree: tpot"}


def test_a_row_disagrees_with_the_poorer_copy_of_another_run() -> None:
    """One run is listed twice, once with its worker count; a row without it that differs from the poorer copy is equal to it in all that is known."""
    unknown = Layout(1, 1, 1, 1, 1, None)
    every = [point(tpot_ms=2.0, filled=2), point(id="poor", tpot_ms=2.0, decode=unknown), point(id="other", tpot_ms=1.0, decode=unknown)]
    kept, refused = excluded(without_copies(every)[0], every)
    assert [row.id for row in kept] == [every[0].id] and [row.reason for row in refused][1:] == ["equal inputs disagree: tpot"]


def test_unknown_worker_counts_leave_tpot_alone() -> None:
    rows = [point(decode=Layout(1, 1, 1, 1, 1, None)), point(id="x", clients=256)]
    kept, refused = excluded(rows, rows)
    assert [(row.ttft_ms, row.tpot_ms) for row in kept] == [(None, 1.0)]
    assert [row.reason for row in refused] == ["worker counts missing: TPOT only", "clients >= 256"]


def test_error_floor_is_that_of_the_best_constant() -> None:
    groups = [[1.0, 2.0, 2.5], [3.0], [4.0, 5.0]]
    grid = np.linspace(0.5, 6, 5501)
    best = sum(min(sum(abs(x - t) / t for t in group) for x in grid) for group in groups) / 6
    assert error_floor(groups) == pytest.approx(best, abs=1e-3)
    assert error_floor([]) is None


def test_kendall_against_counting_pairs() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    a, b = generator.integers(0, 6, 12).tolist(), generator.integers(0, 6, 12).tolist()
    good = sum((a[i] - a[j]) * (b[i] - b[j]) > 0 for i, j in itertools.combinations(range(12), 2))
    bad = sum((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in itertools.combinations(range(12), 2))
    free = [sum(x[i] != x[j] for i, j in itertools.combinations(range(12), 2)) for x in (a, b)]
    assert kendall(a, b) == pytest.approx((good - bad) / (free[0] * free[1]) ** 0.5)
    assert kendall([1, 1], [1, 2]) is None


def test_the_chosen_layout_is_compared_with_the_best() -> None:
    rows = [(point(decode=Layout(tp, 1, 1, tp, 1)), measured, said) for tp, measured, said in ((1, 10.0, 1.0), (2, 8.0, 4.0), (4, 5.0, 3.0), (8, 1.0, 2.0))]
    assert choice(rows)["worst_loss"] == pytest.approx(0.2)
    assert choice(rows[:3])["groups"] == 0


def test_throughput_is_littles_law() -> None:
    assert throughput(point(clients=8, output=101), 100.0, 1.0, 1.0) == pytest.approx(8 * 101 / 0.2)


def test_a_perfect_prediction_ranks_perfectly() -> None:
    rows = [(point(clients=c), float(c), float(c), 2.0 * c, 2.0 * c) for c in (1, 2, 4)]
    assert ranking(rows)["median_tau"]["tpot.moesim"] == 1.0
    assert error_summary([0.1, -0.3])["mean_abs_error"] == pytest.approx(0.2)


def test_one_client_waits_for_nobody() -> None:
    """A single client's TPOT is its decode steps' mean and its TTFT one prefill; overheads add to both."""
    runner = Runner("h100-sxm-1", overheads=NONE)
    lone = point(model="llama-3.1-8b", clients=1, prompt=512, output=64)
    bare = runner.predict(lone)
    runner.overheads = Overheads(by_version={("vllm", "1"): Overhead(step_us=500.0, sequence_us=30.0, front_ms=7.0)})
    loaded = runner.predict(lone)
    assert loaded.tpot_ms - bare.tpot_ms == pytest.approx(0.53, abs=1e-6)
    assert loaded.ttft_ms - bare.ttft_ms == pytest.approx(7.53, abs=1e-6)


def test_overheads_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were simulated with overheads of the grid give these overheads, where nobody falls in step with batches that are chosen ahead."""
    true = Overhead(step_us=700.0, sequence_us=40.0, front_ms=30.0)
    runner = Runner("h100-sxm-1", overheads=Overheads(by_version={("vllm", "0.13"): true}))
    rows = []
    for clients, prompt in ((1, 200), (2, 400), (4, 300), (8, 200), (12, 500), (16, 300)):
        asked = point(id=f"2026_01_01_{clients}", version="0.13", model="llama-3.1-8b", clients=clients, prompt=prompt, output=60)
        guess = runner.predict(asked)
        rows.append(replace(asked, ttft_ms=guess.ttft_ms, tpot_ms=guess.tpot_ms))
    found = fit_overheads(rows, Runner("h100-sxm-1", overheads=NONE), tmp_path / "o.json")["overheads"]
    (own,) = [one for one in found if one["version"] == "0.13"]
    assert own["step_us"] == pytest.approx(true.step_us, abs=100) and own["sequence_us"] == pytest.approx(true.sequence_us, abs=10)
    assert own["front_ms"] == pytest.approx(true.front_ms, abs=10) and own["mean_abs_tpot_error"] < 0.01
    assert read_overheads(tmp_path / "o.json").of(rows[0]).step_us == own["step_us"]


def test_assumed_routing_has_the_curve_of_the_counted_model() -> None:
    """The most popular experts get the shares that were counted: in the model's own family, else where gates are like its own."""
    counts_ME = open_trace("olmoe-1b-7b-counts").counts_WLE().reshape(-1, 64)
    share_ME = -np.sort(-counts_ME, axis=1) / counts_ME.sum(axis=1, keepdims=True)
    olmoe = tuple(float(share_ME[:, :top].sum(axis=1).mean()) for top in (32, 8))
    # Means over the layers of popularity/counted.csv, columns top_16_of_32 and top_4_of_32.
    wanted = {
        "deepseek-v3": (0.729, 0.329),
        "minimax-m2.5": (0.729, 0.329),
        "qwen3-235b-a22b": (0.855, 0.391),
        "gpt-oss-120b": (0.860, 0.341),
        "deepseek-v2-lite": olmoe,
    }
    for name, shares in wanted.items():
        model = model_of(name)
        routing, experts = served_routing(model), model.num_experts
        assert routing is not None and not routing.is_even
        share_LE = -np.sort(-routing.assign_LE, axis=1) / routing.assign_LE.sum(axis=1, keepdims=True)
        assert routing.assign_LE.shape[1] == experts and (routing.assign_LE <= 1).all()
        for top, share in zip((experts // 2, experts // 8), shares, strict=True):
            assert share_LE[:, :top].sum(axis=1).mean() == pytest.approx(share, abs=0.01), name
    assert served_routing(model_of("llama-3.1-8b")) is None


def test_popular_experts_of_deepseek_share_groups() -> None:
    """Contiguous ranks carry what was counted in DeepSeek-V3, whose routing is limited to groups; experts of other models are in no order."""
    routing = served_routing(model_of("deepseek-v3"))
    assert routing is not None
    with SKEW.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["workload"] == "decode_in1000out1000"]
    for ranks in (8, 16, 32):
        load_LR = routing.assign_LE.reshape(len(routing.assign_LE), ranks, -1).sum(axis=2)
        counted = np.mean([float(row[f"ep{ranks}_rank_max_over_mean"]) for row in rows])
        assert (load_LR.max(axis=1) / load_LR.mean(axis=1)).mean() == pytest.approx(counted, rel=0.05)
    other = served_routing(replace(model_of("deepseek-v3"), num_groups=1, top_k_groups=1))
    assert other is not None
    load_LR = other.assign_LE.reshape(len(other.assign_LE), 8, -1).sum(axis=2)
    assert (load_LR.max(axis=1) / load_LR.mean(axis=1)).mean() < 1.5


def test_a_checkpoint_of_model_optimizer_brings_its_cache() -> None:
    """TensorRT-LLM runs fp8 weights with one scale per tensor from checkpoints that store an fp8 cache; block scales are the model's own checkpoint."""
    runner = Runner("h100-sxm-1", overheads=NONE)
    for backend, weights, cache in (("trtllm", "fp8", "fp8"), ("vllm", "fp8", "bfloat16"), ("trtllm", "fp8_block", "bfloat16"), ("trtllm", "", "bfloat16")):
        assert runner.model_of(point(model="qwen3-32b", backend=backend, weights=weights)).kv_dtype == cache
    assert runner.model_of(point(model="qwen3-235b-a22b-fp8", backend="trtllm", weights="fp8")).kv_dtype == "bfloat16"


def test_names_of_checkpoints_are_resolved_and_other_models_are_not_taken_for_them() -> None:
    runner = Runner("h100-sxm-1", overheads=NONE)
    for name, known, weights in (
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b", "bfloat16"),
        ("RedHatAI/Qwen3-30B-A3B-FP8-dynamic", "qwen3-30b-a3b", "fp8"),
        ("zai-org/GLM-4.5-Air-FP8", "glm-4.5-air", "fp8"),
    ):
        found = runner.model_of(point(model=name))
        assert (found.name, found.expert_dtype) == (known, weights)
    for name in ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", "nvidia/DeepSeek-R1-0528-FP4", "Qwen/Qwen3-30B-A3B-GPTQ-Int4"):
        with pytest.raises(InputError, match=f"{name}.*may also hold the path of a config.json"):
            runner.model_of(point(model=name))


@pytest.mark.parametrize("clients", [1, 4, 24])
def test_short_cuts_change_no_time(clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    row = point(model="llama-3.1-8b", clients=clients, prompt=300, output=90)
    quick = Runner("h100-sxm-1", overheads=NONE).predict(row)
    monkeypatch.setattr(Instance, "leap", lambda self, flight: None)
    monkeypatch.setattr("moesim.api.validation_points_run.ROOMY", False)
    slow = Runner("h100-sxm-1", overheads=NONE).predict(row)
    assert quick.ttft_ms == pytest.approx(slow.ttft_ms, rel=1e-9) and quick.tpot_ms == pytest.approx(slow.tpot_ms, rel=1e-9)


def test_the_shipped_file_is_what_its_description_says() -> None:
    read = read_points(shipped_points()["h100-sxm"])
    assert read.rows == 917 and len(read.points) == 902
    assert {one.reason for one in read.refused} == {"clients not stated"} and len(read.refused) == 15
    same = without_copies([one for one in read.points if not one.model.endswith("V3")])[1]
    assert len(same) == 49
    r1 = [one for one in read.points if one.model.endswith("R1")]
    groups: dict[object, list[float]] = {}
    for one in r1:
        groups.setdefault(one.inputs, []).append(float(one.tpot_ms or 0.0))
    assert len(r1) == 92 and len(groups) == 41 and sum(max(values) > 1.05 * min(values) for values in groups.values()) == 17
    assert error_floor(groups.values()) == pytest.approx(0.102, abs=5e-4)
    twins = {(one.prompt, one.output, one.clients, one.decode) for one in read.points if one.model.startswith("MiniMax")}
    assert all(layout == Layout(4, 1, 1, 1, 4) for *_, layout in twins)


def test_no_row_of_a_moe_model_calibrates() -> None:
    runner = Runner("h100-sxm-8", overheads=read_overheads())
    rows = [point(model=model, prompt=size) for model in ("llama-3.1-8b", "gpt-oss-120b") for size in range(1, 60)]
    chosen = [row for row in rows if calibrates(row, runner)]
    assert 15 <= len(chosen) <= 45 and {row.model for row in chosen} == {"llama-3.1-8b"}


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    rows = [PLAIN.format(n=n, ttft=20 + n, tpot=8).replace(",32,", f",{30 + n},") for n in range(6)]
    path = write(tmp_path / "p.csv", rows)
    for name in ("a.md", "b.md"):
        write_page(validate_points(path, hardware="h100-sxm-8", overheads=NONE), tmp_path / name)
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()


@pytest.mark.slow
def test_the_whole_file(tmp_path: Path) -> None:
    report = validate_points(None, hardware="h100-sxm-8")
    assert report["rows_scored"] > 450
    assert report["groups"]["MiniMaxAI/MiniMax-M2.5 vllm"]["tpot"]["mean_abs_error"] < 0.15
