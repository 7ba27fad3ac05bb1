"""Loads compiled from routing agree with a token-by-token count, for any plan, and nothing is lost or made up."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.costs.traffic import ALGORITHMS, Ports
from moesim.errors import TraceError
from moesim.plan import Plan, linear
from moesim.sim import _masks
from moesim.sim.loads import LoadCompiler, StepLoads
from moesim.sim.pairs import ChosenRanks, PairCounts

GOLDEN_FRACTION = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class PassRouting:
    experts_TLK: np.ndarray
    rank_T: np.ndarray
    valid_TLK: np.ndarray | None = None


@pytest.fixture(autouse=True)
def every_pair_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small machines too keep their choices where they are few; what they hold is tested against the counts."""
    monkeypatch.setattr("moesim.sim.loads.SPARSE", 1 << 40)


def counts(loads: StepLoads) -> PairCounts:
    assert isinstance(loads.pairs, PairCounts)
    return loads.pairs


def compile_pass(plan: Plan, *, experts_TLK: np.ndarray, rank_T: np.ndarray, valid_TLK: np.ndarray | None = None, ranks_per_node: int) -> StepLoads:
    return LoadCompiler(plan, ranks_per_node=ranks_per_node).compile(experts_TLK=experts_TLK, rank_T=rank_T, valid_TLK=valid_TLK)


def make_plan(seed: int, *, experts: int, layers: int, ranks: int, extra: int = 0, empty: int = 0, shares: bool = False, ragged: bool = False) -> Plan:
    """A random placement with `extra` replicas and `empty` empty slots per layer."""
    rng = np.random.default_rng(seed)
    slots = experts + extra + empty
    table = np.stack([rng.permutation(np.concatenate([np.arange(experts), rng.integers(0, experts, extra), np.full(empty, -1)])) for _ in range(layers)])
    owner = np.sort(rng.integers(0, ranks, slots)) if ragged else np.sort(np.arange(slots) % ranks)
    share = None
    if shares:
        weight = np.where(table >= 0, rng.random(table.shape) * (rng.random(table.shape) > 0.2) + 1e-3, 0.0)
        total = np.stack([np.bincount(row + 1, weight[i], minlength=experts + 1) for i, row in enumerate(table)])
        share = np.where(table >= 0, weight / np.take_along_axis(total, table + 1, axis=1).clip(1e-9), 0.0)
    ids = tuple(range(layers))
    return Plan(model="toy", num_experts=experts, moe_layer_ids=ids, slot_to_expert_LS=table, slot_rank_S=owner, num_ranks=ranks, share_LS=share)


def make_routing(seed: int, plan: Plan, counts_R: np.ndarray, top_k: int, *, dtype: Any = np.uint8, holes: float = 0.0) -> PassRouting:
    rng = np.random.default_rng(seed)
    tokens = int(counts_R.sum())
    experts = rng.integers(0, plan.num_experts, (tokens, plan.num_layers, top_k)).astype(dtype)
    valid = None
    if holes:
        valid = rng.random(experts.shape) >= holes
        experts[~valid] = rng.integers(0, np.iinfo(dtype).max, int((~valid).sum()), endpoint=True)
    return PassRouting(experts_TLK=experts, rank_T=np.repeat(np.arange(plan.num_ranks), counts_R).astype(np.int32), valid_TLK=valid)


def replica(slots: list[int], share: list[float], index: int) -> int:
    """The slot that the definition gives to point `index` of the sequence."""
    point = (math.floor(64 * (((index + 1) * GOLDEN_FRACTION) % 2**64 / 2**64)) + 0.5) / 64
    upto = 0.0
    for slot, part in zip(slots, share, strict=True):
        upto += part
        if point + 1e-12 < upto / sum(share):
            return slot
    raise AssertionError("a CDF ends at 1")


def count_by_hand(plan: Plan, routing: PassRouting, ranks_per_node: int) -> dict[str, np.ndarray]:
    layers, ranks, slots, nodes = plan.num_layers, plan.num_ranks, plan.num_slots, -(-plan.num_ranks // ranks_per_node)
    result = {
        "tokens_PR": np.zeros((1, ranks)),
        "routed_PLR": np.zeros((1, layers, ranks)),
        "slot_PLS": np.zeros((1, layers, slots)),
        "assign_PLRR": np.zeros((1, layers, ranks, ranks)),
        "copy_PLRR": np.zeros((1, layers, ranks, ranks)),
        "node_PLRN": np.zeros((1, layers, ranks, nodes)),
    }
    seen: dict[int, int] = defaultdict(int)
    slots_of: dict[tuple[int, int], list[int]] = defaultdict(list)
    share_LS = plan.shares_LS()
    for layer in range(layers):
        for slot in range(slots):
            slots_of[layer, int(plan.slot_to_expert_LS[layer, slot])].append(slot)
    for token, source in enumerate(routing.rank_T.tolist()):
        index, seen[source] = seen[source] * plan.num_ranks + source, seen[source] + 1
        result["tokens_PR"][0, source] += 1
        for layer in range(layers):
            places = set()
            for k in range(routing.experts_TLK.shape[2]):
                if routing.valid_TLK is not None and not routing.valid_TLK[token, layer, k]:
                    continue
                choices = slots_of[layer, int(routing.experts_TLK[token, layer, k])]
                slot = replica(choices, [float(share_LS[layer, s]) for s in choices], index)
                target = int(plan.slot_rank_S[slot])
                places.add(target)
                result["routed_PLR"][0, layer, source] += 1
                result["slot_PLS"][0, layer, slot] += 1
                result["assign_PLRR"][0, layer, source, target] += 1
            for target in places:
                result["copy_PLRR"][0, layer, source, target] += 1
            for node in {target // ranks_per_node for target in places}:
                result["node_PLRN"][0, layer, source, node] += 1
    return result


def arrays(loads: StepLoads) -> dict[str, np.ndarray]:
    parts = {item.name: getattr(loads, item.name) for item in fields(StepLoads) if item.name != "pairs"}
    return parts | {item.name: getattr(loads.pairs, item.name) for item in fields(PairCounts) if item.name != "devices"}


def assert_same(left: StepLoads, right: StepLoads) -> None:
    for (name, a), b in zip(arrays(left).items(), arrays(right).values(), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b), name


def assert_counts(loads: StepLoads, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        assert np.array_equal(arrays(loads)[name], value), name


SHAPES = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "experts": st.integers(1, 12),
        "layers": st.integers(1, 3),
        "ranks": st.integers(1, 11),
        "extra": st.integers(0, 7),
        "empty": st.integers(0, 3),
        "shares": st.booleans(),
        "ragged": st.booleans(),
    }
)


@settings(max_examples=120, deadline=None)
@given(SHAPES, st.integers(1, 9), st.integers(1, 12), st.integers(0, 12), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.sampled_from([7, 40, 32768]))
def test_loads_equal_a_count_token_by_token(shape: dict[str, Any], top_k: int, ranks_per_node: int, most: int, holes: float, wide: bool, block: int) -> None:
    plan = make_plan(**shape)
    counts_R = np.random.default_rng(shape["seed"] + 1).integers(0, most + 1, plan.num_ranks)
    routing = make_routing(shape["seed"] + 2, plan, counts_R, top_k, dtype=np.uint16 if wide else np.uint8, holes=holes)
    loads = LoadCompiler(plan, ranks_per_node=ranks_per_node).compile(
        experts_TLK=routing.experts_TLK,
        rank_T=routing.rank_T,
        valid_TLK=routing.valid_TLK,
        block_entries=block,
    )
    assert_counts(loads, count_by_hand(plan, routing, ranks_per_node))


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "experts", "extra", "tokens", "top_k"),
    [
        (1, 8, 8, 2, 600, 2),
        (4, 1, 8, 0, 300, 3),
        (8, 8, 8, 0, 700, 2),
        (32, 8, 64, 9, 40, 6),
        (63, 8, 70, 5, 6, 4),
        (64, 64, 64, 0, 5, 8),
        (65, 8, 70, 0, 5, 8),
        (130, 3, 140, 30, 4, 5),
        (600, 8, 600, 10, 1, 3),
    ],
)
def test_loads_equal_a_count_token_by_token_for_many_machine_shapes(ranks: int, ranks_per_node: int, experts: int, extra: int, tokens: int, top_k: int) -> None:
    plan = make_plan(5, experts=experts, layers=2, ranks=ranks, extra=extra, shares=True)
    routing = make_routing(6, plan, np.random.default_rng(7).integers(0, 2 * tokens, ranks), top_k, dtype=np.uint16)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, ranks_per_node=ranks_per_node)
    assert_counts(loads, count_by_hand(plan, routing, ranks_per_node))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 5), st.lists(st.integers(0, 6), min_size=1, max_size=7), st.booleans())
@example({"seed": 0, "experts": 1, "layers": 1, "ranks": 3, "extra": 1, "empty": 3, "shares": True, "ragged": False}, 1, [6], False)
def test_many_passes_in_one_call_equal_each_pass_alone(shape: dict[str, Any], top_k: int, sizes: list[int], holes: bool) -> None:
    plan = make_plan(**shape)
    rng = np.random.default_rng(shape["seed"])
    passes = [make_routing(i, plan, rng.integers(0, size + 1, plan.num_ranks), top_k, holes=0.4 if holes and i % 2 else 0.0) for i, size in enumerate(sizes)]
    alone = [compile_pass(plan, experts_TLK=p.experts_TLK, rank_T=p.rank_T, valid_TLK=p.valid_TLK, ranks_per_node=3) for p in passes]
    together = compile_many(plan, passes)
    for index, part in enumerate(alone):
        assert_same(together.one(index), part)


def compile_many(plan: Plan, passes: list[PassRouting]) -> StepLoads:
    valid = [np.ones(p.experts_TLK.shape, bool) if p.valid_TLK is None else p.valid_TLK for p in passes]
    return LoadCompiler(plan, ranks_per_node=3).compile(
        experts_TLK=np.concatenate([p.experts_TLK for p in passes]),
        rank_T=np.concatenate([p.rank_T for p in passes]),
        valid_TLK=np.concatenate(valid),
        pass_start_P=np.cumsum([0, *(len(p.rank_T) for p in passes[:-1])]),
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 6),
    st.lists(st.integers(0, 6), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.4]),
)
def test_choices_and_counts_of_pairs_say_the_same(seed: int, nodes: int, devices: int, top_k: int, sizes: list[int], holes: float) -> None:
    plan = make_plan(seed, experts=12, layers=2, ranks=nodes * devices, extra=5, shares=True, ragged=True)
    rng = np.random.default_rng(seed)
    passes = [make_routing(i, plan, rng.integers(0, size + 1, plan.num_ranks), top_k, holes=holes) for i, size in enumerate(sizes)]
    words: dict[str, Any] = {
        "experts_TLK": np.concatenate([p.experts_TLK for p in passes]),
        "rank_T": np.concatenate([p.rank_T for p in passes]),
        "valid_TLK": np.concatenate([p.valid_TLK for p in passes if p.valid_TLK is not None]) if holes else None,
        "pass_start_P": np.cumsum([0, *(len(p.rank_T) for p in passes[:-1])]),
    }
    counted = LoadCompiler(plan, ranks_per_node=devices).compile(**words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moesim.sim.loads.SPARSE", 0)
        chosen = LoadCompiler(plan, ranks_per_node=devices).compile(**words)
    assert isinstance(counted.pairs, PairCounts)
    if not isinstance(chosen.pairs, ChosenRanks):
        pytest.fail("choices were asked for")
    for left, right in ((counted, chosen), *((counted.one(i), chosen.one(i)) for i in range(len(passes)))):
        for name in ("tokens_PR", "routed_PLR", "slot_PLS", "rank_load_PLR"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name
        assert left.pairs.remote() == right.pairs.remote()
        # A row for every token and rank: what stays, and what comes over either link.
        rows = left.pairs.rows()
        assert rows.dtype == right.pairs.rows().dtype and np.array_equal(rows, right.pairs.rows())
        direct = left.pairs.ports("direct")
        assert np.array_equal(rows, direct.local + direct.up_in + direct.out_in)
        for algorithm in ALGORITHMS:
            for port in fields(Ports):
                a, b = (getattr(loads.pairs.ports(algorithm), port.name) for loads in (left, right))
                assert a.dtype == b.dtype and np.array_equal(a, b), (algorithm, port.name)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 6), st.integers(1, 500), st.integers(1, 400))
def test_block_size_does_not_matter(shape: dict[str, Any], top_k: int, most: int, block: int) -> None:
    plan = make_plan(**shape)
    routing = make_routing(3, plan, np.random.default_rng(4).integers(0, most, plan.num_ranks), top_k)
    compiler = LoadCompiler(plan, ranks_per_node=2)
    cut = compiler.compile(experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, block_entries=block * 8)
    assert_same(cut, compiler.compile(experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, block_entries=1 << 30))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(1, 6), st.integers(1, 40), st.sampled_from([0.0, 0.5]))
def test_nothing_is_lost_or_made_up(shape: dict[str, Any], top_k: int, most: int, holes: float) -> None:
    plan = make_plan(**shape)
    routing = make_routing(8, plan, np.random.default_rng(9).integers(0, most, plan.num_ranks), top_k, holes=holes)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, valid_TLK=routing.valid_TLK, ranks_per_node=2)
    valid = np.ones(routing.experts_TLK.shape, np.bool_)
    if routing.valid_TLK is not None:
        valid = routing.valid_TLK
    reached = np.any(valid, axis=2)
    assert np.array_equal(counts(loads).assign_PLRR.sum(axis=(0, 2, 3)), valid.sum(axis=(0, 2)))
    assert np.array_equal(loads.slot_PLS.sum(axis=2), loads.rank_load_PLR.sum(axis=2))
    assert np.array_equal(loads.routed_PLR, counts(loads).assign_PLRR.sum(axis=3))
    assert (counts(loads).copy_PLRR <= counts(loads).assign_PLRR).all()
    assert (counts(loads).copy_PLRR <= loads.tokens_PR[:, None, :, None]).all()
    assert (counts(loads).node_PLRN.sum(axis=3) <= counts(loads).copy_PLRR.sum(axis=3)).all()
    for rank in range(plan.num_ranks):
        assert (counts(loads).node_PLRN[0, :, rank].sum(axis=1) >= np.compress(routing.rank_T == rank, reached, axis=0).sum(axis=0)).all()
    assert not loads.slot_PLS[:, plan.slot_to_expert_LS < 0].any()
    for rank in range(plan.num_ranks):
        part = loads.slot_PLS[:, :, plan.slot_rank_S == rank]
        assert np.array_equal(loads.rank_load_PLR[..., rank], part.sum(axis=2))
        assert np.array_equal(loads.active_PLR[..., rank], (part > 0).sum(axis=2))
        assert np.array_equal(loads.max_slot_PLR[..., rank], part.max(axis=2, initial=0))
    assert np.array_equal(loads.rank_load_PLR, counts(loads).assign_PLRR.sum(axis=2))


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(1, 6))
def test_renaming_experts_in_plan_and_routing_changes_nothing(shape: dict[str, Any], top_k: int) -> None:
    plan = make_plan(**shape)
    rng = np.random.default_rng(shape["seed"])
    routing = make_routing(2, plan, rng.integers(0, 30, plan.num_ranks), top_k)
    name_E = rng.permutation(plan.num_experts)
    renamed = replace(plan, slot_to_expert_LS=np.where(plan.slot_to_expert_LS >= 0, name_E[plan.slot_to_expert_LS], -1))
    assert_same(
        compile_pass(renamed, experts_TLK=name_E[routing.experts_TLK].astype(np.uint8), rank_T=routing.rank_T, ranks_per_node=2),
        compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, ranks_per_node=2),
    )


def test_moving_tokens_to_other_sources_moves_their_rows() -> None:
    plan = linear(model="toy", num_experts=16, moe_layer_ids=range(3), num_ranks=4)
    routing = make_routing(1, plan, np.full(4, 50), 4)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, ranks_per_node=2)
    order = np.array([2, 0, 3, 1])
    moved = compile_pass(plan, experts_TLK=routing.experts_TLK.reshape(4, 50, 3, 4)[order].reshape(200, 3, 4), rank_T=routing.rank_T, ranks_per_node=2)
    assert np.array_equal(counts(moved).copy_PLRR, counts(loads).copy_PLRR[:, :, order])
    assert np.array_equal(moved.slot_PLS, loads.slot_PLS)


def test_one_rank_keeps_everything_local() -> None:
    plan = make_plan(1, experts=8, layers=2, ranks=1, extra=4)
    routing = make_routing(2, plan, np.array([1000]), 3)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, ranks_per_node=8)
    assert counts(loads).assign_PLRR.tolist() == [[[[3000]], [[3000]]]]
    assert counts(loads).copy_PLRR.tolist() == counts(loads).node_PLRN.tolist() == [[[[1000]], [[1000]]]]


def test_every_token_of_a_large_group_is_counted_when_all_go_to_one_place() -> None:
    plan = linear(model="toy", num_experts=64, moe_layer_ids=[0], num_ranks=64)
    experts = np.full((70000, 1, 2), 63, np.uint8)
    loads = compile_pass(plan, experts_TLK=experts, rank_T=np.full(70000, 5), ranks_per_node=8)
    assert counts(loads).copy_PLRR[0, 0, 5].tolist() == [0] * 63 + [70000]
    assert counts(loads).assign_PLRR[0, 0, 5, 63] == 140000
    assert counts(loads).node_PLRN[0, 0, 5].tolist() == [0] * 7 + [70000]


def test_experts_beyond_a_byte_are_told_apart() -> None:
    plan = make_plan(3, experts=1000, layers=2, ranks=16, extra=24)
    routing = make_routing(4, plan, np.full(16, 30), 5, dtype=np.uint16)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, ranks_per_node=8)
    assert routing.experts_TLK.max() > 900
    assert_counts(loads, count_by_hand(plan, routing, 8))


@pytest.mark.parametrize(("experts", "dtype"), [(255, np.uint8), (256, np.uint8), (256, np.uint16), (65535, np.uint16), (65536, np.uint16)])
def test_dropped_choices_do_not_count_even_if_every_number_is_an_expert(experts: int, dtype: Any) -> None:
    plan = linear(model="toy", num_experts=experts, moe_layer_ids=[0, 1], num_ranks=4)
    routing = make_routing(3, plan, np.full(4, 20), 3, dtype=dtype, holes=0.5)
    loads = compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, valid_TLK=routing.valid_TLK, ranks_per_node=2)
    assert_counts(loads, count_by_hand(plan, routing, 2))


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.99, 0.0, 1.0])
def test_shares_of_replicas_are_met_within_one_part_in_64(share: float) -> None:
    plan = Plan(
        model="toy",
        num_experts=1,
        moe_layer_ids=(0,),
        slot_to_expert_LS=np.zeros((1, 2)),
        slot_rank_S=np.arange(2),
        num_ranks=2,
        share_LS=np.array([[share, 1 - share]]),
    )
    loads = compile_pass(plan, experts_TLK=np.zeros((20000, 1, 1), np.uint8), rank_T=np.repeat([0, 1], 10000), ranks_per_node=2)
    for rank in range(2):
        assert abs(counts(loads).assign_PLRR[0, 0, rank, 0] / 10000 - share) <= 1 / 128 + 1e-3
    if share in (0.0, 1.0):
        assert loads.slot_PLS[0, 0].tolist() == [20000 * share, 20000 * (1 - share)]


def test_one_token_on_every_rank_still_spreads_over_replicas() -> None:
    plan = Plan(model="m", num_experts=1, moe_layer_ids=(0,), slot_to_expert_LS=np.zeros((1, 2)), slot_rank_S=np.array([0, 63]), num_ranks=64)
    loads = compile_pass(plan, experts_TLK=np.zeros((64, 1, 1), np.uint8), rank_T=np.arange(64), ranks_per_node=8)
    assert 28 <= loads.slot_PLS[0, 0, 0] <= 36


def test_phases_cover_the_circle_evenly() -> None:
    for tokens in (64, 640, 4096):
        count = np.bincount(_masks.phases_T(np.arange(tokens)), minlength=64)
        assert np.abs(count - tokens / 64).max() <= 3
    assert _masks.phases_T(np.arange(3)).tolist() == [39, 15, 54]


def test_no_tokens_give_zero_loads() -> None:
    plan = make_plan(1, experts=4, layers=2, ranks=3)
    loads = compile_pass(plan, experts_TLK=np.zeros((0, 2, 2), np.uint8), rank_T=np.zeros(0, int), ranks_per_node=2)
    assert counts(loads).assign_PLRR.shape == (1, 2, 3, 3) and counts(loads).node_PLRN.shape == (1, 2, 3, 2)
    assert not any(value.any() for name, value in arrays(loads).items() if name != "slot_rank_S")


def test_inputs_are_left_as_they_were() -> None:
    plan = make_plan(1, experts=8, layers=2, ranks=3, extra=2)
    routing = make_routing(2, plan, np.full(3, 20), 2, holes=0.2)
    assert routing.valid_TLK is not None
    before = (routing.experts_TLK.copy(), routing.valid_TLK.copy())
    for array in (routing.experts_TLK, routing.valid_TLK, routing.rank_T):
        array.setflags(write=False)
    compile_pass(plan, experts_TLK=routing.experts_TLK, rank_T=routing.rank_T, valid_TLK=routing.valid_TLK, ranks_per_node=2)
    assert np.array_equal(before[0], routing.experts_TLK) and np.array_equal(before[1], routing.valid_TLK)


GOOD: dict[str, Any] = {"experts_TLK": np.zeros((4, 2, 2), np.uint8), "rank_T": np.array([0, 0, 1, 2])}


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"experts_TLK": np.zeros((4, 3, 2), np.uint8)}, "experts_TLK"),
        ({"experts_TLK": np.zeros((4, 2, 2), np.int64)}, "experts_TLK"),
        ({"experts_TLK": np.full((4, 2, 2), 8, np.uint8)}, "expert = 8"),
        ({"experts_TLK": np.full((4, 2, 2), 8, np.uint8), "valid_TLK": np.ones((4, 2, 2), bool)}, "expert = 8"),
        ({"experts_TLK": np.full((4, 2, 2), 300, np.uint16), "valid_TLK": np.ones((4, 2, 2), bool)}, "expert = 300"),
        ({"rank_T": np.array([0, 1, 0, 2])}, "token 2"),
        ({"rank_T": np.array([0, 1, 2, 3])}, "rank_T"),
        ({"rank_T": np.array([-1, 0, 1, 2])}, "rank_T"),
        ({"rank_T": np.array([0, 1, 2])}, "rank_T"),
        ({"rank_T": np.array([0.0, 1.0, 2.0, 2.0])}, "rank_T"),
        ({"valid_TLK": np.ones((4, 2, 3), bool)}, "valid_TLK"),
        ({"valid_TLK": np.ones((4, 2, 2), np.uint8)}, "valid_TLK"),
        ({"pass_start_P": np.array([1, 2])}, "pass_start_P"),
        ({"pass_start_P": np.array([0, 3, 2])}, "pass_start_P"),
        ({"pass_start_P": np.array([0, 5])}, "pass_start_P"),
    ],
)
def test_routing_that_does_not_fit_is_refused(change: dict[str, Any], key: str) -> None:
    compiler = LoadCompiler(make_plan(1, experts=8, layers=2, ranks=3), ranks_per_node=2)
    compiler.compile(**GOOD)
    with pytest.raises(TraceError, match=key):
        compiler.compile(**{**GOOD, **change})


def test_a_compiler_needs_ranks_per_node() -> None:
    plan = make_plan(1, experts=8, layers=2, ranks=3)
    with pytest.raises(TraceError, match="ranks_per_node"):
        LoadCompiler(plan, ranks_per_node=0)
