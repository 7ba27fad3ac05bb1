"""Pipeline schedules against closed forms: bubbles, activations in flight, every Unit once, no stage waits for good."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, SimulationError
from moesim.sim.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, Schedule, Unit, schedule

SIZES = [(p, m) for p in range(1, 9) for m in range(1, 17)]


def cases() -> list[tuple[str, int, int, int]]:
    """Every size up to 8 stages and 16 micro-batches that a schedule has."""
    found = [(name, p, m, 1) for name in ("forward", "gpipe", "1f1b") for p, m in SIZES]
    found += [("interleaved", p, m, v) for p, m in SIZES for v in (1, 2, 3) if m % p == 0]
    return found + [("dualpipe", p, m, 1) for p, m in SIZES if p % 2 == 0 and m % 2 == 0 and m >= 2 * p]


def finish(order: Schedule, seconds: dict[str, float], pair: float = 0.0) -> tuple[float, list[float]]:
    """Return when the last stage ends, and the work of every stage, if messages take no time: each Step starts when its stage and inputs are there."""
    end: dict[Unit, float] = {}
    free, work = [0.0] * order.num_stages, [0.0] * order.num_stages
    for stage, step in order.in_order():
        begin = max([free[stage], *(end[need] for unit in step for need in order.needs(unit))])
        took = pair if len(step) == 2 else seconds[step[0].kind]
        free[stage] = begin + took
        work[stage] += took
        for unit in step:
            end[unit] = free[stage]
            if unit.kind == BACKWARD:
                end[Unit(INPUTS, unit.micro, unit.chunk)] = free[stage]
    return max(free), work


@pytest.mark.parametrize(("name", "stages", "micro", "virtual"), cases())
def test_every_unit_once_on_its_stage_and_no_deadlock(name: str, stages: int, micro: int, virtual: int) -> None:
    order = schedule(name, stages=stages, micro_batches=micro, virtual=virtual)
    seen = Counter(unit for _, step in order.in_order() for unit in step)
    assert max(seen.values()) == 1
    chunks = stages * virtual
    for number in range(micro):
        for chunk in range(chunks):
            whole, parts = Unit(BACKWARD, number, chunk), (Unit(INPUTS, number, chunk), Unit(WEIGHTS, number, chunk))
            assert seen[Unit(FORWARD, number, chunk)] == 1
            assert seen[whole] + seen[parts[0]] == (name != "forward") and seen[parts[0]] == seen[parts[1]]
    for stage, steps in enumerate(order.orders):
        for step in steps:
            for unit in step:
                assert order.stage_of(unit.chunk, unit.micro) == stage and unit.chunk in order.chunks_of(stage)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(data=st.data())
def test_bubble_is_p_minus_1_forwards_and_backwards(name: str, data: st.DataObject) -> None:
    p = data.draw(st.integers(1, 8))
    m = data.draw(st.integers(p, 16))
    f, b = data.draw(st.floats(0.1, 10)), data.draw(st.floats(0.1, 10))
    total, work = finish(schedule(name, stages=p, micro_batches=m), {FORWARD: f, BACKWARD: b})
    assert max(work) == pytest.approx(m * (f + b))
    assert total - max(work) == pytest.approx((p - 1) * (f + b), abs=1e-9)


@given(p=st.integers(1, 8), groups=st.integers(1, 2), v=st.integers(1, 4), f=st.floats(0.1, 10), ratio=st.sampled_from([1.0, 2.0, 3.0]))
def test_interleaving_divides_the_bubble(p: int, groups: int, v: int, f: float, ratio: float) -> None:
    order = schedule("interleaved", stages=p, micro_batches=p * groups, virtual=v)
    total, work = finish(order, {FORWARD: f / v, BACKWARD: ratio * f / v})
    assert total - max(work) == pytest.approx((p - 1) * (1 + ratio) * f / v, abs=1e-9)


def test_interleaving_one_chunk_is_1f1b() -> None:
    assert schedule("interleaved", stages=4, micro_batches=8).orders == schedule("1f1b", stages=4, micro_batches=8).orders


@pytest.mark.parametrize("p", [2, 4, 6, 8])
@pytest.mark.parametrize("pair", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("more", [0, 2, 6])
def test_dualpipe_has_the_published_bubble(p: int, pair: float, more: int) -> None:
    """(p/2 - 1)(F&B + B - 3W), as DeepSeek-V3 reports it, where forward, input and weight gradients take as long as each other."""
    order = schedule("dualpipe", stages=p, micro_batches=2 * p + more)
    total, work = finish(order, {FORWARD: 1.0, BACKWARD: 2.0, INPUTS: 1.0, WEIGHTS: 1.0}, pair)
    assert total - min(work) == pytest.approx((p / 2 - 1) * (pair + 2.0 - 3.0), abs=1e-9)


@given(p=st.sampled_from([2, 4, 6, 8]), f=st.floats(0.5, 2), i=st.floats(0.5, 2), w=st.floats(0.2, 2), overlap=st.floats(0.6, 1.0))
def test_dualpipe_beats_1f1b(p: int, f: float, i: float, w: float, overlap: float) -> None:
    m = 2 * p
    bound = max(f, i + w)
    pair = max(bound, overlap * (f + i + w))
    dual, _ = finish(schedule("dualpipe", stages=p, micro_batches=m), {FORWARD: f, BACKWARD: i + w, INPUTS: i, WEIGHTS: w}, pair)
    plain, _ = finish(schedule("1f1b", stages=p, micro_batches=m), {FORWARD: f, BACKWARD: i + w})
    assert dual <= plain + 1e-9


@given(p=st.integers(1, 8), m=st.integers(1, 16))
def test_activations_in_flight(p: int, m: int) -> None:
    plain, all_first = schedule("1f1b", stages=p, micro_batches=m), schedule("gpipe", stages=p, micro_batches=m)
    for stage in range(p):
        assert plain.peak_in_flight(stage) == min(m, p - stage)
        assert all_first.peak_in_flight(stage) == m
    if p % 2 == 0 and m % 2 == 0 and m >= 2 * p:
        dual = schedule("dualpipe", stages=p, micro_batches=m)
        assert {dual.peak_in_flight(stage) for stage in range(p)} == {p + 1}


def test_forward_fills_and_drains() -> None:
    total, work = finish(schedule("forward", stages=4, micro_batches=6), {FORWARD: 1.0})
    assert (total, work) == (9.0, [6.0] * 4)


def test_stages_that_wait_for_each_other_are_an_error() -> None:
    good = schedule("1f1b", stages=2, micro_batches=1)
    wrong = Schedule(name="1f1b", num_stages=2, num_chunks=2, num_micro=1, orders=(good.orders[0][::-1], good.orders[1]))
    with pytest.raises(SimulationError, match="wait for each other"):
        list(wrong.in_order())


@pytest.mark.parametrize(
    ("name", "stages", "micro", "virtual", "what"),
    [
        ("zigzag", 2, 2, 1, "must be one of"),
        ("1f1b", 2, 2, 2, "use interleaved"),
        ("interleaved", 4, 6, 2, "multiple of the 4 stages"),
        ("dualpipe", 3, 8, 1, "must be even"),
        ("dualpipe", 4, 6, 1, "at least twice"),
    ],
)
def test_sizes_that_a_schedule_lacks_are_refused(name: str, stages: int, micro: int, virtual: int, what: str) -> None:
    with pytest.raises(InputError, match=what):
        schedule(name, stages=stages, micro_batches=micro, virtual=virtual)
