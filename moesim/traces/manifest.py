"""The manifest of a `moetrace/1` folder: what the shards hold, and the hashes that prove it.

Written last, so that a folder without one is an unfinished recording; stamped with the SHA-256 of its content, which
is also the fingerprint of the trace. A reader refuses unknown keys, newer schemas and names that are not a trace's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import canonical_json, parse_json, sha256_hex
from moesim.traces.archive import FILE_NAME, MANIFEST
from moesim.traces.layout import Spec
from moesim.traces.routing_trace import TraceShape

SCHEMA = "moetrace/1"
MAX_ROWS = 1 << 40
MAX_SHARDS = 65000
SHAPE_KEYS = ("name", "num_experts", "top_k", "moe_layer_ids", "num_groups", "top_k_groups")
EXPERTS_PER_LAYER = "experts_per_layer"
"""Key of the experts of every layer, there only where they differ."""
MODEL_FACTS = ("num_shared_experts", "router", "expert_bytes", "dtype")
FACTS = ("parallel", "clock", "sampling", "dropped_rows")
_KEYS = {"schema", "kind", "model", "ids", "columns", "windows", "num_rows", "provenance", "shards", "sha256", *FACTS}

STEPS_SPEC: Spec = {
    "step": np.dtype("<u4"),
    "rank": np.dtype("<u2"),
    "map_epoch": np.dtype("<u4"),
    "n_prefill": np.dtype("<u4"),
    "n_decode": np.dtype("<u4"),
    "t_start_ns": np.dtype("<i8"),
    "t_end_ns": np.dtype("<i8"),
}
KERNELS_SPEC: Spec = {
    "step": np.dtype("<u4"),
    "rank": np.dtype("<u2"),
    "layer": np.dtype("<u2"),
    "stage": np.dtype("<u1"),
    "t_ns": np.dtype("<i8"),
    "dur_ns": np.dtype("<i8"),
    "bytes": np.dtype("<i8"),
    "tokens": np.dtype("<u4"),
}
STAGES = ("attention", "router", "dispatch", "experts", "combine", "shared", "dense", "other")
"""Meaning of `kernels.stage`; `layer` is the index in the model."""
TABLES: Mapping[str, Spec] = {"steps": STEPS_SPEC, "kernels": KERNELS_SPEC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which optional columns a token trace has."""

    weights: str | None = None
    """`float16`, `float32` or None."""
    predicted: bool = False
    valid: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of a trace."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    kind: str
    shape: TraceShape
    columns: Columns
    windows: tuple[str, ...]
    num_rows: int
    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """Return the JSON object without its stamp."""
        shape = self.shape
        facts = dict(self.facts)
        model = {
            "name": shape.model,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "moe_layer_ids": list(shape.moe_layer_ids),
            "num_groups": shape.num_groups,
            "top_k_groups": shape.top_k_groups,
            **({} if shape.experts_L is None else {EXPERTS_PER_LAYER: list(shape.experts_L)}),
        }
        return {
            "schema": SCHEMA,
            "kind": self.kind,
            "model": {**model, **facts.pop("model", {})},
            "ids": "logical",
            "columns": {"weights": self.columns.weights, "predicted": self.columns.predicted, "valid": self.columns.valid},
            "windows": list(self.windows),
            "num_rows": self.num_rows,
            "provenance": dict(self.provenance),
            "shards": [{"path": s.path, "rows": s.rows, "bytes": s.bytes, "sha256": s.sha256} for s in self.shards],
            "parallel": facts.get("parallel"),
            "clock": facts.get("clock"),
            "sampling": facts.get("sampling"),
            "dropped_rows": facts.get("dropped_rows", 0),
        }

    def to_json(self) -> bytes:
        """Return the bytes of `manifest.json`."""
        content = self.content()
        return canonical_json({**content, "sha256": sha256_hex(canonical_json(content))}) + b"\n"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content."""
        return sha256_hex(canonical_json(self.content()))


def token_spec(shape: TraceShape, columns: Columns) -> Spec:
    """Return the columns of `tokens-NNNNN.parquet`."""
    spec: dict[str, np.dtype[Any] | int] = {
        "step": np.dtype("<u4"),
        "rank": np.dtype("<u2"),
        "request": np.dtype("<u8"),
        "position": np.dtype("<u4"),
        "phase": np.dtype("<u1"),
        "routes": shape.row_bytes,
    }
    choices = shape.num_layers * shape.top_k
    if columns.weights:
        spec["weights"] = choices * np.dtype(columns.weights).itemsize
    if columns.predicted:
        spec["predicted"] = shape.row_bytes
    if columns.valid:
        spec["valid"] = (choices + 7) // 8
    return spec


def counts_spec(shape: TraceShape) -> Spec:
    """Return the columns of `counts.parquet`; `counts` is int64 [E], little-endian."""
    return {"window": np.dtype("<u4"), "layer": np.dtype("<u2"), "counts": shape.num_experts * 8}


def parse_manifest(text: bytes, place: str) -> Manifest:
    """Build a manifest from the bytes of `manifest.json`; raise TraceError if it breaks a rule."""
    place = f"{place}/{MANIFEST}"
    node = parse_json(text, place, error=TraceError)
    if not isinstance(node, dict):
        raise TraceError(f"{place}: must be a JSON object with schema {SCHEMA!r}")
    schema = node.get("schema")
    if schema != SCHEMA:
        newer = isinstance(schema, str) and schema.startswith("moetrace/")
        raise TraceError(
            describe(
                place,
                "schema",
                schema,
                f"must be {SCHEMA!r}",
                "this trace needs a newer moesim" if newer else "import other formats with `moesim trace import`",
            )
        )
    if set(node) != _KEYS:
        raise TraceError(f"{place}: unknown keys {sorted(set(node) - _KEYS)[:8]}, missing keys {sorted(_KEYS - set(node))}; record or import the trace again")
    content = {key: value for key, value in node.items() if key != "sha256"}
    if node["sha256"] != sha256_hex(canonical_json(content)):
        raise TraceError(
            describe(place, "sha256", node["sha256"], "must be the SHA-256 of the content", "the file was changed or damaged; copy or record it again")
        )
    if node["ids"] != "logical":
        raise TraceError(describe(place, "ids", node["ids"], "must be 'logical'", "map physical ids to logical ones when recording or importing"))
    kind = _one_of(node["kind"], ("tokens", "counts"), place, "kind")
    shape, model_facts = _shape(node["model"], place)
    columns = _columns(node["columns"], place)
    windows = node["windows"]
    if not isinstance(windows, list) or not all(isinstance(name, str) and len(name) <= 200 for name in windows) or (kind == "counts") != bool(windows):
        raise TraceError(describe(place, "windows", windows, "must be the names of the windows of a counts trace, [] for tokens"))
    shards = _shards(node["shards"], place)
    for key in ("provenance", "parallel", "sampling"):
        if not isinstance(node[key], dict) and (node[key] is not None or key == "provenance"):
            raise TraceError(describe(place, key, node[key], "must be an object"))
    dropped = _integer(node["dropped_rows"], place, "dropped_rows", MAX_ROWS)
    num_rows = _integer(node["num_rows"], place, "num_rows", MAX_ROWS)
    data = [shard for shard in shards if shard.path.startswith(kind)]
    if kind == "tokens":
        if [shard.path for shard in data] != [f"tokens-{i:05d}.parquet" for i in range(len(data))] or any(s.path == "counts.parquet" for s in shards):
            raise TraceError(f"{place}: shards must be tokens-00000.parquet, tokens-00001.parquet … in order; record the trace again")
        if sum(shard.rows for shard in data) != num_rows:
            raise TraceError(describe(place, "num_rows", num_rows, f"must be the sum of the shards' rows, {sum(s.rows for s in data)}"))
    elif (
        [shard.path for shard in data] != ["counts.parquet"]
        or any(s.path.startswith("tokens") for s in shards)
        or data[0].rows != len(windows) * shape.num_layers
        or num_rows != len(windows)
    ):
        raise TraceError(
            f"{place}: a counts trace has one shard counts.parquet of windows × layers = {len(windows) * shape.num_layers} rows; record the trace again"
        )
    facts = {"parallel": node["parallel"], "clock": node["clock"], "sampling": node["sampling"], "dropped_rows": dropped, "model": model_facts}
    return Manifest(
        kind=kind, shape=shape, columns=columns, windows=tuple(windows), num_rows=num_rows, provenance=node["provenance"], shards=shards, facts=facts
    )


def _shape(node: Any, place: str) -> tuple[TraceShape, dict[str, Any]]:
    if not isinstance(node, dict) or not set(SHAPE_KEYS) <= set(node) <= {*SHAPE_KEYS, *MODEL_FACTS, EXPERTS_PER_LAYER}:
        raise TraceError(describe(place, "model", node, f"must be an object with the keys {list(SHAPE_KEYS)}, optionally {list(MODEL_FACTS)}"))
    layers, counts = node["moe_layer_ids"], node.get(EXPERTS_PER_LAYER)
    if counts is not None and not isinstance(counts, list):
        raise TraceError(describe(place, f"model.{EXPERTS_PER_LAYER}", counts, "must be a list of integers"))
    if not isinstance(node["name"], str) or len(node["name"]) > 200 or not isinstance(layers, list):
        raise TraceError(describe(place, "model", node, "must have a name and a list of moe_layer_ids"))
    try:
        shape = TraceShape(
            model=node["name"],
            num_experts=node["num_experts"],
            top_k=node["top_k"],
            moe_layer_ids=tuple(layers),
            num_groups=node["num_groups"],
            top_k_groups=node["top_k_groups"],
            experts_L=None if counts is None else tuple(counts),
        )
    except TypeError:
        raise TraceError(describe(place, "model", node, "must hold integers")) from None
    except TraceError as cause:
        raise TraceError(f"{place}: model: {cause}") from None
    return shape, {key: node[key] for key in MODEL_FACTS if key in node}


def _columns(node: Any, place: str) -> Columns:
    if not isinstance(node, dict) or set(node) != {"weights", "predicted", "valid"}:
        raise TraceError(describe(place, "columns", node, "must be an object with the keys weights, predicted, valid"))
    if node["weights"] not in (None, "float16", "float32") or not isinstance(node["predicted"], bool) or not isinstance(node["valid"], bool):
        raise TraceError(describe(place, "columns", node, "must have weights null, float16 or float32, and predicted and valid true or false"))
    return Columns(**node)


def _shards(node: Any, place: str) -> tuple[Shard, ...]:
    if not isinstance(node, list) or len(node) > MAX_SHARDS:
        raise TraceError(describe(place, "shards", type(node).__name__, f"must be a list of at most {MAX_SHARDS} files"))
    result = []
    for index, item in enumerate(node):
        key = f"shards[{index}]"
        if not isinstance(item, dict) or set(item) != {"path", "rows", "bytes", "sha256"}:
            raise TraceError(describe(place, key, item, "must be an object with the keys path, rows, bytes, sha256"))
        if not isinstance(item["path"], str) or not FILE_NAME.match(item["path"]):
            raise TraceError(describe(place, f"{key}.path", item["path"], "must be tokens-NNNNN.parquet, counts.parquet, steps.parquet or kernels.parquet"))
        if not isinstance(item["sha256"], str) or len(item["sha256"]) != 64:
            raise TraceError(describe(place, f"{key}.sha256", item["sha256"], "must be 64 hexadecimal digits"))
        rows = _integer(item["rows"], place, f"{key}.rows", MAX_ROWS)
        result.append(Shard(path=item["path"], rows=rows, bytes=_integer(item["bytes"], place, f"{key}.bytes", 1 << 50), sha256=item["sha256"]))
    if len({shard.path for shard in result}) != len(result):
        raise TraceError(f"{place}: a shard is listed twice; record the trace again")
    return tuple(result)


def _integer(value: Any, place: str, key: str, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise TraceError(describe(place, key, value, f"must be an integer in 0..{high}"))
    return value


def _one_of(value: Any, allowed: tuple[str, ...], place: str, key: str) -> str:
    if value not in allowed:
        raise TraceError(describe(place, key, value, f"must be one of {list(allowed)}"))
    return str(value)
