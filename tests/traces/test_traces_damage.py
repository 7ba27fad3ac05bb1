"""A damaged or lying trace is refused with a message that names the file; nothing is silent, nothing is unbounded."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.errors import MoesimError, TraceError
from moesim.traces.columns import TableReader, open_writer, to_table
from moesim.traces.layout import BadLayout, Chunk, check_pages
from moesim.traces.manifest import Columns, parse_manifest, token_spec
from moesim.traces.open import open_trace
from moesim.traces.reader import StoredTokens, open_stored
from moesim.traces.writer import write_trace
from tests.traces.helpers import batch, replace_shard, restamp, same_rows, shape, trace

SHARD = "tokens-00000.parquet"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_trace(trace(shape(), 40), tmp_path / "t")
    return tmp_path / "t"


def read_all(path: Path) -> None:
    for _ in open_trace(str(path)).batches():
        pass


def test_every_bit_flip_in_a_shard_is_detected(folder: Path) -> None:
    good = bytearray((folder / SHARD).read_bytes())
    assert len(good) < 3000
    tokens = open_stored(folder).tokens
    assert isinstance(tokens, StoredTokens)
    for bit in range(len(good) * 8):
        good[bit // 8] ^= 1 << bit % 8
        (folder / SHARD).write_bytes(good)
        good[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TraceError, match="tokens-00000"):
            tokens.read(0)
        tokens.close()
    (folder / SHARD).write_bytes(good)
    read_all(folder)


def test_bit_flips_are_never_silent_even_with_a_forged_hash(folder: Path) -> None:
    good = (folder / SHARD).read_bytes()
    generator = random.Random(1)
    refused = 0
    for _ in range(600):
        data = bytearray(good)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        replace_shard(folder, SHARD, bytes(data))
        try:
            same_rows(open_trace(str(folder)), trace(shape(), 40))
        except MoesimError as error:
            assert SHARD in str(error)
            refused += 1
    assert refused > 500


def test_mutations_with_a_forged_hash_end_in_a_clear_error(folder: Path) -> None:
    good = (folder / SHARD).read_bytes()
    generator = random.Random(2)
    for _ in range(400):
        data = bytearray(good)
        for _ in range(generator.randrange(1, 4)):
            at = generator.randrange(len(data))
            kind = generator.randrange(3)
            if kind == 0:
                data[at] = generator.randrange(256)
            elif kind == 1:
                del data[at : at + generator.randrange(1, 9)]
            else:
                data[at:at] = generator.randbytes(4)
        replace_shard(folder, SHARD, bytes(data))
        try:
            same_rows(open_trace(str(folder)), trace(shape(), 40))
        except MoesimError as error:
            assert SHARD in str(error)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -8, -1])
def test_a_truncated_shard_is_refused(folder: Path, keep: int) -> None:
    data = (folder / SHARD).read_bytes()[:keep]
    (folder / SHARD).write_bytes(data)
    with pytest.raises(TraceError, match=f"{SHARD}: size"):
        open_trace(str(folder))
    replace_shard(folder, SHARD, data)
    with pytest.raises(TraceError, match=SHARD):
        read_all(folder)


def test_every_bit_flip_in_a_manifest_is_detected(folder: Path) -> None:
    good = bytearray((folder / "manifest.json").read_bytes())
    fingerprint = open_trace(str(folder)).fingerprint
    for bit in range(0, len(good) * 8 - 8):  # the last byte is a newline
        good[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TraceError):
            parse_manifest(bytes(good), "t")
        good[bit // 8] ^= 1 << bit % 8
    assert parse_manifest(bytes(good), "t").fingerprint == fingerprint


LIES: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("newer schema", lambda m: m.update(schema="moetrace/2"), "newer moesim"),
    ("other schema", lambda m: m.update(schema="x"), "import other formats"),
    ("extra key", lambda m: m.update(pickle="x"), "unknown keys"),
    ("physical ids", lambda m: m.update(ids="physical"), "ids"),
    ("more rows", lambda m: m["shards"][0].update(rows=41), "num_rows"),
    ("more rows everywhere", lambda m: (m["shards"][0].update(rows=41), m.update(num_rows=41)), "40 rows instead of the 41"),
    ("a huge number of rows", lambda m: (m["shards"][0].update(rows=2**39), m.update(num_rows=2**39)), "instead of"),
    ("negative rows", lambda m: m["shards"][0].update(rows=-1), "rows"),
    ("bytes", lambda m: m["shards"][0].update(bytes=10**15), "size"),
    ("hash", lambda m: m["shards"][0].update(sha256="0" * 64), "sha256"),
    ("fewer experts", lambda m: m["model"].update(num_experts=3), "expert id"),
    ("no experts", lambda m: m["model"].update(num_experts=0), "num_experts"),
    ("experts as text", lambda m: m["model"].update(num_experts="16"), "num_experts|integers"),
    ("experts true", lambda m: m["model"].update(num_experts=True), "num_experts"),
    ("wide ids", lambda m: m["model"].update(num_experts=300), "routes"),
    ("more layers", lambda m: m["model"].update(moe_layer_ids=[1, 2, 3, 4]), "routes"),
    ("one layer twice", lambda m: m["model"].update(moe_layer_ids=[1, 2, 2]), "moe_layer_ids"),
    ("layers as lists", lambda m: m["model"].update(moe_layer_ids=[[1], [2], [3]]), "moe_layer_ids"),
    ("a million layers", lambda m: m["model"].update(moe_layer_ids=list(range(10**5))), "moe_layer_ids"),
    ("weights", lambda m: m["columns"].update(weights="float32"), "columns"),
    ("weights of objects", lambda m: m["columns"].update(weights="object"), "weights"),
    ("windows", lambda m: m.update(windows=["a"]), "windows"),
    ("counts", lambda m: m.update(kind="counts", windows=["a"]), "counts"),
    ("parent folder", lambda m: m["shards"][0].update(path="../t/tokens-00000.parquet"), "path"),
    ("absolute path", lambda m: m["shards"][0].update(path="/etc/passwd"), "path"),
    ("newline in a name", lambda m: m["shards"][0].update(path="tokens-00000.parquet\n"), "path"),
    ("a shard twice", lambda m: (m["shards"].append(m["shards"][0]), m.update(num_rows=80)), "twice"),
    ("a gap", lambda m: m["shards"][0].update(path="tokens-00001.parquet"), "in order"),
    ("groups", lambda m: m["model"].update(num_groups=3, top_k_groups=1), "num_groups"),
]


@pytest.mark.parametrize(("lie", "message"), [(lie, message) for _, lie, message in LIES], ids=[name for name, *_ in LIES])
def test_a_lying_manifest_is_refused(folder: Path, lie: Callable[[dict[str, Any]], object], message: str) -> None:
    restamp(folder, lie)
    with pytest.raises(TraceError, match=message):
        read_all(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "{", '{"schema": NaN}', "[" * 100_000, '{"schema": 1, "schema": 2}'])
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(TraceError, match="manifest"):
        open_trace(str(folder))


def _write(path: Path, table: pa.Table, **options: Any) -> bytes:
    pq.write_table(table, path, **({"compression": "zstd", "write_page_checksum": True, "store_schema": False} | options))
    return path.read_bytes()


def _columns(rows: int) -> dict[str, np.ndarray]:
    one = batch(shape(), rows)
    return {
        "step": one.step_T,
        "rank": one.rank_T,
        "request": one.request_T,
        "position": one.position_T,
        "phase": one.phase_T,
        "routes": one.experts_TLK.reshape(rows, -1),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": "snappy"}, "zstd"),
        ({"compression": "none"}, "zstd"),
        ({"write_page_checksum": False}, "checksum"),
        ({"use_byte_stream_split": ["routes"], "use_dictionary": False}, "zstd"),
    ],
)
def test_a_shard_of_another_layout_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    table = to_table(token_spec(shape(), Columns()), _columns(40))
    replace_shard(folder, SHARD, _write(folder.parent / "x.parquet", table, **options))
    with pytest.raises(TraceError, match=message):
        read_all(folder)


def test_a_shard_with_nulls_is_refused(folder: Path) -> None:
    table = to_table(token_spec(shape(), Columns()), _columns(40))
    nullable = pa.table({name: table.column(name) for name in table.column_names})
    replace_shard(folder, SHARD, _write(folder.parent / "x.parquet", nullable))
    with pytest.raises(TraceError, match="required"):
        read_all(folder)


def test_a_small_file_that_decodes_to_gigabytes_is_refused_before_decoding(folder: Path) -> None:
    rows = 3_000_000
    spec = token_spec(shape(), Columns())
    zero = {name: np.zeros((rows, kind) if isinstance(kind, int) else rows, np.uint8 if isinstance(kind, int) else kind) for name, kind in spec.items()}
    with open_writer(folder.parent / "x.parquet", spec) as writer:
        writer.write_table(to_table(spec, zero), row_group_size=rows)
    data = (folder.parent / "x.parquet").read_bytes()
    assert len(data) < 100_000
    replace_shard(folder, SHARD, data)
    restamp(folder, lambda m: (m["shards"][0].update(rows=rows), m.update(num_rows=rows)))
    with pytest.raises(TraceError, match="row group of 3000000 rows"):
        read_all(folder)


def _page(*, rows: int, uncompressed: int, body: bytes, page: int = 0) -> bytes:
    """Return a data page header in the Thrift compact protocol, and its body."""

    def number(value: int) -> bytes:
        value, result = value << 1, b""
        while value > 0x7F:
            result += bytes([value & 0x7F | 0x80])
            value >>= 7
        return result + bytes([value])

    inner = b"".join(b"\x15" + number(value) for value in (rows, 0, 3, 3)) + b"\0"
    return b"".join(b"\x15" + number(value) for value in (page, uncompressed, len(body), 7)) + b"\x1c" + inner + b"\0" + body


@pytest.mark.parametrize(
    ("pages", "message"),
    [
        ([{"rows": 40, "uncompressed": 240}], ""),
        ([{"rows": 20, "uncompressed": 120}, {"rows": 20, "uncompressed": 120}], ""),
        ([{"rows": 40, "uncompressed": 2**31 - 1}], "decodes to more than"),
        ([{"rows": 1, "uncompressed": 60_000}] * 40, "decodes to more than"),
        ([{"rows": 39, "uncompressed": 240}], "39 values instead of 40"),
        ([{"rows": 41, "uncompressed": 240}], "impossible values"),
        ([{"rows": 40, "uncompressed": 240, "page": 1}], "unknown kind"),
        ([{"rows": 40, "uncompressed": 240}, {"rows": 40, "uncompressed": 240}], "80 values"),
    ],
)
def test_pages_are_bounded_before_they_are_decoded(pages: list[dict[str, int]], message: str) -> None:
    data = b"PAR1" + b"".join(_page(**page, body=b"x" * 30) for page in pages)
    chunk = Chunk(start=4, length=len(data) - 4, low=None, high=None)
    if not message:
        check_pages(io.BytesIO(data), chunk, 6, rows=40)
        return
    with pytest.raises(BadLayout, match=message):
        check_pages(io.BytesIO(data), chunk, 6, rows=40)
    with pytest.raises(BadLayout):
        check_pages(io.BytesIO(data[:-1]), chunk, 6, rows=40)


def test_statistics_that_lie_about_steps_are_refused(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    with open(folder / SHARD, "rb") as file:
        reader = TableReader(file, token_spec(shape(), Columns()), rows=40, place="x")
    assert (reader.groups[0].chunks[0].low, reader.groups[0].chunks[0].high) == (0, 0)
    size = int.from_bytes(data[-8:-4], "little")
    footer = data[-8 - size : -8]
    assert footer.count(b"\x04\x00\x00\x00\x00") >= 2  # the claimed smallest and largest step
    replace_shard(folder, SHARD, data[: -8 - size] + footer.replace(b"\x04\x00\x00\x00\x00", b"\x04\x07\x00\x00\x00") + data[-8:])
    with pytest.raises(TraceError, match="claimed by the footer"):
        read_all(folder)


def test_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    os.replace(folder / SHARD, tmp_path / "elsewhere.parquet")
    (folder / SHARD).symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(TraceError, match="not a link"):
        open_trace(str(folder))


def test_a_pipe_does_not_hang_the_reader(folder: Path) -> None:
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(TraceError, match="not a regular file"):
        open_trace(str(folder))


def _zip(folder: Path, path: Path, names: dict[str, str] | None = None, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for file in sorted(folder.iterdir()):
            archive.writestr(zipfile.ZipInfo((names or {}).get(file.name, file.name)), file.read_bytes(), method)
    return path


@pytest.mark.parametrize("name", ["../tokens-00000.parquet", "/tokens-00000.parquet", "a/b/tokens-00000.parquet", "evil.sh", "tokens-00000.parquet/../x"])
def test_a_zip_with_strange_members_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(TraceError, match="member"):
        open_trace(str(_zip(folder, tmp_path / "t.zip", {SHARD: name})))


def test_a_compressed_zip_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="without compression"):
        open_trace(str(_zip(folder, tmp_path / "t.zip", method=zipfile.ZIP_DEFLATED)))


def test_a_zip_with_a_member_twice_is_refused(folder: Path, tmp_path: Path) -> None:
    path = _zip(folder, tmp_path / "t.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("t/manifest.json", "{}")
    with pytest.raises(TraceError, match="twice"):
        open_trace(str(path))


def test_mutated_zips_end_in_a_clear_error(folder: Path, tmp_path: Path) -> None:
    good = _zip(folder, tmp_path / "t.zip").read_bytes()
    generator = random.Random(3)
    reference = trace(shape(), 40)
    for _ in range(300):
        data = bytearray(good)
        if generator.random() < 0.2:
            del data[generator.randrange(len(data)) :]
        else:
            data[generator.choice([generator.randrange(len(data)), len(data) - 1 - generator.randrange(200)])] ^= 1 << generator.randrange(8)
        (tmp_path / "m.zip").write_bytes(data)
        try:
            same_rows(open_trace(str(tmp_path / "m.zip")), reference)
        except TraceError as error:
            assert "m.zip" in str(error)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("hello")
    with pytest.raises(TraceError, match="zip"):
        open_trace(str(tmp_path / "x"))
    with pytest.raises(TraceError, match="not finished"):
        open_trace(str(tmp_path))
    with pytest.raises(TraceError, match="shipped: byte-moe, flame-moe-290m"):
        open_trace("no-such-trace")


def test_counts_in_another_order_are_refused(tmp_path: Path) -> None:
    from moesim.traces.columns import write_table
    from moesim.traces.in_memory import from_counts
    from moesim.traces.manifest import counts_spec

    of = shape(layers=2)
    write_trace(from_counts(of, np.ones((2, 2, 16), dtype=np.int64), ["a", "b"], source="x"), tmp_path / "t")
    write_table(
        tmp_path / "x", counts_spec(of), {"window": np.array([1, 1, 0, 0]), "layer": np.array([0, 1, 0, 1]), "counts": np.ones((4, 16), dtype=np.int64)}
    )
    replace_shard(tmp_path / "t", "counts.parquet", (tmp_path / "x").read_bytes())
    with pytest.raises(TraceError, match="sorted by window"):
        open_trace(str(tmp_path / "t")).counts_WLE()
    assert json.loads((tmp_path / "t/manifest.json").read_text())["kind"] == "counts"
