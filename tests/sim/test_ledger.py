"""The Ledger: bounded whatever the number of passes, exact where it says so, conserving time."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.report.files import steps_csv
from moesim.sim import ledger as module
from moesim.sim.evaluate import evaluate
from moesim.sim.ledger import Ledger, Sums
from moesim.sim.ops import Program
from moesim.sim.replay import one_pass

RANKS = 3


def program(passes: int, seed: int = 0) -> Program:
    """Compute, exchange, compute; random work per pass and rank."""
    generator = np.random.Generator(np.random.PCG64(seed))
    result = Program(RANKS)
    first = result.local("attention", generator.random((passes, RANKS)), provenance=2)
    sent = result.collective(
        "dispatch", generator.random((passes, RANKS)), generator.random((passes, RANKS)), group_R=np.zeros(RANKS, int), port="up", deps=[first]
    )
    result.local("experts", generator.random((passes, RANKS)), deps=[sent])
    return result


def filled(batches: list[int], keep_passes: int = 4) -> Ledger:
    result, clock, step = Ledger(RANKS, keep_passes=keep_passes), 0.0, 0
    for number, passes in enumerate(batches):
        made = program(passes, number)
        clock = result.record(made, evaluate(made, 0.0), steps=list(range(step, step + passes)), begin_s=clock)
        step += passes
    return result


def test_a_million_passes_stay_bounded() -> None:
    batch = 4096
    made = program(batch)
    times = evaluate(made, 0.0)
    result = Ledger(RANKS)
    tracemalloc.start()
    clock, done = 0.0, 0
    while done < 1_000_000:
        clock = result.record(made, times, steps=list(range(done, done + batch)), begin_s=clock)
        done += batch
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 40e6, "24 B a pass and a table of bounded size"
    assert len(result.step) == done and result.simulated_s == pytest.approx(clock)
    assert result.sums.rows <= module.MAX_BLOCKS and result.sums.block == 32
    assert len(list(result.intervals())) == 16 * 3
    assert steps_csv(result).count("\n") == result.sums.rows + 1
    means = {label: float(np.mean(values)) for label, values in result.breakdown_s().items()}
    assert means == pytest.approx(result.mean_breakdown_s(), rel=1e-3)
    assert sum(result.mean_breakdown_s().values()) == pytest.approx(np.mean(result.duration_s), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_blocks_hold_the_sums_of_their_passes(batches: list[int]) -> None:
    """Against sums over the plain list, with room for 16 rows."""
    generator = np.random.Generator(np.random.PCG64(len(batches)))
    sums, plain = Sums(), []
    before, module.MAX_BLOCKS = module.MAX_BLOCKS, 16
    try:
        for number, passes in enumerate(batches):
            values = generator.random(passes)
            sums.add({"a": values, **({"late": values} if number else {})}, passes)
            plain += values.tolist()
    finally:
        module.MAX_BLOCKS = before
    assert sums.rows <= 16 and sums.block & (sums.block - 1) == 0 and (sums.block == 1 or len(plain) > 16)
    wanted = [np.mean(plain[low : low + sums.block]) for low in range(0, len(plain), sums.block)]
    assert sums.per_pass()["a"] == pytest.approx(np.array(wanted))
    if len(batches) > 1:
        assert (sums.per_pass()["late"] * np.diff([*range(0, len(plain), sums.block), len(plain)])).sum() == pytest.approx(sum(plain[batches[0] :]))


def test_how_passes_are_batched_changes_nothing() -> None:
    made = program(12)
    times = evaluate(made, 0.0)
    whole, single = Ledger(RANKS), Ledger(RANKS)
    whole.record(made, times, steps=list(range(12)), begin_s=0.0)
    clock = 0.0
    for row in range(12):
        part = one_pass(made, row)
        clock = single.record(part, evaluate(part, 0.0), steps=[row], begin_s=clock)
    assert list(single.duration_s) == pytest.approx(list(whole.duration_s), rel=1e-12)
    for left, right in zip(single.intervals(), whole.intervals(), strict=False):
        assert (left.label, left.step) == (right.label, right.step) and left.end_R == pytest.approx(right.end_R)
    parts = single.breakdown_s(), whole.breakdown_s()
    assert set(parts[0]) == set(parts[1]) and all(parts[0][label] == pytest.approx(parts[1][label]) for label in parts[0])
    for name in ("lane_s", "port_s", "label_s"):
        one, other = getattr(single, name), getattr(whole, name)
        assert set(one) == set(other) and all(one[key] == pytest.approx(other[key]) for key in one)


def test_time_is_conserved() -> None:
    result = filled([5, 7, 1])
    elapsed = sum(result.duration_s)
    assert sum(result.mean_breakdown_s().values()) == pytest.approx(elapsed / 13)
    lanes, labels = sum(result.lane_s.values()), sum(result.label_s.values())
    assert np.asarray(lanes) == pytest.approx(np.asarray(labels)), "a lane is taken by its labels and by waiting"
    assert all((value <= elapsed).all() for value in result.lane_s.values())
    assert result.class_s.sum() == pytest.approx(sum(value.sum() for label, value in result.label_s.items() if label != "straggler_wait"))
    assert result.start_s[0] == 0 and np.allclose(np.diff(result.start_s), result.duration_s[:-1])


def test_ports_are_used_when_their_jobs_ran() -> None:
    result = filled([2])
    for interval in result.intervals():
        for port, begin, end in interval.uses:
            assert (begin >= interval.start_R).all() and (end <= interval.end_R).all() and (begin <= end).all()
            if port == "up.in":
                assert interval.gate is not None and begin == pytest.approx(np.broadcast_to(interval.gate, begin.shape))


def test_levels_of_one_moment_add_up_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    result = Ledger(RANKS)
    monkeypatch.setattr(module, "MAX_LEVELS", 3)
    for at in (0.0, 0.0, 1.0, 2.0, 3.0):
        result.set_level("tokens", at, np.ones(RANKS))
    assert [(at, value.tolist()) for at, value in result.levels["tokens"]] == [(0.0, [2, 2, 2]), (1.0, [1, 1, 1]), (2.0, [1, 1, 1])]
