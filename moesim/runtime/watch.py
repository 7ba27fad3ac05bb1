"""Rebalancing a running deployment: its loads in a sliding window, the balancer's decision, `apply`, and figures of all of it.

The decisions are those of `moesim.sim.balancer`, the same object that acts in a replay. Passes are counted from `window` steps before
the watch began. Every phase has a deadline, and whatever fails or outlives it is logged and counted: a watch rests and goes on, or ends when the
deployment has been gone for too long. Shapes: L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import ApplyError, MoesimError
from moesim.plan import Plan
from moesim.runtime.client import apply_plan
from moesim.runtime.control import RefusedPlan, StaleBase, Unreachable, call
from moesim.runtime.metrics import Figures
from moesim.runtime.moves import placement_sha256
from moesim.sim.balancer import Balancer, Decision, Price, Rebalancer
from moesim.sim.succession import written_LR

SCHEMA = "moesim.watch/1"
LogEvent = Callable[[dict[str, Any]], None]
FIRST_PAUSE_S = 0.1
FIRST_COPY_BPS = 1e9
"""What the first installation is taken to cost, before one has been measured: this pause, and copies at this rate."""
SHORTEST_POLL_S, LONGEST_POLL_S = 0.02, 1.0
HELD = "held"
"""Kind of a decision that was not made because an apply failed a short time ago."""


class DeploymentGone(ApplyError):
    """The deployment has not served for longer than a watch puts up with."""

    exit_code = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Deadlines and rests, seconds."""

    answer_s: float = 20.0
    """For the answer to a question."""
    plan_s: float = 60.0
    """For a plan; one that takes longer is counted as an error, and used."""
    apply_s: float = 300.0
    """For an apply, from the request to the report."""
    stall_s: float = 15.0
    """For the next step to be served."""
    give_up_s: float = 60.0
    """Without an answer from a deployment that serves; then the watch ends."""
    rest_s: float = 1.0
    """Rest after a failure; doubled after every further one."""
    longest_rest_s: float = 60.0


class Prices:
    """What installing a plan costs, as measured by the last apply."""

    def __init__(self) -> None:
        self._measured: Price | None = None

    def price(self, expert_bytes: float) -> Price:
        """Return the price of the next installation."""
        return self._measured or Price(fixed_s=FIRST_PAUSE_S, slot_s=expert_bytes / FIRST_COPY_BPS)

    def learn(self, report: dict[str, Any], old: Plan, new: Plan) -> None:
        """Take in the report of an apply."""
        parts, most = report["pause_parts_ms"], int(written_LR(old, new).sum(axis=0).max(initial=0))
        if most:
            self._measured = Price(fixed_s=(parts["wait_ms"] + parts["probe_ms"]) / 1e3, slot_s=parts["install_ms"] / 1e3 / most)


class Rest:
    """Rests that double from failure to failure and begin anew after a success."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._failures, self._until = limits, 0, 0.0

    def failed(self) -> float:
        """Note a failure; return the seconds to rest."""
        seconds = min(self._limits.rest_s * 2.0**self._failures, self._limits.longest_rest_s)
        self._failures += 1
        self._until = time.monotonic() + seconds
        return seconds

    def worked(self) -> None:
        """Note a success."""
        self._failures, self._until = 0, 0.0

    @property
    def is_on(self) -> bool:
        """Is the rest not over yet?"""
        return time.monotonic() < self._until


class Watch:
    """Watches one deployment."""

    def __init__(
        self, address: str, balancer: Balancer, *, limits: Limits | None = None, dry_run: bool = False, figures: Figures | None = None,
        log: LogEvent | None = None,
    ) -> None:  # fmt: skip
        """log: is handed every decision (with the window's loads), apply and error as one object with the key `event`."""
        self.address, self.balancer, self.limits, self.dry_run = address, balancer, limits or Limits(), dry_run
        self.figures, self._log, self._prices = figures or Figures(), log or (lambda event: None), Prices()
        self._stop = threading.Event()
        self._quiet_rest, self._apply_rest = Rest(self.limits), Rest(self.limits)
        self._rebalancer = Rebalancer(balancer)
        self._origin, self._step, self._moved_at = -1, -1, time.monotonic()
        """Step at which passes are counted from; last step seen, and when it was first seen."""
        self._plan: Plan | None = None
        self._skips = False
        """Leave out the step borders that passed during an apply."""
        self._phase = "status"
        self.decisions = 0
        self.last_apply: str | None = None
        """How the last attempt to install a plan ended."""

    def stop(self) -> None:
        """End the watch after the phase that is under way; may be called from a signal handler."""
        self._stop.set()

    def run(self, *, max_steps: int | None = None, duration_s: float | None = None, max_decisions: int | None = None) -> dict[str, Any]:
        """Watch until stopped or a limit is reached, and return the summary, schema moesim.watch/1.

        max_steps: served since the watch began. max_decisions: that were made with a full window. Raises DeploymentGone.
        """
        began = served_at = time.monotonic()
        ended = "stopped"
        while not self._stop.is_set():
            if duration_s is not None and time.monotonic() - began >= duration_s:
                ended = "duration"
                break
            try:
                pause_s = self._turn()
                served_at = time.monotonic()
                self._quiet_rest.worked()
                self.figures.set(up=1)
            except MoesimError as error:
                self.figures.set(up=0)
                self._failed(str(error))
                if time.monotonic() - served_at > self.limits.give_up_s:
                    raise DeploymentGone(f"{error}; gave up after {self.limits.give_up_s:g} s") from None
                pause_s = self._quiet_rest.failed()
            if max_decisions is not None and self.decisions >= max_decisions:
                ended = "decided"
                break
            if max_steps is not None and self._step - self._origin - self.balancer.window >= max_steps:
                ended = "max_steps"
                break
            if duration_s is not None:
                pause_s = min(pause_s, max(0.0, began + duration_s - time.monotonic()))
            self._stop.wait(pause_s)
        return {
            "schema": SCHEMA,
            "ended": ended,
            "dry_run": self.dry_run,
            "last_apply": self.last_apply,
            "wall_s": time.monotonic() - began,
            **self.figures.summary(),
        }

    def _failed(self, reason: str) -> None:
        self.figures.count("watch_errors", self._phase)
        self._log({"event": "error", "phase": self._phase, "step": self._step, "reason": reason})

    # --- one turn ---------------------------------------------------------------------------------

    def _turn(self) -> float:
        """Decide if a step border is due; return the seconds until the next one may be. Raises ApplyError if the deployment does not serve."""
        every, window = self.balancer.every, self.balancer.window
        step = self._served()
        passes = (step - self._origin) // every * every
        if passes < 1 or passes <= self._rebalancer.passes:
            return SHORTEST_POLL_S
        following = self._rebalancer.passes + every
        if self._rebalancer.passes and not self._skips and passes - following <= window:
            passes = following  # a border that this process came late to is made up for
        self._skips = False
        last = self._origin + passes
        self._phase = "counts"
        known = None if self._plan is None else placement_sha256(self._plan)
        answer = call(self.address, "counts", first=max(self._origin, last - window), last=last, known=known, deadline_s=self.limits.answer_s)
        self._take_in(answer, known)
        self._rebalancer.show(np.array(answer["rows_LE"], dtype=np.float64)[None], passes)
        if self._apply_rest.is_on:
            self.figures.count("decisions", HELD)
        else:
            self._decide(answer)
        step_s = answer["step_ms"] / 1e3
        return min(max(step_s * every / 4, SHORTEST_POLL_S), LONGEST_POLL_S)

    def _served(self) -> int:
        """Return the steps that all ranks have served; raise ApplyError if they do not serve."""
        self._phase = "status"
        status = call(self.address, "status", deadline_s=self.limits.answer_s)
        ranks = [rank for rank in status["rank_status"] if rank is not None]
        if status["state"] != "serving" or len(ranks) != len(status["rank_status"]):
            self._phase = "serving"
            raise ApplyError(f"{self.address}: the deployment does not serve: {status['reason'] or 'a rank is silent'}")
        step, now = min(rank["step"] for rank in ranks), time.monotonic()
        if self._origin < 0 or step < self._step:
            if self._origin >= 0:
                self._log({"event": "restarted", "step": step})
                self._rebalancer, self._plan = Rebalancer(self.balancer), None
            self._origin = max(0, step - self.balancer.window)
        elif step == self._step and now - self._moved_at > self.limits.stall_s:
            self._phase = "serving"
            raise ApplyError(f"{self.address}: serving has stood still at step {step} for {now - self._moved_at:.1f} s")
        if step != self._step:
            self._step, self._moved_at = step, now
        self.figures.set(step=step, epoch=min(rank["epoch"] for rank in ranks))
        return int(step)

    def _take_in(self, answer: dict[str, Any], known: str | None) -> None:
        """Book a window's counts, and the plan if it is another than the one known."""
        for name, key in (("steps", "steps"), ("all_to_all_bytes", "exchanged_bytes"), ("all_to_all_seconds", "exchanged_s")):
            self.figures.follow(name, answer[key])
        self.figures.set(balance_ratio=answer["balance"])
        if "plan" in answer:
            self._plan = Plan.from_content(answer["plan"], self.address)
            self._log({"event": "plan", "step": self._step, "map_sha256": self._plan.map_sha256, "by": "start" if known is None else "others"})

    def _decide(self, answer: dict[str, Any]) -> None:
        plan = self._plan
        assert plan is not None
        rows, expert_bytes = float(np.sum(answer["rows_LE"])), answer["expert_bytes"]
        row_s, price = answer["compute_s"] / rows if rows else 0.0, self._prices.price(expert_bytes)
        self._phase = "plan"
        began = time.monotonic()
        try:
            decision = self._rebalancer.decide(plan, alive_R=np.ones(plan.num_ranks, dtype=bool), expert_bytes=expert_bytes, row_s=row_s, price=price)
        except MoesimError as error:  # the planner's failure is not the deployment's
            self._failed(str(error))
            self._apply_rest.failed()
            return
        took_s = time.monotonic() - began
        self.figures.count("decisions", decision.kind)
        self.decisions += decision.passes >= self.balancer.window
        if decision.target is not None:
            steps = decision.break_even_steps
            self.figures.set(break_even_steps=-1 if steps is None else steps)
        self._log(
            {
                "event": "decision", "step": self._origin + decision.passes, "first": answer["first"], "measured_balance": answer["balance"],
                **decision.record(), "placement": answer["placement"], "row_s": row_s, "expert_bytes": expert_bytes,
                "price": {"fixed_s": price.fixed_s, "slot_s": price.slot_s}, "planned_s": took_s, "load_LE": answer["rows_LE"],
            }
        )  # fmt: skip
        if took_s > self.limits.plan_s:
            self._failed(f"the planner took {took_s:.1f} s, longer than {self.limits.plan_s:g} s")
        if decision.acts and not self.dry_run and not self._stop.is_set():
            self._apply(decision, answer["placement"])

    def _apply(self, decision: Decision, base: str) -> None:
        """Carry the decision's plan out; what goes wrong is counted, and decisions rest."""
        assert decision.target is not None and self._plan is not None
        self._phase, began = "apply", time.monotonic()
        try:
            report = apply_plan(self.address, decision.target, base=base, deadline_s=self.limits.apply_s)
            result, reason = report["status"], report.get("reason", "")
        except ApplyError as error:
            kinds = ((StaleBase, "stale"), (RefusedPlan, "refused"), (Unreachable, "unanswered"))
            report, result, reason = {}, next((name for kind, name in kinds if isinstance(error, kind)), "failed"), str(error)
        self.last_apply = result
        self.figures.count("migrations", result)
        told = {name: report.get(name) for name in ("epoch", "pause_ms", "outputs_equal", "balance", "moved")}
        self._log({"event": "apply", "result": result, "passes": decision.passes, "wall_s": time.monotonic() - began, "reason": reason, **told})
        if "pause_ms" in report:
            self.figures.pause(report["pause_ms"] / 1e3)
        if result in ("installed", "unchanged"):
            self._apply_rest.worked()
        else:
            self._failed(reason)
            self._apply_rest.failed()
        if result == "installed":
            self.figures.add("migrated_bytes", report["moved"]["bytes"])
            self.figures.set(epoch=report["epoch"])
            self._prices.learn(report, self._plan, decision.target)
            self._plan = decision.target
        self._skips, self._moved_at = True, time.monotonic()
