"""What serves while a plan changes: the plan in force, the live ranks, the engine that runs passes, and the record of it all.

Shapes: R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from moesim.errors import SimulationError
from moesim.model import sizes
from moesim.plan import Plan
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.change_report import ChangeRun, Epoch
from moesim.sim.engine import Engine
from moesim.sim.loads import LoadCompiler, StepLoads
from moesim.sim.membership import alive_of
from moesim.sim.migration import MigrationSettings
from moesim.sim.replay import ReplayRun, build_batch, one_pass, since
from moesim.sim.succession import check_next

Steps = Generator[Any, Any, None]
"""Part of the simpy process that serves."""


class Serving:
    """The state of a run, and how one pass of it runs."""

    def __init__(
        self,
        plan: Plan,
        builder_factory: Callable[[Plan], ProgramBuilder],
        compiler_factory: Callable[[Plan], LoadCompiler] | None,
        migration: MigrationSettings,
        keep_passes: int,
    ) -> None:
        self.builder_factory, self.migration = builder_factory, migration
        self.builder = builder_factory(plan)
        self.cluster, self.model = self.builder.cluster, self.builder.model
        self.compiler_factory = compiler_factory or (lambda plan: LoadCompiler(plan, ranks_per_node=self.cluster.devices_per_node))
        self.expert_bytes = sizes.expert_bytes(self.model)
        self.engine = Engine(self.cluster.num_ranks)
        self.env = self.engine.env
        self.plan, self.alive_R = plan, alive_of(plan)
        self.in_pass = False
        self.dead: list[tuple[float, tuple[int, ...]]] = []
        """Deaths (time, ranks) that service has not recovered from."""
        self.failure = self.env.event()
        self.kv_R = np.zeros(self.cluster.num_ranks)
        self.out = ChangeRun(replay=ReplayRun.empty(plan, keep_passes=keep_passes), plan=plan, alive_R=self.alive_R)
        self.install(plan, self.alive_R, "start")

    def install(self, plan: Plan, alive_R: np.ndarray, reason: str) -> None:
        """Let `plan` serve from now on. Raises SimulationError within a pass: dispatch and combine would disagree about the map."""
        if self.in_pass:
            raise SimulationError(f"plan change ({reason}) at {self.engine.now} s: a pass is running; install at a step border")
        check_next(self.plan, plan, alive_R, same_slots=False)
        out = self.out
        if reason != "start":
            self.builder = self.builder_factory(plan)
        self.plan, self.alive_R, self.compiler = plan, alive_R.copy(), self.compiler_factory(plan)
        live, at_s, first = int(alive_R.sum()), self.engine.now, out.replay.steps
        out.epochs.append(Epoch(number=len(out.epochs), reason=reason, first_pass=first, at_s=at_s, ranks=live, map_sha256=plan.map_sha256))

    def log(self, kind: str, **details: Any) -> None:
        """Note an event."""
        self.out.events.append({"kind": kind, "at_s": self.engine.now, "passes": self.out.replay.steps, **details})

    @property
    def row_s(self) -> float:
        """Seconds of a rank's experts per routed choice, over the run so far."""
        replay = self.out.replay
        return replay.ledger.total_s.get("experts", 0.0) * self.cluster.num_ranks / replay.sums.routed if replay.sums.routed else 0.0

    def execute(self, item: Pass) -> Generator[Any, Any, np.ndarray | None]:
        """Run one pass; return its routed choices float64 [L, E], or None if a failure cut it short."""
        engine, out = self.engine, self.out
        program, traffic, parts = build_batch([item], builder=self.builder, compiler=self.compiler)
        program = one_pass(program)
        self.kv_R = item.shape.kv_entries_PR[0]
        begin = engine.now
        self.in_pass = True
        running = self.env.process(engine.execute(program))
        yield running | self.failure
        cut = not running.triggered
        if cut:
            # Kernels that were issued run to their end; nobody uses their results.
            yield running
        self.in_pass = False
        if cut:
            out.wasted_s += min(at_s for at_s, _ in self.dead) - begin
            return None
        overhead = self.builder.settings.host_overhead_us * 1e-6
        out.replay.ledger.record(program, since(running.value, begin), steps=[item.step], begin_s=begin, overhead_s=overhead)
        if overhead:
            yield self.env.timeout(overhead)
        out.replay.book([item], parts, traffic, self.plan, self.cluster.devices_per_node, None if self.alive_R.all() else self.alive_R)
        return routed_LE(self.plan, parts)


def routed_LE(plan: Plan, parts: list[StepLoads]) -> np.ndarray:
    """Return float64 [L, E]: the routed choices of a pass that ran under `plan`."""
    load_LE = np.zeros((plan.num_layers, plan.num_experts))
    layer, slot = np.nonzero(plan.slot_to_expert_LS >= 0)
    for loads in parts:
        np.add.at(load_LE, (layer, plan.slot_to_expert_LS[layer, slot]), loads.slot_PLS.sum(axis=0)[layer, slot])
    return load_LE
