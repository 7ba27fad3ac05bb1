"""Placement solvers on synthetic loads of DeepSeek-V3 size: value, certified bound, gap and CPU seconds per solver and instance.

Run: `OMP_NUM_THREADS=1 python benchmarks/bench_solvers.py [--quick] [--layers 58]`. Loads are synthetic: Zipf with exponents 0.6, 1.0
and 1.2, and a lognormal whose hottest expert is about 6 times the mean, each layer shuffled or drawn on its own. `eplb-loop` is a
direct, one-decision-at-a-time rendering of EPLB, the shape of planner that engines run; it is timed beside the vectorised one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.result import PlacementResult, make_result

EXPERTS = 256
SHAPES = ((32, 288), (64, 320), (144, 288), (32, 256))
"""Ranks and slots."""
SOLVERS = ("greedy", "eplb", "eplb-global", "eplb-zigzag", "linear")


def loads(kind: str, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Return [L, E] loads of a kind: `zipf:EXPONENT` or `lognormal`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    if kind == "lognormal":
        weight = generator.lognormal(0.0, 0.75, (layers, experts))
    else:
        weight = np.stack([generator.permutation(1 / np.arange(1, experts + 1) ** float(kind.partition(":")[2])) for _ in range(layers)])
    return np.round(weight / weight.sum(axis=1, keepdims=True) * 1e6)


def loop_pack(weight: list[float], packs: int) -> list[list[int]]:
    """Deal items by falling weight to the lightest pack with room."""
    held: list[list[int]] = [[] for _ in range(packs)]
    total = [0.0] * packs
    for item in sorted(range(len(weight)), key=lambda one: -weight[one]):
        pack = min((one for one in range(packs) if len(held[one]) < len(weight) // packs), key=total.__getitem__)
        held[pack].append(item)
        total[pack] += weight[item]
    return held


def loop_eplb(problem: PlacementProblem) -> PlacementResult:
    """Plan layer by layer with plain loops: copies, then packing (EPLB's global form)."""
    rows = []
    for load in problem.load_KLE[0].tolist():
        count = [1] * len(load)
        copies = list(range(len(load)))
        for _ in range(problem.num_slots - len(load)):
            most = max(range(len(load)), key=lambda one: load[one] / count[one])
            count[most] += 1
            copies.append(most)
        packs = loop_pack([load[one] / count[one] for one in copies], problem.num_ranks)
        rows.append([copies[item] for pack in packs for item in pack])
    return make_result(problem, np.array(rows), solver="eplb-loop", status="BASELINE")


def report(instance: str, result: PlacementResult, seconds: float) -> None:
    """Print one row."""
    print(f"{instance:34s} {result.solver:12s} {result.value:8.5f} {result.bound:8.5f} {result.gap:9.5f} {result.status:10s} {seconds:8.3f}", flush=True)


def timed(problem: PlacementProblem, solver: str) -> tuple[PlacementResult, float]:
    """Return a solver's checked result and its CPU seconds."""
    began = time.process_time()
    result = loop_eplb(problem) if solver == "eplb-loop" else solve(problem, solver)
    return result, time.process_time() - began


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--quick", action="store_true", help="8 layers, one load, no exact solvers")
    arguments = parser.parse_args()
    layers = 8 if arguments.quick else arguments.layers
    kinds = ("lognormal",) if arguments.quick else ("zipf:0.6", "zipf:1.0", "zipf:1.2", "lognormal")
    print(f"{'instance':34s} {'solver':12s} {'value':>8s} {'bound':>8s} {'gap':>9s} {'status':10s} {'seconds':>8s}")
    for ranks, slots in SHAPES:
        for kind in kinds:
            problem = PlacementProblem(
                load_KLE=loads(kind, layers, EXPERTS), num_ranks=ranks, slots_per_rank_R=np.array(slots // ranks), ranks_per_node=8, num_groups=8
            )
            for solver in (*SOLVERS, "eplb-loop"):
                report(f"{kind} {layers}x{EXPERTS}x{slots} on {ranks}", *timed(problem, solver))
    windows = np.stack([loads("lognormal", layers, EXPERTS, seed) * 0.3 + loads("lognormal", layers, EXPERTS, 99) for seed in range(4)])
    problem = PlacementProblem(load_KLE=windows, num_ranks=32, slots_per_rank_R=np.array(9))
    report(f"4 windows {layers}x{EXPERTS}x288 on 32", *timed(problem, "greedy"))
    running = solve(PlacementProblem(load_KLE=windows[0], num_ranks=32, slots_per_rank_R=np.array(9))).slot_to_expert_LS
    for share in (0.0, 0.01, 0.055, 0.11):
        moved = PlacementProblem(load_KLE=windows[1], num_ranks=32, slots_per_rank_R=np.array(9), previous=running, move_budget_slots=int(share * running.size))
        report(f"drifted, {share:.1%} of the slots may move", *timed(moved, "repair"))
    if not arguments.quick:
        for kind in ("zipf:0.6", "zipf:1.0", "lognormal"):
            small = PlacementProblem(load_KLE=loads(kind, 2, 8), num_ranks=4, slots_per_rank_R=np.array(3))
            for solver in ("greedy", "milp", "cp-sat"):
                report(f"{kind} 2x8x12 on 4", *timed(small, solver))


if __name__ == "__main__":
    main()
