"""Solve end to end: the plan on disk, its proof, its predicted gain, repair, windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.balance import balance_of
from moesim.errors import InfeasibleError, InputError
from moesim.traces.open import open_trace

FLAME: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-8"}


@pytest.fixture(scope="module")
def solved() -> api.Solution:
    return api.solve("flame-moe-290m", **FLAME, redundant=8)


def test_the_report_has_the_keys_that_users_rely_on(solved: api.Solution) -> None:
    wanted = {"objective", "value", "bound", "gap", "status", "wall_s", "balance", "traffic", "moved", "solver", "plan_sha256"}
    assert wanted <= set(solved.report)
    assert set(solved.report["balance"]) == {"planned", "per_layer_min"}
    assert set(solved.report["traffic"]) == {"distinct_remote_ranks", "distinct_remote_nodes", "inter_node_bytes"}
    assert solved.report["plan_sha256"] == solved.plan.sha256


def test_the_value_is_the_balance_of_the_plan_on_the_trace(solved: api.Solution) -> None:
    load = solved.plan.rank_load_LR(open_trace("flame-moe-290m").counts_WLE("all")[0])
    assert solved.report["value"] == pytest.approx(balance_of(load).mean_over_max)
    assert solved.report["value"] <= solved.report["bound"] <= 1.0
    assert solved.report["status"] in ("OPTIMAL", "FEASIBLE")


def test_the_plan_survives_the_disk_and_is_replayed_as_solved(solved: api.Solution, tmp_path: Path) -> None:
    solved.plan.write(tmp_path / "p.json")
    report = api.replay("flame-moe-290m", **FLAME, plan=tmp_path / "p.json").report
    assert report["balance"]["mean_over_max"] == pytest.approx(solved.report["predicted"]["balance"]["plan"])
    assert report["balance"]["mean_over_max"] > api.replay("flame-moe-290m", **FLAME).report["balance"]["mean_over_max"]


@pytest.mark.parametrize("solver", ["greedy", "eplb", "eplb-global", "linear", "round_robin", "random"])
def test_every_solver_answers_through_one_door(solver: str) -> None:
    report = api.solve("flame-moe-290m", **FLAME, solver=solver, predict=False).report
    assert report["solver"] == solver and 0 < report["value"] <= report["bound"] + 1e-12


def test_several_traces_are_windows_of_a_robust_plan() -> None:
    windows = ["synthetic:zipf:1.0,tokens=2048,seed=1", "synthetic:zipf:1.0,tokens=2048,seed=2"]
    report = api.solve(windows, **FLAME, redundant=8, predict=False).report
    assert report["objective"] == "robust"


def test_a_repair_keeps_its_byte_budget(solved: api.Solution) -> None:
    drifted = "synthetic:zipf:1.0,tokens=4096,seed=5"
    from moesim.model import load_model
    from moesim.model.sizes import expert_bytes

    one = expert_bytes(load_model("flame-moe-290m"))
    report = api.solve(drifted, **FLAME, previous=solved.plan, move_budget_bytes=20.5 * one, predict=False)
    changed = int((report.plan.slot_to_expert_LS != solved.plan.slot_to_expert_LS).sum())
    assert 0 < changed <= 20
    assert report.report["moved"] == {"slots": changed, "bytes": changed * one}


def test_equal_runs_give_equal_plans() -> None:
    first, second = (api.solve("flame-moe-290m", **FLAME, redundant=8, predict=False, seed=4).plan.sha256 for _ in range(2))
    assert first == second


def test_eplb_placement_is_the_eplb_solver() -> None:
    plan = api.solve("flame-moe-290m", **FLAME, solver="eplb", predict=False).plan
    assert np.array_equal(api.replay("flame-moe-290m", **FLAME, placement="eplb").plan.slot_to_expert_LS, plan.slot_to_expert_LS)


@pytest.mark.parametrize("method", ["fast", "lp"])
def test_dispatch_shares_balance_the_same_placement_better(method: str) -> None:
    equal, shared = (api.solve("flame-moe-290m", **FLAME, redundant=8, solver="eplb", dispatch=name, predict=False) for name in ("equal", method))
    assert np.array_equal(equal.plan.slot_to_expert_LS, shared.plan.slot_to_expert_LS)
    assert shared.report["balance"]["planned"] > equal.report["balance"]["planned"]
    before, after = (api.replay("flame-moe-290m", **FLAME, plan=item.plan).report["balance"]["mean_over_max"] for item in (equal, shared))
    assert after > before


def test_a_plan_names_what_it_was_made_for(solved: api.Solution) -> None:
    assert set(solved.plan.fingerprints) == {"model", "hardware", "trace"} and all(solved.plan.fingerprints.values())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="needs --from"):
        api.solve("flame-moe-290m", **FLAME, move_budget_bytes=1e9)
    with pytest.raises(InputError, match="must be one of"):
        api.solve("flame-moe-290m", **FLAME, objective="beauty")
    with pytest.raises(InputError, match="did you mean 'greedy'"):
        api.solve("flame-moe-290m", **FLAME, solver="gredy")
    with pytest.raises(InputError, match="redundant"):
        api.solve("flame-moe-290m", **FLAME, redundant=-1)
    with pytest.raises(InfeasibleError, match="26 slots per rank fit: use at least 10 devices"):
        api.solve("synthetic:balanced,tokens=64", model="deepseek-v3", hardware="h100-sxm-8")


def test_the_fewest_slots_for_a_target_balance() -> None:
    trace = "synthetic:zipf:1.2,tokens=2048"
    found = api.solve(trace, **FLAME, target_balance=0.95, predict=False)
    needed = found.report["redundancy"]
    assert found.report["balance"]["planned"] >= 0.95 and found.plan.num_slots == 64 + needed["redundant"] == 8 * needed["slots_per_rank"]
    assert all(value < 0.95 for slots, value, _ in needed["tried"] if slots < needed["slots_per_rank"])
    fewer = api.solve(trace, **FLAME, slots=needed["slots_per_rank"] - 1, predict=False).report
    assert fewer["balance"]["planned"] < 0.95
    with pytest.raises(InputError, match="target-balance"):
        api.solve(trace, **FLAME, target_balance=0.95, redundant=8)


def test_one_copy_serves_a_decode_batch() -> None:
    trace = "synthetic:zipf:1.0,tokens=64,steps=8,phase=decode"
    equal, once = (api.solve(trace, **FLAME, redundant=8, objective="activated", solver="eplb", dispatch=name, predict=False) for name in ("equal", "once"))
    assert once.report["cost"]["value"] < equal.report["cost"]["value"] and once.plan.map_sha256 == equal.plan.map_sha256
    assert once.plan.share_LS is not None and set(np.unique(once.plan.share_LS)) == {0.0, 1.0}
    with pytest.raises(InputError, match="once"):
        api.solve(trace, **FLAME, redundant=8, dispatch="once")
