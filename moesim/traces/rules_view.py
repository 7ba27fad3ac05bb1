"""What a routing rule sees of a forward pass and what it decides, and how rules follow one another.

A rule is a pure function from a `RouterView` to a `Decision`: which recorded choices stay, in which order, with which
weights. A pipeline hands every rule what the one before it left. Experts that compute nothing (`KINDS`) stay choices while
rules run, and leave the routing at the end, counted by kind.
Shapes: T tokens of one step in order of arrival, L layers, K choices (best first), E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.traces.routing_trace import TokenBatch, TraceShape

KINDS = ("ffn", "null", "zero", "copy", "constant")
"""Kinds of experts by code; all but the first do no matrix product and live on every rank, so that nothing is sent."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RouterView:
    """The choices of one forward pass and whose they are."""

    experts_TLK: np.ndarray
    """uint8 or uint16: experts, best first."""
    weights_TLK: np.ndarray | None = None
    """Gate weights as recorded; None: not known."""
    valid_TLK: np.ndarray | None = None
    """bool: False where a choice does not exist; None: all exist."""
    rank_T: np.ndarray
    """Source rank."""
    request_T: np.ndarray
    position_T: np.ndarray
    phase_T: np.ndarray
    kind_E: np.ndarray
    """uint8: index in `KINDS` of every expert."""
    moe_layer_ids: tuple[int, ...]
    """Index in the model of every layer row."""
    step: int = 0
    predicted_TLK: np.ndarray | None = None
    """Experts that a predictor named before the layer ran."""
    is_ranked: bool = True
    """Whether choices are best first; not so where they are drawn from counts."""
    is_foretold: bool = False
    """Whether the choices of all layers are known before the first of them runs."""

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.kind_E)

    @property
    def load_LE(self) -> np.ndarray:
        """int64 [L, E]: choices of every expert in this pass so far."""
        load = np.empty((self.experts_TLK.shape[1], self.num_experts), dtype=np.int64)
        for layer in range(len(load)):
            ids = self.experts_TLK[:, layer]
            load[layer] = np.bincount(ids.ravel() if self.valid_TLK is None else ids[self.valid_TLK[:, layer]], minlength=self.num_experts)
        return load

    def keep(self, keep_TLK: np.ndarray | None = None, **counts: int) -> Decision:
        """Decide for the choices that exist and are marked in `keep_TLK` (None: all), where they are."""
        valid = self.valid_TLK if keep_TLK is None else keep_TLK if self.valid_TLK is None else keep_TLK & self.valid_TLK
        return Decision(experts_TLK=self.experts_TLK, weights_TLK=self.weights_TLK, valid_TLK=valid, counts=counts)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decision:
    """The choices that a rule leaves."""

    experts_TLK: np.ndarray
    """uint8 or uint16 [T, L, K]; K may differ from the view's."""
    weights_TLK: np.ndarray | None = None
    valid_TLK: np.ndarray | None = None
    """bool: False where a choice is none; None: all are."""
    kind_E: np.ndarray | None = None
    """uint8: kinds of the experts from here on; None: as before."""
    is_foretold: bool = False
    """Whether the choices of all layers are known from here on before the first of them runs."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What to report, summed over passes: `dropped`, `places`."""


Decide = Callable[[RouterView], Decision]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule made from its text."""

    name: str
    """The text, as reports show it."""
    decide: Decide
    groups: tuple[int, int] | None = None
    """Groups of experts, and how many of them a token reaches from here on; None: as before."""
    rounds: int | None = None
    """Rows per layer of the model from here on; None: as before."""
    not_live: str = ""
    """Why this cannot be done during a replay; empty: it can."""


def ranked(view: RouterView, rule: str) -> RouterView:
    """Return the view with the choices of every token and layer best first, those that do not exist last.

    By gate weight where known (equal weights keep their order), else as recorded. Raises TraceError if no order is known.
    """
    weights, valid = view.weights_TLK, view.valid_TLK
    if weights is None and not view.is_ranked:
        raise TraceError(f"rule {rule}: needs to know which choice is best, and choices drawn from counts have no order; use a token trace")
    if valid is None and (weights is None or (weights[..., :-1] >= weights[..., 1:]).all()):
        return view
    key = np.zeros(view.experts_TLK.shape, dtype=np.float32) if weights is None else -weights.astype(np.float32, copy=False)
    order = np.argsort(key if valid is None else np.where(valid, key, np.float32(np.inf)), axis=2, kind="stable")

    def sort(cube: np.ndarray | None) -> Any:
        return None if cube is None else np.take_along_axis(cube, order, axis=2)

    return replace(view, experts_TLK=sort(view.experts_TLK), weights_TLK=sort(weights), valid_TLK=sort(valid))


def first(view: RouterView, width: int, **counts: int) -> Decision:
    """Decide for the first `width` choices of a ranked view."""
    cubes = (None if cube is None else np.ascontiguousarray(cube[..., :width]) for cube in (view.experts_TLK, view.weights_TLK, view.valid_TLK))
    experts, weights, valid = cubes
    assert experts is not None
    return Decision(experts_TLK=experts, weights_TLK=weights, valid_TLK=valid, counts=counts)


def known_weights(view: RouterView, rule: str) -> np.ndarray:
    """Return the gate weights; raise TraceError if the trace has none, or others than weights >= 0."""
    weights = view.weights_TLK
    if weights is None:
        raise TraceError(f"rule {rule}: needs the gate weights of every choice, and the trace holds none; record or import it with weights")
    if weights.size and not 0 <= float(weights.min()) <= float(weights.max()) < np.inf:
        found = [float(weights.min()), float(weights.max())]
        raise TraceError(describe(f"rule {rule}", f"weights of step {view.step}", found, "must be finite and >= 0", "record them after softmax or sigmoid"))
    return weights


def mass_TL(view: RouterView) -> np.ndarray:
    """Return float64 [T, L]: sum of the gate weights of the choices that exist."""
    assert view.weights_TLK is not None
    return np.asarray(view.weights_TLK.sum(axis=2, dtype=np.float64, where=True if view.valid_TLK is None else view.valid_TLK))


def view_of(batch: TokenBatch, shape: TraceShape, step: int) -> RouterView:
    """Return what rules see of the tokens of one step of a trace."""
    names = ("experts_TLK", "weights_TLK", "valid_TLK", "predicted_TLK", "rank_T", "request_T", "position_T", "phase_T")
    columns = {name: getattr(batch, name) for name in names}
    return RouterView(**columns, kind_E=np.zeros(shape.num_experts, dtype=np.uint8), moe_layer_ids=shape.moe_layer_ids, step=step)


def checked(decision: Decision, view: RouterView, name: str) -> np.ndarray:
    """Return the experts of a decision; raise InputError unless it fits the pass that it is about and names experts that exist."""
    place, experts, (tokens, layers) = f"policy {name}", decision.experts_TLK, view.experts_TLK.shape[:2]
    is_array = isinstance(experts, np.ndarray) and experts.dtype in (np.uint8, np.uint16)
    if not is_array or experts.ndim != 3 or experts.shape[:2] != (tokens, layers) or experts.shape[2] < 1:
        found = f"{experts.dtype} {list(experts.shape)}" if isinstance(experts, np.ndarray) else type(experts).__name__
        raise InputError(describe(place, "experts_TLK", found, f"must be uint8 or uint16 [{tokens} tokens, {layers} layers, choices]"))
    for key, cube, kinds in (("weights_TLK", decision.weights_TLK, "f"), ("valid_TLK", decision.valid_TLK, "b")):
        if cube is not None and (cube.shape != experts.shape or cube.dtype.kind not in kinds):
            raise InputError(describe(place, key, f"{cube.dtype} {list(cube.shape)}", f"must be {'bool' if kinds == 'b' else 'float'} {list(experts.shape)}"))
    if experts.size and int(experts.max()) >= view.num_experts:
        wrong = experts >= view.num_experts
        if decision.valid_TLK is not None:
            wrong &= decision.valid_TLK
        if wrong.any():
            token, layer, choice = (int(axis[0]) for axis in np.nonzero(wrong))
            rule = f"must be in 0..{view.num_experts - 1} (token {token}, choice {choice})"
            raise InputError(
                describe(f"{place}: layer {view.moe_layer_ids[layer]}", "expert", int(experts[token, layer, choice]), rule, "choose experts that exist")
            )
        return experts * decision.valid_TLK
    return experts


@dataclass(slots=True)
class Tally:
    """What rules did, summed over passes."""

    choices: int = 0
    """Recorded choices."""
    token_layers: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Choices that were kept, by kind."""
    counts: Counter[str] = field(default_factory=Counter)
    """Sums of what the rules reported."""

    def report(self) -> dict[str, Any]:
        """Return the counts; `mean_experts_per_token`: of kind ffn, per layer."""
        return {
            "choices": self.choices,
            "dropped": self.counts["dropped"],
            "places": self.counts["places"] or None,
            "mean_experts_per_token": self.kinds["ffn"] / self.token_layers if self.token_layers else 0.0,
            "by_kind": {kind: self.kinds[kind] for kind in KINDS if kind in self.kinds},
        }


def run(rules: Sequence[tuple[str, Decide]], view: RouterView, tally: Tally) -> RouterView:
    """Apply named rules one after another and count what they did.

    In the result only choices of experts that compute are valid; others have expert 0 and weight 0. Predictions are those recorded,
    as many as choices are left, or the choices if these are foretold. Raises InputError, naming the rule, if one decides for what does not exist.
    """
    tally.choices += _valid(view)
    for name, decide in rules:
        decision = decide(view)
        if not isinstance(decision, Decision):
            raise InputError(describe(f"policy {name}", "decision", type(decision).__name__, "must be a moesim.traces.rules_view.Decision"))
        experts = checked(decision, view, name)
        tally.counts.update(decision.counts)
        kind_E = view.kind_E if decision.kind_E is None else decision.kind_E
        cubes: dict[str, Any] = {"experts_TLK": experts, "weights_TLK": decision.weights_TLK, "valid_TLK": decision.valid_TLK}
        view = replace(view, **cubes, kind_E=kind_E, is_foretold=view.is_foretold or decision.is_foretold)
    width = view.experts_TLK.shape[2]
    if view.is_foretold:
        view = replace(view, predicted_TLK=view.experts_TLK)
    elif view.predicted_TLK is not None:
        view = replace(view, predicted_TLK=view.predicted_TLK[..., :width] if view.predicted_TLK.shape[2] >= width else None)
    tally.token_layers += view.experts_TLK.shape[0] * view.experts_TLK.shape[1]
    if view.kind_E.any():
        kind_TLK = view.kind_E[view.experts_TLK]
        chosen = kind_TLK.ravel() if view.valid_TLK is None else kind_TLK[view.valid_TLK]
        count = np.bincount(chosen, minlength=len(KINDS))
        tally.kinds.update({kind: int(count[code]) for code, kind in enumerate(KINDS) if code == 0 or (view.kind_E == code).any()})
        computes = kind_TLK == 0
        view = replace(view, valid_TLK=computes if view.valid_TLK is None else view.valid_TLK & computes)
    else:
        tally.kinds["ffn"] += _valid(view)
    return _zeroed(view)


def _valid(view: RouterView) -> int:
    return int(view.experts_TLK.size if view.valid_TLK is None else np.count_nonzero(view.valid_TLK))


def _zeroed(view: RouterView) -> RouterView:
    """Return the view with expert 0 and weight 0 where there is no choice."""
    valid, weights = view.valid_TLK, view.weights_TLK
    if valid is None or valid.all():
        return replace(view, valid_TLK=None)
    return replace(view, experts_TLK=view.experts_TLK * valid, weights_TLK=None if weights is None else weights * valid)
