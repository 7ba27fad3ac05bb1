"""Synthetic routing: named, seeded baselines accepted wherever a trace is, and always labelled as such.

`synthetic:KIND[:P][,option=value…]` with KIND
- `balanced`: every expert of a layer equally often in every step (loads differ by at most 1);
- `zipf:S`: the expert of popularity rank r is chosen with probability ∝ r^-S (at most once per token);
- `power-law:A`: popularities drawn from the density x^-A on [1, 0.8 · tokens], a law that kernel benchmarks use;
- `markov:P`: choice j of a layer is linked to choice j of the layer before through a fixed seeded bijection of the experts
  with probability P, else drawn afresh; in the first layer it repeats choice j of the request's previous token with
  probability `temporal` (default P). Fresh draws are uniform, or Zipf with `skew=S`;
- `topics:N`: N topics with popularities of their own (Zipf, `skew`, default 1); every request has a topic, and a token
  follows it with probability `focus` (default 0.75), else a random one.
Options: tokens (per step, all ranks; 8192), steps (1), requests (per step; prefill 32, decode one per token), seed, phase
(prefill | decode | train), skew, temporal, focus. Hot experts differ per layer; group-limited routing is respected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import TraceError, describe
from moesim.files import sha256_hex
from moesim.traces import sampling
from moesim.traces.manifest import Columns
from moesim.traces.routing_trace import PHASES, SYNTHETIC, GroupInfo, RoutingTrace, TokenBatch, TraceShape

KINDS = {"balanced": None, "zipf": (0.0, 10.0), "power-law": (0.0, 10.0), "markov": (0.0, 1.0), "topics": (1, 4096)}
"""Kind → range of its parameter."""
_OPTIONS = {"tokens": (1, 1 << 22), "steps": (1, 1 << 20), "requests": (1, 1 << 22), "seed": (0, 2**63 - 1)}
_SHARES = {"skew": (0.0, 10.0), "temporal": (0.0, 1.0), "focus": (0.0, 1.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """A parsed specification."""

    kind: str
    parameter: float = 0.0
    tokens: int = 8192
    steps: int = 1
    requests: int = 32
    seed: int = 0
    phase: str = "prefill"
    skew: float = 0.0
    temporal: float = 0.0
    focus: float = 0.75
    tokens_given: bool = False
    requests_given: bool = False

    def canonical(self) -> str:
        """Return the full specification as text."""
        parameter = "" if self.kind == "balanced" else f":{self.parameter:g}"
        extra = {"markov": f",skew={self.skew:g},temporal={self.temporal:g}", "topics": f",skew={self.skew:g},focus={self.focus:g}"}.get(self.kind, "")
        return f"{SYNTHETIC}{self.kind}{parameter},tokens={self.tokens},steps={self.steps},requests={self.requests},seed={self.seed},phase={self.phase}{extra}"


def parse_spec(text: str, *, seed: int = 0) -> Synthetic:
    """Parse `synthetic:…`; raise TraceError naming the part that is wrong. `seed` is the default of `seed=`."""
    head, *rest = text.removeprefix(SYNTHETIC).split(",")
    kind, colon, parameter_text = head.partition(":")
    if kind not in KINDS:
        raise TraceError(describe(text, "kind", kind, f"must be one of {list(KINDS)}", "for example synthetic:zipf:1.0"))
    bounds = KINDS[kind]
    values: dict[str, object] = {"kind": kind, "seed": seed}
    if bounds is None:
        if colon:
            raise TraceError(describe(text, "parameter", parameter_text, f"is not taken by {kind}"))
    else:
        values["parameter"] = _number(text, "parameter", parameter_text, bounds, whole=kind == "topics")
    for part in rest:
        name, _, value = part.partition("=")
        if name in values and name != "seed":
            raise TraceError(describe(text, "option", name, "is given twice"))
        if name in _OPTIONS:
            values[name] = int(_number(text, name, value, _OPTIONS[name], whole=True))
        elif name in _SHARES and kind in ("markov", "topics") and (name, kind) not in (("temporal", "topics"), ("focus", "markov")):
            values[name] = _number(text, name, value, _SHARES[name], whole=False)
        elif name == "phase" and value in PHASES[:3]:
            values[name] = value
        else:
            raise TraceError(
                describe(
                    text,
                    "option",
                    part,
                    f"is not an option of {kind}",
                    "options: tokens, steps, requests, seed, phase=prefill|decode|train; markov: skew, temporal; topics: skew, focus",
                )
            )
    spec = Synthetic(**values, tokens_given="tokens" in values, requests_given="requests" in values)  # type: ignore[arg-type]
    if kind == "topics" and "skew" not in values:
        spec = replace(spec, skew=1.0)
    if kind == "markov" and "temporal" not in values:
        spec = replace(spec, temporal=spec.parameter)
    if spec.requests_given and spec.requests > spec.tokens:
        raise TraceError(describe(text, "requests", spec.requests, f"must be <= tokens per step, {spec.tokens}"))
    return _with_requests(spec)


def _with_requests(spec: Synthetic) -> Synthetic:
    if spec.requests_given:
        return replace(spec, requests=min(spec.requests, spec.tokens))
    return replace(spec, requests=spec.tokens if spec.phase == "decode" else min(32, spec.tokens))


def _number(text: str, name: str, value: str, bounds: tuple[float, float], *, whole: bool) -> float:
    try:
        number = float(int(value)) if whole else float(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not bounds[0] <= number <= bounds[1]:
        raise TraceError(describe(text, name, value, f"must be {'an integer' if whole else 'a number'} in {bounds[0]:g}..{bounds[1]:g}"))
    return int(value) if whole else number


def open_synthetic(text: str, shape: TraceShape, *, seed: int = 0) -> RoutingTrace:
    """Return the trace that a specification describes, generated step by step as it is read."""
    return _open(parse_spec(text, seed=seed), shape)


def _open(spec: Synthetic, shape: TraceShape) -> RoutingTrace:
    if spec.tokens * shape.num_layers * shape.top_k > 1 << 29:
        raise TraceError(describe(spec.canonical(), "tokens", spec.tokens, f"gives more than {1 << 29} choices per step", "use fewer tokens and more steps"))
    if spec.kind == "topics" and spec.parameter * shape.num_layers * shape.num_experts > 1 << 26:
        raise TraceError(describe(spec.canonical(), "topics", spec.parameter, "needs too large a table", "use fewer topics"))
    text = spec.canonical()
    return RoutingTrace(
        shape=shape,
        kind="tokens",
        num_rows=spec.tokens * spec.steps,
        provenance={"tool": "moesim", "synthetic": text},
        fingerprint=sha256_hex(f"{text}|{shape}{shape.experts_L or ''}".encode()),
        source=text,
        is_synthetic=True,
        synthetic=text,
        tokens=_Generated(spec, shape),
        resized=None if spec.tokens_given else lambda tokens: _open(_with_requests(replace(spec, tokens=tokens)), shape),
    )


class _Generated:
    """One group of rows per step, a function of (specification, shape, step)."""

    columns = Columns()

    def __init__(self, spec: Synthetic, shape: TraceShape) -> None:
        self._spec, self._shape = spec, shape
        self.groups: Sequence[GroupInfo] = _Steps(spec)
        self.requests_per_step = spec.requests
        self._state: tuple[int, np.ndarray] | None = None

    def _generator(self, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._spec.seed, *key])))

    def read(self, index: int) -> TokenBatch:
        """Generate one step."""
        spec, tokens = self._spec, self._spec.tokens
        slot_T = np.arange(tokens, dtype=np.int64) * spec.requests // tokens
        first_R = -(-np.arange(spec.requests, dtype=np.int64) * tokens // spec.requests)
        within_T = np.arange(tokens, dtype=np.int64) - first_R[slot_T]
        length_T = np.diff(np.append(first_R, tokens))[slot_T]
        decode = spec.phase == "decode"
        return TokenBatch(
            step_T=np.full(tokens, index, dtype=np.uint32),
            rank_T=np.zeros(tokens, dtype=np.uint16),
            request_T=(slot_T if decode else slot_T + index * spec.requests).astype(np.uint64),
            position_T=(within_T + index * length_T if decode else within_T).astype(np.uint32),
            phase_T=np.full(tokens, PHASES.index(spec.phase), dtype=np.uint8),
            experts_TLK=self._experts(index, slot_T),
        )

    def _experts(self, step: int, slot_T: np.ndarray) -> np.ndarray:
        spec, shape = self._spec, self._shape
        if spec.kind == "markov":
            return self._markov(step, slot_T)
        result = np.empty((spec.tokens, shape.num_layers, shape.top_k), dtype=shape.dtype)
        topic_T = self._topics(step, slot_T) if spec.kind == "topics" else None
        for layer in range(shape.num_layers):
            generator = self._generator(1, step, layer)
            if spec.kind == "balanced":
                result[:, layer] = _balanced(generator, spec.tokens, shape, layer)
            elif topic_T is None:
                result[:, layer] = draw_TK(generator, spec.tokens, self._weights(layer, 0), shape)
            else:
                for topic in np.unique(topic_T):
                    rows = np.flatnonzero(topic_T == topic)
                    result[rows, layer] = draw_TK(generator, len(rows), self._weights(layer, int(topic)), shape)
        return result

    def _weights(self, layer: int, variant: int) -> np.ndarray:
        """Return float64 [E]: popularity of every expert that a layer has, the hot ones at seeded places."""
        spec, experts = self._spec, self._shape.expert_counts_L[layer]
        generator = self._generator(0, layer, variant)
        if spec.kind == "power-law":
            # inverse of the distribution function of the density ∝ x^-A on [1, high]
            high, share = max(2.0, 0.8 * spec.tokens), generator.random(experts)
            power = 1.0 - spec.parameter
            return high**share if abs(power) < 1e-9 else (1.0 + (high**power - 1.0) * share) ** (1.0 / power)
        exponent = spec.parameter if spec.kind == "zipf" else spec.skew
        return np.arange(1, experts + 1, dtype=np.float64)[generator.permutation(experts)] ** -exponent

    def _topics(self, step: int, slot_T: np.ndarray) -> np.ndarray:
        """Return int64 [T]: topic of every token."""
        spec, count = self._spec, int(self._spec.parameter)
        of_request = self._generator(2, 0 if spec.phase == "decode" else step).integers(0, count, size=spec.requests)
        generator = self._generator(3, step)
        stray = generator.random(spec.tokens) >= spec.focus
        return np.where(stray, generator.integers(0, count, size=spec.tokens), of_request[slot_T])

    def _markov(self, step: int, slot_T: np.ndarray) -> np.ndarray:
        spec, shape = self._spec, self._shape
        weights = self._weights(0, 0)
        limits = shape.num_groups, shape.top_k_groups
        result = np.empty((spec.tokens, shape.num_layers, shape.top_k), dtype=shape.dtype)
        current = self._first_layer(step, slot_T, weights)
        result[:, 0] = current
        for layer in range(1, shape.num_layers):
            link = self._link(layer)
            generator = self._generator(1, step, layer)
            if len(link) == shape.expert_counts_L[layer] and (link >= 0).all():
                moved = np.empty_like(weights)
                moved[link] = weights
                weights = moved
            else:
                weights = self._weights(layer, 0)
            linked = np.where(generator.random(current.shape) < spec.parameter, link[current], -1)
            current = sampling.fill_TK(generator, linked, _cumulative(weights), *limits)
            result[:, layer] = current
        return result

    def _link(self, layer: int) -> np.ndarray:
        """Return int64: the expert of `layer` that every expert of the layer before leads to, -1 where a smaller layer lacks it."""
        groups = self._shape.num_groups
        before, after = (count // groups for count in self._shape.expert_counts_L[layer - 1 : layer + 1])
        size = max(before, after)
        link = _bijection(self._generator(4, layer), size * groups, groups).reshape(groups, size)[:, :before].ravel()
        return np.where(link % size < after, link // size * after + link % size, -1)

    def _first_layer(self, step: int, slot_T: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Chain the tokens of every request: choice j repeats the one before with probability `temporal`."""
        spec, shape = self._spec, self._shape
        decode = spec.phase == "decode"
        before: np.ndarray | None = None
        if decode and step > 0:
            if self._state is None or self._state[0] != step - 1:
                for earlier in range(step):
                    self._first_layer(earlier, slot_T, weights)
            assert self._state is not None
            before = self._state[1]
        generator = self._generator(1, step, 0)
        cumulative, limits = _cumulative(weights), (shape.num_groups, shape.top_k_groups)
        result = np.empty((spec.tokens, shape.top_k), dtype=np.int64)
        within = np.arange(spec.tokens) - np.searchsorted(slot_T, slot_T)
        order = np.argsort(within, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(within[order])) + 1):
            kept = np.full((len(rows), shape.top_k), -1, dtype=np.int64)
            if before is not None:
                kept = np.where(generator.random(kept.shape) < spec.temporal, before[slot_T[rows]], -1)
            else:
                before = np.empty((spec.requests, shape.top_k), dtype=np.int64)
            drawn = sampling.fill_TK(generator, kept, cumulative, *limits)
            result[rows] = drawn
            before = before.copy()
            before[slot_T[rows]] = drawn
        assert before is not None
        self._state = (step, before)
        return result


class _Steps(Sequence[GroupInfo]):
    """One group per step, without a list of a million entries."""

    def __init__(self, spec: Synthetic) -> None:
        self._spec = spec

    def __len__(self) -> int:
        return self._spec.steps

    def __getitem__(self, index: int) -> GroupInfo:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        step = index % len(self)
        return GroupInfo(rows=self._spec.tokens, step_min=step, step_max=step)


def _balanced(generator: np.random.Generator, tokens: int, shape: TraceShape, layer: int) -> np.ndarray:
    experts = shape.expert_counts_L[layer]
    if shape.num_groups > 1:
        return sampling.balanced_grouped_TK(generator, tokens, experts, shape.top_k, shape.num_groups, shape.top_k_groups)
    return sampling.balanced_TK(generator, tokens, experts, shape.top_k)


def draw_TK(generator: np.random.Generator, tokens: int, weights_E: np.ndarray, shape: TraceShape) -> np.ndarray:
    """Return int64 [T, K] with inclusion proportional to `weights_E`, respecting the shape's groups."""
    if shape.num_groups > 1:
        return sampling.proportional_grouped_TK(generator, tokens, weights_E, shape.top_k, shape.num_groups, shape.top_k_groups)
    return sampling.proportional_TK(generator, tokens, weights_E, shape.top_k)


def _bijection(generator: np.random.Generator, experts: int, groups: int) -> np.ndarray:
    """Return int64 [E]: a random bijection that maps groups onto groups."""
    size = experts // groups
    inside = generator.permuted(np.tile(np.arange(size), (groups, 1)), axis=1)
    return (generator.permutation(groups)[:, None] * size + inside).ravel()


def _cumulative(weights: np.ndarray) -> np.ndarray:
    total = np.cumsum(weights)
    return total / total[-1]
