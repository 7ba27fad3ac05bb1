"""Replays forward passes: an Actor that compiles their routing, builds their Program and lets the engine run it.

Consecutive passes of one phase are handled side by side in one array evaluation (a pass ends with a barrier over all
ranks, so passes are independent), as many as memory allows. Shapes: P passes, L MoE layers, R ranks, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moesim.balance import Balance
from moesim.plan import Plan
from moesim.sim.batch import Part, Pass, stack
from moesim.sim.build import ProgramBuilder, Traffic
from moesim.sim.engine import Engine
from moesim.sim.evaluate import Times
from moesim.sim.ledger import KV_ENTRIES, Ledger
from moesim.sim.loads import SPARSE, LoadCompiler, StepLoads
from moesim.sim.ops import COMM, COMPUTE, Op, Program

MAX_PASSES = 64
MAX_TOKENS = 1 << 18
MAX_PAIR_BYTES = 256 * 2**20


@dataclass(slots=True)
class LoadSums:
    """Running sums over passes of what balance and traffic are read from."""

    mean_L: np.ndarray
    max_L: np.ndarray
    ratio_sum: float = 0.0
    ratio_count: int = 0
    routed: int = 0
    copies_remote: int = 0
    copies_remote_node: int = 0
    token_layers: int = 0
    expert_LE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))

    def add(self, loads: StepLoads, slot_to_expert_LS: np.ndarray, devices_per_node: int, alive_R: np.ndarray | None = None) -> None:
        """Book the loads of P passes; alive_R: bool [R], ranks that take part and count for balance (None: all)."""
        load_PLR = loads.rank_load_PLR if alive_R is None else loads.rank_load_PLR[..., alive_R]
        mean, most = load_PLR.mean(axis=2), load_PLR.max(axis=2)
        self.mean_L += mean.sum(axis=0)
        self.max_L += most.sum(axis=0)
        loaded = most > 0
        self.ratio_sum += float((mean[loaded] / most[loaded]).sum())
        self.ratio_count += int(loaded.sum())
        self.routed += int(loads.routed_PLR.sum())
        self.token_layers += int(loads.tokens_PR.sum()) * load_PLR.shape[1]
        to_ranks, to_nodes = loads.pairs.remote()
        self.copies_remote += to_ranks
        self.copies_remote_node += to_nodes
        slot_LS = loads.slot_PLS.sum(axis=0)
        layer, slot = np.nonzero(slot_to_expert_LS >= 0)
        np.add.at(self.expert_LE, (layer, slot_to_expert_LS[layer, slot]), slot_LS[layer, slot])

    @property
    def balance(self) -> Balance:
        """Balance over all layers and passes; the worst layer is judged over all passes together."""
        most = float(self.max_L.sum())
        if most == 0:
            return Balance(mean_over_max=1.0, layer_mean=1.0, worst_layer=1.0)
        loaded = self.max_L > 0
        return Balance(
            mean_over_max=float(self.mean_L.sum()) / most,
            layer_mean=self.ratio_sum / self.ratio_count,
            worst_layer=float((self.mean_L[loaded] / self.max_L[loaded]).min()),
        )


@dataclass(slots=True)
class ReplayRun:
    """Everything a replay leaves behind."""

    ledger: Ledger
    sums: LoadSums
    tokens: int = 0
    steps: int = 0
    local_bytes: float = 0.0
    intra_node_bytes: float = 0.0
    inter_node_bytes: float = 0.0
    compute_s: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    """Phase of the passes → seconds of computation, over all ranks."""
    kv_entries_peak: float = 0.0
    tokens_peak: float = 0.0
    link_bytes: dict[str, float] = field(default_factory=dict)
    """Link to a memory tier → bytes of experts that crossed it."""
    cache: dict[str, float] | None = None
    """What caches of experts did; None: every expert was in device memory."""
    stall_s: dict[str, float] = field(default_factory=dict)
    """Cause → seconds in which a rank, on average, waited for experts."""
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    """Tier → use → most bytes in any one of them."""
    change: dict[str, Any] | None = None
    """What changed during the run; None: nothing was to."""

    @property
    def state_s(self) -> dict[str, float]:
        """State of a device (see `moesim.costs.energy`) → seconds in it, over all ranks."""
        taken, waited = (float(np.sum(values)) for values in (self.ledger.lane_s.get(COMM, 0.0), self.ledger.label_s.get("straggler_wait", 0.0)))
        return {"compute": self.compute_s["prefill"], "memory": self.compute_s["decode"], "communication": max(taken - waited, 0.0)}

    @classmethod
    def empty(cls, plan: Plan, *, keep_passes: int) -> ReplayRun:
        """Return the record of a run under `plan` that has not begun."""
        layers = plan.num_layers
        sums = LoadSums(mean_L=np.zeros(layers), max_L=np.zeros(layers), expert_LE=np.zeros((layers, plan.num_experts), dtype=np.int64))
        return cls(ledger=Ledger(plan.num_ranks * plan.parallel.pp, keep_passes=keep_passes), sums=sums)

    def book(
        self, batch: Sequence[Pass], parts: Sequence[StepLoads], traffic: Traffic, plan: Plan, devices_per_node: int, alive_R: np.ndarray | None = None
    ) -> None:
        """Add up passes that have run under `plan`: parts and traffic as `build_batch` gave them."""
        for loads in parts:
            self.sums.add(loads, plan.slot_to_expert_LS, devices_per_node, alive_R)
            self.tokens += int(loads.tokens_PR.sum())
            self.ledger.add_loads(loads, plan.moe_layer_ids)
        self.ledger.add_bytes(traffic.port_R)
        shape = stack([item.shape for item in batch])
        computed = float(np.sum(self.ledger.lane_s.get(COMPUTE, 0.0))) - sum(self.compute_s.values())
        self.compute_s["prefill" if shape.is_prefill_P[0] else "decode"] += computed
        self.ledger.add_levels(KV_ENTRIES, np.tile(shape.kv_entries_PR, plan.parallel.pp))
        self.steps += len(batch)
        self.local_bytes += float(traffic.local_P.sum())
        self.intra_node_bytes += float(traffic.intra_node_P.sum())
        self.inter_node_bytes += float(traffic.inter_node_P.sum())
        self.kv_entries_peak = max(self.kv_entries_peak, float(shape.kv_entries_PR.max()))
        self.tokens_peak = max(self.tokens_peak, float(shape.tokens_PR.max()))


def chunks(passes: Iterable[Pass], *, num_layers: int, num_ranks: int) -> Iterator[list[Pass]]:
    """Group consecutive passes of one phase as far as memory allows."""
    batch: list[Pass] = []
    tokens, nbytes = 0, 0
    for item in passes:
        # Counts of rank pairs, or where these are few the choices themselves; and the Ops of further micro-batches.
        choices = item.num_tokens * item.parts[0].experts_TLK.shape[2]
        size = 40 * num_layers * min(num_ranks**2, SPARSE * choices) + 1000 * num_layers * num_ranks * (len(item.parts) - 1)
        full = len(batch) >= MAX_PASSES or tokens + item.num_tokens > MAX_TOKENS or nbytes + size > MAX_PAIR_BYTES
        if batch and (full or item.shape.is_prefill_P[0] != batch[0].shape.is_prefill_P[0]):
            yield batch
            batch, tokens, nbytes = [], 0, 0
        batch.append(item)
        tokens += item.num_tokens
        nbytes += size
    if batch:
        yield batch


def run_passes(
    passes: Iterable[Pass],
    *,
    builder: ProgramBuilder,
    compiler: LoadCompiler,
    keep_passes: int = 16,
    progress: Callable[[int], None] | None = None,
) -> ReplayRun:
    """Replay `passes` in order on an empty cluster and return what happened; `progress` is called with the passes done."""
    plan, cluster = compiler.plan, builder.cluster
    run = ReplayRun.empty(plan, keep_passes=keep_passes)
    engine = Engine(cluster.num_ranks)

    def batches() -> Generator[Any, Any, None]:
        for batch in chunks(passes, num_layers=plan.num_layers, num_ranks=cluster.num_ranks):
            program, traffic, parts = build_batch(batch, builder=builder, compiler=compiler)
            begin = engine.now
            times = yield from engine.execute_passes(program)
            overhead = builder.settings.host_overhead_us * 1e-6
            run.ledger.record(program, times, steps=[item.step for item in batch], begin_s=begin, overhead_s=overhead)
            if overhead:
                yield engine.env.timeout(overhead * len(batch))
            run.book(batch, parts, traffic, plan, cluster.devices_per_node)
            if progress is not None:
                progress(run.steps)

    engine.env.process(batches())
    engine.env.run()
    return run


def compiler_of(builder: ProgramBuilder) -> LoadCompiler:
    """Return the compiler for the plan of `builder`, with a row for every round of a layer."""
    plan, rounds = builder.plan, builder.settings.rounds
    if rounds > 1:
        share = None if plan.share_LS is None else np.repeat(plan.share_LS, rounds, axis=0)
        table = np.repeat(plan.slot_to_expert_LS, rounds, axis=0)
        plan = replace(plan, slot_to_expert_LS=table, share_LS=share, moe_layer_ids=tuple(range(len(table))))
    return LoadCompiler(plan, ranks_per_node=builder.cluster.devices_per_node)


def build_batch(batch: Sequence[Pass], *, builder: ProgramBuilder, compiler: LoadCompiler) -> tuple[Program, Traffic, list[StepLoads]]:
    """Compile the routing of passes of one phase and build their Program; return it, its bytes, and the loads of every micro-batch."""
    columns = list(zip(*(item.parts for item in batch), strict=True))
    parts = [(stack([part.shape for part in column]), compile_batch(compiler, column)) for column in columns]
    program, traffic = builder.build(parts, bool(batch[0].shape.is_prefill_P[0]))
    if builder.recorded is not None:
        program = builder.recorded.drive(program, batch, parts[0][1].rank_load_PLR)
    return program, traffic, [loads for _, loads in parts]


def one_pass(program: Program, row: int = 0) -> Program:
    """Return a Program of one of the passes with work of shape [R], which can run beside Flows."""

    def mine(value: np.ndarray) -> np.ndarray:
        return value[min(row, len(value) - 1)] if value.ndim == 2 else value

    def alone(op: Op) -> Op:
        jobs = tuple(replace(job, work_s=mine(job.work_s)) if job.work_s.ndim == 2 else job for job in op.jobs)
        return replace(op, provenance=mine(np.asarray(op.provenance)), jobs=jobs)

    return Program(program.num_ranks, [alone(op) for op in program.ops])


def since(times: Times, begin_s: float) -> Times:
    """Return the times counted from `begin_s`."""
    return Times(
        start=[value - begin_s for value in times.start],
        gate=[None if value is None else value - begin_s for value in times.gate],
        end=[value - begin_s for value in times.end],
        finish=times.finish - begin_s,
    )


def compile_batch(compiler: LoadCompiler, batch: Sequence[Part]) -> StepLoads:
    """Compile the routing of several passes in one call."""
    if len(batch) == 1:
        return compiler.compile(experts_TLK=batch[0].experts_TLK, rank_T=batch[0].rank_T, valid_TLK=batch[0].valid_TLK)
    lengths = [len(item.rank_T) for item in batch]
    valid = None
    if any(item.valid_TLK is not None for item in batch):
        valid = np.concatenate([np.ones(item.experts_TLK.shape, dtype=bool) if item.valid_TLK is None else item.valid_TLK for item in batch])
    return compiler.compile(
        experts_TLK=np.concatenate([item.experts_TLK for item in batch]),
        rank_T=np.concatenate([item.rank_T for item in batch]),
        valid_TLK=valid,
        pass_start_P=np.cumsum([0, *lengths[:-1]]),
    )
