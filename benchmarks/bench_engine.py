"""Forward passes per second of the engine alone, on prebuilt Programs: what evaluation, contention and Flows cost, on one core (process time).

DeepSeek-V3's 58 MoE layers with attention, dispatch, experts and combine: on 32 ranks side by side; one by one with a migration in the background
all the time; and on 2,048 ranks. Then a ring with interference, and scenarios a second of max-min.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np

from moesim.hardware.load import load_cluster
from moesim.sim.engine import Engine
from moesim.sim.evaluate import evaluate
from moesim.sim.flows import Flow
from moesim.sim.network import Network
from moesim.sim.ops import Program
from moesim.sim.shares import max_min

LAYERS = 58


def program(ranks: int, passes: int | None, seed: int, sm_share: float = 0.0, overlap: bool = False) -> Program:
    """Attention, gate, dispatch, experts, shared experts and combine a layer, with times like those of decode; overlap: two micro-batches."""
    rng = np.random.Generator(np.random.PCG64(seed))
    shape = (ranks,) if passes is None else (passes, ranks)
    result, group = Program(ranks), np.zeros(ranks, dtype=np.int64)
    last: list[list[int]] = [[], []]
    for layer in range(LAYERS):
        for batch in range(2 if overlap else 1):
            attention = result.local("attention", rng.uniform(80e-6, 120e-6, shape), deps=last[batch], layer=layer)
            gate = result.local("gate", rng.uniform(5e-6, 8e-6, shape), deps=[attention], layer=layer)
            out, into = rng.uniform(50e-6, 90e-6, (2, *shape))
            there = result.collective("dispatch", out, into, group_R=group, port="scale_out", deps=[gate], layer=layer)
            experts = result.local("experts", rng.uniform(60e-6, 160e-6, shape), deps=[there], layer=layer)
            shared = result.local("shared_experts", rng.uniform(20e-6, 30e-6, shape), deps=[gate], layer=layer)
            out, into = rng.uniform(80e-6, 150e-6, (2, *shape))
            last[batch] = [result.collective("combine", out, into, group_R=group, port="scale_out", deps=[experts, shared], layer=layer)]
    if sm_share:
        from dataclasses import replace

        result.ops = [replace(op, sm_share=sm_share) if op.group_R is not None else op for op in result.ops]
    return result


def rate(count: int, function: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return count / min(times)


def one_by_one(passes: list[Program], flows: Callable[[], Flow] | None) -> Engine:
    """Run passes one after another; whenever a Flow has arrived, the next one starts."""
    engine = Engine(passes[0].num_ranks)
    serving = True

    def serve() -> Generator[Any, Any, None]:
        nonlocal serving
        for item in passes:
            yield from engine.execute(item)
        serving = False

    def migrate() -> Generator[Any, Any, None]:
        while serving and flows is not None:
            yield engine.start_flow(flows())

    engine.env.process(migrate())
    done = engine.env.process(serve())
    engine.env.run(done)
    return engine


def main() -> None:
    cluster = load_cluster("h100-sxm-8x4")
    network = Network(cluster)
    together = program(32, 64, 0)
    print(f"32 ranks, 64 passes side by side: {rate(64, lambda: evaluate(together, 0.0)):,.0f} passes/s")
    passes = [program(32, None, seed) for seed in range(40)]
    print(f"32 ranks, one by one, no flows: {rate(40, lambda: one_by_one(passes, None)):,.0f} passes/s")
    seconds = float(evaluate(passes[0], 0.0).finish)
    for name, discipline, nbytes in (
        ("a fair migration of many passes", "fair", 50e9 * seconds * 8),
        ("a fair migration of a third of a pass", "fair", 50e9 * seconds / 6),
        ("a low-priority migration", "low", 50e9 * seconds / 3),
    ):
        path = network.path(3, 17)
        engine = one_by_one(passes, lambda: Flow("migration", nbytes, path, discipline))  # noqa: B023
        speed = rate(40, lambda: one_by_one(passes, lambda: Flow("migration", nbytes, path, discipline)))  # noqa: B023
        print(f"32 ranks, one by one, {name}: {speed:,.0f} passes/s ({engine.evaluations / 40:.1f} evaluations a pass)")
    wide = program(2048, None, 0)
    print(f"2,048 ranks, one pass: {rate(1, lambda: evaluate(wide, 0.0)):,.1f} passes/s")
    big = Network(load_cluster("h100-sxm-8x256"))
    path = big.path(3, 1777)
    print(f"2,048 ranks, one by one with a migration: {rate(3, lambda: one_by_one([wide] * 3, lambda: Flow('m', 50e9, path))):,.1f} passes/s")
    busy = program(32, None, 0, sm_share=0.15, overlap=True)
    print(f"32 ranks, two-batch overlap with interference: {rate(1, lambda: evaluate(busy, 0.0)):,.1f} passes/s")
    rng = np.random.Generator(np.random.PCG64(0))
    crosses, capacity = rng.random((200, 400)) < 0.02, rng.uniform(1, 10, 400)
    crosses[np.arange(200), np.arange(200)] = True
    print(f"max-min, 200 flows on 400 ports: {rate(1, lambda: max_min(crosses, capacity)):,.0f} a second")


if __name__ == "__main__":
    main()
