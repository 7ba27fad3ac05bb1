"""Measured tables: literal rows survive the conversion, filters equal masks, damage and gaps are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.errors import HardwareError
from moesim.hardware import load_cluster
from moesim.hardware.tables import read_table, table_metadata, table_names

H100 = Path(load_cluster("h100-sxm-8").tables or "")

# Rows copied by hand from the source, in its own units.
LITERAL: list[tuple[str, dict[str, str | int], dict[str, float]]] = [
    (
        "attn_context_sglang0.5.14",
        {"kernel_source": "fa3", "batch_size": 1, "isl": 1, "num_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "step": 0, "window_size": 128},
        {"latency_s": 0.0096384e-3},
    ),
    ("gemm_sglang0.5.14", {"gemm_dtype": "fp8_block", "m": 1, "n": 128, "k": 256}, {"latency_s": 0.004192889e-3}),
    (
        "nccl2.29.2",
        {"op_name": "all_reduce", "nccl_dtype": "half", "num_gpus": 8, "message_size": 268435456},
        {"latency_s": 2.111e-3, "message_bytes": 2 * 268435456},
    ),
    (
        "deepep_ll_1to8nodes_sglang0.5.6",
        {"node_num": 1, "num_token": 2},
        {"combine_avg_t_s": 13.28e-6, "combine_Bps": 8.685e9, "dispatch_avg_t_s": 15.4287e-6},
    ),
    ("deepep_normal_1to8nodes_sglang0.5.6", {"node_num": 1, "num_token": 1}, {"dispatch_transmit_s": 37.28e-6, "combine_transmit_s": 48.36e-6}),
    (
        "moe_a2a_1node_vllm0.24.0",
        {"comm_backend": "deepep_ht", "phase": "combine", "hidden_size": 3072, "topk": 8, "num_experts": 256, "num_tokens": 16},
        {"latency_s": 76.672e-6, "transmit_s": 76.672e-6},
    ),
    (
        "moe_trtllm1.3.0rc20",
        {
            "moe_dtype": "w4a16_mxfp4",
            "num_tokens": 1,
            "hidden_size": 2880,
            "inter_size": 2880,
            "num_experts": 32,
            "moe_tp_size": 1,
            "moe_ep_size": 1,
            "distribution": "power_law_1.01",
        },
        {"latency_s": 0.0785344e-3},
    ),
    (
        "wideep_moe_eplb_trtllm1.3.0rc10",
        {
            "op_name": "wideep_moe",
            "num_tokens": 1,
            "hidden_size": 3072,
            "num_slots": 256,
            "moe_ep_size": 2,
            "distribution": "power_law_1.2",
            "rank0_num_tokens": 1,
        },
        {"latency_s": 0.1125056e-3},
    ),
]


@pytest.mark.parametrize(("stem", "where", "expected"), LITERAL, ids=[row[0] for row in LITERAL])
def test_literal_rows_come_back_in_si_units(stem: str, where: dict[str, str | int], expected: dict[str, float]) -> None:
    rows = read_table(H100, stem, list(expected), where=where)
    for column, value in expected.items():
        assert np.isclose(rows[column], value, rtol=1e-3 if stem.startswith("nccl") else 1e-6, atol=0).any(), (column, rows[column], value)


def test_row_counts_are_those_of_the_source() -> None:
    counts = {stem: table_metadata(H100, stem)["num_rows"] for stem in table_names(H100)}
    assert len(counts) == 22
    assert counts["moe_sglang0.5.14"] == 99685 and counts["moe_trtllm1.3.0rc20"] == 126360 and counts["moe_vllm0.24.0"] == 49862
    assert counts["gemm_sglang0.5.14"] == 101010 and counts["nccl2.29.2"] == 504 and counts["wideep_moe_eplb_trtllm1.3.0rc10"] == 4158


def test_times_are_plausible_in_seconds() -> None:
    for stem in table_names(H100):
        times = [values for name, values in read_table(H100, stem).items() if name.endswith("_s") and name != "num_s"]
        assert times, stem
        for values in times:
            assert values.dtype == np.float64 and (values >= 0).all() and values.max() < 60, stem


def test_metadata_states_source_licence_version_units_and_description() -> None:
    for stem in table_names(H100):
        facts = table_metadata(H100, stem)
        source, licence = ("vidur", "MIT") if stem.endswith("_vidur") else ("aiconfigurator", "Apache-2.0")
        assert source in facts["source"] and facts["licence"].startswith(licence) and facts["description"]
        assert facts["version"] and stem.endswith(facts["version"]) and facts["kind"] != "unknown"
        assert {name for name in facts["columns"] if name.endswith("_s")} <= set(facts["units"]), stem


def test_filters_equal_masks_on_the_whole_table() -> None:
    whole = read_table(H100, "gemm_sglang0.5.14")
    mask = (whole["gemm_dtype"] == "bfloat16") & (whole["n"] == 4096) & (whole["m"] == 64)
    part = read_table(H100, "gemm_sglang0.5.14", where={"gemm_dtype": "bfloat16", "n": 4096, "m": 64})
    assert mask.sum() > 5
    for name, values in whole.items():
        assert (part[name] == values[mask]).all()


def test_a_value_that_no_row_has_gives_no_rows() -> None:
    assert len(read_table(H100, "gemm_sglang0.5.14", ["m"], where={"gemm_dtype": "fp3"})["m"]) == 0


def test_arrays_are_read_only_and_shared() -> None:
    first, second = (read_table(H100, "nccl2.29.2", ["latency_s", "op_name"]) for _ in range(2))
    assert first["latency_s"] is second["latency_s"] and first["op_name"] is second["op_name"]
    with pytest.raises(ValueError, match="read-only"):
        first["latency_s"][0] = 1.0


@pytest.mark.parametrize(
    ("stem", "columns", "where", "words"),
    [
        ("nccl2.29", None, None, "did you mean 'nccl2.29.2'"),
        ("nothing-like-it-at-all", None, None, "has no table"),
        ("nccl2.29.2", ["latency"], None, "did you mean 'latency_s'"),
        ("nccl2.29.2", ["latency_s"], {"num_gpu": 8}, "did you mean 'num_gpus'"),
        ("nccl2.29.2", ["latency_s"], {"num_gpus": "8"}, "must be a number"),
        ("../nccl2.29.2", None, None, "plain file stem"),
        ("", None, None, "plain file stem"),
    ],
)
def test_a_missing_table_or_column_is_named(stem: str, columns: list[str] | None, where: dict[str, str | int] | None, words: str) -> None:
    with pytest.raises(HardwareError) as caught:
        read_table(H100, stem, columns, where=where)
    assert words in str(caught.value)


def test_a_cluster_without_tables_says_so() -> None:
    with pytest.raises(HardwareError, match="l40s-1: has no measured tables"):
        read_table(load_cluster("l40s-1"), "gemm")
    assert table_names(load_cluster("l40s-1")) == ()


def test_a_damaged_file_is_an_error_not_numbers(tmp_path: Path) -> None:
    whole = (H100 / "nccl2.29.2.parquet").read_bytes()
    (tmp_path / "text.parquet").write_bytes(b"not parquet at all")
    (tmp_path / "short.parquet").write_bytes(whole[:100])
    # A flipped bit in the latency page: only the page checksum can see it.
    meta = table_metadata(H100, "nccl2.29.2")
    assert meta["columns"].index("latency_s") == 5
    import pyarrow.parquet as pq

    chunk = pq.ParquetFile(H100 / "nccl2.29.2.parquet").metadata.row_group(0).column(5)
    start = chunk.data_page_offset + chunk.total_compressed_size // 2
    flipped = bytearray(whole)
    flipped[start] ^= 0x10
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    for stem, words in (("text", "not a Parquet"), ("short", "not a Parquet"), ("flipped", "damaged")):
        with pytest.raises(HardwareError, match=words):
            read_table(tmp_path, stem)


def test_a_replaced_file_is_read_again(tmp_path: Path) -> None:
    from moesim.hardware.convert_tables import write_table

    for value in (1.0, 2.0, 3.0):
        write_table(tmp_path / "t.parquet", {"latency_s": np.full(int(value), value)}, {})
        assert read_table(tmp_path, "t")["latency_s"].tolist() == [value] * int(value)
