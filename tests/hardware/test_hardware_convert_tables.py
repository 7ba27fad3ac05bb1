"""Conversion of measured CSV tables: units, determinism, and refusal of what is not a table."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import HardwareError
from moesim.hardware.convert_tables import convert_folder, to_si
from moesim.hardware.table_layouts import LAYOUTS, recognise
from moesim.hardware.tables import read_table, table_metadata

GEMM = "kernel_source,gemm_dtype,m,n,k,latency\nk1,fp8,1,128,256,0.25\nk1,bfloat16,2,128,256,4\n"


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return folder


def test_plain_and_gzip_files_convert_alike(tmp_path: Path) -> None:
    source = write(write(tmp_path / "in", "gemm_a1.csv", GEMM), "gemm_b1.csv.gz", GEMM)
    assert convert_folder(source, tmp_path / "out", origin="me", licence="CC0") == ("gemm_a1", "gemm_b1")
    assert (tmp_path / "out/gemm_a1.parquet").read_bytes() == (tmp_path / "out/gemm_b1.parquet").read_bytes()
    table = read_table(tmp_path / "out", "gemm_a1")
    assert table["latency_s"].tolist() == [0.25e-3, 4e-3] and table["gemm_dtype"].tolist() == ["fp8", "bfloat16"] and table["m"].dtype == np.int64
    facts = table_metadata(tmp_path / "out", "gemm_a1")
    assert facts["source"] == "me" and facts["licence"] == "CC0" and facts["units"] == {"latency_s": "s"} and facts["kind"] == "gemm"


def test_all_to_all_latency_is_microseconds_and_the_others_milliseconds() -> None:
    columns = {"comm_backend": ["x"], "phase": ["combine"], "latency": ["45.5"], "transmit_us": ["45.5"]}
    a2a, _ = to_si(columns, recognise(list(columns)), "t")
    assert a2a["latency_s"] == pytest.approx(45.5e-6, rel=1e-15) and a2a["transmit_s"] == a2a["latency_s"]
    other, _ = to_si({"latency": ["45.5"]}, None, "t")
    assert other["latency_s"][0] == 45.5e-3


def test_collective_sizes_become_bytes_by_dtype() -> None:
    columns = {"nccl_dtype": ["half", "int8"], "num_gpus": ["8", "8"], "message_size": ["1024", "1024"], "latency": ["1", "1"]}
    arrays, units = to_si(columns, recognise(list(columns)), "t")
    assert arrays["message_bytes"].tolist() == [2048, 1024] and units["message_bytes"] == "B" and units["message_size"] == "elements"
    with pytest.raises(HardwareError, match="nccl_dtype = 'nibble'"):
        to_si({**columns, "nccl_dtype": ["half", "nibble"]}, None, "t")


@given(st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_units_scale_by_exact_powers_of_ten(values: list[float]) -> None:
    cells = [repr(value) for value in values]
    arrays, _ = to_si({"latency": cells, "a_us": cells, "b_bandwidth_gbps": cells}, None, "t")
    assert set(arrays) == {"latency_s", "a_s", "b_Bps"}
    np.testing.assert_allclose(arrays["latency_s"] * 1e3, values, rtol=1e-15)
    np.testing.assert_allclose(arrays["a_s"] * 1e6, values, rtol=1e-15)
    np.testing.assert_allclose(arrays["b_Bps"] / 1e9, values, rtol=1e-15)


def test_every_layout_is_recognised_by_its_own_columns() -> None:
    for layout in LAYOUTS:
        assert recognise(sorted(layout.columns)) is layout
    assert recognise(["a", "b"]) is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "m,latency\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "m,m\n1,2\n", "must name every column once"),
        ("a.csv", "m,latency\n1,2\n3\n", "line 3"),
        ("a.csv", "m,latency\n1,nan\n", "finite"),
        ("a.csv", "m,latency\n1,-2\n", ">= 0"),
        ("a.csv", "m,latency\n1,fast\n", "must hold numbers"),
        ("a.csv.gz", "plain text under a gzip name", "not a gzip file"),
    ],
)
def test_what_is_not_a_table_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / name).write_text(text)
    with pytest.raises(HardwareError) as caught:
        convert_folder(source, tmp_path / "out")
    assert words in str(caught.value) and name in str(caught.value)
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


def test_a_truncated_gzip_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.csv.gz").write_bytes(gzip.compress(GEMM.encode() * 100)[:60])
    with pytest.raises(HardwareError, match="gzip"):
        convert_folder(source, tmp_path / "out")


def test_a_gzip_bomb_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.hardware.table_files.MAX_CSV_BYTES", 1000)
    source = write(tmp_path / "in", "a.csv.gz", "m,latency\n" + "1,2\n" * 5000)
    with pytest.raises(HardwareError, match="decompressed size"):
        convert_folder(source, tmp_path / "out")


def test_a_folder_without_tables_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HardwareError, match="holds no"):
        convert_folder(tmp_path, tmp_path / "out")
    with pytest.raises(HardwareError, match="is not a folder"):
        convert_folder(tmp_path / "nowhere", tmp_path / "out")
