"""Random small scenarios for comparing engines: overlap, stages, misses, collectives in groups, flows mid-pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.sim.flows import Flow
from moesim.sim.ops import COMM, COMPUTE, COPY, Program


class Decided:
    """A hook that has made up its mind."""

    def __init__(self, work: np.ndarray) -> None:
        self.work = work

    def __call__(self, ready: np.ndarray) -> np.ndarray:
        return self.work


PORTS = ("scale_up.out", "scale_up.in", "scale_out.out", "scale_out.in", "host.in")


@dataclass
class Scenario:
    program: Program
    flows: list[tuple[float, Flow]]


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


def offload(rng: np.random.Generator, ranks: int, layers: int) -> Program:
    """A gate after which a hook decides how long the missing experts take to load."""
    program = Program(ranks)
    last: list[int] = []
    for layer in range(layers):
        gate = program.local("attention", rng.uniform(0.1, 1, ranks), deps=last, layer=layer)
        miss = np.where(rng.random(ranks) < 0.5, rng.uniform(0, 1, ranks), 0.0)
        load = program.local("load", np.zeros(ranks), lane=COPY, port="host.in", deps=[gate], layer=layer, decide=Decided(miss))
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


def scenario(seed: int) -> Scenario:
    rng = np.random.Generator(np.random.PCG64(seed))
    ranks = int(rng.choice([2, 4, 6]))
    kind = seed % 4
    if kind == 0:
        program = two_batch_overlap(rng, ranks, int(rng.integers(1, 4)))
    elif kind == 1:
        program = pipeline(rng, ranks, int(rng.integers(1, 5)))
    elif kind == 2:
        program = offload(rng, ranks, int(rng.integers(1, 6)))
    else:
        program = anything(rng, ranks, int(rng.integers(1, 14)))
    flows = []
    for number in range(int(rng.integers(0, 4))):
        hops = {(str(rng.choice(PORTS)), int(rng.integers(ranks))): float(rng.uniform(1, 10)) for _ in range(int(rng.integers(2, 7)))}
        flows.append((float(rng.uniform(0, 3)), Flow(f"flow{number}", float(rng.uniform(1, 15)), hops, str(rng.choice(["fair", "low"])))))
    return Scenario(program, flows)
