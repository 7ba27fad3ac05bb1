"""Builds the Program of P forward passes: a layer template repeated over the layers of the model.

attention (data or tensor parallel) → gate → dispatch → routed experts → shared experts → combine, per rank; dense
layers have an FFN instead. Every time comes from `costs`; every exchange from the rank-pair loads of the pass.
All passes of one Program use the same all-to-all algorithm. Shapes: P passes, L MoE layers, R ranks, C slots a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.model import CostModel
from moesim.costs.provenance import Timing, total
from moesim.errors import PlanError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.plan import Plan
from moesim.sim.batch import PassShape
from moesim.sim.loads import StepLoads
from moesim.sim.ops import Program
from moesim.sim.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that the exchanges of P passes move, by distance."""

    local_P: np.ndarray
    intra_node_P: np.ndarray
    inter_node_P: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class _Times:
    """Operator times of one micro-batch: [P, R], for MoE layers [P, L, R]; None where the operator does not run."""

    embedding: Timing
    attention: Timing
    reduce: Timing | None
    dense: Timing
    gate: Timing
    dispatch: ExchangeTiming | None
    experts: Timing
    shared: Timing | None
    combine: ExchangeTiming | None
    head: Timing


class ProgramBuilder:
    """Turns loads into Programs for one (cluster, model, plan, settings)."""

    def __init__(self, *, cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, settings: Settings) -> None:
        """Check that plan, cluster and settings fit; raises PlanError with the first rule that is broken."""
        self.cluster, self.model, self.plan, self.costs, self.settings = cluster, model, plan, costs, settings
        ranks = cluster.num_ranks
        if plan.num_ranks != ranks:
            raise PlanError(
                describe(
                    plan.source,
                    "num_ranks",
                    plan.num_ranks,
                    f"must equal the {ranks} devices of {cluster.name}",
                    "solve for this hardware, or name the hardware of the plan",
                )
            )
        if plan.parallel.pp != 1 or plan.parallel.expert_tp != 1:
            raise PlanError(
                describe(plan.source, "parallel", plan.parallel, "must have pp = expert_tp = 1 to be replayed", "pipeline stages are not replayed yet")
            )
        self.tp = settings.attention_tp if settings.attention_tp > 1 else plan.parallel.tp
        if ranks % self.tp or model.attention.num_heads % self.tp:
            raise PlanError(
                describe("--set", "attention_tp", self.tp, f"must divide the {ranks} ranks and the {model.attention.num_heads} heads of {model.name}")
            )
        self._all = np.zeros(ranks, dtype=np.int64)
        self._tp_group = np.arange(ranks) // self.tp
        per_rank = np.bincount(plan.slot_rank_S, minlength=ranks)
        width = int(per_rank.max())
        self._slot_RC = np.zeros((ranks, width), dtype=np.int64)
        self._mask_RC = np.arange(width) < per_rank[:, None]
        self._slot_RC[self._mask_RC] = np.arange(plan.num_slots)
        self._even = bool(self._mask_RC.all())

    def build(self, parts: Sequence[tuple[PassShape, StepLoads]], is_prefill: bool) -> tuple[Program, Traffic]:
        """Return the Program of P passes and the bytes that it exchanges.

        parts: the micro-batches of the passes, each with P passes. With several, a layer issues the first half (attention to
        dispatch) of every micro-batch and then the second halves (experts to combine), so that the exchanges of one run
        beside the computation of another.
        """
        model = self.model
        program = Program(self.cluster.num_ranks)
        passes = parts[0][0].num_passes
        traffic = Traffic(local_P=np.zeros(passes), intra_node_P=np.zeros(passes), inter_node_P=np.zeros(passes))
        batches = [self._times(shape, loads, is_prefill, traffic) for shape, loads in parts]
        last = [[self._local(program, "embedding", times.embedding, [], -1)] for times in batches]
        row_of = {layer: row for row, layer in enumerate(model.moe_layer_ids)}
        for layer in range(model.num_layers):
            row = row_of.get(layer)
            for index, times in enumerate(batches):
                last[index] = self._attend(program, times, last[index], layer)
                last[index] = self._dispatch(program, times, row, last[index], layer) if row is not None else self._dense(program, times, last[index], layer)
            if row is not None:
                for index, times in enumerate(batches):
                    last[index] = self._combine(program, times, row, last[index], layer)
        for index, times in enumerate(batches):
            self._local(program, "head", times.head, last[index], model.num_layers)
        return program, traffic

    # --- the halves of a layer -------------------------------------------------------------------

    def _attend(self, program: Program, times: _Times, last: list[int], layer: int) -> list[int]:
        done = [self._local(program, "attention", times.attention, last, layer)]
        return done if times.reduce is None else [self._reduce(program, times.reduce, done, layer)]

    def _dense(self, program: Program, times: _Times, last: list[int], layer: int) -> list[int]:
        done = [self._local(program, "dense_ffn", times.dense, last, layer)]
        return done if times.reduce is None else [self._reduce(program, times.reduce, done, layer)]

    def _dispatch(self, program: Program, times: _Times, row: int, last: list[int], layer: int) -> list[int]:
        """Issue gate and dispatch; return [arrived, gate] or [arrived, gate, shared]."""
        gate = self._local(program, "gate", times.gate, last, layer)
        arrived = self._exchange(program, "dispatch", times.dispatch, row, [gate], layer)
        if times.shared is None or self.settings.shared_experts != "beside_dispatch":
            return [arrived, gate]
        return [arrived, gate, self._local(program, "shared_experts", times.shared, [gate], layer)]

    def _combine(self, program: Program, times: _Times, row: int, last: list[int], layer: int) -> list[int]:
        """Issue experts, shared experts unless they have run, and combine; return what the next layer waits for."""
        arrived, gate, *before = last
        seconds, provenance = times.experts.seconds[:, row], _row(times.experts.provenance, row, times.experts.seconds.ndim)
        done = program.local("experts", seconds, deps=[arrived], layer=layer, provenance=provenance)
        shared = before or ([] if times.shared is None else [self._local(program, "shared_experts", times.shared, [gate], layer)])
        waits = [done, *shared] if self.settings.shared_experts == "serial" else [done]
        return [self._exchange(program, "combine", times.combine, row, waits, layer), *shared]

    # --- times -----------------------------------------------------------------------------------

    def _attention(self, shape: PassShape) -> Timing:
        prefill = decode = None
        if (shape.prefill_tokens_PR > 0).any():
            prefill = self.costs.attention(
                phase="prefill", sequences=shape.prefill_seqs_PR, new_tokens=shape.prefill_tokens_PR, context=shape.prefill_context_PR, tp=self.tp
            )
        if prefill is None or (shape.decode_seqs_PR > 0).any():
            decode = self.costs.attention(
                phase="decode", sequences=shape.decode_seqs_PR, new_tokens=shape.decode_seqs_PR, context=shape.decode_context_PR, tp=self.tp
            )
        if prefill is None or decode is None:
            return prefill or decode  # type: ignore[return-value]
        return total(prefill, decode)

    def _attention_reduce(self, shape: PassShape) -> Timing | None:
        if self.tp == 1:
            return None
        nbytes = shape.tokens_PR * self.model.hidden_size * DTYPE_BYTES[self.model.dtype]
        nodes = -(-self.tp // self.cluster.devices_per_node)
        return self.costs.all_reduce(nbytes, ranks=self.tp, nodes=nodes)

    def _reduce(self, program: Program, time: Timing, deps: list[int], layer: int) -> int:
        zero = np.zeros_like(time.seconds)
        return program.collective("all_reduce", zero, time.seconds, group_R=self._tp_group, port="scale_up", deps=deps, layer=layer, provenance=time.provenance)

    def _local(self, program: Program, label: str, time: Timing, deps: list[int], layer: int) -> int:
        return program.local(label, time.seconds, deps=deps, layer=layer, provenance=time.provenance)

    def _times(self, shape: PassShape, loads: StepLoads, is_prefill: bool, traffic: Traffic) -> _Times:
        """Compute all operator times of one micro-batch; those of the MoE layers at once, [P, L, R]."""
        costs, model, tokens_PR, group = self.costs, self.model, shape.tokens_PR, shape.grouped(self.tp)
        slot = loads.slot_PLS
        if self._even:
            slot_PLRC = slot.reshape(*slot.shape[:2], *self._slot_RC.shape)
        else:
            slot_PLRC = np.where(self._mask_RC, slot[..., self._slot_RC], 0)
        algorithm = self.settings.algorithm(is_prefill)
        exchange: dict[str, ExchangeTiming] = {}
        if self.cluster.num_ranks > 1:
            copies = costs.copies(algorithm, assign_RR=loads.assign_PLRR, copy_RR=loads.copy_PLRR, node_RN=loads.node_PLRN)
            for stage in ("dispatch", "combine"):
                time = exchange[stage] = costs.exchange(algorithm, stage, copies=copies)
                traffic.local_P[:] += time.bytes["local"].sum(axis=1)
                traffic.intra_node_P[:] += time.bytes["intra_node"].sum(axis=1)
                traffic.inter_node_P[:] += time.bytes["inter_node"].sum(axis=1)
        return _Times(
            embedding=costs.embedding(tokens_PR),
            attention=self._attention(group),
            reduce=self._attention_reduce(group),
            dense=costs.dense_ffn(group.tokens_PR, tp=self.tp),
            gate=costs.gate(tokens_PR),
            dispatch=exchange.get("dispatch"),
            experts=costs.experts(slot_PLRC, slot_mask=None if self._even else self._mask_RC),
            shared=costs.shared_experts(tokens_PR) if model.num_shared_experts else None,
            combine=exchange.get("combine"),
            head=costs.head(group.prefill_seqs_PR + group.decode_seqs_PR, tp=self.tp),
        )

    def _exchange(self, program: Program, stage: str, time: ExchangeTiming | None, row: int, deps: list[int], layer: int) -> int:
        if time is None:
            return max(deps)
        port = "scale_out" if self.cluster.num_nodes > 1 else "scale_up"
        provenance = _row(time.provenance, row, time.send_s.ndim)
        return program.collective(stage, time.send_s[:, row], time.recv_s[:, row], group_R=self._all, port=port, deps=deps, layer=layer, provenance=provenance)


def _row(provenance: np.ndarray, row: int, ndim: int) -> np.ndarray:
    """Return the classes of one MoE layer from [P, L, R] classes that may be broadcast."""
    provenance = np.asarray(provenance)
    if provenance.ndim < ndim:
        return provenance
    return provenance[:, min(row, provenance.shape[1] - 1)]
