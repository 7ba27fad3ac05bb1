"""Calibration: what the ranks time becomes hardware that the cost model reads back as measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from moesim import api  # noqa: E402
from moesim.costs.model import CostModel  # noqa: E402
from moesim.costs.provenance import Provenance  # noqa: E402
from moesim.errors import InputError, MoesimError  # noqa: E402
from moesim.hardware.load import load_cluster  # noqa: E402
from moesim.hardware.tables import read_table, table_metadata, table_names  # noqa: E402
from moesim.model.hf_config import load_model  # noqa: E402
from moesim.runtime import calibrate, calibrate_cases  # noqa: E402
from moesim.runtime.calibrate_rank import timed  # noqa: E402
from tests.runtime.live import moesim, write_config  # noqa: E402

RANKS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration of two ranks for the tiny model's sizes, a few of each."""
    folder = tmp_path_factory.mktemp("machine")
    config = write_config(folder)
    whole = calibrate_cases.of_model

    def few(model: Any, quick: bool, ranks: int) -> Any:
        grid = whole(model, quick, ranks)
        short: dict[str, Any] = {"tokens": (1, 8, 64), "active": (1, 8), "tokens_per_expert": (1, 8), "batches": (1, 4), "lengths": (16, 32)}
        return dataclasses.replace(grid, **short, stream_bytes=1 << 20, messages=(1 << 10, 1 << 14, 1 << 18))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate_cases, "of_model", few)
        patch.setitem(calibrate.BLOCK_S, True, 0.001)
        patch.setitem(calibrate.DISK_BYTES, True, 1 << 20)
        result = moesim("calibrate", "-o", str(folder / "machine.yaml"), "--quick", "--ranks", str(RANKS), "--model", str(config), "--json")
    assert result.returncode == 0, result.stderr
    return folder


def test_the_result_is_a_hardware_document_that_says_where_it_comes_from(measured: Path) -> None:
    assert moesim("hardware", "check", str(measured / "machine.yaml")).returncode == 0
    cluster = load_cluster(measured / "machine.yaml")
    assert cluster.num_ranks == RANKS and cluster.device.kind == "cpu" and not cluster.warnings
    assert torch.__version__ in cluster.device.source and f"{RANKS} ranks" in cluster.device.source
    kinds = {stem.rpartition("_")[0] for stem in table_names(cluster)}
    assert kinds == {"gemm", "grouped_gemm", "attn_context", "attn_generation", "stream", "sampler", "nccl", "deepep_ll_1node"}
    for stem in table_names(cluster):
        rows, facts = read_table(cluster, stem), table_metadata(cluster, stem)
        times = [name for name in rows if name.endswith("_s")]
        assert times and all((rows[name] > 0).all() for name in times) and (rows["spread"] >= 0).all()
        assert cluster.device.source.startswith(facts["source"]) and set(times) <= set(facts["units"])


def test_the_cost_model_reads_its_rows_back_as_measured(measured: Path) -> None:
    cluster, model = load_cluster(measured / "machine.yaml"), load_model(str(measured / "config.json"))
    costs = CostModel(cluster, model)
    stem = next(stem for stem in table_names(cluster) if stem.startswith("gemm"))
    rows = read_table(cluster, stem)
    for n, k in sorted(set(zip(rows["n"].tolist(), rows["k"].tolist(), strict=True))):
        mine = (rows["n"] == n) & (rows["k"] == k)
        timing = costs.gemm("test", rows["m"][mine], n, k, "float32")
        assert timing.seconds == pytest.approx(rows["latency_s"][mine]) and (timing.provenance == Provenance.MEASURED).all()
    grouped = read_table(cluster, next(stem for stem in table_names(cluster) if stem.startswith("grouped")))
    for active, total, seconds in zip(grouped["active"].tolist(), grouped["assignments"].tolist(), grouped["latency_s"].tolist(), strict=True):
        timing = costs.experts(np.full((1, active), total // active))
        assert timing.seconds[0] == pytest.approx(seconds) and timing.provenance[0] == Provenance.MEASURED
    attention = read_table(cluster, next(stem for stem in table_names(cluster) if stem.startswith("attn_generation")))
    one = costs.attention_core(phase="decode", sequences=np.array([4.0]), new_tokens=np.array([4.0]), context=np.array([17.0]))
    at = (attention["batch_size"] == 4) & (attention["step"] == 16)
    assert one.seconds == pytest.approx(attention["latency_s"][at])


def test_an_exchange_takes_what_was_measured_for_its_bytes(measured: Path) -> None:
    cluster, model = load_cluster(measured / "machine.yaml"), load_model(str(measured / "config.json"))
    rows: list[dict[str, Any]] = [
        {"stage": stage, "up_bytes": nbytes, "latency_s": seconds, "spread": 0.1, "hidden_size": 64, "num_topk": 4, "num_experts": 16, "tokens": 0}
        for stage, times in (("dispatch", (1e-3, 2e-3, 5e-3)), ("combine", (2e-3, 3e-3, 4e-3)))
        for nbytes, seconds in zip((1 << 9, 1 << 12, 1 << 15), times, strict=True)
    ]
    folder = measured / "exchange-tables"
    calibrate.write_tables(folder, {calibrate.EXCHANGE: calibrate.exchange_rows(rows)}, source="test", version="torch1.0")
    costs = CostModel(dataclasses.replace(cluster, tables=folder), model)
    for row in rows:
        pairs = int(row["up_bytes"]) // (64 * 4)
        assign_RR = np.array([[0, pairs], [pairs, 0]])
        found = costs.exchange("low_latency", str(row["stage"]), assign_RR=assign_RR)
        assert found.send_s == pytest.approx(row["latency_s"]) and found.port_bytes["intra_out"] == pytest.approx(row["up_bytes"])


def test_a_replay_on_it_uses_the_tables(measured: Path) -> None:
    replay = api.replay(
        "synthetic:zipf:1.0",
        model=str(measured / "config.json"),
        hardware=str(measured / "machine.yaml"),
        tokens_per_step=64,
        settings={"dispatch": "low_latency"},
    )
    shares = replay.report["provenance"]
    assert replay.report["simulated_s"] > 0 and sum(shares.get(name, 0.0) for name in ("measured", "interpolated", "calibrated")) == pytest.approx(1.0)


def test_a_row_is_the_mean_over_ranks_of_their_medians() -> None:
    keys = {"m": 1}
    rows = [[{"kind": "gemm", "keys": keys, "samples": samples}] for samples in ([1.0, 2.0, 9.0], [4.0, 4.0, 4.0])]
    assert calibrate.joined(rows)["gemm"] == [{"m": 1, "latency_s": 3.0, "spread": pytest.approx((4.0 - 2.5) / 4.0)}]


def test_a_sample_is_the_time_of_one_call() -> None:
    import time

    samples = timed(lambda: time.sleep(0.002), 0.004, lambda: None)
    assert len(samples) == 5 and all(0.002 <= sample < 0.1 for sample in samples)


def test_noise_never_makes_an_exchange_faster_with_more_bytes() -> None:
    rows: list[dict[str, Any]] = [
        {"stage": stage, "up_bytes": nbytes, "latency_s": seconds, "spread": 0.0, "hidden_size": 64, "num_topk": 4, "num_experts": 16, "tokens": 0}
        for stage in ("dispatch", "combine")
        for nbytes, seconds in ((100, 5e-3), (1000, 3e-3), (10000, 2e-3))
    ]
    found = calibrate.exchange_rows(rows)
    for name in ("dispatch_avg_t_s", "combine_avg_t_s"):
        seconds = [row[name] for row in found]
        assert seconds == sorted(seconds) and seconds[-1] > seconds[-2]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="yaml"):
        calibrate.calibrate(tmp_path / "machine.json", quick=True)
    with pytest.raises(InputError, match="ranks"):
        calibrate.calibrate(tmp_path / "machine.yaml", ranks=65)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        calibrate._disk(tmp_path / "file" / "machine.yaml", 1 << 20)


def test_a_rank_that_fails_is_named_with_its_last_words() -> None:
    grid = dataclasses.replace(calibrate_cases.general(True, 1), dtypes=("float99",))
    with pytest.raises(MoesimError, match="rank 0 failed: KeyError: 'float99'"):
        calibrate.measure(grid, ranks=1, threads=1, device="cpu", quick=True)
