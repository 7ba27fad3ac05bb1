"""Replays passes whose experts lie behind a link: every rank caches its own experts, the exchanges couple the ranks.

The Programs are those of any replay; in front of a layer's experts stands an Op `expert_load` for the time in which a rank waits for
experts. On one device its gates follow from sums of work (`offload.Recurrence`), and passes are evaluated side by side. On several the
Engine reaches the Op with the time at which the rank knows what it needs, when its tokens have been dispatched, and a hook asks that
rank's Recurrence. Shapes: T passes, P of them in a batch, L MoE layers, R ranks, W wanted experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moesim.costs.provenance import Provenance
from moesim.errors import InputError, describe
from moesim.sim.batch import Pass, stack
from moesim.sim.build import ProgramBuilder, Traffic
from moesim.sim.cache import Counts
from moesim.sim.engine import Engine
from moesim.sim.evaluate import evaluate
from moesim.sim.loads import LoadCompiler, StepLoads
from moesim.sim.offload import Recurrence
from moesim.sim.offload_case import Decode, DecodeResult, Prefetch
from moesim.sim.offload_demand import Demand, Demands, demands_of, held_RLE
from moesim.sim.offload_tiers import Tiers, computing_s, tiers_of
from moesim.sim.ops import Job, Op, Program
from moesim.sim.predictors import PredictorView, predict
from moesim.sim.replay import ReplayRun, build_batch, chunks, one_pass, since
from moesim.sim.stores import Store

LOAD, EXPERTS = "expert_load", "experts"


@dataclass(frozen=True, slots=True)
class _Batch:
    """Passes of one phase and what they do."""

    items: list[Pass]
    first: int
    """Passes before it."""
    program: Program
    """With an Op `expert_load` before every layer's experts."""
    experts: list[int]
    """Ops of the experts, by MoE layer; the one before each is its `expert_load`."""
    traffic: Traffic
    loads: StepLoads


def run_offload(
    passes: Iterable[Pass],
    *,
    builder: ProgramBuilder,
    compiler: LoadCompiler,
    seed: int = 0,
    keep_passes: int = 16,
    progress: Callable[[int], None] | None = None,
    on_engine: bool = False,
) -> ReplayRun:
    """Replay `passes` in order with experts in the tier that the settings name, caches empty at first; return what happened.

    seed: of synthetic predictions. on_engine: go through the Engine on one device too (slow, for comparison). Raises InputError if the
    model does not fit its tiers or a policy decides what cannot be.
    """
    return _Run(passes, builder, compiler, seed, keep_passes).simulate(progress, on_engine or builder.cluster.num_ranks > 1)


class _Run:
    def __init__(self, passes: Iterable[Pass], builder: ProgramBuilder, compiler: LoadCompiler, seed: int, keep_passes: int) -> None:
        self.builder, self.settings, self.seed = builder, builder.settings.offload, seed
        if builder.settings.micro_batches > 1:
            rule = "must be 1 with offload.tier; a layer of a pass asks for its experts once"
            raise InputError(describe("--set", "micro_batches", builder.settings.micro_batches, rule))
        plan, cluster = builder.plan, builder.cluster
        self.out = ReplayRun.empty(plan, keep_passes=keep_passes)
        self.batches: list[_Batch] = []
        self.steps = 0
        for items in chunks(passes, num_layers=plan.num_layers, num_ranks=cluster.num_ranks):
            program, traffic, (loads,) = build_batch(items, builder=builder, compiler=compiler)
            self.batches.append(_Batch(items, self.steps, *_with_loads(program), traffic, loads))
            self.steps += len(items)
        if not self.batches:
            return
        self.demands = demands_of([([item.parts[0] for item in batch.items], batch.loads) for batch in self.batches], plan)
        shape = stack([item.shape for batch in self.batches for item in batch.items])
        self.tiers = tiers_of(builder, self.demands, kv_entries=float(shape.kv_entries_PR.max()) * builder.tp, tokens=float(shape.tokens_PR.max()))
        self.stores = [self.tiers.stores(rank, cluster) for rank in range(cluster.num_ranks)]

    def simulate(self, progress: Callable[[int], None] | None, on_engine: bool) -> ReplayRun:
        if not self.batches:
            return self.out
        results = self._on_engine(progress) if on_engine else [self._on_one_device(progress)]
        _report(self.out, results, self.tiers, self.stores, self.builder.cluster.devices_per_node)
        return self.out

    def _book(self, batch: _Batch, progress: Callable[[int], None] | None) -> None:
        """Add up a batch that has run."""
        self.out.book(batch.items, [batch.loads], batch.traffic, self.builder.plan, self.builder.cluster.devices_per_node)
        if progress is not None:
            progress(self.out.steps)

    # --- one device ----------------------------------------------------------------------------------

    def _on_one_device(self, progress: Callable[[int], None] | None) -> DecodeResult:
        """Step through all layers, then let the Programs tell where the time went."""
        overhead = self.builder.settings.host_overhead_us * 1e-6
        before: list[np.ndarray] = []
        last = np.zeros(1)
        for batch in self.batches:
            before_PL, after_P = _between(batch.program, batch.experts, len(batch.items))
            before_PL[:, 0] += np.r_[last[-1], after_P[:-1] + overhead]
            last = after_P + overhead
            before.append(before_PL)
        device = Recurrence(self._case(0, np.concatenate(before)))
        result = device.run()
        clock = 0.0
        wait_TL, work_TL = (np.maximum(np.asarray(values).reshape(self.steps, -1), 0.0) for values in (device.wait_P, device.work_P))
        for batch in self.batches:
            rows = slice(batch.first, batch.first + len(batch.items))
            ops = list(batch.program.ops)
            for layer, index in enumerate(batch.experts):
                ops[index - 1] = _set(ops[index - 1], wait_TL[rows, layer, None])
                ops[index] = _set(ops[index], work_TL[rows, layer, None])
            program = Program(1, ops)
            steps = [item.step for item in batch.items]
            clock = self.out.ledger.record(program, evaluate(program, 0.0), steps=steps, begin_s=clock, overhead_s=overhead)
            self._book(batch, progress)
        return result

    # --- several ranks -------------------------------------------------------------------------------

    def _on_engine(self, progress: Callable[[int], None] | None) -> list[DecodeResult]:
        """Execute pass after pass; a hook per layer asks the ranks' Recurrences."""
        ranks, layers = self.builder.cluster.num_ranks, self.builder.plan.num_layers
        devices = [Recurrence(self._case(rank, np.zeros((self.steps, layers)))) for rank in range(ranks)]
        engine, overhead = Engine(ranks), self.builder.settings.host_overhead_us * 1e-6

        def load(position: int) -> Callable[[np.ndarray], np.ndarray]:
            def decide(ready_R: np.ndarray) -> np.ndarray:
                for device, ready in zip(devices, ready_R.tolist(), strict=True):
                    device.layer(position, ready)
                return np.maximum([device.wait_P[-1] for device in devices], 0.0)

            return decide

        def work(ready_R: np.ndarray) -> np.ndarray:
            return np.array([device.work_P[-1] for device in devices])

        def serve() -> Generator[Any, Any, None]:
            for batch in self.batches:
                for row, item in enumerate(batch.items):
                    program = one_pass(batch.program, row)
                    for layer, index in enumerate(batch.experts):
                        program.ops[index - 1] = replace(program.ops[index - 1], decide=load((batch.first + row) * layers + layer))
                        program.ops[index] = replace(program.ops[index], decide=work)
                    begin = engine.now
                    times = yield from engine.execute(program)
                    self.out.ledger.record(program, since(times, begin), steps=[item.step], begin_s=begin, overhead_s=overhead)
                    if overhead:
                        yield engine.env.timeout(overhead)
                self._book(batch, progress)

        engine.env.process(serve())
        engine.env.run()
        return [device.finish(np.asarray(self.out.ledger.duration_s)) for device in devices]

    # --- what a rank is given ------------------------------------------------------------------------

    def _case(self, rank: int, before_TL: np.ndarray) -> Decode:
        settings, tiers, demand = self.settings, self.tiers, self.demands.of_rank[rank]
        device_store, host_store = self.stores[rank]
        computes = settings.cpu_flops != ""
        return Decode(
            routes_TLK=demand.experts_TLW,
            num_experts=self.builder.plan.num_experts,
            attention_s=before_TL,
            gate_s=0.0,
            expert_s=self._work_TLW(rank, demand),
            expert_bytes=tiers.expert_bytes,
            host=tiers.host,
            cache=tiers.caches[rank],
            prefetch=self._prefetch(rank),
            miss=settings.miss or "load",
            low_bytes=tiers.low_bytes,
            compute_s=(lambda layer, expert, tokens: computing_s(self.builder, tiers, tokens)) if computes else None,
            expert_start=settings.expert_start,
            tokens_TLK=demand.tokens_TLW,
            weights_TLK=demand.weights_TLW,
            disk=tiers.disk,
            host_cache=tiers.host_caches[rank] if tiers.host_caches is not None else None,
            device_store=device_store,
            host_store=host_store,
        )

    def _work_TLW(self, rank: int, demand: Demand) -> np.ndarray:
        """Return the time of every wanted expert: its part of the layer's time, in proportion to what it would take alone."""
        parts = [[np.broadcast_to(batch.program.ops[index].jobs[0].work_s, (len(batch.items), self.builder.cluster.num_ranks))[:, rank]
                  for index in batch.experts] for batch in self.batches]  # fmt: skip
        layer_TL = np.concatenate([np.stack(part, axis=1) for part in parts])
        alone = np.where(demand.tokens_TLW > 0, self.builder.costs.experts(demand.tokens_TLW[..., None, None]).seconds[..., 0], 0.0)
        total = alone.sum(axis=-1)
        return alone * np.divide(layer_TL, total, out=np.zeros_like(layer_TL), where=total > 0)[..., None]

    def _prefetch(self, rank: int) -> Prefetch | None:
        settings = self.settings
        if settings.predictor in ("", "none"):
            return None
        guess = self._predicted()
        held_LE = held_RLE(self.builder.plan)[rank]
        mine = held_LE[np.arange(len(held_LE))[None, :, None], np.maximum(guess, 0)]
        return Prefetch(
            predicted_TLK=np.where(mine, guess, -1),
            lookahead=settings.lookahead,
            issue=settings.issue,
            across_steps=settings.across_steps,
            into=settings.into,
            cost_s=settings.amount("predict_time") or 0.0,
            device=settings.predict_on,
            cancel_wrong=settings.cancel_wrong,
        )

    def _predicted(self) -> np.ndarray:
        """Return what is predicted for every pass and layer, over all ranks; each of them loads what it holds."""
        demands: Demands = self.demands
        view = PredictorView(
            routes_TLK=demands.everywhere.experts_TLW, num_experts=self.builder.plan.num_experts, recorded_TLK=demands.recorded_TLN, seed=self.seed
        )
        return predict(self.settings.predictor, view)


def _with_loads(program: Program) -> tuple[Program, list[int]]:
    """Return the Program with an Op `expert_load` before every layer's experts, and the places of the experts."""
    result, place, experts = Program(program.num_ranks), [0] * len(program.ops), []
    for index, op in enumerate(program.ops):
        deps = tuple(place[dep] for dep in op.deps)
        if op.label == EXPERTS:
            wait = Job(port="none", work_s=np.zeros(program.num_ranks))
            deps = (result.add(Op(label=LOAD, lane=op.lane, jobs=(wait,), deps=deps, layer=op.layer, provenance=int(Provenance.ROOFLINE))),)
            experts.append(deps[0] + 1)
        place[index] = result.add(replace(op, deps=deps))
    return result, experts


def _between(program: Program, experts: list[int], passes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 [P, L], the work of one device before every layer's experts, and [P], that after the last."""
    before = np.zeros((passes, len(experts) + 1))
    row = 0
    for index, op in enumerate(program.ops):
        if row < len(experts) and index == experts[row]:
            row += 1
        else:
            before[:, row] += op.jobs[0].work_s[..., 0]
    return before[:, :-1], before[:, -1]


def _set(op: Op, work_s: np.ndarray) -> Op:
    return replace(op, jobs=(replace(op.jobs[0], work_s=work_s), *op.jobs[1:]))


def _report(out: ReplayRun, results: list[DecodeResult], tiers: Tiers, stores: list[tuple[Store, Store | None]], per_node: int) -> None:
    """Add what the ranks' caches and links did to the record of the run."""
    counts = Counts()
    stalls: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    for result in results:
        for name, value in asdict(result.counts).items():
            setattr(counts, name, getattr(counts, name) + value)
        stalls.update(result.stall_s)
        moved.update(result.moved_bytes)
    out.cache = counts.report()
    out.stall_s = {cause: seconds / len(results) for cause, seconds in stalls.items()}
    out.link_bytes = dict(moved)
    dense = tiers.dense
    experts = max(result.peak_bytes[dense.tier] for result in results)
    out.memory = {
        dense.tier: {"weights": dense.weights_bytes, "kv": dense.kv_bytes, "activations": dense.activation_bytes, "experts": float(experts)},
        tiers.home: {"experts": tiers.home_bytes},
    }
    if tiers.host_tier is not None:
        cached = [float(result.peak_bytes[tiers.host_tier]) for result in results]
        out.memory[tiers.host_tier] = {"experts": max(sum(cached[low : low + per_node]) for low in range(0, len(cached), per_node))}
