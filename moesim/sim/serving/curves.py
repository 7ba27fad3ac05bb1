"""Step times of one kind of instance as look-ups: what the step model says, tabulated once, read in microseconds.

A step of an attention replica is: what follows from its tokens (exact at every whole number up to 16,384, rounded up to a step of equal width above),
scores of the decoding sequences (exact in their number, linear in their mean context between 8 points an octave), scores of the prompt chunks (as so many
equal chunks with the same tokens and pairs; linear between 4 points an octave), both times what one kernel for both costs, and the head. MoE layers couple
the replicas: routed experts follow from all tokens of the group, exchanges from the tokens of its busiest replica; both are linear between 8 points an
octave. Where routing is random, the time of the experts is a mean over sampled loads.
Shapes: t tokens of a replica, n sequences, c context. Seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import inf

import numpy as np

from moesim.costs.group import Group
from moesim.costs.step import StepModel
from moesim.sim.serving.sequences import Work

MAX_EXACT = 16384
"""Most points of a table by tokens."""
MAX_ROWS = 1024
"""Most rows of a table by decoding sequences."""


def octaves(low: float, high: float, per_octave: int) -> np.ndarray:
    """Return a growing float64 [points] from low to at least high, `per_octave` to an octave."""
    steps = int(np.ceil(np.log2(max(high / low, 1.0)) * per_octave)) + 1
    return np.asarray(low * 2.0 ** (np.arange(steps + 1) / per_octave))


class Line:
    """A piecewise linear function of one number; constant below its first point, linear beyond its last."""

    __slots__ = ("keys", "values", "last")

    def __init__(self, keys: np.ndarray, values: np.ndarray) -> None:
        self.keys: list[float] = keys.tolist()
        self.values: list[float] = values.tolist()
        self.last = len(self.keys) - 2

    def __call__(self, x: float) -> float:
        keys, values = self.keys, self.values
        at = bisect_right(keys, x) - 1
        if at < 0:
            return values[0]
        at = min(at, self.last)
        share = (x - keys[at]) / (keys[at + 1] - keys[at])
        return values[at] + share * (values[at + 1] - values[at])


@dataclass(slots=True)
class StepTime:
    """What a step of an instance takes, s."""

    stages: list[float]
    """On every pipeline stage."""
    hop: float
    """Handing over between two."""
    exchange: float
    """Exchanges of all MoE layers."""
    experts: float
    """Routed experts of all MoE layers."""
    growth: float = 0.0
    """What a token more of all mean contexts adds on one stage, if nothing else changes."""
    room: float = inf
    """For how many such tokens that holds."""


class StepCurves:
    """Times of the steps of one kind of instance."""

    def __init__(self, steps: StepModel, group: Group, *, pp: int, max_tokens: int, max_seqs: int, max_context: int, verify: int = 1) -> None:
        """Tabulate. max_tokens: of a step of a replica; verify: tokens per decoding sequence of a step."""
        self.steps, self.group, self.pp, self.verify = steps, group, pp, verify
        self._model = steps.model
        layers, moe = self._model.num_layers, len(self._model.moe_layer_ids)
        self.coupled = bool(moe) and group.dp > 1
        self._layers = layers
        self._width = -(-max(max_tokens, 1) // MAX_EXACT)
        tokens = np.arange(0, max_tokens // self._width + 2, dtype=np.float64) * self._width
        by = steps.by_tokens(group, tokens)
        projections = steps.projections(tokens, group.tp)
        body = layers * (projections + by.reduce_n) + (layers - moe) * (by.dense_n + (by.reduce_n if moe < layers else 0.0)) + moe * (by.gate_n + by.shared_n)
        self._body: list[float] = body.tolist()
        self._embed: list[float] = by.embedding_n.tolist()
        self._head: list[float] = steps.head(tokens, group.tp).tolist()
        near, far = steps.hops(group.tp, tokens)
        spans = steps.cluster.num_nodes > 1 and group.ranks >= steps.cluster.devices_per_node
        self._hop: list[float] = (far if spans else near).tolist() if pp > 1 else []
        self.share = [len(part) / layers for part in np.array_split(np.arange(layers), pp)]
        """Share of the layers on every stage."""
        self._row_width = -(-max_seqs // MAX_ROWS)
        self._max_rows = max_seqs // self._row_width + 1
        self._contexts = octaves(1, max(max_context, 2), 8)
        self._context_keys: list[float] = self._contexts.tolist()
        self._rows: list[list[float]] = []
        self._chunks: dict[int, list[list[float]]] = {}
        self._mixed = steps.costs.mixed_batches(group.tp)
        self._news = octaves(1, max(max_tokens, 2), 4)
        self._news_keys: list[float] = self._news.tolist()
        self._prefixes = np.concatenate([[0.0], octaves(16, max(max_context, 32), 4)])
        self._prefix_keys: list[float] = self._prefixes.tolist()
        self._moe = {phase: self._moe_lines(phase, max_tokens) for phase in ("prefill", "decode")} if moe else {}

    def _row(self, sequences: int) -> list[float]:
        """Return the scores of so many decoding sequences at every context; rows are made when they are first needed, up to a power of two."""
        at = -(-sequences // self._row_width) - 1
        if at < len(self._rows):
            return self._rows[at]
        if len(self._rows) < self._max_rows:
            first, last = len(self._rows), min(max(2 * len(self._rows), 1 << at.bit_length(), 16), self._max_rows)
            seqs = np.arange(first + 1, last + 1, dtype=np.float64) * self._row_width
            batch, context = np.broadcast_arrays(seqs[:, None], self._contexts[None, :])
            timed = self.steps.costs.attention_core(phase="decode", sequences=batch, new_tokens=batch, context=context, tp=self.group.tp)
            self._rows += (self._layers * np.asarray(timed.seconds)).tolist()
        return self._rows[min(at, len(self._rows) - 1)]

    def _moe_lines(self, phase: str, max_tokens: int) -> tuple[Line, Line]:
        """Return the times of exchanges and of routed experts, all layers, against the tokens of a replica."""
        whole = np.arange(0.0, 17.0)
        tokens = np.unique(np.concatenate([whole, np.round(octaves(16, max(max_tokens, 32), 8))]))
        found = self.steps.moe(self.group, phase, tokens)
        count = len(self._model.moe_layer_ids)
        lines = []
        for parts in (("exchange",), ("experts", "imbalance")):
            per_layer = np.asarray(sum(found[name] for name in parts))
            lines.append(Line(tokens, np.maximum(per_layer.mean(axis=1) * count, 0.0)))
        return lines[0], lines[1]

    # --- look-up --------------------------------------------------------------------------------------------------

    def body(self, tokens: int) -> float:
        """Return what follows from the tokens of a replica, all layers."""
        return self._body[-(-tokens // self._width)]

    def decode_core(self, sequences: int, context: float) -> tuple[float, float, float]:
        """Return the scores of decoding sequences of a mean context, all layers; what a token of context adds, and for how many tokens it adds that."""
        row, keys = self._row(sequences), self._context_keys
        at, last = bisect_right(keys, context) - 1, len(keys) - 2
        if at < last:
            room = keys[at + 1] - context
        else:
            at, room = last, inf
        low, key = row[at], keys[at]
        slope = (row[at + 1] - low) / (keys[at + 1] - key)
        return low + (context - key) * slope, slope, room

    def prefill_core(self, count: int, new: int, pairs: float) -> float:
        """Return the scores of so many prompt chunks with `new` tokens and `pairs` pairs of tokens in all, all layers."""
        each = new / count
        prefix = max(pairs / new - 0.5 * each, 0.0)
        news, prefixes, rows = self._news_keys, self._prefix_keys, self._table(count)
        # A chunk has a token, and keys go beyond the longest chunk and prefix.
        i, j = bisect_right(news, each, hi=len(news) - 1) - 1, bisect_right(prefixes, prefix, hi=len(prefixes) - 1) - 1
        down, across = (each - news[i]) / (news[i + 1] - news[i]), (prefix - prefixes[j]) / (prefixes[j + 1] - prefixes[j])
        low, high = rows[i], rows[i + 1]
        first = low[j] + across * (low[j + 1] - low[j])
        return first + down * (high[j] + across * (high[j + 1] - high[j]) - first)

    def _table(self, count: int) -> list[list[float]]:
        if count not in self._chunks:
            new, prefix = np.broadcast_arrays(self._news[:, None], self._prefixes[None, :])
            timed = self.steps.costs.attention_core(
                phase="prefill", sequences=np.full(new.shape, float(count)), new_tokens=new * count, context=new + prefix, tp=self.group.tp
            )
            self._chunks[count] = (self._layers * np.asarray(timed.seconds)).tolist()
        return self._chunks[count]

    def moe(self, total: int, busiest: int, prefill: bool) -> tuple[float, float]:
        """Return the seconds of exchanges and of routed experts, all MoE layers: total tokens of the group, tokens of its busiest replica."""
        if not self._moe:
            return 0.0, 0.0
        exchange, experts = self._moe["prefill" if prefill else "decode"]
        return exchange(busiest), experts(total / self.group.dp)

    def step(self, works: list[Work]) -> StepTime:
        """Return the time of a step; `works`: one per replica of the group."""
        width, embed, head, total, busiest, room, prefill = self._width, 0.0, 0.0, 0, 0, inf, False
        lines: list[tuple[float, float]] = []
        for work in works:
            decodes, chunks = work.decodes, work.chunks
            positions = tokens = decodes * self.verify
            body = slope = 0.0
            if decodes:
                body, slope, most = self.decode_core(decodes, work.contexts / decodes)
                if most < room:
                    room = most
            if chunks:
                prefill, new, pairs = True, 0, 0.0
                for size, end, _ in chunks:
                    new += size
                    pairs += size * (end - 0.5 * size)
                body += self.prefill_core(len(chunks), new, pairs)
                if decodes and self._mixed is not None:
                    prefix = max(pairs / new - 0.5 * new / len(chunks), 0.0)
                    factor = self._mixed.at(new, prefix, positions, work.contexts / decodes)
                    body *= factor
                    slope *= factor
                tokens += new
                positions += len(chunks)
            elif not decodes:
                continue
            at = -(-tokens // width)
            lines.append((body + self._body[at], slope))
            first, last = self._embed[at], self._head[-(-positions // width)]
            if first > embed:
                embed = first
            if last > head:
                head = last
            total += tokens
            if tokens > busiest:
                busiest = tokens
        body, growth = max(lines)
        for other, slope in lines:
            if slope > growth:  # it will be the slowest
                room = min(room, (body - other) / (slope - growth))
        exchange, experts = self.moe(total, busiest, prefill)
        body += exchange + experts
        stages = [share * body for share in self.share]
        stages[0] += embed
        stages[-1] += head
        return StepTime(stages, self._hop[-(-busiest // width)] if self._hop else 0.0, exchange, experts, growth, room)
