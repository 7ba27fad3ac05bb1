"""Routing rules during a replay: what the papers say about loads and bytes, equal to the transformed trace, refused with a reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.errors import InputError, TraceError
from moesim.model import load_model
from moesim.sim import policies
from moesim.sim.policies import Policy
from moesim.sim.routers import Router, router_of
from moesim.traces.in_memory import from_batches, from_counts
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import RoutingTrace, TokenBatch
from moesim.traces.rules_view import Decision, RouterView
from moesim.traces.steps import iter_steps
from moesim.traces.transform import apply_rules

NAME = "flame-moe-290m"
ON: dict[str, Any] = {"model": NAME, "hardware": "h100-sxm-8"}


def replay(trace: str | RoutingTrace = NAME, router: str = "", **more: Any) -> api.Replay:
    settings = {**more.pop("settings", {}), **({"router": router} if router else {})}
    return api.replay(trace, **(ON | {"settings": settings} | more))


def measured(result: api.Replay) -> dict[str, Any]:
    """Return what a replay found out about time, loads and bytes."""
    return {key: result.report[key] for key in ("simulated_s", "step_ms", "breakdown_ms", "balance", "bytes", "traffic", "tokens")}


def all_candidates(tokens: int = 512, seed: int = 0) -> RoutingTrace:
    """Return a trace with the router's ranking of all 64 experts, uniform."""
    shape = dataclasses.replace(open_trace(NAME).shape, top_k=64)
    generator = np.random.Generator(np.random.PCG64(seed))
    column = np.zeros(tokens, dtype=np.uint32)
    batch = TokenBatch(
        step_T=column,
        rank_T=column.astype(np.uint16),
        request_T=(np.arange(tokens) % 16).astype(np.uint64),
        position_T=(np.arange(tokens) // 16).astype(np.uint32),
        phase_T=column.astype(np.uint8),
        experts_TLK=np.argsort(generator.random((tokens, 8, 64)), axis=2).astype(np.uint8),
    )
    return from_batches(shape, [batch], source="all candidates")


@pytest.fixture(scope="module")
def plain() -> api.Replay:
    return replay()


def test_without_a_router_nothing_is_reported_and_nothing_is_made(plain: api.Replay) -> None:
    assert router_of("", open_trace(NAME)) is None
    assert "router" not in plain.report["routing"] and plain.report["settings"]["router"] == ""


@pytest.mark.parametrize("rule", ["top_k:6", "capacity:inf", "capacity:inf,by=weight,per=rank", "share:1", "mask:none", "null:0", "zero:none+grouped:1,6"])
def test_a_rule_at_its_trivial_value_replays_like_the_recording(rule: str, plain: api.Replay) -> None:
    found = replay(router=rule)
    assert measured(found) == measured(plain)
    routing = found.report["routing"]
    assert routing["dropped"] == 0 and routing["mean_experts_per_token"] == 6.0 and routing["choices"] == routing["by_kind"]["ffn"] == 1536 * 8 * 6


@pytest.mark.parametrize(
    "rule", ["top_k:2", "top_p:0.4,6", "share:0.8+renormalise", "one_decision:4", "mask:7@0/3;9@1,k=4", "zero:3-6", "capacity:1,by=weight"]
)
def test_a_live_rule_equals_the_transformed_trace(rule: str) -> None:
    found, wanted = replay(router=rule), replay(apply_rules(open_trace(NAME), rule))
    assert measured(found) == measured(wanted)
    np.testing.assert_array_equal(found.load_LE, wanted.load_LE)


def test_fewer_experts_per_token_mean_fewer_bytes_and_less_time() -> None:
    sizes = [replay(router=f"top_k:{k}").report for k in (1, 2, 4, 6)]
    for key in ("intra_node", "local"):
        found = [report["bytes"][key] for report in sizes]
        assert found == sorted(found) and found[0] < found[-1]
    assert sizes[0]["simulated_s"] < sizes[-1]["simulated_s"]


def test_null_experts_save_expert_work_in_proportion_and_no_more_in_total(plain: api.Replay) -> None:
    """AdaMoE: expert work falls with the mean number of true experts; the whole pass by less, because attention stays."""
    found = replay(router="null:16")
    mean = found.report["routing"]["mean_experts_per_token"]
    assert found.load_LE.sum() == round(mean * 1536 * 8) < plain.load_LE.sum()
    assert found.report["routing"]["by_kind"] == {"ffn": int(plain.load_LE[:, :48].sum()), "null": int(plain.load_LE[:, 48:].sum())}
    saved = 1 - found.report["simulated_s"] / plain.report["simulated_s"]
    assert 0 < saved < 1 - mean / 6


def test_zero_computation_experts_send_nothing(plain: api.Replay) -> None:
    """MoE++: a choice of an expert that lives everywhere is no copy; a token of such choices only skips the exchange."""
    found = replay(router="zero:0-62")
    np.testing.assert_array_equal(found.load_LE[:, 63], plain.load_LE[:, 63])
    assert found.load_LE[:, :63].sum() == 0
    assert found.report["traffic"]["distinct_remote_ranks"] <= plain.load_LE[:, 63].sum() / (1536 * 8)


@pytest.mark.parametrize("tokens", [None, 256, 100])
def test_grouped_routing_loads_every_rank_alike_in_every_pass(tokens: int | None) -> None:
    """MoGE: one expert in each of 8 groups, a group per rank: mean/max load is 1 for every batch; plain top-8 is not balanced."""
    even = replay(all_candidates(), "grouped:8,1", tokens_per_step=tokens)
    plain = replay(all_candidates(), "top_k:8", tokens_per_step=tokens)
    assert even.report["balance"] == {"mean_over_max": 1.0, "layer_mean": 1.0, "worst_layer": 1.0}
    assert plain.report["balance"]["mean_over_max"] < 0.97
    assert even.load_LE.sum() == plain.load_LE.sum() == 512 * 8 * 8
    assert replay(all_candidates(), "grouped:1,8", tokens_per_step=tokens).report["balance"] == plain.report["balance"]


def test_the_gain_of_grouped_routing_shrinks_as_the_batch_grows() -> None:
    """Plain top-8 of 64 over 8 devices, uniform: max/mean load 1.35 at batch 16, 1.17 at 64, 1.06 at 512."""
    for tokens, wanted in ((16, 1.35), (64, 1.17), (512, 1.06)):
        report = replay(all_candidates(1024), "top_k:8", tokens_per_step=tokens).report
        assert 1 / report["balance"]["mean_over_max"] == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize("size", [None, 512, 96])
def test_capacity_is_that_of_the_batch_at_hand(size: int | None) -> None:
    found = replay(router="capacity:1", tokens_per_step=size)
    routing, batch = found.report["routing"], size or 1536
    assert routing["by_kind"]["ffn"] + routing["dropped"] == routing["choices"] == 1536 * 8 * 6
    assert found.load_LE.sum() == routing["by_kind"]["ffn"] and routing["mean_experts_per_token"] == routing["by_kind"]["ffn"] / (1536 * 8)
    assert found.load_LE.max() <= math.ceil(6 * batch / 64) * (1536 // batch)
    assert routing["places"] == math.ceil(6 * batch / 64) * 64 * 8 * (1536 // batch)


def test_capacity_per_rank_limits_what_a_rank_sends_to_an_expert() -> None:
    trace = open_trace(NAME)
    router = Router("capacity:1,per=rank", trace)
    (step,) = (router.route(step) for step in iter_steps(trace, num_ranks=8))
    assert step.valid_TLK is not None
    for rank in range(8):
        mine = step.rank_T == rank
        for layer in range(8):
            load = np.bincount(step.experts_TLK[mine, layer][step.valid_TLK[mine, layer]], minlength=64)
            assert load.max() <= math.ceil(6 * mine.sum() / 64)


def test_a_mask_moves_load_from_the_expert_to_others() -> None:
    base, found = replay(router="top_k:4"), replay(router="mask:5,k=4")
    assert (found.load_LE[:, 5] == 0).all() and base.load_LE[:, 5].all()
    others = np.arange(64) != 5
    assert (found.load_LE[:, others] >= base.load_LE[:, others]).all() and found.load_LE.sum() == base.load_LE.sum()


def test_one_decision_makes_every_layer_load_alike(plain: api.Replay) -> None:
    found = replay(router="one_decision")
    assert (found.load_LE == plain.load_LE[0]).all()
    (step,) = (Router("one_decision", open_trace(NAME)).route(step) for step in iter_steps(open_trace(NAME), num_ranks=8))
    np.testing.assert_array_equal(step.predicted_TLK, step.experts_TLK)


def test_micro_batches_share_the_capacity_of_their_pass() -> None:
    whole, halves = (replay(router="capacity:1", settings={"micro_batches": parts}) for parts in ("1", "2"))
    assert whole.report["routing"] == halves.report["routing"]
    np.testing.assert_array_equal(whole.load_LE, halves.load_LE)


def test_rebalancing_sees_the_routed_passes() -> None:
    found = [api.rebalance([NAME], **ON, policy="never", tokens_per_step=256, settings=settings) for settings in ({}, {"router": "top_k:1"})]
    assert found[1]["run"]["total_s"] < found[0]["run"]["total_s"]


def test_two_rounds_of_a_layer_carry_the_loads_of_its_rows(plain: api.Replay) -> None:
    """Chain-of-Experts: same choices and bytes as a layer per row, but half as many attention layers."""
    trace, model = apply_rules(open_trace(NAME), "rounds:2"), load_model(NAME)
    chain = dataclasses.replace(model, num_layers=5, moe_layer_ids=model.moe_layer_ids[:4])
    found = replay(trace, model=chain, settings={"rounds": "2"})
    np.testing.assert_array_equal(found.load_LE, plain.load_LE)
    assert found.report["bytes"] == plain.report["bytes"] and found.report["balance"] == plain.report["balance"]
    both = ("dispatch", "experts", "combine")
    assert sum(found.report["breakdown_ms"][key] for key in both) == pytest.approx(sum(plain.report["breakdown_ms"][key] for key in both))
    assert found.report["breakdown_ms"]["attention"] < 0.7 * plain.report["breakdown_ms"]["attention"]
    assert replay(trace, "top_k:3", model=chain, settings={"rounds": "2"}).load_LE.sum() == plain.load_LE.sum() / 2
    with pytest.raises(InputError, match="rounds = 1 must be 2, the rounds per layer of"):
        replay(trace, model=chain)
    plan = api.solve(trace, model=chain, hardware=ON["hardware"], objective="balance").plan
    assert plan.num_layers == 4


def test_a_plan_may_name_the_router(plain: api.Replay) -> None:
    plan = dataclasses.replace(plain.plan, policies={"router": "top_k:1"})
    assert replay(plan=plan).report["routing"]["mean_experts_per_token"] == 1.0
    assert replay(plan=plan, router="top_k:2").report["routing"]["mean_experts_per_token"] == 2.0


# --- policies of users ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Any]:
    """Return a function that registers a policy for the length of a test."""
    names: list[tuple[str, str]] = []

    def add(name: str, function: Any) -> None:
        policies.register(Policy(hook="router", name=name, function=function))
        names.append(("router", name))

    yield add
    for key in names:
        policies._POLICIES.pop(key)


def first_only(view: RouterView) -> Decision:
    return Decision(experts_TLK=view.experts_TLK[..., :1])


def test_a_policy_of_a_user_acts_by_name_and_beside_rules(registered: Any) -> None:
    registered("first_only", first_only)
    assert measured(replay(router="first_only")) == measured(replay(router="top_k:1"))
    both = replay(router="first_only+capacity:1")
    assert both.report["routing"]["router"] == "first_only+capacity:1"
    np.testing.assert_array_equal(both.load_LE, replay(router="top_k:1+capacity:1").load_LE)


def test_a_policy_sees_the_pass(registered: Any) -> None:
    seen: list[RouterView] = []

    def watch(view: RouterView) -> Decision:
        seen.append(view)
        return view.keep()

    registered("watch", watch)
    replay(router="watch", tokens_per_step=512)
    assert [view.step for view in seen] == [0, 1, 2]
    view = seen[0]
    assert view.num_experts == 64 and view.moe_layer_ids == tuple(range(1, 9)) and view.weights_TLK is not None
    assert (np.diff(view.rank_T) >= 0).all() and set(view.rank_T.tolist()) == set(range(8)) and view.load_LE.sum() == 512 * 8 * 6


def test_a_policy_that_names_an_expert_that_does_not_exist_is_refused(registered: Any) -> None:
    def wrong(view: RouterView) -> Decision:
        experts = view.experts_TLK.copy()
        experts[7, 2, 1] = 64
        return Decision(experts_TLK=experts)

    registered("wrong", wrong)
    with pytest.raises(InputError, match=r"policy wrong: layer 3: expert = 64 must be in 0..63 \(token 7, choice 1\); choose experts that exist"):
        replay(router="top_k:6+wrong")


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_an_unknown_policy_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="did you mean 'top_p'"):
        replay(router="topp:0.4")


def test_a_rule_that_the_trace_lacks_is_refused_during_a_replay() -> None:
    with pytest.raises(TraceError, match="candidates per token = 6 must be >= 7"):
        replay(router="top_k:7")
    with pytest.raises(TraceError, match="needs the gate weights"):
        replay("synthetic:zipf:1.0,tokens=256", router="top_p:0.4,6")


def test_how_a_trace_is_laid_out_cannot_change_during_a_replay() -> None:
    with pytest.raises(InputError, match="rule rounds:2 cannot act during a replay.*trace transform"):
        replay(router="rounds:2")
    with pytest.raises(InputError, match="rounds = 2 must be 1, the rounds per layer of .*trace transform --rule rounds:C"):
        replay(settings={"rounds": "2"})


def test_counts_have_no_best_choice() -> None:
    counts = from_counts(open_trace(NAME).shape, open_trace(NAME).counts_WLE("all"), ["all"], source="counts")
    with pytest.raises(TraceError, match="drawn from counts have no order"):
        replay(counts, router="top_k:2")
    assert replay(counts, router="capacity:1").report["routing"]["dropped"] > 0
