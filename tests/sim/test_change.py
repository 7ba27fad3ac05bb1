"""Ranks that die, leave and join during a replay: who serves, what is lost, what it costs."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, SimulationError
from moesim.hardware.cluster import Tier
from moesim.model import sizes
from moesim.plan import Plan
from moesim.sim.balance_policies import Ask
from moesim.sim.balancer import Balancer
from moesim.sim.batch import Pass, PassShape
from moesim.sim.change_report import ChangeRun
from moesim.sim.change_serving import Serving
from moesim.sim.membership import Event, Membership, alive_of, ladder, lost_LE, refill, reshard
from moesim.sim.migration import CHECKPOINT, MigrationSettings
from moesim.sim.policies import Policy
from moesim.sim.settings import Settings
from moesim.sim.succession import held_LER
from tests.sim import changes
from tests.sim.changes import cluster_of, greedy, model_of, passes_of, replicated, simulate, start_plan

SKEW = (("zipf:1.0", 12, 1),)
MIDDLE_S = 0.005
"""Within the fourth pass or so."""
QUICK = Membership(detection_s=0.002, rebuild_s=0.001, init_s=0.002)


def fail(*ranks: int, at_s: float = MIDDLE_S) -> Event:
    return Event(kind="fail", at_s=at_s, ranks=ranks)


@cache
def broken(copies: int = 1) -> ChangeRun:
    return simulate(passes_of(*SKEW), plan=replicated(copies), events=[fail(2)], membership=QUICK)


def everything_is_there(plan: Plan, alive_R: np.ndarray) -> bool:
    return not lost_LE(plan, alive_R).any() and not alive_of(plan)[~alive_R].any()


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_loses_no_token_and_every_expert_is_back() -> None:
    run, passes = broken(), passes_of(*SKEW)
    assert run.replay.tokens == sum(item.num_tokens for item in passes) and run.replay.steps == len(passes)
    assert run.replay.sums.routed == run.replay.tokens * model_of().top_k * run.plan.num_layers
    assert run.tokens_retried == passes[0].num_tokens and run.wasted_s > 0
    assert run.alive_R.tolist() == [True, True, False, True] and everything_is_there(run.plan, run.alive_R)
    np.testing.assert_array_equal(run.replay.sums.expert_LE, simulate(passes).replay.sums.expert_LE)


def test_without_replicas_the_dead_ranks_experts_are_lost_and_reloaded() -> None:
    run, plan = broken(), start_plan()
    lost = int((plan.slot_rank_S == 2).sum()) * plan.num_layers
    assert run.experts_lost == lost
    (transfer,) = run.transfers
    assert (transfer.moves.source_M == CHECKPOINT).all() and run.moved_bytes == pytest.approx(lost * sizes.expert_bytes(model_of()))
    assert run.flow_bytes == pytest.approx(run.moved_bytes)
    # Nobody was asked to give an expert up that it still held.
    held = held_LER(plan) > 0
    assert (held_LER(run.plan)[:, :, run.alive_R] >= held[:, :, run.alive_R]).all()


def test_live_replicas_serve_what_a_dead_rank_held() -> None:
    run = broken(2)
    assert run.experts_lost == 0 and run.moved_bytes == 0 and everything_is_there(run.plan, run.alive_R)
    assert run.downtime_s == pytest.approx(QUICK.detection_s + QUICK.rebuild_s) and run.downtime_s < broken().downtime_s
    survivors = replicated(2).slot_rank_S != 2
    np.testing.assert_array_equal(run.plan.slot_to_expert_LS, replicated(2).slot_to_expert_LS[:, survivors])


def test_downtime_is_detection_rebuilding_and_the_slowest_reload() -> None:
    """Closed form: three survivors read through one disk, then each through its own host link."""
    run, cluster, size = broken(), cluster_of(), sizes.expert_bytes(model_of())
    assert isinstance(cluster.tiers["nvme"], Tier)
    disk = cluster.tiers["nvme"].read_Bps
    fewest = QUICK.detection_s + QUICK.rebuild_s + run.moved_bytes / disk
    most = np.bincount(run.transfers[0].moves.target_M).max()
    latency = most * (cluster.links["host"].latency_s + MigrationSettings().message_s)
    assert fewest <= run.downtime_s <= fewest + latency + most * size / cluster.links["host"].bandwidth_Bps
    slow = simulate(passes_of(*SKEW), events=[fail(2)], membership=QUICK, migration=MigrationSettings(checkpoint_Bps=disk / 10))
    assert slow.downtime_s > run.downtime_s + 5 * run.moved_bytes / disk


def test_total_time_is_passes_and_downtime_and_what_was_cut_short() -> None:
    run = broken()
    assert run.total_s == pytest.approx(sum(run.replay.ledger.duration_s) + run.downtime_s + run.wasted_s, rel=1e-9)
    undisturbed = simulate(passes_of(*SKEW))
    assert run.total_s > undisturbed.total_s + run.downtime_s + run.wasted_s  # three ranks are slower than four
    index = run.epochs[1].first_pass
    assert run.replay.ledger.duration_s[:index] == pytest.approx(undisturbed.replay.ledger.duration_s[:index], rel=1e-9)
    assert run.kv_entries_lost == pytest.approx(passes_of(*SKEW)[index].shape.kv_entries_PR[0, 2])


def test_detection_is_not_cheaper_when_it_takes_longer() -> None:
    times = [simulate(passes_of(*SKEW), events=[fail(1)], membership=replace(QUICK, detection_s=s)).downtime_s for s in (0.01, 0.5)]
    assert times[1] - times[0] == pytest.approx(0.49, rel=1e-6)


def test_two_deaths_one_during_the_recovery_of_the_other() -> None:
    run = simulate(passes_of(*SKEW), events=[fail(0), fail(3, at_s=MIDDLE_S + 0.0025)], membership=QUICK)
    assert run.alive_R.tolist() == [False, True, True, False] and everything_is_there(run.plan, run.alive_R)
    assert run.tokens_retried == passes_of(*SKEW)[0].num_tokens and [epoch.ranks for epoch in run.epochs] == [4, 3, 2]
    assert run.replay.tokens == sum(item.num_tokens for item in passes_of(*SKEW))


def test_a_death_between_the_ends_of_two_runs_of_the_same_events_repeats() -> None:
    first, second = (simulate(passes_of(*SKEW), events=[fail(2)], membership=QUICK, balancer=rebalance()) for _ in range(2))
    assert repr(first.report()) == repr(second.report())


def rebalance(**options: object) -> Balancer:
    return Balancer(**{"planner": greedy, "policy": "on_drift:0.9", "planner_s": 1e-3, "window": 3, **options})  # type: ignore[arg-type]


def test_a_failure_aborts_the_migration_in_flight() -> None:
    slow = replace(cluster_of(), links={name: replace(link, bandwidth_Bps=link.bandwidth_Bps / 1000) for name, link in cluster_of().links.items()})
    # Until the first failure the balancer's transfer is in flight; it must not be installed over a rank that is gone.
    run = simulate(passes_of(*SKEW), cluster=slow, events=[fail(2, at_s=0.008)], membership=QUICK, balancer=rebalance(planner_s=0.0))
    kinds = [event["kind"] for event in run.events]
    assert "aborted" in kinds and kinds.index("aborted") > kinds.index("fail") and run.aborted >= 1
    assert all(not flow.done.triggered or flow.end_s <= 0.0081 for flow in run.transfers[0].flows)
    assert everything_is_there(run.plan, run.alive_R)


def test_a_failure_while_the_planner_runs_drops_its_plan() -> None:
    once = Policy(hook="balancer", name="once", function=lambda seen: Ask() if seen.passes == 2 else None)
    run = simulate(passes_of(("zipf:1.0", 20, 1)), events=[fail(2)], membership=QUICK, balancer=rebalance(policy=once, planner_s=0.012))
    assert [event["kind"] for event in run.events][:3] == ["decision", "fail", "aborted"]
    assert [epoch.reason for epoch in run.epochs] == ["start", "fail"] and everything_is_there(run.plan, run.alive_R)
    assert len(run.transfers) == 1 and run.planner_s == 0.012


def test_the_balancer_goes_on_with_the_survivors() -> None:
    passes = passes_of(("zipf:1.0", 24, 1))
    run = simulate(passes, events=[fail(2, at_s=0.002)], membership=QUICK, balancer=rebalance())
    plain = simulate(passes, events=[fail(2, at_s=0.002)], membership=QUICK)
    assert run.rebalances >= 1 and everything_is_there(run.plan, run.alive_R)
    assert run.total_s < plain.total_s


def test_a_placer_plans_for_the_survivors_while_they_serve() -> None:
    asked = []

    def placer(load_KLE: np.ndarray, plan: Plan, alive_R: np.ndarray) -> Plan:
        asked.append(alive_R.tolist())
        return greedy(load_KLE, refill(plan, alive_R, load_KLE.sum(axis=0)), None)

    run = simulate(passes_of(("zipf:1.0", 20, 1)), events=[fail(2)], membership=replace(QUICK, placer=placer, placer_s=1e-3))
    assert asked == [[True, True, False, True]] and [epoch.reason for epoch in run.epochs] == ["start", "fail", "after failure"]
    assert run.downtime_s == pytest.approx(broken().downtime_s)
    assert everything_is_there(run.plan, run.alive_R)


def test_the_last_rank_cannot_be_lost() -> None:
    with pytest.raises(SimulationError, match="no rank is left"):
        simulate(passes_of(*SKEW), events=[fail(0, 1, 2, 3)], membership=QUICK)


def test_survivors_without_room_are_an_error() -> None:
    cluster = cluster_of()
    held = changes.memory_account(simulate(passes_of(*SKEW)[: broken().epochs[1].first_pass]))
    lost_per_rank = -(-broken().experts_lost // 3) * sizes.expert_bytes(model_of())
    tight = replace(cluster, tiers={**cluster.tiers, "hbm": replace(cluster.tiers["hbm"], capacity_bytes=held + 0.9 * lost_per_rank)})
    with pytest.raises(SimulationError, match="memory"):
        simulate(passes_of(*SKEW), cluster=tight, events=[fail(2)], membership=QUICK)


# --- leaving and joining --------------------------------------------------------------------------------------------


def test_a_rank_that_leaves_is_drained_and_costs_no_token() -> None:
    run = simulate(passes_of(*SKEW), events=[Event(kind="leave", at_s=0.001, ranks=(3,))], membership=QUICK)
    assert (run.experts_lost, run.tokens_retried, run.downtime_s) == (0, 0, 0.0)
    assert (run.transfers[0].moves.source_M == 3).all() and run.pause_s >= QUICK.rebuild_s
    assert run.alive_R.tolist() == [True, True, True, False] and everything_is_there(run.plan, run.alive_R)
    assert run.replay.tokens == sum(item.num_tokens for item in passes_of(*SKEW))


def test_a_rank_that_joins_makes_passes_faster() -> None:
    passes = passes_of(("zipf:0.2", 20, 1), tokens=8192)
    run = simulate(passes, plan=start_plan(ranks=2), events=[Event(kind="join", at_s=0.0, ranks=(2, 3))], membership=QUICK)
    durations = run.replay.ledger.duration_s
    assert [epoch.ranks for epoch in run.epochs] == [2, 4] and everything_is_there(run.plan, run.alive_R)
    assert np.mean(durations[-3:]) < 0.7 * np.mean(durations[:3])
    slots = np.bincount(run.plan.slot_rank_S[(run.plan.slot_to_expert_LS >= 0).all(axis=0)], minlength=4)
    assert slots.min() > 0 and run.experts_lost == 0
    assert run.changes[0].installed_s >= QUICK.init_s


def test_a_join_waits_for_its_start() -> None:
    passes = passes_of(*SKEW)
    run = simulate(passes, plan=start_plan(ranks=3), events=[Event(kind="join", at_s=0.0, ranks=(3,))], membership=replace(QUICK, init_s=1e3))
    assert len(run.epochs) == 1 and not run.alive_R[3] and run.total_s < 1.0


def test_a_ladder_walks_through_its_numbers_of_ranks() -> None:
    events = ladder(4, [(0.001, 2), (0.02, 4), (0.04, 4), (0.05, 3)])
    assert [(event.kind, event.ranks) for event in events] == [("leave", (2, 3)), ("join", (2, 3)), ("leave", (3,))]
    passes = passes_of(("zipf:0.5", 60, 1))
    run = simulate(passes, events=events, membership=QUICK)
    assert [epoch.ranks for epoch in run.epochs] == [4, 2, 4, 3] and everything_is_there(run.plan, run.alive_R)
    assert run.replay.tokens == sum(item.num_tokens for item in passes) and run.downtime_s == 0


@pytest.mark.parametrize("steps", [[(0.0, 0)], [(2.0, 3), (1.0, 2)]])
def test_a_bad_ladder_is_refused(steps: list[tuple[float, int]]) -> None:
    with pytest.raises(InputError, match="ladder"):
        ladder(4, steps)


# --- masking --------------------------------------------------------------------------------------------------------


def test_masked_ranks_take_no_tokens_and_cost_nothing() -> None:
    """Two live ranks of four are as fast as the same two would be with the others' lanes cut away."""
    passes = passes_of(("balanced", 2, 1))
    run = simulate(passes, plan=start_plan(ranks=2))
    alive = np.array([True, True, False, False])
    for item in passes:
        dealt = reshard(item, alive)
        assert dealt.parts[0].rank_T.max() == 1 and dealt.shape.tokens_PR[0, 2:].sum() == 0
    for interval in run.replay.ledger.intervals():
        busy = interval.end_R - (interval.start_R if interval.gate is None else np.maximum(interval.start_R, interval.gate))
        if interval.label in ("attention", "experts", "gate"):
            assert (busy[2:] == 0).all() and (busy[:2] > 0).all()
    assert run.replay.sums.balance.mean_over_max == pytest.approx(1.0, abs=0.01)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_resharding_conserves_tokens_sequences_and_context(seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    item = passes_of(("zipf:1.0", 1, 1), ("zipf:1.0", 1, 2), tokens=int(rng.integers(5, 40)), phase=str(rng.choice(["decode", "prefill"])))[0]
    alive = rng.random(4) < 0.6
    alive[int(rng.integers(4))] = True
    dealt = reshard(item, alive)
    old, new = item.parts[0], dealt.parts[0]
    assert (np.diff(new.rank_T.astype(int)) >= 0).all() and alive[new.rank_T].all()
    assert sorted(map(bytes, new.experts_TLK.reshape(len(new.rank_T), -1))) == sorted(map(bytes, old.experts_TLK.reshape(len(old.rank_T), -1)))
    np.testing.assert_allclose(dealt.shape.tokens_PR[0], np.bincount(new.rank_T, minlength=4), rtol=1e-12)
    for name in ("prefill_tokens_PR", "prefill_seqs_PR", "decode_tokens_PR", "decode_seqs_PR"):
        assert getattr(new.shape, name).sum() == pytest.approx(getattr(old.shape, name).sum())
    assert new.shape.kv_entries_PR.sum() == pytest.approx(old.shape.kv_entries_PR.sum())
    mine = old.rank_T[:, None] == np.flatnonzero(alive)
    counts = np.bincount(new.rank_T, minlength=4)[alive] - mine.sum(axis=0)
    assert counts.min() >= 0 and counts.max() - counts.min() <= max(1, int((~alive).sum()))


def test_resharding_keeps_micro_batches() -> None:
    item = passes_of(("zipf:1.0", 1, 1), tokens=64)[0]
    twice = Pass(0, PassShape(**{f.name: 2 * getattr(item.shape, f.name) for f in fields(PassShape)}), item.parts * 2)
    dealt = reshard(twice, np.array([True, False, True, True]))
    assert len(dealt.parts) == 2 and dealt.num_tokens == 128
    np.testing.assert_allclose(dealt.shape.tokens_PR.sum(), 2 * item.shape.tokens_PR.sum())
    assert reshard(twice, np.ones(4, dtype=bool)) is twice


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_refill_keeps_what_is_held_and_misses_nothing(seed: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))
    ranks, experts = 5, 7
    slots = int(rng.integers(2, 5))
    while True:
        table = rng.integers(-1, experts, (2, ranks * slots))
        alive, before = rng.random(ranks) < 0.6, rng.random(ranks) < 0.7
        table[:, ~np.repeat(before, slots)] = -1
        if alive.any() and (Plan.replicas_LE_of(table, experts) > 0).all():
            break
    old = Plan(model="m", num_experts=experts, moe_layer_ids=(0, 1), slot_to_expert_LS=table, slot_rank_S=np.repeat(np.arange(ranks), slots), num_ranks=ranks)
    new = refill(old, alive, rng.random((2, experts)))
    assert everything_is_there(new, alive) and new.num_ranks == ranks
    joined = alive & ~alive_of(old)
    lost = lost_LE(old, alive)
    gained = (held_LER(new) > 0) & ~((held_LER(old) > 0) & alive)
    if not joined.any():
        assert int(gained.sum()) == int(lost.sum())
    else:
        counts = held_LER(new).sum(axis=1)
        for row in range(2):
            spread = counts[row, alive].max() - counts[row, joined].min()
            assert spread <= 1 or set(np.flatnonzero(held_LER(new)[row, :, counts[row].argmax()])) <= set(
                np.flatnonzero(held_LER(new)[row, :, joined].any(axis=0))
            )


# --- rules ----------------------------------------------------------------------------------------------------------


def test_a_plan_change_within_a_pass_is_refused() -> None:
    run = Serving(start_plan(), changes.builder_of, None, MigrationSettings(), 16)
    run.in_pass = True
    with pytest.raises(SimulationError, match="a pass is running"):
        run.install(start_plan(), run.alive_R, "test")
    run.in_pass = False
    run.install(start_plan(), run.alive_R, "test")
    assert len(run.out.epochs) == 2


@pytest.mark.parametrize("event", [{"kind": "explode"}, {"at_s": -1.0}, {"at_s": np.inf}, {"ranks": ()}, {"ranks": (1, 1)}, {"ranks": (-1,)}])
def test_a_bad_event_is_refused(event: dict[str, object]) -> None:
    with pytest.raises(InputError, match="event"):
        Event(**{"kind": "fail", "at_s": 0.0, "ranks": (0,), **event})  # type: ignore[arg-type]


def test_events_have_to_fit_the_cluster_and_its_parallelism() -> None:
    with pytest.raises(InputError, match="ranks"):
        simulate(passes_of(*SKEW), events=[fail(4)])
    with pytest.raises(InputError, match="attention_tp"):
        simulate(passes_of(*SKEW), events=[fail(1)], settings=Settings(attention_tp=2))
    with pytest.raises(InputError, match="membership"):
        Membership(detection_s=-1.0)


def test_a_placer_that_uses_a_dead_rank_is_an_error() -> None:
    with pytest.raises(SimulationError, match="takes no part"):
        simulate(passes_of(*SKEW), events=[fail(2)], membership=replace(QUICK, placer=lambda load, plan, alive: start_plan()))
