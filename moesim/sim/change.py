"""Replays passes while the plan changes: a balancer rebalances, ranks die, leave and join.

Passes run one by one on the engine's clock; migrations are Flows beside them. A new plan takes effect at the first step border after
its copies have arrived, never within a pass. One change is under way at a time; a failure aborts it. Shapes: K passes, L MoE layers,
E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from moesim.plan import Plan
from moesim.sim.balancer import Balancer, Rebalancer
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.change_carrier import REBALANCE, Carrier
from moesim.sim.change_ranks import Ranks
from moesim.sim.change_report import ChangeRun
from moesim.sim.change_serving import Serving, Steps
from moesim.sim.loads import LoadCompiler
from moesim.sim.membership import Event, Membership, reshard
from moesim.sim.migration import MigrationSettings, price_of

WATCHED = 8
"""Passes whose loads recovery goes by where no balancer says how many."""


def run_with_change(
    passes: Iterable[Pass],
    *,
    plan: Plan,
    builder_factory: Callable[[Plan], ProgramBuilder],
    compiler_factory: Callable[[Plan], LoadCompiler] | None = None,
    balancer: Balancer | None = None,
    events: Sequence[Event] = (),
    migration: MigrationSettings | None = None,
    membership: Membership | None = None,
    keep_passes: int = 16,
    progress: Callable[[int], None] | None = None,
) -> ChangeRun:
    """Replay `passes` in order, starting under `plan`, and return what happened.

    Ranks without an expert in `plan` are masked until they join. builder_factory: makes the ProgramBuilder of every plan, all for one cluster,
    model and settings (share the CostModel between them). compiler_factory: likewise; None: the plain LoadCompiler. events: deaths, leaves and
    joins in any order; what is due after the last pass does not happen. Raises InputError if an event does not fit the cluster,
    SimulationError if a planner breaks its promise, the last rank dies, or the survivors' memory does not hold the experts.
    """
    serving = Serving(plan, builder_factory, compiler_factory, migration or MigrationSettings(), keep_passes)
    run = _Run(serving, balancer, events, membership or Membership())
    return run.simulate(passes, progress)


class _Run:
    """One run: what is done between two passes, and by whom."""

    def __init__(self, serving: Serving, balancer: Balancer | None, events: Sequence[Event], membership: Membership) -> None:
        self.serving, self.balancer = serving, balancer
        # Without a balancer the loads are watched all the same: recovery places experts by them.
        self.rebalancer = Rebalancer(balancer or Balancer(planner=_nobody, policy="never", window=WATCHED))
        self.carrier = Carrier(serving, membership.rebuild_s)
        self.ranks = Ranks(serving, self.carrier, membership, events, lambda: self.rebalancer.load_KLE(serving.plan))

    def simulate(self, passes: Iterable[Pass], progress: Callable[[int], None] | None) -> ChangeRun:
        serving, out = self.serving, self.serving.out
        serving.env.run(until=serving.env.process(self._serve(passes, progress)))
        self.carrier.abort("end of the run")
        out.plan, out.alive_R, out.total_s = serving.plan, serving.alive_R, serving.engine.now
        self.carrier.room(serving.plan, np.zeros(serving.cluster.num_ranks))
        return out

    def _serve(self, passes: Iterable[Pass], progress: Callable[[int], None] | None) -> Steps:
        serving = self.serving
        for item in passes:
            yield from self._border()
            while (load_LE := (yield from serving.execute(reshard(item, serving.alive_R)))) is None:
                serving.out.tokens_retried += item.num_tokens
                yield from self._border()
            self.rebalancer.observe(load_LE)
            self._decide()
            if progress is not None:
                progress(serving.out.replay.steps)

    def _border(self) -> Steps:
        """Do what is due between two passes."""
        carrier = self.carrier
        while True:
            if self.serving.dead:
                yield from self.ranks.recover()
            elif carrier.pending is not None and carrier.pending.arrived:
                yield from carrier.install_chunk()
            elif carrier.pending is None and self.ranks.waiting:
                self.ranks.change_next()
            elif carrier.pending is not None and self.serving.migration.mode == "pause":
                yield from carrier.wait()
            else:
                return

    def _decide(self) -> None:
        """Let the balancer decide where it is due and nothing else is under way, and begin to carry its plan out."""
        serving, balancer = self.serving, self.balancer
        if balancer is None or self.carrier.pending is not None or self.ranks.waiting or serving.dead or not self.rebalancer.due:
            return
        planner_s = balancer.plan_s(serving.plan)
        price = price_of(serving.cluster, serving.migration, serving.expert_bytes, planner_s)
        decision = self.rebalancer.decide(serving.plan, alive_R=serving.alive_R, expert_bytes=serving.expert_bytes, row_s=serving.row_s, price=price)
        if decision.target is None:
            return
        serving.out.decisions += 1
        record = decision.record()
        serving.log("decision", decided=record.pop("kind"), **{name: value for name, value in record.items() if name != "passes"})
        self.carrier.begin(REBALANCE, decision.target, serving.alive_R, planner_s, decline=not decision.acts)


def _nobody(load_KLE: np.ndarray, plan: Plan, budget_slots: int | None) -> Plan:
    return plan
