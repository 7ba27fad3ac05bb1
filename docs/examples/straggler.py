"""A layer with a straggler: rank 2 has twice the tokens of the others, and everybody waits for it in the combine."""

import numpy as np

from moesim.sim.engine import Engine
from moesim.sim.evaluate import Times
from moesim.sim.ops import Program

RANKS = 4
EVERYBODY = np.zeros(RANKS, dtype=int)  # one process group


def layer(expert_ms: list[float]) -> Program:
    """Return attention → dispatch → experts → combine; work is in seconds at the full rate of a port."""
    program = Program(RANKS)
    attention = program.local("attention", np.full(RANKS, 2e-3))
    dispatch = program.collective("dispatch", np.full(RANKS, 1e-3), np.full(RANKS, 1e-3), group_R=EVERYBODY, port="scale_up", deps=[attention])
    experts = program.local("experts", np.array(expert_ms) * 1e-3, deps=[dispatch])
    program.collective("combine", np.full(RANKS, 1e-3), np.full(RANKS, 1e-3), group_R=EVERYBODY, port="scale_up", deps=[experts])
    return program


def run(program: Program) -> Times:
    """Let one Actor execute the program on an idle cluster."""
    engine = Engine(RANKS)
    result: list[Times] = []

    def actor():  # type: ignore[no-untyped-def]
        result.append((yield from engine.execute(program)))

    engine.env.process(actor())
    engine.env.run()
    return result[0]


def show(title: str, program: Program, times: Times) -> None:
    print(title)
    for index, op in enumerate(program.ops):
        start, end = (np.broadcast_to(value, RANKS) * 1e3 for value in (times.start[index], times.end[index]))
        print(f"  {op.label:<10}" + "".join(f"{a:5.0f} →{b:3.0f}" for a, b in zip(start, end, strict=True)))
    print(f"  the layer ends at {float(times.finish) * 1e3:.0f} ms")


for title, expert_ms in (("straggler: start → end in ms, ranks 0 to 3", [4.0, 4.0, 8.0, 4.0]), ("balanced: the same 20 ms of work", [5.0, 5.0, 5.0, 5.0])):
    program = layer(expert_ms)
    show(title, program, run(program))
