"""Builds the Program of P forward passes: a layer template repeated over the layers of the model.

attention (data or tensor parallel) → gate → dispatch → routed experts → shared experts → combine, per rank; dense
layers have an FFN instead. Every time comes from `costs`; every exchange from the rank-pair loads of the pass.
All passes of one Program use the same all-to-all algorithm. Shapes: P passes, L MoE layers, R ranks, C slots a rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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

    def build(self, shape: PassShape, loads: StepLoads | None, is_prefill: bool) -> tuple[Program, Traffic]:
        """Return the Program of these passes and the bytes that it exchanges; `loads` is None for a dense model."""
        model, costs, ranks = self.model, self.costs, self.cluster.num_ranks
        program = Program(ranks)
        passes = shape.num_passes
        tokens_PR = shape.tokens_PR
        attention = self._attention(shape)
        traffic = Traffic(local_P=np.zeros(passes), intra_node_P=np.zeros(passes), inter_node_P=np.zeros(passes))
        reduce = self._attention_reduce(shape)
        dense = costs.dense_ffn(shape.grouped(self.tp).tokens_PR, tp=self.tp) if len(model.moe_layer_ids) < model.num_layers else None
        moe = self._moe_parts(loads, tokens_PR, is_prefill, traffic) if loads is not None else None
        last: list[int] = [self._local(program, "embedding", costs.embedding(tokens_PR), [], -1)]
        row_of = {layer: row for row, layer in enumerate(model.moe_layer_ids)}
        for layer in range(model.num_layers):
            last = [self._local(program, "attention", attention, last, layer)]
            if reduce is not None:
                last = [self._reduce(program, reduce, last, layer)]
            row = row_of.get(layer)
            if row is not None and moe is not None:
                last = self._moe_layer(program, moe, row, last, layer)
            elif dense is not None:
                last = [self._local(program, "dense_ffn", dense, last, layer)]
                if reduce is not None:
                    last = [self._reduce(program, reduce, last, layer)]
        seqs = shape.grouped(self.tp)
        self._local(program, "head", costs.head(seqs.prefill_seqs_PR + seqs.decode_seqs_PR, tp=self.tp), last, model.num_layers)
        return program, traffic

    # --- parts -----------------------------------------------------------------------------------

    def _attention(self, shape: PassShape) -> Timing:
        shape = shape.grouped(self.tp)
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
        nbytes = shape.grouped(self.tp).tokens_PR * self.model.hidden_size * DTYPE_BYTES[self.model.dtype]
        nodes = -(-self.tp // self.cluster.devices_per_node)
        return self.costs.all_reduce(nbytes, ranks=self.tp, nodes=nodes)

    def _reduce(self, program: Program, time: Timing, deps: list[int], layer: int) -> int:
        zero = np.zeros_like(time.seconds)
        return program.collective("all_reduce", zero, time.seconds, group_R=self._tp_group, port="scale_up", deps=deps, layer=layer, provenance=time.provenance)

    def _local(self, program: Program, label: str, time: Timing, deps: list[int], layer: int) -> int:
        return program.local(label, time.seconds, deps=deps, layer=layer, provenance=time.provenance)

    def _moe_parts(self, loads: StepLoads, tokens_PR: np.ndarray, is_prefill: bool, traffic: Traffic) -> dict[str, object]:
        """Compute the times of all MoE layers at once, [P, L, R]."""
        costs = self.costs
        slot = loads.slot_PLS
        if self._even:
            slot_PLRC = slot.reshape(*slot.shape[:2], *self._slot_RC.shape)
        else:
            slot_PLRC = np.where(self._mask_RC, slot[..., self._slot_RC], 0)
        algorithm = self.settings.algorithm(is_prefill)
        exchange = {}
        if self.cluster.num_ranks > 1:
            copies = costs.copies(algorithm, assign_RR=loads.assign_PLRR, copy_RR=loads.copy_PLRR, node_RN=loads.node_PLRN)
            for stage in ("dispatch", "combine"):
                time = costs.exchange(algorithm, stage, copies=copies)
                exchange[stage] = time
                traffic.local_P[:] += time.bytes["local"].sum(axis=1)
                traffic.intra_node_P[:] += time.bytes["intra_node"].sum(axis=1)
                traffic.inter_node_P[:] += time.bytes["inter_node"].sum(axis=1)
        return {
            "gate": costs.gate(tokens_PR),
            "experts": costs.experts(slot_PLRC, slot_mask=None if self._even else self._mask_RC),
            "shared": costs.shared_experts(tokens_PR) if self.model.num_shared_experts else None,
            "port": "scale_out" if self.cluster.num_nodes > 1 else "scale_up",
            **exchange,
        }

    def _moe_layer(self, program: Program, moe: dict, row: int, last: list[int], layer: int) -> list[int]:
        order = self.settings.shared_experts
        gate = self._local(program, "gate", moe["gate"], last, layer)
        arrived = self._exchange(program, "dispatch", moe, row, [gate], layer)
        shared = None
        if moe["shared"] is not None and order == "beside_dispatch":
            shared = self._local(program, "shared_experts", moe["shared"], [gate], layer)
        experts = moe["experts"]
        done = program.local("experts", experts.seconds[:, row], deps=[arrived], layer=layer, provenance=_row(experts.provenance, row, experts.seconds.ndim))
        if moe["shared"] is not None and shared is None:
            shared = self._local(program, "shared_experts", moe["shared"], [gate], layer)
        waits = [done] if shared is None or order != "serial" else [done, shared]
        back = self._exchange(program, "combine", moe, row, waits, layer)
        return [back] if shared is None else [back, shared]

    def _exchange(self, program: Program, stage: str, moe: dict, row: int, deps: list[int], layer: int) -> int:
        time = moe.get(stage)
        if time is None:
            return max(deps)
        provenance = _row(time.provenance, row, time.send_s.ndim)
        return program.collective(
            stage, time.send_s[:, row], time.recv_s[:, row], group_R=self._all, port=moe["port"], deps=deps, layer=layer, provenance=provenance
        )


def _row(provenance: np.ndarray, row: int, ndim: int) -> np.ndarray:
    """Return the classes of one MoE layer from [P, L, R] classes that may be broadcast."""
    provenance = np.asarray(provenance)
    if provenance.ndim < ndim:
        return provenance
    return provenance[:, min(row, provenance.shape[1] - 1)]
