"""Running passes: documents that fit each other in, a Replay out; what replay, solve and rebalance share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.costs.model import CostModel
from moesim.errors import InputError, TraceError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.report.summary import replay_report
from moesim.sim import memory
from moesim.sim.batch import Part, Pass, micro_batch_T, pass_shape
from moesim.sim.build import ProgramBuilder
from moesim.sim.ledger import KV_ENTRIES, Ledger
from moesim.sim.replay import ReplayRun, compiler_of, run_passes
from moesim.sim.routers import Router
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

    def write(self, folder: Path, *, plots: bool = False) -> list[Path]:
        """Write metrics.json, steps.csv, timeline.json and, if asked for, figures to `folder`; return their paths."""
        from moesim.report.files import write_replay

        return write_replay(self.report, self.ledger, folder, plots=plots)

    def plot(self, kind: str = "breakdown") -> Any:
        """Return a matplotlib Figure: `breakdown` (where the time goes), `load` (layer × rank), `links` or `timeline` (of one pass)."""
        from moesim.report.figures import figure

        return figure(self.ledger, kind)


def builder_of(cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, settings: Settings) -> ProgramBuilder:
    """Check that plan, model and cluster fit each other, weights included, and return what builds their Programs."""
    plan.check_model(name=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L)
    settings = replace(settings, offload=settings.offload.with_policies(plan.policies), change=settings.change.with_policies(plan.policies))
    builder = ProgramBuilder(cluster=cluster, model=model, plan=plan, costs=costs, settings=settings)
    training = settings.pipeline if settings.pipeline.train else None
    experts = not settings.offload.is_on
    memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=0, tokens=0, stages=builder.stages, training=training, experts=experts)
    return builder


def rebuilt(builder: ProgramBuilder, plan: Plan) -> ProgramBuilder:
    """Return a builder like `builder` for another plan."""
    return builder_of(builder.cluster, builder.model, plan, builder.costs, builder.settings)


def _part(step: StepTokens, keep_T: np.ndarray | None, num_ranks: int) -> Part:
    rows = slice(None) if keep_T is None else keep_T
    rank_T = step.rank_T[rows]
    valid, weights, predicted = (None if column is None else column[rows] for column in (step.valid_TLK, step.weights_TLK, step.predicted_TLK))
    shape = pass_shape(rank_T=rank_T, phase_T=step.phase_T[rows], request_T=step.request_T[rows], position_T=step.position_T[rows], num_ranks=num_ranks)
    return Part(shape, step.experts_TLK[rows], rank_T, valid, weights, predicted)


def passes_of(
    routing: RoutingTrace,
    num_ranks: int,
    tokens_per_step: int | None,
    seed: int,
    *,
    micro_batches: int = 1,
    max_tokens: int | None = None,
    as_recorded: bool = False,
    router: Router | None = None,
) -> Iterator[Pass]:
    done = 0
    for step in iter_steps(routing, num_ranks=num_ranks, tokens_per_step=tokens_per_step, seed=seed, as_recorded=as_recorded):
        if router is not None:
            step = router.route(step)
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
    seed: int = 0,
) -> Replay:
    run = run_of(passes, builder, seed, progress)
    if run.steps == 0:
        raise TraceError(f"{routing.source}: holds no token to replay; every row is a warm-up dummy or the trace is empty")
    for tier, uses in run.memory.items():
        if not any(counter.startswith(f"{tier}: ") for counter in run.ledger.levels):
            run.ledger.set_level(f"{tier}: most bytes", 0.0, np.full(run.ledger.num_ranks, sum(uses.values())))
    report = replay_report(run, routing, builder, tokens_per_step, time.perf_counter() - began)
    return Replay(report=report, ledger=run.ledger, plan=builder.plan, load_LE=run.sums.expert_LE)


def refuse_mixed(builder: ProgramBuilder) -> None:
    """Raise InputError for settings that no runner takes together."""
    settings = builder.settings
    groups = [name for name in ("pipeline", "offload", "change") if getattr(settings, name).is_on]
    if len(groups) > 1:
        raise InputError(f"--set {groups[0]}.… and {groups[1]}.…: cannot be combined in one run; replay them one by one")
    if settings.offload.is_on or settings.change.is_on:
        if settings.rounds > 1 or builder.stages.count > 1:
            raise InputError(f"--set {groups[0]}.…: cannot be combined with several rounds a layer or pipeline stages; replay them one by one")
        if builder.recorded is not None:
            raise InputError(f"--times trace: cannot be combined with --set {groups[0]}.…; what was recorded had its own memory and plan")


def run_of(passes: Iterable[Pass], builder: ProgramBuilder, seed: int, progress: Callable[[int], None] | None) -> ReplayRun:
    """Replay `passes` with the runner that the settings ask for. Raises InputError for settings that no runner takes together."""
    cluster, model, plan, settings = builder.cluster, builder.model, builder.plan, builder.settings
    refuse_mixed(builder)
    if settings.offload.is_on:
        from moesim.sim.offload_replay import run_offload

        return run_offload(passes, builder=builder, compiler=compiler_of(builder), seed=seed, progress=progress)
    if settings.change.is_on:
        from moesim.api.changing import change_run

        return change_run(passes, builder, lambda plan: rebuilt(builder, plan), progress).as_replay()
    run = run_passes(passes, builder=builder, compiler=compiler_of(builder), progress=progress)
    training, entries = settings.pipeline if settings.pipeline.train else None, run.kv_entries_peak * builder.tp
    held = memory.account(cluster, model, plan, attention_tp=builder.tp, kv_entries=entries, tokens=run.tokens_peak, stages=builder.stages, training=training)
    run.memory = held.by_use()
    weights_R, entry_R = (part(model, plan, attention_tp=builder.tp, stages=builder.stages) for part in (memory.weight_bytes_R, memory.kv_bytes_R))
    for at_s, entries_R in run.ledger.levels.get(KV_ENTRIES, []):
        run.ledger.set_level(f"{held.tier}: bytes of weights and KV", at_s, weights_R + entries_R * (0.0 if settings.pipeline.train else builder.tp) * entry_R)
    return run
