"""Running passes: documents that fit each other in, a Replay out; what replay, solve and rebalance share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.costs.model import CostModel
from moesim.errors import TraceError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.report.summary import replay_report
from moesim.sim import memory
from moesim.sim.batch import micro_batch_T, pass_shape
from moesim.sim.build import ProgramBuilder
from moesim.sim.ledger import Ledger
from moesim.sim.loads import LoadCompiler
from moesim.sim.replay import Part, Pass, run_passes
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace
from moesim.traces.steps import StepTokens, iter_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay returns."""

    report: dict[str, Any]
    ledger: Ledger
    plan: Plan
    load_LE: np.ndarray
    """int64 [L, E]: routed (token, expert) choices."""

    def write(self, folder: Path) -> list[Path]:
        """Write metrics.json, steps.csv and timeline.json to `folder`; return their paths."""
        from moesim.report.files import write_replay

        return write_replay(self.report, self.ledger, folder)


def builder_of(cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, settings: Settings) -> ProgramBuilder:
    """Check that plan, model and cluster fit each other, weights included, and return what builds their Programs."""
    plan.check_model(name=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids)
    builder = ProgramBuilder(cluster=cluster, model=model, plan=plan, costs=costs, settings=settings)
    memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=0, tokens=0)
    return builder


def _part(step: StepTokens, keep_T: np.ndarray | None, num_ranks: int) -> Part:
    rows = slice(None) if keep_T is None else keep_T
    rank_T, valid = step.rank_T[rows], None if step.valid_TLK is None else step.valid_TLK[rows]
    shape = pass_shape(rank_T=rank_T, phase_T=step.phase_T[rows], request_T=step.request_T[rows], position_T=step.position_T[rows], num_ranks=num_ranks)
    return Part(shape, step.experts_TLK[rows], rank_T, valid)


def passes_of(
    routing: RoutingTrace, num_ranks: int, tokens_per_step: int | None, seed: int, *, micro_batches: int = 1, max_tokens: int | None = None
) -> Iterator[Pass]:
    done = 0
    for step in iter_steps(routing, num_ranks=num_ranks, tokens_per_step=tokens_per_step, seed=seed):
        whole = _part(step, None, num_ranks)
        if micro_batches == 1:
            yield Pass(step.step, whole.shape, (whole,))
        else:
            number_T = micro_batch_T(step.rank_T, micro_batches)
            yield Pass(step.step, whole.shape, tuple(_part(step, number_T == index, num_ranks) for index in range(micro_batches)))
        done += len(step.rank_T)
        if max_tokens is not None and done >= max_tokens:
            return


def simulate(
    passes: Iterable[Pass],
    builder: ProgramBuilder,
    routing: RoutingTrace,
    tokens_per_step: int | None,
    progress: Callable[[int], None] | None,
    began: float,
) -> Replay:
    cluster, model, plan = builder.cluster, builder.model, builder.plan
    compiler = LoadCompiler(plan, ranks_per_node=cluster.devices_per_node)
    run = run_passes(passes, builder=builder, compiler=compiler, progress=progress)
    if run.steps == 0:
        raise TraceError(f"{routing.source}: holds no token to replay; every row is a warm-up dummy or the trace is empty")
    account = memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=run.kv_entries_peak * builder.tp, tokens=run.tokens_peak)
    report = replay_report(run, routing, builder, account, tokens_per_step, time.perf_counter() - began)
    return Replay(report=report, ledger=run.ledger, plan=plan, load_LE=run.sums.expert_LE)
