"""The bytes of an expert are read where its rows lie now, not where they lay when the layout was taken."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from moesim.runtime.expert_rows import ExpertRows, Reader  # noqa: E402

SLOTS, WIDTH = 4, 5


def layer_of(dtype: Any) -> Any:
    """Return a layer of two tensors with a row per slot, of odd sizes."""
    layer: Any = torch.nn.Module()
    generator = torch.Generator().manual_seed(0)
    for name, shape in (("up", (SLOTS, 3, WIDTH)), ("bias", (SLOTS, WIDTH))):
        layer.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
    layer.tensor_names, layer.held_slots, layer.slot_map = ("up", "bias"), SLOTS, SimpleNamespace(layer=0)
    return layer


def read(reader: Reader, local: int) -> bytes:
    """Return the bytes of an expert."""
    out = np.full(reader.expert_bytes, 255, np.uint8)
    reader.read(local, out)
    assert reader.digest_of(out) == reader.digest(local)
    return out.tobytes()


def wanted(layer: Any, local: int) -> bytes:
    """Return the same from the tensors themselves, by name, each row padded to words."""
    rows = [getattr(layer, name).data[local].reshape(-1).view(torch.uint8).numpy().tobytes() for name in ("bias", "up")]
    return b"".join(row + bytes(-len(row) % 8) for row in rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_read_where_they_are_now(dtype: Any) -> None:
    layer = layer_of(dtype)
    rows = ExpertRows(layer)
    reader = Reader(rows)
    assert [read(reader, local) for local in range(SLOTS)] == [wanted(layer, local) for local in range(SLOTS)]
    layer.up.data = layer.up.data * 2
    assert read(reader, 1) == wanted(layer, 1), "its owner has put other memory there"
    with torch.no_grad():
        layer.bias += 1
    assert read(reader, 3) == wanted(layer, 3), "it was trained"
    layer.up.data = layer.up.data.mT.contiguous().mT
    assert read(reader, 2) == wanted(layer, 2), "its rows do not lie together"
    rows.grow(SLOTS + 2)
    assert [read(reader, local) for local in range(SLOTS + 2)] == [wanted(layer, local) for local in range(SLOTS + 2)]
    assert not any(read(reader, SLOTS)), "what has been added is empty"


def test_swapping_twice_brings_everything_back() -> None:
    layer = layer_of(torch.float32)
    reader = Reader(ExpertRows(layer))
    mine, other = wanted(layer, 0), wanted(layer, 1)
    data = np.frombuffer(other, np.uint8).copy()
    reader.swap(0, data)
    assert wanted(layer, 0) == other and data.tobytes() == mine
    reader.swap(0, data)
    assert wanted(layer, 0) == mine and data.tobytes() == other
