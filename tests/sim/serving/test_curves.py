"""Tabulated step times against the step model itself, on real tables."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs.group import Group
from moesim.costs.group_loads import capped_LE, linear_placement
from moesim.costs.model import CostModel
from moesim.costs.step import Batch, StepModel
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.sim.serving.curves import Line, StepCurves
from moesim.sim.serving.sequences import Sequence, Work
from moesim.traces.requests.document import Request

BUILT = {
    "h100-sxm-8 llama-3.1-8b": Group(1, 1, 1, 1, 0),
    "h100-sxm-8 qwen3-30b-a3b": Group(2, 2, 4, 1, 32),
    "h100-sxm-8 deepseek-v3": Group(1, 8, 8, 1, 32),
    "rtx-pro-6000-2 qwen3-30b-a3b": Group(1, 2, 2, 1, 64),
}
"""The last one has a table of mixed batches."""


def work(chunks: list[tuple[int, int]], decodes: int, context: float) -> Work:
    found = Work()
    blank = Sequence(Request("x", 0.0, 1, 1), 0.0)
    found.chunks = [(new, end, blank) for new, end in chunks]
    found.decodes, found.contexts = decodes, decodes * context
    return found


@pytest.fixture(scope="module", params=BUILT)
def built(request: pytest.FixtureRequest) -> tuple[StepModel, StepCurves]:
    hardware, name = request.param.split()
    cluster, model = load_cluster(hardware), load_model(name)
    assign = capped_LE(1.0 / np.arange(1.0, model.num_experts + 1)[None] ** 0.5, model.top_k) if model.num_experts else np.zeros((0, 0))
    steps = StepModel(model, cluster, CostModel(cluster, model, backend="vllm"), assign, linear_placement)
    return steps, StepCurves(steps, BUILT[request.param], pp=1, max_tokens=2048, max_seqs=256, max_context=32768)


@pytest.mark.parametrize("seed", range(4))
def test_look_ups_agree_with_the_model(built: tuple[StepModel, StepCurves], seed: int) -> None:
    steps, curves = built
    rng = np.random.default_rng(seed)
    for kind in ("decode", "prefill", "mixed") * 5:
        decodes = int(rng.integers(1, 256)) if kind != "prefill" else 0
        count = int(rng.integers(1, 4)) if kind != "decode" else 0
        new = int(rng.integers(1, (2048 - decodes) // max(count, 1))) if count else 0
        prefix, context = float(rng.integers(0, 8000)) * (rng.random() < 0.5), float(rng.integers(16, 20000))
        batch = Batch(
            prefill_seqs_n=np.array([float(count)]),
            prefill_tokens_n=np.array([float(count * new)]),
            prefill_context_n=np.array([new + prefix]) * (count > 0),
            decode_seqs_n=np.array([float(decodes)]),
            decode_tokens_n=np.array([float(decodes)]),
            decode_context_n=np.array([context]) * (decodes > 0),
        )
        exact = float(steps.times(curves.group, batch).total_n[0])
        one = work([(new, int(new + prefix))] * count, decodes, context)
        assert sum(curves.step([one] * curves.group.dp).stages) == pytest.approx(exact, rel=0.02), (kind, decodes, count, new, prefix, context)


def test_where_it_was_measured_one_kernel_for_both_phases_is_slower_than_one_for_each() -> None:
    cluster, model = load_cluster("rtx-pro-6000-1"), load_model("qwen3-30b-a3b")
    steps = StepModel(model, cluster, CostModel(cluster, model, backend="vllm"), np.full((1, 128), 8 / 128), linear_placement)
    curves = StepCurves(steps, Group(1, 1, 1, 1, 128), pp=1, max_tokens=2048, max_seqs=256, max_context=32768)
    mixed, prompts, decodes = (curves.step([one]).stages[0] for one in (work([(450, 450)], 128, 700.0), work([(450, 450)], 0, 0.0), work([], 128, 700.0)))
    count = np.array([128.0])
    scores = float(steps.costs.attention_core(phase="decode", sequences=count, new_tokens=count, context=np.array([700.0])).seconds[0])
    assert mixed - max(prompts, decodes) > 2 * model.num_layers * scores, "two kernels would add the scores of the decoding sequences once"


def test_stages_share_the_layers() -> None:
    cluster, model = load_cluster("h100-sxm-8"), load_model("llama-3.1-8b")
    steps = StepModel(model, cluster, CostModel(cluster, model, backend="vllm"), np.zeros((0, 0)), linear_placement)
    one, three = (StepCurves(steps, Group(1, 1, 1, 1, 0), pp=pp, max_tokens=64, max_seqs=64, max_context=4096) for pp in (1, 3))
    batch = work([], 32, 1000.0)
    time = three.step([batch])
    assert time.hop > 0 and sum(time.stages) == pytest.approx(one.step([batch]).stages[0]) and three.share == [11 / 32, 11 / 32, 10 / 32]


def test_skewed_routing_costs_more_than_even() -> None:
    cluster, model = load_cluster("h100-sxm-8"), load_model("qwen3-30b-a3b")
    group = Group(1, 8, 8, 1, 16)
    found = []
    for exponent in (0.0, 0.6, 1.2):
        assign = capped_LE(1.0 / np.arange(1.0, 129.0)[None] ** exponent, 8)
        steps = StepModel(model, cluster, CostModel(cluster, model, backend="vllm"), assign, linear_placement, draw_seed=1)
        curves = StepCurves(steps, group, pp=1, max_tokens=512, max_seqs=256, max_context=8192)
        time = curves.step([work([], 256, 2000.0)] * 8)
        found.append(time.exchange + time.experts)
    assert found[0] < 0.9 * found[1] < 0.81 * found[2]


def test_a_line_goes_through_its_points() -> None:
    line = Line(np.array([1.0, 2.0, 4.0]), np.array([3.0, 5.0, 6.0]))
    assert [line(x) for x in (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)] == [3.0, 3.0, 4.0, 5.0, 5.5, 6.0, 7.0]
