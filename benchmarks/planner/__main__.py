"""Placement solvers on known loads, and the robust planner on windows that it never saw.

Run: `OMP_NUM_THREADS=1 python benchmarks/planner [--layers 8] [--experts 128] [--held-out] [--seed 0] [--decode] [--eplb PATH]`.
The first table scores solvers on the load they planned for: value, certified bound's gap, CPU seconds, bytes moved from linear
placement (all slots that differ; no rank is relabelled). `--held-out` scores plans on windows not passed in: robust against greedy on
the mean, on the last and on the best single window (chosen in hindsight). `--decode` compares activated experts. `--eplb PATH` also runs
the `rebalance_experts` of a checkout's eplb.py, in a process of its own. Synthetic loads are seeded; FLAME and OLMoE are the traces
that ship with the package.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers import metrics
from moesim.solvers.activation import activated_L, serve_once_LS
from moesim.solvers.objective import Decode, Objective
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.recount import recount
from moesim.solvers.registry import solve
from moesim.solvers.result import ObjectiveResult, make_result
from moesim.solvers.robust import RobustResult
from moesim.traces.open import open_trace

SOLVERS = ("greedy", "robust", "descent", "eplb", "eplb-global", "eplb-zigzag", "linear", "round_robin", "random")
EXPERT_BYTES = 44_040_192
"""Weights of one routed expert of DeepSeek-V3 in FP8; the same for every instance, so that moves compare."""
CHILD = """
import importlib.util, json, sys, time
import torch
spec = importlib.util.spec_from_file_location("user_eplb", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
job = json.load(sys.stdin)
began = time.process_time()
table = module.rebalance_experts(torch.tensor(job["load"]), job["slots"], job["groups"], job["nodes"], job["ranks"])[0]
print("\\n" + json.dumps({"table": table.tolist(), "seconds": time.process_time() - began}))
"""
Split = tuple[str, np.ndarray, np.ndarray, int, int]
"""Name, windows given [K, L, E], windows held out, ranks, slots per rank."""


def generator(seed: int) -> np.random.Generator:
    """Return a seeded generator."""
    return np.random.Generator(np.random.PCG64(seed))


def zipf(layers: int, experts: int, exponent: float) -> np.ndarray:
    """Return [L, E] Zipf loads, shuffled per layer."""
    draw = generator(0)
    return np.stack([draw.permutation(1e6 / np.arange(1, experts + 1) ** exponent) for _ in range(layers)])


def topics(windows: int, layers: int, experts: int, *, concentration: float, seed: int) -> np.ndarray:
    """Return [K, L, E] Poisson counts of windows that mix six topics in Dirichlet proportions."""
    draw = generator(seed)
    base = draw.lognormal(0, 0.9, (6, layers, experts))
    mix = draw.dirichlet(np.full(6, concentration), windows)
    return draw.poisson(1e6 * np.einsum("kt,tle->kle", mix, base / base.sum(axis=2, keepdims=True))).astype(np.float64)


def drift(windows: int, layers: int, experts: int, *, step: float, seed: int) -> np.ndarray:
    """Return [K, L, E] loads whose logarithms walk at random around 0."""
    draw = generator(seed)
    log, loads = draw.normal(0, 0.75, (layers, experts)), []
    for _ in range(windows):
        loads.append(1e4 * np.exp(log))
        log = log * np.sqrt(1 - (step / 0.75) ** 2) + draw.normal(0, step, log.shape)
    return np.stack(loads)


def regimes(windows: int, layers: int, experts: int, *, count: int, seed: int) -> np.ndarray:
    """Return [K, L, E] loads of regimes that take turns, with 15 % noise."""
    draw = generator(seed)
    base = draw.lognormal(0, 0.75, (count, layers, experts))
    return np.stack([1e4 * base[k % count] * draw.lognormal(0, 0.15, (layers, experts)) for k in range(windows)])


def splits(layers: int, experts: int, first: int) -> list[Split]:
    """Return the held-out instances."""
    olmoe = open_trace("olmoe-1b-7b-counts").counts_WLE().astype(np.float64)
    result: list[Split] = [(f"olmoe without domain {k}", np.delete(olmoe, k, axis=0), olmoe[[k]], 8, 10) for k in range(len(olmoe))]
    ranks = experts // 8
    for step, seed in ((0.1, 1), (0.3, 2), (0.5, 3)):
        load = drift(8, layers, experts, step=step, seed=first + seed)
        result.append((f"drift {step}", load[:6], load[6:], ranks, 9))
    for concentration, seed in ((0.4, 3), (1.5, 4)):
        load = topics(10, layers, experts, concentration=concentration, seed=first + seed)
        result.append((f"topics {concentration}", load[:6], load[6:], ranks, 9))
    for count, seed in ((2, 5), (3, 6)):
        load = regimes(6 + 2 * count, layers, experts, count=count, seed=first + seed)
        result.append((f"{count} regimes", load[:6], load[6:], ranks, 9))
    return result


def balance_on(problem: PlacementProblem, table_LS: np.ndarray, load_KLE: np.ndarray) -> float:
    """Return the mean balance of a placement over other windows."""
    peak = metrics.rank_time_KLR(table_LS, problem.slot_rank_S, load_KLE, problem.speed_R).max(axis=2)
    return float((1 / metrics.imbalance_K(peak, metrics.ideal_KL(load_KLE, problem.speed_R))).mean())


def user_eplb(path: Path, problem: PlacementProblem) -> tuple[np.ndarray, float]:
    """Return the placement [L, S] and CPU seconds of a user's EPLB."""
    if not path.is_file():
        raise InputError(describe("--eplb", "path", str(path), "must be a checkout that holds eplb.py, or that file"))
    load = (problem.load_KLE * problem.weight_K[:, None, None]).sum(axis=0)
    job = {"load": load.tolist(), "slots": problem.num_slots, "groups": problem.num_groups, "nodes": problem.num_nodes, "ranks": problem.num_ranks}
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], input=json.dumps(job), capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise InputError(f"{path}: rebalance_experts failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    table, shape = np.array(answer["table"]), (problem.num_layers, problem.num_slots)
    if table.shape != shape or table.dtype.kind not in "iu" or table.min() < 0 or table.max() >= problem.num_experts:
        rule = f"must be integers {shape}, experts in 0..{problem.num_experts - 1}"
        raise InputError(describe(str(path), "rebalance_experts()[0]", f"{table.dtype} {table.shape}", rule))
    absent = [(layer, expert) for layer, row in enumerate(table) for expert in np.setdiff1d(np.arange(problem.num_experts), row)]
    if absent:
        raise InputError(f"{path}: rebalance_experts gives expert {absent[0][1]} no slot in layer {absent[0][0]} ({len(absent)} missing in all)")
    return table, float(answer["seconds"])


def known(layers: int, experts: int, eplb: Path | None) -> None:
    """Print solvers on the loads they planned for."""
    flame = open_trace("flame-moe-290m").counts_WLE("all").astype(np.float64)
    instances = [(f"zipf {exponent}", zipf(layers, experts, exponent)[None], experts // 8, 9) for exponent in (0.6, 1.0, 1.2)]
    instances += [("flame", flame, 8, flame.shape[2] // 8 + 1), ("olmoe, 6 domains", open_trace("olmoe-1b-7b-counts").counts_WLE().astype(np.float64), 8, 10)]
    instances.append(("topics, 6 windows", topics(6, layers, experts, concentration=0.4, seed=3), experts // 8, 9))
    print(f"{'instance':22s} {'solver':12s} {'value':>8s} {'gap':>8s} {'status':10s} {'cpu s':>7s} {'GB moved':>9s}")
    for name, load, ranks, slots in instances:
        problem = PlacementProblem(load_KLE=load, num_ranks=ranks, slots_per_rank_R=np.array(slots))
        linear = solve(problem, "linear").slot_to_expert_LS
        for solver in (*SOLVERS, *(["user eplb"] if eplb else [])):
            began = time.process_time()
            if solver == "user eplb" and eplb is not None:
                table, seconds = user_eplb(eplb, problem)
                result = make_result(problem, table, solver=solver, status="BASELINE")
            else:
                result = solve(problem, solver)
                seconds = time.process_time() - began
            moved = int((result.slot_to_expert_LS != linear).sum()) * EXPERT_BYTES / 1e9
            print(f"{name:22s} {solver:12s} {result.value:8.4f} {result.gap:8.4f} {result.status:10s} {seconds:7.2f} {moved:9.2f}", flush=True)


def held_out(layers: int, experts: int, first: int) -> None:
    """Print plans on windows that were not passed in."""
    print(f"{'instance':24s} {'robust':>7s} {'mean':>7s} {'last':>7s} {'single':>7s} {'miss':>6s} {'cpu s':>7s} mode")
    rows = []
    for name, seen, new, ranks, slots in splits(layers, experts, first):
        problem = PlacementProblem(load_KLE=seen, num_ranks=ranks, slots_per_rank_R=np.array(slots))
        began = time.process_time()
        result = solve(problem, "robust")
        seconds = time.process_time() - began
        plans = [(seen / seen.sum(axis=(1, 2), keepdims=True)).mean(axis=0) * 1e6, *seen]
        mean, *single = (
            balance_on(problem, solve(PlacementProblem(load_KLE=one, num_ranks=ranks, slots_per_rank_R=np.array(slots))).slot_to_expert_LS, new)
            for one in plans
        )
        ours = balance_on(problem, result.slot_to_expert_LS, new)
        rows.append((ours, mean, single[-1], max(single)))
        miss = "".join(mark for mark, other in (("M", mean), ("L", single[-1]), ("S", max(single) - 0.01)) if ours < other)
        mode = result.mode if isinstance(result, RobustResult) else ""
        print(f"{name:24s} {ours:7.4f} {mean:7.4f} {single[-1]:7.4f} {max(single):7.4f} {miss:>6s} {seconds:7.2f} {mode}", flush=True)
    print(f"{'mean of all':24s} " + " ".join(f"{value:7.4f}" for value in np.mean(rows, axis=0)))
    print("miss: below the plan of the mean (M), of the last window (L), more than a point below the best single window in hindsight (S)")


def decode(layers: int, experts: int) -> None:
    """Print expected activated experts at the slowest rank, summed over layers, under several plans."""
    print(f"{'instance':22s} {'tokens':>6s} {'balance':>9s} {'activated':>9s} {'b+a:0.5':>9s} {'bound':>9s} {'balance, one copy serves':>25s}")
    for exponent in (0.6, 1.0, 1.2):
        problem = PlacementProblem(load_KLE=zipf(layers, experts, exponent), num_ranks=experts // 8, slots_per_rank_R=np.array(9))
        balanced = solve(problem).slot_to_expert_LS
        for tokens in (32, 256, 2048):
            batch = Decode(tokens=tokens, top_k=8)
            asked = replace(problem, objective=Objective.parse("activated", decode=batch))
            ours, both = solve(asked), solve(replace(problem, objective=Objective.parse("balance+activated:0.5", decode=batch)))
            assert isinstance(ours, ObjectiveResult)
            figures = [recount(asked, balanced.tolist()), ours.cost, recount(asked, both.slot_to_expert_LS.tolist())]
            figures += [ours.cost_bound, float(activated_L(problem, balanced, serve_once_LS(problem, balanced, batch), batch).sum())]
            print(f"{f'zipf {exponent}':22s} {tokens:6d} " + " ".join(f"{value:9.3f}" for value in figures), flush=True)


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--seed", type=int, default=0, help="added to the seeds of the held-out instances")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--eplb", type=Path, help="a checkout's eplb.py")
    arguments = parser.parse_args()
    if arguments.held_out:
        held_out(arguments.layers, arguments.experts, arguments.seed)
    if arguments.decode:
        decode(arguments.layers, arguments.experts)
    if not (arguments.held_out or arguments.decode):
        eplb = arguments.eplb / "eplb.py" if arguments.eplb is not None and arguments.eplb.is_dir() else arguments.eplb
        try:
            known(arguments.layers, arguments.experts, eplb)
        except InputError as error:
            sys.exit(f"planner: {error}")


if __name__ == "__main__":
    main()
