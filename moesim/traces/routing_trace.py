"""The trace document in memory: which experts every token chose, layer by layer.

A token trace is a stream of `TokenBatch` (one row per token and forward pass); a counts trace holds only how
often every expert was chosen per window. Both are frozen and know their shape, origin and fingerprint.
Shapes: T tokens, L MoE layers (rows of `moe_layer_ids`), K choices (best first), E experts, W windows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from moesim.counts import normal_counts, present_LE
from moesim.errors import TraceError, describe

PREFILL, DECODE, TRAIN, DUMMY = 0, 1, 2, 3
PHASES = ("prefill", "decode", "train", "dummy")
SYNTHETIC = "synthetic:"
"""How a reference to a synthetic trace starts."""
MAX_COUNTS = 1 << 24
"""Most cells (windows × layers × experts) of a table of counts."""
MAX_ROUNDS = 16
"""Most rounds of a layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceShape:
    """What a trace and a model must agree on."""

    model: str
    """Name of the model, for people."""
    num_experts: int
    """E, routed experts per MoE layer; where layers differ, at least the most."""
    top_k: int
    """K, experts per token and layer."""
    moe_layer_ids: tuple[int, ...]
    """Index in the model (from 0) of every layer row."""
    num_groups: int = 1
    """Routing groups of equal size; 1: routing is not limited."""
    top_k_groups: int = 1
    """Groups a token may reach."""
    experts_L: tuple[int, ...] | None = field(default=None, repr=False)
    """Experts of every layer row where they differ; None: E in all of them."""

    def __post_init__(self) -> None:
        for name, low, high in (
            ("num_experts", 1, 65536),
            ("top_k", 1, min(self.num_experts, 1024)),
            ("num_groups", 1, self.num_experts),
            ("top_k_groups", 1, self.num_groups),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise TraceError(describe(f"shape of {self.model}", name, value, f"must be an integer in {low}..{high}"))
        ids = self.moe_layer_ids
        if not 1 <= len(ids) <= 4096 or any(not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < 65536 for i in ids) or len(set(ids)) != len(ids):
            raise TraceError(describe(f"shape of {self.model}", "moe_layer_ids", list(ids), "must be 1..4096 distinct layers in 0..65535"))
        place = f"shape of {self.model}"
        counts = normal_counts(self.experts_L, self.num_experts, len(ids), lambda value, rule: TraceError(describe(place, "experts_per_layer", value, rule)))
        object.__setattr__(self, "experts_L", counts)
        for experts in sorted(set(counts or (self.num_experts,))):
            if experts % self.num_groups or self.top_k_groups * (experts // self.num_groups) < self.top_k:
                rule = f"must divide {experts} experts, and {self.top_k_groups} groups must hold top-{self.top_k}"
                raise TraceError(describe(place, "num_groups", self.num_groups, rule))
        if self.row_bytes > 1 << 20:
            raise TraceError(describe(f"shape of {self.model}", "bytes of a token's routes", self.row_bytes, "must be <= 1 MiB"))

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.moe_layer_ids)

    @property
    def expert_counts_L(self) -> tuple[int, ...]:
        """Experts of every layer row."""
        return (self.num_experts,) * self.num_layers if self.experts_L is None else self.experts_L

    def of_layers(self, rows: Sequence[int], moe_layer_ids: tuple[int, ...]) -> TraceShape:
        """Return the shape of some layer rows as the given layers of the model."""
        return replace(self, moe_layer_ids=moe_layer_ids, experts_L=tuple(self.expert_counts_L[row] for row in rows))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of expert ids: uint8 up to 256 experts, else little-endian uint16."""
        return np.dtype("u1" if self.num_experts <= 256 else "<u2")

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's routes over all layers."""
        return self.num_layers * self.top_k * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """Rows of a token trace, in order of arrival."""

    step_T: np.ndarray
    """uint32: forward pass."""
    rank_T: np.ndarray
    """uint16: rank that recorded the token."""
    request_T: np.ndarray
    """uint64: hashed id of the request."""
    position_T: np.ndarray
    """uint32: position in the request."""
    phase_T: np.ndarray
    """uint8: 0 prefill, 1 decode, 2 train, 3 dummy."""
    experts_TLK: np.ndarray
    """uint8 or uint16: chosen experts, best first."""
    weights_TLK: np.ndarray | None = None
    """float16 or float32: router weights as recorded."""
    predicted_TLK: np.ndarray | None = None
    """Experts that a predictor named before the layer ran."""
    valid_TLK: np.ndarray | None = None
    """bool: False where a choice does not exist (then its id is 0); None: all exist."""

    def __post_init__(self) -> None:
        rows = len(self.step_T)
        if self.experts_TLK.ndim != 3 or any(len(getattr(self, name)) != rows for name in ("rank_T", "request_T", "position_T", "phase_T", "experts_TLK")):
            raise TraceError("token batch: every column must have one entry per token, and experts the shape [tokens, layers, top_k]")
        for name in ("weights_TLK", "predicted_TLK", "valid_TLK"):
            value = getattr(self, name)
            if value is not None and value.shape != self.experts_TLK.shape:
                raise TraceError(describe("token batch", name, value.shape, f"must have the shape of the experts, {self.experts_TLK.shape}"))

    def __len__(self) -> int:
        return len(self.step_T)

    def take(self, rows: np.ndarray | slice) -> TokenBatch:
        """Return the given rows."""
        columns: dict[str, Any] = {name: getattr(self, name) for name in TokenBatch.__dataclass_fields__}
        for name, value in columns.items():
            columns[name] = None if value is None else value[rows]
        return TokenBatch(**columns)

    def take_layers(self, rows: Sequence[int]) -> TokenBatch:
        """Return all tokens with the given layer rows, which may repeat."""
        index = np.asarray(rows)
        columns = {name: getattr(self, name) for name in TokenBatch.__dataclass_fields__}
        for name in ("experts_TLK", "weights_TLK", "predicted_TLK", "valid_TLK"):
            if columns[name] is not None:
                columns[name] = np.ascontiguousarray(columns[name][:, index])
        return TokenBatch(**columns)


def concatenate(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Join batches; an optional column exists if it exists in all (`valid`: in any)."""
    if len(batches) == 1:
        return batches[0]
    columns: dict[str, Any] = {}
    for name in TokenBatch.__dataclass_fields__:
        values = [getattr(batch, name) for batch in batches]
        if name == "valid_TLK" and any(value is not None for value in values):
            values = [np.ones(batch.experts_TLK.shape, dtype=bool) if value is None else value for batch, value in zip(batches, values, strict=True)]
        columns[name] = None if any(value is None for value in values) else np.concatenate(values)
    return TokenBatch(**columns)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """One unit of reading: its rows and the steps it holds."""

    rows: int
    step_min: int
    step_max: int


class BatchSource(Protocol):
    """Where the rows of a token trace come from; `read(i)` may be called in any order."""

    @property
    def groups(self) -> Sequence[GroupInfo]:
        """One entry per unit of reading."""
        ...

    def read(self, index: int) -> TokenBatch:
        """Return the rows of one unit."""
        ...


class MappedSource:
    """Another source with a row-preserving function applied to every batch."""

    def __init__(self, base: BatchSource, function: Callable[[TokenBatch], TokenBatch]) -> None:
        self._base, self._function = base, function

    @property
    def groups(self) -> Sequence[GroupInfo]:
        """The groups of the base."""
        return self._base.groups

    def read(self, index: int) -> TokenBatch:
        """Return the rows of one unit."""
        return self._function(self._base.read(index))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTrace:
    """A validated trace; open one with `moesim.traces.open.open_trace`."""

    shape: TraceShape
    kind: str
    """`tokens` or `counts`."""
    num_rows: int
    """Tokens × forward passes of a token trace; windows of a counts trace."""
    provenance: Mapping[str, Any]
    """Who measured it with what; `notes` lists what the importer decided."""
    fingerprint: str
    """SHA-256 that identifies the content."""
    source: str
    """Where it was opened, for messages."""
    is_synthetic: bool = False
    synthetic: str | None = None
    """The full specification of a synthetic trace."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts of the manifest: parallel, clock, sampling, dropped_rows, model."""
    tokens: BatchSource | None = field(default=None, repr=False, compare=False)
    counts: Callable[[], np.ndarray] | None = field(default=None, repr=False, compare=False)
    stored_windows: tuple[str, ...] = ()
    """Names of the windows of a counts trace."""
    resized: Callable[[int], RoutingTrace] | None = field(default=None, repr=False, compare=False)
    """For a synthetic trace without a token count: the same with this many tokens per step."""
    tables: Callable[[str], Mapping[str, np.ndarray] | None] | None = field(default=None, repr=False, compare=False)
    """Reads an optional side table (`steps`, `kernels`)."""

    @property
    def routing(self) -> str:
        """Say in a few words where the routing of a replay comes from."""
        if self.synthetic is not None:
            return self.synthetic
        if self.kind == "counts":
            return "sampled independently from recorded counts"
        return f"recorded, routed anew by {', then '.join(self.rules)}" if self.rules else "recorded"

    @property
    def rules(self) -> tuple[str, ...]:
        """Routing rules that were applied to what was recorded."""
        found = self.provenance.get("rules")
        return tuple(str(text)[:200] for text in found) if isinstance(found, list) else ()

    @property
    def rounds(self) -> int:
        """C: rows per model layer; round c of layer l is row l · C + c."""
        found = self.provenance.get("rounds")
        return found if type(found) is int and 1 <= found <= MAX_ROUNDS and self.shape.num_layers % found == 0 else 1

    def batches(self) -> Iterator[TokenBatch]:
        """Yield the rows in order of arrival, one row group at a time."""
        if self.tokens is None:
            raise TraceError(f"{self.source}: holds counts per window, not tokens; use moesim.traces.steps.iter_steps to sample tokens from them")
        for index in range(len(self.tokens.groups)):
            yield self.tokens.read(index)

    @property
    def window_names(self) -> tuple[str, ...]:
        """Names of the windows of `counts_WLE()`; reads a token trace once."""
        return self.stored_windows if self.kind == "counts" else self.windows()[0]

    def counts_WLE(self, window: str | int = "step") -> np.ndarray:
        """Return int64 [W, L, E]: how often every expert was chosen; see `windows`."""
        return self.windows(window)[1]

    def windows(self, window: str | int = "step") -> tuple[tuple[str, ...], np.ndarray]:
        """Return the names and the counts int64 [W, L, E] of all windows.

        window: `step` (one window per recorded step, or per stored window of a counts trace), `all` (one window),
        or a number of consecutive steps (stored windows) per window. Dummy tokens are not counted.
        Raises TraceError if the table would exceed `MAX_COUNTS` cells.
        """
        if window not in ("step", "all") and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
            raise TraceError(describe(self.source, "window", window, "must be 'step', 'all' or a number of steps >= 1"))
        if self.kind == "counts":
            assert self.counts is not None
            stored = self.counts()
            if window == "all":
                return ("all",), stored.sum(axis=0, keepdims=True)
            size = 1 if window == "step" else int(window)
            starts = np.arange(0, len(stored), size)
            names = tuple(_span(self.stored_windows[start : start + size]) for start in starts)
            return names, np.add.reduceat(stored, starts, axis=0)
        cells = self.shape.num_layers * self.shape.num_experts
        table: dict[int, np.ndarray] = {}
        assert self.tokens is not None
        first = min((group.step_min for group in self.tokens.groups), default=0)
        size = 1 if window == "step" else int(window) if window != "all" else 1 << 33
        for batch in self.batches():
            for key, part in _split_by((batch.step_T.astype(np.int64) - first) // size, batch):
                count = count_LE(part, self.shape.num_experts)
                if key in table:
                    table[key] += count
                else:
                    table[key] = count
                    if len(table) * cells > MAX_COUNTS:
                        raise TraceError(
                            describe(
                                self.source, "windows × layers × experts", len(table) * cells, f"must be <= {MAX_COUNTS}", "ask for windows of several steps"
                            )
                        )
        if not table:
            return ("all",), np.zeros((1, self.shape.num_layers, self.shape.num_experts), dtype=np.int64)
        keys = sorted(table)
        if window == "all":
            names = ("all",)
        elif size == 1:
            names = tuple(f"step {first + key}" for key in keys)
        else:
            names = tuple(f"steps {first + key * size}..{first + key * size + size - 1}" for key in keys)
        return names, np.stack([table[key] for key in keys])


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"


def _split_by(key_T: np.ndarray, batch: TokenBatch) -> Iterator[tuple[int, TokenBatch]]:
    if len(batch) and key_T[0] == key_T[-1] and (key_T == key_T[0]).all():
        yield int(key_T[0]), batch
        return
    order = np.argsort(key_T, kind="stable")
    values, starts = np.unique(key_T[order], return_index=True)
    for value, rows in zip(values, np.split(order, starts[1:]), strict=True):
        yield int(value), batch.take(rows)


def count_LE(batch: TokenBatch, num_experts: int) -> np.ndarray:
    """Return int64 [L, E]: how often the tokens of a batch chose every expert, dummies left out."""
    if (batch.phase_T == DUMMY).any():
        batch = batch.take(batch.phase_T != DUMMY)
    layers = batch.experts_TLK.shape[1]
    result = np.zeros((layers, num_experts), dtype=np.int64)
    for layer in range(layers):
        ids = batch.experts_TLK[:, layer]
        chosen = ids.ravel() if batch.valid_TLK is None else ids[batch.valid_TLK[:, layer]]
        result[layer] = np.bincount(chosen, minlength=num_experts)
    return result


def check_counts(table: np.ndarray, shape: TraceShape, windows: int, place: str) -> None:
    """Raise TraceError unless `table` is a table of counts of this shape."""
    if table.shape != (windows, shape.num_layers, shape.num_experts) or not windows:
        raise TraceError(
            describe(place, "counts shape", list(table.shape), f"must be [windows={windows}, layers={shape.num_layers}, experts={shape.num_experts}]")
        )
    if table.size > MAX_COUNTS:
        raise TraceError(describe(place, "windows × layers × experts", table.size, f"must be <= {MAX_COUNTS}", "merge windows"))
    if shape.experts_L is not None:
        for window, layer, expert in np.argwhere(table * ~present_LE(shape.experts_L, shape.num_experts, shape.num_layers))[:1]:
            rule = f"must be 0: the layer has {shape.experts_L[layer]} experts"
            raise TraceError(describe(place, f"counts of layer {shape.moe_layer_ids[layer]}, expert {expert}", int(table[window, layer, expert]), rule))
    if table.min() < 0 or table.max() > 1 << 48:
        raise TraceError(describe(place, "counts", [int(table.min()), int(table.max())], "must be in 0..2^48"))


def check_batch(batch: TokenBatch, shape: TraceShape, place: str) -> None:
    """Raise TraceError unless a batch has this shape and its ids are in range."""
    if batch.experts_TLK.shape[1:] != (shape.num_layers, shape.top_k) or batch.experts_TLK.dtype != shape.dtype:
        raise TraceError(
            describe(
                place,
                "experts",
                f"{batch.experts_TLK.dtype} {list(batch.experts_TLK.shape)}",
                f"must be {shape.dtype} [tokens, {shape.num_layers}, {shape.top_k}]",
            )
        )
    for name in ("experts_TLK", "predicted_TLK"):
        ids = getattr(batch, name)
        if ids is not None and ids.size and shape.num_experts <= np.iinfo(shape.dtype).max and int(ids.max()) >= shape.num_experts:
            raise TraceError(
                describe(place, "expert id", int(ids.max()), f"must be < {shape.num_experts}, the number of experts", "the model or the id width is wrong")
            )
        if ids is not None and ids.size and shape.experts_L is not None:
            highest_L = (ids if batch.valid_TLK is None or name != "experts_TLK" else ids * batch.valid_TLK).max(axis=(0, 2))
            for layer in np.flatnonzero(highest_L >= np.array(shape.experts_L))[:1]:
                rule = f"must be < {shape.experts_L[layer]}, the number of experts of that layer"
                raise TraceError(describe(place, f"expert id of layer {shape.moe_layer_ids[layer]}", int(highest_L[layer]), rule, "the model is wrong"))
    if len(batch) and int(batch.phase_T.max()) > DUMMY:
        raise TraceError(describe(place, "phase", int(batch.phase_T.max()), f"must be 0..3 ({', '.join(PHASES)})"))
