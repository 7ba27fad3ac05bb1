"""Decoding through memory tiers: three formulations against each other, closed forms, metamorphic twins."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, SimulationError
from moesim.sim.cache import CacheSettings
from moesim.sim.demands import count_hits
from moesim.sim.engine import Engine
from moesim.sim.flows import Flow
from moesim.sim.offload import CopyLink, Decode, DecodeResult, Prefetch, decode
from moesim.sim.offload_actor import OffloadActor, decode_events
from moesim.sim.offload_program import HOST_PORT, decode_program
from moesim.sim.policies import MissView, Policy
from moesim.sim.predictors import PredictorView, predict
from moesim.sim.stores import Store
from moesim.sim.transfers import NO_DISK, PriorityPath

ON_DEMAND = CacheSettings(slots=0)


def routes(rng: np.random.Generator, steps: int, layers: int, experts: int, width: int) -> np.ndarray:
    return np.argsort(rng.random((steps, layers, experts)), axis=-1)[..., :width]


def link(bandwidth: float, latency: float = 0.0, **more: Any) -> CopyLink:
    return CopyLink(load_s=lambda nbytes: latency + nbytes / bandwidth, **more)


def plain(routes_TLK: np.ndarray, experts: int, **more: Any) -> Decode:
    """Attention 3 s, gate 1 s, an expert 2 s on the device, 100 bytes over a link of 20 B/s: 5 s."""
    base: dict[str, Any] = {"attention_s": 3.0, "gate_s": 1.0, "expert_s": 2.0, "expert_bytes": 100, "host": link(20.0), "cache": ON_DEMAND}
    return Decode(routes_TLK=routes_TLK, num_experts=experts, **(base | more))


def exact(routes_TLK: np.ndarray, **more: Any) -> Prefetch:
    return Prefetch(predicted_TLK=routes_TLK, **more)


def random_case(seed: int, discipline: str) -> Decode:
    """Any combination of caches, predictions, ways to serve a miss, two or three tiers."""
    rng = np.random.Generator(np.random.PCG64(seed))

    def pick(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    steps, layers, experts = int(rng.integers(1, 7)), int(rng.integers(1, 5)), int(rng.integers(2, 9))
    width = int(rng.integers(1, min(experts, 4) + 1))
    case = routes(rng, steps, layers, experts, width)
    case = np.where(rng.random(case.shape) < 0.1, -1, case)
    size = rng.integers(1000, 5000, (layers, experts)).astype(float)

    def copy_link(name: str) -> CopyLink:
        chunk = float(rng.uniform(100, 3000)) if discipline == "priority" and rng.random() < 0.7 else None
        return link(float(rng.uniform(500, 20000)), float(rng.uniform(0, 0.2)), discipline=discipline, chunk_bytes=chunk, name=name)

    more: dict[str, Any] = {}
    if rng.random() < 0.75:
        guess = predict(f"synthetic:{rng.uniform(0.3, 1):.3f},{rng.uniform(0.3, 1):.3f}", PredictorView(routes_TLK=case, num_experts=experts, seed=seed))
        more["prefetch"] = Prefetch(
            predicted_TLK=guess, lookahead=int(rng.integers(1, 4)), issue=pick("gate", "experts"), across_steps=pick(True, False),
            into=pick("cache", "staging"), cost_s=pick(0.0, float(rng.uniform(0, 0.3))), device=pick("gpu", "cpu"),
            cancel_wrong=discipline == "priority" and pick(True, False),
        )  # fmt: skip
    kind = rng.random()
    if kind < 0.35:
        more["disk"] = copy_link("disk")
        more["host_cache"] = CacheSettings(slots=int(rng.integers(0, layers * experts)), scope=pick("layer", "global"), policy=pick("lru", "lfu", "random:3"))
    elif kind < 0.55:
        more |= {"compute_s": lambda layer, expert, tokens: 0.1 * (expert + 1) + 0.01 * layer, "miss": pick("compute", "cheapest")}
    elif kind < 0.7:
        more |= {"low_bytes": size / 4, "miss": "precision"}
    elif kind < 0.8:
        more |= {"low_bytes": size / 4, "miss": "unimportance:0.3,0.7", "weights_TLK": rng.random(case.shape)}
    room = {"slots": int(rng.integers(0, experts + 1))} if rng.random() < 0.6 else {"capacity_bytes": float(rng.uniform(0, 15000))}
    return Decode(
        routes_TLK=case, num_experts=experts, attention_s=rng.uniform(0.01, 1, (steps, layers)), gate_s=rng.uniform(0.01, 0.1, layers),
        expert_s=rng.uniform(0.01, 0.5, (layers, experts)), expert_bytes=size, host=copy_link("host"), expert_start=pick("all", "each"),
        cache=CacheSettings(**room, policy=pick("lru", "fifo", "lfu", "belady"), scope=pick("layer", "global"), staging_slots=pick(None, width, width + 1)),
        **more,
    )  # fmt: skip


def assert_same(one: DecodeResult, other: DecodeResult, what: object) -> None:
    assert np.abs(one.step_s - other.step_s).max() < 1e-9, what
    assert one.counts == other.counts, what
    assert one.peak_bytes == other.peak_bytes, what
    assert (one.host_hits, one.host_misses) == (other.host_hits, other.host_misses), what
    assert one.moved_bytes == pytest.approx(other.moved_bytes, abs=1e-3), what


@pytest.mark.parametrize("block", range(4))
def test_recurrence_equals_program_and_actors_on_links_in_order(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        case = random_case(seed, "fifo")
        fast = decode(case)
        assert_same(fast, decode_events(case), seed)
        if case.prefetch is None or case.prefetch.device == "gpu" or case.prefetch.cost_s == 0:
            assert_same(fast, decode_program(case), seed)


@pytest.mark.parametrize("block", range(4))
def test_recurrence_equals_actors_on_links_with_priority(block: int) -> None:
    for seed in range(block * 25, block * 25 + 25):
        case = random_case(seed, "priority")
        assert_same(decode(case), decode_events(case), seed)


def test_the_random_cases_exercise_every_count() -> None:
    """The comparison would prove little if nothing was ever late, cancelled or refused."""
    total: dict[str, float] = {}
    for discipline in ("fifo", "priority"):
        for seed in range(100):
            for name, value in decode(random_case(seed, discipline)).counts.report().items():
                total[name] = total.get(name, 0) + value
    assert min(total.values()) >= 4, total


# --- closed forms --------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 8), load=st.floats(0.01, 20), compute=st.floats(0.1, 3))
@settings(max_examples=40, deadline=None)
def test_pre_gated_recurrence(seed: int, blocks: int, load: float, compute: float) -> None:
    """x: load of one expert; n blocks; T0: all resident. On demand T0 + n·x; pre-gated T0 + x + (n-1)·max(0, x - T0/n)."""
    case = routes(np.random.Generator(np.random.PCG64(seed)), 3, blocks, 16, 1)
    base = plain(case, 16, attention_s=compute, gate_s=0.1, expert_s=compute / 2, host=CopyLink(load_s=lambda nbytes: load))
    whole = blocks * (compute + 0.1 + compute / 2)
    assert decode(base).step_s == pytest.approx(whole + blocks * load)
    ahead = whole + load + (blocks - 1) * max(0.0, load - whole / blocks)
    assert decode(replace(base, prefetch=exact(case))).step_s == pytest.approx(ahead)


@pytest.mark.parametrize("experts", [4, 8, 64])
def test_prefetch_all_loads_every_expert_of_the_next_block(experts: int) -> None:
    """Every expert of a block is demanded and one of them runs: T0 + E·x + (n-1)·max(0, E·x - T0/n)."""
    blocks, steps, load = 5, 2, 5.0
    every = np.broadcast_to(np.arange(experts), (steps, blocks, experts))
    tokens = np.zeros(every.shape, dtype=int)
    tokens[..., 1] = 1
    result = decode(plain(every, experts, tokens_TLK=tokens, prefetch=exact(every)))
    assert result.step_s == pytest.approx(blocks * 6.0 + experts * load + (blocks - 1) * max(0.0, experts * load - 6.0))
    assert result.moved_bytes == {"host": steps * blocks * experts * 100.0}


def test_prefetch_all_time_is_linear_in_experts_times_bytes() -> None:
    def stall(experts: int, nbytes: float) -> float:
        every = np.broadcast_to(np.arange(experts), (1, 1, experts))
        return decode(plain(every, experts, tokens_TLK=np.zeros(every.shape, dtype=int), expert_bytes=nbytes)).stall_s["miss"]

    assert stall(256, 100) == pytest.approx(4 * stall(64, 100)) == pytest.approx(2 * stall(256, 50)) == pytest.approx(1280.0)


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize("load", [0.5, 2.0, 3.9, 4.1, 9.0])
def test_ring_of_layers(slots: int, load: float) -> None:
    """N layers in host memory, K on the device; when a layer has run its section is released and that of layer i + K loaded."""
    layers, steps, compute = 5, 6, 2.0
    sections = np.zeros((steps, layers, 1), dtype=int)
    cache = CacheSettings(slots=slots, scope="global", initial=tuple((layer, 0) for layer in range(slots)))
    ring = Prefetch(predicted_TLK=sections, lookahead=slots, issue="experts", across_steps=True)
    result = decode(plain(sections, 1, attention_s=0.0, gate_s=0.0, expert_s=compute, host=CopyLink(load_s=lambda nbytes: load), cache=cache, prefetch=ring))
    there = [0.0] * slots
    ends: list[float] = []
    free = 0.0
    for position in range(layers * steps):
        ends.append(max(ends[-1] if ends else 0.0, there[position]) + compute)
        if slots < layers:
            free = max(free, ends[-1]) + load
            there.append(free)
        else:
            there.append(0.0)
    assert np.cumsum(result.step_s) == pytest.approx(ends[layers - 1 :: layers])
    if slots == layers:
        assert result.moved_bytes == {"host": 0.0} and result.simulated_s == pytest.approx(layers * steps * compute)
    elif slots > 1:
        assert result.step_s[-1] / layers == pytest.approx(max(load, compute))
    assert result.peak_bytes == {"device": 100 * slots}


def test_ring_exposes_what_its_window_does_not_hide() -> None:
    """One lap: the first load is issued after layer 0 and needed K - 1 layers later."""
    sections = np.zeros((1, 4, 1), dtype=int)
    cache = CacheSettings(slots=3, scope="global", initial=((0, 0), (1, 0), (2, 0)))
    ring = Prefetch(predicted_TLK=sections, lookahead=3, issue="experts", across_steps=True)
    for load, exposed in ((3.9, 0.0), (4.0, 0.0), (4.5, 0.5), (7.0, 3.0)):
        case = plain(sections, 1, attention_s=0.0, gate_s=0.0, host=CopyLink(load_s=lambda nbytes, load=load: load), cache=cache, prefetch=ring)  # type: ignore[misc]
        assert decode(case).simulated_s == pytest.approx(8.0 + exposed)


@given(seed=st.integers(0, 10**6), slots=st.integers(0, 8))
@settings(max_examples=30, deadline=None)
def test_on_demand_pays_every_miss_and_nothing_else(seed: int, slots: int) -> None:
    """No prefetch: time = all resident + one load per miss, and the misses are those of the cache alone."""
    case = routes(np.random.Generator(np.random.PCG64(seed)), 20, 3, 8, 2)
    cache = CacheSettings(slots=slots)
    result = decode(plain(case, 8, cache=cache))
    alone = count_hits(case, 8, cache)
    assert (result.counts.hits, result.counts.misses) == (alone.hits, alone.misses)
    assert result.simulated_s == pytest.approx(20 * 3 * 8.0 + 5.0 * alone.misses)
    assert result.stall_s["miss"] == pytest.approx(5.0 * alone.misses)
    assert result.moved_bytes == {"host": 100.0 * alone.misses}


def test_misses_are_served_in_turn_and_experts_may_start_as_they_arrive() -> None:
    """4 s to the gate, loads end at 9 and 14: together 14 + 2·2, each as it arrives max(9 + 2, 14) + 2."""
    case = np.array([[[0, 1]]])
    assert decode(plain(case, 2)).step_s.tolist() == [18.0]
    each = decode(plain(case, 2, expert_start="each"))
    assert each.step_s.tolist() == [16.0] and each.stall_s["miss"] == 8.0


# --- prefetches ----------------------------------------------------------------------------------------------------


def test_a_late_hit_waits_for_the_rest_of_its_transfer() -> None:
    """Issued at 4 s behind a miss that is there at 9 s, it would arrive at 14 s; its gate has decided at 9 + 2 + 4 = 15 s, then at 13 s."""
    case = np.array([[[0], [1]]])
    on_time, late = decode(plain(case, 2, prefetch=exact(case))), decode(plain(case, 2, prefetch=exact(case), attention_s=1.0))
    assert (on_time.counts.hits, on_time.counts.late_hits) == (1, 0) and on_time.step_s.tolist() == [17.0]
    assert (late.counts.hits, late.counts.late_hits, late.counts.misses) == (0, 1, 1)
    assert late.stall_s == {"late_hit": 1.0, "miss": 5.0, "disk_miss": 0.0, "compute": 0.0} and late.step_s.tolist() == [14.0]


@pytest.mark.parametrize(("chunk", "wait"), [(None, 3.0), (20.0, 0.0), (60.0, 0.0), (50.0, 0.5)])
def test_a_demanded_load_goes_before_a_prefetch_at_the_next_chunk_border(chunk: float | None, wait: float) -> None:
    """A wrong prefetch of 5 s begins at 4 s, behind a hit; the next gate demands another expert at 6 s (or 7 s)."""
    case, guess = np.array([[[0], [1]]]), np.array([[[-1], [2]]])
    cache = CacheSettings(slots=3, initial=((0, 0),))
    attention = 0.0 if chunk != 60.0 else 1.0
    host = link(20.0, discipline="priority", chunk_bytes=chunk)
    times = {"attention_s": np.array([[3.0, attention]]), "gate_s": np.array([1.0, 0.0])}
    priority = plain(case, 3, cache=cache, prefetch=exact(guess), host=host, **times)
    result = decode(priority)
    assert result.stall_s["miss"] == pytest.approx(5.0 + wait)
    assert result.counts.useless_prefetches == 1 and result.counts.cancelled_prefetches == 0
    assert result.moved_bytes == {"host": 200.0}
    stopped = decode(replace(priority, prefetch=exact(guess, cancel_wrong=True)))
    assert stopped.simulated_s == result.simulated_s
    begun = 100.0 if chunk is None else chunk * np.ceil((2 + attention) * 20 / chunk)
    assert stopped.moved_bytes["host"] == pytest.approx(100 + begun) and stopped.counts.cancelled_prefetches == (chunk is not None)


@given(seed=st.integers(0, 10**6), width=st.integers(1, 3), lookahead=st.integers(1, 3), discipline=st.sampled_from(["fifo", "priority"]))
@settings(max_examples=30, deadline=None)
def test_recall_one_and_a_window_above_the_load_never_stall(seed: int, width: int, lookahead: int, discipline: str) -> None:
    """The first step's first layers are resident, every later layer is predicted; width loads of 1 s fit into a layer of 4 s."""
    case = routes(np.random.Generator(np.random.PCG64(seed)), 6, 4, 8, width)
    initial = tuple((layer, int(expert)) for layer in range(2) for expert in case[0, layer])
    cache = CacheSettings(slots=max(width * (lookahead + 1), 2 * width), scope="global", initial=initial)
    ahead = exact(case, lookahead=lookahead, across_steps=True)
    result = decode(plain(case, 8, attention_s=2.0, expert_s=1.0 / width, host=link(100.0, discipline=discipline), cache=cache, prefetch=ahead))
    assert result.counts.misses == result.counts.late_hits == 0 and result.counts.hit_rate == 1.0
    assert sum(result.stall_s.values()) == 0.0 and result.step_s == pytest.approx(16.0)


def test_predictions_cost_time_on_the_device_that_makes_them() -> None:
    case = routes(np.random.Generator(np.random.PCG64(0)), 4, 5, 8, 2)
    fast = plain(case, 8, host=link(1e6), prefetch=exact(case))
    free = decode(fast).simulated_s
    assert free == pytest.approx(4 * (5 * 8.0 + 2e-4))
    assert decode(replace(fast, prefetch=exact(case, cost_s=0.5))).simulated_s == pytest.approx(4 * (5 * 8.0 + 4 * 0.5)), "a prediction hides loads"
    assert decode(replace(fast, prefetch=exact(case, cost_s=0.5, device="cpu"))).simulated_s == pytest.approx(free)
    far = decode(replace(fast, prefetch=exact(case, cost_s=0.5, lookahead=3)))
    assert far.simulated_s == pytest.approx(4 * (5 * 8.0 + 4 * 0.5)), "every layer is predicted once, however far ahead"
    never = decode(replace(fast, prefetch=exact(case, cost_s=100.0, device="cpu")))
    assert never.counts.late_predictions == 4 * 4 * 2 and never.counts.prefetches == 0
    assert never.simulated_s == decode(replace(fast, prefetch=None)).simulated_s


def test_useless_prefetches_cost_bytes_and_are_counted() -> None:
    case = np.zeros((3, 2, 1), dtype=int)
    result = decode(plain(case, 4, prefetch=exact(np.full((3, 2, 1), 2))))
    assert result.counts.prefetches == result.counts.useless_prefetches == 3
    assert result.counts.misses == 6 and result.moved_bytes == {"host": 900.0}


def test_peak_of_pre_gated_is_that_of_two_neighbouring_layers() -> None:
    """Experts are dropped after use: the peak is the largest demand of a layer and the next one together."""
    rng = np.random.Generator(np.random.PCG64(4))
    case = routes(rng, 5, 6, 8, 4)
    case[..., 1:][rng.random((5, 6, 3)) < 0.5] = -1
    number = (case >= 0).sum(axis=-1)
    expected = max(int((number[:, :-1] + number[:, 1:]).max()), int(number.max()))
    assert decode(plain(case, 8, prefetch=exact(case))).peak_bytes == {"device": 100 * expected}
    assert decode(plain(case, 8)).peak_bytes == {"device": 100 * int(number.max())}


# --- metamorphic ---------------------------------------------------------------------------------------------------


def faster(case: Decode, factor: float) -> Decode:
    def quick(one: CopyLink) -> CopyLink:
        return replace(one, load_s=lambda nbytes: one.load_s(nbytes) / factor)

    return replace(case, host=quick(case.host), disk=None if case.disk is None else quick(case.disk))


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
def test_an_infinite_link_equals_all_resident(discipline: str) -> None:
    for seed in range(40):
        case = replace(random_case(seed, discipline), miss="load", low_bytes=None, compute_s=None)
        instant = decode(replace(faster(case, np.inf), prefetch=None if case.prefetch is None else replace(case.prefetch, cost_s=0.0)))
        experts = tuple((layer, expert) for layer in range(case.routes_TLK.shape[1]) for expert in range(case.num_experts))
        resident = replace(case, cache=CacheSettings(slots=case.num_experts, initial=experts), prefetch=None, disk=None, host_cache=None)
        whole = decode(resident)
        assert instant.step_s == pytest.approx(whole.step_s, abs=1e-12)
        assert whole.counts.misses == 0 and sum(whole.moved_bytes.values()) == 0


def test_without_a_cache_every_access_is_a_miss() -> None:
    case = np.zeros((10, 3, 1), dtype=int)
    result = decode(plain(case, 2))
    assert result.counts.misses == 30 and result.counts.hits == 0
    assert result.simulated_s == pytest.approx(30 * (6.0 + 5.0)) and result.peak_bytes == {"device": 100}


@given(seed=st.integers(0, 10**6), factor=st.floats(1.0, 8.0))
@settings(max_examples=80, deadline=None)
def test_a_faster_link_in_order_never_hurts(seed: int, factor: float) -> None:
    case = random_case(seed, "fifo")
    if case.miss != "cheapest" and not (case.prefetch is not None and case.prefetch.device == "cpu"):
        slow, fast = decode(case), decode(faster(case, factor))
        assert (np.cumsum(fast.step_s) <= np.cumsum(slow.step_s) + 1e-9).all()


@given(seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_faster_link_with_priority_never_hurts_right_predictions(seed: int) -> None:
    case = random_case(seed, "priority")
    right = None if case.prefetch is None else replace(case.prefetch, predicted_TLK=case.routes_TLK, cost_s=0.0)
    case = replace(case, miss="load", low_bytes=None, compute_s=None, prefetch=right)
    assert decode(faster(case, 2.0)).simulated_s <= decode(case).simulated_s + 1e-9


def test_twice_the_bits_load_twice_as_long() -> None:
    case = routes(np.random.Generator(np.random.PCG64(1)), 30, 3, 8, 2)
    one, two = (decode(plain(case, 8, cache=CacheSettings(slots=3), expert_bytes=nbytes)) for nbytes in (100, 200))
    assert two.stall_s["miss"] == pytest.approx(2 * one.stall_s["miss"]) and two.moved_bytes["host"] == 2 * one.moved_bytes["host"]
    assert two.counts == one.counts


@given(seed=st.integers(0, 10**6), discipline=st.sampled_from(["fifo", "priority"]))
@settings(max_examples=60, deadline=None)
def test_bytes_are_conserved(seed: int, discipline: str) -> None:
    """With equal experts: bytes over the link = loads on demand and prefetches, less what cancelling has saved."""
    case = replace(random_case(seed, discipline), expert_bytes=1000, low_bytes=None, miss="load", compute_s=None)
    result = decode(case)
    counts, moved = result.counts, result.moved_bytes["host"]
    issued = 1000.0 * (counts.misses + counts.prefetches)
    assert issued - 1000.0 * counts.cancelled_prefetches - 1e-6 <= moved <= issued + 1e-6
    assert counts.demands == (case.routes_TLK >= 0).sum()
    if case.disk is not None:
        assert result.moved_bytes["disk"] <= 1000.0 * result.host_misses + 1e-6
        assert result.host_hits + result.host_misses == counts.misses + counts.prefetches
        if counts.cancelled_prefetches == 0:
            assert result.moved_bytes["disk"] == pytest.approx(1000.0 * result.host_misses)


@given(seed=st.integers(0, 10**6), discipline=st.sampled_from(["fifo", "priority"]))
@settings(max_examples=60, deadline=None)
def test_time_is_work_and_stalls(seed: int, discipline: str) -> None:
    case = random_case(seed, discipline)
    if case.prefetch is not None:
        case = replace(case, prefetch=replace(case.prefetch, cost_s=0.0))
    if case.miss == "load" or case.miss == "precision":
        result = decode(case)
        idle = replace(faster(case, np.inf), prefetch=None)
        assert result.simulated_s == pytest.approx(decode(idle).simulated_s + sum(result.stall_s.values()))


def test_permuting_expert_ids_changes_nothing() -> None:
    rng = np.random.Generator(np.random.PCG64(8))
    case, names = routes(rng, 40, 3, 8, 2), rng.permutation(8)
    guess = predict("synthetic:0.7,0.7", PredictorView(routes_TLK=case, num_experts=8))
    renamed = np.where(guess >= 0, names[guess], -1)
    one = decode(plain(case, 8, cache=CacheSettings(slots=3), prefetch=exact(guess)))
    two = decode(plain(names[case], 8, cache=CacheSettings(slots=3), prefetch=exact(renamed)))
    assert one.counts == two.counts and np.array_equal(one.step_s, two.step_s)


def test_the_same_case_gives_the_same_result() -> None:
    first, second = (decode(random_case(17, "priority")).report() for _ in range(2))
    assert first == second


# --- other ways to serve a miss --------------------------------------------------------------------------------------


def cpu(seconds: float) -> Callable[[int, int, int], float]:
    return lambda layer, expert, tokens: seconds * tokens


@pytest.mark.parametrize(("tokens", "elsewhere"), [(1, True), (6, True), (7, False), (8, False)])
def test_cheapest_computes_elsewhere_up_to_the_tie(tokens: int, elsewhere: bool) -> None:
    """Loading costs 5 + 2 s whatever the tokens, the CPU 1 s a token; at a tie (7) the expert is loaded."""
    case = np.zeros((1, 1, 1), dtype=int)
    result = decode(plain(case, 1, miss="cheapest", compute_s=cpu(1.0), tokens_TLK=np.array([[[tokens]]])))
    assert result.counts.computed == elsewhere and result.simulated_s == 4.0 + min(tokens, 7)
    assert result.moved_bytes == {"host": 0.0 if elsewhere else 100.0}


def test_cheapest_counts_the_queue_of_the_other_device() -> None:
    """The CPU needs 4 s an expert and loading 7 s: the second expert would end there at 8 s, so it is loaded."""
    result = decode(plain(np.array([[[0, 1]]]), 2, miss="cheapest", compute_s=cpu(4.0)))
    assert result.counts.computed == 1 and result.moved_bytes == {"host": 100.0} and result.step_s.tolist() == [11.0]


def test_a_cpu_without_speed_always_loads() -> None:
    case = routes(np.random.Generator(np.random.PCG64(2)), 10, 3, 8, 2)
    fiddler = decode(plain(case, 8, cache=CacheSettings(slots=3), miss="cheapest", compute_s=cpu(1e12)))
    assert fiddler.counts.computed == 0
    assert np.array_equal(fiddler.step_s, decode(plain(case, 8, cache=CacheSettings(slots=3))).step_s)


def test_experts_elsewhere_run_beside_those_on_the_device() -> None:
    """Expert 0 is resident (2 s from 4 s), expert 1 takes 3 s on the CPU: the layer ends at 7 s, 1 s of it waiting."""
    result = decode(plain(np.array([[[0, 1]]]), 2, cache=CacheSettings(slots=1, initial=((0, 0),)), miss="compute", compute_s=cpu(3.0)))
    assert result.step_s.tolist() == [7.0] and result.stall_s["compute"] == 1.0 and result.counts.computed == 1


def test_low_precision_moves_fewer_bytes_and_stays_usable() -> None:
    case = np.zeros((2, 1, 1), dtype=int)
    result = decode(plain(case, 1, cache=CacheSettings(slots=1), miss="precision", low_bytes=25))
    assert result.step_s.tolist() == [6.0 + 1.25, 6.0] and result.counts.low_precision == 1 and result.peak_bytes == {"device": 25}


def test_unimportant_misses_are_loaded_low_or_left_out() -> None:
    """Weights .6, .3, .1 in another order: above them 0, .6 and .9 of the sum."""
    case = np.array([[[2, 0, 1]]])
    weights = np.array([[[0.1, 0.6, 0.3]]])
    result = decode(plain(case, 3, miss="unimportance:0.5,0.8", low_bytes=20, weights_TLK=weights))
    assert (result.counts.low_precision, result.counts.skipped) == (1, 1) and result.moved_bytes == {"host": 120.0}
    assert result.simulated_s == 4.0 + 5.0 + 1.0 + 2 * 2.0
    every = decode(plain(case, 3, miss="unimportance:1,1", low_bytes=20, weights_TLK=weights))
    assert every.counts.low_precision == every.counts.skipped == 0 and every.moved_bytes == {"host": 300.0}


def test_a_miss_policy_sees_what_it_needs() -> None:
    seen: list[MissView] = []

    def look(view: MissView) -> str:
        seen.append(view)
        return "load"

    policy = Policy(hook="miss", name="look", function=look)
    decode(plain(np.array([[[1, 0]]]), 2, miss=policy, compute_s=cpu(3.0), low_bytes=20))
    assert [(view.layer, view.expert, view.tokens, view.work_s, view.load_s, view.low_s, view.compute_s) for view in seen] == [
        (0, 1, 1, 2.0, 5.0, 1.0, 3.0), (0, 0, 1, 2.0, 5.0, 1.0, 3.0),
    ]  # fmt: skip
    assert [view.load_wait_s for view in seen] == [0.0, 5.0]


# --- three tiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discipline", ["fifo", "priority"])
def test_a_miss_in_host_memory_is_read_from_disk_first(discipline: str) -> None:
    """Disk 10 s, link 5 s; the second step finds the expert in host memory."""
    case = np.zeros((2, 1, 1), dtype=int)
    tiers = plain(
        case, 2, host=link(20.0, discipline=discipline), disk=link(10.0, name="disk", discipline=discipline), host_cache=CacheSettings(slots=1)
    )  # fmt: skip
    result = decode(tiers)
    assert result.step_s.tolist() == [6.0 + 15.0, 6.0 + 5.0]
    assert result.stall_s["disk_miss"] == 15.0 and result.stall_s["miss"] == 5.0 and result.moved_bytes == {"host": 200.0, "disk": 100.0}
    assert result.peak_bytes == {"device": 100, "host": 100} and result.report()["host_cache"] == {"hits": 1, "misses": 1, "hit_rate": 0.5}
    nothing = decode(replace(tiers, host_cache=CacheSettings(slots=0)))
    assert nothing.step_s.tolist() == [21.0, 21.0] and nothing.host_misses == 2


def wrong_then_wanted(chunk: float | None) -> Decode:
    """Expert 2 of layer 1 is predicted wrongly at 4 s, found wrong at 15 s and wanted at 37 s; its disk read takes 100 s."""
    host_cache = CacheSettings(slots=3, initial=((0, 0), (1, 1)))
    tiers: dict[str, Any] = {"host": link(20.0, discipline="priority"), "disk": link(1.0, discipline="priority", chunk_bytes=chunk, name="disk")}
    guess = exact(np.array([[[-1], [2]], [[-1], [-1]]]), cancel_wrong=True)
    return plain(np.array([[[0], [1]], [[0], [2]]]), 3, host_cache=host_cache, prefetch=guess, **tiers)


def test_a_read_that_is_cancelled_has_to_be_made_again() -> None:
    """Chunks of 10 s begin at 4 and 14 s; the second read begins at 37 s."""
    result = decode(wrong_then_wanted(10.0))
    assert result.counts.cancelled_prefetches == 1 and (result.host_hits, result.host_misses) == (3, 2)
    assert result.moved_bytes == {"host": 400.0, "disk": 120.0} and result.simulated_s == pytest.approx(37.0 + 100.0 + 5.0 + 2.0)


def test_a_read_in_its_last_chunk_goes_on_and_is_waited_for() -> None:
    """The read of 4..104 s cannot be stopped: the copy to the device is, and demanded again it waits for the read."""
    result = decode(wrong_then_wanted(None))
    assert result.counts.cancelled_prefetches == 1 and (result.host_hits, result.host_misses) == (4, 1)
    assert result.moved_bytes == {"host": 400.0, "disk": 100.0} and result.simulated_s == pytest.approx(104.0 + 5.0 + 2.0)


def test_a_prefetch_that_loses_its_place_in_host_memory_is_stopped() -> None:
    """The only slot of host memory is taken at 16 s by a miss; the wrong prefetch that was being read into it is not resident."""
    case = np.array([[[0], [1], [0]], [[0], [2], [0]]])
    cache = CacheSettings(slots=3, initial=((0, 0), (1, 1)))
    tiers: dict[str, Any] = {"host": link(20.0, discipline="priority"), "disk": link(5.0, discipline="priority", chunk_bytes=10.0, name="disk")}
    guess = exact(np.array([[[-1], [2], [-1]], [[-1], [-1], [-1]]]))
    result = decode(plain(case, 3, cache=cache, host_cache=CacheSettings(slots=1, scope="global"), prefetch=guess, **tiers))
    assert (result.counts.cancelled_prefetches, result.counts.useless_prefetches, result.counts.misses) == (1, 1, 2)
    assert result.moved_bytes == {"host": 200.0, "disk": 60.0 + 200.0} and result.step_s[0] == 16.0 + 20.0 + 5.0 + 2.0


def test_host_memory_keeps_what_is_on_its_way_to_the_device() -> None:
    """A late prefetch holds the only slot against a miss of the same gate, so the next step finds it there."""
    case, guess = np.array([[[-1, -1], [1, 0]], [[-1, -1], [1, -1]]]), np.array([[[-1], [1]], [[-1], [-1]]])
    result = decode(plain(case, 2, disk=link(5.0, name="disk"), host_cache=CacheSettings(slots=1, scope="global"), prefetch=exact(guess)))
    assert (result.counts.late_hits, result.counts.misses) == (1, 2) and (result.host_hits, result.host_misses) == (1, 2)


def test_a_copy_that_has_begun_goes_on_before_an_older_one_that_was_not_ready() -> None:
    path = PriorityPath(2, host_chunk=10.0, disk_chunk=None)
    path.push(0, 0.0, 5.0, 3.0, 50, demanded=False)
    path.push(1, 0.0, 5.0, NO_DISK, 50, demanded=False)
    path.advance(3.5)
    path.advance(100.0)
    assert path.arrival == [10.0, 5.0]


def test_host_memory_that_holds_all_equals_two_tiers() -> None:
    for seed in range(30):
        for discipline in ("fifo", "priority"):
            case = replace(random_case(seed, discipline), low_bytes=None, miss="load", disk=None, host_cache=None)
            experts = tuple((layer, expert) for layer in range(case.routes_TLK.shape[1]) for expert in range(case.num_experts))
            disk = link(1.0, discipline=discipline, name="disk")
            tiers = decode(replace(case, disk=disk, host_cache=CacheSettings(slots=case.num_experts, initial=experts)))
            two = decode(case)
            assert np.array_equal(tiers.step_s, two.step_s) and tiers.counts == two.counts and tiers.moved_bytes["disk"] == 0


# --- the engine --------------------------------------------------------------------------------------------------------


def test_a_migration_on_the_same_port_slows_the_loads() -> None:
    """Two misses of 5 s from 4 s on; a fair Flow of 3 s work arrives at 6 s: both run at half speed until 12 s."""
    engine = Engine(1)
    actor = OffloadActor(plain(np.array([[[0, 1]]]), 2), engine)

    def migration() -> Generator[Any, Any, None]:
        yield engine.env.timeout(6.0)
        yield engine.start_flow(Flow("migration", 3.0, {(HOST_PORT, 0): 1.0}))

    engine.env.process(actor.run())
    engine.env.process(migration())
    engine.env.run()
    assert actor.result().step_s.tolist() == pytest.approx([18.0 + 3.0])


def test_a_program_refuses_what_it_cannot_say() -> None:
    with pytest.raises(InputError, match="link host: discipline = 'priority' must be fifo in a Program"):
        decode_program(plain(np.zeros((1, 1, 1), dtype=int), 1, host=link(1.0, discipline="priority")))
    case = np.zeros((1, 2, 1), dtype=int)
    with pytest.raises(InputError, match="prefetch: device = 'cpu'"):
        decode_program(plain(case, 1, prefetch=exact(case, cost_s=1.0, device="cpu")))


# --- stores, report, bad input -----------------------------------------------------------------------------------------


def test_stores_must_have_room_and_learn_the_peak() -> None:
    case = routes(np.random.Generator(np.random.PCG64(0)), 5, 2, 8, 3)
    store = Store(name="hbm[0]", tier="hbm", capacity_bytes=1000)
    store.reserve("kv", 300)
    fits = decode(plain(case, 8, cache=CacheSettings(slots=3), device_store=store))
    assert fits.peak_bytes == {"hbm": 600} and store.peak_bytes == 900 and store.used_bytes == 300
    with pytest.raises(SimulationError, match=r"layer \d expert \d: does not fit hbm, 100 B are missing; cache and staging must be <= 700 B"):
        decode(plain(case, 8, cache=CacheSettings(slots=8), device_store=store))
    tight = Store(name="hbm[0]", tier="hbm", capacity_bytes=300)
    assert decode(plain(case, 8, device_store=tight, prefetch=exact(case))).counts.refused_prefetches > 0
    with pytest.raises(SimulationError, match="finds no room in hbm, 50 B are missing"):
        decode(plain(case, 8, device_store=Store(name="hbm[0]", tier="hbm", capacity_bytes=250)))


def test_report_has_the_keys_of_a_replay() -> None:
    report = decode(random_case(3, "priority")).report()
    assert {"hits", "late_hits", "misses", "useless_prefetches", "hit_rate"} <= set(report["cache"])
    assert set(report["stall_s"]) == {"late_hit", "miss", "disk_miss", "compute"}
    assert report["simulated_s"] == pytest.approx(sum(report["step_s"])) and report["memory"] and report["bytes"]


ZEROS = np.zeros((2, 3, 1), dtype=int)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routes_TLK": ZEROS + 4}, r"routes_TLK\[0, 0, 0\] = 4 must be an expert 0..3"),
        ({"routes_TLK": np.zeros((2, 3, 2), dtype=int)}, r"routes_TLK\[0, 0\] = \[0, 0\] must not name an expert twice"),
        ({"routes_TLK": ZEROS[0]}, r"routes_TLK = int64 \[3, 1\] must be integers"),
        ({"attention_s": np.array([1.0, np.nan, 1.0])}, r"attention_s\[0, 1\] = nan s must be finite and >= 0"),
        ({"gate_s": np.zeros(2)}, r"gate_s = \(2,\) must be a number, \[3\], \[2, 3\] or a callable"),
        ({"expert_s": -1.0}, r"expert_s = -1.0 s must be finite and >= 0"),
        ({"expert_s": lambda layer, expert, tokens: np.inf}, r"expert_s\[0\] = inf s must be finite"),
        ({"expert_bytes": -np.ones((3, 4))}, r"expert_bytes\[0, 0\] = -1.0 B must be finite and >= 0"),
        ({"expert_bytes": np.zeros((3, 5))}, r"expert_bytes = \(3, 5\) must be a number, \[3\] or \[3, 4\]"),
        ({"host": CopyLink(load_s=lambda nbytes: -1.0)}, r"link host: load_s\(100 B\) = -1.0 s must be finite and >= 0"),
        ({"miss": "compute"}, "miss = 'compute' needs compute_s"),
        ({"miss": "precision"}, "miss = 'precision' needs low_bytes"),
        ({"miss": "hope"}, "miss = 'hope' is not registered"),
        ({"miss": Policy(hook="miss", name="mine", function=lambda view: "pray")}, r"policy mine \(hook miss\): action = 'pray' must be one of load, compute"),
        ({"miss": Policy(hook="miss", name="mine", function=lambda view: "compute")}, r"action = 'compute' is not possible for layer 0 expert 0"),
        ({"expert_start": "soon"}, "expert_start = 'soon' must be all or each"),
        ({"tokens_TLK": np.ones((2, 3))}, "tokens_TLK = .2, 3. must be finite, >= 0 and of the shape of routes_TLK"),
        ({"disk": link(1.0, name="disk")}, "and host_cache must be given together"),
        ({"disk": link(1.0, discipline="priority", name="disk"), "host_cache": ON_DEMAND}, "disk: discipline = 'priority' must be that of link host: fifo"),
        ({"prefetch": exact(ZEROS[:1])}, r"predicted_TLK = int64 \[1, 3, 1\] must be integers"),
        ({"prefetch": exact(ZEROS, cancel_wrong=True)}, "cancel_wrong = True needs a link of discipline priority"),
        ({"cache": CacheSettings(slots=1, policy="lur")}, "cache = 'lur' is not registered; did you mean 'lru'"),
    ],
)  # fmt: skip
def test_bad_input_names_the_key_the_value_and_the_rule(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        decode(replace(plain(ZEROS, 4), **change))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: link(1.0, discipline="random"), "discipline = 'random' must be fifo or priority"),
        (lambda: link(1.0, chunk_bytes=10.0), "chunk_bytes = 10.0 must be > 0, and needs discipline priority"),
        (lambda: exact(ZEROS, lookahead=0), "lookahead = 0 must be >= 1 layer"),
        (lambda: exact(ZEROS, issue="never"), "issue = 'never' must be gate or experts"),
        (lambda: exact(ZEROS, cost_s=-1.0), "cost_s = -1.0 must be finite and >= 0"),
        (lambda: CacheSettings(), "slots = None or capacity_bytes must be given"),
        (lambda: CacheSettings(slots=1, scope="rank"), "scope = 'rank' must be one of layer, global, device"),
        (lambda: CacheSettings(slots=1, scope="device"), "device_LE = None must be given for scope device"),
        (lambda: CacheSettings(slots=1, staging_slots=-1), "staging_slots = -1 must be >= 0"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()
