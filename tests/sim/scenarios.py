"""Random small scenarios for comparing engines: overlap, stages, training, chunks, misses, collectives in groups, flows mid-pass."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.provenance import Provenance, Timing, timing
from moesim.sim.build_layer import BatchTimes, MoeTimes, Site
from moesim.sim.build_pipeline import Pipeline
from moesim.sim.flows import Flow
from moesim.sim.ops import COMM, COMPUTE, COPY, Job, Op, Program
from moesim.sim.pipeline_settings import PipelineSettings
from moesim.sim.replay import one_pass
from moesim.sim.schedules import schedule
from moesim.sim.settings import Settings
from moesim.sim.stages import Stages


class Decided:
    """A hook that has made up its mind."""

    def __init__(self, work: np.ndarray) -> None:
        self.work = work

    def __call__(self, ready: np.ndarray) -> np.ndarray:
        return self.work


class OnTheClock(Decided):
    """A hook whose decision depends on when it is asked."""

    def __call__(self, ready: np.ndarray) -> np.ndarray:
        return self.work * (1.0 + np.sin(ready)) / 2


PORTS = ("scale_up.out", "scale_up.in", "scale_out.out", "scale_out.in", "host.in")


@dataclass
class Scenario:
    program: Program
    flows: list[tuple[float, Flow]]
    """When each starts."""
    cancels: list[tuple[float, int]] = field(default_factory=list)
    """When a flow, by its place, is cancelled."""
    failures: list[tuple[float, int]] = field(default_factory=list)
    """When a rank fails."""
    hooks: Literal["ahead", "reached"] = "ahead"


def two_batch_overlap(rng: np.random.Generator, ranks: int, layers: int) -> Program:
    """Two micro-batches whose exchanges run beside each other's computation."""
    program = Program(ranks)
    previous: list[list[int]] = [[], []]
    groups = np.zeros(ranks, dtype=int)
    for layer in range(layers):
        gates, arrived = [], []
        for batch in range(2):
            gates.append(program.local("attention", rng.uniform(0.1, 1, ranks), deps=previous[batch], layer=layer))
            arrived.append(
                program.collective(
                    "dispatch", rng.uniform(0.1, 1, ranks), rng.uniform(0.1, 1, ranks), group_R=groups, port="scale_up", deps=[gates[batch]], layer=layer
                )
            )
        for batch in range(2):
            experts = program.local("experts", rng.uniform(0.1, 1, ranks), deps=[arrived[batch]], layer=layer)
            previous[batch] = [
                program.collective(
                    "combine", rng.uniform(0.1, 1, ranks), rng.uniform(0.1, 1, ranks), group_R=groups, port="scale_out", deps=[experts], layer=layer
                )
            ]
    return program


def pipeline(rng: np.random.Generator, ranks: int, micro_batches: int) -> Program:
    """PP = 2: micro-batches run on the first half of the ranks, are sent on, and run on the second half."""
    program = Program(ranks)
    half = ranks // 2
    first = np.arange(ranks) < half
    pairs = np.arange(ranks) % half
    for _ in range(micro_batches):
        a = program.local("stage0", rng.uniform(0.1, 1, ranks), ranks_R=first)
        sent = program.collective(
            "p2p", np.where(first, rng.uniform(0.1, 1, ranks), 0), np.where(first, 0, rng.uniform(0.1, 1, ranks)), group_R=pairs, port="scale_out", deps=[a]
        )
        program.local("stage1", rng.uniform(0.1, 1, ranks), deps=[sent], ranks_R=~first)
    return program


def random_times(rng: np.random.Generator, ranks: int, rows: int, chunks: int, chunks_backward: int) -> BatchTimes:
    """Times of one micro-batch of one pass, of which a MoE layer is cut into chunks."""

    def some(*shape: int) -> Timing:
        return timing(rng.uniform(0.1, 1, (1, *shape, ranks)), Provenance.MEASURED)

    def exchange() -> ExchangeTiming:
        send, recv = some(rows), some(rows)
        return ExchangeTiming(send_s=send.seconds, recv_s=recv.seconds, provenance=send.provenance)

    def moe(count: int) -> tuple[MoeTimes, ...]:
        return tuple(MoeTimes(dispatch=exchange(), experts=some(rows), combine=exchange()) for _ in range(count))

    one = {name: some() for name in ("embedding", "attention", "dense", "gate", "head")}
    shared, forward = some() if rng.random() < 0.5 else None, moe(chunks)
    return BatchTimes(
        tokens_PR=rng.integers(1, 9, (1, ranks)).astype(np.float64),
        core_PR=rng.uniform(0, 1, (1, ranks)),
        reduce=some() if rng.random() < 0.3 else None,
        shared=shared,
        moe=forward,
        moe_backward=forward if chunks_backward == chunks else moe(chunks_backward),
        embedding=one["embedding"],
        attention=one["attention"],
        dense=one["dense"],
        gate_L=(one["gate"],) * rows,
        head=one["head"],
    )


def staged(rng: np.random.Generator, ranks: int) -> Program:
    """Two pipeline stages as the builder makes them: inference or training, any schedule, chunks, rounds, interference."""
    name = str(rng.choice(["forward", "gpipe", "1f1b", "interleaved", "dualpipe"]))
    micro = {"interleaved": 2, "dualpipe": 4}.get(name, int(rng.integers(1, 4)))
    chunks, backward, rounds = (int(rng.integers(1, 3)) for _ in range(3))
    wanted = PipelineSettings(train=name != "forward", schedule=name, chunks=chunks, chunks_backward=backward if name != "forward" else 0)
    order = schedule(name, stages=2, micro_batches=micro, virtual=2 if name == "interleaved" else 1)
    share = float(rng.choice([0.0, 0.3]))
    placement = str(rng.choice(["serial", "beside_dispatch", "beside_combine"]))
    settings = Settings(pipeline=wanted, rounds=rounds, comm_sm_share=share, shared_experts=placement)
    half, program = ranks // 2, Program(ranks)
    stages = Stages(order=order, ranks=half, layers=tuple(range(chunk, chunk + 1) for chunk in range(order.num_chunks)))
    port = str(rng.choice(["scale_up", "scale_out"]))
    group_R, tp_R = np.zeros(ranks, dtype=int), np.arange(ranks)
    sites = [Site(program, columns=stages.columns(s), mask_R=stages.mask_R(s), group_R=group_R, tp_group_R=tp_R, port=port) for s in range(2)]
    model: Any = SimpleNamespace(num_layers=order.num_chunks, moe_layer_ids=(1, 3)[: order.num_chunks // 2], hidden_size=1, dtype="bfloat16")
    batches = [random_times(rng, half, rounds * len(model.moe_layer_ids), chunks, backward) for _ in range(micro)]
    devices = int(rng.choice([half, ranks]))
    cluster: Any = SimpleNamespace(node_of=lambda rank: rank // devices)
    costs: Any = SimpleNamespace(p2p=lambda nbytes, nodes: timing(nbytes * 0.05, Provenance.MEASURED))
    Pipeline(program, stages, sites, batches, cluster=cluster, model=model, settings=settings, costs=costs).run()
    return one_pass(program)


def offload(rng: np.random.Generator, ranks: int, layers: int, *, on_clock: bool = False) -> Program:
    """A gate after which a hook decides how long the missing experts take to load."""
    program = Program(ranks)
    last: list[int] = []
    for layer in range(layers):
        gate = program.local("attention", rng.uniform(0.1, 1, ranks), deps=last, layer=layer)
        miss = np.where(rng.random(ranks) < 0.5, rng.uniform(0, 1, ranks), 0.0)
        load = program.local("load", np.zeros(ranks), lane=COPY, port="host.in", deps=[gate], layer=layer, decide=(OnTheClock if on_clock else Decided)(miss))
        last = [program.local("experts", rng.uniform(0.1, 1, ranks), deps=[gate, load], layer=layer)]
    return program


def anything(rng: np.random.Generator, ranks: int, ops: int) -> Program:
    """Ops at random: any lane, group, subset of ranks and earlier dependencies."""
    program = Program(ranks)
    for index in range(ops):
        deps = [int(d) for d in rng.choice(index, size=min(index, int(rng.integers(0, 3))), replace=False)] if index else []
        mask = rng.random(ranks) < 0.7 if rng.random() < 0.3 else None
        if mask is not None and not mask.any():
            mask = None
        if rng.random() < 0.5:
            program.local(
                "op", rng.uniform(0, 1, ranks), lane=str(rng.choice([COMPUTE, COMM, COPY])), port=str(rng.choice(["sm", "host.in"])), deps=deps, ranks_R=mask
            )
        else:
            program.collective(
                "exchange",
                rng.uniform(0, 1, ranks),
                rng.uniform(0, 1, ranks),
                group_R=rng.integers(0, 3, ranks),
                port=str(rng.choice(["scale_up", "scale_out"])),
                deps=deps,
                ranks_R=mask,
            )
    return program


def ring(rng: np.random.Generator, ranks: int, rounds: int) -> Program:
    """Neighbours pass chunks on around a ring while computation runs beside them, slowed by the SMs that the exchange takes."""
    program = Program(ranks)
    source = (np.arange(ranks) - 1) % ranks
    last: list[int] = []
    for _ in range(rounds):
        program.local("gemm", rng.uniform(0.1, 2, ranks))
        jobs = (Job(port="scale_up.out", work_s=rng.uniform(0, 1, ranks)), Job(port="scale_up.in", work_s=rng.uniform(0, 1, ranks), side="recv"))
        last = [program.add(Op(label="step", lane=COMM, jobs=jobs, deps=tuple(last), source_R=source, sm_share=float(rng.choice([0.0, 0.2, 0.5]))))]
    return program


def interfering(rng: np.random.Generator, program: Program) -> Program:
    """The same Ops, of which some that communicate take SMs."""
    result = Program(program.num_ranks)
    for op in program.ops:
        result.add(replace(op, sm_share=float(rng.uniform(0, 0.6))) if op.lane == COMM and rng.random() < 0.7 else op)
    return result


def random_flow(rng: np.random.Generator, name: str, width: dict[tuple[str, int], float], ranks: int) -> Flow:
    """Any path, discipline, class, weight and chunk; one flow in five reaches less than the ports' bandwidth."""
    path = {}
    for _ in range(int(rng.integers(2, 7))):
        hop = (str(rng.choice(PORTS)), int(rng.integers(ranks)))
        path[hop] = width.setdefault(hop, float(rng.uniform(1, 10))) * (float(rng.uniform(0.5, 1)) if rng.random() < 0.2 else 1.0)
    total = float(rng.uniform(1, 15))
    return Flow(
        name,
        total,
        path,
        str(rng.choice(["fair", "fair", "low", "fifo", "fifo"])),
        int(rng.choice([0, 0, 0, 1, 2])),
        float(rng.choice([1.0, 1.0, 0.5, 3.0])),
        total / float(rng.uniform(1, 6)) if rng.random() < 0.6 else None,
    )


def scenario(seed: int) -> Scenario:
    """One case in six: overlap, pipeline stages, offload, anything, ring; hooks that look at the clock; flows, cancels, failures."""
    rng = np.random.Generator(np.random.PCG64(seed))
    ranks = int(rng.choice([2, 4, 6]))
    kind = seed % 6
    hooks: Literal["ahead", "reached"] = "ahead"
    if kind == 0:
        program = two_batch_overlap(rng, ranks, int(rng.integers(1, 4)))
        program = interfering(rng, program) if rng.random() < 0.5 else program
    elif kind == 1:
        program = pipeline(rng, ranks, int(rng.integers(1, 5))) if rng.random() < 0.6 else staged(rng, ranks)
    elif kind == 2:
        hooks = "reached" if rng.random() < 0.6 else "ahead"
        program = offload(rng, ranks, int(rng.integers(1, 6)), on_clock=hooks == "reached")
    elif kind == 3:
        program = anything(rng, ranks, int(rng.integers(1, 14)))
    elif kind == 4:
        program = ring(rng, ranks, int(rng.integers(1, 6)))
    else:
        program = interfering(rng, anything(rng, ranks, int(rng.integers(1, 10))))
    width: dict[tuple[str, int], float] = {}
    flows = [(float(rng.uniform(0, 4)), random_flow(rng, f"flow{number}", width, ranks)) for number in range(int(rng.integers(0, 5)))]
    cancels = [(start + float(rng.uniform(0, 3)), number) for number, (start, _) in enumerate(flows) if rng.random() < 0.25]
    failures = [(float(rng.uniform(0, 5)), int(rng.integers(ranks)))] if rng.random() < 0.2 else []
    return Scenario(program, flows, cancels, failures, hooks)
