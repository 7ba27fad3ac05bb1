"""GEMM and attention: rows of the tables, blends between them, rooflines without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.costs import CostModel, Provenance
from moesim.costs.group import Group
from moesim.costs.group_loads import linear_placement
from moesim.costs.step import StepModel
from moesim.costs.tables import Rows, Tables
from moesim.errors import CostError
from moesim.hardware import Cluster, load_cluster
from moesim.hardware.tables import read_table
from moesim.model import MoEModel, load_model


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "fp8_block"])
def test_gemm_rows_are_reproduced_exactly(h100: Cluster, v3_costs: CostModel, dtype: str) -> None:
    for n, k in ((7168, 2048), (512, 16384), (65536, 128)):
        rows = read_table(h100, "gemm_sglang0.5.14", where={"gemm_dtype": dtype, "n": n, "k": k})
        timed = v3_costs.gemm("test", rows["m"], n, k, dtype)
        assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.MEASURED).all()


def test_gemm_between_and_beyond_the_grid(v3_costs: CostModel) -> None:
    m = np.array([0, 100, 4096])
    inside, beyond = v3_costs.gemm("test", m, 2112, 7168, "bfloat16"), v3_costs.gemm("test", m, 131072, 7168, "bfloat16")
    low, high = (v3_costs.gemm("test", m, n, 7168, "bfloat16").seconds for n in (2048, 2560))
    assert inside.seconds[0] == 0 and (np.minimum(low, high) <= inside.seconds).all() and (inside.seconds <= np.maximum(low, high)).all()
    assert inside.provenance.tolist() == [0, Provenance.INTERPOLATED, Provenance.INTERPOLATED] and beyond.provenance[1] == Provenance.CALIBRATED
    assert beyond.seconds == pytest.approx(2 * v3_costs.gemm("test", m, 65536, 7168, "bfloat16").seconds)


def test_gqa_decode_kernel_rows_are_reproduced_exactly(h100: Cluster, qwen_costs: CostModel) -> None:
    where: dict[str, str | int | float] = {"num_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "kv_cache_dtype": "bfloat16", "window_size": 0}
    rows = read_table(h100, "attn_generation_sglang0.5.14", where=where)
    batch, length = rows["batch_size"].astype(float), rows["step"] + 1.0
    timed = qwen_costs._attention.core("decode", batch, batch, length, heads=64, kv_heads=4, head_dim=128)
    assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.MEASURED).all()


def test_gqa_prefill_kernel_rows_are_reproduced_exactly(h100: Cluster, qwen_costs: CostModel) -> None:
    where: dict[str, str | int | float] = {
        "num_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "kv_cache_dtype": "bfloat16",
        "window_size": 0,
        "attn_dtype": "bfloat16",
    }
    rows = read_table(h100, "attn_context_sglang0.5.14", where=where)
    batch, length = rows["batch_size"].astype(float), rows["isl"].astype(float)
    timed = qwen_costs._attention.core("prefill", batch, batch * length, length, heads=64, kv_heads=4, head_dim=128)
    assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.MEASURED).all()


@pytest.mark.parametrize(("phase", "stem"), [("prefill", "wideep_mla_context_sglang0.5.10"), ("decode", "wideep_mla_generation_sglang0.5.10")])
def test_deepseek_v3_blocks_are_the_tables_plus_the_norm(h100: Cluster, v3: MoEModel, phase: str, stem: str) -> None:
    costs = CostModel(h100, replace(v3, kv_dtype="fp8"))
    rows = read_table(h100, stem, where={"num_heads": 128, "kernel_source": "fa3"})
    batch, length = rows["batch_size"], rows["isl"]
    tokens = batch * length if phase == "prefill" else batch
    timed = costs.attention(phase=phase, sequences=batch, new_tokens=tokens, context=length)
    norm = costs.roofline.stream("norm", 3.0 * tokens * 7168 * 2).seconds
    assert timed.seconds - norm == pytest.approx(rows["latency_s"], rel=1e-9)
    assert (timed.provenance == Provenance.MEASURED).mean() > 0.9


def test_scores_of_prompts_in_bf16_take_longer_than_the_fp8_block_by_what_attention_kernels_do(h100: Cluster, v3: MoEModel) -> None:
    length = np.array([1024.0, 2048.0, 4096.0, 8192.0])
    tokens = np.full(4, 16384.0)

    def seconds(kv_dtype: str) -> np.ndarray:
        costs = CostModel(h100, replace(v3, kv_dtype=kv_dtype))
        return costs.attention(phase="prefill", sequences=tokens / length, new_tokens=tokens, context=length).seconds

    more = seconds("bfloat16") - seconds("fp8")
    assert more[1:] / more[:-1] == pytest.approx(2.0, rel=0.02), "as the scores: with the length"
    # Kernels of another source on the same die compute the scores of one prompt of 8192 tokens in 4.54 ms (tables/h800-sxm, mla_expanded).
    block = CostModel(h100, v3)._attention._block("prefill", 128)
    assert block is not None and 8192.0**2 / 2 * block.pair_s == pytest.approx(4.54e-3, rel=0.12)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-235b-a22b", "deepseek-v2-lite", "gpt-oss-120b", "flame-moe-290m"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_attention_grows_with_tokens_and_context_and_shrinks_with_tp(h100: Cluster, name: str, phase: str) -> None:
    costs = CostModel(h100, load_model(name))
    batch = np.array([0, 16, 64, 128])
    tokens = batch * (512 if phase == "prefill" else 1)
    short, long = (costs.attention(phase=phase, sequences=batch, new_tokens=tokens, context=np.full(4, length)) for length in (1024, 16384))
    assert short.seconds[0] == 0 and (np.diff(short.seconds) > 0).all() and (long.seconds[1:] > short.seconds[1:]).all()
    assert (costs.attention(phase=phase, sequences=batch, new_tokens=tokens, context=np.full(4, 16384), tp=2).seconds[1:] < long.seconds[1:]).all()


@pytest.mark.parametrize(("phase", "neighbour"), [("decode", (32, 4)), ("prefill", (16, 8))])
def test_another_shape_scales_what_is_beyond_the_smallest_call(h100: Cluster, monkeypatch: pytest.MonkeyPatch, phase: str, neighbour: tuple[int, int]) -> None:
    kind, length = ("attn_generation", "step") if phase == "decode" else ("attn_context", "isl")
    held = {"num_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "window_size": 0}
    where: dict[str, str | int | float] = {**held, "kv_cache_dtype": "bfloat16", "attn_dtype": "bfloat16"}
    rows = read_table(h100, f"{kind}_sglang0.5.14", where=where)
    batch, tokens = rows["batch_size"].astype(float), rows["batch_size"] * (1.0 if phase == "decode" else rows[length])
    shape = {"heads": 32, "kv_heads": 8, "head_dim": 128}
    read = Tables.rows

    def without(self: Tables, *names: str, **options: Any) -> Rows | None:
        found = read(self, *names, **options)
        if found is None or "num_key_value_heads" not in found:
            return found
        keep = (found["num_heads"] == neighbour[0]) & (found["num_key_value_heads"] == neighbour[1]) & (found["head_dim"] == 128)
        return Rows({name: values[keep] for name, values in found.items()})

    monkeypatch.setattr(Tables, "rows", without)
    costs = CostModel(h100, load_model("qwen3-235b-a22b"))
    timed = costs._attention.core(phase, batch, tokens, rows[length] + (phase == "decode"), **shape)
    assert (timed.provenance == Provenance.CALIBRATED).all()
    assert np.median(np.abs(timed.seconds / rows["latency_s"] - 1)) < 0.1


def test_a_cached_prefix_costs_less_than_computing_it(qwen_costs: CostModel, v3_costs: CostModel) -> None:
    for costs in (qwen_costs, v3_costs):
        whole, tail, alone = (
            costs.attention(phase="prefill", sequences=np.array([1]), new_tokens=np.array([new]), context=np.array([context])).seconds[0]
            for new, context in ((16384, 16384), (4096, 16384), (4096, 4096))
        )
        assert alone < tail < whole


def test_chunks_of_a_prompt_add_up_to_the_prompt(qwen_costs: CostModel) -> None:
    core = qwen_costs._attention.core
    one, chunk = np.array([1.0]), np.array([4096.0])
    whole = core("prefill", one, 4 * chunk, 4 * chunk, heads=64, kv_heads=4, head_dim=128).seconds[0]
    parts = sum(core("prefill", one, chunk, (i + 1) * chunk, heads=64, kv_heads=4, head_dim=128).seconds[0] for i in range(4))
    assert parts == pytest.approx(whole, rel=0.1)


def test_windowed_layers_stop_growing_with_context(h100: Cluster) -> None:
    costs = CostModel(h100, load_model("gpt-oss-120b"))
    core = costs._attention.core
    batch, lengths = np.full(2, 64.0), np.array([8192.0, 65536.0])
    window = core("decode", batch, batch, lengths, heads=64, kv_heads=8, head_dim=64, window=128).seconds
    full = core("decode", batch, batch, lengths, heads=64, kv_heads=8, head_dim=64).seconds
    assert window[1] < 1.5 * window[0] and full[1] > 3 * full[0] and full[1] > 5 * window[1]


def test_arrays_broadcast(qwen_costs: CostModel) -> None:
    timed = qwen_costs.attention(phase="decode", sequences=np.arange(6).reshape(2, 3), new_tokens=np.arange(6).reshape(2, 3), context=np.array(100))
    assert timed.seconds.shape == timed.provenance.shape == (2, 3)


def test_tp_must_divide_the_heads(qwen_costs: CostModel) -> None:
    with pytest.raises(CostError, match="tp = 3 must divide the 64 heads"):
        qwen_costs.attention(phase="decode", sequences=np.ones(1), new_tokens=np.ones(1), context=np.ones(1), tp=3)


@pytest.mark.parametrize("name", ["deepseek-v3", "olmoe-1b-7b"])
def test_dense_operators_are_zero_at_zero_and_grow(h100: Cluster, bare: Cluster, name: str) -> None:
    model = load_model(name)
    tokens = np.array([0, 128, 4096, 16384])
    for cluster in (h100, bare):
        costs = CostModel(cluster, model)
        for call in (costs.gate, costs.shared_experts, costs.dense_ffn, costs.head, costs.embedding):
            seconds = call(tokens).seconds
            assert seconds[0] == 0 and ((np.diff(seconds) > 0).all() or not seconds.any())


def test_without_tables_twice_the_memory_and_flops_are_never_slower(bare: Cluster, v3: MoEModel) -> None:
    tier = bare.tiers["hbm"]
    faster = (
        replace(bare, tiers={**bare.tiers, "hbm": replace(tier, read_Bps=2 * tier.read_Bps)}),
        replace(bare, device=replace(bare.device, peak_flops={name: 2 * value for name, value in bare.device.peak_flops.items()})),
    )
    tokens = np.array([1, 100, 10000])

    def every(cluster: Cluster) -> np.ndarray:
        costs = CostModel(cluster, v3)
        parts = [call(tokens).seconds for call in (costs.gate, costs.shared_experts, costs.dense_ffn, costs.head, costs.embedding)]
        parts += [costs.attention(phase=phase, sequences=tokens, new_tokens=tokens, context=tokens + 999).seconds for phase in ("prefill", "decode")]
        return np.concatenate([*parts, costs.experts(np.repeat(tokens[:, None], 8, axis=1)).seconds])

    base = every(bare)
    for cluster in faster:
        assert (every(cluster) <= base * (1 + 1e-12)).all() and (every(cluster) < 0.9 * base).any()


def test_a_gemm_without_tables_is_the_roofline(bare: Cluster, v3: MoEModel) -> None:
    costs = CostModel(bare, v3)
    device = bare.device
    timed = costs.gemm("test", np.array([1, 8192]), 8192, 8192, "bfloat16")
    expected = [8192 * 8192 * 2 / (3.35e12 * device.memory_efficiency), 2 * 8192**3 / (device.peak_flops["bfloat16"] * device.gemm_efficiency)]
    assert timed.seconds - device.kernel_launch_s == pytest.approx(expected, rel=0.01)
    assert (timed.provenance == Provenance.ROOFLINE).all()


@pytest.mark.parametrize(
    ("hardware", "best"), [("laptop-1", Provenance.ROOFLINE), ("rtx-4090-8", Provenance.EXTRAPOLATED), ("l40s-8x2", Provenance.EXTRAPOLATED)]
)
def test_every_operator_works_on_devices_without_tables(hardware: str, best: Provenance) -> None:
    costs = CostModel(load_cluster(hardware), load_model("olmoe-1b-7b"))
    tokens = np.array([1, 77])
    timings = [call(tokens) for call in (costs.gate, costs.head, costs.embedding)]
    timings += [costs.attention(phase=phase, sequences=tokens, new_tokens=tokens, context=tokens) for phase in ("prefill", "decode")]
    experts = costs.experts(np.ones((2, 8), dtype=np.int64))
    assert (experts.provenance == Provenance.ROOFLINE).all(), "no donor of theirs has a table of whole layers"
    for timed in (*timings, experts):
        assert (timed.seconds > 0).all() and np.isfinite(timed.seconds).all()
    assert all((timed.provenance == best).all() for timed in timings)


def test_prompts_over_an_eight_bit_cache_are_timed_by_kernels_that_compute_in_eight_bits(h100: Cluster) -> None:
    """Rows of other heads that keep 16 bits for scores are no stand-in for those of these heads."""
    where: dict[str, str | int | float] = {"num_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "window_size": 0, "kv_cache_dtype": "fp8"}
    rows = read_table(h100, "attn_context_sglang0.5.14", where={**where, "attn_dtype": "fp8"})
    costs = CostModel(h100, replace(load_model("qwen3-32b"), kv_dtype="fp8"))
    batch, length = rows["batch_size"].astype(float), rows["isl"].astype(float)
    timed = costs.attention_core(phase="prefill", sequences=batch, new_tokens=batch * length, context=length)
    assert (timed.seconds == rows["latency_s"]).all() and (timed.provenance == Provenance.MEASURED).all()


@pytest.mark.parametrize("all2all", ["gather", "exchange"])
def test_ranks_that_only_gather_route_all_tokens_and_split_shared_experts(h100: Cluster, v3: MoEModel, all2all: str) -> None:
    """Where tokens are dealt to tp ranks for an exchange each routes its part, and has shared experts whole."""
    costs, tokens = CostModel(h100, v3), np.array([512.0])
    even = np.full((1, 256), 8 / 256)
    steps = StepModel(v3, h100, costs, even, linear_placement, all2all=all2all)
    found = steps.by_tokens(Group(8, 1, 8, 1, 32), tokens)
    gathers = all2all == "gather"
    assert found.gate_n == pytest.approx(costs.gate(tokens if gathers else tokens / 8).seconds)
    shared = costs.shared_experts(tokens, tp=8) if gathers else costs.shared_experts(tokens / 8)
    assert found.shared_n == pytest.approx(shared.seconds)
    # One shard per expert leaves nothing to exchange, whatever the setting.
    assert steps.by_tokens(Group(8, 1, 1, 8, 256), tokens).gate_n == pytest.approx(costs.gate(tokens).seconds)
