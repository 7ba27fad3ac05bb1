"""`moesim validate --kernels`: own tables are left out row by row, others are predicted; what is not scored is listed, nothing stops the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moesim.api.validation_kernels import facts_of, validate_kernels
from moesim.cli.main import main
from moesim.errors import CostError, HardwareError
from moesim.hardware import Cluster, load_cluster
from moesim.hardware.measured import read_measured
from moesim.hardware.tables import read_table
from moesim.model import load_model
from tests.hardware.test_measured import KNOWN

FIGURES = ("n", "mean_error", "mean_abs_error", "median_abs_error", "p90_abs_error")


def as_source(cluster: Cluster, stem: str, path: Path, names: tuple[str, ...], factor: float = 1.0, **where: str | int) -> Path:
    """Write an own table as its source prints it: milliseconds, text."""
    rows = read_table(cluster, stem, (*names, "latency_s"), where=where or None)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join([*names, "latency"])]
    for values in zip(*(rows[name] for name in names), rows["latency_s"], strict=True):
        lines.append(",".join([*(str(value) for value in values[:-1]), f"{values[-1] * 1e3 * factor:.7g}"]))
    path.write_text("\n".join(lines) + "\n")
    return path


NCCL = ("op_name", "nccl_dtype", "num_gpus", "message_size")


def test_rows_of_the_own_table_are_left_out_one_by_one(h100: Cluster, tmp_path: Path) -> None:
    path = as_source(h100, "nccl2.29.2", tmp_path / "whatever.csv", NCCL)
    report = validate_kernels(path, h100)
    quantity = report["quantities"]["whatever"]
    assert quantity["method"] == "leave_one_out" and quantity["provenance"] == {"interpolated": 1.0}
    assert quantity["rows_scored"] == quantity["n"] == 456 and quantity["rows_calibrated"] == 48
    assert quantity["rows_excluded"] == {"border of the grid: no neighbours to predict it from": 48}
    own = validate_kernels(None, h100, only=("nccl",))["quantities"]["nccl2.29.2"]
    assert [quantity[key] for key in FIGURES] == pytest.approx([own[key] for key in FIGURES], rel=1e-5)


def test_other_rows_are_predicted_and_the_bias_has_a_sign(h100: Cluster, tmp_path: Path) -> None:
    for factor in (2.0, 0.5):
        path = as_source(h100, "nccl2.29.2", tmp_path / "other.csv", NCCL, factor, nccl_dtype="half", op_name="all_gather")
        quantity = validate_kernels(path, h100)["quantities"]["other"]
        assert quantity["method"] == "tables" and quantity["provenance"] == {"measured": 1.0}
        assert quantity["mean_error"] == pytest.approx(1 / factor - 1, abs=1e-6) and quantity["p90_abs_error"] == pytest.approx(abs(1 / factor - 1), abs=1e-6)


def test_a_device_without_the_table_is_scored_by_transfer(h100: Cluster, tmp_path: Path) -> None:
    names = ("gemm_dtype", "m", "n", "k")
    path = as_source(h100, "gemm_sglang0.5.14", tmp_path / "gemm.csv", names, gemm_dtype="fp8", n=4096, k=4096)
    report = validate_kernels(path, load_cluster("h200-sxm-8"))
    quantity = report["quantities"]["gemm"]
    # An H200 is an H100 with faster memory: never slower, and no slower by more than the bandwidths' ratio.
    assert quantity["method"] == "transfer" and set(quantity["provenance"]) == {"extrapolated"} and report["calibrated_from"] == "h100-sxm"
    assert -0.35 < quantity["mean_error"] <= 0
    with pytest.raises(CostError, match="--strict refuses"):
        validate_kernels(path, "h200-sxm-8", strict=True)
    assert validate_kernels(path, replace(load_cluster("l40s-8"), calibrated_from=None))["quantities"]["gemm"]["provenance"] == {"roofline": 1.0}


def test_an_impossible_row_stops_no_other(h100: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "moe.csv"
    shape = "fp8_block,{tokens},7168,2048,8,256,1,1,{distribution},1.5"
    rows = [shape.format(tokens=64, distribution="balanced"), shape.format(tokens=64, distribution="mystery"), shape.format(tokens=-4, distribution="balanced")]
    rows.append("nvfp9,64,7168,2048,8,256,1,1,balanced,1.5")
    path.write_text("moe_dtype,num_tokens,hidden_size,inter_size,topk,num_experts,moe_tp_size,moe_ep_size,distribution,latency\n" + "\n".join(rows) + "\n")
    quantity = validate_kernels(path, h100)["quantities"]["moe"]
    assert quantity["n"] == 1 and sum(quantity["rows_excluded"].values()) == 3
    reasons = " | ".join(quantity["rows_excluded"])
    assert "distribution mystery" in reasons and "expert dtype nvfp9 is not known" in reasons and "negative" in reasons


def test_garbage_among_the_rows_of_any_header_is_listed_not_fatal(tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    values = ["1", "2", "128", "4096", "1e6", "1e12", "0.5", "0", "-1", "x", "", "131072"]
    for index, (name, text, _, _, _) in enumerate(KNOWN):
        header, first = text.splitlines()[:2]
        lines = [header, first]
        for _ in range(12):
            cells = [values[rng.integers(len(values))] if rng.random() < 0.35 else cell for cell in first.split(",")]
            lines.append(",".join(cells))
        path = tmp_path / str(index) / name.removesuffix(".gz")
        path.parent.mkdir(parents=True)
        path.write_text("\n".join(lines) + "\n")
        report = validate_kernels(path, "rtx-pro-6000-2", model="qwen3-30b-a3b")
        (quantity,) = report["quantities"].values()
        assert quantity["n"] >= 1 and quantity["rows_excluded"], name
        assert np.isfinite(quantity["mean_error"]) and json.dumps(report, allow_nan=False)


def test_repeats_are_averaged_and_give_the_floor(h100: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "nccl.csv"
    path.write_text("op_name,nccl_dtype,num_gpus,message_size,latency\nall_reduce,half,8,1024,0.01\nall_reduce,half,8,1024,0.03\nall_reduce,half,8,4096,0.02\n")
    quantity = validate_kernels(path, h100)["quantities"]["nccl"]
    assert quantity["n"] == 2 and quantity["error_floor"] == pytest.approx(0.5)
    assert quantity["rows_excluded"] == {"repeat of equal inputs, averaged": 1}


def test_a_folder_is_read_to_its_depth_and_unknown_files_are_listed(tmp_path: Path) -> None:
    text = "layer,sequences,time_us\nlm_head,4,418\nsampler,4,11\nmystery,4,11\n"
    for folder in ("tp1", "tp2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "per_sequence.csv").write_text(text)
        (tmp_path / folder / "meta.yaml").write_text("model: Qwen/Qwen3-30B-A3B-Instruct-2507\n")
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    report = validate_kernels(tmp_path, "rtx-pro-6000-2")
    assert set(report["quantities"]) == {"tp1/per_sequence", "tp2/per_sequence"} and list(report["files_refused"]) == ["notes"]
    quantity = report["quantities"]["tp2/per_sequence"]
    assert set(quantity["parts"]) == {"lm_head", "sampler", "other"} and quantity["n"] == 2
    assert any("mystery" in reason for reason in quantity["rows_excluded"])


def test_one_file_with_a_bad_header_is_an_error(tmp_path: Path, h100: Cluster) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("m,n,k,time\n1,2,3,4\n")
    with pytest.raises(HardwareError, match=r"bad.csv: columns m, n, k, time belong to no known table; expected columns"):
        validate_kernels(path, h100)
    with pytest.raises(HardwareError, match="bad.csv"):
        validate_kernels(tmp_path, h100)
    with pytest.raises(HardwareError, match="does not exist"):
        validate_kernels(tmp_path / "nowhere", h100)
    with pytest.raises(HardwareError, match="has no measured tables to validate on"):
        validate_kernels(None, "rtx-4090-1")


def test_peers_stand_beside_every_scored_table() -> None:
    report = validate_kernels(None, "h800-sxm-8", only=("grouped_gemm",))
    own = report["quantities"]["grouped_gemm_infersim"]
    assert all({"tool", "quantity", "error", "source"} <= set(peer) for peer in own["peers"]) and own["peers"]
    assert own["transfer"]["peers"] != own["peers"]


def test_facts_come_from_the_model_and_the_data_sheet(h100: Cluster) -> None:
    facts = facts_of(load_model("qwen3-30b-a3b"), h100)
    assert (facts["hidden_size"], facts["num_heads"], facts["num_kv_heads"], facts["head_dim"], facts["top_k"]) == (2048, 32, 4, 128, 8)
    assert facts["peak_bfloat16"] == 989e12 and facts_of(None) == {}


def run(*words: str) -> object:
    """Return the exit code of `moesim validate`."""
    with pytest.raises(SystemExit) as caught:
        main(["validate", "--hardware", "h100-sxm-8", *words])
    return caught.value.code


def test_the_command_prints_one_object_and_is_reproducible(h100: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_source(h100, "nccl2.29.2", tmp_path / "nccl.csv", NCCL)
    outputs = []
    for _ in range(2):
        run("--kernels", str(path), "--json")
        outputs.append(capsys.readouterr().out)
    report = json.loads(outputs[0])
    assert outputs[0] == outputs[1] and report["schema"] == "moesim.validate/1" and report["rows_scored"] == 456
    run("--kernels", str(path))
    captured = capsys.readouterr()
    assert captured.out == "" and "leave one out" in captured.err and "excluded: 48" in captured.err
    assert run("--kernels", str(path), "--run", str(tmp_path)) == 2 and "ask for one of them" in capsys.readouterr().err


def test_published_figures_of_an_h800_are_scored_but_never_used() -> None:
    h800 = load_cluster("h800-sxm-8x8")
    report = validate_kernels(None, h800, only=("published",))
    assert report["rows_scored"] == 21 and not any(path.stem.endswith("published") for path in Path(h800.tables or "").glob("*.parquet"))
    low = next(
        table
        for table in read_measured(Path(__file__).parents[2] / "moesim/hardware/published/h800-sxm/deepep_ll_published.parquet")
        if table.part == "combine"
    )
    assert np.allclose(low.rows["latency_s"], np.array([114, 195, 273, 314]) * 1e-6)
