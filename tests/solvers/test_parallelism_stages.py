"""Pipeline stages: the dynamic program is exact, and the quick test of fitting agrees with it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.solvers.parallelism.stages import StageProblem, fits_N, least_overflow, partition, partition_ilp


@st.composite
def problems(draw: st.DrawFn, max_layers: int = 7) -> StageProblem:
    layers = draw(st.integers(1, max_layers))
    stages = draw(st.integers(1, min(layers, 4)))
    numbers = st.integers(0, 9)

    def table(rows: int, columns: int) -> np.ndarray:
        return np.array(draw(st.lists(numbers, min_size=rows * columns, max_size=rows * columns)), dtype=np.float64).reshape(rows, columns)

    alike = draw(st.booleans())
    time, memory = table(stages, layers), 100 * table(stages, layers)
    if alike:
        time, memory = np.repeat(time[:1], stages, axis=0), np.repeat(memory[:1], stages, axis=0)
    return StageProblem(
        time_SL=time,
        time_extra_S=table(1, stages)[0],
        memory_SL=memory,
        memory_extra_S=100 * table(1, stages)[0],
        capacity_S=100.0 * draw(st.integers(5, 40)) * np.ones(stages),
    )


def brute(problem: StageProblem) -> tuple[float | None, float]:
    """Return the least bottleneck among the cuts that fit, and the least overflow among all cuts."""
    stages, layers = problem.time_SL.shape
    best, overflow = None, float("inf")
    for cut in itertools.combinations(range(1, layers), stages - 1):
        bounds = (0, *cut, layers)
        time = [problem.time_SL[s, bounds[s] : bounds[s + 1]].sum() + problem.time_extra_S[s] for s in range(stages)]
        over = [problem.memory_SL[s, bounds[s] : bounds[s + 1]].sum() + problem.memory_extra_S[s] - problem.capacity_S[s] for s in range(stages)]
        overflow = min(overflow, max(over))
        if max(over) <= 1.0:
            best = max(time) if best is None else min(best, max(time))
    return best, overflow


@given(problems())
@settings(max_examples=150, deadline=None)
def test_dynamic_program_equals_brute_force(problem: StageProblem) -> None:
    best, overflow = brute(problem)
    found = partition(problem)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.bottleneck_s == best
        assert found.bounds[0] == 0 and found.bounds[-1] == problem.time_SL.shape[1] and all(np.diff(found.bounds) > 0)
        times = [problem.time_SL[s, a:b].sum() + problem.time_extra_S[s] for s, (a, b) in enumerate(itertools.pairwise(found.bounds))]
        assert max(times) == found.bottleneck_s
    assert least_overflow(problem)[0] == pytest.approx(overflow)


@given(problems())
@settings(max_examples=150, deadline=None)
def test_quick_test_of_fitting_equals_brute_force(problem: StageProblem) -> None:
    same = StageProblem(
        time_SL=problem.time_SL,
        time_extra_S=problem.time_extra_S,
        memory_SL=np.repeat(problem.memory_SL[:1], len(problem.time_SL), axis=0),
        memory_extra_S=problem.memory_extra_S,
        capacity_S=problem.capacity_S,
    )
    fits = fits_N(same.memory_SL[:1], extra_NS=same.memory_extra_S[None], capacity=float(same.capacity_S[0]))
    assert bool(fits[0]) == (brute(same)[0] is not None)


def test_integer_program_equals_dynamic_program() -> None:
    pytest.importorskip("pulp")
    pytest.importorskip("highspy")
    generator = np.random.Generator(np.random.PCG64(3))
    answers = []
    for case in range(12):
        layers, stages = int(generator.integers(3, 9)), int(generator.integers(1, 4))
        problem = StageProblem(
            time_SL=generator.integers(1, 20, (stages, layers)).astype(float),
            time_extra_S=generator.integers(0, 9, stages).astype(float),
            memory_SL=generator.integers(100, 900, (stages, layers)).astype(float),
            memory_extra_S=np.zeros(stages),
            capacity_S=np.full(stages, 4000.0 if case % 2 else 1500.0),
        )
        found = partition(problem)
        answer = partition_ilp(problem)
        answers.append(answer)
        assert answer == (None if found is None else pytest.approx(found.bottleneck_s))
    assert any(one is None for one in answers) and any(one is not None for one in answers)


def test_slow_stage_gets_fewer_layers() -> None:
    problem = StageProblem(
        time_SL=np.array([[1.0] * 9, [2.0] * 9]), time_extra_S=np.zeros(2), memory_SL=np.zeros((2, 9)), memory_extra_S=np.zeros(2), capacity_S=np.zeros(2)
    )
    found = partition(problem)
    assert found is not None and found.bounds == (0, 6, 9) and found.bottleneck_s == 6.0


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match="every stage has a layer"):
        StageProblem(time_SL=np.ones((3, 2)), time_extra_S=np.ones(3), memory_SL=np.ones((3, 2)), memory_extra_S=np.ones(3), capacity_S=np.ones(3))
