"""The layer template: what the layers of a chunk do with one micro-batch, forward and backward, as Ops on the ranks of a stage.

forward: attention → gate → dispatch → routed experts → shared experts → combine; dense layers have an FFN. Backward runs in reverse: gradients of
the outputs go out as tokens did in dispatch and come back as in combine, each product has a gradient of its input and one of its weights.
A walk is a generator that stops after every half layer, so that walks can run side by side: while one exchanges, the other computes.
Shapes: P passes, L MoE layers, R ranks of a stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.provenance import Provenance, Timing
from moesim.sim.ops import Program
from moesim.sim.settings import Settings

Walk = Generator[None, None, list[int]]
"""Adds Ops; returns those that whatever comes next waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeTimes:
    """Times of one chunk of the tokens of every MoE layer, [P, L, R]; exchanges None where there is one rank."""

    dispatch: ExchangeTiming | None
    experts: Timing
    combine: ExchangeTiming | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """Operator times of one micro-batch: [P, R]; None where the operator does not run."""

    tokens_PR: np.ndarray
    embedding: Timing
    attention: Timing
    before_scores: Timing | None = None
    """The part of it that comes before its scores, where micro-batches take turns between the two."""
    core_PR: np.ndarray | float
    """Share of the attention's time that is scores and values; the rest are projections."""
    reduce: Timing | None
    dense: Timing
    gate_L: tuple[Timing, ...]
    """By MoE layer."""
    shared: Timing | None
    head: Timing
    moe: tuple[MoeTimes, ...]
    """By chunk of tokens."""
    moe_backward: tuple[MoeTimes, ...]


class Site:
    """The ranks of one stage in a Program of all ranks."""

    def __init__(self, program: Program, *, columns: slice, mask_R: np.ndarray | None, group_R: np.ndarray, tp_group_R: np.ndarray, port: str) -> None:
        """mask_R: None if the stage is all there is. group_R, tp_group_R: groups of exchanges and of attention. port: link that exchanges need."""
        self.program, self.columns, self.mask_R, self.port = program, columns, mask_R, port
        self.group_R, self.tp_group_R = group_R, tp_group_R
        self.last = -1
        """The last Op that computes: a lane is serial, so whatever follows it follows all."""

    def timed(self, label: str, time: Timing, deps: Sequence[int], layer: int) -> int:
        """Append an operator that every rank of the stage computes."""
        work, codes = self.spread(time.seconds), self.spread(np.asarray(time.provenance))
        self.last = self.program.local(label, work, deps=deps, layer=layer, provenance=codes, ranks_R=self.mask_R)
        return self.last

    def reduce(self, label: str, time: Timing, group_R: np.ndarray, port: str, deps: Sequence[int], layer: int = -1) -> int:
        """Append a reduction over groups."""
        work = self.spread(time.seconds)
        codes = self.spread(np.asarray(time.provenance))
        return self.program.collective(
            label, np.zeros_like(work), work, group_R=group_R, port=port, deps=deps, layer=layer, provenance=codes, ranks_R=self.mask_R
        )

    def spread(self, value: np.ndarray) -> np.ndarray:
        """Return values of the stage's ranks as values of all ranks, 0 elsewhere."""
        if self.mask_R is None or value.ndim == 0 or value.shape[-1] != self.columns.stop - self.columns.start:
            return value
        whole = np.zeros((*value.shape[:-1], len(self.mask_R)), dtype=value.dtype)
        whole[..., self.columns] = value
        return whole


class Layers:
    """Walks of one micro-batch through layers of one stage."""

    def __init__(self, site: Site, times: BatchTimes, settings: Settings, row_of: dict[int, int]) -> None:
        """row_of: layer of the model → row among its MoE layers."""
        self.site, self.times, self.settings, self.row_of = site, times, settings, row_of
        self.ratios = settings.pipeline

    # --- forward ---------------------------------------------------------------------------------

    def forward(self, layers: Iterable[int], last: list[int], *, embed: bool, head: int | None) -> Walk:
        """Walk through `layers`, the first of which wait for `last`; head: the number of layers of the model where the chunk ends with the head."""
        site, times = self.site, self.times
        if embed:
            last = [site.timed("embedding", times.embedding, last, -1)]
            yield
        for layer in layers:
            if times.before_scores is not None:
                last = yield from self._fifths(layer, last, times.before_scores)
                continue
            last = self._reduced(layer, [site.timed("attention", times.attention, last, layer)])
            if layer not in self.row_of:
                last = self._reduced(layer, [site.timed("dense_ffn", times.dense, last, layer)])
                yield
                continue
            for turn in range(self.settings.rounds):
                row = self.row_of[layer] * self.settings.rounds + turn
                gate = site.timed("gate", times.gate_L[self.row_of[layer]], last, layer)
                arrived = [self._exchange("dispatch", part.dispatch, row, [gate], layer) for part in times.moe]
                shared: list[int] = []
                runs_shared = times.shared is not None and turn == 0
                if runs_shared and self.settings.shared_experts == "beside_dispatch":
                    shared = [self._shared([gate], layer)]
                yield
                backs: list[int] = []
                for number, (part, sent) in enumerate(zip(times.moe, arrived, strict=True)):
                    there = self._received("dispatch", part.dispatch, row, sent, layer)
                    waits = [self._experts("experts", part.experts, row, [there], layer)]
                    if runs_shared and self.settings.shared_experts == "serial" and number == len(arrived) - 1:
                        shared = [self._shared([gate], layer)]
                        waits += shared
                    backs.append(self._exchange("combine", part.combine, row, waits, layer))
                if runs_shared and not shared:
                    shared = [self._shared([gate], layer)]
                yield
                last = [self._received("combine", part.combine, row, back, layer) for part, back in zip(times.moe, backs, strict=True)][-1:] + shared
        return last if head is None else [site.timed("head", times.head, last, head)]

    def _fifths(self, layer: int, last: list[int], before: Timing) -> Walk:
        """Walk through a layer in five pieces. Source: the order of DeepSeek's inference system (open-infra-index, day 6), which SGLang's decode follows."""
        site, times = self.site, self.times
        last = [site.timed("attention", before, last, layer)]
        yield
        rest = Timing(seconds=times.attention.seconds - before.seconds, provenance=times.attention.provenance)
        last = self._reduced(layer, [site.timed("attention", rest, last, layer)])
        if layer not in self.row_of:
            last = self._reduced(layer, [site.timed("dense_ffn", times.dense, last, layer)])
            yield
            return last
        row = self.row_of[layer]
        last = [site.timed("gate", times.gate_L[row], last, layer)]
        yield
        sent = [self._exchange("dispatch", part.dispatch, row, last, layer) for part in times.moe]
        shared = [self._shared(last, layer)] if times.shared is not None else []
        yield
        back = []
        for part, there in zip(times.moe, sent, strict=True):
            ready = self._experts("experts", part.experts, row, [self._received("dispatch", part.dispatch, row, there, layer)], layer)
            back.append(self._exchange("combine", part.combine, row, [ready], layer))
        yield
        last = [self._received("combine", part.combine, row, there, layer) for part, there in zip(times.moe, back, strict=True)][-1:] + shared
        yield
        return last

    def _reduced(self, layer: int, done: list[int]) -> list[int]:
        """Sum over the ranks that share an attention replica."""
        if self.times.reduce is None:
            return done
        return [self.site.reduce("all_reduce", self.times.reduce, self.site.tp_group_R, "scale_up", done, layer)]

    def _shared(self, deps: list[int], layer: int) -> int:
        assert self.times.shared is not None
        return self.site.timed("shared_experts", self.times.shared, deps, layer)

    def _experts(self, label: str, time: Timing, row: int, deps: list[int], layer: int, ratio: float | None = None) -> int:
        mine = Timing(seconds=time.seconds[:, row], provenance=_row(time.provenance, row, time.seconds.ndim))
        return self.site.timed(label, mine if ratio is None else mine.scaled(ratio, Provenance.EXTRAPOLATED), deps, layer)

    def _exchange(self, label: str, time: ExchangeTiming | None, row: int, deps: list[int], layer: int) -> int:
        if time is None:
            return max(deps)
        site, send_s, recv_s = self.site, time.send_s[:, row], time.recv_s[:, row]
        if time.receive_kernel_s is not None and self._leaves_sms(time):
            # Messages travel from the first that the kernel issues; what follows on the SMs waits for the last.
            self._kernel(label, time, time.send_kernel_s, row, deps, layer)
            send_s, recv_s = send_s - time.receive_kernel_s[:, row], recv_s - time.receive_kernel_s[:, row]
        return site.program.collective(
            label,
            site.spread(send_s),
            site.spread(recv_s),
            group_R=site.group_R,
            port=site.port,
            deps=deps,
            layer=layer,
            provenance=site.spread(_row(time.provenance, row, time.send_s.ndim)),
            ranks_R=site.mask_R,
            sm_share=0.0 if self.settings.comm_sm_reserved else self.settings.comm_sm_share,
        )

    def _received(self, label: str, time: ExchangeTiming | None, row: int, sent: int, layer: int) -> int:
        """Return the Op after which what an exchange brought can be used."""
        if time is None or not self._leaves_sms(time):
            return sent
        return self._kernel(label, time, time.receive_kernel_s, row, [sent], layer)

    def _leaves_sms(self, time: ExchangeTiming) -> bool:
        """Return whether the exchange runs as two kernels with computation between them; alone it is one that waits for its messages."""
        return self.settings.micro_batches > 1 and time.send_kernel_s is not None

    def _kernel(self, label: str, time: ExchangeTiming, seconds: np.ndarray | None, row: int, deps: list[int], layer: int) -> int:
        assert seconds is not None
        return self.site.timed(label, Timing(seconds=seconds[:, row], provenance=_row(time.provenance, row, time.send_s.ndim)), deps, layer)

    # --- backward --------------------------------------------------------------------------------

    def backward(self, layers: Sequence[int], last: list[int], *, embed: bool, head: int | None, weights: bool) -> Walk:
        """Walk back through `layers`; weights: with the gradients of the weights, each after those that others wait for."""
        site, times = self.site, self.times
        if head is not None:
            last = [site.timed("head_backward", self._data(times.head), last, head)]
            self._weights(weights, "head", times.head, last, head)
        for layer in reversed(layers):
            if layer not in self.row_of:
                last = self._reduced(layer, [site.timed("dense_ffn_backward", self._data(times.dense), last, layer)])
                self._weights(weights, "dense_ffn", times.dense, last, layer)
            else:
                for turn in reversed(range(self.settings.rounds)):
                    row = self.row_of[layer] * self.settings.rounds + turn
                    arrived = [self._exchange("combine_backward", part.dispatch, row, last, layer) for part in times.moe_backward]
                    shared: list[int] = []
                    if times.shared is not None and turn == 0:
                        shared = [site.timed("shared_experts_backward", self._data(times.shared), last, layer)]
                        self._weights(weights, "shared_experts", times.shared, last, layer)
                    yield
                    for part, there in zip(times.moe_backward, arrived, strict=True):
                        ready = self._experts("experts_backward", part.experts, row, [there], layer, self.ratios.backward_data)
                        sent = self._exchange("dispatch_backward", part.combine, row, [ready], layer)
                    if weights:
                        self._expert_weights(row, layer)
                    gate = times.gate_L[self.row_of[layer]].scaled(self.ratios.backward_data + self.ratios.backward_weight, Provenance.EXTRAPOLATED)
                    last = [site.timed("gate_backward", gate, [sent, *shared], layer)]
                    yield
            core, ratios = times.core_PR, self.ratios
            data = _times(times.attention, core * ratios.backward_attention + (1.0 - core) * ratios.backward_data)
            last = self._reduced(layer, [site.timed("attention_backward", data, last, layer)])
            self._attention_weights(weights, layer)
            yield
        if embed:
            self._weights(weights, "embedding", times.embedding, last, -1)
        return last

    def weight_gradients(self, layers: Sequence[int], *, embed: bool, head: int | None) -> Walk:
        """Walk back through `layers` for the gradients of the weights alone; those of their inputs are there."""
        times = self.times
        self._weights(head is not None, "head", times.head, [], head or -1)
        for layer in reversed(layers):
            if layer not in self.row_of:
                self._weights(True, "dense_ffn", times.dense, [], layer)
            else:
                if times.shared is not None:
                    self._weights(True, "shared_experts", times.shared, [], layer)
                for turn in reversed(range(self.settings.rounds)):
                    self._expert_weights(self.row_of[layer] * self.settings.rounds + turn, layer)
            self._attention_weights(True, layer)
            yield
        self._weights(embed, "embedding", times.embedding, [], -1)
        return [self.site.last]

    def _data(self, time: Timing) -> Timing:
        return time.scaled(self.ratios.backward_data, Provenance.EXTRAPOLATED)

    def _weights(self, run: bool, label: str, time: Timing, deps: list[int], layer: int) -> None:
        if run:
            self.site.timed(f"{label}_weights", time.scaled(self.ratios.backward_weight, Provenance.EXTRAPOLATED), deps, layer)

    def _expert_weights(self, row: int, layer: int) -> None:
        """Add the gradients of all chunks' weights; the experts' inputs and output gradients have come by then, as the lane is serial."""
        for part in self.times.moe_backward:
            self._experts("experts_weights", part.experts, row, [], layer, self.ratios.backward_weight)

    def _attention_weights(self, run: bool, layer: int) -> None:
        if run:
            time = _times(self.times.attention, (1.0 - self.times.core_PR) * self.ratios.backward_weight)
            self.site.timed("attention_weights", time, [], layer)


def side_by_side(walks: Sequence[Walk], lag: int = 0) -> list[list[int]]:
    """Let the walks add a piece of a layer in turn, each `lag` pieces behind the one before, until all have ended; return what each returns."""
    ends: dict[int, list[int]] = {}
    for turn in itertools.count():
        if len(ends) == len(walks):
            break
        for number, walk in enumerate(walks):
            if number not in ends and turn >= number * lag:
                try:
                    next(walk)
                except StopIteration as stop:
                    ends[number] = stop.value
    return [ends[number] for number in range(len(walks))]


def _times(time: Timing, factor_PR: np.ndarray | float) -> Timing:
    return Timing(seconds=time.seconds * factor_PR, provenance=np.maximum(time.provenance, np.uint8(Provenance.EXTRAPOLATED)))


def _row(provenance: np.ndarray, row: int, ndim: int) -> np.ndarray:
    """Return the classes of one MoE layer from [P, L, R] classes that may be broadcast."""
    provenance = np.asarray(provenance)
    if provenance.ndim < ndim:
        return provenance
    return provenance[:, min(row, provenance.shape[1] - 1)]
