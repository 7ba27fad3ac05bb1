"""Memory of a device: by hand for a tiny model, against the simulator's account, and monotone in the capacity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moesim.costs import footprint
from moesim.costs.group import Group
from moesim.hardware import load_cluster
from moesim.model import load_model, sizes
from moesim.plan import linear
from moesim.sim import memory as account
from moesim.solvers.parallelism import Workload
from moesim.solvers.parallelism.points import ROLES, PointModel
from moesim.solvers.parallelism.space import Space, shapes
from tests.solvers.parallelism_toys import machine, tiny


def test_account_equals_hand_computation() -> None:
    # hidden 32, 4 heads of 8, 2 KV heads, dense FFN 64, experts 16 wide, 8 of them, one shared of 16, vocabulary 100; 2 bytes an element.
    group = Group(tp=2, dp=2, ep=2, expert_tp=2, slots=5)
    first, second = footprint.stage_accounts(tiny(), group, (0, 2, 4), sequences=3, tokens_each=10, pass_tokens=20, staging_experts=2, capacity=1e6)
    attention = 32 * 16 + 2 * 32 * 8 + 16 * 32  # queries of 2 heads, keys and values of 1, output
    norms = 2 * 32
    dense = 3 * 32 * 32
    moe = 3 * 32 * 16 + 32 * 8 + 5 * 3 * 32 * 8  # shared, router, slots of half an expert
    assert first.weights_bytes == 2 * (2 * (attention + norms) + dense + moe + 50 * 32)
    assert second.weights_bytes == 2 * (2 * (attention + norms + moe) + 50 * 32 + 32)
    assert first.kv_bytes == second.kv_bytes == 2 * (2 * 3 * 10 * (2 * 1 * 8))
    assert first.activation_bytes == 2 * (2 * 20 * 32 + max(20 * 64 / 2, 20 / 2 * (2 * 16 + 16)))
    assert first.staging_bytes == 2 * (2 * 3 * 32 * 8)
    assert first.used_bytes == first.weights_bytes + first.kv_bytes + first.activation_bytes + first.staging_bytes
    assert first.missing_bytes == 0
    assert replace(first, capacity_bytes=first.used_bytes - 7).missing_bytes == 7


def test_windows_limit_the_cache_and_ties_save_the_head() -> None:
    model = tiny(layers=4, window=6, tied=True)
    assert footprint.kv_L(model, 1, 10).tolist() == [2 * 2 * 8 * 2 * kept for kept in (6, 10, 6, 10)]
    assert footprint.kv_L(model, 1, 10).sum() == sizes.kv_bytes(model, 10)
    assert footprint.ends_bytes(model, 1, 1) == (6400, 64) and footprint.ends_bytes(model, 1, 2) == (6400, 6464)


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-30b-a3b", "olmoe-1b-7b"])
@pytest.mark.parametrize("tp", [1, 2])
def test_one_stage_equals_the_simulators_account_and_the_norms(name: str, tp: int) -> None:
    model = load_model(name)
    cluster = load_cluster("h100-sxm-8x8")
    cluster = replace(cluster, tiers={**cluster.tiers, "hbm": replace(cluster.tiers["hbm"], capacity_bytes=1e15)})
    group = Group(tp=tp, dp=64 // tp, ep=64, expert_tp=1, slots=model.num_experts // 64)
    plan = linear(model=name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=64)
    theirs = account.account(cluster, model, plan, attention_tp=tp, kv_entries=5 * 1000, tokens=128)
    (mine,) = footprint.stage_accounts(model, group, (0, model.num_layers), sequences=5, tokens_each=1000, pass_tokens=128, staging_experts=0, capacity=1e15)
    assert mine.weights_bytes == pytest.approx(theirs.weights_bytes + sizes.norm_bytes(model), rel=1e-12)
    assert mine.kv_bytes == pytest.approx(theirs.kv_bytes, rel=1e-12)
    if tp == 1:
        assert mine.activation_bytes == theirs.activation_bytes


def test_all_ranks_together_hold_the_model_once_at_one_way_of_splitting() -> None:
    model = load_model("deepseek-v3")
    group = Group(tp=1, dp=1, ep=1, expert_tp=1, slots=256)
    for bounds in ((0, 61), (0, 20, 61), (0, 3, 30, 61)):
        accounts = footprint.stage_accounts(model, group, bounds, sequences=0, tokens_each=1, pass_tokens=0, staging_experts=0, capacity=1.0)
        assert sum(one.weights_bytes for one in accounts) == pytest.approx(sizes.total_weight_bytes(model), rel=1e-12)


def test_more_memory_never_shrinks_the_feasible_set() -> None:
    model, work, space = tiny(layers=6), Workload(prompt_tokens=50, output_tokens=20), Space(pp=(1, 2, 4), batch=(1, 4, 16, 64), redundant=(0, 4))
    feasible = []
    for size in (1.5e5, 3e5, 6e5, 12e5):
        cluster = machine(4, 2, memory=size)
        points = PointModel(model, cluster, work, space)
        feasible.append(np.concatenate([points.fits(shape, role, points.points(shape, role)) for shape in shapes(space, model, cluster) for role in ROLES]))
    assert 0 < feasible[0].sum() < feasible[-1].sum() < len(feasible[-1])
    for less, more in zip(feasible, feasible[1:], strict=False):
        assert not (less & ~more).any() and less.sum() < more.sum()


def test_points_that_do_not_fit_say_what_is_missing() -> None:
    model, work, space = tiny(layers=6), Workload(prompt_tokens=50, output_tokens=20), Space(pp=(1, 2, 3), batch=(1, 16, 64), redundant=(0,))
    cluster = machine(6, memory=3e5)
    points = PointModel(model, cluster, work, space)
    seen = set()
    for shape in shapes(space, model, cluster):
        every = points.points(shape, "mixed")
        fits, floor = points.fits(shape, "mixed", every), points.overflow_floor(shape, "mixed", every)
        for index in range(len(every)):
            one = every.take(np.array([index]))
            missing, stage = points.missing(shape, "mixed", one)
            assert (missing <= 1.0) == fits[index]
            assert missing >= floor[index] - 1e-6
            assert stage.used_bytes - stage.capacity_bytes == pytest.approx(missing)
            seen.add(bool(fits[index]))
            if missing > 1.0:
                for added, enough in ((missing, True), (missing - 3.0, False)):
                    larger = PointModel(model, machine(6, memory=3e5 + added / 0.9), work, space)
                    assert larger.fits(shape, "mixed", one)[0] == enough
    assert seen == {True, False}
