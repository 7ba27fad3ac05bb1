"""Small traces for the tests of this folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moesim.files import canonical_json, sha256_hex
from moesim.traces.in_memory import from_batches
from moesim.traces.routing_trace import RoutingTrace, TokenBatch, TraceShape


def shape(experts: int = 16, top_k: int = 2, layers: int = 3, **more: Any) -> TraceShape:
    """Return a shape whose MoE layers start at 1."""
    return TraceShape(model="toy", num_experts=experts, top_k=top_k, moe_layer_ids=tuple(range(1, layers + 1)), **more)


def batch(of: TraceShape, tokens: int, *, seed: int = 0, step: int | np.ndarray = 0, requests: int = 4, **more: Any) -> TokenBatch:
    """Return random distinct choices."""
    generator = np.random.Generator(np.random.PCG64(seed))
    scores = generator.random((tokens, of.num_layers, of.num_experts))
    columns: dict[str, Any] = {
        "step_T": np.broadcast_to(np.asarray(step, dtype=np.uint32), tokens).copy(),
        "rank_T": np.zeros(tokens, dtype=np.uint16),
        "request_T": (np.arange(tokens) % requests).astype(np.uint64),
        "position_T": (np.arange(tokens) // requests).astype(np.uint32),
        "phase_T": np.zeros(tokens, dtype=np.uint8),
        "experts_TLK": np.argsort(scores, axis=2)[:, :, : of.top_k].astype(of.dtype),
    }
    return TokenBatch(**(columns | more))


def trace(of: TraceShape, tokens: int = 40, **more: Any) -> RoutingTrace:
    """Return a token trace in memory."""
    return from_batches(of, [batch(of, tokens, **more)], source="toy trace")


def restamp(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and stamp it again, as an attacker would."""
    node = json.loads((folder / "manifest.json").read_text())
    change(node)
    node.pop("sha256", None)
    node["sha256"] = sha256_hex(canonical_json(node))
    (folder / "manifest.json").write_bytes(canonical_json(node))


def replace_shard(folder: Path, name: str, data: bytes) -> None:
    """Put other bytes into a shard and make the manifest agree."""
    (folder / name).write_bytes(data)

    def change(node: dict[str, Any]) -> None:
        for shard in node["shards"]:
            if shard["path"] == name:
                shard["bytes"], shard["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    restamp(folder, change)


def same_rows(one: RoutingTrace, other: RoutingTrace) -> None:
    """Fail unless two traces hold the same rows in the same order."""
    from moesim.traces.routing_trace import concatenate

    a, b = concatenate(list(one.batches())), concatenate(list(other.batches()))
    for name in TokenBatch.__dataclass_fields__:
        left, right = getattr(a, name), getattr(b, name)
        if name == "valid_TLK":
            left = np.ones(a.experts_TLK.shape, bool) if left is None else left
            right = np.ones(b.experts_TLK.shape, bool) if right is None else right
        if left is None or right is None:
            assert left is right, name
        else:
            np.testing.assert_array_equal(left, right, err_msg=name)
