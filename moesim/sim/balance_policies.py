"""When a balancer plans again: pure functions from what it sees to an `Ask` or None, at the hook `balancer`.

Built in: `never`, `periodic:N` (every N passes), `on_drift:T` (balance below T of what the slots could reach), `budgeted:BYTES,N` (every N
passes, moving at most BYTES). Shapes: K parts of the window, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.balance import Balance
from moesim.errors import InputError, describe
from moesim.plan import Plan
from moesim.sim import policies
from moesim.sim.policies import Policy, whole_parameter
from moesim.sim.succession import plan_balance
from moesim.units import parse


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadView:
    """What a balancing policy sees at a step border when no change is under way."""

    passes: int
    """Passes since the run began."""
    since_change: int
    """Passes since the planner was last asked, or since the run began."""
    window: int
    """Passes that a full window holds."""
    load_KLE: np.ndarray
    """Routed choices of the last passes, oldest first."""
    plan: Plan
    alive_R: np.ndarray
    expert_bytes: float

    @property
    def load_LE(self) -> np.ndarray:
        """Sum over the window."""
        return np.asarray(self.load_KLE.sum(axis=0))

    @property
    def full(self) -> bool:
        """Has the window been filled since the planner was last asked?"""
        return self.since_change >= self.window

    @property
    def balance(self) -> Balance:
        """Of the window under the running plan, over live ranks."""
        return plan_balance(self.plan, self.load_LE, self.alive_R)

    @property
    def attainable(self) -> float:
        """No placement in the plan's slots has a better `mean_over_max` for the window than this."""
        load, ranks = self.load_LE, int(self.alive_R.sum())
        mean = load.sum(axis=1) / ranks
        copies = np.ones_like(load)
        layers = np.arange(len(load))
        for _ in range(self.plan.num_slots - self.plan.num_experts):
            hottest = np.where(copies < ranks, load / copies, -1.0).argmax(axis=1)
            copies[layers, hottest] += 1
        most = np.maximum(mean, (load / copies).max(axis=1))
        return float(mean.sum() / most.sum()) if most.sum() else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Let the planner plan again."""

    budget_slots: int | None = None
    """Slots that may change; None: all."""
    reason: str = ""


BalancerPolicy = Callable[[LoadView], "Ask | None"]


def _periodic(text: str) -> Policy:
    every = whole_parameter("periodic", text, 100, 1)
    return Policy(hook="balancer", name=f"periodic:{every}", function=lambda view: Ask(reason=f"every {every} passes") if view.since_change >= every else None)


def _on_drift(text: str) -> Policy:
    try:
        threshold = float(text) if text else 0.9
    except ValueError:
        threshold = -1.0
    if not 0 < threshold <= 1:
        raise InputError(describe("policy on_drift", "parameter", text, "must be a share in (0, 1], like on_drift:0.9"))

    def decide(view: LoadView) -> Ask | None:
        if not view.full:
            return None
        now, best = view.balance.mean_over_max, view.attainable
        return Ask(reason=f"balance {now:.3f} of {best:.3f}") if now < threshold * best else None

    return Policy(hook="balancer", name=f"on_drift:{threshold:g}", function=decide)


def _budgeted(text: str) -> Policy:
    size, _, every_text = text.partition(",")
    try:
        limit = parse(size, "bytes")
    except ValueError as error:
        raise InputError(describe("policy budgeted", "parameter", text, str(error), "write it like budgeted:1 GB,100")) from None
    every = whole_parameter("budgeted", every_text, 100, 1)

    def decide(view: LoadView) -> Ask | None:
        slots = int(limit // view.expert_bytes)
        return Ask(budget_slots=slots, reason=f"at most {size} every {every} passes") if slots and view.since_change >= every else None

    return Policy(hook="balancer", name=f"budgeted:{size},{every}", function=decide)


policies.register(Policy(hook="balancer", name="never", function=lambda view: None))
policies.register_maker("balancer", "periodic", _periodic)
policies.register_maker("balancer", "on_drift", _on_drift)
policies.register_maker("balancer", "budgeted", _budgeted)
