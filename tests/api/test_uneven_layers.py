"""Models whose layers have unequally many experts, from `config.json` to plan and replay; what cannot say so refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.api.documents import trace_shape
from moesim.errors import ModelError, PlanError, TraceError
from moesim.model import load_model, sizes
from moesim.model.hf_config import parse_config
from moesim.plan import Plan, linear
from moesim.plan_formats import FORMATS, export_plan, import_plan
from moesim.sim.loads import LoadCompiler
from moesim.sim.memory import weight_bytes_R
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import check_fits, open_trace
from moesim.traces.routing_trace import TokenBatch, TraceShape
from moesim.traces.steps import iter_steps
from moesim.traces.writer import write_trace

COUNTS = (8, 16, 32)
CONFIG: dict[str, Any] = {
    "model_type": "pyramid", "num_hidden_layers": 4, "hidden_size": 256, "vocab_size": 1000, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 512, "moe_intermediate_size": 128, "first_k_dense_replace": 1, "num_experts": list(COUNTS), "num_experts_per_tok": 2,
    "num_shared_experts": 1, "max_position_embeddings": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
SHAPE = TraceShape(model="m", num_experts=32, top_k=2, moe_layer_ids=(1, 2, 3), experts_L=COUNTS)
TRACE = "synthetic:zipf:1.0,tokens=512,steps=2"


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return str(tmp_path / "config.json")


def model_with(**changes: Any) -> Any:
    return parse_config({**CONFIG, **changes}, "m", "config.json")


# --- the model -------------------------------------------------------------------------------------------------------


def test_a_list_of_counts_is_per_moe_layer_or_per_layer_with_zeros() -> None:
    model = model_with()
    assert (model.num_experts, model.experts_L, model.moe_layer_ids) == (32, COUNTS, (1, 2, 3))
    assert model_with(num_experts=[0, *COUNTS]).experts_L == COUNTS
    pruned = model_with(num_experts=[0, 8, 0, 32])
    assert (pruned.moe_layer_ids, pruned.experts_L) == ((1, 3), (8, 32))
    assert model_with(num_experts=[16, 16, 16]).experts_L is None
    assert model_with(num_experts=[16, 16, 16]).sha256 == model_with(num_experts=16).sha256 != model.sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts": [8, 16]}, "must list the experts of the 3 MoE layers"),
        ({"num_experts": [8, 0, 32]}, "must list the experts of the 3 MoE layers"),
        ({"num_experts": [8, "x", 32]}, "whole numbers"),
        ({"num_experts": [1, 16, 32]}, "must be in 1..1"),
        ({"n_group": 16}, "must be in 1..8"),
        ({"num_experts": [8, 15, 32], "n_group": 4}, "must divide the number of experts"),
        ({"num_local_experts": 32}, "must agree"),
    ],
)
def test_counts_that_cannot_be_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        model_with(**changes)


def test_sizes_are_those_of_the_layers_one_by_one() -> None:
    model, alone = model_with(), [model_with(num_experts=count) for count in COUNTS]
    assert sizes.parameters(model).routed == sum(sizes.parameters(one).routed for one in alone) // 3
    assert sizes.parameters(model).router == sum(sizes.parameters(one).router for one in alone) // 3
    assert sizes.parameters(model).total == sum(sizes.parameters(one).total for one in alone) // 3
    assert sizes.total_weight_bytes(model) == pytest.approx(sum(sizes.total_weight_bytes(one) for one in alone) / 3)
    plan = linear(model="m", num_experts=32, moe_layer_ids=(1, 2, 3), num_ranks=1, experts_L=COUNTS)
    assert weight_bytes_R(model, plan, attention_tp=1)[0] + sizes.norm_bytes(model) == pytest.approx(sizes.total_weight_bytes(model))


# --- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["balanced", "zipf:1.0", "power-law:1.5", "markov:0.9", "topics:3"])
@pytest.mark.parametrize("groups", [1, 2])
def test_synthetic_routing_draws_only_experts_that_exist(kind: str, groups: int) -> None:
    shape = TraceShape(model="m", num_experts=16, top_k=2, moe_layer_ids=(0, 1, 2, 3), experts_L=(8, 4, 16, 8), num_groups=groups, top_k_groups=1)
    counts = open_trace(f"synthetic:{kind},tokens=400,steps=2", shape=shape).counts_WLE("all")[0]
    for row, count in zip(counts, (8, 4, 16, 8), strict=True):
        assert (row[:count] > 0).all() and not row[count:].any() and row.sum() == 1600


def test_markov_links_lead_from_layer_to_layer() -> None:
    """With persistence 1, an expert leads to one other wherever that exists."""
    shape = TraceShape(model="m", num_experts=16, top_k=1, moe_layer_ids=(0, 1, 2), experts_L=(4, 16, 8))
    batch = next(open_trace("synthetic:markov:1.0,tokens=300", shape=shape).batches())
    first, second, third = batch.experts_TLK[:, :, 0].T
    assert {len(set(second[first == expert])) for expert in range(4)} == {1}
    assert {len(set(third[second == expert])) for expert in set(second.tolist())} <= {1, 2, 3, 4, 5, 6, 7, 8}


def batch_of(experts_TLK: list[Any]) -> TokenBatch:
    table = np.array(experts_TLK, dtype=np.uint8)
    zeros = np.zeros(len(table))
    return TokenBatch(
        step_T=zeros.astype(np.uint32), rank_T=zeros.astype(np.uint16), request_T=zeros.astype(np.uint64), position_T=zeros.astype(np.uint32),
        phase_T=zeros.astype(np.uint8), experts_TLK=table,
    )  # fmt: skip


def test_ids_and_counts_are_checked_per_layer() -> None:
    good, bad = batch_of([[[0, 7], [0, 15], [0, 31]]]), batch_of([[[0, 8], [0, 15], [0, 31]]])
    from_batches(SHAPE, [good], source="t")
    with pytest.raises(TraceError, match="expert id of layer 1 = 8 must be < 8"):
        from_batches(SHAPE, [bad], source="t")
    table = np.zeros((1, 3, 32), dtype=np.int64)
    table[0, 1, 16] = 3
    with pytest.raises(TraceError, match="counts of layer 2, expert 16 = 3 must be 0: the layer has 16 experts"):
        from_counts(SHAPE, table, ["w"], source="t")
    # a trace that does not say how many experts a layer has is checked as it is read
    plain = TraceShape(model="m", num_experts=32, top_k=2, moe_layer_ids=(1, 2, 3))
    assert len(list(check_fits(from_batches(plain, [good], source="t"), SHAPE).batches())) == 1
    with pytest.raises(TraceError, match="expert id of layer 1"):
        list(check_fits(from_batches(plain, [bad], source="t"), SHAPE).batches())
    with pytest.raises(TraceError, match="experts per layer"):
        check_fits(from_batches(SHAPE, [good], source="t"), plain)


def test_a_trace_keeps_its_counts_on_disk(tmp_path: Path) -> None:
    write_trace(open_trace(TRACE, shape=SHAPE), tmp_path / "t")
    back = open_trace(str(tmp_path / "t"))
    assert back.shape == SHAPE and np.array_equal(back.counts_WLE("all"), open_trace(TRACE, shape=SHAPE).counts_WLE("all"))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_needs_the_experts_that_exist_and_no_others(tmp_path: Path) -> None:
    plan = linear(model="m", num_experts=4, moe_layer_ids=(0, 1), num_ranks=2, experts_L=(2, 4))
    assert plan.slot_to_expert_LS.tolist() == [[0, -1, 1, -1], [0, 1, 2, 3]]
    plan.write(tmp_path / "p.json")
    back = Plan.read(tmp_path / "p.json")
    assert back.experts_L == (2, 4) and back.sha256 == plan.sha256 and back.map_sha256 == plan.map_sha256
    even = linear(model="m", num_experts=4, moe_layer_ids=(0, 1), num_ranks=2)
    assert "experts_per_layer" not in even.content() and even.map_sha256 != plan.map_sha256
    facts: dict[str, Any] = {"model": "m", "num_experts": 4, "moe_layer_ids": (0,), "slot_rank_S": np.array([0, 0, 1, 1]), "num_ranks": 2}
    with pytest.raises(PlanError, match=r"slot_to_expert\[0\]\[2\] = 2 must be below the 2 experts"):
        Plan(experts_L=(2,), slot_to_expert_LS=np.array([[0, 1, 2, -1]]), **facts)
    with pytest.raises(PlanError, match="layer 0 has no slot for expert 1"):
        Plan(experts_L=(2,), slot_to_expert_LS=np.array([[0, 0, -1, -1]]), **facts)
    Plan(experts_L=(2,), slot_to_expert_LS=np.array([[0, 1, 1, -1]]), share_LS=np.array([[1, 0.25, 0.75, 0]]), **facts)


def test_a_plan_for_other_counts_does_not_fit(path: str) -> None:
    model = load_model(path)
    for counts in (None, (16, 16, 32)):
        plan = linear(model=model.name, num_experts=32, moe_layer_ids=(1, 2, 3), num_ranks=8, experts_L=counts)
        with pytest.raises(PlanError, match="experts_per_layer"):
            api.replay(TRACE, model=path, hardware="h100-sxm-8", plan=plan)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_formats_that_hold_one_number_of_experts_refuse(format: str, tmp_path: Path) -> None:
    plan = linear(model="m", num_experts=4, moe_layer_ids=(0, 1), num_ranks=2, experts_L=(2, 4))
    with pytest.raises(PlanError, match="experts_per_layer"):
        export_plan(plan, format, tmp_path / "x", num_hidden_layers=2)


def test_a_placement_that_fills_every_slot_is_imported(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 0, 1], [0, 1, 2, 3]]}))
    facts: dict[str, Any] = {"model": "m", "num_experts": 4, "moe_layer_ids": (0, 1), "num_ranks": 2, "num_hidden_layers": 2}
    assert import_plan(tmp_path / "x.json", "sglang", **facts, experts_L=(2, 4)).experts_L == (2, 4)
    with pytest.raises(PlanError, match="below the 2 experts"):
        (tmp_path / "x.json").write_text(json.dumps({"physical_to_logical_map": [[0, 1, 2, 1], [0, 1, 2, 3]]}))
        import_plan(tmp_path / "x.json", "sglang", **facts, experts_L=(2, 4))


# --- the loop --------------------------------------------------------------------------------------------------------


def test_loads_are_counted_per_layer_and_absent_experts_refused() -> None:
    plan = linear(model="m", num_experts=4, moe_layer_ids=(0, 1), num_ranks=2, experts_L=(2, 4))
    compiler = LoadCompiler(plan, ranks_per_node=2)
    generator = np.random.Generator(np.random.PCG64(0))
    experts = np.stack([generator.integers(0, 2, (50, 1)), generator.integers(0, 4, (50, 1))], axis=1).astype(np.uint8)
    slots = compiler.compile(experts_TLK=experts, rank_T=np.sort(generator.integers(0, 2, 50))).slot_PLS[0]
    assert slots.tolist() == [[(experts[:, layer] == expert).sum() if expert >= 0 else 0 for expert in row] for layer, row in enumerate(plan.slot_to_expert_LS)]
    experts[7, 0] = 2
    with pytest.raises(TraceError, match="expert = 2 must be below the 2 experts of layer 0"):
        compiler.compile(experts_TLK=experts, rank_T=np.zeros(50, dtype=np.int64))


def test_solve_check_and_replay(path: str, tmp_path: Path) -> None:
    where: dict[str, Any] = {"model": path, "hardware": "h100-sxm-8"}
    solved = api.solve(TRACE, **where, redundant=8)
    plan = solved.plan
    assert plan.experts_L == COUNTS and [(row >= 0).sum() for row in plan.slot_to_expert_LS] == [16, 24, 40]
    plan.write(tmp_path / "p.json")
    run = api.replay(TRACE, **where, plan=tmp_path / "p.json")
    assert run.report["balance"]["mean_over_max"] > api.replay(TRACE, **where).report["balance"]["mean_over_max"]
    counts = open_trace(TRACE, shape=trace_shape(load_model(path))).counts_WLE("all")[0]
    assert np.array_equal(run.load_LE, counts)
    drifted = "synthetic:zipf:1.0,tokens=512,steps=2,seed=5"
    budget = 6 * sizes.expert_bytes(load_model(path))
    repaired = api.solve(drifted, **where, previous=plan, move_budget_bytes=budget, predict=False)
    assert 0 < repaired.report["moved"]["slots"] <= 6
    assert repaired.report["value"] > 1 / (np.max(plan.rank_load_LR(_counts(path, drifted)), axis=1).sum() * 8 / _counts(path, drifted).sum())
    moved = api.rebalance([TRACE, drifted], **where, plan=plan, policy="periodic:1", tokens_per_step=256)
    assert moved["run"]["rebalances"] >= 0


def _counts(path: str, trace: str) -> np.ndarray:
    return np.asarray(open_trace(trace, shape=trace_shape(load_model(path))).counts_WLE("all")[0])


def test_remote_ranks_and_nodes_are_those_that_hold_the_choices(path: str) -> None:
    trace = "synthetic:zipf:1.0,tokens=256"
    plan = linear(model=load_model(path).name, num_experts=32, moe_layer_ids=(1, 2, 3), num_ranks=16, experts_L=COUNTS)
    report = api.replay(trace, model=path, hardware="h100-sxm-8x2", plan=plan).report
    ranks = nodes = 0
    shape = trace_shape(load_model(path))
    steps = list(iter_steps(open_trace(trace, shape=shape), num_ranks=16))
    for home, experts_LK in [(int(home), table) for step in steps for home, table in zip(step.rank_T, step.experts_TLK, strict=True)]:
        for layer, experts in enumerate(experts_LK.tolist()):
            there = {int(plan.slot_rank_S[plan.slot_to_expert_LS[layer].tolist().index(expert)]) for expert in experts}
            ranks += len(there - {home})
            nodes += len({rank // 8 for rank in there} - {home // 8})
    assert report["traffic"] == pytest.approx({"distinct_remote_ranks": ranks / (256 * 3), "distinct_remote_nodes": nodes / (256 * 3)})


def test_what_wants_equal_layers_says_so(path: str) -> None:
    with pytest.raises(ModelError, match="must be equal in all layers for trace statistics"):
        api.trace_statistics(TRACE, model=path)
