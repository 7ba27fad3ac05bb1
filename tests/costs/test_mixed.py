"""Scores of mixed batches: rows off the grid of the factor as a holdout, and the three places that use it."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs.model import CostModel
from moesim.costs.predict import Predictor
from moesim.costs.provenance import Timing
from moesim.costs.step import Batch, StepModel
from moesim.hardware.load import load_cluster
from moesim.hardware.tables import read_table
from moesim.model import load_model
from moesim.plan import Parallel, Plan
from moesim.sim.batch import PassShape
from moesim.sim.build import ProgramBuilder
from moesim.sim.settings import Settings

CLUSTER = load_cluster("rtx-pro-6000-1")
MODEL = load_model("qwen3-30b-a3b")
AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")


def test_rows_off_the_grid_are_predicted_and_far_better_than_by_the_sum_of_both_phases() -> None:
    rows = dict(read_table(CLUSTER, "attn_mixed_llmservingsim"))
    at = np.stack([rows[name] for name in AXES]).astype(np.int64)
    held = ((at & (at - 1)) != 0).any(axis=0)
    assert held.sum() > 10_000
    rows = {name: values[held] for name, values in rows.items()}
    predictor = Predictor(CLUSTER, "vllm")
    seconds, *_ = predictor("attn_mixed", rows)
    error = np.abs(seconds / rows["latency_s"] - 1)
    one = np.ones(len(error))
    prompt = predictor._attn("prefill", one, rows["prefill_chunk"], rows["prefill_chunk"] + rows["kv_prefill"], rows)
    decode = predictor._attn("decode", rows["n_decode"], rows["n_decode"], rows["kv_decode"], rows)
    assert isinstance(prompt, Timing) and isinstance(decode, Timing)
    apart = np.abs((prompt.seconds + decode.seconds) / rows["latency_s"] - 1)
    assert np.median(error) < 0.03 and error.mean() < 0.05
    assert np.median(apart) > 0.3, "one kernel for both phases is another thing than two"


def batch_of(chunk: float, decodes: float) -> Batch:
    each = {"prefill_seqs": float(chunk > 0), "prefill_tokens": chunk, "prefill_context": chunk, "decode_seqs": decodes, "decode_tokens": decodes}
    return Batch(**{f"{name}_n": np.array([value]) for name, value in {**each, "decode_context": 4096.0}.items()})


def test_a_step_and_a_pass_of_both_phases_take_the_factor_and_others_do_not() -> None:
    costs = CostModel(CLUSTER, MODEL)
    step = StepModel(MODEL, CLUSTER, costs, np.zeros((1, 1)), lambda load_LE, ranks, slots: load_LE)
    slots = np.arange(MODEL.num_experts)
    plan = Plan(
        model=MODEL.name, num_experts=MODEL.num_experts, moe_layer_ids=MODEL.moe_layer_ids, slot_to_expert_LS=np.tile(slots, (len(MODEL.moe_layer_ids), 1)),
        slot_rank_S=0 * slots, num_ranks=1, parallel=Parallel(ep=1, dp=1),
    )  # fmt: skip
    builder = ProgramBuilder(cluster=CLUSTER, model=MODEL, plan=plan, costs=costs, settings=Settings())

    def seconds(chunk: float, decodes: float) -> tuple[float, float]:
        batch = batch_of(chunk, decodes)
        shape = PassShape(**{f"{name[:-2]}_PR": getattr(batch, name)[None] for name in batch.__dataclass_fields__})
        scores = step.attention(batch, 1) - step.projections(batch.tokens_n, 1)
        return float(scores[0]), float(builder._attention(shape).seconds[0, 0])

    prompt, decode, both = seconds(512, 0), seconds(0, 64), seconds(512, 64)
    factor = float(costs.mixed_factor(chunk=np.array([512]), prefix=np.array([0]), decodes=np.array([64]), context=np.array([4096]))[0])
    assert factor > 1.5
    assert both[0] == pytest.approx(factor * (prompt[0] + decode[0]), rel=1e-9)
    assert both[1] - prompt[1] - decode[1] == pytest.approx((factor - 1) * (prompt[0] + decode[0]), rel=1e-9)


def test_single_batches_are_looked_up_alike() -> None:
    found = CostModel(CLUSTER, MODEL).mixed_batches()
    assert found is not None
    rng = np.random.default_rng(5)
    many = np.exp(rng.uniform(np.log(0.5), np.log([4096, 40000, 300, 40000]), (200, 4))).T
    assert [found.at(*one) for one in many.T.tolist()] == pytest.approx(found(*many).tolist(), rel=1e-12)


@pytest.mark.parametrize(("hardware", "model"), [("h100-sxm-8", "qwen3-30b-a3b"), ("rtx-pro-6000-1", "deepseek-v3")])
def test_without_a_table_of_the_head_shape_both_phases_add(hardware: str, model: str) -> None:
    costs = CostModel(load_cluster(hardware), load_model(model))
    each = np.array([0.0, 64.0])
    assert costs.mixed_batches() is None
    assert (costs.mixed_factor(chunk=each, prefix=each, decodes=each, context=each) == 1.0).all()
