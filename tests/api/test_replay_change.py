"""Replay with a plan that changes: a balancer, ranks that die, leave and join, ladders; and when rebalancing pays."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from moesim import api
from moesim.cli.rebalance import crossover
from moesim.cli.replay import change_rows
from moesim.errors import InputError
from moesim.model import sizes
from moesim.plan import linear
from tests.sim.changes import model_of

TRACE = "synthetic:zipf:1.0,tokens=512,steps=16,phase=decode"
LONG = "synthetic:zipf:1.0,tokens=64,steps=110,phase=decode"
SMALL: dict[str, Any] = {"model": model_of(), "hardware": "h100-sxm-4"}
QUICK: dict[str, Any] = {"detection_s": 0.002, "rebuild_s": 0.001, "init_s": 0.001}


def change(**settings: Any) -> dict[str, str]:
    return {f"change.{key}": str(value) for key, value in settings.items()}


def run(trace: str = TRACE, **settings: Any) -> dict[str, Any]:
    return api.replay(trace, **SMALL, settings=change(**settings)).report


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return api.replay(TRACE, **SMALL).report


def test_a_balancer_that_never_acts_changes_nothing(plain: dict[str, Any]) -> None:
    report = run(balancer="never")
    assert report["simulated_s"] == pytest.approx(plain["simulated_s"], rel=1e-12)
    for key in ("steps", "tokens", "balance", "bytes", "memory"):
        assert report[key] == pytest.approx(plain[key]), key
    assert report["change"]["decisions"] == 0 and plain["change"] is None
    json.dumps(report, allow_nan=False)


def test_a_balancer_moves_experts_and_is_charged_for_it(plain: dict[str, Any]) -> None:
    report = run(balancer="periodic:4", planner_s=0.0005, mode="pause")
    told = report["change"]
    assert told["decisions"] == told["rebalances"] + told["aborted"] + told["declined"] and told["aborted"] <= 1, "the end cuts the last one"
    assert told["rebalances"] > 0 and told["planner_s"] == pytest.approx(0.0005 * (told["rebalances"] + told["declined"]))
    assert told["pause_s"] > told["planner_s"], "the planner's time and the copies both stand in the way"
    assert report["balance"]["mean_over_max"] > plain["balance"]["mean_over_max"]
    assert told["moved_bytes"] == pytest.approx(told["messages"] * sizes.expert_bytes(model_of()))
    assert report["memory_by_use"]["hbm"]["staging"] == told["staging_peak_bytes"] > 0
    assert report["memory"]["hbm"] > plain["memory"]["hbm"]
    assert [epoch["reason"] for epoch in told["epochs"]] == ["start"] + ["rebalance"] * told["rebalances"]


def test_in_the_background_serving_goes_on(plain: dict[str, Any]) -> None:
    pause, background = (run(balancer="periodic:4", planner_s=0.0005, mode=mode)["change"] for mode in ("pause", "background"))
    assert background["pause_s"] < pause["pause_s"]


def test_balanced_routing_is_left_alone() -> None:
    assert run("synthetic:balanced,tokens=512,steps=8,phase=decode", balancer="on_drift:0.9", window=2)["change"]["rebalances"] == 0


def test_a_budget_and_a_staging_limit_bound_what_moves() -> None:
    one = sizes.expert_bytes(model_of())
    told = run(balancer=f"budgeted:{4.5 * one} B,8", planner_s=0.0, min_gain=0.0)["change"]
    assert 0 < told["messages"] <= 4 * told["rebalances"]
    refused = run(balancer="periodic:4", planner_s=0.0, staging=f"{one / 2} B")["change"]
    assert refused["refused"] > 0 and refused["rebalances"] == 0 and refused["moved_bytes"] == 0


def test_a_rank_that_dies_costs_downtime_and_its_experts_are_loaded_again(plain: dict[str, Any]) -> None:
    at_s = plain["simulated_s"] / 2
    report = run(fail=f"2@{at_s}", **QUICK)
    told = report["change"]
    assert told["downtime_s"] > QUICK["detection_s"] + QUICK["rebuild_s"]
    assert told["experts_lost"] == 2 * 16 and told["tokens_retried"] == 512
    assert report["simulated_s"] > plain["simulated_s"] + told["downtime_s"] - 1e-9
    assert [epoch["ranks"] for epoch in told["epochs"]] == [4, 3]
    assert report["tokens"] == plain["tokens"], "every token is served in the end"
    shown = dict(change_rows(told))
    assert shown["ranks that serve"] == "4 → 3" and shown["lost experts / tokens run again"] == "32 / 512"
    later = run(fail=f"2@{at_s}", **{**QUICK, "detection_s": 0.02})["change"]
    assert later["downtime_s"] == pytest.approx(told["downtime_s"] + 0.018)


def test_a_ladder_scales_up_and_down(plain: dict[str, Any]) -> None:
    told = run(LONG, start_ranks=2, ladder="4@0.001,3@0.03", **QUICK)["change"]
    assert [epoch["ranks"] for epoch in told["epochs"]] == [2, 4, 3]
    assert told["experts_lost"] == 0 and told["downtime_s"] == 0.0
    wide, narrow = (run(start_ranks=ranks)["simulated_s"] for ranks in (4, 2))
    assert wide == pytest.approx(plain["simulated_s"]) and narrow > wide


def test_leaving_and_joining_again() -> None:
    told = run(LONG, leave="3@0.001", join="3@0.006", **QUICK)["change"]
    assert [epoch["ranks"] for epoch in told["epochs"]] == [4, 3, 4]
    assert {"leave", "join"} <= {event["kind"] for event in told["events"]}


def test_a_plan_names_its_balancer() -> None:
    model = model_of()
    plan = linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=4)
    named = dataclasses.replace(plan, policies={"balancer": "periodic:4"})
    report = api.replay(TRACE, **SMALL, plan=named).report
    assert report["settings"]["change.balancer"] == "periodic:4" and report["change"]["decisions"] > 0
    assert api.replay(TRACE, **SMALL, plan=named, settings=change(balancer="never")).report["change"]["decisions"] == 0


def test_equal_runs_are_equal() -> None:
    reports = [run(balancer="periodic:4", planner_s=0.0005, fail="1@0.004", **QUICK) for _ in range(2)]
    for report in reports:
        del report["wall_s"]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"balancer": "sometimes"}, "sometimes"),
        ({"mode": "asleep"}, "must be one of background, pause"),
        ({"fail": "3"}, "RANKS@SECONDS"),
        ({"fail": "3-1@2"}, "RANKS@SECONDS"),
        ({"fail": "x@2"}, "RANKS@SECONDS"),
        ({"fail": "9@0.001"}, r"must be in 0\.\.3"),
        ({"ladder": "0@1"}, "COUNT@SECONDS"),
        ({"ladder": "4@2,3@1"}, "in order of time"),
        ({"ladder": "5@1"}, "must stay <= 4"),
        ({"start_ranks": 5}, "must be <= 4"),
        ({"window": 0}, "must be >= 1"),
        ({"planner_s": -3}, "must be finite and >= 0"),
        ({"staging": "many"}, "bytes"),
        ({"detection_s": "inf"}, "must be finite"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(**settings)


# --- when does it pay? ------------------------------------------------------------------------------------


def test_there_is_a_crossover_below_which_rebalancing_does_not_pay() -> None:
    """Two segments with other hot experts: every pass is too often, every sixth pays, and the interval that the costs tell lies between."""
    traces = [f"synthetic:zipf:1.0,tokens=8192,steps=12,seed={seed},phase=decode" for seed in (1, 2)]
    settings = change(balancer="periodic:6", mode="pause", min_gain=0.0, window=4, planner_s=1e-4)
    report = api.rebalance(traces, **SMALL, settings=settings, periods=[1, 6])
    sweep, found = report["sweep"], report["verdict"]
    assert [row["worth_it"] for row in sweep["rows"]] == [False, True]
    assert (sweep["loses_up_to"], sweep["break_even_period"], sweep["pays_up_to"]) == (1, 6, 6)
    assert found["worth_it"] and 1 < found["break_even"]["interval_passes"] < 6
    assert "pays from every 6 passes on; every 1 passes is too often" in crossover(sweep)
    assert report["policy"] == "periodic:6" and report["mode"] == "pause"
    # The cost and the saving that it names add up to what the run gained.
    gained = found["rebalances"] * (found["break_even"]["saved_s_per_pass"] * found["break_even"]["passes_between"] - found["break_even"]["cost_s"])
    assert gained == pytest.approx(found["saved_s"], rel=0.05)


def test_rebalancing_is_a_replay_with_and_one_without() -> None:
    settings = change(balancer="periodic:4", planner_s=0.0005)
    report = api.rebalance([TRACE], **SMALL, settings=settings)
    assert report["verdict"]["total_s"] == pytest.approx(run(balancer="periodic:4", planner_s=0.0005)["simulated_s"])
    assert report["verdict"]["without_s"] == pytest.approx(run(balancer="never")["simulated_s"])
    with pytest.raises(InputError, match="cannot be combined"):
        api.rebalance([TRACE], **SMALL, settings={"offload.tier": "dram"})
    never = api.rebalance([TRACE], **SMALL, policy="never")["verdict"]
    assert never["gain"] == 0.0 and never["break_even"]["interval_passes"] is None
