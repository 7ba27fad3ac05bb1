"""What a decode through memory tiers is given and what it returns; `prepare` checks the one and lays it out as flat lists.

Shapes: T steps (decoded tokens or batches), L layers, K experts, E experts per layer, P = T · L positions (step · L +
layer). A key is layer · E + expert. Seconds, bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim import policies
from moesim.sim.cache import CacheSettings, Counts
from moesim.sim.demands import keys_by_position
from moesim.sim.policies import COMPUTE, LOAD, PRECISION, Policy
from moesim.sim.stores import Store

Seconds = float | np.ndarray | Callable[..., float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLink:
    """A serial link that experts are copied over."""

    load_s: Callable[[float], float]
    """Bytes → seconds, alone on the link."""
    discipline: str = "fifo"
    """`fifo` (in order of issue) or `priority` (demanded copies first)."""
    chunk_bytes: float | None = None
    """`priority`: a prefetch gives way after so many bytes; None: only when it is over."""
    name: str = "host"

    def __post_init__(self) -> None:
        if self.discipline not in ("fifo", "priority"):
            raise InputError(describe(f"link {self.name}", "discipline", self.discipline, "must be fifo or priority"))
        if self.chunk_bytes is not None and not (self.chunk_bytes > 0 and self.discipline == "priority"):
            raise InputError(describe(f"link {self.name}", "chunk_bytes", self.chunk_bytes, "must be > 0, and needs discipline priority"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefetch:
    """What is loaded ahead, and when."""

    predicted_TLK: np.ndarray
    """int: experts predicted for every step and layer, -1 where there are fewer (`predictors.predict`)."""
    lookahead: int = 1
    """Layers between the one that issues and the last one predicted."""
    issue: str = "gate"
    """`gate`: when the gate has decided; `experts`: when the layer's experts have run and their slots are free."""
    across_steps: bool = False
    """Whether the last layers predict the first ones of the next step."""
    into: str = "cache"
    """`cache`, or `staging` buffers from which used experts move to the cache."""
    cost_s: float = 0.0
    """Time of one prediction (for one layer)."""
    device: str = "gpu"
    """Where that time is spent: `gpu` (before the experts) or `cpu` (beside them)."""
    cancel_wrong: bool = False
    """Stop prefetches that the gate has proved wrong; needs discipline priority."""

    def __post_init__(self) -> None:
        if self.lookahead < 1:
            raise InputError(describe("prefetch", "lookahead", self.lookahead, "must be >= 1 layer"))
        for key, known in (("issue", ("gate", "experts")), ("into", ("cache", "staging")), ("device", ("gpu", "cpu"))):
            if getattr(self, key) not in known:
                raise InputError(describe("prefetch", key, getattr(self, key), f"must be {' or '.join(known)}"))
        if not 0 <= self.cost_s < inf:
            raise InputError(describe("prefetch", "cost_s", self.cost_s, "must be finite and >= 0"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode through memory tiers."""

    routes_TLK: np.ndarray
    """int: distinct experts that every step wants in every MoE layer, -1 where there are fewer."""
    num_experts: int
    attention_s: Seconds
    """All of a layer before its gate: a number, [L], [T, L] or a callable of (step, layer)."""
    gate_s: Seconds
    """Likewise."""
    expert_s: Seconds
    """One expert: a number, [L], [L, E], one for each in `routes_TLK`, or a callable of (layer, expert, tokens)."""
    expert_bytes: float | np.ndarray
    """One expert: a number, [L] or [L, E]; rounded up to whole bytes."""
    host: CopyLink
    """Host memory → device memory."""
    cache: CacheSettings
    """Device memory."""
    prefetch: Prefetch | None = None
    miss: str | Policy = "load"
    """Policy at the hook `miss`."""
    low_bytes: float | np.ndarray | None = None
    """Bytes of an expert's low-precision copy."""
    compute_s: Callable[[int, int, int], float] | None = None
    """(layer, expert, tokens) → seconds on the other device, activations' way there and back included."""
    expert_start: str = "all"
    """`all`: experts run when all of them are there; `each`: in the order in which they arrive."""
    tokens_TLK: np.ndarray | None = None
    """int: tokens of every expert in `routes_TLK`; None: 1. An expert without tokens is loaded and not run."""
    weights_TLK: np.ndarray | None = None
    """Gate weights of `routes_TLK`."""
    disk: CopyLink | None = None
    """Disk → host memory; None: every expert lies in host memory."""
    host_cache: CacheSettings | None = None
    """Host memory, where a disk lies behind it."""
    device_store: Store | None = None
    """Where cache and staging must fit beside what is there."""
    host_store: Store | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    """What a decode took."""

    step_s: np.ndarray
    """float64 [T]: duration of every step."""
    counts: Counts
    stall_s: dict[str, float]
    """Cause → seconds in which the device waited."""
    moved_bytes: dict[str, float]
    """Link → bytes."""
    peak_bytes: dict[str, int]
    """Tier → most bytes of experts in cache and staging, beside what its store holds already."""
    host_hits: int = 0
    """Loads found in host memory, where a disk lies behind it."""
    host_misses: int = 0

    @property
    def simulated_s(self) -> float:
        """From the first to the last step."""
        return float(self.step_s.sum())

    def report(self) -> dict[str, Any]:
        """Return the part of a replay's report that offloading adds."""
        total = self.simulated_s
        report: dict[str, Any] = {
            "simulated_s": total,
            "steps": len(self.step_s),
            "steps_per_s": len(self.step_s) / total if total else 0.0,
            "step_s": self.step_s.tolist(),
            "cache": self.counts.report(),
            "stall_s": dict(self.stall_s),
            "memory": dict(self.peak_bytes),
            "bytes": dict(self.moved_bytes),
        }
        if self.host_hits or self.host_misses:
            report["host_cache"] = {"hits": self.host_hits, "misses": self.host_misses, "hit_rate": self.host_hits / (self.host_hits + self.host_misses)}
        return report


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """A checked `Decode`, by position and by key."""

    num_layers: int
    num_keys: int
    positions: int
    demand_P: list[list[int]]
    predicted_P: list[list[int]]
    before_P: list[float]
    """Attention and gate."""
    attention_P: list[float]
    work_P: list[list[float]]
    """Expert times, like `demand_P`."""
    work_sum_P: list[float]
    tokens_P: list[list[int]]
    """Like `demand_P`; empty unless a miss policy asks."""
    above_P: list[list[float]]
    """Gate weight ranked above, likewise."""
    bytes_of: list[int]
    host_s: list[float]
    disk_s: list[float]
    low_bytes: list[int]
    low_s: list[float]


def prepare(case: Decode) -> Inputs:
    """Check `case` and lay it out. Raises InputError with the first rule that it breaks."""
    routes = _experts(case.routes_TLK, "routes_TLK", case.num_experts, None)
    steps, layers, width = routes.shape
    experts, present = case.num_experts, routes >= 0
    _rules(case)
    tokens = np.where(present, 1 if case.tokens_TLK is None else _like(case.tokens_TLK, routes, "tokens_TLK"), 0)
    weights = np.zeros(routes.shape) if case.weights_TLK is None else np.where(present, _like(case.weights_TLK, routes, "weights_TLK"), 0.0)
    work_TLK = _expert_times(case, routes, tokens)
    asked = policies.get("miss", case.miss).name != LOAD
    attention, gate = (_times(value, name, steps, layers) for value, name in ((case.attention_s, "attention_s"), (case.gate_s, "gate_s")))
    predicted: list[list[int]] = []
    if case.prefetch is not None:
        shown = _experts(case.prefetch.predicted_TLK, "predicted_TLK", experts, (steps, layers))
        predicted = keys_by_position(shown, experts)
    bytes_of = _bytes(case.expert_bytes, "expert_bytes", layers, experts)
    low_bytes = _bytes(case.low_bytes, "low_bytes", layers, experts) if case.low_bytes is not None else []
    return Inputs(
        num_layers=layers, num_keys=layers * experts, positions=steps * layers, demand_P=keys_by_position(routes, experts), predicted_P=predicted,
        before_P=(attention + gate).reshape(-1).tolist(), attention_P=attention.reshape(-1).tolist(), work_P=_rows(work_TLK, present),
        work_sum_P=work_TLK.sum(axis=-1).reshape(-1).tolist(), tokens_P=_rows(tokens, present) if asked else [],
        above_P=_rows(_above(weights), present) if asked else [],
        bytes_of=bytes_of, host_s=_seconds(case.host, bytes_of), disk_s=_seconds(case.disk, bytes_of) if case.disk is not None else [],
        low_bytes=low_bytes, low_s=_seconds(case.host, low_bytes),
    )  # fmt: skip


def _rules(case: Decode) -> None:
    miss = policies.get("miss", case.miss).name
    if case.expert_start not in ("all", "each"):
        raise InputError(describe("decode", "expert_start", case.expert_start, "must be all or each"))
    if miss == COMPUTE and case.compute_s is None:
        raise InputError(describe("decode", "miss", miss, "needs compute_s, the time of an expert on the other device"))
    if miss == PRECISION and case.low_bytes is None:
        raise InputError(describe("decode", "miss", miss, "needs low_bytes, the size of a low-precision expert"))
    if case.low_bytes is not None and case.disk is not None:
        raise InputError(describe("decode", "low_bytes", "given", "must not be combined with a disk: host memory keeps one precision of an expert"))
    if (case.disk is None) != (case.host_cache is None):
        raise InputError(describe("decode", "disk", case.disk, "and host_cache must be given together"))
    if case.disk is not None and case.disk.discipline != case.host.discipline:
        raise InputError(describe("link disk", "discipline", case.disk.discipline, f"must be that of link {case.host.name}: {case.host.discipline}"))
    if case.prefetch is not None and case.prefetch.cancel_wrong and case.host.discipline != "priority":
        raise InputError(describe("prefetch", "cancel_wrong", True, f"needs a link of discipline priority; {case.host.name} is {case.host.discipline}"))


def _experts(value: np.ndarray, name: str, experts: int, shape: tuple[int, int] | None) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[:2] or (shape is not None and array.shape[:2] != shape):
        rule = f"must be integers [steps, layers, experts], {shape or 'at least one'} steps and layers"
        raise InputError(f"decode: {name} = {array.dtype} {list(array.shape)} {rule}")
    wrong = (array < -1) | (array >= experts)
    if wrong.any():
        place = f"{name}{np.argwhere(wrong)[0].tolist()}"
        raise InputError(describe("decode", place, int(array[wrong][0]), f"must be an expert 0..{experts - 1}, or -1 for none"))
    ordered = np.sort(array, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        where = np.argwhere(twice)[0].tolist()[:2]
        raise InputError(describe("decode", f"{name}{where}", array[tuple(where)].tolist(), "must not name an expert twice"))
    return array.astype(np.int64)


def _like(value: np.ndarray, routes: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.shape != routes.shape or not (np.isfinite(array[routes >= 0]).all() and (array[routes >= 0] >= 0).all()):
        raise InputError(describe("decode", name, array.shape, f"must be finite, >= 0 and of the shape of routes_TLK, {routes.shape}"))
    return array


def _checked(array: np.ndarray, name: str, unit: str) -> np.ndarray:
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        place = f"{name}{np.argwhere(bad)[0].tolist() if array.ndim else ''}"
        raise InputError(f"decode: {place} = {array[bad][0]} {unit} must be finite and >= 0")
    return array


def _times(value: Any, name: str, steps: int, layers: int) -> np.ndarray:
    """Return float64 [T, L]."""
    if callable(value):
        return _checked(np.array([[float(value(step, layer)) for layer in range(layers)] for step in range(steps)]), name, "s")
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (layers,), (steps, layers)):
        raise InputError(describe("decode", name, array.shape, f"must be a number, [{layers}], [{steps}, {layers}] or a callable of (step, layer)"))
    return _checked(np.broadcast_to(array, (steps, layers)), name, "s")


def _expert_times(case: Decode, routes: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return float64 [T, L, K]."""
    layers, experts = routes.shape[1], case.num_experts
    layer = np.broadcast_to(np.arange(layers)[None, :, None], routes.shape)
    if not callable(case.expert_s):
        array = np.asarray(case.expert_s, dtype=np.float64)
        if array.ndim == 3 and array.shape == routes.shape:
            return np.where(tokens > 0, _checked(array, "expert_s", "s"), 0.0)
        if array.shape not in ((), (layers,), (layers, experts)):
            rule = f"must be a number, [{layers}], [{layers}, {experts}], the shape of routes_TLK or a callable of (layer, expert, tokens)"
            raise InputError(describe("decode", "expert_s", array.shape, rule))
        _checked(array, "expert_s", "s")
        table_LE = np.broadcast_to(array[:, None] if array.ndim == 1 else array, (layers, experts))
        return np.where(tokens > 0, table_LE[layer, np.maximum(routes, 0)], 0.0)
    asked = np.stack([layer, routes, tokens], axis=-1)[tokens > 0]
    result = np.zeros(routes.shape)
    if len(asked):
        kinds, inverse = np.unique(asked, axis=0, return_inverse=True)
        times = np.array([float(case.expert_s(int(at), int(expert), int(count))) for at, expert, count in kinds])
        result[tokens > 0] = _checked(times, "expert_s", "s")[inverse.reshape(-1)]
    return result


def _bytes(value: Any, name: str, layers: int, experts: int) -> list[int]:
    array = np.asarray(value, dtype=np.float64)
    if array.shape not in ((), (layers,), (layers, experts)):
        raise InputError(describe("decode", name, array.shape, f"must be a number, [{layers}] or [{layers}, {experts}]"))
    _checked(array, name, "B")
    table_LE = np.broadcast_to(array[:, None] if array.ndim == 1 else array, (layers, experts))
    return np.ceil(table_LE).astype(np.int64).reshape(-1).tolist()


def _seconds(link: CopyLink, nbytes: list[int]) -> list[float]:
    """Return the time of every key's copy over `link`, alone."""
    times = {size: float(link.load_s(size)) for size in sorted(set(nbytes))}
    for size, seconds in times.items():
        if not (np.isfinite(seconds) and seconds >= 0):
            raise InputError(f"link {link.name}: load_s({size} B) = {seconds} s must be finite and >= 0")
    return [times[size] for size in nbytes]


def _above(weights_TLK: np.ndarray) -> np.ndarray:
    """Return the sum of weights ranked above each one, of their total."""
    order = np.argsort(-weights_TLK, axis=-1, kind="stable")
    ranked = np.take_along_axis(weights_TLK, order, axis=-1)
    above = np.cumsum(ranked, axis=-1) - ranked
    total = np.maximum(weights_TLK.sum(axis=-1, keepdims=True), np.finfo(float).tiny)
    result = np.empty_like(above)
    np.put_along_axis(result, order, above / total, axis=-1)
    return result


def _rows(values_TLK: np.ndarray, present: np.ndarray) -> list[list[Any]]:
    """Return the values by position, without those of the -1 that fill up."""
    rows = values_TLK.reshape(-1, values_TLK.shape[-1])
    if present.all():
        return rows.tolist()
    return [row[keep].tolist() for row, keep in zip(rows, present.reshape(rows.shape), strict=True)]
