"""Rules about what experts are and how much they take: expert kinds, capacity; and about layers: one decision, several rounds.

`capacity` gives every expert ceil(CF · k · T / E) places per step: the first that ask get them (first choices of all tokens
before second ones, tokens in order of arrival), or the heaviest gate weights; the others are dropped or try their next candidate.
With N_F experts that compute and N_Z that do not, and a weight tau between them, an expert of the first kind has
ceil(CF · tau · k · T / (tau · N_F + N_Z)) places, one of the others 1/tau times that.
Shapes: T tokens of a step, L layers, K choices, E experts.
Source: GShard, Switch Transformer (capacity); MoE++ (zero, copy, constant experts, tau); AdaMoE (null); Read-ME (one decision); Chain-of-Experts (rounds).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.routing_trace import MAX_ROUNDS
from moesim.traces.rules_text import Words, ids
from moesim.traces.rules_view import KINDS, Decision, RouterView, Rule, known_weights, ranked

MAX_KEYS = 1 << 16
"""Keys up to this are sorted by radix, which is several times faster."""


def _kind(kind: str) -> Callable[[str], Rule]:
    """`zero:IDS`, `copy:IDS`, `constant:IDS`: these experts compute nothing. `null:N`: the last N experts are none at all."""

    def make(text: str) -> Rule:
        words = Words(kind, text, f"{kind}:4" if kind == "null" else f"{kind}:8-11")
        last = words.whole("N", 0, 65535) if kind == "null" else 0
        listed = [] if kind == "null" else ids(words.value("IDS"), words)
        words.end()

        def decide(view: RouterView) -> Decision:
            experts = view.num_experts
            if last >= experts or (listed and listed[-1] >= experts):
                raise TraceError(describe(f"rule {words.name}", "experts", experts, f"must be > {last or listed[-1]}", "name experts that the trace has"))
            kind_E = view.kind_E.copy()
            chosen = slice(experts - last, None) if kind == "null" else listed
            if kind_E[chosen].any():
                raise TraceError(f"rule {words.name}: an expert has a kind already; name every expert once")
            kind_E[chosen] = KINDS.index(kind)
            return replace(view.keep(), kind_E=kind_E)

        return Rule(name=words.name, decide=decide)

    return make


def places_E(factor: Fraction | None, choices: int, kind_E: np.ndarray, tau: Fraction) -> np.ndarray:
    """Return int64 [E]: places of every expert for `choices` = k · T choices; factor None: without limit."""
    if factor is None:
        return np.full(len(kind_E), choices, dtype=np.int64)
    computing = int((kind_E == 0).sum())
    unit = factor * choices / (tau * computing + len(kind_E) - computing)
    return np.where(kind_E == 0, math.ceil(unit * tau), math.ceil(unit))


def _capacity(text: str) -> Rule:
    """`capacity:CF[,k=K][,by=arrival|weight][,per=step|rank][,tau=T]`; k below the recorded choices: overflow asks the next candidates."""
    words = Words("capacity", text, "capacity:1.25 or capacity:1.25,by=weight,per=rank or capacity:1,k=1")
    shown = words.value("CF")
    factor = None if shown == "inf" else words.fraction("CF", shown, 1e6)
    by, per, chosen_k = words.option("by", "arrival"), words.option("per", "step"), words.option("k", "")
    tau = words.fraction("tau", words.option("tau", "1"), 1e3)
    k = words.as_whole("k", chosen_k, 1, 1024) if chosen_k else 0
    words.end()
    for key, value, known in (("by", by, ("arrival", "weight")), ("per", per, ("step", "rank"))):
        if value not in known:
            raise words.refuse(key, value, f"must be {' or '.join(known)}")
    if k and by == "weight":
        raise words.refuse("k", k, "sends overflow to the next candidate in order of arrival; leave out by=weight")

    def decide(view: RouterView) -> Decision:
        stored = view.experts_TLK.shape[2]
        if k > stored:
            raise TraceError(describe(f"rule {words.name}", "candidates per token", stored, f"must be >= {k}", "take a smaller k"))
        if by == "weight":
            known_weights(view, words.name)
        view = ranked(view, words.name) if k else view
        width = k or stored
        tokens = view.experts_TLK.shape[0]
        owner_T = np.unique(view.rank_T, return_inverse=True)[1] if per == "rank" else np.zeros(tokens, dtype=np.int64)
        count_R = np.bincount(owner_T, minlength=1)
        places_RE = np.stack([places_E(factor, width * int(count), view.kind_E, tau) for count in count_R])
        keep = _heaviest(view, owner_T, places_RE) if by == "weight" else _first_come(view, owner_T, places_RE, width)
        wanted = view.experts_TLK.size if view.valid_TLK is None else view.valid_TLK
        asked = tokens * view.experts_TLK.shape[1] * width if view.valid_TLK is None else int(np.minimum(np.asarray(wanted).sum(axis=2), width).sum())
        offered = int(places_RE[:, view.kind_E == 0].sum()) * view.experts_TLK.shape[1]
        return view.keep(keep, dropped=asked - int(np.count_nonzero(keep)), places=offered)

    return Rule(name=words.name, decide=decide)


def _layers_at_once(keys: int, layers: int) -> int:
    return max(1, min(layers, MAX_KEYS // keys))


def _keys(experts: np.ndarray, owner_T: np.ndarray, num_experts: int, owners: int) -> np.ndarray:
    """Return [T, l, …]: a number for (layer, owner, expert), of the narrowest type."""
    layers = experts.shape[1]
    base = np.arange(layers)[None] * owners * num_experts + owner_T[:, None] * num_experts
    wide = layers * owners * num_experts > MAX_KEYS
    key = base.reshape(*base.shape, *(1,) * (experts.ndim - 2)) + experts
    return key.astype(np.int64 if wide else np.uint16)


def _first_come(view: RouterView, owner_T: np.ndarray, places_RE: np.ndarray, width: int) -> np.ndarray:
    """Return bool [T, L, K]: choices that find a place, column by column; a token asks until it has `width` of them."""
    (tokens, layers, stored), (owners, experts) = view.experts_TLK.shape, places_RE.shape
    keep = np.zeros(view.experts_TLK.shape, dtype=bool)
    step = _layers_at_once(owners * experts, layers)
    for low in range(0, layers, step):
        part = view.experts_TLK[:, low : low + step]
        left_X = np.tile(places_RE.ravel(), part.shape[1])
        got_N = np.zeros(part.shape[0] * part.shape[1], dtype=np.int16)
        for choice in range(stored):
            asks = None if view.valid_TLK is None else view.valid_TLK[:, low : low + step, choice].ravel()
            if width < stored:
                open_N = got_N < width
                asks = open_N if asks is None else asks & open_N
            key_N = _keys(part[..., choice], owner_T, experts, owners).ravel()
            found = _admit(key_N if asks is None else key_N[asks], left_X)
            if asks is not None:
                whole = np.zeros(len(key_N), dtype=bool)
                whole[asks] = found
                found = whole
            got_N += found
            keep[:, low : low + step, choice] = found.reshape(tokens, -1)
    return keep


def _admit(key_N: np.ndarray, left_X: np.ndarray) -> np.ndarray:
    """Return bool [N]: who gets one of the `left_X` places of its key, first come first served; takes the places."""
    count_X = np.bincount(key_N, minlength=len(left_X))
    full_X = count_X > left_X
    found = np.ones(len(key_N), dtype=bool)
    if full_X.any():
        crowd = np.flatnonzero(full_X[key_N])
        order = crowd[np.argsort(key_N[crowd], kind="stable")]
        size_X = count_X[full_X]
        place = np.arange(len(order)) - np.repeat(np.cumsum(size_X) - size_X, size_X)
        found[order[place >= np.repeat(left_X[full_X], size_X)]] = False
    left_X -= np.minimum(count_X, left_X)
    return found


def _heaviest(view: RouterView, owner_T: np.ndarray, places_RE: np.ndarray) -> np.ndarray:
    """Return bool [T, L, K]: the heaviest choices of every expert, as many as it has places; equal weights in order of arrival."""
    assert view.weights_TLK is not None
    (owners, experts), layers = places_RE.shape, view.experts_TLK.shape[1]
    keep = np.zeros(view.experts_TLK.shape, dtype=bool)
    step = _layers_at_once(owners * experts, layers)
    for low in range(0, layers, step):
        here = slice(low, low + step)
        key_N = _keys(view.experts_TLK[:, here], owner_T, experts, owners).ravel()
        # The bits of floats >= 0 are ordered as the floats are; heavy ones come first in the complement.
        bits_N = (view.weights_TLK[:, here].ravel().astype(np.float32) + np.float32(0)).view(np.uint32)
        packed_N = (key_N.astype(np.uint64) << np.uint64(32)) | ~bits_N
        left_X = np.tile(places_RE.ravel(), view.experts_TLK[:, here].shape[1])
        asks = np.arange(len(key_N)) if view.valid_TLK is None else np.flatnonzero(view.valid_TLK[:, here])
        count_X = np.bincount(key_N[asks], minlength=len(left_X))
        # An expert takes all that lies before its last place; what weighs as much as that takes what is left, in order of arrival.
        last_X = np.full(len(left_X), np.iinfo(np.uint64).max)
        full = np.flatnonzero(count_X > left_X)
        crowd = np.sort(packed_N[asks[count_X[key_N[asks]] > left_X[key_N[asks]]]])
        last_X[full] = crowd[np.cumsum(count_X[full]) - count_X[full] + left_X[full] - 1]
        before = packed_N[asks] < last_X[key_N[asks]]
        found = np.zeros(len(key_N), dtype=bool)
        found[asks[before]] = True
        ties = asks[packed_N[asks] == last_X[key_N[asks]]]
        found[ties] = _admit(key_N[ties], left_X - np.bincount(key_N[asks[before]], minlength=len(left_X)))
        keep[:, here] = found.reshape(keep[:, here].shape)
    return keep


def _one_decision(text: str) -> Rule:
    """`one_decision[:LAYER]`: the choices of one layer (of the model; default the first that is recorded) hold for all layers."""
    words = Words("one_decision", text, "one_decision or one_decision:3")
    named = words.value("LAYER", "")
    layer = words.as_whole("LAYER", named, 0, 65535) if named else None
    words.end()

    def decide(view: RouterView) -> Decision:
        if layer is not None and layer not in view.moe_layer_ids:
            raise TraceError(describe(f"rule {words.name}", "LAYER", layer, f"must be a layer of the trace, {list(view.moe_layer_ids)}"))
        row = 0 if layer is None else view.moe_layer_ids.index(layer)
        cubes = (view.experts_TLK, view.weights_TLK, view.valid_TLK)
        experts, weights, valid = (None if cube is None else np.repeat(cube[:, row : row + 1], cube.shape[1], axis=1) for cube in cubes)
        assert experts is not None
        return Decision(experts_TLK=experts, weights_TLK=weights, valid_TLK=valid, is_foretold=True)

    return Rule(name=words.name, decide=decide)


def _rounds(text: str) -> Rule:
    """`rounds:C`: the recorded layers are C rounds each of a layer; round c of layer l is row l · C + c."""
    words = Words("rounds", text, "rounds:2")
    rounds = words.whole("C", 1, MAX_ROUNDS)
    words.end()

    def decide(view: RouterView) -> Decision:
        layers = view.experts_TLK.shape[1]
        if layers % rounds:
            rule = f"must be a multiple of {rounds}, one row per round of every layer"
            raise TraceError(describe(f"rule {words.name}", "layer rows", layers, rule, "record the routing of every round as a row"))
        return view.keep()

    why = "it says how a trace is laid out; write the trace with `moesim trace transform --rule` first"
    return Rule(name=words.name, decide=decide, rounds=rounds, not_live=why)


RULES: Mapping[str, Callable[[str], Rule]] = {
    **{kind: _kind(kind) for kind in KINDS[1:]},
    "capacity": _capacity,
    "one_decision": _one_decision,
    "rounds": _rounds,
}
