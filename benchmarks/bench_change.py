"""Rebalancing during a replay: is it worth it, from which period on, and how fast is the simulation of it?

A drifting synthetic trace (other hot experts in every segment) of FLAME-MoE 290M decode on 8 H100, with the repair and greedy solvers as
planners; then passes per second one by one, without changes and with a migration in flight, for DeepSeek-V3 on 32 H100.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"


from moesim.api import trace_shape
from moesim.api.changing import planner_for
from moesim.costs.model import CostModel
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.plan import Plan, linear
from moesim.sim.balancer import Balancer
from moesim.sim.batch import Part, Pass, pass_shape
from moesim.sim.build import ProgramBuilder
from moesim.sim.change import run_with_change
from moesim.sim.change_report import ChangeRun, sweep_periods, verdict
from moesim.sim.membership import Event, Membership
from moesim.sim.migration import MigrationSettings
from moesim.sim.settings import Settings
from moesim.traces.open import open_trace
from moesim.traces.steps import iter_steps


class Case:
    """One model on one cluster with a drifting trace."""

    def __init__(self, model: str, hardware: str, *, tokens: int, steps: int, seeds: tuple[int, ...], kind: str = "zipf:0.8") -> None:
        self.model, self.cluster = load_model(model), load_cluster(hardware)
        self.planner = planner_for(self.cluster)
        self.costs, self.passes = CostModel(self.cluster, self.model), []
        ranks = self.cluster.num_ranks
        for seed in seeds:
            trace = open_trace(f"synthetic:{kind},tokens={tokens},steps={steps},seed={seed},phase=decode", shape=trace_shape(self.model))
            for step in iter_steps(trace, num_ranks=ranks):
                shape = pass_shape(rank_T=step.rank_T, phase_T=step.phase_T, request_T=step.request_T, position_T=step.position_T, num_ranks=ranks)
                self.passes.append(Pass(len(self.passes), shape, (Part(shape, step.experts_TLK, step.rank_T, step.valid_TLK),)))
        self.plan = linear(model=self.model.name, num_experts=self.model.num_experts, moe_layer_ids=self.model.moe_layer_ids, num_ranks=ranks)

    def builder(self, plan: Plan) -> ProgramBuilder:
        return ProgramBuilder(cluster=self.cluster, model=self.model, plan=plan, costs=self.costs, settings=Settings())

    def run(self, **options) -> ChangeRun:
        return run_with_change(self.passes, plan=self.plan, builder_factory=self.builder, **options)


def timed(function: Callable[[], ChangeRun]) -> tuple[ChangeRun, float]:
    began = time.process_time()
    run = function()
    return run, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="passes per segment")
    parser.add_argument("--large", action="store_true", help="also DeepSeek-V3 on 32 ranks (minutes)")
    options = parser.parse_args()
    case = Case("flame-moe-290m", "h100-sxm-8", tokens=8192, steps=options.steps, seeds=(1, 2, 3))
    base, seconds = timed(case.run)
    print(f"{len(case.passes)} passes, {base.total_s * 1e3:.1f} ms simulated, balance {base.replay.sums.balance.mean_over_max:.3f}, {seconds:.1f} s of CPU")
    print("policy               mode         gain    balance  rebalances  moved GB  pause ms")
    for policy in ("never", "on_drift:0.9", "periodic:20", "budgeted:200 MB,10"):
        for mode in ("background", "pause"):
            run = case.run(balancer=Balancer(planner=case.planner, policy=policy), migration=MigrationSettings(mode=mode))
            told = verdict(run, base)
            print(
                f"{policy:20} {mode:10} {told['gain']:+7.2%}  {told['balance']['run']:8.3f}  {run.rebalances:10}  {run.moved_bytes / 1e9:8.2f}  "
                f"{run.pause_s * 1e3:8.1f}"
            )

    for mode in ("background", "pause"):

        def periodic(period: int, mode: str = mode) -> ChangeRun:
            balancer = Balancer(planner=case.planner, policy=f"periodic:{period}", planner_s=2e-3, min_gain=0.0)
            return case.run(balancer=balancer, migration=MigrationSettings(mode=mode))

        swept = sweep_periods([1, 4, 16, options.steps], periodic, base)
        for row in swept["rows"]:
            print(f"every {row['period']:4} passes, {mode:10}: {row['gain']:+7.2%}, {row['rebalances']} rebalances, {row['moved_bytes'] / 1e9:.1f} GB")
        print(f"{mode}: break-even period {swept['break_even_period']}, best {swept['best_period']}")
    failed = case.run(events=[Event(kind="fail", at_s=base.total_s / 3, ranks=(5,))], membership=Membership(detection_s=0.05))
    print(
        f"rank 5 dies: {failed.experts_lost} experts lost, {failed.moved_bytes / 1e9:.2f} GB reloaded, down {failed.downtime_s * 1e3:.0f} ms, "
        f"{failed.tokens_retried} tokens retried, total {failed.total_s / base.total_s - 1:+.1%}"
    )
    if options.large:
        large = Case("deepseek-v3", "h100-sxm-8x4", tokens=4096, steps=8, seeds=(1,))
        plain, quiet = timed(large.run)
        moved, busy = timed(
            lambda: large.run(balancer=Balancer(planner=lambda load, plan, budget: large.planner(load, plan, 600), policy="periodic:2", planner_s=0.0))
        )
        print(
            f"DeepSeek-V3, 32 ranks: {len(large.passes) / quiet:.1f} passes/s one by one; {len(large.passes) / busy:.2f} with {moved.messages} experts "
            f"on {sum(len(t.flows) for t in moved.transfers)} flows (planner included); {plain.total_s * 1e3:.0f} ms simulated"
        )


if __name__ == "__main__":
    main()
