"""A migration during serving: 300 MB of experts move from rank 0 to rank 1 beside passes whose exchanges use the same ports."""

from collections.abc import Generator
from typing import Any

import numpy as np

from moesim.sim.engine import Engine
from moesim.sim.flows import Flow
from moesim.sim.ops import Program

RANKS = 2
BANDWIDTH = 50e9  # bytes/s, each port


def forward() -> Program:
    """Return 4 ms of computation and 2 ms of exchange."""
    program = Program(RANKS)
    compute = program.local("compute", np.full(RANKS, 4e-3))
    work = np.full(RANKS, 2e-3)
    program.collective("exchange", work, work, group_R=np.zeros(RANKS, dtype=int), port="scale_out", deps=[compute])
    return program


def serve(discipline: str | None) -> None:
    """Run four passes; the migration is decided 5 ms after the start, in the middle of an exchange."""
    engine = Engine(RANKS)
    ends: list[float] = []
    flow = Flow("experts", 300e6, {("scale_out.out", 0): BANDWIDTH, ("scale_out.in", 1): BANDWIDTH}, discipline or "low")

    def server() -> Generator[Any, Any, None]:
        for _ in range(4):
            yield from engine.execute(forward())
            ends.append(engine.now)

    def balancer() -> Generator[Any, Any, None]:
        yield engine.env.timeout(5e-3)
        if discipline is not None:
            yield engine.start_flow(flow)

    engine.env.process(server())
    engine.env.process(balancer())
    engine.env.run()
    passes = " ".join(f"{value * 1e3:4.1f}" for value in np.diff([0.0, *ends]))
    print(f"{discipline or 'no migration':<14}{passes}" + ("" if discipline is None else f"   arrived at {flow.end_s * 1e3:.1f} ms"))


print("pass times, ms")
for discipline in (None, "fair", "low"):
    serve(discipline)
