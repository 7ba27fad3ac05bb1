"""What a run with changes leaves behind, and whether the changes paid.

A cost is always the time of the same passes without the balancer, never an estimate. Seconds and bytes. Shapes: R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.plan import Plan
from moesim.sim.migration import Transfer
from moesim.sim.replay import ReplayRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """A stretch of passes under one plan."""

    number: int
    reason: str
    """`start`, or what changed the plan."""
    first_pass: int
    """Passes done before it."""
    at_s: float
    ranks: int
    """Live ranks."""
    map_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of the plan that was carried through, its chunks taken together."""

    reason: str
    decided_s: float
    installed_s: float
    decided_pass: int
    installed_pass: int
    moved_bytes: float
    pause_s: float


@dataclass(slots=True, kw_only=True)
class ChangeRun:
    """A replay with the changes that happened in it."""

    replay: ReplayRun
    plan: Plan
    """At the end."""
    alive_R: np.ndarray
    """At the end."""
    total_s: float = 0.0
    """From the first pass to the end of the last one, pauses included."""
    epochs: list[Epoch] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    """What happened, in order: kind, at_s, passes, details."""
    transfers: list[Transfer] = field(default_factory=list)
    decisions: int = 0
    """Of the balancer to plan again."""
    rebalances: int = 0
    """Decisions of the balancer that were carried through."""
    declined: int = 0
    """Plans that promised too little."""
    refused: int = 0
    """Changes that did not fit into memory."""
    aborted: int = 0
    """Changes given up because a rank died or the run ended."""
    planner_s: float = 0.0
    staging_peak_bytes: float = 0.0
    """On the rank that staged most."""
    pause_s: float = 0.0
    """Serving stood still for a change that was planned."""
    downtime_s: float = 0.0
    """From deaths until service was back."""
    wasted_s: float = 0.0
    """From the beginning of passes that were cut short to the death that did it."""
    experts_lost: int = 0
    """(layer, expert) pairs that no survivor held; loaded from the checkpoint."""
    tokens_retried: int = 0
    """Of passes that a failure cut short and that were run again."""
    kv_entries_lost: float = 0.0
    """On ranks that died: context that their requests have to compute again. Not charged to the clock."""

    @property
    def moved_bytes(self) -> float:
        """Bytes of experts that arrived from ranks or from the checkpoint."""
        return sum(transfer.moved_bytes for transfer in self.transfers)

    @property
    def flow_bytes(self) -> float:
        """Bytes that Flows moved, those of changes given up included."""
        return sum(flow.total_bytes - flow.left_bytes for transfer in self.transfers for flow in transfer.flows)

    @property
    def messages(self) -> int:
        """Experts sent."""
        return sum(len(transfer.moves) for transfer in self.transfers)

    def step_s(self, low: int, high: int) -> float | None:
        """Return the mean time of passes low..high-1; None if there is none."""
        values = self.replay.ledger.duration_s[max(low, 0) : max(high, 0)]
        return float(np.mean(values)) if values else None

    def around(self, change: Change, window: int = 8) -> dict[str, float | None]:
        """Return mean pass times before, during and after a change, its cost, and after how many passes it has paid for itself.

        cost_s: its pause and what the passes that ran beside the migration took longer. break_even_passes: None if passes did not get faster.
        """
        before = self.step_s(change.decided_pass - window, change.decided_pass)
        during = self.step_s(change.decided_pass, change.installed_pass)
        after = self.step_s(change.installed_pass, change.installed_pass + window)
        slower = 0.0 if before is None or during is None else max(during - before, 0.0) * (change.installed_pass - change.decided_pass)
        cost = change.pause_s + slower
        saving = None if before is None or after is None else before - after
        return {
            "before_s": before,
            "during_s": during,
            "after_s": after,
            "cost_s": cost,
            "break_even_passes": cost / saving if saving is not None and saving > 0 else None,
        }

    def as_replay(self) -> ReplayRun:
        """Return the run in the words of a replay, with its changes."""
        known = ("steps", "tokens", "tokens_per_s", "balance")
        self.replay.change = {name: value for name, value in self.report().items() if name not in known}
        return self.replay

    def report(self, window: int = 8) -> dict[str, Any]:
        """Return the figures as one JSON object."""
        names = ("total_s", "decisions", "rebalances", "declined", "refused", "aborted", "planner_s", "moved_bytes", "messages", "staging_peak_bytes")
        more = ("pause_s", "downtime_s", "wasted_s", "experts_lost", "tokens_retried", "kv_entries_lost")
        return {
            **{name: getattr(self, name) for name in (*names, *more)},
            "steps": self.replay.steps,
            "tokens": self.replay.tokens,
            "tokens_per_s": self.replay.tokens / self.total_s if self.total_s else 0.0,
            "balance": self.replay.sums.balance.as_dict(),
            "epochs": [{name: getattr(epoch, name) for name in Epoch.__dataclass_fields__} for epoch in self.epochs],
            "changes": [
                {**{name: getattr(change, name) for name in Change.__dataclass_fields__}, "step": self.around(change, window)} for change in self.changes
            ],
            "events": self.events,
        }


def break_even(run: ChangeRun, without: ChangeRun) -> dict[str, Any]:
    """Return what a rebalancing costs, what it saves a pass, and from how many passes between two of them on it pays.

    Pass by pass against the same passes without: the cost is the pause, and what passes lose from the decision to the installation; the
    saving is what later passes gain until the next decision. `interval_passes` is None where they gain nothing.
    """
    gain_P = np.asarray(without.replay.ledger.duration_s) - np.asarray(run.replay.ledger.duration_s)
    changes = [change for change in run.changes if change.reason == "rebalance"]
    ends = [*(change.decided_pass for change in changes[1:]), len(gain_P)][: len(changes)]
    cost = sum(change.pause_s - float(gain_P[change.decided_pass : change.installed_pass].sum()) for change in changes)
    served = [gain_P[change.installed_pass : max(end, change.installed_pass)] for change, end in zip(changes, ends, strict=True)]
    passes = sum(len(part) for part in served)
    cost_s = cost / len(changes) if changes else 0.0
    saved_s = float(sum(part.sum() for part in served)) / passes if passes else 0.0
    return {
        "cost_s": cost_s,
        "saved_s_per_pass": saved_s,
        "interval_passes": max(cost_s, 0.0) / saved_s if saved_s > 0 else None,
        "passes_between": passes / len(changes) if changes else None,
    }


def verdict(run: ChangeRun, without: ChangeRun) -> dict[str, Any]:
    """Say whether rebalancing was worth it on these passes: `run` against the same passes `without` it."""
    saved = without.total_s - run.total_s
    return {
        "worth_it": saved > 0,
        "total_s": run.total_s,
        "without_s": without.total_s,
        "saved_s": saved,
        "gain": without.total_s / run.total_s - 1.0 if run.total_s else 0.0,
        "rebalances": run.rebalances,
        "moved_bytes": run.moved_bytes,
        "pause_s": run.pause_s,
        "planner_s": run.planner_s,
        "balance": {"run": run.replay.sums.balance.mean_over_max, "without": without.replay.sums.balance.mean_over_max},
        "break_even": break_even(run, without),
    }


def sweep_periods(periods: Sequence[int], run: Callable[[int], ChangeRun], without: ChangeRun) -> dict[str, Any]:
    """Run with every period and find where rebalancing begins to pay.

    run: replays the same passes with a rebalancing every so many passes. `break_even_period` is the crossover: the shortest period of the
    sweep that rebalanced and paid (None if none did); `loses_up_to` the longest one below it that lost, `pays_up_to` the longest that paid.
    """
    rows = [{"period": period, **verdict(run(period), without)} for period in sorted(periods)]
    acted = [row for row in rows if row["rebalances"]]
    paying = [row["period"] for row in acted if row["worth_it"]]
    first = min(paying, default=None)
    best = min(rows, key=lambda row: row["total_s"], default=None)
    return {
        "without_s": without.total_s,
        "rows": rows,
        "break_even_period": first,
        "loses_up_to": max((row["period"] for row in acted if not row["worth_it"] and (first is None or row["period"] < first)), default=None),
        "pays_up_to": max(paying, default=None),
        "best_period": best and best["period"],
    }
