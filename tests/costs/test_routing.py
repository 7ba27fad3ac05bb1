"""Routing enters every expert time: balanced, skewed and traced loads differ, by about what the tables with and without load balancing show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moesim.costs import CostModel
from moesim.costs.predict import Predictor
from moesim.hardware import Cluster
from moesim.hardware.measured import read_measured
from moesim.model import MoEModel, load_model
from moesim.traces.open import open_trace


@pytest.fixture(scope="module")
def pairs(h100: Cluster) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Time without over time with load balancing, measured and predicted from the tokens that reach the timed rank; and the tokens of the batch."""
    (table,) = read_measured(Path(h100.tables or "") / "wideep_moe_eplb_trtllm1.3.0rc10.parquet")
    rows = table.rows
    predicted, _, reasons, _ = Predictor(h100, "trtllm")(table.kind, rows)
    assert not any(reasons)
    keys: dict[tuple[object, ...], dict[str, int]] = {}
    for i in range(len(predicted)):
        skew = str(rows["distribution"][i]).removesuffix("_eplb")
        key = (*(rows[name][i] for name in ("hidden_size", "num_experts", "num_tokens", "moe_ep_size", "num_slots")), skew)
        keys.setdefault(key, {})[str(rows["op_name"][i])] = i
    both = [(found["wideep_moe"], found["wideep_moe_eplb"], key) for key, found in keys.items() if len(found) == 2 and 8 <= float(str(key[3])) <= 64]
    off, on = np.array([item[0] for item in both]), np.array([item[1] for item in both])
    tokens = rows["num_tokens"][off]
    return rows["latency_s"][off] / rows["latency_s"][on], predicted[off] / predicted[on], tokens


def test_the_gain_of_load_balancing_follows_from_the_rank_loads(pairs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    measured, predicted, tokens = pairs
    large = tokens >= 2048
    assert large.sum() > 100 and np.median(measured[large]) > 1.3
    assert np.median(predicted[large]) == pytest.approx(np.median(measured[large]), rel=0.15)
    assert np.median(np.abs(predicted[large] / measured[large] - 1)) < 0.25
    assert np.corrcoef(np.log(measured[large]), np.log(predicted[large]))[0, 1] > 0.5


def rank_times(costs: CostModel, load: np.ndarray, ranks: int) -> np.ndarray:
    return costs.experts(load.reshape(ranks, -1)).seconds


def test_the_slowest_rank_takes_longer_the_more_skewed_the_routing_is(v3_costs: CostModel, v3: MoEModel) -> None:
    ranks, assignments = 16, 8 * 16384
    times = []
    for skew in (0.0, 0.5, 1.0):
        share = np.arange(1, v3.num_experts + 1) ** -skew
        times.append(rank_times(v3_costs, np.rint(assignments * share / share.sum()).astype(np.int64), ranks))
    worst = [time.max() for time in times]
    assert worst[0] < 1.05 * times[0].mean() and worst[1] > 1.3 * worst[0] and worst[2] > 2 * worst[1]


def test_a_traced_load_lies_between_balanced_and_its_own_worst_order(h100: Cluster) -> None:
    trace = open_trace("flame-moe-290m")
    model = load_model("flame-moe-290m")
    costs = CostModel(h100, model)
    ranks = 8
    load = trace.counts_WLE().sum(axis=0)[0] * 64
    even = np.full(model.num_experts, load.sum() // model.num_experts)
    balanced, traced, sorted_ = (rank_times(costs, item, ranks).max() for item in (even, load, np.sort(load)))
    assert balanced < traced < sorted_


def test_permuting_experts_between_ranks_permutes_the_times(v3_costs: CostModel) -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    load = rng.integers(0, 400, (8, 32))
    order = rng.permutation(8)
    assert np.array_equal(v3_costs.experts(load[order]).seconds, v3_costs.experts(load).seconds[order])
