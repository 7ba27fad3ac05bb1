"""The array engine against the reference engine and closed forms."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest

from moesim.errors import SimulationError
from moesim.sim.engine import Engine, RanksStuck
from moesim.sim.evaluate import Times, evaluate
from moesim.sim.flows import Flow, split
from moesim.sim.ops import Job, Op, Program
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


@pytest.mark.parametrize("block", range(4))
def test_array_engine_equals_reference_engine(block: int) -> None:
    for seed in range(block * 50, block * 50 + 50):
        compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4, 30))
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
    assert run_array(Scenario(scenario(0).program, []))[1].evaluations == 1


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


# --- ports, classes, chunks -------------------------------------------------------------------------


def run_flows(*flows: tuple[float, Flow], ops: float = 0.0, ranks: int = 2) -> tuple[Times, Engine]:
    """Run flows beside one op of `ops` seconds on every rank's host.in."""
    program = Program(ranks)
    program.local("load", np.full(ranks, ops), port="host.in")
    return run_array(Scenario(program, list(flows)))


def test_flows_share_a_line_network_by_max_min() -> None:
    """Links of 1 and 2: the long flow gets 1/2, and the short one on the wide link 3/2, not 1."""
    a, b = ("scale_out.out", 0), ("scale_out.in", 1)
    flows = [Flow("long", 100.0, {a: 1.0, b: 2.0}), Flow("first", 5.0, {a: 1.0}), Flow("second", 15.0, {b: 2.0})]
    run_flows(*((0.0, flow) for flow in flows))
    assert [flow.end_s for flow in flows[1:]] == pytest.approx([10.0, 10.0])
    assert flows[0].end_s == pytest.approx(10.0 + 95.0)


def test_a_slow_flow_takes_only_what_it_can_use_from_the_ops() -> None:
    """A flow that a disk holds at 1 of the port's 10 leaves the ops 9/10, not half."""
    flow = Flow("slow", 100.0, {("host.in", 0): 10.0, ("disk.in", 0): 1.0})
    times, _ = run_flows((0.0, flow), ops=9.0)
    assert times.end[0].tolist() == pytest.approx([10.0, 9.0]) and flow.end_s == pytest.approx(100.0)


def test_fifo_flows_pass_a_port_one_after_another() -> None:
    flows = [Flow(str(i), 2.0, {("host.in", 0): 1.0}, "fifo") for i in range(3)]
    run_flows(*((0.1 * i, flow) for i, flow in enumerate(flows)))
    assert [flow.end_s for flow in flows] == pytest.approx([2.0, 4.0, 6.0])


def test_an_urgent_fifo_flow_waits_for_the_chunk_under_way() -> None:
    late = Flow("late", 10.0, {("host.in", 0): 1.0}, "fifo", 1, chunk_bytes=2.0)
    urgent = Flow("urgent", 3.0, {("host.in", 0): 1.0}, "fifo")
    run_flows((0.0, late), (2.5, urgent))
    assert [urgent.end_s, late.end_s] == pytest.approx([7.0, 13.0])
    whole = Flow("whole", 10.0, {("host.in", 0): 1.0}, "fifo", 1)
    urgent = Flow("urgent", 3.0, {("host.in", 0): 1.0}, "fifo")
    run_flows((0.0, whole), (2.5, urgent))
    assert [whole.end_s, urgent.end_s] == pytest.approx([10.0, 13.0])


def test_later_classes_get_what_is_left() -> None:
    a, b = ("scale_out.out", 0), ("scale_out.in", 1)
    first, second = Flow("first", 10.0, {a: 1.0, b: 3.0}), Flow("second", 20.0, {b: 3.0}, priority=1)
    run_flows((0.0, first), (0.0, second))
    assert [first.end_s, second.end_s] == pytest.approx([10.0, 10.0])


@pytest.mark.parametrize(("when", "left", "end"), [(2.5, 6.0, 4.0), (4.0, 6.0, 4.0), (9.5, 0.0, 10.0)])
def test_cancelling_takes_effect_at_the_next_chunk_border(when: float, left: float, end: float) -> None:
    """The last chunk cannot be stopped: the flow arrives."""
    flow = Flow("flow", 10.0, {("host.in", 0): 1.0}, chunk_bytes=2.0)
    case = Scenario(Program(1), [(0.0, flow)], [(when, 0)])
    case.program.local("gemm", np.ones(1))
    run_array(case)
    assert (flow.left_bytes, flow.end_s) == pytest.approx((left, end))
    assert flow.done.triggered == (left == 0) and flow.gone.triggered


def test_a_cut_flow_carries_the_same_bytes_over_the_same_time() -> None:
    engine = Engine(1)
    flow = Flow("flow", 10.0, {("host.in", 0): 1.0}, chunk_bytes=3.0)
    ends: list[float] = []

    def main() -> Generator[Any, Any, None]:
        engine.start_flow(flow)
        yield engine.env.timeout(4.0)
        rest = engine.split_flow(flow)
        assert rest is not None and rest.total_bytes == pytest.approx(4.0)
        yield flow.done
        ends.append(engine.now)
        yield engine.start_flow(rest)
        ends.append(engine.now)

    engine.env.process(main())
    engine.env.run()
    assert ends == pytest.approx([6.0, 10.0])


@pytest.mark.parametrize(("parts", "sizes"), [(1, [10.0]), (3, [3.0, 4.0, 3.0]), (20, None)])
def test_split_flows_carry_what_the_whole_would(parts: int, sizes: list[float] | None) -> None:
    pieces = split(Flow("flow", 10.0, {("host.in", 0): 1.0}, chunk_bytes=1.0), parts)
    assert sum(piece.total_bytes for piece in pieces) == pytest.approx(10.0)
    assert all(piece.total_bytes % 1.0 == 0 for piece in pieces)
    assert sizes is None or [piece.total_bytes for piece in pieces] == sizes


def test_a_flow_reaches_its_own_share_of_a_port_that_it_uses_badly() -> None:
    """Ten of one flow take twice the time of the port that the other's take: equal rates of 1/3 · 10."""
    port = ("host.in", 0)
    good, bad = Flow("good", 100.0, {port: 10.0}), Flow("bad", 100.0, {port: 5.0})
    run_flows((0.0, good), (0.0, bad))
    assert [good.end_s, bad.end_s] == pytest.approx([30.0, 30.0])


def test_ports_in_different_units_are_refused() -> None:
    flows = [(0.0, Flow("bytes", 1e9, {("host.in", 0): 55e9})), (0.0, Flow("seconds", 1.0, {("host.in", 0): 1.0}))]
    with pytest.raises(SimulationError, match="must be of the size of the others"):
        run_flows(*flows)


def test_a_low_flow_makes_no_program_evaluate_again() -> None:
    flows = [(0.1 * i, Flow(f"low{i}", 0.2, {("scale_out.out", 0): 1.0}, "low")) for i in range(1, 6)]
    assert run_array(Scenario(scenario(0).program, flows))[1].evaluations <= 2


def test_a_flow_that_takes_the_place_of_another_makes_no_program_evaluate_again() -> None:
    program = Program(1)
    program.local("load", np.full(1, 10.0), port="host.in")
    engine = Engine(1)
    result: list[Times] = []

    def migrate() -> Generator[Any, Any, None]:
        for number in range(20):
            yield engine.start_flow(Flow(str(number), 1.0, {("host.in", 0): 2.0}))

    def serve() -> Generator[Any, Any, None]:
        result.append((yield from engine.execute(program)))

    engine.env.process(migrate())
    engine.env.process(serve())
    engine.env.run()
    assert result[0].end[0].tolist() == pytest.approx([20.0]) and engine.evaluations <= 3


# --- failures, hooks --------------------------------------------------------------------------------


def test_a_failed_rank_leaves_its_group_stuck_and_says_who() -> None:
    program = Program(4)
    gemm = program.local("gemm", np.array([1.0, 1.0, 1.0, 5.0]))
    program.collective("dispatch", np.ones(4), np.ones(4), group_R=np.array([0, 1, 1, 0]), port="scale_up", deps=[gemm])
    engine = Engine(4)
    caught: list[RanksStuck] = []

    def main() -> Generator[Any, Any, None]:
        try:
            yield from engine.execute(program)
        except RanksStuck as stuck:
            caught.append(stuck)
            assert engine.now == pytest.approx(3.0)

    def failure() -> Generator[Any, Any, None]:
        yield engine.env.timeout(3.0)
        engine.fail_rank(3)

    engine.env.process(main())
    engine.env.process(failure())
    engine.env.run()
    assert caught[0].ranks == (0, 3) and caught[0].failed == (3,) and caught[0].labels == ("dispatch", "gemm")
    assert caught[0].times.end[1].tolist() == [inf, 2.0, 2.0, inf]
    assert engine.stuck == caught and "ranks 0, 3 are stuck in dispatch, gemm because ranks 3 have failed" in str(caught[0])
    engine.restore_ranks()
    engine.env.process(main())
    engine.env.run()
    assert len(caught) == 1


def test_a_flow_of_a_failed_rank_is_lost() -> None:
    flow = Flow("kv", 10.0, {("scale_out.out", 0): 1.0, ("scale_out.in", 1): 1.0})
    case = Scenario(Program(2), [(0.0, flow)], [], [(2.0, 1)])
    case.program.local("gemm", np.ones(2))
    run_array(case)
    assert flow.lost and flow.end_s == inf and not flow.done.triggered and flow.left_bytes == pytest.approx(8.0)


def test_scenarios_exercise_everything() -> None:
    """The comparison would prove little if hooks, failures, cancels, interference and waiting were not among the cases."""
    cases = [scenario(seed) for seed in range(300)]
    assert sum(case.hooks == "reached" for case in cases) > 20 and sum(bool(case.failures) for case in cases) > 30
    assert sum(bool(case.cancels) for case in cases) > 60 and sum(any(op.sm_share for op in case.program.ops) for case in cases) > 60
    assert sum(sum(flow.discipline == "fifo" for _, flow in case.flows) > 1 for case in cases) > 60
    assert sum(bool(run_array(scenario(seed))[1].stuck) for seed in range(60)) > 5


def test_hooks_on_the_clock_see_what_flows_have_done_to_it() -> None:
    """A gate that a flow delays from 1 s to 2 s: asked ahead, the hook hears 1 s; asked when reached, 2 s."""

    def build(asked: list[float]) -> Program:
        program = Program(1)
        gate = program.local("gate", np.ones(1), port="host.in")

        def hook(ready: np.ndarray) -> np.ndarray:
            asked.append(float(ready[0]))
            return np.zeros(1)

        program.local("load", np.zeros(1), lane="copy", port="host.in", deps=[gate], decide=hook)
        return program

    ahead: list[float] = []
    reached: list[float] = []
    for asked, hooks in ((ahead, "ahead"), (reached, "reached")):
        flow = Flow("flow", 100.0, {("host.in", 0): 1.0})
        run_array(Scenario(build(asked), [(0.0, flow)], hooks=hooks))  # type: ignore[arg-type]
    assert ahead == pytest.approx([1.0]) or ahead == pytest.approx([2.0])
    assert reached == pytest.approx([2.0])


def test_hooks_beside_interference_are_asked_on_the_clock_only() -> None:
    program = Program(1)
    program.add(Op(label="send", lane="comm", jobs=(Job(port="scale_up.out", work_s=np.ones(1)),), sm_share=0.5))
    program.local("gemm", np.zeros(1), decide=lambda ready: np.ones(1))
    with pytest.raises(SimulationError, match="hooks='reached'"):
        evaluate(program, 0.0)
    times, _ = run_array(Scenario(program, [], hooks="reached"))
    assert times.end[1].tolist() == pytest.approx([1.5])


def test_interference_of_a_long_overlapped_pass_settles_in_two_rounds() -> None:
    rng = np.random.Generator(np.random.PCG64(1))
    program = two_batch_overlap(rng, 8, 60)
    program.ops = [replace(op, sm_share=0.15) if op.group_R is not None else op for op in program.ops]
    alone = Program(8)
    alone.ops = [replace(op, sm_share=0.0) for op in program.ops]
    slowed, free = evaluate(program, 0.0), evaluate(alone, 0.0)
    assert float(free.finish) < float(slowed.finish) <= float(free.finish) / 0.85
    again = evaluate(program, 0.0)
    assert all((a == b).all() for a, b in zip(slowed.end, again.end, strict=True))
