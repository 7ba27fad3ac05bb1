"""What a balancer decides at a step border: every kind of decision has its cause, whatever world shows it the loads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.plan import Plan, linear
from moesim.sim.balance_policies import Ask
from moesim.sim.balancer import Balancer, Decision, Price, Rebalancer, budget_of
from moesim.sim.change_settings import ChangeSettings
from moesim.sim.policies import Policy
from tests.sim.changes import greedy, passes_of, simulate

LAYERS, EXPERTS, RANKS = 2, 8, 4
PLAN = linear(model="m", num_experts=EXPERTS, moe_layer_ids=range(LAYERS), num_ranks=RANKS)
HOT = np.array([[90, 90, 5, 5, 5, 5, 5, 5]] * LAYERS, dtype=np.float64)
"""Both hot experts lie on rank 0: 180 of 210 choices; apart, the busiest rank has 95."""
EVEN = np.full((LAYERS, EXPERTS), 25.0)


class Counting:
    """A planner that counts how often it is asked, and for what budget."""

    def __init__(self) -> None:
        self.budgets: list[int | None] = []

    def __call__(self, load_KLE: np.ndarray, plan: Plan, budget_slots: int | None) -> Plan:
        self.budgets.append(budget_slots)
        return greedy(load_KLE, plan, budget_slots)


def at_work(**options: Any) -> tuple[Rebalancer, Counting]:
    planner = Counting()
    return Rebalancer(Balancer(**{"planner": planner, "policy": "on_drift:0.9", "window": 2, **options})), planner


def decide(rebalancer: Rebalancer, load_LE: np.ndarray, plan: Plan = PLAN, passes: int = 1, **known: Any) -> Decision:
    """Observe `passes` such passes and decide."""
    for _ in range(passes):
        rebalancer.observe(load_LE)
    return rebalancer.decide(plan, alive_R=np.ones(RANKS, dtype=bool), **{"expert_bytes": 100.0, **known})


# --- kinds ------------------------------------------------------------------------------------------------------------


def test_a_repair_names_its_gain_cost_and_break_even() -> None:
    """Closed form: a pass has 180 choices on the busiest rank of each layer, 95 after; at 1 ms each the two layers save 170 ms."""
    rebalancer, planner = at_work()
    found = decide(rebalancer, HOT, passes=2, row_s=1e-3, price=Price(fixed_s=1.0, slot_s=0.5))
    assert found.kind == "repair" and found.acts and planner.budgets == [None] and found.passes == 2
    assert found.balance == pytest.approx(52.5 / 180) and found.balance_after == pytest.approx(52.5 / 95)
    assert found.gain_s == pytest.approx(2 * 85e-3)
    assert found.target is not None
    assert found.bytes == found.slots * 100.0
    most = max(int((found.target.slot_to_expert_LS[:, low : low + 2] != PLAN.slot_to_expert_LS[:, low : low + 2]).sum()) for low in range(0, 8, 2))
    assert found.cost_s == pytest.approx(1.0 + 0.5 * most) and found.break_even_steps == int(np.ceil(found.cost_s / found.gain_s))


def test_what_is_balanced_or_not_yet_seen_is_left_alone() -> None:
    rebalancer, planner = at_work()
    assert decide(rebalancer, HOT).kind == "quiet", "the window is not full"
    assert decide(rebalancer, EVEN, passes=2).kind == "quiet" and planner.budgets == []


def test_an_interval_lies_between_two_plans_and_none_before_the_first() -> None:
    rebalancer, planner = at_work(min_interval=5)
    kinds = [decide(rebalancer, HOT).kind for _ in range(14)]
    assert kinds == ["quiet", "repair", *["interval"] * 4, "repair", *["interval"] * 4, "repair", *["interval"] * 2]
    assert len(planner.budgets) == 3


def test_a_declined_plan_is_not_asked_for_again_until_it_has_become_worse() -> None:
    never_better = Policy(hook="balancer", name="always", function=lambda view: Ask())
    rebalancer, planner = at_work(policy=never_better, hysteresis=0.1, min_gain=0.02, window=1)
    slightly = EVEN + np.array([3.0, *[0.0] * 7])
    assert [decide(rebalancer, one).kind for one in (EVEN, EVEN, slightly)] == ["no_gain", "settled", "settled"]
    assert decide(rebalancer, HOT).kind == "repair" and len(planner.budgets) == 2
    # A repair ends it: the next decline is judged by its own balance.
    assert decide(rebalancer, EVEN).kind == "no_gain" and decide(rebalancer, EVEN).kind == "settled"
    without, _ = at_work(policy=never_better, window=1)
    assert [decide(without, EVEN).kind for _ in range(3)] == ["no_gain"] * 3


@pytest.mark.parametrize(("horizon", "kind"), [(0, "repair"), (11, "not_worth"), (12, "not_worth"), (13, "repair")])
def test_a_plan_has_to_pay_within_the_horizon(horizon: int, kind: str) -> None:
    """It saves 170 ms a pass and costs 2.04 s: 12 passes, which is not more than it costs."""
    rebalancer, _ = at_work(horizon=horizon)
    found = decide(rebalancer, HOT, passes=2, row_s=1e-3, price=Price(fixed_s=2.04))
    assert found.kind == kind and found.break_even_steps == 12
    idle, _ = at_work(horizon=horizon)
    free = decide(idle, HOT, passes=2, row_s=0.0, price=Price(fixed_s=1e-9))
    assert free.break_even_steps is None and free.kind == ("not_worth" if horizon else "repair")


@pytest.mark.parametrize(
    ("budget", "slots"),
    [("", None), ("450 B", 4), ("99 B", None), ("1.6 s", 3), ("900 ms", None), ("1 h", 17995)],
)
def test_a_budget_is_bytes_or_seconds(budget: str, slots: int | None) -> None:
    """An expert has 100 B; a change costs 1 s and 0.2 s a slot."""
    rebalancer, planner = at_work(budget=budget)
    found = decide(rebalancer, HOT, passes=2, price=Price(fixed_s=1.0, slot_s=0.2))
    if budget and slots is None:
        assert found.kind == "budget" and planner.budgets == [] and found.target is None
        assert decide(rebalancer, HOT, price=Price(fixed_s=1.0, slot_s=0.2)).kind == "budget", "not asking is no reason to wait"
    else:
        assert planner.budgets == [slots] and found.kind == "repair"
        assert slots is None or found.slots <= slots and found.bytes <= slots * 100.0


def test_the_tighter_of_two_budgets_counts() -> None:
    price = Price(slot_s=0.1)
    balancer = Balancer(planner=greedy, budget="1 s")
    assert balancer.budget_slots(4, 100.0, price) == 4 and balancer.budget_slots(40, 100.0, price) == 10 == balancer.budget_slots(None, 100.0, price)
    assert budget_of("") == (None, None) and budget_of("2 kB") == (2000.0, None) and budget_of("5 ms") == (None, 0.005)
    for bad in ("2", "5 parsecs", "0 s", "-1 GB"):
        with pytest.raises(ValueError, match="must be"):
            budget_of(bad)


# --- two worlds -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), window=st.integers(1, 5), every=st.integers(1, 4), interval=st.integers(0, 9), hysteresis=st.sampled_from([0.0, 0.05]))
def test_passes_one_by_one_and_windows_at_once_give_the_same_decisions(seed: int, window: int, every: int, interval: int, hysteresis: float) -> None:
    """A replay shows every pass, a watch the sum of a window: what is decided is the same."""
    rng = np.random.Generator(np.random.PCG64(seed))
    options = {"window": window, "every": every, "min_interval": interval, "hysteresis": hysteresis, "horizon": 20}
    (one, _), (other, _) = at_work(**options), at_work(**options)
    hot = rng.permutation(EXPERTS)
    seen: list[np.ndarray] = []
    plans = [PLAN, PLAN]
    known: dict[str, Any] = {"row_s": 1e-3, "price": Price(fixed_s=0.2, slot_s=0.01), "alive_R": np.ones(RANKS, dtype=bool), "expert_bytes": 100.0}
    for step in range(1, 40):
        if step % 13 == 0:
            hot = rng.permutation(EXPERTS)
        seen.append(rng.poisson(np.where(hot < 2, 60, 5), (LAYERS, EXPERTS)).astype(float))
        one.observe(seen[-1])
        assert one.due is (step % every == 0)
        if one.due:
            other.show(np.sum(seen[-window:], axis=0)[None], step)
            left, right = one.decide(plans[0], **known), other.decide(plans[1], **known)
            assert left.record() == right.record()
            plans = [decision.target if decision.acts and decision.target else plan for decision, plan in zip((left, right), plans, strict=True)]


def test_a_replay_carries_out_what_its_balancer_decides() -> None:
    passes = passes_of(("zipf:1.0", 24, 1))
    rare = simulate(passes, balancer=Balancer(planner=greedy, policy="periodic:1", planner_s=0.0, window=4, every=6, min_gain=0.0))
    decided = [event for event in rare.events if event["kind"] == "decision"]
    assert decided[0]["passes"] == 6 and all(event["passes"] % 6 == 0 for event in decided)
    assert {event["decided"] for event in decided} <= {"repair", "no_gain"} and rare.aborted == 1, "the last one, by the end"
    assert rare.rebalances + rare.aborted == sum(event["decided"] == "repair" for event in decided)
    first = decided[0]
    assert first["gain_s"] > 0 and first["cost_s"] > 0 and first["break_even_steps"] >= 1
    waiting = simulate(passes, balancer=Balancer(planner=greedy, policy="periodic:1", planner_s=0.0, window=4, horizon=1, min_gain=0.0))
    assert waiting.decisions and waiting.rebalances < waiting.decisions


def test_the_settings_of_a_replay_reach_its_balancer() -> None:
    from moesim.sim.change_replay import balancer_of

    chosen = ChangeSettings(balancer="never", window=3, every=5, min_gain=0.1, min_interval=7, hysteresis=0.2, horizon=9, budget="3 MB", planner_s=0.5)
    made = balancer_of(chosen, greedy)
    for name in ("window", "every", "min_gain", "min_interval", "hysteresis", "horizon", "budget", "planner_s"):
        assert getattr(made, name) == getattr(chosen, name)
    assert balancer_of(replace(chosen, planner_s=-1.0), greedy).planner_s is None


@pytest.mark.parametrize("wrong", [{"every": 0}, {"min_interval": -1}, {"horizon": -1}, {"hysteresis": 1.0}, {"budget": "all"}])
def test_what_cannot_be_is_refused_on_both_sides(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="balancer"):
        Balancer(planner=greedy, **wrong)
    with pytest.raises(InputError, match="change"):
        ChangeSettings(**wrong)
