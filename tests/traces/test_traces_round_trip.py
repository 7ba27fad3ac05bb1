"""What is written is what is read, and the same rows give the same bytes."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.manifest import KERNELS_SPEC, STEPS_SPEC, Columns
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import DUMMY, RoutingTrace, TokenBatch
from moesim.traces.writer import TraceWriter, write_trace
from tests.traces.helpers import batch, same_rows, shape, trace


@st.composite
def traces(draw: st.DrawFn) -> RoutingTrace:
    experts = draw(st.sampled_from([2, 5, 64, 256, 257, 300]))
    of = shape(experts, draw(st.integers(1, min(4, experts))), draw(st.integers(1, 4)))
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    kinds = draw(st.sampled_from(["plain", "weights16", "weights32", "predicted", "valid"]))
    seed = draw(st.integers(0, 1000))
    generator = np.random.Generator(np.random.PCG64(seed))
    batches = []
    for index, size in enumerate(sizes):
        one = batch(of, size, seed=seed + index, step=index, requests=draw(st.integers(1, 5)))
        more: dict[str, Any] = {}
        if kinds.startswith("weights"):
            more["weights_TLK"] = generator.random(one.experts_TLK.shape).astype(f"float{kinds[7:]}")
        if kinds == "predicted":
            more["predicted_TLK"] = batch(of, size, seed=seed + 77).experts_TLK
        if kinds == "valid":
            valid = generator.random(one.experts_TLK.shape) < 0.7
            more |= {"valid_TLK": valid, "experts_TLK": np.where(valid, one.experts_TLK, 0).astype(of.dtype)}
        more["phase_T"] = generator.integers(0, 4, size, dtype=np.uint8)
        more["request_T"] = generator.integers(0, 2**64, size, dtype=np.uint64)
        more["position_T"] = generator.integers(0, 2**32, size, dtype=np.uint32)
        more["rank_T"] = generator.integers(0, 2**16, size, dtype=np.uint16)
        batches.append(replace(one, **more))
    return from_batches(of, batches, source="drawn")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=traces())
def test_rows_survive_writing_and_reading(tmp_path: Path, one: RoutingTrace) -> None:
    write_trace(one, tmp_path / "t")
    read = open_trace(str(tmp_path / "t"))
    assert read.shape == one.shape and read.num_rows == one.num_rows
    same_rows(one, read)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one = trace(shape(), 500)
    for name in "ab":
        write_trace(one, tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert open_trace(str(tmp_path / "a")).fingerprint == open_trace(str(tmp_path / "b")).fingerprint


def test_how_rows_are_appended_does_not_change_the_bytes(tmp_path: Path) -> None:
    whole = batch(shape(), 300)
    for name, size in (("a", 300), ("b", 7)):
        with TraceWriter(tmp_path / name, shape()) as writer:
            for start in range(0, 300, size):
                writer.append(whole.take(slice(start, start + size)))
    assert (tmp_path / "a/tokens-00000.parquet").read_bytes() == (tmp_path / "b/tokens-00000.parquet").read_bytes()


def test_a_long_trace_is_cut_into_row_groups_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.traces.columns.GROUP_ROWS", 50)
    of = shape()
    whole = batch(of, 1234, step=np.arange(1234) // 100)
    with TraceWriter(tmp_path / "t", of, shard_groups=3) as writer:
        for start in range(0, 1234, 33):
            writer.append(whole.take(slice(start, start + 33)))
    read = open_trace(str(tmp_path / "t"))
    assert len(list((tmp_path / "t").glob("tokens-*.parquet"))) == 9
    assert [len(part) for part in read.batches()] == [50] * 24 + [34]
    same_rows(from_batches(of, [whole], source="x"), read)


def test_a_stored_zip_is_read_like_the_folder(tmp_path: Path) -> None:
    one = trace(shape())
    write_trace(one, tmp_path / "t")
    for prefix in ("", "t/"):
        path = tmp_path / f"flat{len(prefix)}.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted((tmp_path / "t").iterdir()):
                archive.write(file, prefix + file.name)
        same_rows(one, open_trace(str(path)))


def test_counts_survive_writing_and_reading(tmp_path: Path) -> None:
    counts = np.random.Generator(np.random.PCG64(1)).integers(0, 2**40, (3, 2, 16))
    of = shape(layers=2)
    write_trace(from_counts(of, counts, ["day", "night", "noon"], source="x"), tmp_path / "t")
    read = open_trace(str(tmp_path / "t"))
    assert read.kind == "counts" and read.window_names == ("day", "night", "noon")
    np.testing.assert_array_equal(read.counts_WLE(), counts)
    np.testing.assert_array_equal(read.counts_WLE("all")[0], counts.sum(axis=0))
    names, pairs = read.windows(2)
    assert names == ("day .. night", "noon")
    np.testing.assert_array_equal(pairs[0], counts[:2].sum(axis=0))


def test_what_lies_under_a_missing_choice_is_not_stored(tmp_path: Path) -> None:
    one = batch(shape(), 20)
    valid = np.random.Generator(np.random.PCG64(1)).random(one.experts_TLK.shape) < 0.5
    write_trace(from_batches(shape(), [replace(one, valid_TLK=valid)], source="x"), tmp_path / "t")
    found = next(open_trace(str(tmp_path / "t")).batches())
    np.testing.assert_array_equal(found.experts_TLK, np.where(valid, one.experts_TLK, 0))


def test_a_trace_of_no_tokens_can_be_written_and_read(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "t", shape()):
        pass
    read = open_trace(str(tmp_path / "t"))
    assert list(read.batches()) == [] and read.counts_WLE().sum() == 0


def test_side_tables_survive_and_are_optional(tmp_path: Path) -> None:
    generator = np.random.Generator(np.random.PCG64(2))
    tables = {
        name: {key: generator.integers(0, 200, 9).astype(kind) for key, kind in spec.items()}  # type: ignore[arg-type]
        for name, spec in (("steps", STEPS_SPEC), ("kernels", KERNELS_SPEC))
    }
    with TraceWriter(tmp_path / "t", shape()) as writer:
        writer.append(batch(shape(), 5))
        for name, table in tables.items():
            writer.add_table(name, table)
    read = open_trace(str(tmp_path / "t"))
    assert read.tables is not None
    for name, table in tables.items():
        found = read.tables(name)
        assert found is not None and list(found) == list(table)
        for key, values in table.items():
            np.testing.assert_array_equal(found[key], values)
    write_trace(read, tmp_path / "copy")
    assert (tmp_path / "copy/kernels.parquet").read_bytes() == (tmp_path / "t/kernels.parquet").read_bytes()
    write_trace(trace(shape()), tmp_path / "bare")
    bare = open_trace(str(tmp_path / "bare"))
    assert bare.tables is not None and bare.tables("kernels") is None


def test_counts_of_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    of = shape()
    one = batch(of, 200, step=np.repeat([3, 4, 9, 4], 50))
    valid = np.random.Generator(np.random.PCG64(5)).random(one.experts_TLK.shape) < 0.8
    phases = np.where(np.arange(200) % 7 == 0, DUMMY, 0).astype(np.uint8)
    held = from_batches(of, [replace(one, valid_TLK=valid, phase_T=phases)], source="x")
    expected = {step: np.zeros((3, 16), dtype=int) for step in (3, 4, 9)}
    for token in range(200):
        for layer in range(3):
            for choice in range(2):
                if valid[token, layer, choice] and phases[token] != DUMMY:
                    expected[int(one.step_T[token])][layer, one.experts_TLK[token, layer, choice]] += 1
    names, counts = held.windows()
    assert names == ("step 3", "step 4", "step 9")
    np.testing.assert_array_equal(counts, np.stack([expected[3], expected[4], expected[9]]))
    np.testing.assert_array_equal(held.counts_WLE("all")[0], sum(expected.values()))
    names, pairs = held.windows(2)
    assert names == ("steps 3..4", "steps 9..10")
    np.testing.assert_array_equal(pairs, np.stack([expected[3] + expected[4], expected[9]]))


def test_a_crash_leaves_a_folder_that_readers_refuse(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), TraceWriter(tmp_path / "t", shape()) as writer:
        writer.append(batch(shape(), 5))
        raise RuntimeError("killed")
    with pytest.raises(TraceError, match="not finished"):
        open_trace(str(tmp_path / "t"))


def test_rewriting_a_trace_removes_its_manifest_first(tmp_path: Path) -> None:
    write_trace(trace(shape()), tmp_path / "t")
    TraceWriter(tmp_path / "t", shape())
    assert os.listdir(tmp_path / "t") == []


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(TraceError, match=r"thesis\.tex"):
        TraceWriter(tmp_path, shape())
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_trace_is_not_written_over_itself(tmp_path: Path) -> None:
    write_trace(trace(shape()), tmp_path / "t")
    with pytest.raises(TraceError, match="being read"):
        write_trace(open_trace(str(tmp_path / "t")), tmp_path / "t")
    same_rows(trace(shape()), open_trace(str(tmp_path / "t")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_TLK": np.full((5, 3, 2), 16, dtype=np.uint8)}, "expert id = 16 must be < 16"),
        ({"experts_TLK": np.zeros((5, 2, 2), dtype=np.uint8)}, "experts"),
        ({"experts_TLK": np.zeros((5, 3, 2), dtype=np.uint16)}, "uint8"),
        ({"phase_T": np.full(5, 4, dtype=np.uint8)}, "phase = 4"),
        ({"valid_TLK": np.zeros((5, 3, 2), dtype=bool)}, "valid"),
    ],
)
def test_rows_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    columns: dict[str, Any] = {name: getattr(batch(shape(), 5), name) for name in TokenBatch.__dataclass_fields__}
    with pytest.raises(TraceError, match=message), TraceWriter(tmp_path / "t", shape(), columns=Columns()) as writer:
        writer.append(TokenBatch(**(columns | change)))
