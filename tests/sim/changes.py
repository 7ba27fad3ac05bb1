"""Small runs for the tests of changes: drifting traces, a greedy planner, a run with defaults."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from moesim.costs.model import CostModel
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
from moesim.sim import memory
from moesim.sim.batch import Part, Pass, pass_shape
from moesim.sim.build import ProgramBuilder
from moesim.sim.change import run_with_change
from moesim.sim.change_report import ChangeRun
from moesim.sim.settings import Settings
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import TraceShape
from moesim.traces.steps import iter_steps


@cache
def model_of(name: str = "flame-moe-290m") -> MoEModel:
    """Return the model cut to its first layers: one dense, two MoE."""
    model = load_model(name)
    return replace(model, num_layers=3, moe_layer_ids=tuple(layer for layer in model.moe_layer_ids if layer < 3))


@cache
def cluster_of(name: str = "h100-sxm-4") -> Cluster:
    return load_cluster(name)


@cache
def costs_of(cluster_name: str = "h100-sxm-4", model_name: str = "flame-moe-290m") -> CostModel:
    return CostModel(cluster_of(cluster_name), model_of(model_name))


@cache
def passes_of(
    *segments: tuple[str, int, int], tokens: int = 2048, model: str = "flame-moe-290m", cluster: str = "h100-sxm-4", phase: str = "decode"
) -> tuple[Pass, ...]:
    """Return passes of segments (kind, steps, seed); another seed has other hot experts."""
    made: list[Pass] = []
    facts, ranks = model_of(model), cluster_of(cluster).num_ranks
    shape = TraceShape(model=facts.name, num_experts=facts.num_experts, top_k=facts.top_k, moe_layer_ids=facts.moe_layer_ids)
    for kind, steps, seed in segments:
        trace = open_trace(f"synthetic:{kind},tokens={tokens},steps={steps},seed={seed},phase={phase}", shape=shape)
        for step in iter_steps(trace, num_ranks=ranks):
            held = pass_shape(rank_T=step.rank_T, phase_T=step.phase_T, request_T=step.request_T, position_T=step.position_T, num_ranks=ranks)
            made.append(Pass(len(made), held, (Part(held, step.experts_TLK, step.rank_T, step.valid_TLK),)))
    return tuple(made)


def start_plan(model: str = "flame-moe-290m", cluster: str = "h100-sxm-4", ranks: int | None = None) -> Plan:
    """Return linear placement over the first `ranks` ranks, the others masked."""
    facts, size = model_of(model), cluster_of(cluster).num_ranks
    plan = linear(model=facts.name, num_experts=facts.num_experts, moe_layer_ids=facts.moe_layer_ids, num_ranks=ranks or size)
    return replace(plan, num_ranks=size)


def replicated(copies: int = 2, cluster: str = "h100-sxm-4") -> Plan:
    """Return a plan with every expert on `copies` neighbouring ranks."""
    plan, ranks = start_plan(cluster=cluster), cluster_of(cluster).num_ranks
    homes = [[e for e, home in enumerate(plan.slot_rank_S.tolist()) if (rank - home) % ranks < copies] for rank in range(ranks)]
    row = [expert for home in homes for expert in home]
    return replace(plan, slot_to_expert_LS=np.tile(row, (plan.num_layers, 1)), slot_rank_S=np.repeat(np.arange(ranks), [len(home) for home in homes]))


def greedy(load_KLE: np.ndarray, plan: Plan, budget_slots: int | None) -> Plan:
    """Heaviest expert first to the least loaded rank with room; with a budget: the swaps of single pairs that help most."""
    slots_R = np.bincount(plan.slot_rank_S, minlength=plan.num_ranks)
    table = plan.slot_to_expert_LS.copy()
    left = budget_slots
    for row, load_E in zip(table, load_KLE.sum(axis=0), strict=True):
        if left is None:
            held: list[list[int]] = [[] for _ in slots_R]
            sums = np.zeros(len(slots_R))
            for expert in np.argsort(-load_E, kind="stable").tolist():
                rank = min((r for r in range(len(slots_R)) if len(held[r]) < slots_R[r]), key=lambda r: (sums[r], r))
                held[rank].append(expert)
                sums[rank] += load_E[expert]
            row[:] = [expert for rank in held for expert in rank]
        elif left >= 2:
            total = np.bincount(plan.slot_rank_S, weights=load_E[row], minlength=len(slots_R))
            high, low = int(total.argmax()), int(np.where(slots_R > 0, total, np.inf).argmin())
            a, b = np.flatnonzero(plan.slot_rank_S == high), np.flatnonzero(plan.slot_rank_S == low)
            gap = np.abs((total[high] - total[low]) / 2 - (load_E[row[a]][:, None] - load_E[row[b]]))
            i, j = divmod(int(gap.argmin()), len(b))
            row[a[i]], row[b[j]] = row[b[j]], row[a[i]]
            left -= 2
    return replace(plan, slot_to_expert_LS=table, source="greedy")


def simulate(
    passes: tuple[Pass, ...], *, plan: Plan | None = None, cluster: Cluster | None = None, settings: Settings | None = None, **options: Any
) -> ChangeRun:
    """Run on 4 H100; `cluster` replaces what migrations see of it, not the costs."""
    name = "h100-sxm-8" if cluster is not None and cluster.num_ranks == 8 else "h100-sxm-4"
    machine = cluster or cluster_of()

    return run_with_change(
        passes, plan=plan or start_plan(cluster=name), builder_factory=lambda plan: builder_of(plan, machine, costs_of(name), settings), **options
    )


def builder_of(plan: Plan, cluster: Cluster | None = None, costs: CostModel | None = None, settings: Settings | None = None) -> ProgramBuilder:
    return ProgramBuilder(cluster=cluster or cluster_of(), model=model_of(), plan=plan, costs=costs or costs_of(), settings=settings or Settings())


def memory_account(run: ChangeRun) -> float:
    """Return the bytes that the fullest rank of a finished run held beside staging."""
    replay = run.replay
    held = memory.account(cluster_of(), model_of(), run.plan, attention_tp=1, kv_entries=replay.kv_entries_peak, tokens=replay.tokens_peak)
    return held.peak_bytes
