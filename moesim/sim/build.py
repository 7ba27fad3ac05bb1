"""Builds the Program of P passes: the times of every operator, and where each runs.

`build_layer` has the template of a layer, `build_pipeline` the way of micro-batches through stages, `build_training` the end of a training step.
Every time comes from `costs`; every exchange from the rank-pair loads of the pass. All passes of one Program use the same all-to-all algorithm.
Shapes: P passes, L MoE layers, R ranks of a stage, C slots a rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.model import CostModel
from moesim.costs.provenance import Provenance, Timing, total
from moesim.costs.traffic import Ports
from moesim.errors import CostError, PlanError, describe
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.plan import Plan
from moesim.sim.batch import PassShape
from moesim.sim.build_layer import BatchTimes, Layers, MoeTimes, Site, side_by_side
from moesim.sim.build_pipeline import Pipeline
from moesim.sim.build_training import StepEnd
from moesim.sim.loads import StepLoads
from moesim.sim.ops import Program
from moesim.sim.settings import Settings
from moesim.sim.stages import stages_of

if TYPE_CHECKING:
    from moesim.sim.recorded import RecordedTimes

FIFTHS_LAG = 2
"""Pieces that a micro-batch is behind the one before, where layers are cut into five."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes that the exchanges of P passes move, by distance."""

    local_P: np.ndarray
    intra_node_P: np.ndarray
    inter_node_P: np.ndarray
    port_R: dict[str, np.ndarray] = field(default_factory=dict)
    """`intra_out`, `intra_in`, `inter_out`, `inter_in` → bytes of every rank in dispatch and combine, over all passes."""


class ProgramBuilder:
    """Turns loads into Programs for one (cluster, model, plan, settings)."""

    def __init__(self, *, cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, settings: Settings) -> None:
        """Check that plan, cluster and settings fit; raises PlanError with the first rule that is broken."""
        self.cluster, self.model, self.plan, self.costs, self.settings = cluster, model, plan, costs, settings
        self.recorded: RecordedTimes | None = None
        """Durations that Programs take instead of the cost model's; see `replay.build_batch`."""
        if plan.parallel.expert_tp != 1:
            raise PlanError(describe(plan.source, "parallel.expert_tp", plan.parallel.expert_tp, "must be 1 to be replayed; split experts are not"))
        self.stages = stages_of(cluster, model, plan, settings)
        ranks = self.stages.ranks
        self.tp = settings.attention_tp if settings.attention_tp > 1 else plan.parallel.tp
        if ranks % self.tp or model.attention.num_heads % self.tp:
            raise PlanError(
                describe("--set", "attention_tp", self.tp, f"must divide the {ranks} ranks and the {model.attention.num_heads} heads of {model.name}")
            )
        self._step_end = StepEnd(cluster, model, plan, costs, self.stages, settings.pipeline, tp=self.tp) if settings.pipeline.train else None
        if self._step_end is not None and costs.strict:
            raise CostError(f"{cluster.name}: times of the backward pass are derived from the forward's by pipeline.backward_… ratios; --strict refuses them")
        self._all = np.zeros(cluster.num_ranks, dtype=np.int64)
        self._tp_group = np.arange(cluster.num_ranks) // self.tp
        self._masks = [self.stages.mask_R(stage) for stage in range(self.stages.count)]
        per_rank = np.bincount(plan.slot_rank_S, minlength=ranks)
        width = int(per_rank.max())
        self._slot_RC = np.zeros((ranks, width), dtype=np.int64)
        self._mask_RC = np.arange(width) < per_rank[:, None]
        self._slot_RC[self._mask_RC] = np.arange(plan.num_slots)
        self._even = bool(self._mask_RC.all())

    def build(self, parts: Sequence[tuple[PassShape, StepLoads]], is_prefill: bool) -> tuple[Program, Traffic]:
        """Return the Program of P passes and the bytes that it exchanges.

        parts: the micro-batches of the passes, each with P passes. On one stage they run side by side, half a layer in turn, so that the exchanges
        of one run beside the computation of another; through pipeline stages and in training they follow the schedule.
        """
        model, program = self.model, Program(self.cluster.num_ranks)
        passes = parts[0][0].num_passes
        traffic = Traffic(local_P=np.zeros(passes), intra_node_P=np.zeros(passes), inter_node_P=np.zeros(passes))
        batches = [self._times(shape, loads, is_prefill, traffic, micro) for micro, (shape, loads) in enumerate(parts)]
        sites = [self._site(program, stage) for stage in range(self.stages.count)]
        if self.stages.count > 1 or self._step_end is not None:
            pipeline = Pipeline(program, self.stages, sites, batches, cluster=self.cluster, model=model, settings=self.settings, costs=self.costs)
            pipeline.run()
            traffic.intra_node_P[:] += pipeline.sent_P["intra_node"]
            traffic.inter_node_P[:] += pipeline.sent_P["inter_node"]
            if self._step_end is not None:
                self._step_end.add(program, sites)
            return program, traffic
        row_of = {layer: row for row, layer in enumerate(model.moe_layer_ids)}
        layers = [Layers(sites[0], times, self.settings, row_of) for times in batches]
        lag = FIFTHS_LAG if any(times.before_scores is not None for times in batches) else 0
        ends = side_by_side([each.forward(range(model.num_layers), [], embed=True, head=None) for each in layers], lag)
        # Micro-batches hide exchanges, and the head has none: it runs once, on all of the pass.
        head = self._head(np.sum([self._head_tokens(shape.grouped(self.tp)) for shape, _ in parts], axis=0), is_prefill)
        sites[0].timed("head", head, [op for end in ends for op in end], model.num_layers)
        return program, traffic

    def _stage_of_rows(self, micro: int) -> np.ndarray:
        """Return int [L]: the stage that runs a micro-batch in every MoE layer and round."""
        of_layer = np.concatenate([np.full(len(layers), self.stages.order.stage_of(chunk, micro)) for chunk, layers in enumerate(self.stages.layers)])
        return np.repeat(of_layer[list(self.model.moe_layer_ids)], self.settings.rounds)

    def _site(self, program: Program, stage: int) -> Site:
        port = "scale_out" if self.stages.ranks > self.cluster.devices_per_node else "scale_up"
        columns, mask_R = self.stages.columns(stage), self._masks[stage]
        return Site(program, columns=columns, mask_R=mask_R, group_R=self._all, tp_group_R=self._tp_group, port=port)

    # --- times -----------------------------------------------------------------------------------

    def _attention(self, shape: PassShape) -> Timing:
        prefill = decode = None
        if (shape.prefill_tokens_PR > 0).any():
            prefill = self.costs.attention(
                phase="prefill", sequences=shape.prefill_seqs_PR, new_tokens=shape.prefill_tokens_PR, context=shape.prefill_context_PR, tp=self.tp
            )
        if prefill is None or (shape.decode_tokens_PR > 0).any():
            decode = self.costs.attention(
                phase="decode", sequences=shape.decode_seqs_PR, new_tokens=shape.decode_tokens_PR, context=shape.decode_context_PR, tp=self.tp
            )
        if prefill is None or decode is None:
            return prefill or decode  # type: ignore[return-value]
        prefix = np.maximum(shape.prefill_context_PR - shape.prefill_tokens_PR / np.maximum(shape.prefill_seqs_PR, 1.0), 0.0)
        factor = self.costs.mixed_factor(
            chunk=shape.prefill_tokens_PR, prefix=prefix, decodes=shape.decode_tokens_PR, context=shape.decode_context_PR, tp=self.tp
        )
        apart = total(prefill, decode)
        return apart if (factor == 1.0).all() else Timing(seconds=apart.seconds + (factor - 1.0) * self._scores(shape), provenance=apart.provenance)

    def _scores(self, shape: PassShape) -> np.ndarray:
        """Return float64 [P, R]: one layer's scores and values of both phases."""
        found = np.zeros(shape.tokens_PR.shape)
        for phase in ("prefill", "decode"):
            seqs, tokens, context = (getattr(shape, f"{phase}_{name}_PR") for name in ("seqs", "tokens", "context"))
            found += self.costs.attention_core(phase=phase, sequences=seqs, new_tokens=tokens, context=context, tp=self.tp).seconds
        return found

    def _attention_reduce(self, shape: PassShape) -> Timing | None:
        if self.tp == 1:
            return None
        nbytes = shape.tokens_PR * self.model.hidden_size * DTYPE_BYTES[self.model.dtype]
        nodes = -(-self.tp // self.cluster.devices_per_node)
        return self.costs.all_reduce(nbytes, ranks=self.tp, nodes=nodes)

    def _core_share(self, shape: PassShape) -> np.ndarray:
        """Return float [P, R]: the share of scores and values in the FLOPs of the attention block."""
        mean = (shape.prefill_tokens_PR / np.maximum(shape.prefill_seqs_PR, 1.0) - 1.0) / 2.0
        before = shape.prefill_tokens_PR * np.maximum(shape.prefill_context_PR - mean, 0.0) + shape.decode_tokens_PR * shape.decode_context_PR
        core = sizes.attention_flops(self.model, 1.0, self.tp) * before
        return core / np.maximum(core + sizes.projection_flops(self.model, self.tp) * shape.tokens_PR, 1.0)

    def _times(self, shape: PassShape, loads: StepLoads, is_prefill: bool, traffic: Traffic, micro: int) -> BatchTimes:
        """Compute all operator times of one micro-batch; those of the MoE layers at once, [P, L, R]."""
        costs, model, tokens_PR, group, wanted = self.costs, self.model, shape.tokens_PR, shape.grouped(self.tp), self.settings.pipeline
        moe = self._moe_times(loads, wanted.chunks, is_prefill, traffic, micro)
        backward: tuple[MoeTimes, ...] = ()
        if wanted.train:
            again = wanted.chunks_backward in (0, wanted.chunks)
            backward = self._moe_times(loads, wanted.chunks if again else wanted.chunks_backward, is_prefill, traffic, micro)
        attention = self._attention(group)
        before: Timing | None = None
        if self.settings.turns == "fifths" and not is_prefill:
            before = costs.attention_before_scores(group.tokens_PR, tp=self.tp)
            before = Timing(seconds=np.minimum(before.seconds, attention.seconds), provenance=before.provenance)
        gate_of = {count: self._slowed(costs.gate(tokens_PR, count), is_prefill) for count in set(model.expert_counts_L)}
        return BatchTimes(
            tokens_PR=tokens_PR,
            embedding=costs.embedding(tokens_PR),
            attention=self._slowed(attention, is_prefill),
            before_scores=before,
            core_PR=self._core_share(group) if wanted.train else 0.0,
            reduce=self._attention_reduce(group),
            dense=self._slowed(costs.dense_ffn(group.tokens_PR, tp=self.tp), is_prefill),
            gate_L=tuple(gate_of[count] for count in model.expert_counts_L),
            shared=self._slowed(costs.shared_experts(tokens_PR), is_prefill) if model.num_shared_experts else None,
            head=self._head(tokens_PR if wanted.train else self._head_tokens(group), is_prefill),
            moe=moe,
            moe_backward=backward,
        )

    @staticmethod
    def _head_tokens(shape: PassShape) -> np.ndarray:
        return shape.prefill_seqs_PR + shape.decode_tokens_PR

    def _head(self, tokens_PR: np.ndarray, is_prefill: bool) -> Timing:
        """Return the time of final norm and head and, where tokens are generated, of sampling the next ones."""
        parts = [self.costs.head(tokens_PR, tp=self.tp)] + ([] if self.settings.pipeline.train else [self.costs.sampling(tokens_PR)])
        return self._slowed(total(*parts), is_prefill)

    def _slowed(self, time: Timing, is_prefill: bool) -> Timing:
        """Return the time at the clock that the device sustains, on the SMs that exchanges leave for good."""
        settings = self.settings
        rate = (settings.prefill_clock if is_prefill else 1.0) * (1.0 - settings.comm_sm_share if settings.comm_sm_reserved else 1.0)
        return time if rate == 1.0 else time.scaled(1.0 / rate, Provenance.CALIBRATED)

    def _moe_times(self, loads: StepLoads, chunks: int, is_prefill: bool, traffic: Traffic, micro: int) -> tuple[MoeTimes, ...]:
        """Return the times of every chunk: whole tokens per slot, and an equal part of the copies on every port."""
        algorithm = self.settings.algorithm(is_prefill)
        copies = loads.pairs.ports(algorithm) if self.stages.ranks > 1 else None
        rows_PLR = loads.pairs.rows() / chunks if algorithm == "normal" and copies is not None else None
        if chunks == 1:
            return (self._chunk_times(loads.slot_PLS, copies, rows_PLR, is_prefill, traffic, micro),)
        if copies is not None:
            copies = Ports(**{item.name: getattr(copies, item.name) / chunks for item in fields(Ports)})
        turn_S = np.arange(loads.slot_PLS.shape[2])
        ends = [(loads.slot_PLS * index + turn_S % chunks) // chunks for index in range(chunks + 1)]
        return tuple(self._chunk_times(after - before, copies, rows_PLR, is_prefill, traffic, micro) for before, after in zip(ends, ends[1:], strict=False))

    def _chunk_times(self, slot: np.ndarray, copies: Ports | None, rows_PLR: np.ndarray | None, is_prefill: bool, traffic: Traffic, micro: int) -> MoeTimes:
        if self._even:
            slot_PLRC = slot.reshape(*slot.shape[:2], *self._slot_RC.shape)
        else:
            slot_PLRC = np.where(self._mask_RC, slot[..., self._slot_RC], 0)
        algorithm = self.settings.algorithm(is_prefill)
        exchange: dict[str, ExchangeTiming] = {}
        if copies is not None:
            for stage in ("dispatch", "combine"):
                time = exchange[stage] = self.costs.exchange(algorithm, stage, copies=copies)
                traffic.local_P[:] += time.bytes["local"].sum(axis=1)
                traffic.intra_node_P[:] += time.bytes["intra_node"].sum(axis=1)
                traffic.inter_node_P[:] += time.bytes["inter_node"].sum(axis=1)
                for port, moved in time.port_bytes.items():
                    by_stage = traffic.port_R.setdefault(port, np.zeros(self.cluster.num_ranks)).reshape(self.stages.count, -1)
                    np.add.at(by_stage, self._stage_of_rows(micro), moved.sum(axis=0))
        return MoeTimes(
            dispatch=exchange.get("dispatch"),
            experts=self._slowed(self.costs.experts(slot_PLRC, slot_mask=None if self._even else self._mask_RC, rows=rows_PLR), is_prefill),
            combine=exchange.get("combine"),
        )
