"""What it costs to carry a plan out while another one runs: copies over the cluster's links, and when the gain has paid for them.

Times are those of the simulator's migration on idle links: every copy over the ports between its ranks, then the installation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.plan import Plan
from moesim.sim.engine import Engine
from moesim.sim.migration import MigrationSettings, Transfer, install_s, moves_between
from moesim.solvers.repair import knee
from moesim.solvers.result import FrontierPoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationCost:
    """Of going from one plan to another."""

    copies: int
    """Experts fetched from another rank; slots that are rewritten from their own rank need none."""
    bytes: float
    transfer_s: float
    """Until the last copy has arrived, on idle links."""
    install_s: float
    """Serving stands still while staged experts are put in place."""

    @property
    def total_s(self) -> float:
        """Both: the pause of a migration that serves nothing meanwhile."""
        return self.transfer_s + self.install_s


def migration_cost(old: Plan, new: Plan, cluster: Cluster, expert_bytes: float) -> MigrationCost:
    """Return what it costs to go from `old` to `new`, which have the same slots on every rank."""
    settings, moves = MigrationSettings(), moves_between(old, new, ranks_per_node=cluster.devices_per_node)
    engine = Engine(cluster.num_ranks)
    transfer = Transfer(engine=engine, cluster=cluster, settings=settings, expert_bytes=expert_bytes, moves=moves)
    engine.env.run(until=transfer.done)
    pause = install_s(cluster, moves.written_LR, expert_bytes, settings)
    return MigrationCost(copies=len(moves), bytes=len(moves) * expert_bytes, transfer_s=engine.now, install_s=pause)


def placed(old: Plan, table_LS: np.ndarray) -> Plan:
    """Return the running plan with another placement in its slots."""
    return replace(old, slot_to_expert_LS=table_LS, share_LS=None)


def moved_bytes(old: Plan, table_LS: np.ndarray, expert_bytes: float) -> tuple[int, float]:
    """Return the slots whose expert differs in the exported map, and the bytes of weights that are written to them."""
    differs = old.slot_to_expert_LS != table_LS
    return int(differs.sum()), float((differs & (table_LS >= 0)).sum()) * expert_bytes


def break_even_steps(cost_s: float, before_s: float, after_s: float) -> int | None:
    """Return after how many steps the time saved has paid for the migration; 0 if it costs nothing, None if steps do not get faster."""
    if cost_s <= 0:
        return 0
    return math.ceil(cost_s / (before_s - after_s)) if before_s > after_s else None


def frontier_rows(
    points: Sequence[FrontierPoint], old: Plan, cluster: Cluster, expert_bytes: float, step_s: Callable[[Plan], float] | None
) -> list[dict[str, Any]]:
    """Return what growing budgets buy: one row per point, with the balance that its last moves bought per GB. step_s: predicts a step, s."""
    rows: list[dict[str, Any]] = []
    best, now = knee(points), None if step_s is None else step_s(old)
    for index, point in enumerate(points):
        plan = placed(old, point.slot_to_expert_LS)
        cost = migration_cost(old, plan, cluster, expert_bytes)
        slots, written = moved_bytes(old, point.slot_to_expert_LS, expert_bytes)
        before = rows[-1] if rows else None
        gigabytes = 0.0 if before is None else (written - before["bytes"]) / 1e9
        step = None if step_s is None else now if slots == 0 else step_s(plan)
        rows.append(
            {
                "slots": slots,
                "bytes": written,
                "balance": point.value,
                "gain_per_gb": (point.value - before["balance"]) / gigabytes if before is not None and gigabytes > 0 else None,
                "transfer_s": cost.transfer_s,
                "migration_s": cost.total_s,
                "step_ms": None if step is None else step * 1e3,
                "break_even_steps": None if step is None or now is None else break_even_steps(cost.total_s, now, step),
                "knee": index == best,
            }
        )
    return rows
