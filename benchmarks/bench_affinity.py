"""Affinity planning: hops or ranks per token on held-out tokens and on the shuffled null, certified gap and CPU seconds.

Run: `OMP_NUM_THREADS=1 python benchmarks/bench_affinity.py [--quick] [--oracles]`. Traces are `synthetic:topics` and `synthetic:markov`
with sticky topics (real gains may differ), plus the shipped trace of FLAME-MoE. Every plan is made on half of the tokens and scored
on the other half. Seconds are those of the solver alone, counting of transitions left out. `--oracles` adds the published programs.
"""

from __future__ import annotations

import argparse
import time

from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
from moesim.solvers.affinity.oracles import solve_exflow_ilp, solve_moetuner_ilp
from moesim.solvers.affinity.plan import gather_evidence
from moesim.solvers.affinity.problem import AffinityProblem
from moesim.solvers.affinity.result import FANOUT, HOPS, AffinityResult
from moesim.solvers.affinity.routes import TokenRoutes, read_routes, split_routes
from moesim.solvers.affinity.solve import solve_hops
from moesim.solvers.affinity.transitions import count_transitions
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import TraceShape

CASES = (
    # experts, ranks, ranks per node, layers, choices, trace
    (8, 2, 0, 32, 2, "synthetic:topics:8,tokens=10000"),
    (8, 4, 0, 32, 2, "synthetic:topics:8,tokens=10000"),
    (8, 8, 0, 32, 2, "synthetic:topics:8,tokens=10000"),
    (8, 4, 0, 32, 1, "synthetic:markov:0.3,tokens=10000"),
    (64, 8, 0, 8, 6, "flame-moe-290m"),
    (64, 8, 4, 27, 6, "synthetic:topics:16,tokens=10000"),
    (256, 32, 0, 58, 8, "synthetic:topics:16,tokens=20000"),
    (256, 32, 8, 58, 8, "synthetic:topics:16,tokens=20000"),
)
HEADER = (
    f"{'objective':17s} {'method':19s} {'slack':>5s} {'in-sample':>9s} {'held-out':>9s} "
    f"{'contig.':>8s} {'null':>8s} {'balance':>7s} {'gap':>7s} {'status':>10s} {'CPU s':>7s}"
)


def report(result: AffinityResult, seconds: float, slack: float | None, seen: TokenRoutes, unseen: TokenRoutes, ranks: int, per_node: int) -> None:
    """Print one row."""
    evidence = gather_evidence(result, seen, unseen, num_ranks=ranks, ranks_per_node=per_node or ranks)
    plan = evidence.plan
    print(
        f"{result.objective:17s} {result.solver:19s} {'-' if slack is None else f'{slack:g}':>5s} {plan.in_sample:9.4f} {plan.held_out:9.4f} "
        f"{evidence.contiguous.held_out:8.4f} {plan.null:8.4f} {result.metrics['balance']:7.3f} {result.gap:7.4f} {result.status:>10s} {seconds:7.2f}",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small cases only")
    parser.add_argument("--oracles", action="store_true", help="add the programs of ExFlow and MoETuner, 60 s each, on 8 experts")
    arguments = parser.parse_args()
    for experts, ranks, per_node, layers, choices, spec in CASES:
        if arguments.quick and experts > 64:
            continue
        shape = TraceShape(model="bench", num_experts=experts, top_k=choices, moe_layer_ids=tuple(range(layers)))
        seen, unseen = split_routes(read_routes(open_trace(spec, shape=shape)), by="token")
        counts = count_transitions(seen)
        print(f"\n{layers} layers, {experts} experts top-{choices} on {ranks} ranks in nodes of {per_node or ranks}; {spec}; {len(seen)} tokens\n{HEADER}")
        for slack in (None, 0.1):
            problem = AffinityProblem(
                transitions_LEE=counts.transitions_LEE, load_LE=counts.load_LE, num_ranks=ranks, ranks_per_node=per_node, load_slack=slack
            )
            methods = ["auto"] + (["descent", "balance-then-label"] if experts == 8 and slack is None else [])
            for method in methods:
                began = time.process_time()
                result = solve_hops(problem, method=method)
                report(result, time.process_time() - began, slack, seen, unseen, ranks, per_node)
            if arguments.oracles and experts == 8 and slack is None:
                began = time.process_time()
                result = solve_exflow_ilp(problem, seconds=60.0)
                report(result, time.process_time() - began, slack, seen, unseen, ranks, per_node)
                began = time.process_time()
                result = solve_moetuner_ilp(problem, seconds=60.0).result
                report(result, time.process_time() - began, slack, seen, unseen, ranks, per_node)
            if choices > 1:
                began = time.process_time()
                result = solve_fanout(FanoutProblem(routes=seen, num_ranks=ranks, ranks_per_node=per_node, load_slack=slack))
                report(result, time.process_time() - began, slack, seen, unseen, ranks, per_node)
    print(f"\nCosts: {HOPS}: hops between ranks (+ between nodes) per transition; {FANOUT}: ranks (+ nodes) per token and layer.")


if __name__ == "__main__":
    main()
