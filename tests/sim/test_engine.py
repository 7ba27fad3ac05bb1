"""The array engine against the reference engine and closed forms."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest

from moesim.errors import SimulationError
from moesim.sim.engine import Engine, RanksStuck
from moesim.sim.evaluate import Times, evaluate
from moesim.sim.flows import Flow
from moesim.sim.ops import Program
from tests.sim.reference import ReferenceEngine
from tests.sim.scenarios import Scenario, scenario, two_batch_overlap


def drive(case: Scenario, engine: Engine | ReferenceEngine) -> None:
    """Start, cancel and fail what the case says, when it says."""

    def at(time: float, action: Callable[[], object]) -> Generator[Any, Any, None]:
        yield engine.env.timeout(time)
        action()

    for time, flow in case.flows:
        engine.env.process(at(time, partial(engine.start_flow, flow)))
    for time, number in case.cancels:
        engine.env.process(at(time, partial(engine.cancel_flow, case.flows[number][1])))
    for time, rank in case.failures:
        engine.env.process(at(time, partial(engine.fail_rank, rank)))


def run_array(case: Scenario) -> tuple[Times, Engine]:
    engine = Engine(case.program.num_ranks)
    result: list[Times] = []

    def main() -> Generator[Any, Any, None]:
        try:
            result.append((yield from engine.execute(case.program, hooks=case.hooks)))
        except RanksStuck as stuck:
            result.append(stuck.times)

    drive(case, engine)
    engine.env.process(main())
    engine.env.run()
    return result[0], engine


def run_reference(case: Scenario) -> ReferenceEngine:
    engine = ReferenceEngine()
    drive(case, engine)
    engine.env.process(engine.execute(case.program))
    engine.env.run()
    return engine


def compare(seed: int) -> None:
    case, twin = scenario(seed), scenario(seed)
    times, engine = run_array(case)
    reference = run_reference(twin)
    for index, op in enumerate(case.program.ops):
        for rank in range(case.program.num_ranks):
            if op.ranks_R is None or op.ranks_R[rank]:
                assert times.start[index][rank] == pytest.approx(reference.start.get((0, index, rank), inf), abs=1e-9), (seed, index, rank)
                assert times.end[index][rank] == pytest.approx(reference.end.get((0, index, rank), inf), abs=1e-9), (seed, index, rank)
    for (_, flow), (_, other) in zip(case.flows, twin.flows, strict=True):
        assert flow.end_s == pytest.approx(other.end_s, abs=1e-9), (seed, flow.name)
        if flow.end_s < inf:
            assert flow.left_bytes == pytest.approx(other.left_bytes, abs=1e-8), (seed, flow.name)
    assert len(reference.end) == sum(np.isfinite(end).sum() for end in times.end)
    assert bool(engine.stuck) == bool((times.finish == inf).any())


@pytest.mark.parametrize("block", range(6))
def test_array_engine_equals_reference_engine(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(6, 30))
def test_array_engine_equals_reference_engine_on_more_scenarios(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        compare(seed)


def test_scenarios_exercise_contention() -> None:
    """The comparison would prove little if no flow ever slowed an op: at least a third of the cases with flows do."""
    slowed = cases = 0
    for seed in range(80):
        case = scenario(seed)
        if case.flows:
            cases += 1
            alone, shared = evaluate(case.program, 0.0).end, run_array(case)[0].end
            slowed += any((after > before + 1e-9).any() for before, after in zip(alone, shared, strict=True))
    assert cases > 40 and slowed > cases / 3


def test_passes_side_by_side_equal_passes_one_by_one() -> None:
    rng = np.random.Generator(np.random.PCG64(3))
    programs = [two_batch_overlap(rng, 4, 2) for _ in range(5)]
    together = Program(4)
    for index, op in enumerate(programs[0].ops):
        works = [np.stack([p.ops[index].jobs[j].work_s for p in programs]) for j in range(len(op.jobs))]
        if op.group_R is None:
            together.local(op.label, works[0], deps=op.deps)
        else:
            together.collective(op.label, works[0], works[1], group_R=op.group_R, port="scale_up", deps=op.deps)
    finish = evaluate(together, 0.0).finish
    assert finish.tolist() == [float(evaluate(p, 0.0).finish) for p in programs]


def test_delaying_one_op_moves_others_only_through_declared_dependencies() -> None:
    def build(delay: float) -> Program:
        program = Program(3)
        work = np.array([1.0, 1.0, 1.0])
        work[0] += delay
        a = program.local("a", work)
        program.local("beside", np.ones(3), lane="copy", port="host.in")
        program.collective("pair", np.ones(3), np.ones(3), group_R=np.array([0, 0, 1]), port="scale_up", deps=[a])
        return program

    plain, late = evaluate(build(0.0), 0.0), evaluate(build(5.0), 0.0)
    assert (late.end[1] == plain.end[1]).all()
    assert late.end[2].tolist() == [7.0, 7.0, 2.0]


def test_one_straggler_delays_the_receives_of_its_group() -> None:
    program = Program(4)
    a = program.local("experts", np.array([1.0, 1.0, 1.0, 3.0]))
    program.collective("combine", np.full(4, 0.5), np.full(4, 0.25), group_R=np.zeros(4, dtype=int), port="scale_up", deps=[a])
    assert evaluate(program, 0.0).end[1].tolist() == [3.25, 3.25, 3.25, 3.5]


def test_fair_flow_halves_the_port_while_both_run() -> None:
    program = Program(1)
    program.local("load", np.array([2.0]), port="host.in")
    flow = Flow("migration", 1.0, {("host.in", 0): 1.0})
    times, _ = run_array(Scenario(program, [(0.5, flow)]))
    assert flow.end_s == pytest.approx(2.5)
    assert times.end[0][0] == pytest.approx(3.0)


def test_low_flow_waits_for_ops_and_costs_them_nothing() -> None:
    program = Program(1)
    program.local("load", np.array([2.0]), port="host.in")
    flow = Flow("migration", 1.0, {("host.in", 0): 1.0}, "low")
    times, _ = run_array(Scenario(program, [(0.5, flow)]))
    assert [float(times.end[0][0]), flow.end_s] == pytest.approx([2.0, 3.0])


def test_a_pass_without_flows_is_one_evaluation() -> None:
    case = scenario(0)
    case.flows.clear()
    assert run_array(case)[1].evaluations == 1


def test_forward_dependency_is_refused() -> None:
    program = Program(1)
    with pytest.raises(SimulationError, match="cyclic"):
        program.local("a", np.ones(1), deps=[0])


@pytest.mark.parametrize("work", [-1.0, np.nan, np.inf])
def test_impossible_work_is_refused(work: float) -> None:
    with pytest.raises(SimulationError, match="finite and >= 0"):
        Program(1).local("a", np.array([work]))


def test_flow_without_a_path_is_refused() -> None:
    with pytest.raises(SimulationError, match="unreachable"):
        Flow("f", 1.0, {})
