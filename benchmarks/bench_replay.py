"""Forward passes per second: DeepSeek-V3 (58 MoE layers) on 32 H100, on one core, and the shell's small replay.

The first figure starts from compiled loads (costs, program, engine, ledger); the second compiles the routing too. The baseline
evaluates the same passes one by one instead of side by side.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from moesim.api import trace_shape
from moesim.costs.model import CostModel
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.plan import linear
from moesim.sim.batch import PassShape, pass_shape, stack
from moesim.sim.build import ProgramBuilder
from moesim.sim.evaluate import evaluate
from moesim.sim.ledger import Ledger
from moesim.sim.loads import LoadCompiler, StepLoads
from moesim.sim.settings import Settings
from moesim.traces.open import open_trace
from moesim.traces.steps import StepTokens, iter_steps

PASSES = 64


def best(function, repeats: int = 5, clock=time.process_time) -> float:
    times = []
    for _ in range(repeats):
        began = clock()
        function()
        times.append(clock() - began)
    return min(times)


def shell(command: list[str]) -> float:
    return best(lambda: subprocess.run(command, check=True, capture_output=True), clock=time.perf_counter)


def main() -> None:
    model, cluster = load_model("deepseek-v3"), load_cluster("h100-sxm-8x4")
    plan = linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=cluster.num_ranks)
    for phase, tokens in (("decode", 1024), ("decode", 4096)):
        spec = f"synthetic:zipf:0.8,tokens={tokens},steps={PASSES},phase={phase}"
        trace = open_trace(spec, shape=trace_shape(model))
        steps = list(iter_steps(trace, num_ranks=cluster.num_ranks))
        builder = ProgramBuilder(cluster=cluster, model=model, plan=plan, costs=CostModel(cluster, model), settings=Settings())
        compiler = LoadCompiler(plan, ranks_per_node=cluster.devices_per_node)
        shape = stack([shape_of(step, cluster.num_ranks) for step in steps])
        experts, ranks = np.concatenate([s.experts_TLK for s in steps]), np.concatenate([s.rank_T for s in steps])
        starts = np.cumsum([0, *(len(s.rank_T) for s in steps[:-1])])

        def compile_all() -> StepLoads:
            return compiler.compile(experts_TLK=experts, rank_T=ranks, pass_start_P=starts)  # noqa: B023

        loads = compile_all()

        def together(shape: PassShape = shape, loads: StepLoads = loads, builder: ProgramBuilder = builder) -> None:
            program, _ = builder.build([(shape, loads)], False)
            Ledger(cluster.num_ranks).record(program, evaluate(program, 0.0), steps=list(range(PASSES)), begin_s=0.0)

        def one_by_one(steps: list[StepTokens] = steps, loads: StepLoads = loads, builder: ProgramBuilder = builder) -> None:
            ledger = Ledger(cluster.num_ranks)
            for index, step in enumerate(steps):
                program, _ = builder.build([(shape_of(step, cluster.num_ranks), loads.one(index))], False)
                ledger.record(program, evaluate(program, 0.0), steps=[index], begin_s=0.0)

        fast, slow, compiling = best(together), best(one_by_one, 1), best(compile_all)
        print(
            f"DeepSeek-V3, 32 ranks, {tokens} tokens a pass: {PASSES / fast:,.0f} passes/s on compiled loads ({slow / fast:.1f}x one by one), "
            f"compile {experts.size / compiling / 1e6:,.0f} M entries/s, both {PASSES / (fast + compiling):,.0f} passes/s"
        )
    command = [sys.executable, "-m", "moesim", "replay", "flame-moe-290m", "--model", "flame-moe-290m", "--hardware", "h100-sxm-8", "--json"]
    print(f"small replay from the shell: {shell(command):.2f} s; moesim --help: {shell([*command[:3], '--help']):.3f} s")


def shape_of(step: StepTokens, num_ranks: int) -> PassShape:
    return pass_shape(rank_T=step.rank_T, phase_T=step.phase_T, request_T=step.request_T, position_T=step.position_T, num_ranks=num_ranks)


if __name__ == "__main__":
    main()
