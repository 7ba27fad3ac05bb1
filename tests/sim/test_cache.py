"""Caches and policies against plain oracles and brute force."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, SimulationError
from moesim.sim import policies
from moesim.sim.cache import Cache, CacheSettings, Counts
from moesim.sim.demands import Future, count_hits
from moesim.sim.policies import CacheView, Policy
from moesim.sim.predictors import PredictorView, predict


def routes(seed: int, steps: int, layers: int, experts: int, width: int, stickiness: float = 0.0) -> np.ndarray:
    """Distinct experts per step and layer; with stickiness a step often repeats the last one."""
    rng = np.random.Generator(np.random.PCG64(seed))
    result = np.argsort(rng.random((steps, layers, experts)), axis=-1)[..., :width]
    for step in range(1, steps):
        repeat = rng.random(layers) < stickiness
        result[step, repeat] = result[step - 1, repeat]
    return result


def hits(case: np.ndarray, experts: int, slots: int, policy: str | Policy, **more: Any) -> Counts:
    return count_hits(case, experts, CacheSettings(slots=slots, policy=policy, **more))


def oracle(case: np.ndarray, slots: int, kind: str) -> int:
    """Hits of one cache per layer, by the definition of the policy, written down plainly."""
    found = 0
    for layer in range(case.shape[1]):
        cached: list[int] = []
        used: dict[int, int] = {}
        for demand in case[:, layer].tolist():
            for expert in demand:
                used[expert] = used.get(expert, 0) + 1
            missing = [expert for expert in demand if expert not in cached]
            found += len(demand) - len(missing)
            if kind != "fifo":
                for expert in demand:
                    if expert in cached:
                        cached.remove(expert)
                        cached.append(expert)
            for expert in missing:
                if len(cached) >= slots:
                    can = [other for other in cached if other not in demand]
                    if not can:
                        continue
                    cached.remove(min(can, key=lambda other: used[other]) if kind == "lfu" else can[0])
                cached.append(expert)
    return found


@pytest.mark.parametrize("kind", ["lru", "fifo", "lfu"])
@given(seed=st.integers(0, 10**6), slots=st.integers(0, 7), width=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_hits_equal_a_plain_cache(kind: str, seed: int, slots: int, width: int) -> None:
    case = routes(seed, 25, 2, 6, width, stickiness=0.3)
    counts = hits(case, 6, slots, kind)
    assert counts.hits == oracle(case, slots, kind)
    assert counts.hits + counts.misses == counts.demands == case.size


@pytest.mark.parametrize(("name", "order"), [("lru", "recency"), ("fifo", "insertion")])
def test_the_short_cut_of_an_ordered_policy_equals_its_function(name: str, order: str) -> None:
    policy = policies.get("cache", name)
    assert policy.order == order
    plain = Policy(hook="cache", name=f"{name} by its function", function=policy.function)
    for seed in range(15):
        case = routes(seed, 30, 3, 6, 2, stickiness=0.4)
        for more in ({"slots": 3}, {"slots": 7, "scope": "global"}, {"capacity_bytes": 5.0}):
            assert count_hits(case, 6, CacheSettings(policy=plain, **more)) == count_hits(case, 6, CacheSettings(policy=name, **more))


def best_hits(case: list[tuple[int, ...]], slots: int) -> int:
    """The most hits of any eviction schedule that loads every demanded expert, by trying all of them."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for demand in case:
        after: dict[frozenset[int], int] = {}
        for cached, found in states.items():
            now = found + len(cached & set(demand))
            keep = cached - set(demand)
            room = slots - len(set(demand))
            for size in range(min(room, len(keep)) + 1):
                for kept in combinations(sorted(keep), size):
                    state = frozenset(kept) | set(demand)
                    after[state] = max(after.get(state, 0), now)
        states = after
    return max(states.values())


@given(seed=st.integers(0, 10**6), width=st.integers(1, 2), slots=st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_belady_is_optimal_and_nobody_beats_it(seed: int, width: int, slots: int) -> None:
    case = routes(seed, 14, 1, 6, width, stickiness=0.2)
    best = best_hits([tuple(row) for row in case[:, 0].tolist()], slots)
    assert hits(case, 6, slots, "belady").hits == best
    for name in ("lru", "lfu", "fifo", "lifo", "random:7", "sch:4", "frequency_distance"):
        assert hits(case, 6, slots, name).hits <= best


@pytest.mark.parametrize("name", ["lru", "belady", "sch"])
def test_more_slots_never_cost_hits(name: str) -> None:
    for seed in range(8):
        case = routes(seed, 60, 2, 8, 2, stickiness=0.5)
        found = [hits(case, 8, slots, name).hits for slots in range(9)]
        assert found == sorted(found) and found[0] == 0 and found[8] > 0


def test_every_expert_resident_misses_only_when_first_touched() -> None:
    case = routes(1, 40, 2, 6, 2)
    counts = hits(case, 6, 6, "lru")
    touched = sum(len(np.unique(case[:, layer])) for layer in range(2))
    assert counts.misses == counts.cold_misses == touched
    every = tuple((layer, expert) for layer in range(2) for expert in range(6))
    assert hits(case, 6, 6, "lru", initial=every).hit_rate == 1.0


def test_locality_helps_lru_and_looking_further_helps_sch() -> None:
    sticky, uniform = routes(3, 400, 1, 16, 2, stickiness=0.7), routes(3, 400, 1, 16, 2)
    assert hits(sticky, 16, 4, "lru").hits > 2 * hits(uniform, 16, 4, "lru").hits
    assert hits(uniform, 16, 4, "lru").hits < hits(uniform, 16, 4, "sch:16").hits <= hits(uniform, 16, 4, "belady").hits


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_permuting_expert_ids_changes_nothing(seed: int) -> None:
    case = routes(seed, 30, 2, 7, 2, stickiness=0.3)
    names = np.random.Generator(np.random.PCG64(seed + 1)).permutation(7)
    for policy in ("lru", "fifo", "lfu", "belady"):
        assert hits(case, 7, 3, policy).hits == hits(names[case], 7, 3, policy).hits


def test_scopes_pool_the_slots_of_layers_devices_or_all() -> None:
    case = np.array([[[0], [0]], [[1], [0]], [[0], [0]]])
    assert hits(case, 2, 1, "lru").hits == 2
    assert hits(case, 2, 1, "lru", scope="global").hits == 0
    assert hits(case, 2, 3, "lru", scope="global").hits == 3
    device_LE = np.array([[0, 1], [0, 0]])
    assert hits(case, 2, 1, "lru", scope="device", device_LE=device_LE).hits == 1
    assert count_hits(case, 2, CacheSettings(slots=(2, 1), scope="device", device_LE=device_LE)).hits == 3


def test_a_quota_per_layer_is_kept() -> None:
    case = routes(2, 50, 2, 6, 1)
    both, first = count_hits(case, 6, CacheSettings(slots=(6, 1))), hits(case, 6, 1, "lru")
    assert both.hits > first.hits
    with pytest.raises(InputError, match="slots = .6, 1, 1. must be >= 0, one number or one per pool .2."):
        count_hits(case, 6, CacheSettings(slots=(6, 1, 1)))


def cache(experts: int = 4, **more: Any) -> Cache:
    return Cache(CacheSettings(**more), num_layers=1, num_experts=experts, bytes_of=[10 * (key + 1) for key in range(experts)])


def test_pinned_experts_never_leave() -> None:
    case = routes(5, 60, 1, 6, 2)
    counted = Policy(hook="cache", name="most recent", function=lambda view: view.candidates[-1])
    pinned = hits(case, 6, 3, counted, pins=((0, 4),))
    assert pinned.hits >= int((case == 4).sum())
    one = cache(slots=2, pins=((0, 3),))
    one.demand([0], 0)
    one.admit(0, 0)
    one.demand([1], 2)
    one.admit(1, 2)
    assert [one.where[key] for key in range(4)] == [0, 1, 0, 1]


def test_a_prefetched_expert_stays_until_its_gate() -> None:
    one = cache(slots=1)
    assert one.admit_predicted(2, tick=0, target=4)
    assert one.demand([1], 2) == ([], [1])
    one.admit(1, 2)
    assert one.where[2] == 1 and one.where[1] == 2, "the awaited expert keeps the slot, the demanded one is staged"
    one.release(3)
    assert one.demand([2], 4) == ([2], []) and one.useless == 0


def test_a_wrong_prefetch_leaves_from_its_gate_on_and_is_useless() -> None:
    one = cache(slots=1)
    one.admit_predicted(2, tick=0, target=2)
    one.demand([1], 2)
    one.admit(1, 2)
    assert one.where[1] == 1 and one.where[2] == 0 and one.useless == 1


def test_a_demanded_expert_takes_the_buffer_of_the_prefetch_wanted_last() -> None:
    one = cache(slots=0, staging_slots=2)
    assert one.admit_predicted(0, 0, 4) and one.admit_predicted(1, 0, 6) and not one.admit_predicted(2, 0, 8)
    one.demand([1, 3, 2], 2)
    one.admit(3, 2)
    assert set(one.staged) == {1, 3} and one.useless == 1
    with pytest.raises(SimulationError, match="layer 0 expert 2: finds no room in hbm, 30 B are missing; .* 2 staging slots"):
        one.admit(2, 2)


def test_a_staged_expert_that_is_used_moves_to_the_cache() -> None:
    one = cache(slots=1)
    one.admit_predicted(2, 0, 2, staged=True)
    assert one.where[2] == 2 and one.bytes_now == one.staging_bytes == 30
    one.demand([2], 2)
    assert one.where[2] == 1 and one.bytes_now == 30 and one.staging_bytes == 0
    one.release(3)
    assert one.where[2] == 1


@given(st.lists(st.tuples(st.integers(0, 7), st.booleans()), max_size=60), st.integers(0, 200), st.integers(0, 1))
@settings(max_examples=60, deadline=None)
def test_bytes_are_never_above_capacity_and_always_those_of_the_residents(moves: list[tuple[int, bool]], capacity: int, policy: int) -> None:
    one = cache(8, capacity_bytes=float(capacity), policy=("lru", "lfu")[policy])
    for position, (key, predicted) in enumerate(moves):
        tick = 2 * position
        if predicted:
            if not one.where[key]:
                one.admit_predicted(key, tick, tick + 4)
        elif one.demand([key], tick)[1]:
            one.admit(key, tick)
        inside = [other for pool in one.pools for other in pool]
        assert sum(one.bytes_of[other] for other in inside) == one.used[0] <= capacity
        assert one.bytes_now == one.used[0] + sum(one.bytes_of[other] for other in one.staged) == one.used[0] + one.staging_bytes
        assert one.bytes_now <= one.peak_bytes and one.where[key]
        one.release(tick + 1)


def test_a_large_expert_evicts_as_many_as_it_needs_or_nobody() -> None:
    one = cache(capacity_bytes=60.0)
    for key in (0, 1, 2):
        one.demand([key], 2 * key)
        one.admit(key, 2 * key)
    assert one.used == [60]
    one.demand([3], 8)
    one.admit(3, 8)
    assert [one.where[key] for key in range(4)] == [0, 0, 0, 1] and one.used == [40], "10 + 20 leave 30 free, so the third goes too"
    small = cache(capacity_bytes=40.0)
    small.demand([2], 0)
    small.admit(2, 0)
    small.hold[2] = 100
    small.demand([1], 2)
    small.admit(1, 2)
    assert small.where[2] == 1 and small.where[1] == 2


def test_a_tier_without_room_is_named() -> None:
    full = Cache(CacheSettings(slots=4), num_layers=1, num_experts=4, bytes_of=[10] * 4, tier="hbm[0]", room_bytes=25)
    full.demand([0, 1, 2], 0)
    full.admit(0, 0)
    full.admit(1, 0)
    with pytest.raises(SimulationError, match=r"layer 0 expert 2: does not fit hbm\[0\], 5 B are missing; cache and staging must be <= 25 B"):
        full.admit(2, 0)


def test_initial_experts_must_fit() -> None:
    with pytest.raises(InputError, match="layer 0 expert 2: does not fit the cache of hbm, 1 slots are missing"):
        cache(slots=1, initial=((0, 1), (0, 2)))
    with pytest.raises(InputError, match="layer 0 expert 3: does not fit the cache of hbm, 10 B are missing"):
        cache(capacity_bytes=30.0, pins=((0, 3),))
    with pytest.raises(InputError, match=r"initial = \(1, 0\) must be \(layer < 1, expert < 4\)"):
        cache(slots=1, initial=((1, 0),))


# --- policies ----------------------------------------------------------------------------------------------------


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(policies._POLICIES)
    yield
    policies._POLICIES.clear()
    policies._POLICIES.update(before)


@pytest.mark.parametrize("victim", [999, -1, 0, "expert 1", None, True])
def test_a_victim_that_does_not_exist_names_policy_hook_value_and_rule(victim: Any) -> None:
    bad = Policy(hook="cache", name="mine", function=lambda view: victim)
    rule = r"must be one of the evictable experts of pool 1: 3 \(layer 1 expert 0\)"
    with pytest.raises(InputError, match=rf"policy mine \(hook cache\): victim = '?{victim}'? {rule}"):
        count_hits(np.array([[[0], [0]], [[0], [1]]]), 3, CacheSettings(slots=1, policy=bad))


def test_a_registered_policy_is_found_by_name(clean_registry: None) -> None:
    seen: list[CacheView] = []

    def newest(view: CacheView) -> int:
        seen.append(view)
        return view.candidates[-1]

    policies.register(Policy(hook="cache", name="newest", function=newest))
    case = routes(0, 30, 1, 5, 1)
    assert hits(case, 5, 2, "newest").misses > 0 and seen and all(len(view.candidates) == 2 and view.layer == 0 for view in seen)
    assert "newest" in policies.names("cache")
    with pytest.raises(InputError, match="has a policy of this name already"):
        policies.register(Policy(hook="cache", name="newest", function=newest))


def test_unknown_policies_are_refused_with_a_hint() -> None:
    with pytest.raises(InputError, match="cache = 'beladi' is not registered; did you mean 'belady'"):
        policies.get("cache", "beladi")
    with pytest.raises(InputError, match="miss = 'xyzzy' is not registered; known: cheapest, compute, load, precision, unimportance"):
        policies.get("miss", "xyzzy")
    with pytest.raises(InputError, match="hook = 'cache' must be miss"):
        policies.get("miss", policies.get("cache", "lru"))
    with pytest.raises(InputError, match="hook = 'cash' must be one of router"):
        Policy(hook="cash", name="p", function=len)
    with pytest.raises(InputError, match="policy sch: parameter = 'many' must be a whole number >= 1"):
        policies.get("cache", "sch:many")


def test_packages_add_policies_by_entry_point(clean_registry: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "theirs"

        def load(self) -> Policy:
            return Policy(hook="cache", name="theirs", function=lambda view: view.candidates[0])

    monkeypatch.setattr(policies, "entry_points", lambda group: [Point()] if group == "moesim.policies" else [])
    case = routes(0, 30, 2, 5, 2)
    assert hits(case, 5, 3, "theirs") == hits(case, 5, 3, "lru")


def test_oracles_need_the_future() -> None:
    with pytest.raises(InputError, match="policy = 'belady' needs the demands to come"):
        Cache(CacheSettings(slots=1, policy="belady"), num_layers=1, num_experts=2, bytes_of=[1, 1])


def test_the_future_is_what_comes_after() -> None:
    case = np.array([[[0, 1]], [[1, -1]], [[0, 2]]])
    future = Future(case, 3)
    assert [future.next_use(0, 0), future.next_use(1, 0), future.next_use(1, 1), future.next_use(2, 2)] == [2, 1, np.inf, np.inf]
    assert future.uses_within(0, 0, 1) == 0 and future.uses_within(0, 0, 2) == 1 and future.uses_within(1, -1, 2) == 2


# --- predictors --------------------------------------------------------------------------------------------------


def test_synthetic_predictions_have_the_recall_and_precision_asked_for() -> None:
    case = routes(9, 2000, 2, 32, 4)
    guess = predict("synthetic:0.8,0.6", PredictorView(routes_TLK=case, num_experts=32, seed=1))
    right = (guess[..., :, None] == case[..., None, :]).any(axis=-1) & (guess >= 0)
    assert right.sum() / case.size == pytest.approx(0.8, abs=0.01)
    assert right.sum() / (guess >= 0).sum() == pytest.approx(0.6, abs=0.01)
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in guess.reshape(-1, guess.shape[-1])[:200])
    again = predict("synthetic:0.8,0.6", PredictorView(routes_TLK=case, num_experts=32, seed=1))
    other = predict("synthetic:0.8,0.6", PredictorView(routes_TLK=case, num_experts=32, seed=2))
    assert np.array_equal(guess, again) and not np.array_equal(guess, other)
    assert np.array_equal(predict("synthetic:1", PredictorView(routes_TLK=case, num_experts=32)), case)


def test_frequency_predictions_know_the_past_only() -> None:
    case = routes(4, 30, 2, 6, 2)
    changed = case.copy()
    changed[20:] = routes(5, 10, 2, 6, 2)
    first, second = (predict("frequency:2", PredictorView(routes_TLK=one, num_experts=6)) for one in (case, changed))
    assert np.array_equal(first[:21], second[:21]) and (first[0] == -1).all()
    for step in (7, 25):
        used = np.bincount(case[:step, 1].reshape(-1), minlength=6)
        assert sorted(used[first[step, 1]]) == sorted(np.sort(used)[-2:])


def test_recorded_and_impossible_predictions() -> None:
    case = routes(4, 3, 2, 6, 2)
    assert predict("recorded", PredictorView(routes_TLK=case, num_experts=6, recorded_TLK=case[..., :1])).shape == (3, 2, 1)
    assert predict("all", PredictorView(routes_TLK=case, num_experts=6)).shape == (3, 2, 6)
    with pytest.raises(InputError, match="needs predictions in the trace"):
        predict("recorded", PredictorView(routes_TLK=case, num_experts=6))
    with pytest.raises(InputError, match=r"policy recorded \(hook predictor\): expert = 6 must be an expert 0..5"):
        predict("recorded", PredictorView(routes_TLK=case, num_experts=6, recorded_TLK=case + 1))
    with pytest.raises(InputError, match=r"must be integers \[3, 2, N\]"):
        predict("recorded", PredictorView(routes_TLK=case, num_experts=6, recorded_TLK=case[:2]))
    with pytest.raises(InputError, match="must be RECALL in"):
        predict("synthetic:2", PredictorView(routes_TLK=case, num_experts=6))
