"""The balancer of a replay: watches expert loads in a sliding window of passes and decides when to plan again.

A policy (hook `balancer`) is a pure function from a `LoadView` to a `Decision` or None. Built in: `never`, `periodic:N` (every N
passes), `on_drift:T` (balance below T of what the slots could reach), `budgeted:BYTES,N` (every N passes, moving at most BYTES).
The planner is a callable that is handed in; its run time is declared and spent on the simulated clock, so that runs repeat.
Shapes: K passes of the window, L MoE layers, E experts, R ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.balance import Balance, balance_of
from moesim.errors import InputError, SimulationError, describe
from moesim.plan import Plan
from moesim.sim import policies
from moesim.sim.loads import StepLoads
from moesim.sim.migration import Moves
from moesim.sim.policies import Policy, whole_parameter
from moesim.units import parse

PLANNER_S_PER_CELL = 1.0 / (58 * 256)
"""Declared planner time per layer and expert, s: a greedy with swap search takes about 1 s for DeepSeek-V3 on one core."""

Planner = Callable[[np.ndarray, Plan, "int | None"], Plan]
"""(loads [K, L, E], running plan, slots that may change or None) → the next plan, with the same slots on every rank."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadView:
    """What a balancing policy sees at a step border when no change is under way."""

    passes: int
    """Passes since the run began."""
    since_change: int
    """Passes since the last decision, or since the run began."""
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
        """Has the window been filled since the last decision?"""
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
class Decision:
    """Plan again."""

    budget_slots: int | None = None
    """Slots that may change; None: all."""
    reason: str = ""


BalancerPolicy = Callable[[LoadView], "Decision | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Balancer:
    """When to plan again, and by whom."""

    planner: Planner
    policy: str | Policy = "on_drift"
    planner_s: float | None = None
    """Run time of the planner, s; None: PLANNER_S_PER_CELL for every layer and expert."""
    window: int = 8
    """Passes that are observed."""
    min_gain: float = 0.02
    """A plan is taken only if it raises the window's balance by more than this share; else it is declined."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(describe("balancer", "window", self.window, "must be >= 1 pass"))
        if self.planner_s is not None and not 0 <= self.planner_s < np.inf:
            raise InputError(describe("balancer", "planner_s", self.planner_s, "must be finite and >= 0"))
        if not 0 <= self.min_gain < np.inf:
            raise InputError(describe("balancer", "min_gain", self.min_gain, "must be finite and >= 0"))

    @property
    def decide(self) -> BalancerPolicy:
        """The policy's function. Raises InputError if there is no such policy."""
        return policies.get("balancer", self.policy).function

    def plan_s(self, plan: Plan) -> float:
        """Return the seconds that the planner takes for this plan."""
        return PLANNER_S_PER_CELL * plan.num_layers * plan.num_experts if self.planner_s is None else self.planner_s


class LoadWindow:
    """The loads of the last passes."""

    def __init__(self, size: int) -> None:
        self._loads: deque[np.ndarray] = deque(maxlen=size)

    def add(self, plan: Plan, parts: list[StepLoads]) -> None:
        """Observe one pass that ran under `plan`."""
        load_LE = np.zeros((plan.num_layers, plan.num_experts))
        layer, slot = np.nonzero(plan.slot_to_expert_LS >= 0)
        for loads in parts:
            np.add.at(load_LE, (layer, plan.slot_to_expert_LS[layer, slot]), loads.slot_PLS.sum(axis=0)[layer, slot])
        self._loads.append(load_LE)

    def load_KLE(self, plan: Plan) -> np.ndarray:
        """Return float64 [K, L, E], oldest first; one pass of equal loads where nothing has been seen."""
        return np.stack(self._loads) if self._loads else plan.present_LE[None].astype(np.float64)


def plan_balance(plan: Plan, load_LE: np.ndarray, alive_R: np.ndarray) -> Balance:
    """Return the balance that `plan` gives these loads, over live ranks."""
    return balance_of(plan.rank_load_LR(load_LE)[:, alive_R])


def check_next(plan: Plan, new: Plan, alive_R: np.ndarray, *, same_slots: bool) -> None:
    """Raise SimulationError if `new` cannot follow `plan` in a run where only `alive_R` take part."""
    if (new.num_layers, new.num_experts, new.num_ranks) != (plan.num_layers, plan.num_experts, plan.num_ranks):
        shapes = [(p.num_layers, p.num_experts, p.num_ranks) for p in (plan, new)]
        raise SimulationError(f"planner: returned a plan of (layers, experts, ranks) = {shapes[1]}, must be {shapes[0]} like the running one")
    used_R = np.zeros(new.num_ranks, dtype=bool)
    used_R[new.slot_rank_S[(new.slot_to_expert_LS >= 0).any(axis=0)]] = True
    if (used_R & ~alive_R).any():
        raise SimulationError(f"planner: placed experts on rank {int((used_R & ~alive_R).argmax())}, which takes no part; plan for the live ranks only")
    if same_slots and not np.array_equal(plan.slot_rank_S, new.slot_rank_S):
        raise SimulationError("planner: changed the number of slots of a rank; a balancer keeps them, only a rank that joins or leaves changes them")


def check_budget(moves: Moves, budget_slots: int | None) -> None:
    """Raise SimulationError if a plan changes more slots than it was allowed to."""
    written = int(moves.written_LR.sum())
    if budget_slots is not None and written > budget_slots:
        raise SimulationError(f"planner: changes {written} slots, must be <= {budget_slots}, its budget")


# --- policies -----------------------------------------------------------------------------------------------------


def _periodic(text: str) -> Policy:
    every = whole_parameter("periodic", text, 100, 1)
    return Policy(
        hook="balancer", name=f"periodic:{every}", function=lambda view: Decision(reason=f"every {every} passes") if view.since_change >= every else None
    )


def _on_drift(text: str) -> Policy:
    try:
        threshold = float(text) if text else 0.9
    except ValueError:
        threshold = -1.0
    if not 0 < threshold <= 1:
        raise InputError(describe("policy on_drift", "parameter", text, "must be a share in (0, 1], like on_drift:0.9"))

    def decide(view: LoadView) -> Decision | None:
        if not view.full:
            return None
        now, best = view.balance.mean_over_max, view.attainable
        return Decision(reason=f"balance {now:.3f} of {best:.3f}") if now < threshold * best else None

    return Policy(hook="balancer", name=f"on_drift:{threshold:g}", function=decide)


def _budgeted(text: str) -> Policy:
    size, _, every_text = text.partition(",")
    try:
        limit = parse(size, "bytes")
    except ValueError as error:
        raise InputError(describe("policy budgeted", "parameter", text, str(error), "write it like budgeted:1 GB,100")) from None
    every = whole_parameter("budgeted", every_text, 100, 1)

    def decide(view: LoadView) -> Decision | None:
        slots = int(limit // view.expert_bytes)
        return Decision(budget_slots=slots, reason=f"at most {size} every {every} passes") if slots and view.since_change >= every else None

    return Policy(hook="balancer", name=f"budgeted:{size},{every}", function=decide)


policies.register(Policy(hook="balancer", name="never", function=lambda view: None))
policies.register_maker("balancer", "periodic", _periodic)
policies.register_maker("balancer", "on_drift", _on_drift)
policies.register_maker("balancer", "budgeted", _budgeted)
