"""Dispatch shares: time and gap of `fast` against `lp`, what shares win on drifting windows, and copies saved near the source.

Run: `OMP_NUM_THREADS=1 python benchmarks/bench_dispatch.py [--quick]`. Times are CPU times; all other figures are deterministic. Loads are synthetic
(Zipf or lognormal, drifting by lognormal factors), and the shipped OLMoE counts, whose windows are domains of text: the plan is made on
one window, the other windows in turn are the past and the present of shares. Balance is Σ mean / Σ max over ranks, 1 is perfect.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from moesim.solvers.dispatch import DispatchResult, Replicas, dispatch_local, held_out
from moesim.solvers.dispatch_core import window_scale_K
from moesim.solvers.dispatch_fast import solve_fast
from moesim.solvers.dispatch_lp import solve_lp
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.traces.open import open_trace

SHAPES = ((58, 256, 32, 288), (58, 256, 64, 320), (58, 256, 144, 288), (58, 256, 32, 512), (26, 64, 8, 72))
"""Layers, experts, ranks, slots."""


def loads(kind: str, layers: int, experts: int, seed: int = 0) -> np.ndarray:
    """Return [L, E] loads of a kind: `zipf:EXPONENT` or `lognormal`."""
    generator = np.random.Generator(np.random.PCG64(seed))
    if kind == "lognormal":
        weight = generator.lognormal(0.0, 0.75, (layers, experts))
    else:
        weight = np.stack([generator.permutation(1 / np.arange(1, experts + 1) ** float(kind.partition(":")[2])) for _ in range(layers)])
    return np.round(weight / weight.sum(axis=1, keepdims=True) * 1e6)


def drifted(load_LE: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """Return loads changed by independent lognormal factors."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return np.round(load_LE * generator.lognormal(0.0, sigma, load_LE.shape))


def placement(load_LE: np.ndarray, ranks: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the default plan for a load, [L, S], and the ranks of its slots."""
    problem = PlacementProblem(load_KLE=load_LE, num_ranks=ranks, slots_per_rank_R=np.array(slots // ranks))
    return solve(problem).slot_to_expert_LS, problem.slot_rank_S


def best_of(repeats: int, call: Callable[[], DispatchResult]) -> tuple[DispatchResult, float, float]:
    """Return the result and the least and median CPU time in milliseconds."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        result = call()
        times.append(1e3 * (time.process_time() - began))
    return result, min(times), float(np.median(times))


def speed(layers: int, repeats: int) -> None:
    """Print times and gaps."""
    print("fast against lp: plan on one window, shares on a drifted one")
    print(
        f"{'layers x experts x slots on ranks':34s} {'load':10s} {'drift':>5s} {'equal':>7s} {'fast':>7s} {'lp':>7s} {'fast/lp-1':>10s} {'worst':>8s} "
        f"{'certified':>10s} {'steps':>5s} {'index_ms':>8s} {'fast_ms':>8s} {'median':>8s} {'lp_s':>7s}"
    )
    for full, experts, ranks, slots in SHAPES:
        rows = min(full, layers)
        for kind in ("zipf:1.0", "lognormal"):
            load = loads(kind, rows, experts)
            table, slot_rank = placement(load, ranks, slots)
            for sigma in (0.1, 0.5, 1.0):
                now = drifted(load, sigma, 1)
                began = time.process_time()
                replicas = Replicas.of(table, slot_rank, ranks, experts)
                index = 1e3 * (time.process_time() - began)
                fast, least, median = best_of(repeats, lambda replicas=replicas, now=now: solve_fast(replicas, now))  # type: ignore[misc]
                exact, lp_ms, _ = best_of(1, lambda replicas=replicas, now=now: solve_lp(replicas, now))  # type: ignore[misc]
                equal = float(window_scale_K(now[None], None) @ replicas.time_KLR(now[None], replicas.equal_P).max(axis=2).sum(axis=1))
                print(
                    f"{f'{rows}x{experts}x{slots} on {ranks}':34s} {kind:10s} {sigma:5.1f} {fast.ideal / equal:7.4f} {fast.balance:7.4f} {exact.balance:7.4f} "
                    f"{fast.value / exact.value - 1:10.1e} {(fast.time_L / exact.time_L - 1).max():8.1e} {fast.gap:10.1e} {fast.iterations:5d} "
                    f"{index:8.1f} {least:8.1f} {median:8.1f} {lp_ms / 1e3:7.2f}",
                    flush=True,
                )


def print_drift(name: str, load_KLE: np.ndarray, ranks: int, slots: int) -> None:
    """Plan on the first window; print the mean balance on the others by where the shares come from."""
    table, slot_rank = placement(load_KLE[0], ranks, slots)
    for method in ("lp", "fast"):
        drift = held_out(load_KLE, table, slot_rank, ranks, method=method)
        fresh = float(np.mean([solve(PlacementProblem(load_KLE=w, num_ranks=ranks, slots_per_rank_R=np.array(slots // ranks))).value for w in load_KLE[1:]]))
        equal, before, now = (float(np.mean(one)) for one in (drift.equal_W, drift.held_out_W, drift.current_W))
        print(
            f"{name:42s} {method:5s} {equal:8.4f} {before:8.4f} {100 * (before - equal):+8.1f} {now:8.4f} {100 * (now - equal):+8.1f} {fresh:9.4f}", flush=True
        )


def drift_tables(layers: int) -> None:
    """Print what shares win on an old placement."""
    print("\nold placement (planned on window 0), mean over later windows; points against the equal split; fresh: a new plan for every window")
    print(f"{'windows':42s} {'by':5s} {'equal':>8s} {'held out':>8s} {'points':>8s} {'current':>8s} {'points':>8s} {'fresh':>9s}")
    for kind in ("zipf:0.6", "lognormal"):
        for sigma in (0.05, 0.15, 0.3):
            windows = [loads(kind, layers, 256)]
            for seed in range(4):
                windows.append(drifted(windows[-1], sigma, seed))
            for ranks, slots in ((32, 288), (32, 320)):
                print_drift(f"{kind} walk {sigma} {layers}x256x{slots} on {ranks}", np.stack(windows), ranks, slots)
    trace = open_trace("olmoe-1b-7b-counts")
    counts, names = trace.counts_WLE().astype(np.float64), list(trace.window_names)
    for ranks, slots in ((8, 72), (8, 80), (16, 80)):
        for first in range(len(names)):
            order = [first, *(other for other in range(len(names)) if other != first)]
            print_drift(f"olmoe from {names[first]} {slots} on {ranks}", counts[order], ranks, slots)


def near_table(layers: int) -> None:
    """Print copies against the equal split, per tolerance and method."""
    print("\nnear the source: choices served off their rank / node, as a share of all; equal split, then shares by source")
    print(f"{'case':42s} {'by':5s} {'tol':>5s} {'remote':>15s} {'node':>15s} {'balance':>8s} {'best':>8s} {'seconds':>8s}")
    cases = ((32, 8, 256, 288, layers), (32, 8, 256, 512, layers), (8, 4, 64, 80, min(layers, 16)))
    for ranks, width, experts, slots, rows in cases:
        load = drifted(loads("lognormal", rows, experts), 0.3, 5)
        table, slot_rank = placement(loads("lognormal", rows, experts), ranks, slots)
        generator = np.random.Generator(np.random.PCG64(9))
        source = generator.gamma(4.0, size=(rows, ranks, experts))
        by_source = np.round(load[:, None] * source / source.sum(axis=1, keepdims=True))
        for method in ("fast", "lp"):
            few = min(rows, 8) if method == "lp" else rows
            for tolerance in (0.0, 0.01, 0.05):
                for count in sorted({few, min(rows, 8)}):
                    began = time.process_time()
                    split = dispatch_local(by_source[:count], table[:count], slot_rank, ranks, ranks_per_node=width, tolerance=tolerance, method=method)
                    seconds = time.process_time() - began
                    best = split.dispatch.ideal / split.dispatch.bound
                    print(
                        f"{f'{count}x{experts}x{slots} on {ranks}, {ranks // width} nodes':42s} {method:5s} {tolerance:5.2f} "
                        f"{split.equal_remote / split.choices:7.4f} {split.remote / split.choices:7.4f} {split.equal_internode / split.choices:7.4f} "
                        f"{split.internode / split.choices:7.4f} {split.dispatch.balance:8.4f} {best:8.4f} {seconds:8.3f}",
                        flush=True,
                    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 layers, few repeats")
    arguments = parser.parse_args()
    layers = 8 if arguments.quick else 58
    speed(layers, 3 if arguments.quick else 15)
    drift_tables(min(layers, 12))
    near_table(layers)


if __name__ == "__main__":
    main()
