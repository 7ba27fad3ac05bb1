"""Stages, training, chunks and rounds in the builder, against closed forms on costs that are constants."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.provenance import Provenance, Timing, timing
from moesim.errors import CostError, InputError, PlanError
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.model import sizes
from moesim.model.hf_config import load_model
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
from moesim.sim import memory
from moesim.sim.batch import PassShape
from moesim.sim.build import ProgramBuilder, Traffic
from moesim.sim.evaluate import Times, evaluate
from moesim.sim.holdings import expert_parameters, held
from moesim.sim.loads import LoadCompiler, StepLoads
from moesim.sim.ops import COMPUTE, Program
from moesim.sim.pipeline_settings import PipelineSettings
from moesim.sim.replay import compiler_of
from moesim.sim.settings import Settings
from moesim.sim.stages import stages_of

TOKENS, EVEN = 32, Provenance.MEASURED
CLUSTER, MODEL = load_cluster("h100-sxm-8"), load_model("flame-moe-290m")


@dataclass
class Costs:
    """Constant times (s) in place of a cost model; attention is all projections, sums take what their size says."""

    attention_s: float = 0.0
    gate_s: float = 0.0
    experts_s: float = 0.0
    dispatch_s: float = 0.0
    combine_s: float = 0.0
    message_s: float = 0.0
    sum_s_per_byte: float = 0.0
    optimizer_s_per_byte: float = 0.0
    strict: bool = False
    asked: list[tuple[Any, ...]] = field(default_factory=list)

    def _all(self, like: np.ndarray, seconds: float) -> Timing:
        return timing(np.full(np.shape(like), seconds), EVEN)

    def attention(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int) -> Timing:
        return self._all(new_tokens, self.attention_s)

    def gate(self, tokens: np.ndarray, experts: int | None = None) -> Timing:
        return self._all(tokens, self.gate_s)

    def experts(self, slot_tokens: np.ndarray, *, slot_mask: np.ndarray | None = None, rows: np.ndarray | None = None) -> Timing:
        self.asked.append(("experts", slot_tokens.copy()))
        return self._all(slot_tokens[..., 0], self.experts_s)

    def exchange(self, algorithm: str, stage: str, *, copies: Any) -> ExchangeTiming:
        moved = copies.up_out + copies.out_out
        self.asked.append((stage, moved.copy()))
        work = self._all(moved, self.dispatch_s if stage == "dispatch" else self.combine_s)
        total = {"local": copies.local.sum(axis=-1), "intra_node": moved.sum(axis=-1), "inter_node": np.zeros(moved.shape[:-1])}
        return ExchangeTiming(send_s=work.seconds, recv_s=work.seconds, provenance=work.provenance, bytes=total, port_bytes={"intra_out": moved})

    def embedding(self, tokens: np.ndarray) -> Timing:
        return self._all(tokens, 0.0)

    def dense_ffn(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._all(tokens, 0.0)

    def shared_experts(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._all(tokens, 0.0)

    def head(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._all(tokens, 0.0)

    def sampling(self, sequences: np.ndarray) -> Timing:
        return self._all(sequences, 0.0)

    def p2p(self, nbytes: np.ndarray, *, nodes: int) -> Timing:
        self.asked.append(("p2p", nbytes, nodes))
        return self._all(nbytes, self.message_s)

    def all_reduce(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        self.asked.append(("all_reduce", np.asarray(nbytes), ranks, nodes))
        return timing(np.asarray(nbytes) * self.sum_s_per_byte, EVEN)

    def reduce_scatter(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        self.asked.append(("reduce_scatter", np.asarray(nbytes), ranks, nodes))
        return timing(np.asarray(nbytes) * self.sum_s_per_byte / 2, EVEN)

    all_gather = reduce_scatter

    @property
    def roofline(self) -> Any:
        return SimpleNamespace(stream=lambda name, moved: timing(moved * self.optimizer_s_per_byte, EVEN))


def model_of(layers: int = 4, *, dense: int = 0) -> MoEModel:
    """A model of MoE layers after `dense` others, whose attention is projections for all the tests care."""
    return replace(MODEL, num_layers=layers, moe_layer_ids=tuple(range(dense, layers)))


def plan_of(model: MoEModel, ranks: int, stages: int = 1) -> Plan:
    plan = linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=ranks)
    return replace(plan, parallel=replace(plan.parallel, pp=stages))


def cluster_of(devices: int) -> Cluster:
    return replace(CLUSTER, devices_per_node=devices)


def shape_of(ranks: int, tokens: int = TOKENS) -> PassShape:
    """One-token contexts, so that the attention's core has next to no FLOPs."""
    full, none = np.full((1, ranks), float(tokens)), np.zeros((1, ranks))
    decode = dict.fromkeys(("decode_tokens_PR", "decode_seqs_PR", "decode_context_PR"), none)
    return PassShape(prefill_tokens_PR=full, prefill_seqs_PR=full, prefill_context_PR=none, **decode)


def loads_of(compiler: LoadCompiler, model: MoEModel, tokens: int = TOKENS, seed: int = 0) -> StepLoads:
    rng = np.random.Generator(np.random.PCG64(seed))
    total, rows = tokens * compiler.plan.num_ranks, compiler.plan.num_layers
    experts = rng.permuted(np.tile(np.arange(model.num_experts, dtype=np.uint8), (total, rows, 1)), axis=2)[..., : model.top_k]
    return compiler.compile(experts_TLK=np.ascontiguousarray(experts), rank_T=np.repeat(np.arange(compiler.plan.num_ranks), tokens))


def builder_of(costs: Costs, model: MoEModel, *, ranks: int = 2, stages: int = 1, **settings: Any) -> ProgramBuilder:
    chosen = Settings.parse({key.replace("__", "."): str(value) for key, value in settings.items()})
    fake: Any = costs
    return ProgramBuilder(cluster=cluster_of(ranks * stages), model=model, plan=plan_of(model, ranks, stages), costs=fake, settings=chosen)


def run(builder: ProgramBuilder) -> tuple[Program, Times, Traffic]:
    ranks, parts = builder.stages.ranks, builder.settings.parts(builder.stages.count)
    loads = loads_of(compiler_of(builder), builder.model)
    program, traffic = builder.build([(shape_of(ranks), loads)] * parts, True)
    return program, evaluate(program, 0.0), traffic


def seconds_of(builder: ProgramBuilder) -> float:
    return float(run(builder)[1].finish[0])


# --- stages --------------------------------------------------------------------------------------------------------


@examples(max_examples=25, deadline=None)
@given(stages=st.sampled_from([2, 4]), micro=st.integers(1, 6), layer=st.floats(0.1, 3), message=st.floats(0, 0.1))
def test_micro_batches_flow_through_stages(stages: int, micro: int, layer: float, message: float) -> None:
    """Fill with every stage and message once, then one micro-batch per stage time."""
    costs = Costs(attention_s=layer, message_s=message)
    took = seconds_of(builder_of(costs, model_of(4), stages=stages, pipeline__micro_batches=micro))
    assert took == pytest.approx((stages + micro - 1) * 4 / stages * layer + (stages - 1) * message, abs=1e-9)


def test_the_slowest_stage_sets_the_pace() -> None:
    even, uneven = (
        seconds_of(builder_of(Costs(attention_s=1.0), model_of(4), stages=2, pipeline__micro_batches=8, **extra))  # type: ignore[arg-type]
        for extra in ({}, {"pipeline__layers": "3,1"})
    )
    assert (even, uneven) == (18.0, 25.0)


def test_layers_are_split_evenly_with_the_remainder_first() -> None:
    stages = builder_of(Costs(), model_of(7), stages=3).stages
    assert stages.layers == (range(0, 3), range(3, 5), range(5, 7))


@examples(max_examples=25, deadline=None)
@given(micro=st.integers(1, 4), tokens=st.integers(1, 5))
def test_bytes_between_stages_are_every_tokens_hidden_state(micro: int, tokens: int) -> None:
    model, costs = model_of(4), Costs()
    builder = builder_of(costs, model, ranks=2, stages=4, pipeline__micro_batches=micro)
    loads = loads_of(compiler_of(builder), model, tokens)
    _, traffic = builder.build([(shape_of(2, tokens), loads)] * micro, True)
    exchanged = sum(item[1].sum() for item in costs.asked if item[0] in ("dispatch", "combine"))
    assert traffic.intra_node_P[0] - exchanged == 3 * micro * 2 * tokens * model.hidden_size * 2


def test_messages_between_nodes_use_the_other_port() -> None:
    costs, model = Costs(message_s=1.0), model_of(2)
    cluster, fake = replace(load_cluster("h100-sxm-8x2"), devices_per_node=2), costs
    builder = ProgramBuilder(cluster=cluster, model=model, plan=plan_of(model, 2, 2), costs=fake, settings=Settings())  # type: ignore[arg-type]
    program, _, traffic = run(builder)
    (send,) = {op.jobs[0].port for op in program.ops if op.label == "p2p"}
    assert send == "scale_out.out" and traffic.inter_node_P[0] > 0 and ("p2p", 2) in {(item[0], item[2]) for item in costs.asked if item[0] == "p2p"}


def test_a_message_shares_the_port_of_the_exchanges() -> None:
    """On one node both use the scale-up port of the sender: the message is in its communication lane, and the arrival in none."""
    program, _, _ = run(builder_of(Costs(), model_of(2), stages=2))
    assert {op.lane for op in program.ops if op.label == "p2p"} == {"comm"}
    assert {op.lane for op in program.ops if op.label == "p2p_arrival"} == {"p2p 0-1"}


def test_a_stage_does_not_wait_for_what_it_does_not_need() -> None:
    """1f1b: the last stage's backward of the first micro-batch runs before the forward of the second has come."""
    costs = Costs(attention_s=1.0, message_s=10.0)
    program, times, _ = run(builder_of(costs, model_of(2), stages=2, pipeline__train="true", pipeline__micro_batches=2))
    last = [float(times.start[i][0, 2]) for i, op in enumerate(program.ops) if op.ranks_R is not None and op.ranks_R[2] and op.label.startswith("attention")]
    assert last == sorted(last) and last[0] == 11.0 and last[1] == 12.0


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@examples(max_examples=25, deadline=None)
@given(stages=st.sampled_from([1, 2, 4]), extra=st.integers(0, 4), layer=st.floats(0.1, 2))
def test_training_has_the_schedules_bubble(schedule: str, stages: int, extra: int, layer: float) -> None:
    """(m + p - 1)(f + b), with b = 2 f for projections; the gradients of weights end after those of inputs, by one layer's."""
    micro = stages + extra
    costs = Costs(attention_s=layer)
    options: dict[str, Any] = {"pipeline__train": "true", "pipeline__schedule": schedule, "pipeline__micro_batches": micro}
    took = seconds_of(builder_of(costs, replace(model_of(4), moe_layer_ids=(3,)), stages=stages, **options))
    forward = 4 / stages * layer
    exact = (micro + stages - 1) * 3 * forward
    # A stage hands gradients on before its last weights' are done: at most one layer's of them a stage is hidden.
    assert exact - (stages - 1) * layer - 1e-9 <= took <= exact + 1e-9
    if stages == 1:
        assert took == pytest.approx(exact)


def test_backward_is_twice_forward_and_attention_core_two_and_a_half() -> None:
    model = model_of(1)
    builder = builder_of(Costs(attention_s=1.0, experts_s=4.0), model, pipeline__train="true")
    long = replace(shape_of(2), prefill_seqs_PR=np.ones((1, 2)), prefill_context_PR=np.full((1, 2), 1e12))
    loads = loads_of(compiler_of(builder), model)
    for shape, data, weights in ((shape_of(2), 1.0, 1.0), (long, 2.5, 0.0)):
        program, _ = builder.build([(shape, loads)], True)
        work = {op.label: float(op.jobs[0].work_s.max()) for op in program.ops}
        assert work["attention_backward"] == pytest.approx(data, abs=1e-6) and work["attention_weights"] == pytest.approx(weights, abs=1e-6)
        assert (work["experts_backward"], work["experts_weights"]) == (4.0, 4.0)


def test_backward_exchanges_mirror_the_forward() -> None:
    costs = Costs(dispatch_s=2.0, combine_s=3.0)
    program, _, traffic = run(builder_of(costs, model_of(3, dense=1), pipeline__train="true"))
    took = {op.label: float(op.jobs[0].work_s.max()) for op in program.ops if op.lane == "comm"}
    assert (took["combine_backward"], took["dispatch_backward"]) == (2.0, 3.0)
    plain = run(builder_of(costs, model_of(3, dense=1)))[2]
    assert traffic.intra_node_P[0] == 2 * plain.intra_node_P[0] and traffic.port_R["intra_out"].sum() == 2 * plain.port_R["intra_out"].sum()


def test_every_forward_op_has_its_backward() -> None:
    program, _, _ = run(builder_of(Costs(), model_of(3, dense=1), stages=1, pipeline__train="true", pipeline__micro_batches=3))
    count = Counter(op.label for op in program.ops)
    for label in ("attention", "experts", "dispatch", "combine", "gate", "head"):
        assert count[label] == count[f"{label}_backward"] > 0
    assert count["attention_weights"] == 9 and count["experts_weights"] == 6 and count["optimizer"] == 1


def test_gradients_are_summed_over_data_parallel_ranks_and_the_optimizer_streams() -> None:
    model = model_of(4)
    costs = Costs(sum_s_per_byte=1e-9, optimizer_s_per_byte=1e-12)
    builder = builder_of(costs, model, ranks=4, stages=2, pipeline__train="true")
    program, times, _ = run(builder)
    sums = [item for item in costs.asked if item[0] == "all_reduce"]
    parts = held(model, builder.plan, attention_tp=1, stages=builder.stages)
    assert [(float(item[1].max()), item[2:]) for item in sums] == [(4.0 * part.dense_parameters, (4, 1)) for part in parts]
    end = float(times.finish[0])
    own = [part.dense_parameters + part.slots_R.max() * expert_parameters(model) for part in parts]
    work = [4.0 * part.dense_parameters * 1e-9 + (4 + 24 + 2) * count * 1e-12 for part, count in zip(parts, own, strict=True)]
    assert end == pytest.approx(max(work)) and program.ops[-1].label == "optimizer"


def test_a_sharded_optimizer_scatters_updates_its_part_and_gathers() -> None:
    model = model_of(4)
    costs = Costs(optimizer_s_per_byte=1e-12)
    builder = builder_of(costs, model, ranks=4, pipeline__train="true", pipeline__shard_optimizer="true")
    program, times, _ = run(builder)
    assert [op.label for op in program.ops[-3:]] == ["gradients", "optimizer", "parameters"]
    (part,) = held(model, builder.plan, attention_tp=1, stages=builder.stages)
    assert times.finish[0] == pytest.approx(30e-12 * (part.dense_parameters / 4 + part.slots_R.max() * expert_parameters(model)))


def test_replicated_experts_sum_their_gradients() -> None:
    """Expert 0 of the first layer on ranks 0 and 2: one sum between them; the others add nothing."""
    model, costs = model_of(2), Costs(sum_s_per_byte=1e-9)
    plan = plan_of(model, 4)
    table = np.concatenate([plan.slot_to_expert_LS, np.full((2, 1), -1)], axis=1)
    order = np.argsort(np.append(plan.slot_rank_S, 2), kind="stable")
    table[0, -1] = 0
    plan = replace(plan, slot_to_expert_LS=table[:, order], slot_rank_S=np.append(plan.slot_rank_S, 2)[order])
    settings = Settings(pipeline=PipelineSettings(train=True))
    builder = ProgramBuilder(cluster=cluster_of(4), model=model, plan=plan, costs=costs, settings=settings)  # type: ignore[arg-type]
    program, _, _ = run(builder)
    (work,) = [op.jobs[1].work_s for op in program.ops if op.label == "expert_gradients"]
    once = 4.0 * expert_parameters(model) * 1e-9
    assert work.tolist() == [pytest.approx([once, 0.0, once, 0.0])]


def test_dualpipe_sums_over_the_two_stages_that_hold_a_chunk() -> None:
    model = model_of(4)
    builder = builder_of(Costs(sum_s_per_byte=1e-9), model, stages=2, pipeline__train="true", pipeline__schedule="dualpipe", pipeline__micro_batches=4)
    program, _, _ = run(builder)
    mirrored = [op for op in program.ops if op.label == "stage_gradients"]
    assert len(mirrored) == 1 and mirrored[0].group_R is not None and mirrored[0].group_R.tolist() == [0, 1, 0, 1]
    assert [part.layers for part in held(model, builder.plan, attention_tp=1, stages=builder.stages)] == [4, 4]


def test_dualpipe_overlaps_a_forward_with_a_backward() -> None:
    """With exchanges as long as computation, half of the steady state's exchanges are hidden; gpipe hides none of them on a stage."""
    costs = Costs(attention_s=0.5, experts_s=0.5, dispatch_s=0.5, combine_s=0.5)
    options: dict[str, Any] = {"pipeline__train": "true", "pipeline__micro_batches": 8}
    times = {name: seconds_of(builder_of(costs, model_of(4), stages=2, pipeline__schedule=name, **options)) for name in ("gpipe", "1f1b", "dualpipe")}
    assert times["dualpipe"] < 0.85 * times["1f1b"] and times["1f1b"] == pytest.approx(times["gpipe"], rel=0.05)


# --- chunks and rounds -----------------------------------------------------------------------------------------------


def chunked_s(r: int, dispatch: float, experts: float, combine: float) -> float:
    """T of r equal chunks on two serial lanes: dispatches, then combines on one, experts on the other.

    Chunk i leaves the experts at e_i = max(d + i·e, i·d + e); the combines end at max(r·d + r·c, max over i of e_i + (r - i + 1)·c), and what is
    linear in i is largest at an end.
    """
    d, e, c = dispatch, experts, combine
    return max(r * d + r * c, d + e + r * c, d + r * e + c, r * d + e + c)


PART = st.floats(0.0, 3.0)


@examples(max_examples=25, deadline=None)
@given(r=st.integers(1, 8), dispatch=PART, experts=PART, combine=PART)
def test_chunks_follow_the_recurrence(r: int, dispatch: float, experts: float, combine: float) -> None:
    costs = Costs(dispatch_s=dispatch, experts_s=experts, combine_s=combine)
    assert seconds_of(builder_of(costs, model_of(1), pipeline__chunks=r)) == pytest.approx(chunked_s(r, dispatch, experts, combine), abs=1e-9)


@examples(max_examples=25, deadline=None)
@given(r=st.integers(1, 4), back=st.integers(1, 4), dispatch=PART, experts=PART, combine=PART)
def test_chunks_backward_have_their_own_degree(r: int, back: int, dispatch: float, experts: float, combine: float) -> None:
    """The way back is the way there with the exchanges' roles swapped in name only; the weights' gradients follow on the compute lane."""
    costs = Costs(dispatch_s=dispatch, experts_s=experts, combine_s=combine)
    took = seconds_of(builder_of(costs, model_of(1), pipeline__train="true", pipeline__chunks=r, pipeline__chunks_backward=back))
    ready = max(dispatch + back * experts, back * dispatch + experts)  # inputs' gradients of the last chunk
    backward = max(chunked_s(back, dispatch, experts, combine), ready + back * experts)
    assert took == pytest.approx(chunked_s(r, dispatch, experts, combine) + backward, abs=1e-9)


@examples(max_examples=25, deadline=None)
@given(r=st.integers(2, 7), seed=st.integers(0, 20))
def test_chunks_cut_tokens_and_bytes_without_loss(r: int, seed: int) -> None:
    model, whole, parts = model_of(2), Costs(), Costs()
    for costs, degree in ((whole, 1), (parts, r)):
        builder = builder_of(costs, model, pipeline__chunks=degree)
        builder.build([(shape_of(2), loads_of(compiler_of(builder), model, seed=seed))], True)
    for what in ("experts", "dispatch", "combine"):
        (one,), cut = ([item[1] for item in costs.asked if item[0] == what] for costs in (whole, parts))
        assert len(cut) == r and np.allclose(np.sum(cut, axis=0), one, rtol=1e-12)
        assert what != "experts" or (max(np.ptp(np.stack(cut), axis=0).ravel()) <= 1 and all((part == np.floor(part)).all() for part in cut))


def test_one_chunk_is_the_plain_program() -> None:
    """gate → dispatch → experts → shared → combine, with exactly these dependencies."""
    program, _, _ = run(builder_of(Costs(), model_of(2, dense=1), pipeline__chunks=1))
    ops = [(op.label, op.lane, op.deps) for op in program.ops]
    assert ops == [
        ("embedding", "compute", ()),
        ("attention", "compute", (0,)),
        ("dense_ffn", "compute", (1,)),
        ("attention", "compute", (2,)),
        ("gate", "compute", (3,)),
        ("dispatch", "comm", (4,)),
        ("experts", "compute", (5,)),
        ("shared_experts", "compute", (4,)),
        ("combine", "comm", (6, 7)),
        ("head", "compute", (8, 7)),
    ]


@examples(max_examples=25, deadline=None)
@given(rounds=st.integers(1, 4), gate=PART, dispatch=PART, experts=PART, combine=PART)
def test_rounds_repeat_the_moe_part(rounds: int, gate: float, dispatch: float, experts: float, combine: float) -> None:
    costs = Costs(attention_s=1.0, gate_s=gate, dispatch_s=dispatch, experts_s=experts, combine_s=combine)
    assert seconds_of(builder_of(costs, model_of(2), rounds=rounds)) == pytest.approx(2 + 2 * rounds * (gate + dispatch + experts + combine))


def test_a_round_has_its_own_row_of_the_loads() -> None:
    model = model_of(2)
    builder = builder_of(Costs(), model, rounds=3)
    loads = loads_of(compiler_of(builder), model)
    assert compiler_of(builder).plan.slot_to_expert_LS.shape[0] == 6 and loads.slot_PLS.shape[1] == 6
    program, _ = builder.build([(shape_of(2), loads)], True)
    assert Counter(op.label for op in program.ops)["shared_experts"] == 2 and Counter(op.label for op in program.ops)["experts"] == 6


def test_computation_beside_exchanges_slows_by_the_declared_share() -> None:
    """Two micro-batches on one lane each: all but the ends of the exchanges has a kernel beside it."""
    costs = Costs(attention_s=2.0, dispatch_s=1.0, combine_s=1.0)
    plain, slowed = (seconds_of(builder_of(costs, model_of(1), micro_batches=2, comm_sm_share=share)) for share in (0.0, 0.5))
    # attention 0 to 2 s; attention 1 beside dispatch 0, which costs it half of that second; dispatch 1, combine 0 and combine 1 follow.
    assert (plain, slowed) == (7.0, 7.5)


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_stages_hold_all_weights_once(stages: int, tied: bool) -> None:
    """Over all stages and ranks: experts once; what ranks replicate once per rank; norms, which the account leaves out, aside."""
    model = replace(model_of(4, dense=1), tie_embeddings=tied)
    builder = builder_of(Costs(), model, ranks=2, stages=stages)
    weights_R = memory.weight_bytes_R(model, builder.plan, attention_tp=1, stages=builder.stages)
    experts = 3 * model.num_experts * sizes.expert_bytes(model)
    dense = sizes.total_weight_bytes(model) - experts - sizes.norm_bytes(model)
    copies = sizes.embedding_bytes(model) if tied and stages > 1 else 0.0  # the last stage needs a table of its own
    assert len(weights_R) == 2 * stages and weights_R.sum() == pytest.approx(experts + 2 * (dense + copies))


def test_training_state_and_activations_count() -> None:
    model = model_of(4)
    builder = builder_of(Costs(), model, stages=2, pipeline__train="true", pipeline__micro_batches=8)
    wanted = builder.settings.pipeline
    state_R = memory.training_bytes_R(model, builder.plan, attention_tp=1, stages=builder.stages, settings=wanted)
    parts = held(model, builder.plan, attention_tp=1, stages=builder.stages)
    assert state_R[0] == 16 * (parts[0].dense_parameters + parts[0].slots_R[0] * expert_parameters(model))

    def peak(schedule: str) -> float:
        settings = replace(builder.settings, pipeline=replace(wanted, schedule=schedule))
        stages = stages_of(builder.cluster, model, builder.plan, settings)
        held_bytes = memory.account(builder.cluster, model, builder.plan, attention_tp=1, kv_entries=9e9, tokens=1e5, stages=stages, training=settings.pipeline)
        assert held_bytes.kv_bytes == 0
        return held_bytes.activation_bytes

    assert peak("gpipe") == 4 * peak("1f1b")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "settings", "error", "what"),
    [
        (2, {"pipeline__stages": 4}, InputError, "plan's parallel.pp, 2"),
        (2, {"pipeline__layers": "1,2"}, InputError, "2 numbers with sum 4"),
        (2, {"pipeline__layers": "1,x"}, InputError, "commas between"),
        (8, {}, InputError, "at most the 4 layers"),
        (2, {"micro_batches": 2}, InputError, "use pipeline.micro_batches"),
        (1, {"pipeline__micro_batches": 2}, InputError, "needs pipeline stages or training"),
        (2, {"pipeline__schedule": "gpipe"}, InputError, "add pipeline.train=true"),
        (2, {"pipeline__schedule": "forward", "pipeline__train": "true"}, InputError, "needs a backward"),
        (2, {"pipeline__chunks_backward": 2}, InputError, "without pipeline.train"),
        (2, {"pipeline__chunks": 0}, InputError, "must be in 1..64"),
        (1, {"comm_sm_share": 1}, InputError, r"must be in \[0, 1\)"),
        (1, {"rounds": 0}, InputError, "must be in 1..16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(stages: int, settings: dict[str, Any], error: type[Exception], what: str) -> None:
    with pytest.raises(error, match=what):
        builder_of(Costs(), model_of(4), stages=stages, **settings)


def test_stages_must_fill_the_cluster_and_fit_nodes() -> None:
    model, fake = model_of(4), Costs()
    for devices, ranks, stages, what in ((8, 2, 2, "over its 2 pipeline stages"), (6, 4, 3, "multiple of")):
        cluster = replace(cluster_of(devices), num_nodes=2) if devices == 6 else cluster_of(devices)
        with pytest.raises(PlanError, match=what):
            ProgramBuilder(cluster=cluster, model=model, plan=plan_of(model, ranks, stages), costs=fake, settings=Settings())  # type: ignore[arg-type]


def test_strict_refuses_times_derived_from_the_forward() -> None:
    with pytest.raises(CostError, match="--strict"):
        builder_of(Costs(strict=True), model_of(2), pipeline__train="true")


def test_lanes_hold_one_op_of_a_rank_at_a_time() -> None:
    """No two Ops of one lane and rank overlap, in the densest Program there is."""
    costs = Costs(attention_s=0.3, gate_s=0.1, experts_s=0.7, dispatch_s=0.4, combine_s=0.2, message_s=0.15)
    options: dict[str, Any] = {"pipeline__train": "true", "pipeline__schedule": "dualpipe", "pipeline__micro_batches": 4, "pipeline__chunks": 2}
    program, times, _ = run(builder_of(costs, model_of(4), stages=2, **options))
    for lane in {op.lane for op in program.ops}:
        for rank in range(program.num_ranks):
            mine = [i for i, op in enumerate(program.ops) if op.lane == lane and (op.ranks_R is None or op.ranks_R[rank])]
            assert all(times.end[a][0, rank] <= times.start[b][0, rank] + 1e-12 for a, b in zip(mine, mine[1:], strict=False))
    assert COMPUTE in {op.lane for op in program.ops}
