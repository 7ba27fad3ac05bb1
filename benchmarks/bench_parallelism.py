"""Parallelism planner on DeepSeek-V3 and others: CPU seconds, points searched and pruned, the best deployment, the gain of pruning.

Run: `OMP_NUM_THREADS=1 python benchmarks/bench_parallelism.py [--quick]`. Prompts of 4096 and outputs of 1024 tokens, TPOT <= 50 ms; `measured` is a
synthetic lognormal load whose hottest expert is about 6 times the mean, drawn per layer. `exhaustive` measures every point that fits.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moesim.costs import CostModel
from moesim.hardware import load_cluster
from moesim.model import load_model
from moesim.solvers.parallelism import ParallelismResult, Slo, Space, Workload, plan_parallelism

CASES = (
    ("deepseek-v3", "h100-sxm-8x4", "balanced"),
    ("deepseek-v3", "h100-sxm-8x4", "zipf:1.0"),
    ("deepseek-v3", "h100-sxm-8x4", "measured"),
    ("deepseek-v3", "h100-sxm-8x12", "balanced"),
    ("deepseek-v3", "h100-sxm-8x40", "balanced"),
    ("deepseek-v3", "h100-sxm-8x40", "measured"),
    ("qwen3-235b-a22b", "h100-sxm-8x2", "balanced"),
    ("gpt-oss-120b", "h100-sxm-8x2", "balanced"),
)


def run(name: str, hardware: str, routing: str, *, prune: bool = True, space: Space | None = None) -> tuple[ParallelismResult, float]:
    """Return the plan of one case and its CPU seconds."""
    model, cluster = load_model(name), load_cluster(hardware)
    load: str | np.ndarray = routing
    if routing == "measured":
        generator = np.random.Generator(np.random.PCG64(0))
        load = np.round(1e4 * generator.lognormal(0.0, 0.75, (len(model.moe_layer_ids), model.num_experts)))
    work = Workload(prompt_tokens=4096, output_tokens=1024, routing=load)
    began = time.process_time()
    result = plan_parallelism(model, cluster, work, Slo(tpot_ms=50.0), CostModel, prune=prune, space=space)
    return result, time.process_time() - began


def main() -> None:
    """Print one row per case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first case only, without the exhaustive search")
    arguments = parser.parse_args()
    head = f"{'model':16s} {'hardware':14s} {'routing':10s} {'cpu_s':>7s} {'points':>8s} {'memory':>7s} {'rates':>7s} {'even':>7s} {'exact':>7s}"
    print(head + f" {'pairs':>12s} {'tok/s/GPU':>9s} status")
    for name, hardware, routing in CASES[:1] if arguments.quick else CASES:
        result, seconds = run(name, hardware, routing)
        count, best = result.counts, result.best
        print(
            f"{name:16s} {hardware:14s} {routing:10s} {seconds:7.2f} {count.points:8d} {count.memory:7d} {count.rates:7d} {count.pipeline:7d} "
            f"{count.evaluated:7d} {count.pairs:12d} {best.output_tokens_per_s_per_gpu:9.1f} {result.status}\n    {best.label}",
            flush=True,
        )
    if not arguments.quick:
        pruned, fast = run("deepseek-v3", "h100-sxm-8x4", "balanced")
        full, slow = run("deepseek-v3", "h100-sxm-8x4", "balanced", prune=False)
        print(f"exhaustive on 32 H100: {slow:.1f} s against {fast:.1f} s; equal fronts: {full.front == pruned.front}")


if __name__ == "__main__":
    main()
