"""Speed and accuracy of the cost model; all tables of the hardware are scored. Run: `python benchmarks/bench_costs.py [HARDWARE] [MODEL]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from moesim.api.validation_kernels import validate_kernels
from moesim.costs import CostModel
from moesim.costs.crosscheck import expert_law_errors
from moesim.costs.traffic import balanced_counts
from moesim.hardware import load_cluster
from moesim.model import load_model


def main() -> None:
    """Print the tables."""
    hardware, name = (sys.argv[1:] + ["h100-sxm-8x4", "deepseek-v3"][len(sys.argv) - 1 :])[:2]
    cluster, model = load_cluster(hardware), load_model(name)
    ranks = cluster.num_ranks
    rng = np.random.Generator(np.random.PCG64(0))

    def report(what: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        print(f"{what:46s} {(time.perf_counter() - start) * 1e3:9.2f} ms")

    start = time.perf_counter()
    costs = CostModel(cluster, model)
    print(f"{'construction (imports pyarrow)':46s} {(time.perf_counter() - start) * 1e3:9.2f} ms")
    tokens = rng.integers(1, 200, (8, ranks))
    counts = {
        key: value * 100.0
        for key, value in balanced_counts(
            num_ranks=ranks, devices=min(ranks, cluster.devices_per_node), num_experts=model.num_experts, top_k=model.top_k
        ).items()
    }

    def small_replay() -> None:
        for phase in ("prefill", "decode"):
            costs.attention(phase=phase, sequences=tokens, new_tokens=tokens, context=tokens + 1000)
            for stage in ("dispatch", "combine"):
                costs.exchange("normal" if phase == "prefill" else "low_latency", stage, **counts)
        for call in (costs.gate, costs.shared_experts, costs.dense_ffn, costs.head, costs.embedding):
            call(tokens)
        costs.experts(rng.integers(0, 40, (8, 58, ranks, 9)))
        costs.all_reduce(tokens * 1e4, 8)

    report("first use of every operator (reads tables)", small_replay)
    report("second use", small_replay)
    load = rng.integers(0, 40, (64, 58, 32, 9))
    report(f"experts {list(load.shape)} ({load.size} slots)", lambda: costs.experts(load))
    pairs = rng.integers(0, 40, (64, 58, ranks, ranks)).astype(np.float64)
    nodes = pairs.reshape(64, 58, ranks, -1, min(ranks, cluster.devices_per_node)).sum(axis=-1)
    for algorithm in ("normal", "low_latency"):
        report(f"exchange {algorithm} {list(pairs.shape)}", lambda a=algorithm: costs.exchange(a, "dispatch", assign_RR=pairs, copy_RR=pairs, node_RN=nodes))  # type: ignore[misc]
    print(f"\n{'table':58s} {'rows':>7s} {'mean':>8s} {'median':>8s} {'p90':>8s}  predicted by")
    for name, quantity in validate_kernels(None, cluster)["quantities"].items():
        figures = {name: quantity}
        figures |= {f"  {name}, by transfer alone": quantity["transfer"]} if "transfer" in quantity else {}
        figures |= {f"  {part}": values for part, values in quantity["parts"].items()}
        for what, values in figures.items():
            if values["n"]:
                median, p90 = values["median_abs_error"], values["p90_abs_error"]
                print(f"{what:58s} {values['n']:7d} {values['mean_error']:+8.2%} {median:8.2%} {p90:8.2%}  {values.get('method', '').replace('_', ' ')}")
    for what, errors in expert_law_errors(cluster, sample=4):
        print(
            f"{what + ', the law itself':58s} {errors.size:7d} {errors.mean():+8.2%} {np.median(np.abs(errors)):8.2%} {np.quantile(np.abs(errors), 0.9):8.2%}"
        )


if __name__ == "__main__":
    main()
