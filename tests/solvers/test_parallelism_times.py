"""Step times: against the simulator's evaluation of the same pass, and the terms that tensor and expert parallelism add."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.costs import CostModel
from moesim.costs.group import Group
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.plan import linear
from moesim.sim.batch import PassShape
from moesim.sim.build import ProgramBuilder
from moesim.sim.evaluate import evaluate
from moesim.sim.loads import LoadCompiler
from moesim.sim.settings import Settings
from moesim.solvers.parallelism import Workload, packed_placement
from moesim.solvers.parallelism.step_time import StepTimer
from moesim.traces.sampling import balanced_TK
from tests.solvers.parallelism_toys import ToyCosts, machine, tiny

WORK = Workload(prompt_tokens=512, output_tokens=256)


def simulated(name: str, hardware: str, tp: int, phase: str, sequences: int) -> float:
    """Return the simulator's time of one balanced pass with `sequences` on every attention replica."""
    cluster, model = load_cluster(hardware), load_model(name)
    ranks = cluster.num_ranks
    each = sequences * (WORK.prompt_tokens if phase == "prefill" else 1) // tp
    generator = np.random.Generator(np.random.PCG64(0))
    chosen = np.stack([balanced_TK(generator, each * ranks, model.num_experts, model.top_k) for _ in model.moe_layer_ids], axis=1).astype(np.uint16)
    plan = linear(model=name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=ranks)
    loads = LoadCompiler(plan, ranks_per_node=cluster.devices_per_node).compile(experts_TLK=chosen, rank_T=np.repeat(np.arange(ranks), each))
    zero, full = np.zeros((1, ranks)), np.full((1, ranks), float(each))
    seqs = np.full((1, ranks), sequences / tp)
    context = np.full((1, ranks), float(WORK.prompt_tokens) if phase == "prefill" else WORK.decode_context)
    shape = PassShape(
        prefill_tokens_PR=full if phase == "prefill" else zero,
        prefill_seqs_PR=seqs if phase == "prefill" else zero,
        prefill_context_PR=context,
        decode_tokens_PR=zero if phase == "prefill" else seqs,
        decode_seqs_PR=zero if phase == "prefill" else seqs,
        decode_context_PR=context,
    )
    builder = ProgramBuilder(cluster=cluster, model=model, plan=plan, costs=CostModel(cluster, model), settings=Settings(attention_tp=tp))
    program, _ = builder.build([(shape, loads)], phase == "prefill")
    return float(np.max(evaluate(program, 0.0).finish))


@pytest.mark.parametrize(
    ("name", "hardware", "tp", "phase", "sequences"),
    [
        ("qwen3-30b-a3b", "h100-sxm-8", 1, "decode", 64),
        ("qwen3-30b-a3b", "h100-sxm-8x2", 1, "decode", 16),
        ("qwen3-30b-a3b", "h100-sxm-8x2", 2, "decode", 64),
        ("qwen3-30b-a3b", "h100-sxm-8x2", 1, "prefill", 1),
        ("qwen3-30b-a3b", "h100-sxm-8", 4, "prefill", 4),
    ],
)
def test_pass_time_is_the_simulators(name: str, hardware: str, tp: int, phase: str, sequences: int) -> None:
    cluster, model = load_cluster(hardware), load_model(name)
    ranks = cluster.num_ranks
    group = Group(tp, ranks // tp, ranks, 1, model.num_experts // ranks)
    timer = StepTimer(model, cluster, WORK, CostModel(cluster, model), packed_placement)
    # The simulator always exchanges; the planner would gather where that is faster.
    timer._gather = lambda group, all_tokens: np.full(len(all_tokens), 1e9)  # type: ignore[method-assign]
    found = float(timer(group, phase, np.array([float(sequences)])).total_n[0])
    assert found == pytest.approx(simulated(name, hardware, tp, phase, sequences), rel=0.03)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_parts_add_up_to_the_pass(phase: str) -> None:
    model = tiny()
    for bandwidth in (1e7, 1e12):
        timer = StepTimer(model, machine(4, 2, bandwidth=bandwidth), WORK, ToyCosts(1), packed_placement)
        for group in (Group(1, 1, 1, 1, 8), Group(2, 2, 4, 1, 2), Group(4, 2, 4, 2, 3), Group(4, 1, 1, 4, 8), Group(1, 8, 2, 4, 4)):
            times = timer(group, phase, np.array([1.0, 4.0, 7.0]))
            np.testing.assert_allclose(sum(times.parts.values()), times.total_n, rtol=1e-9)
            assert (times.layer_nL >= timer.floor(group, phase, np.array([1.0, 4.0, 7.0])).layer_nL).all()
            assert (times.parts["all_reduce"] > 0).all() == (group.tp > 1)
            assert (times.parts["exchange"] > 0).all() == (group.ranks > 1)


def test_skewed_loads_cost_what_the_busiest_rank_adds() -> None:
    cluster, model = load_cluster("h100-sxm-8"), load_model("qwen3-30b-a3b")
    group = Group(1, 8, 8, 1, 16)
    even, skewed = (
        StepTimer(model, cluster, Workload(prompt_tokens=512, output_tokens=256, routing=routing), CostModel(cluster, model), packed_placement)(
            group, "prefill", np.array([4.0])
        ).parts["imbalance"][0]
        for routing in ("balanced", "zipf:1.2")
    )
    assert even == pytest.approx(0.0, abs=1e-9) and skewed > 1e-3
