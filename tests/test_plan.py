"""The plan document: what it refuses, what it keeps, what its stamps cover."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import PlanError
from moesim.plan import Parallel, Plan, linear


def small(**changes: Any) -> Plan:
    facts: dict[str, Any] = {
        "model": "m",
        "num_experts": 4,
        "moe_layer_ids": (1, 3),
        "slot_to_expert_LS": np.array([[0, 1, 2, 3, 0, -1], [3, 2, 1, 0, 2, 2]]),
        "slot_rank_S": np.array([0, 0, 0, 1, 1, 1]),
        "num_ranks": 2,
    }
    return Plan(**{**facts, **changes})


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    experts, layers, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    extra = draw(st.integers(0, 4))
    slots = experts + extra
    rows = [draw(st.permutations([*range(experts), *(draw(st.integers(-1, experts - 1)) for _ in range(extra))])) for _ in range(layers)]
    owner = sorted(draw(st.lists(st.integers(0, ranks - 1), min_size=slots, max_size=slots)))
    return Plan(
        model="m", num_experts=experts, moe_layer_ids=tuple(range(layers)), slot_to_expert_LS=np.array(rows), slot_rank_S=np.array(owner), num_ranks=ranks
    )


@given(plans())
@settings(max_examples=60)
def test_reading_what_was_written_gives_the_same_plan(plan: Plan) -> None:
    node = json.loads(json.dumps({**plan.content(), "sha256": plan.sha256}))
    again = Plan.from_content(node, "x")
    assert again.content() == plan.content() and again.map_sha256 == plan.map_sha256


@given(plans(), st.integers(0, 2**31))
@settings(max_examples=60)
def test_rank_loads_conserve_the_load(plan: Plan, seed: int) -> None:
    load = np.random.Generator(np.random.PCG64(seed)).integers(0, 100, (plan.num_layers, plan.num_experts))
    assert plan.rank_load_LR(load).sum(axis=1) == pytest.approx(load.sum(axis=1))


def test_rank_load_matches_a_loop() -> None:
    plan = small(share_LS=np.array([[0.25, 1, 1, 1, 0.75, 0], [1, 0.5, 1, 1, 0.5, 0.0]]))
    load = np.array([[8.0, 1, 2, 3], [1, 2, 4, 8]])
    expected = np.zeros((2, 2))
    for layer in range(2):
        for slot in range(6):
            expert = plan.slot_to_expert_LS[layer, slot]
            if expert >= 0:
                expected[layer, plan.slot_rank_S[slot]] += load[layer, expert] * plan.shares_LS()[layer, slot]
    assert plan.rank_load_LR(load) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"slot_to_expert_LS": np.array([[0, 1, 2, 3, 0, 9], [0, 1, 2, 3, 0, 0]])}, r"slot_to_expert\[0\]\[5\] = 9 must be an expert in 0..3"),
        ({"slot_to_expert_LS": np.array([[0, 1, 2, 0, 0, 0], [0, 1, 2, 3, 0, 0]])}, "layer 0 has no slot for expert 3"),
        ({"slot_rank_S": np.array([0, 1, 0, 1, 1, 1])}, "non-decreasing"),
        ({"slot_rank_S": np.array([0, 0, 0, 1, 1, 2])}, "within 0..1"),
        ({"moe_layer_ids": (3, 1)}, "increasing"),
        ({"moe_layer_ids": (1,)}, "one entry per row"),
        ({"num_experts": 0}, "1..65536"),
        ({"share_LS": np.full((2, 6), 0.5)}, "0 on empty slots|sum to 1"),
        ({"share_LS": np.full((2, 6), np.nan)}, "finite"),
    ],
)
def test_a_broken_plan_is_refused_with_the_rule(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        small(**changes)


def test_degrees_below_one_are_refused() -> None:
    with pytest.raises(PlanError, match=r"parallel\.tp = 0"):
        Parallel(tp=0)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    small().write(path)
    path.write_text(path.read_text().replace('"model":"m"', '"model":"n"'))
    with pytest.raises(PlanError, match="changed or damaged"):
        Plan.read(path)


@pytest.mark.parametrize("key", ["num_experts", "slot_rank", "parallel", "result", "slot_to_expert", "moe_layer_ids"])
@pytest.mark.parametrize("value", [None, "x", -7, [], [[1], [2, 3]], {"a": 1}, 2**70, True])
def test_a_field_of_the_wrong_kind_is_a_plan_error(key: str, value: Any) -> None:
    from moesim.files import canonical_json, sha256_hex

    node = {**small().content(), key: value}
    if key == "result" and value == {"a": 1}:
        return
    with pytest.raises(PlanError):
        Plan.from_content({**node, "sha256": sha256_hex(canonical_json(node))}, "x")


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(PlanError, match="made for m; solve again for other"):
        small().check_model(name="other", num_experts=8, moe_layer_ids=(1, 3))
    with pytest.raises(PlanError, match="moe_layer_ids"):
        small().check_model(name="other", num_experts=4, moe_layer_ids=(0, 1))


@pytest.mark.parametrize("kind", ["linear", "round_robin", "random"])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 4), (10, 4), (3, 8)])
def test_baseline_placements_hold_every_expert_once(kind: str, experts: int, ranks: int) -> None:
    plan = linear(model="m", num_experts=experts, moe_layer_ids=(0, 1), num_ranks=ranks, kind=kind)
    assert (plan.replicas_LE == 1).all()
    assert np.bincount(plan.slot_rank_S, minlength=ranks).max() == -(-experts // ranks)


def test_round_robin_deals_experts_in_turn() -> None:
    plan = linear(model="m", num_experts=6, moe_layer_ids=(0,), num_ranks=3, kind="round_robin")
    assert [plan.slot_to_expert_LS[0][plan.slot_rank_S == rank].tolist() for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]


def test_the_map_stamp_covers_the_placement_alone() -> None:
    plan = small()
    assert plan.with_result(solver="x").map_sha256 == plan.map_sha256
    assert plan.with_result(solver="x").sha256 != plan.sha256
    assert small(slot_rank_S=np.array([0, 0, 1, 1, 1, 1])).map_sha256 != plan.map_sha256
