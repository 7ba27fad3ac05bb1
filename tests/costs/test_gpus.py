"""Tables of the other GPUs: their rows are reproduced, other shapes are calibrated on them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs import CostModel, Provenance
from moesim.costs.predict import Predictor
from moesim.hardware import load_cluster
from moesim.hardware.tables import read_table
from moesim.model import load_model


def test_products_of_an_h800_are_its_rows_and_others_are_corrected_by_them() -> None:
    h800 = load_cluster("h800-sxm-8")
    costs = CostModel(h800, load_model("deepseek-v3"))
    rows = read_table(h800, "gemm_infersim", where={"n": 4096, "k": 7168})
    timed = costs.gemm("test", rows["m"], 4096, 7168, "fp8_block")
    # The table times the product alone; quantising its input reads two bytes and writes one.
    quantising = 3.0 * rows["m"] * 7168 / costs.roofline.reached_Bps
    assert timed.seconds - quantising == pytest.approx(rows["latency_s"], rel=1e-12) and (timed.provenance == Provenance.MEASURED).all()
    other = costs.gemm("test", rows["m"], 4000, 7168, "fp8_block")
    assert (other.provenance == Provenance.CALIBRATED).all() and (np.abs(other.seconds / rows["latency_s"] - 1) < 0.5).all()


def test_a_product_of_another_dtype_is_calibrated_on_the_dtype_that_was_measured() -> None:
    costs = CostModel(load_cluster("rtx-pro-6000-1"), load_model("qwen3-30b-a3b-fp8"), strict=True)
    m = np.array([1.0, 64.0, 4096.0])
    wide, narrow = costs.gemm("test", m, 4096, 4096, "bfloat16"), costs.gemm("test", m, 4096, 4096, "fp8_block")
    assert (narrow.provenance == Provenance.CALIBRATED).all() and (narrow.seconds < wide.seconds).all()


def test_weights_of_a_large_model_are_read_from_memory_not_from_the_cache() -> None:
    card = load_cluster("rtx-pro-6000-1")
    costs = CostModel(card, load_model("llama-3.1-8b"))
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        assert costs.gemm("test", np.array([1.0]), n, k, "bfloat16").seconds[0] > 2.0 * n * k / card.memory.read_Bps
    # The measured products of small weights, timed again and again, were read from the cache.
    assert costs.gemm("test", np.array([1.0]), 2048, 4096, "bfloat16").seconds[0] < 2.0 * 2048 * 4096 / card.memory.read_Bps


@pytest.mark.parametrize(
    ("hardware", "stem", "model", "worst"),
    [
        ("h800-sxm-8", "grouped_gemm_infersim", "deepseek-v3", 1e-9),
        ("rtx-pro-6000-1", "grouped_gemm_llmservingsim", "qwen3-30b-a3b", 1e-9),
        ("a800-sxm-8", "grouped_gemm_frontier", "qwen3-30b-a3b", 0.5),
        ("a100-sxm-8", "grouped_gemm_frontier", "mixtral-8x7b", 0.2),
    ],
)
def test_expert_rows_are_reproduced(hardware: str, stem: str, model: str, worst: float) -> None:
    cluster, shape = load_cluster(hardware), load_model(model)
    rows = {name: values.astype(float) if values.dtype != object else values for name, values in read_table(cluster, stem).items()}
    mine = rows["inter_size"] == shape.expert_ffn_size
    rows = {name: values[mine][::3] for name, values in rows.items()}
    predicted, codes, reasons, _ = Predictor(cluster, "vllm")("grouped_gemm", rows)
    # InferSim leaves the activation between the two products out, which the law adds.
    extra = rows["assignments"] * 6.0 * rows["inter_size"] / CostModel(cluster, shape).roofline.reached_Bps if stem.endswith("infersim") else 0.0
    errors = np.abs((predicted - extra) / rows["latency_s"] - 1)
    # Where random routing was timed several times under equal loads, the mean is what is reproduced.
    assert np.median(errors) <= max(worst / 10, 1e-9) and np.quantile(errors, 0.95) <= worst
    assert (codes <= Provenance.CALIBRATED).all() and not any(reasons)


def test_time_follows_the_activated_experts_when_tokens_are_few() -> None:
    costs = CostModel(load_cluster("rtx-pro-6000-1"), load_model("qwen3-30b-a3b"))
    few, many = np.zeros((1, 128), dtype=np.int64), np.full((1, 128), 4)
    few[0, :8] = 64
    assert costs.experts(few).seconds[0] == pytest.approx(71.3167e-6) and costs.experts(many).seconds[0] == pytest.approx(827.81e-6)


def test_attention_of_a_card_is_its_rows_prefix_included() -> None:
    card, model = load_cluster("rtx-pro-6000-1"), load_model("qwen3-30b-a3b")
    core = CostModel(card, model)._attention.core
    rows = read_table(card, "attn_generation_llmservingsim")
    batch = rows["batch_size"].astype(float)
    timed = core("decode", batch, batch, rows["step"] + 1.0, heads=32, kv_heads=4, head_dim=128)
    assert timed.seconds == pytest.approx(rows["latency_s"], rel=1e-12) and (timed.provenance == Provenance.MEASURED).all()
    rows = read_table(card, "attn_context_llmservingsim")
    one, new, prefix = np.ones(len(rows["isl"])), rows["isl"].astype(float), rows["prefix"].astype(float)
    timed = core("prefill", one, new, new + prefix, heads=32, kv_heads=4, head_dim=128)
    assert timed.seconds == pytest.approx(rows["latency_s"], rel=1e-12) and (timed.provenance == Provenance.MEASURED).all()


def test_sampling_is_its_row_and_grows_with_the_vocabulary() -> None:
    card, model = load_cluster("rtx-pro-6000-1"), load_model("qwen3-30b-a3b")
    rows = read_table(card, "sampler_llmservingsim")
    costs = CostModel(card, model)
    assert costs.sampling(rows["sequences"]).seconds == pytest.approx(rows["latency_s"], rel=1e-12)
    larger = CostModel(card, replace(model, vocab_size=2 * model.vocab_size)).sampling(rows["sequences"])
    assert (larger.seconds[1:] > rows["latency_s"][1:]).all() and (larger.provenance == Provenance.CALIBRATED).all()
    assert costs.sampling(np.array([0])).seconds[0] == 0
    bare = CostModel(replace(load_cluster("rtx-4090-1"), calibrated_from=None), model).sampling(np.array([1, 64]))
    assert (np.diff(bare.seconds) > 0).all() and (bare.provenance == Provenance.ROOFLINE).all()


def test_element_wise_kernels_are_calibrated_on_the_table_of_the_card() -> None:
    card = load_cluster("rtx-pro-6000-1")
    roofline = CostModel(card, load_model("qwen3-30b-a3b")).roofline
    rows = read_table(card, "stream_llmservingsim")
    assert roofline.launch_s == rows["latency_s"].min() and roofline.provenance is Provenance.CALIBRATED
    assert 0.3 * card.memory.read_Bps < roofline.reached_Bps <= card.memory.read_Bps
