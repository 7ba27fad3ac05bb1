"""Rebalancing during a replay: policies, migration flows, installation, and whether it pays."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, SimulationError
from moesim.hardware.cluster import Cluster, SizeCurve
from moesim.hardware.load import load_cluster
from moesim.model import sizes
from moesim.plan import Plan
from moesim.sim import policies
from moesim.sim.balance_policies import Ask, LoadView
from moesim.sim.balancer import Balancer
from moesim.sim.change_report import ChangeRun, sweep_periods, verdict
from moesim.sim.engine import Engine
from moesim.sim.loads import LoadCompiler
from moesim.sim.migration import CHECKPOINT, MigrationSettings, Moves, Transfer, mixed, moves_between
from moesim.sim.network import Network
from moesim.sim.policies import Policy
from moesim.sim.replay import run_passes
from moesim.sim.succession import held_LER
from tests.sim import changes
from tests.sim.changes import cluster_of, greedy, model_of, passes_of, simulate, start_plan

DRIFT = (("zipf:1.0", 10, 1), ("zipf:1.0", 10, 2))
FREE = MigrationSettings(message_s=0.0, install_Bps=np.inf)


def balancer(policy: str | Policy = "on_drift:0.9", **options: Any) -> Balancer:
    return Balancer(**{"planner": greedy, "policy": policy, "planner_s": 1e-3, "window": 4, **options})


@cache
def drifting() -> ChangeRun:
    return simulate(passes_of(*DRIFT), balancer=balancer())


@cache
def undisturbed() -> ChangeRun:
    return simulate(passes_of(*DRIFT))


def without_limits() -> Cluster:
    cluster = cluster_of()
    links = {name: replace(link, bandwidth_Bps=np.inf, latency_s=0.0, efficiency=SizeCurve()) for name, link in cluster.links.items()}
    return replace(cluster, links=links)


# --- nothing changes ------------------------------------------------------------------------------------------------


def test_a_run_without_changes_is_the_plain_replay() -> None:
    passes, plan = passes_of(("zipf:1.0", 6, 1)), start_plan()
    run = simulate(passes)
    builder = changes.builder_of(plan)
    plain = run_passes(passes, builder=builder, compiler=LoadCompiler(plan, ranks_per_node=4))
    assert run.replay.ledger.duration_s == pytest.approx(plain.ledger.duration_s, rel=1e-12)
    assert run.total_s == pytest.approx(plain.ledger.simulated_s, rel=1e-12)
    assert (run.replay.tokens, run.replay.sums.routed, run.replay.inter_node_bytes) == (plain.tokens, plain.sums.routed, plain.inter_node_bytes)
    assert run.replay.sums.balance.mean_over_max == pytest.approx(plain.sums.balance.mean_over_max)
    np.testing.assert_array_equal(run.replay.sums.expert_LE, plain.sums.expert_LE)


def test_a_plan_that_promises_too_little_is_declined() -> None:
    passes = passes_of(("balanced", 7, 1))
    run = simulate(passes, balancer=balancer("periodic:2", planner_s=0.0))
    assert run.decisions >= 2 and run.declined == run.decisions and run.rebalances == 0 and run.moved_bytes == 0
    eager = simulate(passes_of(*DRIFT), balancer=balancer("periodic:5", min_gain=10.0))
    assert eager.declined >= 1 and eager.rebalances == 0


def test_balanced_routing_leaves_on_drift_asleep() -> None:
    passes = passes_of(("balanced", 10, 1))
    run, base = simulate(passes, balancer=balancer()), simulate(passes)
    assert (run.decisions, run.moved_bytes, run.planner_s, run.total_s) == (0, 0, 0.0, base.total_s)


def test_a_skew_that_no_placement_can_cure_leaves_on_drift_asleep() -> None:
    plan = start_plan()
    load = np.zeros((1, plan.num_layers, plan.num_experts))
    load[..., 3] = 100.0
    assert policies.get("balancer", "on_drift:0.9").function(view(load)) is None
    load[..., 4] = 100.0  # on the same rank: moving one away halves the peak
    assert policies.get("balancer", "on_drift:0.9").function(view(load)) is not None


# --- it pays where it should ----------------------------------------------------------------------------------------


def test_free_migration_on_a_drifting_trace_never_loses() -> None:
    passes = passes_of(*DRIFT)
    run = simulate(passes, cluster=without_limits(), migration=FREE, balancer=balancer(planner_s=0.0))
    result = verdict(run, undisturbed())
    assert result["worth_it"] and result["saved_s"] > 0 and run.rebalances >= 2
    assert run.pause_s == 0.0 and result["balance"]["run"] > result["balance"]["without"]


def test_a_stationary_skew_is_rebalanced_once_and_gains() -> None:
    passes = passes_of(("zipf:1.0", 24, 1))
    run = simulate(passes, balancer=balancer())
    result = verdict(run, simulate(passes))
    assert run.rebalances == 1 and result["worth_it"]
    (change,) = run.changes
    around = run.around(change, 4)
    assert around["after_s"] < around["before_s"] and around["break_even_passes"] < 20  # type: ignore[operator]


def test_tiny_periods_lose_and_long_ones_win() -> None:
    """Zipf that drifts once: serving pauses for every rebalancing, so that each has a price."""
    passes, slow = passes_of(*DRIFT), MigrationSettings(mode="pause")

    def run(period: int) -> ChangeRun:
        return simulate(passes, migration=slow, balancer=balancer(f"periodic:{period}", window=2, planner_s=4e-4, min_gain=0.0))

    budget = simulate(passes, migration=slow, balancer=balancer("budgeted:60 MB,8", planner_s=1e-4))
    base = undisturbed()
    result = sweep_periods([1, 10], run, base)
    first, last = result["rows"]
    assert not first["worth_it"] and last["total_s"] < first["total_s"]
    assert verdict(budget, base)["saved_s"] > first["saved_s"]


def test_break_even_period_lies_between_what_loses_and_what_pays() -> None:
    passes = passes_of(("zipf:1.0", 24, 1))
    settings = MigrationSettings(mode="pause")
    result = sweep_periods([1, 3, 12], lambda n: simulate(passes, migration=settings, balancer=forced(n)), simulate(passes))
    pays = {row["period"]: row["worth_it"] for row in result["rows"]}
    assert not pays[1] and pays[12] and result["break_even_period"] in (3, 12)
    assert result["best_period"] != 1


def forced(period: int) -> Balancer:
    """Every plan is taken, as engines do that rebalance by the clock."""

    def turn(load_KLE: np.ndarray, plan: Plan, budget: int | None) -> Plan:
        target = greedy(load_KLE, plan, budget)
        table = target.slot_to_expert_LS.reshape(plan.num_layers, plan.num_ranks, -1)
        # Another name for every rank: as balanced as before, and nearly everything moves.
        return replace(target, slot_to_expert_LS=np.roll(table, 1, axis=1).reshape(plan.num_layers, -1))

    return Balancer(planner=turn, policy=f"periodic:{period}", planner_s=1e-4, window=1, min_gain=0.0)


# --- conservation ---------------------------------------------------------------------------------------------------


def test_bytes_on_flows_are_what_the_plans_differ_by() -> None:
    run = drifting()
    expert_bytes = sizes.expert_bytes(model_of())
    assert run.rebalances >= 1 and run.aborted == 0
    arrivals = sum(len(transfer.moves) for transfer in run.transfers)
    assert run.flow_bytes == pytest.approx(arrivals * expert_bytes) == pytest.approx(run.moved_bytes)
    first = run.transfers[0]
    target = greedy_target(run, first)
    new = (held_LER(target) > 0) & ~(held_LER(start_plan()) > 0)
    assert len(first.moves) == int(new.sum()) > 0
    for rank in range(4):
        sent = sum(flow.total_bytes for flow in first.flows if ("scale_up.out", rank) in flow.path)
        got = sum(flow.total_bytes for flow in first.flows if ("scale_up.in", rank) in flow.path)
        assert sent == pytest.approx((first.moves.source_M == rank).sum() * expert_bytes)
        assert got == pytest.approx(new[..., rank].sum() * expert_bytes)


def greedy_target(run: ChangeRun, transfer: Transfer) -> Plan:
    """Plan again from what the balancer has seen until its first decision."""
    passes = passes_of(*DRIFT)[: run.changes[0].decided_pass]
    seen = [simulate((item,)).replay.sums.expert_LE for item in passes[-4:]]
    return greedy(np.stack(seen).astype(float), start_plan(), None)


def test_tokens_and_choices_are_conserved() -> None:
    passes = passes_of(*DRIFT)
    run = simulate(passes, balancer=balancer("periodic:5", min_gain=0.0))
    tokens = sum(item.num_tokens for item in passes)
    assert run.rebalances >= 3
    assert run.replay.tokens == tokens and run.replay.steps == len(passes)
    assert run.replay.sums.routed == tokens * model_of().top_k * start_plan().num_layers == run.replay.sums.expert_LE.sum()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), empty=st.integers(0, 3))
def test_moves_are_the_smallest_set_that_makes_the_new_plan(seed: int, empty: int) -> None:
    rng = np.random.Generator(np.random.PCG64(seed))

    def plan() -> Plan:
        rows = [rng.permutation(np.r_[np.arange(6), rng.integers(0, 6, 12 - 6 - empty), -np.ones(empty)]) for _ in range(2)]
        return Plan(model="m", num_experts=6, moe_layer_ids=(0, 1), slot_to_expert_LS=np.array(rows), slot_rank_S=np.repeat(np.arange(4), 3), num_ranks=4)

    old, new = plan(), plan()
    alive = np.arange(4) != seed % 5
    moves = moves_between(old, new, ranks_per_node=2, alive_R=alive)
    held = [[set(p.slot_to_expert_LS[layer, p.slot_rank_S == rank].tolist()) for rank in range(4)] for p in (old,) for layer in range(2)]
    seen = set()
    for layer, expert, source, target in zip(moves.layer_M, moves.expert_M, moves.source_M, moves.target_M, strict=True):
        holders = [rank for rank in range(4) if alive[rank] and expert in held[layer][rank]]
        assert source in holders if holders else source == CHECKPOINT
        assert target not in holders
        if any(rank // 2 == target // 2 for rank in holders):
            assert source // 2 == target // 2
        seen.add((int(layer), int(expert), int(target)))
    wanted = {(layer, int(e), int(r)) for layer in range(2) for e, r in zip(new.slot_to_expert_LS[layer], new.slot_rank_S, strict=True) if e >= 0}
    assert {(la, e, r) for la, e, r in wanted if not (alive[r] and e in held[la][r])} == seen and len(seen) == len(moves)
    assert moves.written_LR.sum() >= len(moves)
    assert len(moves_between(new, new, ranks_per_node=2)) == 0


def test_replicas_share_the_work_of_sending() -> None:
    """Experts 0..3 lie on ranks 0 and 1; rank 2 gets all of them."""
    table = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    old = Plan(model="m", num_experts=8, moe_layer_ids=(0,), slot_to_expert_LS=table, slot_rank_S=np.repeat(np.arange(3), 4), num_ranks=3)
    new = replace(old, slot_to_expert_LS=np.array([[4, 5, 6, 7, 0, 1, 2, 3, 0, 1, 2, 3]]))
    moves = moves_between(old, new, ranks_per_node=3)
    sent = np.bincount(moves.source_M[moves.target_M == 2], minlength=3)
    assert sent.tolist() == [2, 2, 0] and (moves.source_M[moves.target_M == 0] == 2).all()


def test_longer_periods_never_move_more() -> None:
    passes = passes_of(*DRIFT)
    moved = [simulate(passes, balancer=balancer(f"periodic:{n}", min_gain=0.0, planner_s=0.0)).moved_bytes for n in (3, 9, 30)]
    assert moved == sorted(moved, reverse=True) and moved[-1] == 0


def test_a_budget_bounds_what_every_decision_moves() -> None:
    run = simulate(passes_of(*DRIFT), balancer=balancer("budgeted:60 MB,5", planner_s=1e-4))
    assert run.rebalances >= 3 and max(change.moved_bytes for change in run.changes) <= 60e6
    with pytest.raises(SimulationError, match="budget"):
        simulate(passes_of(*DRIFT), balancer=balancer("budgeted:60 MB,6", planner=lambda load, plan, budget: greedy(load, plan, None)))


# --- time -----------------------------------------------------------------------------------------------------------


def test_infinite_bandwidth_makes_the_migration_pause_vanish() -> None:
    passes = passes_of(*DRIFT)
    free = simulate(passes, cluster=without_limits(), migration=replace(FREE, mode="pause"), balancer=balancer(planner_s=0.0))
    slow = simulate(passes, migration=MigrationSettings(mode="pause"), balancer=balancer(planner_s=0.0))
    assert free.rebalances >= 1 and free.pause_s == 0.0 and free.flow_bytes == 0.0 < free.moved_bytes
    assert slow.pause_s > 0.0 and slow.total_s > free.total_s


def test_the_pause_is_planner_messages_transfer_and_installation() -> None:
    """Closed form: two ranks swap one expert on an idle cluster."""
    passes, plan, cluster = passes_of(("zipf:1.0", 3, 1)), start_plan(), cluster_of()

    def swap(load_KLE: np.ndarray, running: Plan, budget: int | None) -> Plan:
        return greedy(load_KLE, running, 2)

    once = Policy(hook="balancer", name="once", function=lambda seen: Ask() if seen.passes == 1 else None)
    chosen = MigrationSettings(mode="pause", message_s=1e-3, install_Bps=1e9, install_slot_s=2e-3)
    run = simulate(passes, plan=plan, migration=chosen, balancer=Balancer(planner=swap, policy=once, planner_s=0.25, min_gain=0.0))
    assert run.rebalances == 1 and run.messages == 2
    size, link = sizes.expert_bytes(model_of()), cluster.links["scale_up"]
    wire = size / (link.bandwidth_Bps * link.efficiency.efficiency[0])
    assert run.pause_s == pytest.approx(0.25 + 1e-3 + link.latency_s + wire + 2e-3 + size / 1e9, rel=1e-9)
    assert run.total_s == pytest.approx(sum(run.replay.ledger.duration_s) + run.pause_s, rel=1e-9)


def test_messages_cost_what_their_number_says() -> None:
    engine, cluster = Engine(4), cluster_of()
    old = start_plan()
    table = old.slot_to_expert_LS.copy()
    table[:, [0, 16]] = table[:, [16, 0]]
    moves = moves_between(old, replace(old, slot_to_expert_LS=table), ranks_per_node=4)
    transfer = Transfer(engine, cluster, MigrationSettings(message_s=10.0), 1.0, moves)
    engine.env.run(until=transfer.done)
    assert len(moves) == 2 * old.num_layers and engine.now == pytest.approx(10.0 * old.num_layers, rel=1e-6)


def test_the_planner_runs_on_the_simulated_clock() -> None:
    passes = passes_of(("zipf:1.0", 16, 1))
    quick, late = (simulate(passes, balancer=balancer(planner_s=seconds)) for seconds in (0.0, 0.005))
    assert late.planner_s == 0.005 and late.changes[0].installed_s > quick.changes[0].installed_s + 0.004
    never = simulate(passes, balancer=balancer(planner_s=1e3))
    assert never.rebalances == 0 and never.aborted == 1 and never.moved_bytes == 0


def test_low_priority_flows_delay_exchanges_less_than_fair_ones() -> None:
    passes, cluster = passes_of(("zipf:1.0", 16, 1)), cluster_of()
    # What migrations see of the links is slow, so that they overlap several passes; the costs of passes are those of the real cluster.
    slow = replace(cluster, links={name: replace(link, bandwidth_Bps=link.bandwidth_Bps / 20) for name, link in cluster.links.items()})
    runs = {name: simulate(passes, cluster=slow, migration=MigrationSettings(discipline=name), balancer=balancer(planner_s=0.0)) for name in ("low", "fair")}
    base = simulate(passes).replay.ledger.duration_s
    low, fair = (run.replay.ledger.duration_s[4:7] for run in runs.values())
    assert min(run.changes[0].installed_pass for run in runs.values()) >= 7
    assert low == pytest.approx(base[4:7], rel=1e-9) and sum(fair) > sum(low) * 1.01
    assert runs["fair"].changes[0].installed_pass < runs["low"].changes[0].installed_pass


def test_runs_repeat_to_the_bit() -> None:
    passes = passes_of(*DRIFT)
    reports = [simulate(passes, balancer=balancer("periodic:4")).report() for _ in range(2)]
    assert repr(reports[0]) == repr(reports[1])


# --- chunks and memory ----------------------------------------------------------------------------------------------


def test_chunks_stage_less_and_end_at_the_same_plan() -> None:
    passes = passes_of(("zipf:1.0", 10, 1))
    whole, parts = (simulate(passes, migration=MigrationSettings(layers_per_chunk=n), balancer=balancer(planner_s=0.0)) for n in (0, 1))
    assert parts.plan.map_sha256 == whole.plan.map_sha256 and parts.moved_bytes == whole.moved_bytes
    assert parts.staging_peak_bytes < 0.7 * whole.staging_peak_bytes
    assert len(parts.epochs) == 1 + start_plan().num_layers and len(whole.epochs) == 2
    assert [epoch.number for epoch in parts.epochs] == list(range(len(parts.epochs)))


def test_staging_that_does_not_fit_is_refused_and_counted() -> None:
    size = sizes.expert_bytes(model_of())
    run = simulate(passes_of(("zipf:1.0", 12, 1)), migration=MigrationSettings(staging_limit_bytes=size), balancer=balancer())
    assert run.refused >= 1 and run.rebalances == 0 and run.moved_bytes == 0 and len(run.epochs) == 1
    assert any(event["kind"] == "refused" and event["missing_bytes"] > 0 for event in run.events)


def test_staging_counts_against_the_device_memory() -> None:
    cluster, passes = cluster_of(), passes_of(("zipf:1.0", 8, 1))
    need, hbm = simulate(passes, balancer=balancer(planner_s=0.0)), cluster.tiers["hbm"]
    held = changes.memory_account(simulate(passes[: need.changes[0].decided_pass]))
    for spare, refused in ((1.01, False), (0.99, True)):
        tight = replace(cluster, tiers={**cluster.tiers, "hbm": replace(hbm, capacity_bytes=held + spare * need.staging_peak_bytes)})
        run = simulate(passes, cluster=tight, balancer=balancer(planner_s=0.0))
        assert bool(run.refused) is refused and bool(run.rebalances) is not refused


# --- rules ----------------------------------------------------------------------------------------------------------


def test_a_plan_takes_effect_only_at_a_step_border() -> None:
    run = drifting()
    ledger = run.replay.ledger
    ends = np.add(ledger.start_s, ledger.duration_s)
    for epoch, change in zip(run.epochs[1:], run.changes, strict=True):
        assert ends[epoch.first_pass - 1] <= epoch.at_s == pytest.approx(change.installed_s)
        assert epoch.first_pass == len(ledger.start_s) or ledger.start_s[epoch.first_pass] >= epoch.at_s
    for transfer, change in zip(run.transfers, run.changes, strict=True):
        assert max(flow.end_s for flow in transfer.flows) <= change.installed_s


@pytest.mark.parametrize("spoil", ["slots", "experts"])
def test_a_planner_that_changes_the_slots_is_an_error(spoil: str) -> None:
    def planner(load_KLE: np.ndarray, plan: Plan, budget: int | None) -> Plan:
        if spoil == "slots":
            return replace(plan, slot_rank_S=np.sort(np.r_[plan.slot_rank_S[1:], 3]))
        return replace(plan, num_experts=plan.num_experts // 2, slot_to_expert_LS=plan.slot_to_expert_LS % (plan.num_experts // 2))

    with pytest.raises(SimulationError, match="planner"):
        simulate(passes_of(*DRIFT), balancer=balancer(planner=planner))


@pytest.mark.parametrize("text", ["periodic:0", "periodic:x", "on_drift:0", "on_drift:1.5", "budgeted:5", "budgeted:1 MB,0", "sometimes"])
def test_a_bad_policy_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        simulate(passes_of(*DRIFT), balancer=balancer(text))


@pytest.mark.parametrize("options", [{"window": 0}, {"planner_s": -1.0}, {"min_gain": np.nan}])
def test_a_bad_balancer_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="balancer"):
        balancer(**options)


@pytest.mark.parametrize(
    "options", [{"mode": "now"}, {"discipline": "none"}, {"layers_per_chunk": -1}, {"message_s": np.inf}, {"install_Bps": 0.0}, {"staging_limit_bytes": np.nan}]
)
def test_bad_migration_settings_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InputError, match="migration"):
        MigrationSettings(**options)  # type: ignore[arg-type]


def view(load_KLE: np.ndarray, plan: Plan | None = None) -> LoadView:
    plan = plan or start_plan()
    return LoadView(passes=9, since_change=9, window=1, load_KLE=load_KLE, plan=plan, alive_R=np.ones(4, dtype=bool), expert_bytes=1.0)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), spare=st.integers(0, 2))
def test_no_placement_beats_the_attainable_balance(seed: int, spare: int) -> None:
    """Brute force: 4 experts, 2 ranks, up to 6 slots."""
    from itertools import product

    rng = np.random.Generator(np.random.PCG64(seed))
    load = rng.integers(1, 50, (1, 1, 4)).astype(float)
    slots = 4 + spare + spare % 2
    home = np.repeat([0, 1], slots // 2)
    best = 0.0
    for row in product(range(4), repeat=slots):
        if set(row) == {0, 1, 2, 3} and all(len(set(row[low : low + slots // 2])) == slots // 2 for low in (0, slots // 2)):
            plan = Plan(model="m", num_experts=4, moe_layer_ids=(0,), slot_to_expert_LS=np.array([row]), slot_rank_S=home, num_ranks=2)
            rank_load = plan.rank_load_LR(load[0])
            best = max(best, float(rank_load.mean() / rank_load.max()))
            last = plan
    seen = LoadView(passes=1, since_change=1, window=1, load_KLE=load, plan=last, alive_R=np.ones(2, dtype=bool), expert_bytes=1.0)
    assert seen.attainable >= best - 1e-12


def test_mixed_plans_take_rows_and_shares_from_the_new_one() -> None:
    old = start_plan()
    new = replace(old, slot_to_expert_LS=old.slot_to_expert_LS[:, ::-1].copy(), share_LS=np.ones(old.slot_to_expert_LS.shape))
    both = mixed(old, new, [1])
    rows = [int((both.slot_to_expert_LS[row] == new.slot_to_expert_LS[row]).all()) for row in range(old.num_layers)]
    assert rows == [0, 1] and both.share_LS is not None
    assert mixed(old, new, range(old.num_layers)) is new


# --- the ways of experts -------------------------------------------------------------------------------------------


def transfer_s(cluster: Cluster, pairs: list[tuple[int, int]]) -> float:
    """Return the time of one expert from every source to its target, on idle links."""
    source, target = (np.array(side) for side in zip(*pairs, strict=True))
    moves = Moves(
        layer_M=np.zeros(len(pairs), dtype=int), expert_M=np.arange(len(pairs)), source_M=source, target_M=target, written_LR=np.zeros((1, cluster.num_ranks))
    )
    engine = Engine(cluster.num_ranks)
    transfer = Transfer(engine, cluster, FREE, 1e9, moves)
    engine.env.run(until=transfer.done)
    return engine.now


def test_experts_go_the_way_of_the_network() -> None:
    """Two pairs side by side: as fast as one on NICs of their own, half as fast on one NIC, or on a fabric that carries half."""
    cluster = load_cluster("h100-sxm-2x2")
    nic = cluster.links["scale_out"]
    latency = Network(cluster).latency(0, 2)
    alone, own = transfer_s(cluster, [(0, 2)]), transfer_s(cluster, [(0, 2), (1, 3)])
    assert own == pytest.approx(alone)
    shared = replace(cluster, links={**cluster.links, "scale_out": replace(nic, shared_by=2)})
    assert transfer_s(shared, [(0, 2)]) == pytest.approx(alone)
    assert transfer_s(shared, [(0, 2), (1, 3)]) - latency == pytest.approx(2 * (alone - latency))
    assert transfer_s(replace(cluster, fabric_oversubscription=2.0), [(0, 2), (1, 3)]) - latency == pytest.approx(2 * (alone - latency))


def test_ranks_of_a_node_share_its_disk_when_they_load_from_the_checkpoint() -> None:
    cluster = load_cluster("h100-sxm-2")
    slow = replace(cluster, links={**cluster.links, "disk": replace(cluster.links["disk"], bandwidth_Bps=1e9, latency_s=0.0)})
    slow = replace(slow, tiers={**slow.tiers, "nvme": replace(slow.tiers["nvme"], read_Bps=1e9)})
    one, two = transfer_s(slow, [(CHECKPOINT, 0)]), transfer_s(slow, [(CHECKPOINT, 0), (CHECKPOINT, 1)])
    assert one == pytest.approx(1.0, rel=1e-3) and two == pytest.approx(2.0, rel=1e-3)
