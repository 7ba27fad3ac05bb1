"""Calibration: what the ranks time becomes hardware that the cost model reads back as measured."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from moesim import api  # noqa: E402
from moesim.costs.model import CostModel  # noqa: E402
from moesim.costs.provenance import Provenance  # noqa: E402
from moesim.errors import InputError, MoesimError  # noqa: E402
from moesim.hardware.load import load_cluster  # noqa: E402
from moesim.hardware.tables import read_table, table_metadata, table_names  # noqa: E402
from moesim.model.hf_config import load_model  # noqa: E402
from moesim.runtime import calibrate, calibrate_cases, calibrate_write  # noqa: E402
from moesim.runtime.calibrate_disk import measure_disk  # noqa: E402
from moesim.runtime.calibrate_layers import even_ids  # noqa: E402
from moesim.runtime.calibrate_rank import timed  # noqa: E402
from moesim.runtime.calibrate_write import rising  # noqa: E402
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
        patch.setitem(calibrate.REHEARSAL, True, {"batches": (1, 4), "lengths": (8, 16), "rounds": 2, "decodes": 3, "limit_s": 60.0})
        result = moesim("calibrate", "-o", str(folder / "machine.yaml"), "--quick", "--ranks", str(RANKS), "--model", str(config), "--json")
    assert result.returncode == 0, result.stderr
    return folder


def test_the_result_is_a_hardware_document_that_says_where_it_comes_from(measured: Path) -> None:
    assert moesim("hardware", "check", str(measured / "machine.yaml")).returncode == 0
    cluster = load_cluster(measured / "machine.yaml")
    assert cluster.num_ranks == RANKS and cluster.device.kind == "cpu" and not cluster.warnings
    assert torch.__version__ in cluster.device.source and f"{RANKS} ranks" in cluster.device.source and "layers rehearsed" in cluster.device.source
    assert any(text in cluster.tiers["nvme"].source for text in ("O_DIRECT", "posix_fadvise", "through the page cache"))
    assert not (measured / "machine-spool").exists() and "cores busy with other work" in cluster.device.source
    kinds = {stem.rpartition("_")[0] for stem in table_names(cluster)}
    assert kinds == {"gemm", "grouped_gemm", "attn_context", "attn_generation", "stream", "sampler", "nccl", "collective", "stage", "deepep_ll_1node"}
    for stem in table_names(cluster):
        rows, facts = read_table(cluster, stem), table_metadata(cluster, stem)
        times = [name for name in rows if name.endswith("_s")]
        assert times and all((rows[name] > 0).all() for name in times) and (rows["spread"] >= 0).all() and (rows["samples"] >= RANKS).all()
        if "p10_s" in rows:
            assert (rows["p10_s"] <= rows["p90_s"]).all() and (rows["latency_s"] >= rows["p10_s"]).all()
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
        {"stage": stage, "up_bytes": nbytes, "latency_s": seconds, "spread": 0.1, "samples": 3, "hidden_size": 64, "num_topk": 4, "num_experts": 16}
        for stage, times in (("dispatch", (1e-3, 2e-3, 5e-3)), ("combine", (2e-3, 3e-3, 4e-3)))
        for nbytes, seconds in zip((1 << 9, 1 << 12, 1 << 15), times, strict=True)
    ]
    folder = measured / "exchange-tables"
    calibrate_write.write_tables(folder, {calibrate_write.EXCHANGE: calibrate_write.exchange_rows(rows)}, source="test", version="torch1.0")
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


def test_the_stages_of_a_layer_are_read_back_whole(measured: Path) -> None:
    cluster, model = load_cluster(measured / "machine.yaml"), load_model(str(measured / "config.json"))
    costs = CostModel(cluster, model)
    rows = read_table(cluster, next(stem for stem in table_names(cluster) if stem.startswith("stage")))
    assert set(rows["operator"].tolist()) == {"attention", "gate", "embedding", "head"}
    for index in np.flatnonzero(rows["operator"] == "attention").tolist():
        phase, batch, tokens, context, seconds = (rows[name][index] for name in ("phase", "batch_size", "num_tokens", "context", "latency_s"))
        timing = costs.attention(phase=phase, sequences=np.array([batch]), new_tokens=np.array([tokens]), context=np.array([context]))
        assert timing.seconds[0] == pytest.approx(seconds) and timing.provenance[0] == Provenance.MEASURED
    decodes = (rows["operator"] == "head") & (rows["phase"] == "decode") & (rows["batch_size"] == 4)
    assert costs.head(np.array([4.0])).seconds[0] == pytest.approx(rows["latency_s"][decodes].mean())
    assert costs.gate(np.array([0.0])).seconds[0] == 0.0


def test_a_machine_calibrated_for_another_model_keeps_to_its_kernels(measured: Path) -> None:
    cluster = load_cluster(measured / "machine.yaml")
    other = load_model(str(write_config(measured / "other", num_attention_heads=8)))
    parts = [CostModel(cluster, other).attention_projections(np.array([8.0])), CostModel(cluster, other).attention_core(
        phase="decode", sequences=np.array([8.0]), new_tokens=np.array([8.0]), context=np.array([12.0]))]  # fmt: skip
    whole = CostModel(cluster, other).attention(phase="decode", sequences=np.array([8.0]), new_tokens=np.array([8.0]), context=np.array([12.0]))
    assert whole.seconds[0] == pytest.approx(sum(part.seconds[0] for part in parts))


def test_its_tables_are_scored_like_any_others(measured: Path) -> None:
    found = moesim("validate", "--hardware", str(measured / "machine.yaml"), "--model", str(measured / "config.json"))
    assert found.returncode == 0, found.stderr
    assert all(kind in found.stderr for kind in ("gemm_", "grouped_gemm_", "attn_generation_", "stage_"))


@pytest.mark.parametrize(("tokens", "top_k", "active", "local", "ranks"), [(1, 4, 8, 8, 4), (8, 4, 4, 8, 4), (16, 2, 2, 4, 2), (3, 4, 1, 4, 4)])
def test_rehearsed_routing_is_even_and_distinct(tokens: int, top_k: int, active: int, local: int, ranks: int) -> None:
    load_E = np.zeros(local * ranks, dtype=int)
    for rank in range(ranks):
        ids_Nk = even_ids(tokens, top_k, active=active, local=local, ranks=ranks, rank=rank).numpy()
        assert ids_Nk.shape == (tokens, top_k) and all(len(set(row)) == top_k for row in ids_Nk.tolist())
        load_E += np.bincount(ids_Nk.ravel(), minlength=len(load_E))
    load_RE = load_E.reshape(ranks, local)
    assert load_RE[:, active:].sum() == 0 and load_RE[:, :active].max() - load_RE[:, :active].min() <= 1
    assert (load_RE > 0).sum() == min(active * ranks, tokens * top_k * ranks)


def test_a_kernel_is_the_mean_over_ranks_of_medians_of_blocks_and_a_stage_that_of_all_calls() -> None:
    keys = {"m": 1}
    rows = [[{"kind": "gemm", "keys": keys, "samples": samples}] for samples in ([1.0, 2.0, 9.0], [4.0, 4.0, 4.0])]
    found = calibrate.joined(rows, {})["gemm"]
    assert [(row["m"], row["latency_s"], row["samples"]) for row in found] == [(1, 3.0, 6)] and found[0]["spread"] == pytest.approx((4.0 - 2.5) / 4.0)
    parts = [[{"kind": "stage", "keys": keys, "samples": part} for part in (samples[:1], samples[1:])] for samples in ([1.0, 2.0, 9.0], [4.0, 4.0, 4.0])]
    whole = calibrate.joined(parts, {"hidden_size": 64})["stage"]
    assert [(row["m"], row["hidden_size"], row["latency_s"]) for row in whole] == [(1, 64, 4.0)]


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=12))
def test_rising_values_never_fall_and_keep_their_mean(values: list[float]) -> None:
    found = rising(np.array(values))
    assert (np.diff(found) >= -1e-12).all() and found.mean() == pytest.approx(np.mean(values))
    assert rising(np.sort(values)) == pytest.approx(np.sort(values)) and rising(found) == pytest.approx(found)


def test_a_sample_is_the_time_of_one_call() -> None:
    import time

    samples = timed(lambda: time.sleep(0.002), 0.004, lambda: None)
    assert len(samples) == 5 and all(0.002 <= sample < 0.1 for sample in samples)


def test_noise_never_makes_an_exchange_faster_with_more_bytes() -> None:
    rows: list[dict[str, Any]] = [
        {"stage": stage, "up_bytes": nbytes, "latency_s": seconds, "spread": 0.0, "samples": 3, "hidden_size": 64, "num_topk": 4, "num_experts": 16}
        for stage in ("dispatch", "combine")
        for nbytes, seconds in ((100, 5e-3), (1000, 3e-3), (10000, 2e-3))
    ]
    found = calibrate_write.exchange_rows(rows)
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
        measure_disk(tmp_path / "file" / "machine.yaml", 1 << 20)


def few(quick: bool, ranks: int) -> Any:
    """Return a grid of a few small cases that need no model."""
    return calibrate_cases.Grid(
        dtypes=("float32",), gemm=[(8, 8)], tokens=(1, 2), experts=((8, 4),), active=(1, 2), tokens_per_expert=(1,), heads=((2, 1, 4),), batches=(1, 2),
        lengths=(4, 8), norms=(8,), vocab=16, stream_bytes=1 << 12, messages=(1 << 6, 1 << 8), copies=(), exchange=(8, 2, 4),
    )  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_cases, "general", few)
    for table, value in ((calibrate.BLOCK_S, 0.0005), (calibrate.DISK_BYTES, 1 << 20)):
        monkeypatch.setitem(table, True, value)


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out, spool, kept = calibrate.measure, tmp_path / "machine.yaml", tmp_path / "machine-spool", 7

    def cut(settings: Any) -> Any:
        whole(settings)
        path = spool / "rank-1.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "measure", cut)
    with pytest.raises(MoesimError, match=f"{kept} cases are kept in .*machine-spool, go on with --resume"):
        calibrate.calibrate(out, quick=True, ranks=2)
    assert not out.exists()
    before = (spool / "rank-0.jsonl").read_bytes().splitlines()[:kept]
    with pytest.raises(InputError, match="other ranks"):
        calibrate.calibrate(out, quick=True, ranks=1, resume=True)
    after: list[bytes] = []

    def rest(settings: Any) -> Any:
        facts = whole(settings)
        after.extend((spool / "rank-0.jsonl").read_bytes().splitlines())
        return facts

    monkeypatch.setattr(calibrate, "measure", rest)
    report = calibrate.calibrate(out, quick=True, ranks=2, resume=True)
    assert report is not None and report["resumed"] == kept and report["num_ranks"] == 2
    assert after[:kept] == before and len(after) > kept and not spool.exists() and load_cluster(out).num_ranks == 2


def launched_rank(rank: int, port: int, out: Path) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    report = calibrate.calibrate(out, quick=True)
    assert (report is None) == bool(rank)


def test_ranks_of_a_launcher_measure_together_and_the_first_writes(tmp_path: Path, small: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=launched_rank, args=(rank, port, tmp_path / "machine.yaml")) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    cluster = load_cluster(tmp_path / "machine.yaml")
    assert cluster.num_ranks == 2 and any(stem.startswith("nccl") for stem in table_names(cluster))


def test_a_rank_that_fails_is_named_with_its_last_words(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate_cases, "general", lambda quick, ranks: dataclasses.replace(few(quick, ranks), dtypes=("float99",)))
    with pytest.raises(MoesimError, match="rank 0 failed: KeyError: 'float99'"):
        calibrate.calibrate(tmp_path / "machine.yaml", quick=True)
