"""The balancer: from the expert loads of a sliding window to a decision – do nothing, with the reason, or carry a new plan out.

One object for two worlds. A replay shows a `Rebalancer` every pass and carries its decisions out on simulated links; `moesim watch` shows it
the counts of a live deployment and carries them out by `apply`. It reads no clock and does no I/O, so equal loads give equal decisions.
The planner is a callable that is handed in. Shapes: K parts of the window, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError, SimulationError, describe
from moesim.plan import Plan
from moesim.sim import policies
from moesim.sim.balance_policies import Ask, BalancerPolicy, LoadView
from moesim.sim.policies import Policy
from moesim.sim.succession import check_next, plan_balance, written_LR
from moesim.units import parse

PLANNER_S_PER_CELL = 1.0 / (58 * 256)
"""Declared planner time per layer and expert, s: a greedy with swap search takes about 1 s for DeepSeek-V3 on one core."""

Planner = Callable[[np.ndarray, Plan, "int | None"], Plan]
"""(loads [K, L, E], running plan, slots that may change or None) → the next plan, with the same slots on every rank."""

QUIET, INTERVAL, SETTLED, BUDGET, NO_GAIN, NOT_WORTH, REPAIR = KINDS = ("quiet", "interval", "settled", "budget", "no_gain", "not_worth", "repair")
"""Of decisions: the policy sees no need · too soon · declined before and no worse since · nothing fits the budget · the new plan balances hardly
better · it would not pay for itself within the horizon · carry it out. For the last three the planner was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a change costs: seconds in which serving stands still."""

    fixed_s: float = 0.0
    slot_s: float = 0.0
    """Per slot written on the rank that has the most to write."""

    def cost_s(self, old: Plan, new: Plan) -> float:
        """Return the cost of going from `old` to `new`."""
        return self.fixed_s + self.slot_s * int(written_LR(old, new).sum(axis=0).max(initial=0))


def budget_of(text: str) -> tuple[float | None, float | None]:
    """Return (bytes, seconds) of a budget like `2 GB` or `50 ms`, one of them None; both for no text. Raises ValueError if it is neither."""
    if not text:
        return None, None
    try:
        size, seconds = parse(text, "bytes"), None
    except ValueError:
        try:
            size, seconds = None, parse(text, "seconds")
        except ValueError:
            raise ValueError("must be bytes or seconds, like 2 GB or 50 ms") from None
    if not (size or seconds or 0.0) > 0:
        raise ValueError("must be > 0")
    return size, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a balancer decided at a step border, and what it knew."""

    kind: str
    """One of KINDS."""
    passes: int
    """Passes that it had seen."""
    reason: str
    balance: float
    """Of the window under the running plan."""
    budget_slots: int | None = None
    target: Plan | None = None
    """The plan of the planner, taken or not; None: it was not asked."""
    balance_after: float | None = None
    """Of the window under the target."""
    slots: int = 0
    """That the target writes."""
    bytes: float = 0.0
    gain_s: float = 0.0
    """Seconds that the target is predicted to save per pass."""
    cost_s: float = 0.0
    """Seconds that installing it is predicted to cost."""

    @property
    def acts(self) -> bool:
        """Is the target to be carried out?"""
        return self.kind == REPAIR

    @property
    def break_even_steps(self) -> int | None:
        """Passes after which the gain has paid for the cost; None: never."""
        return (0 if self.cost_s <= 0 else None) if self.gain_s <= 0 else math.ceil(self.cost_s / self.gain_s)

    def record(self) -> dict[str, Any]:
        """Return the decision as one JSON object; the target by the identity of its map."""
        names = ("kind", "passes", "reason", "balance", "balance_after", "slots", "bytes", "gain_s", "cost_s", "break_even_steps", "budget_slots")
        return {**{name: getattr(self, name) for name in names}, "map_sha256": None if self.target is None else self.target.map_sha256}


@dataclass(frozen=True, slots=True, kw_only=True)
class Balancer:
    """When to plan again, by whom, and when a plan is worth carrying out."""

    planner: Planner
    policy: str | Policy = "on_drift"
    planner_s: float | None = None
    """Run time of the planner on a simulated clock, s; None: PLANNER_S_PER_CELL for every layer and expert."""
    window: int = 8
    """Passes that are observed."""
    every: int = 1
    """Passes between two decisions."""
    min_gain: float = 0.02
    """A plan is taken only if it raises the window's balance by more than this share; else it is declined."""
    min_interval: int = 0
    """Least number of passes from asking the planner to asking it again."""
    hysteresis: float = 0.0
    """After a plan was declined the planner is not asked before the balance has fallen by this share; 0: it is."""
    horizon: int = 0
    """Passes within which a plan has to pay for its installation; 0: any number."""
    budget: str = ""
    """Most that a change may move (`2 GB`) or cost (`50 ms`); empty: no limit."""

    def __post_init__(self) -> None:
        for name, low in (("window", 1), ("every", 1), ("min_interval", 0), ("horizon", 0)):
            if getattr(self, name) < low:
                raise InputError(describe("balancer", name, getattr(self, name), f"must be >= {low}"))
        if self.planner_s is not None and not 0 <= self.planner_s < np.inf:
            raise InputError(describe("balancer", "planner_s", self.planner_s, "must be finite and >= 0"))
        if not 0 <= self.min_gain < np.inf:
            raise InputError(describe("balancer", "min_gain", self.min_gain, "must be finite and >= 0"))
        if not 0 <= self.hysteresis < 1:
            raise InputError(describe("balancer", "hysteresis", self.hysteresis, "must be in [0, 1)"))
        try:
            budget_of(self.budget)
        except ValueError as cause:
            raise InputError(describe("balancer", "budget", self.budget, str(cause))) from None

    @property
    def decide(self) -> BalancerPolicy:
        """The policy's function. Raises InputError if there is no such policy."""
        return policies.get("balancer", self.policy).function

    def plan_s(self, plan: Plan) -> float:
        """Return the seconds that the planner takes for this plan."""
        return PLANNER_S_PER_CELL * plan.num_layers * plan.num_experts if self.planner_s is None else self.planner_s

    def budget_slots(self, asked: int | None, expert_bytes: float, price: Price) -> int | None:
        """Return the slots that may change: the tighter of what the policy asks for and the budget, which all may be written on one rank."""
        size, seconds = budget_of(self.budget)
        limits = [float("inf") if asked is None else asked, float("inf") if size is None else size // expert_bytes]
        if seconds is not None:
            left = seconds - price.fixed_s
            # what is exactly n slots long holds n of them, however it is rounded
            limits.append(-1.0 if left < 0 else math.floor(left / price.slot_s + 1e-9) if price.slot_s else float("inf"))
        least = min(limits)
        return None if math.isinf(least) else int(least)


class Rebalancer:
    """A balancer at work: the window, and when the planner was last asked."""

    def __init__(self, balancer: Balancer) -> None:
        self.balancer, self._policy = balancer, balancer.decide
        self.passes = 0
        self._loads: deque[np.ndarray] = deque(maxlen=balancer.window)
        self._asked_at: int | None = None
        self._declined_at: float | None = None
        """Balance at which a plan was declined last, if none was taken since."""

    def observe(self, load_LE: np.ndarray) -> None:
        """Take in the routed choices of one more pass."""
        self._loads.append(load_LE)
        self.passes += 1

    def show(self, load_KLE: np.ndarray, passes: int) -> None:
        """Take in a whole window at once, where `passes` passes have run by now."""
        self._loads = deque(load_KLE)
        self.passes = passes

    @property
    def due(self) -> bool:
        """Is this a step border at which to decide?"""
        return self.passes > 0 and self.passes % self.balancer.every == 0

    def load_KLE(self, plan: Plan) -> np.ndarray:
        """Return float64 [K, L, E], oldest first; one pass of equal loads where nothing has been seen."""
        return np.stack(self._loads).astype(np.float64) if self._loads else plan.present_LE[None].astype(np.float64)

    def decide(self, plan: Plan, *, alive_R: np.ndarray, expert_bytes: float, row_s: float = 0.0, price: Price | None = None) -> Decision:
        """Return what to do at this step border, where no change is under way.

        row_s: measured seconds of a rank's experts per routed choice. price: of installing a plan. Raises SimulationError if the planner
        breaks its promise: the same slots on every rank, live ranks only, within its budget.
        """
        balancer, price = self.balancer, price or Price()
        since = self.passes - (self._asked_at or 0)
        view = LoadView(
            passes=self.passes, since_change=since, window=balancer.window, load_KLE=self.load_KLE(plan), plan=plan, alive_R=alive_R, expert_bytes=expert_bytes
        )
        now = view.balance.mean_over_max

        def decided(kind: str, reason: str, **details: Any) -> Decision:
            return Decision(kind=kind, passes=self.passes, reason=reason, balance=now, **details)

        if self._asked_at is not None and since < balancer.min_interval:
            return decided(INTERVAL, f"{since} of {balancer.min_interval} passes since the planner was asked")
        ask = self._policy(view)
        if ask is None:
            return decided(QUIET, f"balance {now:.3f}")
        if balancer.hysteresis and self._declined_at is not None and now >= self._declined_at * (1 - balancer.hysteresis):
            return decided(SETTLED, f"balance {now:.3f}, and {self._declined_at:.3f} when a plan was declined")
        budget = balancer.budget_slots(ask.budget_slots, expert_bytes, price)
        if budget is not None and budget < 1:
            return decided(BUDGET, f"not one expert fits the budget of {balancer.budget}", budget_slots=budget)
        self._asked_at = self.passes
        found = self._judged(view, ask, budget, row_s, price)
        decision = decided(**found)
        self._declined_at = None if decision.acts else now
        return decision

    def _judged(self, view: LoadView, ask: Ask, budget: int | None, row_s: float, price: Price) -> dict[str, Any]:
        """Ask the planner and return the fields of the decision on its plan."""
        balancer, plan = self.balancer, view.plan
        target = balancer.planner(view.load_KLE, plan, budget)
        check_next(plan, target, view.alive_R, same_slots=True)
        written = int(written_LR(plan, target).sum())
        if budget is not None and written > budget:
            raise SimulationError(f"planner: changes {written} slots, must be <= {budget}, its budget")
        steps = max(1, min(view.passes, view.window))
        now, then = view.balance.mean_over_max, plan_balance(target, view.load_LE, view.alive_R).mean_over_max
        busiest = [float(one.rank_load_LR(view.load_LE)[:, view.alive_R].max(axis=1).sum()) for one in (plan, target)]
        gain_s, cost_s = (busiest[0] - busiest[1]) / steps * row_s, price.cost_s(plan, target)
        kind = REPAIR
        if then <= now * (1 + balancer.min_gain):
            kind = NO_GAIN
        elif balancer.horizon and gain_s * balancer.horizon <= cost_s:
            kind = NOT_WORTH
        return {
            "kind": kind, "reason": ask.reason, "budget_slots": budget, "target": target, "balance_after": then, "slots": written,
            "bytes": written * view.expert_bytes, "gain_s": gain_s, "cost_s": cost_s,
        }  # fmt: skip
