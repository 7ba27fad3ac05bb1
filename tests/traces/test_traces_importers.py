"""Importers: what each format means, and the traps that its users have fallen into."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError, MoesimError, TraceError
from moesim.traces.importers import FORMATS, import_trace
from moesim.traces.importers.common import ImportOptions
from moesim.traces.importers.trtllm import read_safetensors
from moesim.traces.routing_trace import DECODE, DUMMY, PREFILL, RoutingTrace, TokenBatch, TraceShape, concatenate
from tests.traces.helpers import batch, shape

DEEP = TraceShape(model="deep", num_experts=16, top_k=2, moe_layer_ids=(1, 2, 3))
"""Four layers, the first of them dense."""


def rows(trace: RoutingTrace) -> TokenBatch:
    return concatenate(list(trace.batches()))


def notes(trace: RoutingTrace) -> str:
    return "\n".join(trace.provenance["notes"])


def ids(tokens: int, layers: int = 3, k: int = 2, experts: int = 16, seed: int = 0) -> np.ndarray:
    return np.asarray(batch(shape(experts, k, layers), tokens, seed=seed).experts_TLK)


# --- topk-csv -----------------------------------------------------------------------------------------


def csv_of(table: np.ndarray, *, base: int = 0, weights: bool = False) -> str:
    k = table.shape[2]
    lines = [",".join(["layer", "token", *(f"e{i}" for i in range(k)), *(f"p{i}" for i in range(k) if weights)])]
    for layer in range(table.shape[1]):
        for token in range(len(table)):
            extra = [f"0.{token % 9 + 1}{i}" for i in range(k)] if weights else []
            lines.append(",".join([str(layer + base), str(token), *map(str, table[token, layer]), *extra]))
    return "\n".join(lines) + "\n"


def test_topk_csv_layer_base_and_interleave(tmp_path: Path) -> None:
    table = ids(12)
    (tmp_path / "a.csv").write_text(csv_of(table, base=2, weights=True))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes(), mtime=0))
    for name in ("a.csv", "a.csv.gz"):
        trace = import_trace("topk-csv", tmp_path / name, ImportOptions(layer_base=1, interleave=4, experts=16, name="m"))
        assert trace.shape == TraceShape(model="m", num_experts=16, top_k=2, moe_layer_ids=(1, 2, 3))
        found = rows(trace)
        np.testing.assert_array_equal(found.experts_TLK, table)
        assert found.request_T.tolist() == [0, 1, 2, 3] * 3 and found.position_T.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert found.weights_TLK is not None and found.weights_TLK[3, 0].tolist() == pytest.approx([0.40, 0.41])


def test_topk_csv_rows_may_come_in_any_order_and_may_lack_some(tmp_path: Path) -> None:
    table = ids(6)
    lines = csv_of(table).splitlines()
    body = [line for line in lines[1:] if not line.startswith("1,4,")]
    (tmp_path / "a.csv").write_text("\n".join([lines[0], *body[::-1]]))
    trace = import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(experts=16))
    found = rows(trace)
    assert found.valid_TLK is not None and not found.valid_TLK[4, 1].any() and found.valid_TLK.sum() == 6 * 3 * 2 - 2
    table[4, 1] = 0
    np.testing.assert_array_equal(found.experts_TLK, table)
    assert "missing" in notes(trace)


def test_topk_csv_reads_optional_columns(tmp_path: Path) -> None:
    text = "layer,token,e0,e1,step,request,position,phase,rank\n0,0,1,2,5,77,3,1,2\n0,1,2,-1,6,78,4,0,3\n1,0,3,4,5,77,3,1,2\n1,1,4,5,6,78,4,0,3\n"
    (tmp_path / "a.csv").write_text(text)
    found = rows(import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(experts=16)))
    assert found.step_T.tolist() == [5, 6] and found.request_T.tolist() == [77, 78] and found.position_T.tolist() == [3, 4]
    assert found.phase_T.tolist() == [DECODE, PREFILL] and found.rank_T.tolist() == [2, 3]
    assert found.valid_TLK is not None and found.valid_TLK[1, 0].tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "header"),
        ("layer,token\n0,0\n", {}, "header"),
        ("layer,token,e0,colour\n0,0,1,2\n", {}, "header"),
        ("layer,token,e0,e0\n0,0,1,1\n", {}, "header"),
        ("layer,token,e0,e1,p0\n0,0,1,2,3\n", {}, "header"),
        ("layer,token,e0\n", {}, "no rows"),
        ("layer,token,e0\n0,0,x\n", {}, "numbers"),
        ("layer,token,e0\n0,0,1\n0,1\n", {}, "numbers"),
        ("layer,token,e0\n0,0,1.5\n", {}, "whole number"),
        ("layer,token,e0\n0,0,nan\n", {}, "whole number"),
        ("layer,token,e0\n0,0,1e300\n", {}, "whole number"),
        ("layer,token,e0\n0,0,-2\n", {}, "whole number"),
        ("layer,token,e0\n0,0,16\n", {"experts": 16}, "experts = 17"),
        ("layer,token,e0\n0,0,1\n0,0,2\n", {}, "twice"),
        ("layer,token,e0\n0,0,1\n", {"layer_base": 1}, "layer"),
        ("layer,token,e0\n0,0,1\n", {"top_k": 2}, "top-k"),
        ("layer,token,e0,e1\n0,0,1,2\n", {"shape": DEEP}, r"layers = \[0\] must be MoE layers"),
        ("layer,token,e0\n1,0,1\n", {"shape": DEEP}, "top-k = 1 must be the 2"),
        ("layer,token,e0,step\n0,0,1,5\n1,0,1,6\n", {}, "same in all layers"),
        ("layer,token,e0,p0\n0,0,1,inf\n", {}, "finite"),
    ],
)
def test_topk_csv_refuses(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(TraceError, match=message):
        import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(**options))


def test_a_gzip_bomb_is_refused(tmp_path: Path) -> None:
    line = b"0,0,1\n" * 200_000
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as file:
        file.write(b"layer,token,e0\n")
        for _ in range(8):
            file.write(line)
    (tmp_path / "a.csv.gz").write_bytes(packed.getvalue())
    assert len(packed.getvalue()) < 100_000
    with pytest.raises(TraceError, match="too large"):
        import_trace("topk-csv", tmp_path / "a.csv.gz")


def test_a_damaged_gzip_is_refused(tmp_path: Path) -> None:
    data = gzip.compress(csv_of(ids(40)).encode(), mtime=0)
    for bad in (data[: len(data) // 2], data[:40] + b"\xff\xff\xff\xff" + data[44:], b"x" * 30):
        (tmp_path / "a.csv.gz").write_bytes(bad)
        with pytest.raises(TraceError, match=r"a\.csv\.gz"):
            import_trace("topk-csv", tmp_path / "a.csv.gz")


# --- warm-up ------------------------------------------------------------------------------------------


def test_identical_tokens_at_the_start_are_marked_as_dummies(tmp_path: Path) -> None:
    table = ids(40)
    table[:10] = table[0]
    (tmp_path / "a.csv").write_text(csv_of(table))
    trace = import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(experts=16))
    assert rows(trace).phase_T.tolist() == [DUMMY] * 10 + [PREFILL] * 30
    assert "10 identical tokens at the start" in notes(trace) and trace.num_rows == 40
    assert trace.counts_WLE("all").sum() == 30 * 3 * 2
    kept = import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(experts=16, keep_warmup=True))
    assert (rows(kept).phase_T == PREFILL).all()


def test_equal_first_tokens_of_different_prompts_are_not_warm_up(tmp_path: Path) -> None:
    table = ids(80)
    table[:8] = table[0]  # a begin-of-text token in each of 8 sequences
    (tmp_path / "a.csv").write_text(csv_of(table))
    assert (rows(import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(interleave=8, experts=16))).phase_T == PREFILL).all()
    assert rows(import_trace("topk-csv", tmp_path / "a.csv", ImportOptions(experts=16))).phase_T.tolist()[:9] == [DUMMY] * 8 + [PREFILL]


def test_a_few_equal_tokens_by_chance_are_not_warm_up(tmp_path: Path) -> None:
    np.save(tmp_path / "trace.npy", np.array([[1], [1], [1], [1], [1], [0], [1]]))
    assert (rows(import_trace("exflow", tmp_path / "trace.npy", ImportOptions(experts=2))).phase_T == PREFILL).all()


# --- counts -------------------------------------------------------------------------------------------


def test_counts_json_takes_moe_rows_or_all_rows(tmp_path: Path) -> None:
    table = np.arange(1, 3 * 16 + 1).reshape(3, 16)
    every = np.concatenate([np.zeros((1, 16), dtype=int), table])
    for node in (table, every, every[None], {"logical_count": every}, {"logical_count": [every]}, {"counts": table}):
        text = json.dumps(node, default=lambda value: value.tolist())
        (tmp_path / "c.json").write_text(text)
        trace = import_trace("counts-json", tmp_path / "c.json", ImportOptions(shape=DEEP))
        np.testing.assert_array_equal(trace.counts_WLE()[0], table)
        assert trace.shape == DEEP
    guessed = import_trace("counts-json", tmp_path / "c.json", ImportOptions(top_k=2, name="m"))
    (tmp_path / "c.json").write_text(json.dumps(every.tolist()))
    guessed = import_trace("counts-json", tmp_path / "c.json", ImportOptions(top_k=2, name="m"))
    assert guessed.shape.moe_layer_ids == (1, 2, 3) and "no counts" in notes(guessed)


def test_counts_json_windows_can_be_merged(tmp_path: Path) -> None:
    table = np.random.Generator(np.random.PCG64(0)).integers(1, 9, (5, 3, 16))
    (tmp_path / "c.json").write_text(json.dumps(table.tolist()))
    trace = import_trace("counts-json", tmp_path / "c.json", ImportOptions(shape=DEEP, merge_windows=2))
    assert trace.window_names == ("window 0 .. window 1", "window 2 .. window 3", "window 4")
    np.testing.assert_array_equal(trace.counts_WLE(), np.stack([table[:2].sum(0), table[2:4].sum(0), table[4]]))


@pytest.mark.parametrize(
    ("node", "options", "message"),
    [
        ([[1] * 16] * 3, {}, "--top-k"),
        ([[1] * 16] * 2, {"shape": DEEP}, "layer rows"),
        ([[1] * 15] * 3, {"shape": DEEP}, "experts = 15"),
        ([[1] * 16] * 4, {"shape": DEEP}, "layers with counts"),
        ([[0] * 16] * 3, {"top_k": 2}, "all counts are 0"),
        ([[-1] * 16] * 3, {"shape": DEEP}, ">= 0"),
        ([[0.5] * 16] * 3, {"shape": DEEP}, "whole numbers"),
        ([[1] * 16, [1] * 15], {"top_k": 2}, "equal length"),
        ([["1"] * 16] * 3, {"shape": DEEP}, "numbers"),
        ([[2**70] * 16] * 3, {"shape": DEEP}, "numbers|integers|2\\^48"),
        ([[2**60] * 16] * 3, {"shape": DEEP}, "2\\^48"),
        ({"other": 1}, {"shape": DEEP}, "keys"),
        ({"logical_count": [[1]], "counts": [[1]]}, {"shape": DEEP}, "keys"),
        ([], {"shape": DEEP}, "layers"),
        (None, {"shape": DEEP}, "layers"),
    ],
)
def test_counts_json_refuses(tmp_path: Path, node: Any, options: dict[str, Any], message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(node))
    with pytest.raises(TraceError, match=message):
        import_trace("counts-json", tmp_path / "c.json", ImportOptions(**options))


LONG = "model,domain,layer,expert,count\n" + "".join(
    f"{m},{d},{layer},{e},{e + 10 * layer + (m == 'b')}\n" for m in "ab" for d in ("x", "y") for layer in (0, 7) for e in range(4)
)


def test_counts_csv_selects_rows_and_windows(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(LONG)
    trace = import_trace("counts-csv", tmp_path / "c.csv", ImportOptions(where=(("model", "b"),), window_column="domain", top_k=2, experts=4))
    assert trace.window_names == ("x", "y") and trace.shape.moe_layer_ids == (0, 7)
    np.testing.assert_array_equal(trace.counts_WLE()[1], [[1, 2, 3, 4], [71, 72, 73, 74]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_column": "domain"}, "'model' has several values"),
        ({"where": (("model", "c"),)}, "no row"),
        ({"where": (("size", "c"),)}, "header"),
        ({"where": (("model", "a"),), "window_column": "domain", "experts": 3}, "experts"),
        ({"where": (("model", "a"),), "window_column": "domain", "layer_base": 1}, ">= 0"),
    ],
)
def test_counts_csv_refuses(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "c.csv").write_text(LONG)
    with pytest.raises(TraceError, match=message):
        import_trace("counts-csv", tmp_path / "c.csv", ImportOptions(top_k=2, **options))


def test_adrs_history_becomes_windows(tmp_path: Path) -> None:
    loads = np.random.Generator(np.random.PCG64(0)).integers(0, 99, (5, 3, 16))
    node = {"note": "x", "load_history": [{"t": 1, "logical_expert_load": load.tolist()} for load in loads]}
    for indent in (None, 2):
        (tmp_path / "expert-load.json").write_text(json.dumps(node, indent=indent))
        trace = import_trace("adrs", tmp_path / "expert-load.json", ImportOptions(shape=DEEP))
        np.testing.assert_array_equal(trace.counts_WLE(), loads)
    merged = import_trace("adrs", tmp_path / "expert-load.json", ImportOptions(shape=DEEP, merge_windows=3))
    assert merged.window_names == ("windows 0..2", "windows 3..4")
    np.testing.assert_array_equal(merged.counts_WLE(), np.stack([loads[:3].sum(0), loads[3:].sum(0)]))


@pytest.mark.parametrize("cut", [20, 60, 200, -2])
def test_adrs_refuses_a_truncated_file(tmp_path: Path, cut: int) -> None:
    text = json.dumps({"load_history": [{"logical_expert_load": [[1, 2], [3, 4]]}] * 9})
    (tmp_path / "e.json").write_text(text[:cut])
    with pytest.raises(TraceError, match=r"damaged or truncated|load_history"):
        import_trace("adrs", tmp_path / "e.json", ImportOptions(top_k=1))


# --- vllm ---------------------------------------------------------------------------------------------


def test_vllm_signed_8_bit_ids_are_unwrapped(tmp_path: Path) -> None:
    table = ids(20, experts=200, k=4)
    assert (table >= 128).any()
    np.save(tmp_path / "r.npy", table.astype(np.uint8).view(np.int8))
    trace = import_trace("vllm", tmp_path / "r.npy", ImportOptions(experts=200))
    np.testing.assert_array_equal(rows(trace).experts_TLK, table)
    assert rows(trace).valid_TLK is None and "signed 8-bit" in notes(trace)


def test_vllm_id_255_is_an_expert_only_where_there_are_256(tmp_path: Path) -> None:
    table = ids(20, experts=250, k=4).astype(np.uint8)
    table[5, 1, 3] = 255
    np.save(tmp_path / "r.npy", table)
    few = rows(import_trace("vllm", tmp_path / "r.npy", ImportOptions(experts=250)))
    assert few.valid_TLK is not None and (~few.valid_TLK).sum() == 1 and not few.valid_TLK[5, 1, 3]
    many = rows(import_trace("vllm", tmp_path / "r.npy", ImportOptions(experts=256)))
    assert many.valid_TLK is None and many.experts_TLK[5, 1, 3] == 255
    with pytest.raises(TraceError, match="cannot tell"):
        import_trace("vllm", tmp_path / "r.npy", ImportOptions())
    for signed in (False, True):
        table[7] = 255  # an unwritten row, whatever the model
        np.save(tmp_path / "r.npy", table.view(np.int8) if signed else table)
        found = rows(import_trace("vllm", tmp_path / "r.npy", ImportOptions(experts=256)))
        assert found.valid_TLK is not None and not found.valid_TLK[7].any() and found.valid_TLK[5, 1, 3]


@pytest.mark.parametrize("filler", [-1, 0, 7])
def test_vllm_a_last_token_without_routing_is_dropped(tmp_path: Path, filler: int) -> None:
    table = ids(20).astype(np.int16)
    np.savez(tmp_path / "r.npz", a=np.concatenate([table[:9], np.full((1, 3, 2), filler, dtype=np.int16)]), b=table[9:])
    trace = import_trace("vllm", tmp_path / "r.npz", ImportOptions(experts=16))
    np.testing.assert_array_equal(rows(trace).experts_TLK, table)
    assert trace.num_rows == 20 and trace.facts["dropped_rows"] == 1 and "last token" in notes(trace)
    assert len(np.unique(rows(trace).request_T)) == 2
    assert rows(trace).position_T.tolist() == [*range(9), *range(11)]


def test_vllm_rows_may_be_all_layers(tmp_path: Path) -> None:
    table = np.concatenate([np.zeros((20, 1, 2), dtype=np.uint8), ids(20)], axis=1).astype(np.int16)
    np.save(tmp_path / "r.npy", table)
    for options in (ImportOptions(shape=DEEP), ImportOptions(experts=16)):
        trace = import_trace("vllm", tmp_path / "r.npy", options)
        assert trace.shape.moe_layer_ids == (1, 2, 3)
        np.testing.assert_array_equal(rows(trace).experts_TLK, table[:, 1:])


def test_vllm_prompt_and_generated_tokens_are_one_request(tmp_path: Path) -> None:
    table = ids(20).astype(np.int16)
    np.savez(tmp_path / "r.npz", prompt_routed_experts=table[:15], routed_experts=table[15:])
    found = rows(import_trace("vllm", tmp_path / "r.npz", ImportOptions(experts=16)))
    assert found.phase_T.tolist() == [PREFILL] * 15 + [DECODE] * 5 and found.position_T.tolist() == list(range(20))
    assert len(np.unique(found.request_T)) == 1


def test_vllm_a_folder_holds_one_request_per_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", ids(5, seed=ord(name)))
    found = rows(import_trace("vllm", tmp_path, ImportOptions(experts=16, phase="decode")))
    assert len(found) == 10 and len(np.unique(found.request_T)) == 2 and (found.phase_T == DECODE).all()


def _npy(header: str, body: bytes = b"") -> bytes:
    padded = header.encode() + b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        _npy("{'descr': '<i2', 'fortran_order': False, 'shape': (1000000000, 100, 8), }"),
        _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1), }", b"\x80\x04N."),
        _npy("{'descr': '<i2', 'fortran_order': False, 'shape': (1, 1, 2), }", b"\0" * 3),
        _npy("{'descr': '<i2', 'fortran_order': False, 'shape': (-1, 1, 2), }", b"\0" * 4),
        _npy("__import__('os').abort()"),
        _npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 2), }", b"\0" * 8),
    ],
)
def test_arrays_that_lie_or_need_pickle_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "r.npy").write_bytes(data)
    with pytest.raises(TraceError, match=r"r\.npy"):
        import_trace("vllm", tmp_path / "r.npy", ImportOptions(experts=16))


def test_an_npz_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", _npy("{'descr': '<i2', 'fortran_order': False, 'shape': (100, 100, 3500), }", bytes(70_000_000)))
    with pytest.raises(TraceError, match="too large"):
        import_trace("vllm", tmp_path / "r.npz", ImportOptions(experts=16))


# --- exflow, trtllm -----------------------------------------------------------------------------------


def test_exflow_is_top_1(tmp_path: Path) -> None:
    table = ids(30, k=1)[:, :, 0]
    np.save(tmp_path / "trace.npy", table.astype(np.int64))
    trace = import_trace("exflow", tmp_path / "trace.npy", ImportOptions(experts=16))
    np.testing.assert_array_equal(rows(trace).experts_TLK[:, :, 0], table)
    assert trace.shape.top_k == 1 and trace.shape.moe_layer_ids == (0, 1, 2)


def safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header, body = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": "I64", "shape": list(tensor.shape), "data_offsets": [len(body), len(body) + tensor.nbytes]}
        body += tensor.astype("<i8").tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def trtllm_folder(folder: Path, counts_RWLE: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "meta_info.json").write_text(json.dumps({"num_experts": counts_RWLE.shape[3], "num_experts_per_token": 2}))
    for rank, windows in enumerate(counts_RWLE):
        safetensors(folder / f"rank{rank}.safetensors", {f"{100 + w}_{layer + 1}": row for w, window in enumerate(windows) for layer, row in enumerate(window)})


def test_trtllm_counts_are_summed_over_ranks(tmp_path: Path) -> None:
    counts = np.random.Generator(np.random.PCG64(0)).integers(0, 99, (4, 2, 3, 16))
    trtllm_folder(tmp_path / "s", counts)
    for options in (ImportOptions(), ImportOptions(shape=DEEP)):
        trace = import_trace("trtllm", tmp_path / "s", options)
        np.testing.assert_array_equal(trace.counts_WLE(), counts.sum(axis=0))
        assert trace.shape.moe_layer_ids == (1, 2, 3) and trace.shape.top_k == 2 and trace.window_names == ("iteration 100", "iteration 101")


def test_trtllm_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    package = pytest.importorskip("safetensors.numpy")
    tensors = {"100_3": np.arange(7, dtype=np.int64), "100_4": np.ones((2, 3), dtype=np.float32)}
    package.save_file(tensors, tmp_path / "x.safetensors", metadata={"a": "b"})
    found = read_safetensors(tmp_path / "x.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_trtllm_a_missing_rank_is_refused(tmp_path: Path) -> None:
    trtllm_folder(tmp_path / "s", np.ones((3, 1, 1, 4), dtype=np.int64))
    (tmp_path / "s/rank1.safetensors").unlink()
    with pytest.raises(TraceError, match="without a gap"):
        import_trace("trtllm", tmp_path / "s")


@pytest.mark.parametrize(
    "header",
    [
        '{"1_1":{"dtype":"I64","shape":[4],"data_offsets":[0,24]}}',
        '{"1_1":{"dtype":"I64","shape":[4],"data_offsets":[8,40]}}',
        '{"1_1":{"dtype":"I64","shape":[4],"data_offsets":[-8,24]}}',
        '{"1_1":{"dtype":"I64","shape":[1073741824,1073741824],"data_offsets":[0,32]}}',
        '{"1_1":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}}',
        '{"1_1":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},"1_2":{"dtype":"I64","shape":[4],"data_offsets":[0,32]}}',
        '{"1_1":{"dtype":"I64","shape":[4],"data_offsets":[0,32]},"1_1":{"dtype":"I64","shape":[4],"data_offsets":[0,32]}}',
        '{"1_1":{"dtype":"I64","shape":[2],"data_offsets":[0,16]}}',
        '{"x":{"dtype":"I64","shape":[4],"data_offsets":[0,32]}}',
        "[]",
        "{",
    ],
)
def test_lying_safetensors_are_refused(tmp_path: Path, header: str) -> None:
    trtllm_folder(tmp_path / "s", np.ones((1, 1, 1, 4), dtype=np.int64))
    (tmp_path / "s/rank0.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(32))
    with pytest.raises(TraceError, match="rank0"):
        import_trace("trtllm", tmp_path / "s")
    (tmp_path / "s/rank0.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + bytes(32))
    with pytest.raises(TraceError, match="header length"):
        import_trace("trtllm", tmp_path / "s")


# --- all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_source_is_named(tmp_path: Path, form: str) -> None:
    with pytest.raises(InputError, match="nothing-here"):
        import_trace(form, tmp_path / "nothing-here.npy", ImportOptions(shape=DEEP))


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="must be one of"):
        import_trace("parquet", tmp_path)


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("trtllm",)])
def test_random_bytes_never_crash_an_importer(tmp_path: Path, form: str) -> None:
    generator = np.random.Generator(np.random.PCG64(7))
    suffix = {"sglang": ".pt", "vllm": ".npz", "exflow": ".npy", "topk-csv": ".csv", "counts-csv": ".csv"}.get(form, ".json")
    for size in (0, 1, 7, 64, 500):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(generator.bytes(size))
        with pytest.raises(MoesimError):
            import_trace(form, path, ImportOptions(shape=DEEP))
