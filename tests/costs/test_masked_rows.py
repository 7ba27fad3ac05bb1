"""Choices of other ranks' experts: kernel times of one of two ranks, published by casys-kaist/LLMServingSim, as a holdout that no table here was made from.

Source of the times: profiler/perf/RTXPRO6000/Qwen/Qwen3-30B-A3B-Instruct-2507/bf16/tp1/moe_components (vLLM 0.28, its Triton experts, 64 of 128 experts
local, graphs; kernel times summed), rows of 0 and of 64 active local experts.
"""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs.group import Group
from moesim.costs.group_loads import linear_placement
from moesim.costs.masked_rows import moved_bytes
from moesim.costs.model import CostModel
from moesim.costs.step import StepModel
from moesim.hardware.load import load_cluster
from moesim.model import load_model

CLUSTER, MODEL = load_cluster("rtx-pro-6000-2"), load_model("qwen3-30b-a3b")
ALL_MASKED_US = {1: 13.024, 256: 23.52, 512: 31.488, 1024: 51.297, 1448: 62.946, 2048: 83.522, 2896: 123.296, 4096: 228.576}
"""Tokens, none of whose choices lie on the rank → microseconds."""
HALF_MASKED_US = {256: 445.613, 512: 473.5335, 1024: 521.423, 2048: 590.8095, 4096: 783.6}
"""Tokens, half of whose choices lie on the rank, evenly over its 64 experts → microseconds."""


def test_a_rank_without_choices_takes_the_time_of_its_rows() -> None:
    costs, tokens = CostModel(CLUSTER, MODEL, backend="vllm"), np.array([*ALL_MASKED_US][1:], dtype=np.float64)
    rows = tokens * MODEL.top_k
    moved = moved_bytes(rows, rows, hidden=MODEL.hidden_size, width=MODEL.expert_ffn_size, gated=True, element=2, cache=costs.roofline.l2_bytes)
    measured = (np.array([*ALL_MASKED_US.values()][1:]) - ALL_MASKED_US[1]) * 1e-6
    assert np.abs(moved / costs.roofline.reached_Bps / measured - 1).max() < 0.15


def test_experts_of_one_of_two_ranks_take_what_was_measured() -> None:
    costs, tokens = CostModel(CLUSTER, MODEL, backend="vllm"), np.array([*HALF_MASKED_US], dtype=np.int64)
    own = costs.experts(np.repeat(tokens[:, None, None] * MODEL.top_k // 128, 64, axis=2)).seconds[:, 0]
    measured = np.array([*HALF_MASKED_US.values()]) * 1e-6
    with_masked = (own + costs.masked_rows(tokens, 2)) / measured - 1
    assert np.abs(with_masked).max() < 0.05 and np.abs(with_masked).mean() < 0.02
    assert (own / measured - 1)[-1] < -0.1, "without them the largest batch is far too fast"


def test_bytes_by_hand() -> None:
    """Two rows masked of four: 3 elements written per row of width 1 and hidden 5 → 3 + 5; read where four rows are more than the cache holds."""
    for cache, read in ((41.0, 0), (40.0, 5), (16.0, 7)):
        moved = moved_bytes(np.array([4.0]), np.array([2.0]), hidden=5, width=1, gated=True, element=2, cache=cache)
        assert moved.tolist() == [2 * 2 * (8 + read)]


def steps_of(all2all: str, backend: str = "vllm") -> StepModel:
    return StepModel(MODEL, CLUSTER, CostModel(CLUSTER, MODEL, backend=backend), np.full((1, 128), 8 / 128), linear_placement, all2all=all2all)


def test_steps_that_gather_pay_for_them_and_those_that_exchange_do_not() -> None:
    group, tokens = Group(1, 2, 2, 1, 64), np.array([578.0])
    for all2all in ("gather", "exchange"):
        steps = steps_of(all2all)
        found = steps.moe(group, "prefill", tokens)
        rows = np.array([round(578 * 2 * 8 / 128)] * 64)[None, None]
        more = found["experts"][0, 0] / steps.costs.experts(rows).seconds[0, 0] - 1
        masked = steps.costs.masked_rows(tokens * 2, 2)[0]
        assert masked > 20e-6 and more == pytest.approx(masked / steps.costs.experts(rows).seconds[0, 0] if all2all == "gather" else 0.0, abs=0.01)
        assert found["total"] == pytest.approx(found["exchange"] + found["experts"] + found["imbalance"])


def test_only_kernels_that_handle_them_pay() -> None:
    tokens = np.array([1000.0])
    assert CostModel(CLUSTER, MODEL, backend="vllm").masked_rows(tokens, 1)[0] == 0, "one rank has all experts"
    assert CostModel(CLUSTER, MODEL, backend="trtllm").masked_rows(tokens, 2)[0] == 0
    assert CostModel(CLUSTER, load_model("deepseek-v3"), backend="vllm").masked_rows(tokens, 2)[0] == 0
