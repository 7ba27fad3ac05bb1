"""Derive one trace from another: map layers, merge or cut steps, shuffle, select.

Every result records what was done in its provenance, so that it cannot pass for the recording. Shuffles and routing rules
work inside one step; selections keep the order of arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.routing_trace import PHASES, RoutingTrace, TokenBatch, TraceShape
from moesim.traces.steps import _cut, _recorded_steps


def _derived(trace: RoutingTrace, done: str) -> dict[str, Any]:
    provenance = dict(trace.provenance)
    if trace.synthetic is not None:
        provenance["synthetic"] = trace.synthetic
    return {**provenance, "derived_from": trace.fingerprint, "transforms": [*_listed(trace, "transforms"), done]}


def _listed(trace: RoutingTrace, key: str) -> list[Any]:
    found = trace.provenance.get(key)
    return found if isinstance(found, list) else []


def _build(trace: RoutingTrace, batches: Iterable[TokenBatch], done: str, shape: TraceShape | None = None, **provenance: Any) -> RoutingTrace:
    facts = {**_derived(trace, done), **provenance}
    result = from_batches(shape or trace.shape, batches, source=trace.source, provenance=facts, facts=trace.facts)
    if not result.num_rows:
        raise TraceError(f"{trace.source}: {done} leaves no token; widen the selection")
    return replace(result, is_synthetic=trace.is_synthetic, synthetic=None if trace.synthetic is None else f"{trace.synthetic} ({done})")


def subset(
    trace: RoutingTrace,
    *,
    layers: Collection[int] | None = None,
    steps: tuple[int, int] | None = None,
    requests: int | None = None,
    phases: Collection[str] | None = None,
    max_tokens: int | None = None,
) -> RoutingTrace:
    """Keep model layers, recorded steps first..last, the first N requests, phases, the first N tokens.

    Of a counts trace, `steps` selects windows by number and `layers` layers. Raises TraceError if nothing is left.
    """
    chosen = {
        "layers": None if layers is None else sorted(layers),
        "steps": steps,
        "requests": requests,
        "phases": None if phases is None else sorted(phases),
        "max_tokens": max_tokens,
    }
    done = f"subset({', '.join(f'{key}={value}' for key, value in chosen.items() if value is not None)})"
    own = trace.shape.moe_layer_ids
    strange = sorted(set(layers or ()) - set(own)) + sorted(set(phases or ()) - set(PHASES))
    if strange:
        raise TraceError(describe(trace.source, "selection", strange, f"must be among the layers {list(own)} and the phases {list(PHASES)}"))
    rows = [index for index, layer in enumerate(own) if layers is None or layer in layers]
    kept = tuple(own[row] for row in rows)
    if trace.kind == "counts":
        if requests is not None or phases is not None or max_tokens is not None:
            raise TraceError(f"{trace.source}: holds counts; only layers and steps (windows) can be selected")
        assert trace.counts is not None
        window = slice(None) if steps is None else slice(steps[0], steps[1] + 1)
        names = trace.stored_windows[window]
        if not names:
            raise TraceError(describe(trace.source, "steps", steps, f"must select some of the {trace.num_rows} windows"))
        return from_counts(
            trace.shape.of_layers(rows, kept),
            trace.counts()[window][:, rows],
            names,
            source=trace.source,
            provenance=_derived(trace, done),
            facts=trace.facts,
        )

    def select() -> Iterator[TokenBatch]:
        seen: dict[int, None] = {}
        left = max_tokens
        for batch in trace.batches():
            keep = np.ones(len(batch), dtype=bool)
            if steps is not None:
                keep &= (batch.step_T >= steps[0]) & (batch.step_T <= steps[1])
            if phases is not None:
                keep &= np.isin(batch.phase_T, [PHASES.index(name) for name in phases])
            if requests is not None:
                values, first = np.unique(batch.request_T[keep], return_index=True)
                for value in values[np.argsort(first, kind="stable")].tolist():
                    if len(seen) < requests:
                        seen.setdefault(value)
                keep &= np.isin(batch.request_T, np.array(list(seen), dtype=np.uint64))
            if left is not None:
                keep &= np.cumsum(keep) <= left
                left -= int(keep.sum())
            batch = batch if keep.all() else batch.take(keep)
            yield batch if len(rows) == len(own) else batch.take_layers(rows)
            if left == 0:
                return

    return _build(trace, select(), done, trace.shape.of_layers(rows, kept))


def split_steps(trace: RoutingTrace, tokens_per_step: int) -> RoutingTrace:
    """Number the steps anew: `tokens_per_step` consecutive tokens each, dummies left out."""
    if trace.kind == "counts" or tokens_per_step < 1:
        raise TraceError(describe(trace.source, "tokens_per_step", tokens_per_step, "must be >= 1, and the trace must hold tokens"))

    def cut() -> Iterator[TokenBatch]:
        for number, (batch, _) in enumerate(_cut(replace(trace, resized=None), tokens_per_step)):
            yield replace(batch, step_T=np.full(len(batch), number, dtype=np.uint32))

    return _build(trace, cut(), f"split_steps({tokens_per_step})")


def shuffle(trace: RoutingTrace, kind: str, *, seed: int = 0) -> RoutingTrace:
    """Destroy one structure of a trace and keep the rest, as a null hypothesis for what a solver exploits.

    kind `layers`: permute the tokens of every step independently in each layer: loads per step and layer stay, links
    between layers and between neighbouring tokens go. kind `order`: permute whole tokens inside a step: links between layers
    stay, those between neighbouring tokens and with requests go.
    """
    if trace.kind == "counts" or kind not in ("layers", "order"):
        raise TraceError(describe(trace.source, "shuffle", kind, "must be 'layers' or 'order', and the trace must hold tokens"))

    def mixed() -> Iterator[TokenBatch]:
        assert trace.tokens is not None
        for batch in _recorded_steps(trace.tokens, trace.source):
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, int(batch.step_T[0])])))
            own = trace.shape.num_layers
            one = generator.permutation(len(batch))
            order_TL = np.repeat(one[:, None], own, axis=1) if kind == "order" else np.stack([generator.permutation(len(batch)) for _ in range(own)], axis=1)
            yield _permuted(batch, order_TL)

    return _build(trace, mixed(), f"shuffle({kind}, seed={seed})")


def _permuted(batch: TokenBatch, order_TL: np.ndarray) -> TokenBatch:
    names = ("experts_TLK", "weights_TLK", "predicted_TLK", "valid_TLK")
    cubes: dict[str, Any] = {name: getattr(batch, name) for name in names}
    for name, cube in cubes.items():
        cubes[name] = None if cube is None else np.take_along_axis(cube, order_TL[:, :, None], axis=0)
    return replace(batch, **cubes)


def apply_rules(trace: RoutingTrace, text: str) -> RoutingTrace:
    """Route the tokens anew by the rules of `text` (see `moesim.traces.rules`), step by step; dummies are left out.

    Experts that compute nothing leave the shape if they are the last ones, so that the result fits a model of the others.
    Raises TraceError if the trace lacks what a rule needs, InputError for a bad text.
    """
    from moesim.traces.rules import rules_of
    from moesim.traces.rules_view import Tally, first, ranked, run, view_of

    rules = rules_of(text)
    name = "+".join(rule.name for rule in rules)
    if trace.kind == "counts":
        raise TraceError(f"{trace.source}: rule {name} needs the choices of every token, and the trace holds counts; use a token trace")
    functions = [(rule.name, rule.decide) for rule in rules]
    tally, batches, experts = Tally(), [], trace.shape.num_experts
    for batch, _ in _cut(replace(trace, resized=None), None):
        view = run(functions, view_of(batch, trace.shape, int(batch.step_T[0])), tally)
        computing = np.flatnonzero(view.kind_E == 0)
        if not computing.size:
            raise TraceError(f"{trace.source}: rule {name} leaves no expert that computes; name fewer experts")
        experts = int(computing[-1]) + 1
        if view.experts_TLK.shape[2] > experts:
            best = first(ranked(view, name), experts)
            view = replace(view, experts_TLK=best.experts_TLK, weights_TLK=best.weights_TLK, valid_TLK=best.valid_TLK)
        # A prediction that names an expert without computation cannot be kept.
        if view.predicted_TLK is not None and (view.predicted_TLK.shape != view.experts_TLK.shape or int(view.predicted_TLK.max(initial=0)) >= experts):
            view = replace(view, predicted_TLK=None)
        left: dict[str, Any] = {key: getattr(view, key) for key in ("experts_TLK", "weights_TLK", "valid_TLK", "predicted_TLK")}
        batches.append(replace(batch, **left))
    groups, rounds = (trace.shape.num_groups, trace.shape.top_k_groups), trace.rounds
    for rule in rules:
        groups, rounds = rule.groups or groups, rule.rounds or rounds
    if experts != trace.shape.num_experts:
        groups = (1, 1)
    top_k = batches[0].experts_TLK.shape[2] if batches else 1
    counts = None if trace.shape.experts_L is None else tuple(min(count, experts) for count in trace.shape.experts_L)
    shape = replace(trace.shape, num_experts=experts, top_k=top_k, num_groups=groups[0], top_k_groups=groups[1], experts_L=counts)
    narrow = shape.dtype
    batches = [replace(item, experts_TLK=item.experts_TLK.astype(narrow), predicted_TLK=_as(narrow, item.predicted_TLK)) for item in batches]
    notes = [*_listed(trace, "notes"), f"rule {name}: {_outcome(tally.report())}"]
    return _build(trace, batches, f"rule({name})", shape, rules=[*_listed(trace, "rules"), name], rounds=rounds, notes=notes)


def _as(dtype: np.dtype[Any], cube: np.ndarray | None) -> np.ndarray | None:
    return None if cube is None else cube.astype(dtype, copy=False)


def _outcome(report: dict[str, Any]) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report["by_kind"].items())
    places = f", {report['places']} places" if report["places"] else ""
    mean = f"{report['mean_experts_per_token']:.4f} experts per token and layer"
    return f"{report['choices']} choices in, {kinds} out, {report['dropped']} dropped{places}; {mean}"
