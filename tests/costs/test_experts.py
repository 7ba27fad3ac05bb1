"""Expert time follows tokens per expert and activated experts, and meets the table at balance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.costs import CostModel, Provenance
from moesim.costs.crosscheck import balanced_load
from moesim.hardware import Cluster
from moesim.hardware.tables import read_table
from moesim.model import MoEModel


def seconds(costs: CostModel, load: list[int] | np.ndarray, **options: int) -> float:
    return float(costs.experts(np.asarray(load)[None], **options).seconds[0])  # type: ignore[arg-type]


def test_uniform_rows_under_expert_parallelism_are_reproduced_exactly(h100: Cluster, v3_costs: CostModel) -> None:
    rows = read_table(h100, "wideep_moe_generation_sglang0.5.10", where={"distribution": "uniform"})
    assert len(rows["latency_s"]) > 40
    for tokens, ranks, expected in zip(rows["num_tokens"], rows["moe_ep_size"], rows["latency_s"], strict=True):
        timed = v3_costs.experts(balanced_load(tokens * 8 / ranks, 256 // ranks))
        assert timed.seconds[0] == pytest.approx(expected, rel=1e-12)
        assert timed.provenance[0] == Provenance.MEASURED


@pytest.mark.parametrize("expert_tp", [1, 4])
def test_balanced_rows_of_one_rank_are_reproduced_exactly(h100: Cluster, qwen_costs: CostModel, expert_tp: int) -> None:
    where: dict[str, str | int | float] = {
        "moe_dtype": "bfloat16",
        "hidden_size": 4096,
        "inter_size": 1536,
        "num_experts": 128,
        "topk": 8,
        "moe_ep_size": 1,
        "moe_tp_size": expert_tp,
        "distribution": "balanced",
    }
    rows = read_table(h100, "moe_sglang0.5.14", where=where)
    assert len(rows["latency_s"]) == 27
    for tokens, expected in zip(rows["num_tokens"], rows["latency_s"], strict=True):
        timed = qwen_costs.experts(balanced_load(tokens * 8, 128), expert_tp=expert_tp)
        assert timed.seconds[0] == pytest.approx(expected, rel=1e-12)
        assert timed.provenance[0] == Provenance.MEASURED


def test_prefill_rows_under_expert_parallelism_are_reproduced_with_the_rows_that_come(h100: Cluster, v3_costs: CostModel) -> None:
    rows = read_table(h100, "wideep_moe_context_sglang0.5.10", where={"distribution": "uniform"})
    assert len(rows["latency_s"]) > 60
    for tokens, ranks, expected in zip(rows["num_tokens"], rows["moe_ep_size"], rows["latency_s"], strict=True):
        timed = v3_costs.experts(balanced_load(tokens * 8 / ranks, 256 // ranks), rows=np.array([float(tokens)]))
        assert timed.seconds[0] == pytest.approx(expected, rel=1e-9)


def test_tokens_of_the_prefill_table_are_those_of_all_ranks(h100: Cluster) -> None:
    """Read so, one line in choices and rows explains 4 to 256 ranks; each number of ranks is predicted from the others."""
    rows = read_table(h100, "wideep_moe_context_sglang0.5.10", where={"distribution": "uniform"})
    mine = rows["num_tokens"] >= 32768
    ranks, tokens, seconds = rows["moe_ep_size"][mine], rows["num_tokens"][mine].astype(float), rows["latency_s"][mine]

    def misses(choices: np.ndarray) -> float:
        terms, worst = np.stack([np.ones(len(tokens)), choices, tokens], axis=1), []
        for held in np.unique(ranks):
            there = ranks == held
            fit = np.linalg.lstsq(terms[~there] / seconds[~there, None], np.ones(int((~there).sum())), rcond=None)[0]
            worst.append(np.abs(terms[there] @ fit / seconds[there] - 1).mean())
        return float(np.max(worst))

    assert misses(tokens * 8 / ranks) < 0.08
    assert misses(tokens * 8 / np.sqrt(ranks)) > 0.3


def test_a_row_costs_the_same_however_the_rank_is_loaded(v3_costs: CostModel) -> None:
    load = np.full((1, 8), 512)
    none, some = (float(v3_costs.experts(load, rows=np.array([count])).seconds[0]) for count in (0.0, 1e6))
    assert 4e-3 < some - none < 9e-3, "copies of 7,168 values in and out at the memory's speed: 5-8 ns a row"
    assert none > float(v3_costs.experts(load).seconds[0]), "the copies per choice"


def test_between_keys_interpolated_and_skewed_calibrated(v3_costs: CostModel) -> None:
    load = np.full((3, 8), 24)
    load[1] = [100, 50, 20, 10, 6, 4, 2, 0]
    load[2, 0] = 25
    codes = v3_costs.experts(load).provenance
    assert codes.tolist() == [Provenance.INTERPOLATED, Provenance.CALIBRATED, Provenance.INTERPOLATED]


def test_group_limited_balanced_rows_are_not_believed(h100: Cluster, v3: MoEModel) -> None:
    # At one rank the DeepSeek-V3 rows claim 5.9 TB/s of weights on a 3.35 TB/s memory.
    costs = CostModel(h100, replace(v3, hidden_size=7168), backend="sglang")
    full = seconds(costs, np.ones(256, dtype=np.int64))
    assert 256 * 3 * 7168 * 2048 / full < 3.35e12
    split = seconds(costs, np.ones(256, dtype=np.int64), expert_tp=2)
    assert 256 * 3 * 7168 * 1024 / split < 3.35e12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=8, max_size=8), st.integers(0, 7), st.integers(1, 600))
def test_more_tokens_are_never_cheaper(v3_costs: CostModel, load: list[int], slot: int, more: int) -> None:
    larger = list(load)
    larger[slot] += more
    assert seconds(v3_costs, larger) >= seconds(v3_costs, load) * (1 - 0.02)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 60))
def test_spreading_tokens_over_more_experts_is_never_cheaper(v3_costs: CostModel, active: int, each: int) -> None:
    spread, packed = np.zeros((2, 8), dtype=np.int64)
    spread[:active] = each
    packed[0] = active * each
    assert seconds(v3_costs, spread) >= seconds(v3_costs, packed) * (1 - 0.02)


def test_activated_experts_set_the_time_when_tokens_are_few(qwen_costs: CostModel) -> None:
    wide, narrow = np.zeros((2, 128), dtype=np.int64)
    wide[:64], narrow[:8] = 1, 8
    assert seconds(qwen_costs, wide) > 5 * seconds(qwen_costs, narrow)


def test_balanced_zipf_and_single_loads_differ(v3_costs: CostModel) -> None:
    total = 8 * 512
    weights = 1 / np.arange(1, 9)
    zipf = np.floor(total * weights / weights.sum()).astype(np.int64)
    zipf[0] += total - zipf.sum()
    times = [seconds(v3_costs, load) for load in (np.full(8, 512), zipf, [total] + [0] * 7)]
    assert len({round(value * 1e9) for value in times}) == 3


def test_permuting_slots_and_ranks_permutes_times(v3_costs: CostModel) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    load = rng.integers(0, 300, (3, 32, 9))
    times = v3_costs.experts(load).seconds
    order = rng.permutation(32)
    assert (v3_costs.experts(load[:, order]).seconds == times[:, order]).all()
    assert v3_costs.experts(load[..., ::-1]).seconds == pytest.approx(times, rel=1e-12)


def test_masked_slots_do_not_exist(v3_costs: CostModel) -> None:
    load = np.full((2, 9), 16)
    mask = np.ones((2, 9), dtype=bool)
    mask[0, 8] = False
    timed = v3_costs.experts(load, slot_mask=mask)
    assert timed.seconds[0] == seconds(v3_costs, np.full(8, 16))
    assert timed.provenance.tolist() == [Provenance.MEASURED, Provenance.CALIBRATED]


def test_no_tokens_take_no_time(v3_costs: CostModel, bare: Cluster, v3: MoEModel) -> None:
    for costs in (v3_costs, CostModel(bare, v3)):
        timed = costs.experts(np.array([[0, 0, 0], [0, 1, 0]]))
        assert timed.seconds[0] == 0 and timed.seconds[1] > 0


def test_a_shape_without_rows_is_scaled_by_its_work(h100: Cluster, qwen: MoEModel, qwen_costs: CostModel) -> None:
    doubled = CostModel(h100, replace(qwen, hidden_size=4096, expert_ffn_size=3000))
    law = doubled._experts.law(1)
    assert law.worst == Provenance.CALIBRATED
    load = np.full(128, 512)
    ratio = seconds(doubled, load) / seconds(qwen_costs, load)
    assert 1.5 < ratio < 2.5
    assert doubled.fallbacks["experts"].startswith("moe_sglang0.5.14: moe_dtype=bfloat16, hidden_size=4096, inter_size=3000")


def test_very_long_experts_run_at_a_reachable_rate(v3_costs: CostModel) -> None:
    tokens = np.full(8, 16384)
    flops = tokens.sum() * 6.0 * 7168 * 2048
    assert 0.9e15 < flops / seconds(v3_costs, tokens) < 1.4e15


def test_tokens_beyond_the_lookup_continue_it(v3_costs: CostModel) -> None:
    below, above = seconds(v3_costs, [1 << 16, 0]), seconds(v3_costs, [(1 << 16) + 64, 0])
    assert below < above < below * 1.01
