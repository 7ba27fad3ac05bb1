"""Published throughput: synthesised loads have the summary's skew, passes have the stated shape, gains the right sign, and the file is checked."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moesim.api.documents import trace_shape
from moesim.api.published import loads
from moesim.api.published.validate import FIGURES, host_us, read_figures, validate_published
from moesim.errors import InputError, TraceError
from moesim.model import load_model
from moesim.traces.routing_trace import DECODE, PREFILL

SHAPE = trace_shape(load_model("deepseek-v3"))
WORKLOADS = ("decode_in1000out1000", "prefill_in1024", "prefill_in4096")


def summary(workload: str) -> list[dict[str, str]]:
    with loads.SKEW.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["workload"] == workload]


@pytest.mark.parametrize("workload", WORKLOADS)
def test_synthesised_loads_have_the_skew_of_the_summary(workload: str) -> None:
    popularity = loads.popularity_LE(workload, 256)
    assert popularity.shape == (58, 256) and np.allclose(popularity.sum(axis=1), 1.0)
    rows, ordered = summary(workload), -np.sort(-popularity, axis=1)
    for top in loads.TOPS:
        assert np.allclose(ordered[:, :top].sum(axis=1), [float(row[f"share_top{top}"]) for row in rows], atol=1e-9)
    for ranks in loads.RANKS:
        busiest = popularity.reshape(58, ranks, -1).sum(axis=2).max(axis=1) * ranks
        ratio = busiest / np.array([float(row[f"ep{ranks}_rank_max_over_mean"]) for row in rows])
        assert np.median(ratio) == pytest.approx(1.0, abs=0.02) and (np.abs(ratio - 1) < 0.3).all()


def test_drawn_choices_follow_the_loads_and_the_groups() -> None:
    tokens = 4096
    (batch,) = loads.pass_trace(SHAPE, "prefill_in4096", phase="prefill", tokens=tokens, context=1024).batches()
    popularity = loads.popularity_LE("prefill_in4096", 256)
    for layer in (0, 57):
        counts = np.bincount(batch.experts_TLK[:, layer].ravel(), minlength=256)
        assert np.abs(counts / counts.sum() - popularity[layer]).max() < 3e-3
        groups = np.sort(batch.experts_TLK[:, layer] // 32, axis=1)
        assert ((np.diff(groups, axis=1) > 0).sum(axis=1) + 1).max() <= 4


def test_a_pass_has_the_lengths_of_its_phase() -> None:
    (prefill,) = loads.pass_trace(SHAPE, "balanced", phase="prefill", tokens=512, context=128).batches()
    assert (prefill.phase_T == PREFILL).all() and np.unique(prefill.request_T, return_counts=True)[1].tolist() == [128] * 4
    assert prefill.position_T.reshape(4, 128).tolist() == [list(range(128))] * 4
    (decode,) = loads.pass_trace(SHAPE, "balanced", phase="decode", tokens=512, context=128).batches()
    assert (decode.phase_T == DECODE).all() and len(np.unique(decode.request_T)) == 512 and (decode.position_T == 127).all()
    (drafts,) = loads.pass_trace(SHAPE, "balanced", phase="decode", tokens=512, context=128, each=2).batches()
    assert len(np.unique(drafts.request_T)) == 256 and drafts.position_T.reshape(256, 2).tolist() == [[126, 127]] * 256
    assert (decode.experts_TLK == prefill.experts_TLK).all(), "phases differ in lengths, not in choices"


def test_a_workload_or_length_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TraceError, match="must be one of decode_in1000out1000"):
        loads.popularity_LE("decode", 256)
    with pytest.raises(TraceError, match="whole prompts of 4096"):
        loads.pass_trace(SHAPE, "balanced", phase="prefill", tokens=5000, context=4096)
    with pytest.raises(TraceError, match="must be 2 of every request"):
        loads.pass_trace(SHAPE, "balanced", phase="decode", tokens=513, context=4096, each=2)


def test_figures_per_gpu_are_an_eighth_of_those_per_node() -> None:
    """The source states them per node of eight."""
    per_node = {row.name: round(row.published * 8) for row in read_figures().rows if row.published and row.within}
    assert per_node == {
        "H800 decode": 18592, "H800 prefill": 62712, "H100 decode": 22282, "H100 decode, simulated MTP": 17373, "H100 prefill, 4K": 50302,
        "H100 prefill, 2K": 54543, "H100 prefill, 1K": 57674, "H100 prefill, 4K, perfect EPLB": 59337,
        "H100 decode, simulated MTP, one batch": 12929,
    }  # fmt: skip


def edited(folder: Path, change: Any) -> Path:
    node = yaml.safe_load(FIGURES.read_text())
    change(node)
    path = folder / "figures.yaml"
    path.write_text(yaml.safe_dump(node))
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda node: node["rows"][0].update(deployment="h900"), "rows[H800 decode].deployment = 'h900'"),
        (lambda node: node["rows"][0].update(source="rumour"), "must be one of deepseek"),
        (lambda node: node["rows"][1].update(name="H800 decode"), "must be given once"),
        (lambda node: node["rows"][0].update(published=-1), "greater than 0"),
        (lambda node: node["rows"][0].update(fitted=1.1), "rows.0.fitted"),
        (lambda node: node["ratios"][0].update(over="nothing"), "must be the name of a row"),
        (lambda node: node.update(rows="all"), "list of rows"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    with pytest.raises(InputError) as caught:
        read_figures(edited(tmp_path, change))
    assert says in str(caught.value) and "figures.yaml" in str(caught.value)


def test_prefill_runs_at_the_clock_that_is_reported_and_variants_carry_the_figure_they_stand_beside() -> None:
    rows = read_figures().rows
    clocks = {row.name: row.settings.get("prefill_clock") for row in rows if row.phase == "prefill"}
    assert clocks.pop("H800 prefill") is clocks.pop("H100 prefill, 4K, 1,980 MHz") is None, "its profile shows no throttling"
    assert set(clocks.values()) == {"0.795"}
    scored = {row.published for row in rows if row.within is not None}
    variants = [row for row in rows if row.within is None and row.published is not None]
    assert len(variants) == 4 and {row.published for row in variants} <= scored


def test_host_time_is_that_of_the_engine_and_grows_with_the_sequences_of_a_gpu() -> None:
    row = {row.name: row for row in read_figures().rows}
    each = (host_us(row["H100 decode"]) - host_us(row["H100 decode, 128 requests"])) / 128
    assert each > 0 and host_us(row["H100 decode, no host time"]) == host_us(row["H800 decode"]) == 0
    assert host_us(row["H100 prefill, 1K"]) - host_us(row["H100 prefill, 4K"]) == pytest.approx(12 * each)
    with pytest.raises(InputError, match="declared host overheads: sglang"):
        host_us(row["H100 decode"].model_copy(update={"engine": "none"}))


def test_accepted_drafts_count_and_the_others_do_not(tmp_path: Path) -> None:
    def change(node: Any) -> None:
        node["deployments"]["h800-decode"]["accepted"] = 0.0

    all_, none = (validate_published("H800 decode", figures=path)["rows"] for path in (FIGURES, edited(tmp_path, change)))
    assert all_[0]["predicted"] == pytest.approx(1.6 * none[0]["predicted"])
    assert all_[0]["step_ms"] > 1.4 * all_[1]["step_ms"], "two tokens of a request are computed as two"


def test_a_name_that_no_row_has_is_refused() -> None:
    with pytest.raises(InputError, match="must be part of a row's name"):
        validate_published("H200")


def test_two_batches_lose_where_requests_are_few() -> None:
    report = validate_published("32 requests")
    (gain,) = report["ratios"]
    assert gain["predicted"] < 1.0 and gain["hit"]
    two, one = report["rows"]
    assert two["breakdown_ms"]["experts"] > 1.5 * one["breakdown_ms"]["experts"], "each half reads the weights again"
    assert report["rows_scored"] == 0 and report["throughput"]["n"] == 0


def test_eplb_gains_from_skew_and_only_from_it() -> None:
    gains = {one["name"]: one["predicted"] for one in validate_published("EPLB in decode")["ratios"]}
    assert gains["EPLB in decode"] > 1.5
    assert gains["EPLB in decode, balanced routing (control)"] == pytest.approx(1.0, abs=0.02)


def test_the_page_holds_every_row_and_names_its_command() -> None:
    text = (Path(__file__).parents[2] / "docs" / "published-throughput.md").read_text()
    assert "moesim validate --published all" in text.splitlines()[2] and "do not edit" in text.splitlines()[2]
    figures = read_figures()
    shown = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")]
    assert shown == ["setting", *(row.name for row in figures.rows), "gain", *(ratio.name for ratio in figures.ratios)]


@pytest.mark.slow
def test_all_figures_have_the_published_orders() -> None:
    report = validate_published()
    row = {item["name"]: item for item in report["rows"]}
    gain = {item["name"]: item["predicted"] for item in report["ratios"]}
    assert report["rows_scored"] == 9 and report["rows_calibrated"] == 0
    rate = {name: item["predicted"] for name, item in row.items()}
    assert rate["H100 prefill, 1K"] > rate["H100 prefill, 2K"] > rate["H100 prefill, 4K"] < rate["H100 prefill, 4K, perfect EPLB"]
    overlap = [gain[f"two-batch overlap in decode, {count} requests"] for count in (32, 64, 128, 256)]
    assert overlap == sorted(overlap) and overlap[0] < 0.95 and 0.85 < overlap[1] < 1.1 and overlap[2] > 1.0 and overlap[3] > 1.1
    assert gain["EPLB in prefill"] > 1.2 and gain["EPLB in decode"] > gain["EPLB in prefill"] and gain["two-batch overlap in prefill, 8,192 tokens"] > 1.2
    for item in row.values():
        assert item["published"] is None or item["error"] == pytest.approx(item["predicted"] / item["published"] - 1)
