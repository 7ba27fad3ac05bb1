"""Cut a trace into the forward passes of a cluster: which tokens, from which source rank, in which step.

A step is a recorded forward pass, or `tokens_per_step` consecutive tokens over all ranks. Tokens are dealt to source
ranks by request (round robin in order of first appearance, the same for the whole trace) if the first step has at least
as many requests as ranks, else in equal contiguous blocks. Dummy tokens are left out and counted.
Shapes: T tokens, L layers, K choices; rows are sorted by rank, in order of arrival within a rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.routing_trace import DUMMY, PREFILL, BatchSource, RoutingTrace, TokenBatch, concatenate

MAX_STEP_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTokens:
    """The tokens of one forward pass."""

    step: int
    """Number of the step in this replay, from 0."""
    phase_T: np.ndarray
    """uint8: 0 prefill, 1 decode, 2 train."""
    rank_T: np.ndarray
    """int32, ascending: source rank."""
    request_T: np.ndarray
    position_T: np.ndarray
    experts_TLK: np.ndarray
    valid_TLK: np.ndarray | None
    num_dummy: int = 0
    """Dummy tokens left out since the step before."""
    weights_TLK: np.ndarray | None = None
    """Router weights, where they were recorded."""
    predicted_TLK: np.ndarray | None = None
    """Predicted experts, where they were recorded."""


def sharding(trace: RoutingTrace, *, num_ranks: int, tokens_per_step: int | None = None) -> str:
    """Return how `iter_steps` deals tokens to ranks: `requests` or `tokens` (equal contiguous blocks)."""
    if trace.kind == "counts":
        return "tokens"
    if tokens_per_step is not None and trace.resized is not None:
        trace, tokens_per_step = trace.resized(tokens_per_step), None
    known = getattr(trace.tokens, "requests_per_step", None)
    if known is not None and tokens_per_step is None:
        return "requests" if known >= num_ranks else "tokens"
    for batch, _ in _cut(trace, tokens_per_step):
        return _sharding_of(batch, num_ranks)
    return "tokens"


def iter_steps(trace: RoutingTrace, *, num_ranks: int, tokens_per_step: int | None = None, seed: int = 0, as_recorded: bool = False) -> Iterator[StepTokens]:
    """Yield the forward passes of a trace on `num_ranks` source ranks.

    tokens_per_step: tokens per forward pass over all ranks; None keeps the recorded steps. A counts trace is replayed by
    drawing every token's experts independently (seeded) with inclusion proportional to the counts, Σ counts / (L·k) tokens
    per window or `tokens_per_step`; a synthetic trace without `tokens=` is generated at `tokens_per_step`. as_recorded: tokens stay on the rank,
    and steps keep the number, that the trace recorded.
    Raises TraceError if a step would exceed 2^24 tokens, or a recorded rank is not below `num_ranks`.
    """
    if num_ranks < 1 or (tokens_per_step is not None and not 1 <= tokens_per_step <= MAX_STEP_TOKENS):
        raise TraceError(describe(trace.source, "tokens_per_step", tokens_per_step, f"must be in 1..{MAX_STEP_TOKENS} (on {num_ranks} ranks)"))
    source = _sampled(trace, tokens_per_step, seed) if trace.kind == "counts" else _cut(trace, tokens_per_step)
    how: str | None = None
    dealt: dict[int, int] = {}
    for number, (batch, dummies) in enumerate(source):
        if how is None:
            how = "tokens" if trace.kind == "counts" else _sharding_of(batch, num_ranks)
        tokens = len(batch)
        if as_recorded:
            rank_T, number = batch.rank_T.astype(np.int32), int(batch.step_T[0])
            if int(rank_T.max()) >= num_ranks:
                raise TraceError(describe(trace.source, f"rank in step {number}", int(rank_T.max()), f"must be < {num_ranks}, the number of ranks"))
            order = np.argsort(rank_T, kind="stable")
            rank_T, batch = rank_T[order], batch.take(order)
        elif how == "tokens":
            rank_T = (np.arange(tokens, dtype=np.int64) * num_ranks // tokens).astype(np.int32)
        else:
            rank_T = _deal(batch.request_T, num_ranks, dealt)
            order = np.argsort(rank_T.astype(np.uint16) if num_ranks <= 65536 else rank_T, kind="stable")
            rank_T, batch = rank_T[order], batch.take(order)
        yield StepTokens(
            step=number,
            phase_T=batch.phase_T,
            rank_T=rank_T,
            request_T=batch.request_T,
            position_T=batch.position_T,
            experts_TLK=batch.experts_TLK,
            valid_TLK=batch.valid_TLK,
            num_dummy=dummies,
            weights_TLK=batch.weights_TLK,
            predicted_TLK=batch.predicted_TLK,
        )


def _sharding_of(batch: TokenBatch, num_ranks: int) -> str:
    return "requests" if len(np.unique(batch.request_T)) >= num_ranks else "tokens"


def _deal(request_T: np.ndarray, num_ranks: int, dealt: dict[int, int]) -> np.ndarray:
    """Return int32 [T]: rank of every token; `dealt` remembers the turn of every request seen so far."""
    values, first, inverse = np.unique(request_T, return_index=True, return_inverse=True)
    for request in values[np.argsort(first, kind="stable")].tolist():
        dealt.setdefault(request, len(dealt))
    turn = np.fromiter((dealt[request] for request in values.tolist()), dtype=np.int64, count=len(values))
    return (turn % num_ranks).astype(np.int32)[inverse]


def _cut(trace: RoutingTrace, tokens_per_step: int | None) -> Iterator[tuple[TokenBatch, int]]:
    """Yield (tokens of a step without dummies, dummies left out), never an empty step."""
    if tokens_per_step is not None and trace.resized is not None:
        trace, tokens_per_step = trace.resized(tokens_per_step), None
    assert trace.tokens is not None
    dummies = 0
    pending: list[TokenBatch] = []
    rows = 0
    recorded = _recorded_steps(trace.tokens, trace.source)
    for batch in recorded:
        dummy = batch.phase_T == DUMMY
        if dummy.any():
            dummies += int(dummy.sum())
            batch = batch.take(~dummy)
        if not len(batch):
            continue
        if tokens_per_step is None:
            yield batch, dummies
            dummies = 0
            continue
        pending.append(batch)
        rows += len(batch)
        if rows >= tokens_per_step:
            joined, start = concatenate(pending), 0
            while rows - start >= tokens_per_step:
                yield joined.take(slice(start, start + tokens_per_step)), dummies
                dummies = 0
                start += tokens_per_step
            pending, rows = ([joined.take(slice(start, None))], rows - start) if start < rows else ([], 0)
    if pending:
        yield concatenate(pending), dummies


def _recorded_steps(source: BatchSource, place: str) -> Iterator[TokenBatch]:
    """Yield the rows of every recorded step, in ascending order of steps and of arrival within one.

    A group of rows is held from the first step that it contains to its last, so shards that ranks wrote side by side
    are merged without reading the trace into memory.
    """
    groups = source.groups
    order = sorted(range(len(groups)), key=lambda index: (groups[index].step_min, index))
    held: dict[int, TokenBatch] = {}
    cursor, step = 0, -1
    while cursor < len(order) or held:
        starts = [groups[order[cursor]].step_min] if cursor < len(order) else []
        starts += [int(batch.step_T.min()) for batch in held.values()]
        step = min(starts)
        while cursor < len(order) and groups[order[cursor]].step_min <= step:
            held[order[cursor]] = source.read(order[cursor])
            cursor += 1
        parts = []
        for index in sorted(held):
            batch = held[index]
            mine = batch.step_T == step
            if mine.all():
                parts.append(batch)
                del held[index]
                continue
            end = int(np.argmin(mine)) if mine[0] else 0
            if end and not mine[end:].any():
                parts.append(batch.take(slice(0, end)))
                held[index] = batch.take(slice(end, None))
            elif mine.any():
                parts.append(batch.take(mine))
                held[index] = batch.take(~mine)
        if sum(map(len, parts)) > MAX_STEP_TOKENS:
            raise TraceError(describe(place, f"tokens of step {step}", sum(map(len, parts)), f"must be <= {MAX_STEP_TOKENS}", "give --tokens-per-step"))
        yield concatenate(parts)


def _sampled(trace: RoutingTrace, tokens_per_step: int | None, seed: int) -> Iterator[tuple[TokenBatch, int]]:
    """Yield one step per window of a counts trace, experts drawn independently per token and layer."""
    from moesim.traces.synth import draw_TK

    shape = trace.shape
    assert trace.counts is not None
    for window, count_LE in enumerate(trace.counts()):
        recorded = int(round(count_LE.sum() / (shape.num_layers * shape.top_k)))
        tokens = tokens_per_step or recorded
        if not recorded:
            continue
        if tokens > MAX_STEP_TOKENS:
            raise TraceError(
                describe(trace.source, f"tokens of window {trace.stored_windows[window]}", tokens, f"must be <= {MAX_STEP_TOKENS}", "give --tokens-per-step")
            )
        experts = np.empty((tokens, shape.num_layers, shape.top_k), dtype=shape.dtype)
        for layer in range(shape.num_layers):
            generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, window, layer])))
            try:
                experts[:, layer] = draw_TK(generator, tokens, count_LE[layer, : shape.expert_counts_L[layer]].astype(np.float64), shape)
            except ValueError as cause:
                raise TraceError(
                    f"{trace.source}: window {trace.stored_windows[window]}, layer {shape.moe_layer_ids[layer]}: {cause}; check the counts and top-k"
                ) from None
        yield (
            TokenBatch(
                step_T=np.full(tokens, window, dtype=np.uint32),
                rank_T=np.zeros(tokens, dtype=np.uint16),
                request_T=np.full(tokens, window, dtype=np.uint64),
                position_T=np.arange(tokens, dtype=np.uint32),
                phase_T=np.full(tokens, PREFILL, dtype=np.uint8),
                experts_TLK=experts,
            ),
            0,
        )
