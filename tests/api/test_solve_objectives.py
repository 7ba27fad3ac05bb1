"""Objectives, repair budgets, heterogeneity and infeasible requests end to end: what is asked for is what the report and the plan hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.api.migrating import break_even_steps, migration_cost, moved_bytes, placed
from moesim.api.objectives import asked_for, expected_seconds
from moesim.cli.main import main
from moesim.costs.model import CostModel
from moesim.errors import InfeasibleError, InputError, TraceError
from moesim.hardware.load import load_cluster
from moesim.model import load_model
from moesim.model.sizes import expert_bytes
from moesim.plan import Plan
from moesim.solvers.objective import Decode
from moesim.traces.open import open_trace

FLAME: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-8"}
DECODE = "synthetic:zipf:1.0,tokens=24,phase=decode,steps=12"
DRIFTED = "synthetic:zipf:1.0,tokens=2048,seed=5"


@pytest.fixture(scope="module")
def running() -> api.Solution:
    return api.solve("synthetic:zipf:1.0,tokens=2048,seed=1", **FLAME, redundant=8, predict=False)


def most_active(plan: Plan, trace: str) -> float:
    """Return the experts active on the fullest rank, averaged over the layers and steps of a trace, by counting its tokens."""
    routing = open_trace(trace, shape=api.trace_shape(load_model(FLAME["model"])), seed=9)
    owner = np.empty((plan.num_layers, plan.num_experts), dtype=int)
    np.put_along_axis(owner, plan.slot_to_expert_LS.astype(int), np.broadcast_to(plan.slot_rank_S, plan.slot_to_expert_LS.shape), axis=1)
    fullest = []
    for step in routing.counts_WLE():
        fullest += [np.bincount(owner[layer][row > 0], minlength=plan.num_ranks).max() for layer, row in enumerate(step)]
    return float(np.mean(fullest))


def test_activated_reads_fewer_experts_on_steps_not_planned_on_and_says_what_balance_costs() -> None:
    ours = api.solve(DECODE, **FLAME, objective="activated")
    balanced = api.solve(DECODE, **FLAME, predict=False)
    cost = ours.report["cost"]
    assert cost["batch_tokens"] == 24 and cost["phase"] == "decode"
    assert cost["bound"] <= cost["value"] < cost["balanced"]
    # the loads of the generator do not depend on the seed of the tokens
    assert most_active(ours.plan, DECODE) < most_active(balanced.plan, DECODE)
    assert set(ours.report["predicted"]["step_ms"]) == {"linear", "plan", "balanced"}


def test_the_batch_given_beats_that_of_the_trace() -> None:
    few, many = (api.solve(DECODE, **FLAME, objective="activated", batch=batch, predict=False).report["cost"] for batch in (1, 4096))
    assert few["batch_tokens"] == 1 and few["value"] < many["value"]
    with pytest.raises(TraceError, match="give --batch"):
        api.solve("flame-moe-290m", **FLAME, objective="activated")
    assert api.solve("flame-moe-290m", **FLAME, objective="activated", batch=64, predict=False).report["status"] in ("FEASIBLE", "OPTIMAL")


def test_latency_is_predicted_by_the_cost_model_and_no_worse_than_balance() -> None:
    report = api.solve(DECODE, **FLAME, objective="latency", predict=False).report
    cost = report["cost"]
    assert 0 < cost["bound"] <= cost["value"] <= cost["balanced"]


def test_predicted_seconds_do_not_fall_with_tokens_and_meet_the_cost_model_where_all_slots_are_active() -> None:
    costs = CostModel(load_cluster("h100-sxm-8"), load_model("flame-moe-290m"))
    decode = Decode(tokens=100_000, top_k=6)
    seconds = expected_seconds(costs, decode, low_latency=True)
    mask = np.ones((1, 8, 8), dtype=bool)
    times = [float(seconds(np.full((1, 8, 8), tokens), mask)[0, 0]) for tokens in (0.0, 0.5, 1.0, 4.0, 64.0, 1024.0)]
    assert times == sorted(times)
    tokens = np.full((1, 8, 8), 9375.0)
    exchange = float(seconds(tokens, mask)[0, 0]) - float(costs.experts(tokens.astype(int)).seconds[0, 0])
    # 75,000 assignments of 2 KiB or more arrive and leave over one port
    assert exchange > 2 * 75_000 * 2048 * 7 / 8 / load_cluster("h100-sxm-8").links["scale_up"].bandwidth_Bps


def test_weighted_sums_with_traffic_show_their_gain_on_unseen_tokens() -> None:
    report = api.solve("flame-moe-290m", **FLAME, objective="balance+traffic:0.5", predict=False).report
    assert report["solver"] == "descent" and report["cost"]["value"] < report["cost"]["balanced"]
    evidence = report["affinity"]
    assert evidence["plan"]["held_out"] < evidence["contiguous"]["held_out"]


@pytest.mark.parametrize("objective", ["traffic", "hops"])
def test_traffic_alone_goes_through_the_registry(objective: str) -> None:
    report = api.solve("flame-moe-290m", **FLAME, objective=objective, predict=False).report
    assert report["affinity"]["plan"]["held_out"] < report["affinity"]["contiguous"]["held_out"]
    assert report["value"] <= report["bound"]


def test_mixed_traces_plan_decode_for_decode() -> None:
    model, cluster = load_model(FLAME["model"]), load_cluster(FLAME["hardware"])
    routing = open_trace("synthetic:zipf:1.0,tokens=64,steps=3", shape=api.trace_shape(model))
    asked = asked_for("latency", [routing], model=model, cluster=cluster, batch=None, seed=0)
    assert (asked.phase, asked.batch_tokens) == ("prefill", 64)


def test_the_frontier_comes_in_one_call(running: api.Solution) -> None:
    report = api.solve(DRIFTED, **FLAME, previous=running.plan, frontier=True).report
    rows = report["frontier"]
    one = expert_bytes(load_model(FLAME["model"]))
    assert rows[0]["slots"] == 0 and rows[0]["break_even_steps"] == 0
    for key in ("slots", "bytes", "balance"):
        assert [row[key] for row in rows] == sorted(row[key] for row in rows)
    assert all(row["bytes"] == row["slots"] * one for row in rows)
    assert sum(row["knee"] for row in rows) == 1
    assert rows[-1]["balance"] == pytest.approx(report["value"])
    assert report["break_even_steps"] == rows[-1]["break_even_steps"]
    saved = report["predicted"]["step_ms"]["running"] - report["predicted"]["step_ms"]["plan"]
    assert (report["break_even_steps"] - 1) * saved < report["migration"]["total_s"] * 1e3 <= report["break_even_steps"] * saved


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_budget_of_time_is_kept_on_the_real_links(running: api.Solution, share: float) -> None:
    whole = api.solve(DRIFTED, **FLAME, previous=running.plan, predict=False)
    limit = whole.report["migration"]["total_s"] * share
    part = api.solve(DRIFTED, **FLAME, previous=running.plan, move_budget_s=limit, predict=False)
    cluster, one = load_cluster(FLAME["hardware"]), expert_bytes(load_model(FLAME["model"]))
    assert part.report["moved"]["slots"] > 0 and migration_cost(running.plan, part.plan, cluster, one).total_s <= limit
    assert running.plan.result["value"] < 1 and part.report["value"] < whole.report["value"]


def test_moved_bytes_are_what_differs_in_the_map(running: api.Solution) -> None:
    table = running.plan.slot_to_expert_LS.copy()
    table[0, [0, 9]] = table[0, [9, 0]]
    assert moved_bytes(running.plan, table, 10.0) == (2, 20.0)
    cluster = load_cluster(FLAME["hardware"])
    stay, swap = (migration_cost(running.plan, placed(running.plan, one), cluster, 1e6) for one in (running.plan.slot_to_expert_LS, table))
    assert (stay.copies, stay.total_s) == (0, 0.0) and swap.copies == 2
    # both go at once, over the two directions of two ports
    assert 1e6 / cluster.links["scale_up"].bandwidth_Bps < swap.transfer_s < 1e-4
    assert break_even_steps(1.0, 0.5, 0.3) == 5 and break_even_steps(1.0, 0.3, 0.3) is None and break_even_steps(0.0, 0.1, 0.2) == 0


def test_slow_ranks_get_less_load() -> None:
    speeds = [1.0] * 7 + [0.5]
    solution = api.solve("flame-moe-290m", **FLAME, slots=[9] * 7 + [5], speeds=speeds)
    load = solution.plan.rank_load_LR(open_trace("flame-moe-290m").counts_WLE("all")[0]).sum(axis=0)
    assert load[-1] < 0.6 * load[:-1].mean() and solution.report["predicted"] is None
    assert np.bincount(solution.plan.slot_rank_S).tolist() == [9] * 7 + [5]


@pytest.mark.parametrize(
    ("arguments", "requirement", "where", "relaxation"),
    [
        ({"slots": 7}, "one slot for every expert", "layer 1", "--slots-per-rank 8"),
        ({"redundant": 600}, "no expert twice on a rank", "rank 0", "--redundant 448"),
        ({"redundant": 64, "weight_memory_bytes": 700e6}, "weights fit hbm", "rank 0", "--redundant"),
        ({"weight_memory_bytes": 577e6}, "weights fit hbm", "rank 0", "devices"),
    ],
)
def test_what_cannot_be_names_the_requirement_and_what_would_do(arguments: dict[str, Any], requirement: str, where: str, relaxation: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        api.solve("flame-moe-290m", **FLAME, **arguments, predict=False)
    error = caught.value
    assert error.requirement.startswith(requirement) and error.where == where and relaxation in str(error.relaxation)
    assert isinstance(error.missing, int | float) and error.missing > 0
    if relaxation == "--redundant" and error.relaxation is not None:
        largest = int(error.relaxation.split()[1])
        api.solve("flame-moe-290m", **FLAME, redundant=largest, weight_memory_bytes=arguments["weight_memory_bytes"], predict=False)
        with pytest.raises(InfeasibleError):
            api.solve("flame-moe-290m", **FLAME, redundant=largest + 1, weight_memory_bytes=arguments["weight_memory_bytes"], predict=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"slots": 9, "redundant": 8}, "leave out --redundant"),
        ({"slots": [9] * 7}, "one for each of the 8 ranks"),
        ({"speeds": [1.0] * 7}, "device_speed"),
        ({"frontier": True}, "--frontier needs --from"),
        ({"objective": "hops", "redundant": 8}, "one slot per expert"),
        ({"objective": "activated", "batch": 0}, "batch"),
        ({"time_limit_s": float("nan")}, "time_limit"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        api.solve("flame-moe-290m", **FLAME, **arguments, predict=False)


def test_a_running_plan_fixes_slots_and_objective(running: api.Solution) -> None:
    with pytest.raises(InputError, match="must be 8"):
        api.solve(DRIFTED, **FLAME, previous=running.plan, redundant=16, predict=False)
    with pytest.raises(InputError, match="does not plan for hops|one slot per expert"):
        api.solve(DRIFTED, **FLAME, previous=running.plan, objective="hops", move_budget_bytes=1e9, predict=False)
    repaired = api.solve(DRIFTED, **FLAME, previous=running.plan, objective="activated", batch=64, move_budget_bytes=1e8, predict=False).report
    assert repaired["solver"] == "repair" and 0 < repaired["moved"]["bytes"] <= 1e8
    assert repaired["cost"]["bound"] <= repaired["cost"]["value"]
    with pytest.raises(InputError, match="not both"):
        api.solve(DRIFTED, **FLAME, previous=running.plan, move_budget_bytes=1e9, move_budget_s=1.0, predict=False)


def test_infeasible_is_one_object_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["solve", "flame-moe-290m", "--model", "flame-moe-290m", "--hardware", "h100-sxm-8", "-o", str(tmp_path / "p.json")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--slots-per-rank", "7", "--json"])
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert stopped.value.code == 1 and said.err.startswith("moesim: solve: 56 slots")
    assert report["status"] == "INFEASIBLE" and (report["missing"], report["where"]) == (8, "layer 1")
    assert not (tmp_path / "p.json").exists()


@pytest.mark.parametrize("budget", ["1ms", "30MB"])
def test_budgets_of_time_and_of_bytes_reach_the_command_line(running: api.Solution, budget: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    running.plan.write(tmp_path / "old.json")
    command = ["solve", DRIFTED, "--model", "flame-moe-290m", "--hardware", "h100-sxm-8", "-o", str(tmp_path / "p.json")]
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--from", str(tmp_path / "old.json"), "--move-budget", budget, "--frontier", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert stopped.value.code == 0 and len(report["frontier"]) > 3
    assert report["moved"]["bytes"] <= 30e6 if budget.endswith("B") else report["migration"]["total_s"] <= 1e-3
