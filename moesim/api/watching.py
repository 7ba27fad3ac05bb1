"""`watch`: a live deployment rebalanced by the balancer and the planner of a replay."""

from __future__ import annotations

from moesim.api.changing import planner_on
from moesim.runtime.metrics import Figures
from moesim.runtime.watch import Limits, LogEvent, Watch
from moesim.sim.change_replay import balancer_of
from moesim.sim.change_settings import ChangeSettings

LIVE = ChangeSettings(balancer="on_drift:0.9", window=64, every=16, min_interval=128, hysteresis=0.02, horizon=1000)
"""The settings `change.…` of a watch where nothing else is said: unlike a replay it waits between changes and asks that they pay."""


def watch(
    address: str,
    *,
    settings: ChangeSettings = LIVE,
    limits: Limits | None = None,
    dry_run: bool = False,
    figures: Figures | None = None,
    log: LogEvent | None = None,
    ranks_per_node: int | None = None,
) -> Watch:
    """Return a watch of the deployment at `address`; its `run` watches. See `Watch` for the arguments.

    settings: what the balancer goes by, with the names of a replay. ranks_per_node: None: all ranks are in one node.
    """
    limits = limits or Limits()
    balancer = balancer_of(settings, planner_on(ranks_per_node, limits.plan_s))
    return Watch(address, balancer, limits=limits, dry_run=dry_run, figures=figures, log=log)
