"""Routing of published settings: exactly balanced, or drawn from expert loads that are synthesised from a summary of their skew.

The summary has, per layer, the share of the most popular 1, 2, 4 … experts and the load of the busiest contiguous rank. Popularities are the steps of
that curve; experts of a seeded order change places as long as the busiest contiguous ranks come nearer to the summary's. What it does not have – how
loads drift between passes, which experts go together – is not in the routing either. Shapes: T tokens, L MoE layers, E experts, K choices.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import DECODE, PREFILL, RoutingTrace, TokenBatch, TraceShape
from moesim.traces.synth import draw_TK

SKEW = Path(__file__).with_name("deepseek_v3_skew.csv")
BALANCED = "balanced"
TOPS = tuple(2**power for power in range(8))
RANKS = (8, 16, 32, 64)
SWAPS = 4000
"""Pairs of experts that are tried in other places, per layer."""
TOTAL = 1 << 26
"""Choices of a layer in a table of counts; large enough that rounding is nothing."""


@lru_cache(maxsize=4)
def popularity_LE(workload: str, experts: int, seed: int = 0) -> np.ndarray:
    """Return float64 [L, E]: the share of a layer's choices that every expert gets in a workload of the summary. Raises TraceError if it has none such."""
    with SKEW.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines)]
    mine = sorted((row for row in rows if row["workload"] == workload), key=lambda row: int(row["layer"]))
    if not mine:
        known = ", ".join(sorted({row["workload"] for row in rows}))
        raise TraceError(describe(SKEW.name, "workload", workload, f"must be one of {known}, or {BALANCED}"))
    tops = [0, *TOPS, experts]
    share_LC = np.array([[0.0, *(float(row[f"share_top{count}"]) for count in TOPS), 1.0] for row in mine])
    sorted_LE = np.repeat(np.diff(share_LC, axis=1) / np.diff(tops), np.diff(tops), axis=1)
    wanted = np.array([[float(row[f"ep{ranks}_rank_max_over_mean"]) for ranks in RANKS] for row in mine])
    generator = np.random.Generator(np.random.PCG64(seed))
    found_LE = _ordered(generator.permuted(sorted_LE, axis=1), wanted, generator)
    found_LE.setflags(write=False)
    return found_LE


def _ordered(load_LE: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the loads in an order in which the busiest of 8, 16 … contiguous ranks carry `wanted` [L, 4] times the mean, as nearly as swaps get."""
    rows, best_L = np.arange(len(load_LE)), np.full(len(load_LE), np.inf)
    for _ in range(SWAPS):
        pair_2L = generator.integers(0, load_LE.shape[1], size=(2, len(rows)))
        tried = load_LE.copy()
        tried[rows, pair_2L] = load_LE[rows, pair_2L[::-1]]
        miss_L = np.zeros(len(rows))
        for column, ranks in enumerate(RANKS):
            miss_L += np.abs(np.log(tried.reshape(len(rows), ranks, -1).sum(axis=2).max(axis=1) * ranks / wanted[:, column]))
        better_L = miss_L < best_L
        load_LE, best_L = np.where(better_L[:, None], tried, load_LE), np.minimum(miss_L, best_L)
    return load_LE


def counts_trace(shape: TraceShape, workload: str, seed: int = 0) -> RoutingTrace:
    """Return the loads that a planner sees: counts in proportion to the popularities, all equal if balanced."""
    if workload == BALANCED:
        counts_LE = np.full((shape.num_layers, shape.num_experts), TOTAL // shape.num_experts)
    else:
        counts_LE = np.round(popularity_LE(workload, shape.num_experts, seed) * TOTAL).astype(np.int64)
    return from_counts(shape, counts_LE[None], [workload], source=workload)


def pass_trace(shape: TraceShape, workload: str, *, phase: str, tokens: int, context: int, each: int = 1, seed: int = 0) -> RoutingTrace:
    """Return one forward pass of `tokens` tokens over all ranks.

    phase `prefill`: whole prompts of `context` tokens; `decode`: `each` tokens of every request, whose KV cache has `context` entries with them.
    """
    if phase == "prefill" and tokens % context:
        raise TraceError(describe("published pass", "tokens", tokens, f"must be whole prompts of {context} tokens"))
    if phase == "decode" and tokens % each:
        raise TraceError(describe("published pass", "tokens", tokens, f"must be {each} of every request"))
    number, before, code = np.arange(tokens, dtype=np.int64), 0, PREFILL
    if phase == "decode":
        before, context, code = context - each, each, DECODE
    request, position = number // context, before + number % context
    batch = TokenBatch(
        step_T=np.zeros(tokens, dtype=np.uint32),
        rank_T=np.zeros(tokens, dtype=np.uint16),
        request_T=request.astype(np.uint64),
        position_T=position.astype(np.uint32),
        phase_T=np.full(tokens, code, dtype=np.uint8),
        experts_TLK=_choices_TLK(shape, workload, tokens, seed),
    )
    return from_batches(shape, [batch], source=f"{workload}, {phase}, {tokens} tokens", provenance={"tool": "moesim", "routing": workload})


@lru_cache(maxsize=1)
def _choices_TLK(shape: TraceShape, workload: str, tokens: int, seed: int) -> np.ndarray:
    """Return every token's experts; passes that differ in lengths or placement only share them."""
    if workload == BALANCED:
        (batch,) = open_trace(f"synthetic:balanced,tokens={tokens},seed={seed}", shape=shape).batches()
        return batch.experts_TLK
    weights_LE = popularity_LE(workload, shape.num_experts, seed)
    result = np.empty((tokens, shape.num_layers, shape.top_k), dtype=shape.dtype)
    for layer, weights_E in enumerate(weights_LE):
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, layer, tokens])))
        result[:, layer] = draw_TK(generator, tokens, weights_E, shape)
    return result
