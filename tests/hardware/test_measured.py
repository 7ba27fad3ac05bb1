"""Tables of other tools: known by their header, in SI units, rows that cannot be read counted, hostile files refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import HardwareError
from moesim.hardware.convert_tables import convert_measured
from moesim.hardware.measured import read_measured
from moesim.hardware.measured_columns import Measured
from moesim.hardware.tables import read_table, table_metadata

FACTS = {"hidden_size": 2048, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "vocab_size": 1000, "expert_ffn_size": 768, "top_k": 8, "dense_ffn_size": 0}
FRONTIER = "num_tokens,num_experts,num_experts_per_device,router_topk,hidden_dim,expert_hidden_dim,num_tensor_parallel_workers"
ATTENTION = "n_embd,n_q_head,n_kv_head,num_tensor_parallel_workers,batch_size,prefill_chunk_size,kv_cache_size,is_mixed_batch"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def one(folder: Path, name: str, text: str) -> Measured:
    (table,) = read_measured(write(folder, name, text), FACTS)
    return table


# File, content → (kind, seconds of the first row, some columns of the first row).
KNOWN: list[tuple[str, str, str, float, dict[str, float | str]]] = [
    ("any.csv", "gemm_dtype,m,n,k,latency\nfp8,1,2,3,0.5\n", "gemm", 0.5e-3, {"m": 1, "n": 2, "k": 3, "gemm_dtype": "fp8"}),
    ("x.txt", "framework,version,gemm_dtype,m,n,k,latency\nVLLM,1,bfloat16,1,2,3,0.5\n", "gemm", 0.5e-3, {"m": 1}),
    ("any.csv.gz", "m,k,n,latency_us,mfu\n16,7168,1536,16.443,0.01\n", "gemm", 16.443e-6, {"k": 7168, "n": 1536, "gemm_dtype": "fp8_block"}),
    (
        "g.csv",
        "num_local_experts,hidden_size,intermediate_size,tokens_per_expert,up_proj_us,down_proj_us\n4,7168,2048,32,51,31\n",
        "grouped_gemm",
        82e-6,
        {"slots": 4, "assignments": 128, "hidden_size": 7168, "inter_size": 2048},
    ),
    (
        "mha__decode__x__32-4-128.csv",
        "dtype,kv_dtype,batch_size,kv_len,latency_us,mfu\nbf16,fp8,16,4096,58,0.1\n",
        "attn_generation",
        58e-6,
        {"num_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "step": 4095, "kv_cache_dtype": "fp8", "attn_dtype": "bfloat16"},
    ),
    ("mha/prefill/x/16-2-256.csv", "dtype,seq_len,latency_us\nbf16,1024,98.7\n", "attn_context", 98.7e-6, {"num_heads": 16, "head_dim": 256, "isl": 1024}),
    ("mla__decode__x__128-512-64.csv", "batch_size,kv_len,latency_us\n1,1024,20\n", "mla_generation", 20e-6, {"num_heads": 128, "step": 1023}),
    ("mla__prefill__x__128-128-64.csv", "dtype,seq_len,latency_us\nbf16,1024,116\n", "mla_expanded", 116e-6, {"num_heads": 128, "isl": 1024}),
    ("tp2/moe.csv", "tokens,activated_experts,time_us\n2,16,134.9\n", "grouped_gemm", 134.9e-6, {"active": 16, "assignments": 16, "inter_size": 384}),
    ("per_sequence.csv", "layer,sequences,time_us\nlm_head,4,418\n", "gemm", 418e-6, {"m": 4, "n": 1000, "k": 2048}),
    ("dense.csv", "layer,tokens,time_us\nqkv_proj,4,10\n", "gemm", 10e-6, {"m": 4, "n": (32 + 8) * 128, "k": 2048}),
    ("dense.csv", "layer,tokens,time_us\nlayernorm,4,3\n", "stream", 3e-6, {"moved_bytes": 4 * 4 * 2 * 2048.0, "operator": "layernorm"}),
    (
        "moe.csv",
        f"time_stats.moe_grouped_gemm.median,{FRONTIER}\n0.2,10,128,16,8,2048,768,4\n",
        "grouped_gemm",
        0.2e-3,
        {"slots": 16, "assignments": 80, "inter_size": 192},
    ),
    (
        "attention.csv",
        f"time_stats.attn_decode.median,{ATTENTION}\n0.07,2048,32,4,2,8,0,512,False\n",
        "attn_generation",
        0.07e-3,
        {"num_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "batch_size": 8, "step": 512},
    ),
    (
        "linear_op.csv",
        "time_stats.mlp_down_proj.mean,n_head,n_kv_head,n_embd,n_expanded_embd,num_tokens,num_tensor_parallel_workers\n0.01,32,4,2048,6144,64,2\n",
        "gemm",
        0.01e-3,
        {"m": 64, "n": 2048, "k": 3072},
    ),
    (
        "all_reduce.csv",
        ",time_stats.all_reduce.median,num_workers,size,devices_per_node\n0,0.037,8,2048,8\n",
        "collective",
        0.037e-3,
        {"op_name": "all_reduce", "num_gpus": 8, "num_nodes": 1, "message_bytes": 2048},
    ),
    ("old.csv", "time_stats.all_reduce.mean,num_workers,n_embd,num_tokens\n0.006,2,4096,8\n", "collective", 6e-6, {"message_bytes": 65536, "num_nodes": 1}),
    ("send_recv.csv", "time_stats.send_recv.median,num_workers,size,devices_per_node\n0.02,2,4096,1\n", "collective", 20e-6, {"num_nodes": 2}),
    ("n.csv", "op_name,nccl_dtype,num_gpus,message_size,latency\nall_gather,half,2,256,0.005\n", "collective", 5e-6, {"message_bytes": 512}),
]


@pytest.mark.parametrize(("name", "text", "kind", "seconds", "columns"), KNOWN, ids=[f"{index}-{item[0]}" for index, item in enumerate(KNOWN)])
def test_headers_are_recognised_and_units_become_si(tmp_path: Path, name: str, text: str, kind: str, seconds: float, columns: dict[str, float | str]) -> None:
    table = one(tmp_path, name, text)
    assert table.kind == kind and not table.excluded
    assert table.rows["latency_s"] == pytest.approx([seconds], rel=1e-12)
    assert {column: table.rows[column][0] for column in columns} == columns


def test_columns_in_any_order_and_more_columns_make_no_difference(tmp_path: Path) -> None:
    plain = one(tmp_path, "a.csv", "gemm_dtype,m,n,k,latency\nfp8,1,2,3,0.5\n")
    other = one(tmp_path, "b.csv", "latency,extra,k,n,m,gemm_dtype\n0.5,9,3,2,1,fp8\n")
    assert all(plain.rows[column].tolist() == other.rows[column].tolist() for column in plain.rows)


def test_one_file_may_time_several_operators(tmp_path: Path) -> None:
    header = "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us"
    path = write(tmp_path, "attention.csv", f"{header}\n0,0,4,512,8\n16,0,0,0,9\n16,32,0,0,9\n16,0,4,512,12\n")
    tables = {table.kind: table for table in read_measured(path, FACTS)}
    assert {kind: len(table.rows["latency_s"]) for kind, table in tables.items()} == {"attn_generation": 1, "attn_context": 2, "attn_mixed": 1}
    assert tables["attn_context"].rows["prefix"].tolist() == [0, 32]


def test_rows_that_cannot_be_read_are_counted_and_stop_no_other(tmp_path: Path) -> None:
    rows = [
        "fp8,1,2,3,0.5",
        "fp8,1,2,3",
        "fp8,x,2,3,0.5",
        "fp8,1,2,3,nan",
        "fp8,1,2,3,-1",
        "fp8,0,2,3,1",
        "fp8,1e30,2,3,1",
        "fp8,1,2,3,",
        "fp8,1,2,-3,1",
        "fp8,2,2,3,1",
    ]
    table = one(tmp_path, "a.csv", "gemm_dtype,m,n,k,latency\n" + "\n".join(rows) + "\n")
    assert table.rows["m"].tolist() == [1, 2]
    assert table.excluded == {
        "line has too few or too many cells": 1,
        "time is missing or not a number": 2,
        "time is not positive and finite": 1,
        "a size is missing, negative, too large or not a number": 3,
        "a size is below 1": 1,
    }


def test_expert_rows_with_one_token_each_are_left_out_by_their_input(tmp_path: Path) -> None:
    header = "num_local_experts,hidden_size,intermediate_size,tokens_per_expert,up_proj_us,down_proj_us"
    table = one(tmp_path, "g.csv", f"{header}\n4,7168,2048,1,5,5\n4,7168,2048,2,9,9\n")
    assert table.rows["assignments"].tolist() == [8] and list(table.excluded.values()) == [1]


def test_sparse_attention_is_known_and_left_out(tmp_path: Path) -> None:
    for name, text in (
        ("dsa__decode__x__attn-128-576-2048.csv", "dtype,kv_dtype,batch_size,kv_len,latency_us\nbf16,fp8,64,1024,91\n"),
        ("dsa__logits.csv", "s_q,s_kv,latency_us\n2048,4096,101\n"),
    ):
        table = one(tmp_path, name, text)
        assert not len(table.rows["latency_s"]) and sum(table.excluded.values()) == 1 and "sparse" in next(iter(table.excluded))


def test_what_the_file_does_not_say_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "moe.csv", "tokens,activated_experts,time_us\n2,16,134.9\n")
    with pytest.raises(HardwareError, match=r"moe.csv: does not state hidden_size, expert_ffn_size, top_k .* --model"):
        read_measured(path)
    shapeless = write(tmp_path, "attention.csv", "batch_size,kv_len,latency_us\n1,1024,20\n")
    (table,) = read_measured(shapeless)
    assert "head shape is neither in the file's name nor in a model" in next(iter(table.excluded))
    assert read_measured(shapeless, FACTS)[0].rows["num_key_value_heads"].tolist() == [4]


def test_utilisation_tells_the_dtype_of_a_product(tmp_path: Path) -> None:
    path = write(tmp_path, "gemm.csv", "m,k,n,latency_us,mfu\n16384,4096,4096,5000,0.7421\n")
    for peaks, dtype in (({"peak_bfloat16": 148e12, "peak_fp8": 296e12}, "bfloat16"), ({"peak_bfloat16": 74e12, "peak_fp8": 148e12}, "fp8_block")):
        assert read_measured(path, peaks)[0].rows["gemm_dtype"][0] == dtype


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "a.csv",
            "m,n,k,time\n1,2,3,4\n",
            "columns m, n, k, time belong to no known table; expected columns, nearest first: m + n + k + latency_us (lacks latency_us)",
        ),
        ("a.csv", "gemm_dtype,m,n,k,latency\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "m,m\n1,2\n", "every one once"),
        ("a.csv.gz", "", "has no rows"),
        ("none.csv", "time_stats.attn_decode.median," + ATTENTION + "\n,2048,32,4,2,8,0,512,False\n", "every time_stats column is empty"),
        ("a.csv", "tokens_per_expert,num_local_experts,hidden_size,intermediate_size,up_proj_us,down_proj_us\na,b,c,d,e,f\n", "text where sizes or times"),
        ("a.parquet", "plain text under another name", "is not a Parquet table"),
    ],
)
def test_what_is_not_a_table_is_refused_with_its_name(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(HardwareError) as caught:
        read_measured(write(tmp_path, name, text), FACTS)
    assert words in str(caught.value) and name in str(caught.value)


def test_sizes_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.hardware.table_files.MAX_CSV_BYTES", 1000)
    with pytest.raises(HardwareError, match="decompressed size"):
        read_measured(write(tmp_path, "bomb.csv.gz", "gemm_dtype,m,n,k,latency\n" + "fp8,1,2,3,4\n" * 5000))
    monkeypatch.undo()
    monkeypatch.setattr("moesim.hardware.measured.MAX_TABLE_ROWS", 10)
    with pytest.raises(HardwareError, match="rows = '> 10' must be <= 10"):
        read_measured(write(tmp_path, "long.csv", "gemm_dtype,m,n,k,latency\n" + "fp8,1,2,3,4\n" * 20))


HEADERS = sorted({item[1].splitlines()[0] for item in KNOWN})


@given(
    st.sampled_from(HEADERS),
    st.lists(st.lists(st.sampled_from(["1", "0", "-3", "2.5", "nan", "inf", "1e400", "", "fp8", "True", "'", "0x10"]), max_size=9), max_size=6),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_under_any_header_gives_clean_rows_or_an_error(tmp_path: Path, header: str, cells: list[list[str]]) -> None:
    width = header.count(",") + 1
    lines = [",".join((row * width)[:width]) if row else "" for row in cells]
    path = write(tmp_path, "mha__decode__x__32-4-128.csv", "\n".join([header, *lines]) + "\n")
    try:
        tables = read_measured(path, FACTS)
    except HardwareError as error:
        assert path.name in str(error)
        return
    for table in tables:
        sizes = {len(values) for values in table.rows.values()}
        assert len(sizes) == 1 and all(count > 0 for count in table.excluded.values())
        for values in table.rows.values():
            assert values.dtype == object or (np.isfinite(values).all() and (values >= 0).all())


def test_conversion_writes_what_was_read(tmp_path: Path) -> None:
    source = write(tmp_path, "moe.csv", "tokens,activated_experts,time_us\n4,8,50\n2,8,40\n2,16,90\n")
    assert convert_measured([source], tmp_path / "out", facts=FACTS, origin="me", licence="CC0") == ("grouped_gemm_llmservingsim",)
    table = read_table(tmp_path / "out", "grouped_gemm_llmservingsim")
    assert sorted(table["latency_s"].tolist()) == pytest.approx([40e-6, 50e-6, 90e-6]) and table["assignments"].dtype == np.int64
    facts = table_metadata(tmp_path / "out", "grouped_gemm_llmservingsim")
    assert (facts["source"], facts["licence"], facts["kind"], facts["units"]) == ("me", "CC0", "grouped_gemm", {"latency_s": "s"})
    (again,) = read_measured(tmp_path / "out" / "grouped_gemm_llmservingsim.parquet")
    assert again.kind == "grouped_gemm" and again.source == "llmservingsim"


@pytest.mark.parametrize(("spelling", "per_second"), [("latency_ms", 1e3), ("time_us", 1e6), ("duration_ns", 1e9), ("Latency (us)", 1e6), ("elapsed_s", 1.0)])
@pytest.mark.parametrize(("shape", "kind"), [("gemm_dtype,m,n,k", "gemm"), ("m,k,n", "gemm"), ("tokens,activated_experts", "grouped_gemm")])
def test_a_time_column_that_states_its_unit_is_understood(tmp_path: Path, spelling: str, per_second: float, shape: str, kind: str) -> None:
    cells = ",".join("bfloat16" if name == "gemm_dtype" else "64" for name in shape.split(","))
    table = one(tmp_path, "foreign.csv", f"{spelling},{shape}\n{0.5e-3 * per_second!r},{cells}\n")
    assert table.rows["latency_s"] == pytest.approx([0.5e-3]) and table.kind == kind


def test_a_time_without_a_unit_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="with its unit behind, like latency_ms"):
        one(tmp_path, "foreign.csv", "gemm_dtype,m,n,k,elapsed\nbfloat16,1,2,3,4\n")
