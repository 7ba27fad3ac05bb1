"""Continuous batching against a scheduler that visits every sequence, against closed forms, and against what must be conserved."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.sim.serving.instance import Instance
from moesim.sim.serving.replica import Replica
from moesim.sim.serving.sequences import Sequence
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.serving.simulate import ServingRun, Simulation
from moesim.traces.requests.document import Request
from moesim.traces.requests.open import open_requests
from tests.sim.serving.toys import Times, pool, reference, requests_of, run


def linear(prompt: int, decodes: int) -> float:
    """A step of a fixed part, prompt tokens and decoding sequences; binary fractions, so that sums are exact in any order."""
    return (64 + prompt + 2 * decodes) / 4096


def draw(seed: int, count: int, *, prompt: int, output: int, gap: float) -> list[Request]:
    rng = np.random.default_rng(seed)
    at = np.floor(np.cumsum(rng.exponential(gap, count)) * 4096) / 4096
    return [Request(str(i), float(at[i]), int(rng.integers(1, prompt + 1)), int(rng.integers(1, output + 1))) for i in range(count)]


@given(
    seed=st.integers(0, 10**6),
    seqs=st.integers(1, 6),
    budget=st.integers(6, 60),
    size=st.integers(1, 7),
    spare=st.integers(0, 12),
    gap=st.sampled_from([0.0, 0.02, 0.1]),
)
@settings(max_examples=120, deadline=None)
def test_every_request_has_the_times_of_a_scheduler_that_visits_every_sequence(seed: int, seqs: int, budget: int, size: int, spare: int, gap: float) -> None:
    rows = draw(seed, 12, prompt=40, output=30, gap=gap)
    blocks = max(-(-(row.prompt_tokens + row.output_tokens) // size) for row in rows) + spare
    chosen = ServingSettings(max_num_seqs=seqs, max_num_batched_tokens=budget, block_size=size)
    done, times = run(rows, chosen, pool(linear, blocks=blocks))
    true, preempted = reference(rows, chosen, blocks, linear)
    assert times == true
    assert done.preemptions == preempted
    assert done.kv_peak <= 1.0


def test_tight_memory_really_preempts() -> None:
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=64, block_size=4)
    rows = [Request(str(i), 0.0, 16, 40) for i in range(4)]
    done, times = run(rows, chosen, pool(linear, blocks=20))
    assert done.preemptions > 0 and len(times) == 4
    # Every position is computed once, and what was given up once more.
    needed = sum(row.prompt_tokens + row.output_tokens - 1 for row in rows)
    assert done.recomputed_tokens > 0
    assert done.sums.prompt_tokens + done.sums.decodes == needed + done.recomputed_tokens


def test_swapped_sequences_come_back_without_computing_again() -> None:
    rows = [Request(str(i), 0.0, 16, 40) for i in range(4)]
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=64, block_size=4, preemption="swap")
    done, times = run(rows, chosen, pool(linear, blocks=20, swap_s_per_token=2.0**-20))
    free, _ = run(rows, chosen, pool(linear, blocks=20))
    assert done.preemptions > 0 and len(times) == 4 and done.recomputed_tokens == 0
    assert done.sums.prompt_tokens == 64 and done.sums.decodes == 4 * 39
    assert done.simulated_s > free.simulated_s


def test_who_is_admitted_with_room_for_all_it_makes_is_never_preempted() -> None:
    """Four requests of 56 tokens on 80: one at a time; a share of 0.1 lets the second in when 5 blocks and a tenth of what the first has yet to make fit."""
    rows = [Request(str(i), 0.0, 16, 40) for i in range(4)]
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=64, block_size=4)
    free, _ = run(rows, chosen, pool(linear, blocks=20))
    all_, times = run(rows, replace(chosen, admission_reserve=1.0), pool(linear, blocks=20))
    assert free.preemptions > 0 and all_.preemptions == 0 and all_.recomputed_tokens == 0
    ends = sorted(end for _, end in times.values())
    firsts = sorted(first for first, _ in times.values())
    assert all(first > end for first, end in zip(firsts[1:], ends, strict=False)), "14 of 20 blocks are promised to one"
    # 28 blocks hold two to the end; with a tenth reserved, 22 hold a second one's 14 beside the first one's 4 and a tenth of its other 10.
    beside, late = (run(rows[:2], replace(chosen, admission_reserve=share), pool(linear, blocks=22))[1] for share in (0.1, 1.0))
    assert beside["1"][0] < beside["0"][1] and late["1"][0] > late["0"][1]


def test_chunks_are_what_the_budget_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Instance, "leap", lambda self, flight: None)
    seen: list[tuple[int, int]] = []

    def note(prompt: int, decodes: int) -> float:
        seen.append((prompt, decodes))
        return 1.0

    rows = [Request("a", 0.0, 10, 8), Request("b", 1.0, 70, 2)]
    run(rows, ServingSettings(max_num_seqs=4, max_num_batched_tokens=32), pool(note))
    assert seen == [(10, 0), (31, 1), (31, 1), (8, 1), (0, 2), (0, 1), (0, 1), (0, 1)]


def test_whole_prompts_wait_until_they_fit() -> None:
    seen: list[tuple[int, int]] = []

    def note(prompt: int, decodes: int) -> float:
        seen.append((prompt, decodes))
        return 1.0

    rows = [Request("a", 0.0, 20, 1), Request("b", 0.0, 20, 1), Request("c", 0.0, 50, 1)]
    run(rows, ServingSettings(max_num_seqs=4, max_num_batched_tokens=32, chunked_prefill=False), pool(note))
    assert seen == [(20, 0), (20, 0), (50, 0)]


def test_separate_batches_never_mix() -> None:
    seen: list[tuple[int, int]] = []

    def note(prompt: int, decodes: int) -> float:
        seen.append((prompt, decodes))
        return 1.0

    rows = draw(1, 30, prompt=50, output=10, gap=2.0)
    done, _ = run(rows, ServingSettings(max_num_seqs=4, max_num_batched_tokens=32, batches="separate"), pool(note))
    assert done.finished == 30 and all(not prompt or not decodes for prompt, decodes in seen)


@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["mixed", "separate"]),
    swap=st.booleans(),
    chunked=st.booleans(),
    pp=st.integers(1, 3),
    gain=st.sampled_from([1.0, 1.7, 3.0]),
    reserve=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    ahead=st.booleans(),
)
# Two prompts in two lanes of a pipeline once undid each other for ever.
@example(seed=153274, mode="separate", swap=False, chunked=True, pp=3, gain=3.0, reserve=0.0, ahead=False)
@settings(max_examples=60, deadline=None)
def test_nothing_is_lost(seed: int, mode: str, swap: bool, chunked: bool, pp: int, gain: float, reserve: float, ahead: bool) -> None:
    rows = draw(seed, 25, prompt=60, output=30, gap=0.03)
    chosen = ServingSettings(
        max_num_seqs=5,
        max_num_batched_tokens=48,
        block_size=4,
        batches=mode,
        preemption="swap" if swap else "recompute",
        chunked_prefill=chunked,
        pp=pp,
        acceptance=gain,
        draft_tokens=2 if gain > 1 else 0,
        admission_reserve=reserve,
        schedule_ahead=ahead,
    )
    simulation = Simulation(requests_of(rows), chosen, pool(linear, blocks=26, pp=pp, dp=2, coupled=True))
    done = simulation()
    assert done.finished + sum(done.refused.values()) == 25
    assert done.kv_peak <= 1.0
    for instance in simulation._decode:
        for replica in instance.replicas:
            assert replica.pool.free == replica.pool.capacity and replica.running == 0
            assert all(lane.decoding == 0 and abs(lane.contexts) < 1e-6 and not lane.running for lane in replica.lanes)


def test_a_request_that_no_replica_can_hold_is_refused_alone() -> None:
    rows = [Request("a", 0.0, 100, 1), Request("b", 0.0, 10, 1), Request("c", 0.0, 500, 1)]
    done, times = run(rows, ServingSettings(max_num_seqs=4, max_num_batched_tokens=512, block_size=10), pool(linear, blocks=5), max_context=200)
    assert list(times) == ["b"] and sorted(done.refused.values()) == [1, 1]


# --- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_request_at_a_time_waits_as_in_m_d_1(load: float) -> None:
    service = 0.01
    requests = open_requests(f"synthetic:poisson:{load / service},prompt=8,output=1,n=40000", seed=3)
    done, _ = run(requests, ServingSettings(max_num_seqs=1, max_num_batched_tokens=8), pool(lambda prompt, decodes: service))
    waited = done.ttft.mean - service
    assert waited == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)
    assert done.sums.busy_s / done.simulated_s == pytest.approx(load, rel=0.02)


def test_little_holds_in_a_closed_loop() -> None:
    requests = open_requests("synthetic:closed:16,prompt=4-40,output=5-25,n=3000", seed=1)
    done, _ = run(requests, ServingSettings(max_num_seqs=8, max_num_batched_tokens=64), pool(linear))
    throughput = done.finished / done.simulated_s
    assert throughput * done.latency.mean == pytest.approx(16, rel=0.01)


def test_decode_alone_takes_the_steps_it_takes() -> None:
    done, times = run([Request("a", 0.5, 10, 9)], ServingSettings(max_num_seqs=1), pool(lambda prompt, decodes: 1.0))
    assert times["a"] == (1.5, 9.5) and done.tpot.mean == 1.0 and done.ttft.mean == 1.0


@pytest.mark.parametrize(("gain", "steps"), [(1.0, 20), (2.0, 10), (2.5, 8), (3.0, 7)])
def test_speculation_divides_the_steps_by_its_gain(gain: float, steps: int) -> None:
    chosen = ServingSettings(max_num_seqs=1, acceptance=gain, draft_tokens=3)
    done, times = run([Request("a", 0.0, 10, 21)], chosen, pool(lambda prompt, decodes: 1.0, draft_s=0.25))
    assert times["a"] == (1.0, 1.0 + 1.25 * steps)


def test_two_stages_serve_two_batches_in_the_time_of_one() -> None:
    rows = [Request("a", 0.0, 8, 101), Request("b", 0.5, 8, 101)]
    one: Callable[[int, int], float] = lambda prompt, decodes: 1.0  # noqa: E731
    _, alone = run(rows[:1], ServingSettings(max_num_seqs=4, max_num_batched_tokens=8), pool(one, pp=2))
    _, both = run(rows, ServingSettings(max_num_seqs=4, max_num_batched_tokens=8), pool(one, pp=2))
    assert alone["a"] == (1.0, 101.0)
    # The second batch follows half a step behind and never waits.
    assert both == {"a": (1.0, 101.0), "b": (1.5, 101.5)}


def test_coupled_replicas_wait_for_the_slowest() -> None:
    rows = [Request("a", 0.0, 10, 5), Request("b", 0.0, 90, 5)]
    time: Callable[[int, int], float] = lambda prompt, decodes: 1.0 + prompt / 10  # noqa: E731
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=128)
    _, apart = run(rows, chosen, pool(time, dp=2))
    _, together = run(rows, chosen, pool(time, dp=2, coupled=True))
    assert apart["a"] == (2.0, 6.0) and apart["b"] == (10.0, 14.0)
    assert together["a"] == together["b"] == (10.0, 14.0)


def test_the_kv_cache_crosses_the_link_once_and_one_after_another() -> None:
    rows = [Request("a", 0.0, 10, 4), Request("b", 0.0, 10, 4)]
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=64)
    one: Callable[[int, int], float] = lambda prompt, decodes: 1.0  # noqa: E731
    done, times = run(rows, chosen, pool(one), prefill=pool(one), transfer_s=lambda tokens: tokens * 0.1)
    assert (done.transfers, done.transfer_s) == (2, 2.0)
    # Both prompts end at 1; transfers take 1 s each: at 2 and 3. a decodes 2-3, then both: 3-4, 4-5, b alone 5-6.
    assert times == {"a": (1.0, 5.0), "b": (1.0, 6.0)}


def test_who_waits_for_room_to_decode_waits_before_or_after_the_prompt() -> None:
    """One request fits where decoding happens: pulled, the second one's first token is early and the wait is between tokens; reserved, the other way round."""
    rows = [Request(str(i), 0.0, 16, 40) for i in range(2)] + [Request("short", 0.0, 16, 1)]
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=64, block_size=4, admission_reserve=1.0)
    runs = {}
    for mode in ("pull", "reserve"):
        prefill = pool(linear, blocks=100, settings=replace(chosen, admission_reserve=0.0))
        done, times = run(rows, replace(chosen, handover=mode), pool(linear, blocks=14), prefill=prefill, transfer_s=lambda tokens: 0.25)
        assert done.finished == 3 and done.preemptions == 0 and done.transfers == 2
        runs[mode] = times
    pulled, reserved = runs["pull"], runs["reserve"]
    assert pulled["1"][0] < pulled["0"][1] and reserved["1"][0] > reserved["0"][1]
    own = reserved["0"][1] - reserved["0"][0]
    assert pulled["0"][1] - pulled["0"][0] == pytest.approx(own)
    assert reserved["1"][1] - reserved["1"][0] == pytest.approx(own) and pulled["1"][1] - pulled["1"][0] > 1.5 * own
    assert reserved["short"][0] == reserved["short"][1] > reserved["0"][1], "it waits its turn, and ends where its prompt was computed"


@given(seed=st.integers(0, 10**6), reserve=st.sampled_from([0.0, 0.3, 1.0]), swap=st.booleans(), mode=st.sampled_from(["pull", "reserve"]))
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_between_prefill_and_decode(seed: int, reserve: float, swap: bool, mode: str) -> None:
    rows = draw(seed, 25, prompt=60, output=12, gap=0.03)
    preemption = "swap" if swap else "recompute"
    chosen = ServingSettings(
        max_num_seqs=6, max_num_batched_tokens=48, block_size=4, preemption=preemption, admission_reserve=reserve, handover=mode, prefill_instances=2
    )
    first = pool(linear, blocks=40, instances=2, settings=replace(chosen, admission_reserve=0.0))
    simulation = Simulation(requests_of(rows), chosen, pool(linear, blocks=26, dp=2, coupled=True), prefill=first, transfer_s=lambda tokens: 1e-3 * tokens)
    done = simulation()
    assert done.finished + sum(done.refused.values()) == 25
    for instance in (*simulation._decode, *simulation._prefill):
        for replica in instance.replicas:
            assert replica.pool.free == replica.pool.capacity and replica.running == 0 and not replica.arriving


def test_batches_chosen_ahead_let_what_comes_wait_for_a_step_more() -> None:
    """Steps of 1 s; `b` comes in the step from 2 to 3: alone it runs in the next one, chosen ahead in the one after; into an idle instance at once."""
    one: Callable[[int, int], float] = lambda prompt, decodes: 1.0  # noqa: E731
    rows = [Request("a", 0.0, 4, 9), Request("b", 2.5, 4, 3), Request("c", 2.75, 4, 3), Request("late", 40.5, 4, 2)]
    chosen = ServingSettings(max_num_seqs=4, max_num_batched_tokens=16)
    (_, now), (_, ahead) = (run(rows, replace(chosen, schedule_ahead=value), pool(one)) for value in (False, True))
    assert now == {"a": (1.0, 9.0), "b": (4.0, 6.0), "c": (4.0, 6.0), "late": (41.5, 42.5)}
    assert ahead == {"a": (1.0, 9.0), "b": (5.0, 7.0), "c": (5.0, 7.0), "late": (41.5, 42.5)}
    # The last step ends at 2: nothing runs that `b` could wait for.
    _, times = run([Request("a", 0.0, 4, 2), Request("b", 1.5, 4, 2)], replace(chosen, schedule_ahead=True), pool(one))
    assert times == {"a": (1.0, 2.0), "b": (3.0, 4.0)}


def test_goodput_counts_what_meets_both_levels() -> None:
    rows = [Request("a", 0.0, 10, 3), Request("b", 0.0, 10, 3), Request("c", 0.0, 10, 3)]
    chosen = ServingSettings(max_num_seqs=1, max_num_batched_tokens=16, slo_ttft_ms=4500, slo_tpot_ms=1000)
    done, _ = run(rows, chosen, pool(lambda prompt, decodes: 1.0))
    assert (done.finished, done.good) == (3, 2)


def test_a_session_goes_on_after_its_pause() -> None:
    rows = [Request("s/0", 1.0, 10, 2, (), Request("s/1", 0.0, 10, 1), 5.0)]
    _, times = run(rows, ServingSettings(max_num_seqs=1), pool(lambda prompt, decodes: 1.0))
    assert times == {"s/0": (2.0, 3.0), "s/1": (9.0, 9.0)}


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(InputError, match="max_num_batched_tokens = 8 must be >= max_num_seqs"):
        ServingSettings(max_num_seqs=9, max_num_batched_tokens=8)
    with pytest.raises(InputError, match=r"acceptance = 2.0 must be <= 1 \+ serving.draft_tokens"):
        ServingSettings(acceptance=2.0)


def test_many_requests_take_no_more_memory_than_those_in_flight() -> None:
    def peak(count: int) -> int:
        requests = open_requests(f"synthetic:poisson:2000,prompt=8,output=1-3,n={count}", seed=1)
        simulation = Simulation(requests, ServingSettings(max_num_seqs=64, max_num_batched_tokens=512), pool(lambda prompt, decodes: 0.01))
        tracemalloc.start()
        assert simulation().finished == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # What is kept of a finished request are three numbers.
    assert peak(10_000) - peak(5_000) < 5_000 * 200


def test_equal_runs_are_equal() -> None:
    first, second = (
        run(draw(5, 60, prompt=50, output=20, gap=0.02), ServingSettings(max_num_seqs=4, max_num_batched_tokens=32), pool(linear, blocks=40))[1]
        for _ in range(2)
    )
    assert first == second


def test_across_lanes_the_older_prompt_goes_first_and_the_younger_waits() -> None:
    replica = Replica(ServingSettings(max_num_seqs=4, max_num_batched_tokens=40, block_size=4, pp=2), blocks=20, id_tokens=0, lanes=2)
    older, younger = Sequence(Request("a", 0.0, 60, 2), 0.0), Sequence(Request("b", 0.0, 41, 2), 0.0)
    for lane, sequence in zip(replica.lanes, (older, younger), strict=True):
        replica.waiting.append(sequence)
        assert replica.schedule(lane).chunks == [(40, 40, sequence)]
    assert replica.pool.free == 0
    assert replica.schedule(replica.lanes[1]).empty and younger.lane is replica.lanes[1] and not replica.preemptions
    assert replica.schedule(replica.lanes[0]).chunks == [(20, 60, older)]
    assert younger.lane is None and replica.waiting[0] is younger and replica.preemptions == 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_planned_steps_change_no_time(seed: int, split: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several instances, with prefill instances or not, few blocks: planning up to the next end and cutting plans gives the times of single steps."""
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = [Request(str(n), float(at), *generator.integers(1, 60, 2).tolist()) for n, at in enumerate(np.cumsum(generator.exponential(3.0, 60)))]
    chosen = ServingSettings(max_num_seqs=6, max_num_batched_tokens=32, block_size=4, prefill_instances=2 * split, sequence_us=1e3, schedule_ahead=ahead)

    def step_s(prompt: int, decodes: int) -> float:
        return 0.1 + 0.01 * prompt + 0.003 * decodes

    def once() -> tuple[ServingRun, Times]:
        more: dict[str, Any] = {"prefill": pool(step_s, blocks=40, instances=2), "transfer_s": lambda tokens: 1e-3 * tokens} if split else {}
        return run(rows, chosen, pool(step_s, blocks=40, instances=3, host_s=0.01), **more)

    planned, times = once()
    monkeypatch.setattr(Instance, "leap", lambda self, flight: None)
    single, expected = once()
    assert planned.step.count == single.step.count == planned.sums.steps and planned.preemptions == single.preemptions
    assert planned.sums.contexts == pytest.approx(single.sums.contexts) and planned.simulated_s == pytest.approx(single.simulated_s)
    assert {name: pytest.approx(both) for name, both in expected.items()} == times
