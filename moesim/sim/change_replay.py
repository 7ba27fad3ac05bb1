"""Replays passes with the changes that the settings `change.…` describe, and says what they did in the words of a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from moesim.errors import InputError, describe
from moesim.plan import Plan
from moesim.sim.balancer import Balancer, Planner
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.change import run_with_change
from moesim.sim.change_report import ChangeRun
from moesim.sim.change_settings import ChangeSettings
from moesim.sim.membership import Event, Membership, alive_of, ladder, refill
from moesim.sim.migration import MigrationSettings


def run_change(
    passes: Iterable[Pass],
    *,
    plan: Plan,
    settings: ChangeSettings,
    builder_factory: Callable[[Plan], ProgramBuilder],
    planner: Planner,
    progress: Callable[[int], None] | None = None,
) -> ChangeRun:
    """Replay `passes` in order, starting under `plan`, with a balancer that asks `planner`, and with ranks that die, leave and join."""
    start = started(plan, settings.start_ranks)
    balancer = balancer_of(settings, planner) if settings.balancer else None
    return run_with_change(
        passes,
        plan=start,
        builder_factory=builder_factory,
        balancer=balancer,
        events=events_of(settings, int(alive_of(start).sum()), plan.num_ranks),
        migration=MigrationSettings(
            mode=settings.mode,
            discipline=settings.discipline,
            layers_per_chunk=settings.layers_per_chunk,
            staging_limit_bytes=settings.staging_bytes,
        ),
        membership=Membership(detection_s=settings.detection_s, rebuild_s=settings.rebuild_s, init_s=settings.init_s),
        progress=progress,
    )


def balancer_of(settings: ChangeSettings, planner: Planner) -> Balancer:
    """Return the balancer that the settings describe: the one of a replay and of a live deployment alike."""
    same = ("window", "every", "min_gain", "min_interval", "hysteresis", "horizon", "budget")
    planner_s = None if settings.planner_s < 0 else settings.planner_s
    return Balancer(planner=planner, policy=settings.balancer, planner_s=planner_s, **{name: getattr(settings, name) for name in same})


def started(plan: Plan, ranks: int) -> Plan:
    """Return the plan with its experts on the first ranks only; 0: as it is."""
    if ranks > plan.num_ranks:
        raise InputError(describe("--set", "change.start_ranks", ranks, f"must be <= {plan.num_ranks}, the ranks of the cluster"))
    if ranks in (0, plan.num_ranks):
        return plan
    return refill(plan, np.arange(plan.num_ranks) < ranks, np.ones((plan.num_layers, plan.num_experts)))


def events_of(settings: ChangeSettings, serving: int, ranks: int) -> list[Event]:
    """Return the events of the settings, those of the ladder from `serving` ranks on."""
    events = [Event(kind=kind, at_s=at_s, ranks=members) for kind, at_s, members in settings.events()]
    steps = settings.ladder_steps()
    if any(count > ranks for _, count in steps):
        raise InputError(describe("--set", "change.ladder", settings.ladder, f"must stay <= {ranks}, the ranks of the cluster"))
    return events + ladder(serving, steps)
