"""Rules that choose among a token's recorded candidates: `top_k`, `top_p`, `share`, `grouped`, `top_groups`, `mask`, `renormalise`.

A trace holds the K best experts of every token and layer; a rule that would choose one beyond them is refused, because the
trace cannot say which it is. Weights are kept as recorded (`renormalise` divides them by the sum of those that are left).
Shapes: T tokens, L layers, K recorded choices, E experts, G groups of E/G consecutive experts.
Source: dynamic top-p routing (Huang et al. 2024), Pangu Pro MoGE, group-limited routing of DeepSeek-V2 (best expert of a group) and
DeepSeek-V3 (sum of its best two), FlexOlmo (experts that a request opts out of), AdapMoE (leave out what adds little weight).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.traces.rules_text import Words, ids
from moesim.traces.rules_view import Decision, RouterView, Rule, first, known_weights, mass_TL, ranked

MORE = "record or import the router's choice with more candidates per token"


def _enough(view: RouterView, wanted: int, rule: str) -> None:
    stored = view.experts_TLK.shape[2]
    if wanted > stored:
        raise TraceError(describe(f"rule {rule}", "candidates per token", stored, f"must be >= {wanted}; the trace does not say who comes next", MORE))


def _lacking(lacks_TL: np.ndarray, view: RouterView, rule: str, what: str, remedy: str) -> None:
    """Raise TraceError if a token lacks what a rule needs, saying how many do and where the first is."""
    if lacks_TL.any():
        token, layer = (int(axis[0]) for axis in np.nonzero(lacks_TL))
        place = f"step {view.step}, token {token}, layer {view.moe_layer_ids[layer]}"
        raise TraceError(f"rule {rule}: {int(lacks_TL.sum())} of {lacks_TL.size} (token, layer) {what}, first {place}; {remedy}")


def _top_k(text: str) -> Rule:
    """`top_k:K`: the K best."""
    words = Words("top_k", text, "top_k:2")
    k = words.whole("K", 1, 1024)
    words.end()

    def decide(view: RouterView) -> Decision:
        _enough(view, k, words.name)
        return first(ranked(view, words.name), k)

    return Rule(name=words.name, decide=decide)


def _reached(view: RouterView, share_TL: np.ndarray | float) -> np.ndarray:
    """Return bool [T, L, K]: choices before which the weights of a ranked view do not yet sum to `share_TL`."""
    weights = view.weights_TLK
    assert weights is not None
    keep = np.empty(weights.shape, dtype=bool)
    # A sum of rounded weights reaches p if it does so to within the rounding.
    goal_TL = share_TL * (1 - float(np.finfo(weights.dtype).eps))
    sum_TL = np.zeros(weights.shape[:2])
    for choice in range(weights.shape[2]):
        keep[..., choice] = sum_TL < goal_TL if choice else True
        sum_TL += weights[..., choice] if view.valid_TLK is None else np.where(view.valid_TLK[..., choice], weights[..., choice], 0)
    return keep


def _top_p(text: str) -> Rule:
    """`top_p:P[,K_MAX]`: the fewest best ones whose router probabilities reach P, at most K_MAX."""
    words = Words("top_p", text, "top_p:0.4 or top_p:0.4,6")
    p = float(words.fraction("P", words.value("P"), 1))
    k_max = words.whole("K_MAX", 0, 1024, 0)
    words.end()

    def decide(view: RouterView) -> Decision:
        known_weights(view, words.name)
        _enough(view, k_max, words.name)
        view = ranked(view, words.name)
        mass = mass_TL(view)
        if view.experts_TLK.shape[2] < view.num_experts and mass.size and (np.abs(mass - 1) < 1e-3).all():
            raise TraceError(
                f"rule {words.name}: needs router probabilities over all {view.num_experts} experts, and the weights are normalised over the "
                f"{view.experts_TLK.shape[2]} chosen ones; record them before normalisation, or take share:{p:g}, a share of the recorded weight"
            )
        if k_max:
            view = _cut(view, k_max)
        else:
            lacks = mass < p * (1 - float(np.finfo(view.weights_TLK.dtype).eps))  # type: ignore[union-attr]
            limit = f"give the most experts per token, like top_p:{p:g},{view.experts_TLK.shape[2]}, or {MORE}"
            _lacking(lacks, view, words.name, f"hold less than {p:g} of the probability in their {view.experts_TLK.shape[2]} candidates", limit)
        return view.keep(_reached(view, p))

    return Rule(name=words.name, decide=decide)


def _share(text: str) -> Rule:
    """`share:P`: the fewest best ones that hold a share P of the token's recorded weight."""
    words = Words("share", text, "share:0.9")
    p = float(words.fraction("P", words.value("P"), 1))
    words.end()

    def decide(view: RouterView) -> Decision:
        known_weights(view, words.name)
        view = ranked(view, words.name)
        return view.keep(_reached(view, p * mass_TL(view)))

    return Rule(name=words.name, decide=decide)


def _cut(view: RouterView, width: int) -> RouterView:
    left = first(view, width)
    return replace(view, experts_TLK=left.experts_TLK, weights_TLK=left.weights_TLK, valid_TLK=left.valid_TLK)


def _marked(view: RouterView, keep_TLK: np.ndarray, width: int) -> Decision:
    """Decide for exactly `width` marked choices of every token and layer, in their order."""
    shape = (*keep_TLK.shape[:2], width)
    weights = None if view.weights_TLK is None else view.weights_TLK[keep_TLK].reshape(shape)
    return Decision(experts_TLK=view.experts_TLK[keep_TLK].reshape(shape), weights_TLK=weights)


def _group_size(view: RouterView, groups: int, rule: str) -> int:
    if view.num_experts % groups:
        raise TraceError(describe(f"rule {rule}", "groups", groups, f"must divide the {view.num_experts} experts of the trace"))
    return view.num_experts // groups


def _place_in_group(group_TLK: np.ndarray, groups: int) -> np.ndarray:
    """Return int16 [T, L, K]: how many better candidates of its group a candidate has; group G is no group."""
    seen_TLG = np.zeros((*group_TLK.shape[:2], groups + 1), dtype=np.int16)
    place = np.empty(group_TLK.shape, dtype=np.int16)
    for choice in range(group_TLK.shape[2]):
        here = group_TLK[..., choice : choice + 1]
        count = np.take_along_axis(seen_TLG, here, axis=2)
        place[..., choice : choice + 1] = count
        np.put_along_axis(seen_TLG, here, count + 1, axis=2)
    return place


def _groups_TLK(view: RouterView, size: int, groups: int) -> np.ndarray:
    group = view.experts_TLK.astype(np.int64) // size
    return group if view.valid_TLK is None else np.where(view.valid_TLK, group, groups)


def _grouped(text: str) -> Rule:
    """`grouped:G,K'`: the K' best of each of G groups, so that all groups get equally many choices of every token (MoGE)."""
    words = Words("grouped", text, "grouped:8,1")
    groups, each = words.whole("G", 1, 65536), words.whole("K'", 1, 1024)
    words.end()

    def decide(view: RouterView) -> Decision:
        size = _group_size(view, groups, words.name)
        if each > size:
            raise TraceError(describe(f"rule {words.name}", "K'", each, f"must be <= {size}, the experts of a group"))
        view = ranked(view, words.name)
        group = _groups_TLK(view, size, groups)
        keep = (_place_in_group(group, groups) < each) & (group < groups)
        what = f"have no {each} candidates in each of {groups} groups (the trace holds {view.experts_TLK.shape[2]} of {view.num_experts} experts)"
        _lacking(keep.sum(axis=2) < groups * each, view, words.name, what, MORE)
        return _marked(view, keep, groups * each)

    return Rule(name=words.name, decide=decide, groups=(groups, groups))


def _top_groups(text: str) -> Rule:
    """`top_groups:G,M,K[,score=max|sum2]`: the K best experts of the M best of G groups; a group is as good as its best expert, or its best two."""
    words = Words("top_groups", text, "top_groups:8,4,8 or top_groups:8,4,8,score=sum2")
    groups, reach, k = words.whole("G", 1, 65536), words.whole("M", 1, 65536), words.whole("K", 1, 1024)
    score = words.option("score", "max")
    words.end()
    if score not in ("max", "sum2"):
        raise words.refuse("score", score, "must be max or sum2")
    if reach > groups:
        raise words.refuse("M", reach, f"must be <= {groups}, the groups")

    def decide(view: RouterView) -> Decision:
        size = _group_size(view, groups, words.name)
        if k > reach * size:
            raise TraceError(describe(f"rule {words.name}", "K", k, f"must be <= {reach * size}, the experts of {reach} groups"))
        view = ranked(view, words.name)
        group = _groups_TLK(view, size, groups)
        place = _place_in_group(group, groups)
        score_TLG = np.zeros((*group.shape[:2], groups + 1))
        if score == "max":
            # Candidates are best first, and so are the groups' best ones.
            worth = (group.shape[2] - np.arange(group.shape[2])) * (place == 0)
        else:
            pair = min(2, size)
            held = np.stack([(group == index).sum(axis=2) for index in range(groups)], axis=2).min(axis=2)
            _lacking(held < pair, view, words.name, f"lack the best {pair} experts of some group", f"{MORE}, or take score=max")
            worth = known_weights(view, words.name) * (place < 2)
        for choice in range(group.shape[2]):
            here = group[..., choice : choice + 1]
            np.put_along_axis(score_TLG, here, np.take_along_axis(score_TLG, here, axis=2) + worth[..., choice : choice + 1], axis=2)
        best = np.argsort(-score_TLG[..., :groups], axis=2, kind="stable")[..., :reach]
        chosen_TLG = np.zeros(score_TLG.shape, dtype=bool)
        np.put_along_axis(chosen_TLG, best, True, axis=2)
        inside = np.take_along_axis(chosen_TLG, group, axis=2)
        keep = inside & (np.cumsum(inside, axis=2) <= k)
        _lacking(keep.sum(axis=2) < k, view, words.name, f"have fewer than {k} candidates in their {reach} best groups", MORE)
        return _marked(view, keep, k)

    return Rule(name=words.name, decide=decide, groups=(groups, reach))


def _mask(text: str) -> Rule:
    """`mask:IDS[@REQUESTS][;…][,k=K]`: no request (or none of REQUESTS) reaches these experts; its tokens take their K best others."""
    words = Words("mask", text, "mask:3/8-11 or mask:7@0/1;3@2,k=2")
    clauses: list[tuple[list[int], list[int] | None]] = []
    for clause in words.value("IDS").split(";"):
        barred, at, requests = clause.partition("@")
        numbers = [part for part in requests.split("/") if part.isascii() and part.isdecimal() and len(part) <= 20 and int(part) < 1 << 64]
        if at and len(numbers) != len(requests.split("/")):
            raise words.refuse("requests", requests, "must be request ids separated by '/'")
        clauses.append((ids(barred, words), [int(part) for part in numbers] if at else None))
    chosen_k = words.option("k", "")
    k = words.as_whole("k", chosen_k, 1, 1024) if chosen_k else 0
    words.end()

    def decide(view: RouterView) -> Decision:
        width = k or view.experts_TLK.shape[2]
        _enough(view, width, words.name)
        allowed = np.ones(view.experts_TLK.shape, dtype=bool) if view.valid_TLK is None else view.valid_TLK.copy()
        had_TL = np.minimum(allowed.sum(axis=2), width)
        for barred, requests in clauses:
            if barred and barred[-1] >= view.num_experts:
                raise InputError(describe(f"rule {words.name}", "expert", barred[-1], f"must be < {view.num_experts}, the experts of the trace"))
            table_E = np.zeros(view.num_experts, dtype=bool)
            table_E[barred] = True
            rows = slice(None) if requests is None else np.isin(view.request_T, np.array(requests, dtype=np.uint64))
            allowed[rows] &= ~table_E[view.experts_TLK[rows]]
        most = int(allowed.sum(axis=2).min(initial=width))
        remedy = f"take {words.usage.partition(' ')[0]},k=K with K <= {most}, or {MORE}" if most else MORE
        _lacking(allowed.sum(axis=2) < had_TL, view, words.name, f"have fewer than {width} candidates outside the mask", remedy)
        return first(ranked(replace(view, valid_TLK=allowed), words.name), width)

    return Rule(name=words.name, decide=decide)


def _renormalise(text: str) -> Rule:
    """`renormalise`: divide the weights of every token and layer by their sum."""
    words = Words("renormalise", text, "renormalise")
    words.end()

    def decide(view: RouterView) -> Decision:
        weights = known_weights(view, words.name)
        null_E = view.kind_E == 1
        if null_E.any():
            true = ~null_E[view.experts_TLK]
            weights = weights * true
        total = weights.sum(axis=2, keepdims=True, dtype=np.float64, where=True if view.valid_TLK is None else view.valid_TLK)
        scaled = np.divide(weights, total, out=np.zeros(weights.shape), where=total > 0)
        return Decision(experts_TLK=view.experts_TLK, weights_TLK=scaled.astype(weights.dtype), valid_TLK=view.valid_TLK)

    return Rule(name=words.name, decide=decide)


RULES: Mapping[str, Callable[[str], Rule]] = {
    "top_k": _top_k,
    "top_p": _top_p,
    "share": _share,
    "grouped": _grouped,
    "top_groups": _top_groups,
    "mask": _mask,
    "renormalise": _renormalise,
}
