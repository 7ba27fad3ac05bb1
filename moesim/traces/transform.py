"""Derive one trace from another: map layers, merge or cut steps, shuffle, select.

Every result records what was done in its provenance, so that it cannot pass for the recording. Shuffles work inside one
step; selections keep the order of arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.routing_trace import PHASES, RoutingTrace, TokenBatch
from moesim.traces.steps import _cut, _recorded_steps


def _derived(trace: RoutingTrace, done: str) -> dict[str, Any]:
    provenance = dict(trace.provenance)
    if trace.synthetic is not None:
        provenance["synthetic"] = trace.synthetic
    return {**provenance, "derived_from": trace.fingerprint, "transforms": [*provenance.get("transforms", []), done]}


def _build(trace: RoutingTrace, batches: Iterator[TokenBatch], done: str, layers: tuple[int, ...] | None = None) -> RoutingTrace:
    shape = trace.shape if layers is None else replace(trace.shape, moe_layer_ids=layers)
    result = from_batches(shape, batches, source=trace.source, provenance=_derived(trace, done), facts=trace.facts)
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
            replace(trace.shape, moe_layer_ids=kept),
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

    return _build(trace, select(), done, kept)


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
