"""Pipeline stages: contiguous ranges of layers over stages of any speed, so that the slowest stage is as fast as can be and every stage fits.

Dynamic programming over (stage, layers placed), exact; `partition_ilp` states the same problem for PuLP and HiGHS and serves as an oracle.
Shapes: S stages, L layers. Every stage has at least one layer. Seconds and bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InfeasibleError, InputError, describe

BYTE = 1.0
"""Bytes of slack in comparisons of sums."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageProblem:
    """Times and sizes of every layer on every stage."""

    time_SL: np.ndarray
    """float64 [S, L]: seconds of a layer on a stage."""
    time_extra_S: np.ndarray
    """float64 [S]: seconds of a stage beside its layers (embedding, head, transfer)."""
    memory_SL: np.ndarray
    """float64 [S, L]: bytes of a layer on one device of a stage."""
    memory_extra_S: np.ndarray
    """float64 [S]: bytes of a stage beside its layers."""
    capacity_S: np.ndarray
    """float64 [S]: bytes that a device of a stage has."""

    def __post_init__(self) -> None:
        stages, layers = self.time_SL.shape
        if not 1 <= stages <= layers:
            raise InputError(describe("stages", "number", stages, f"must be in 1..{layers}: every stage has a layer"))
        if self.memory_SL.shape != (stages, layers) or any(one.shape != (stages,) for one in (self.time_extra_S, self.memory_extra_S, self.capacity_S)):
            raise InputError(f"stages: all arrays must have {stages} stages and {layers} layers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Where the stages begin and end."""

    bounds: tuple[int, ...]
    """S + 1 layer indices: stage s holds layers bounds[s] … bounds[s + 1] - 1."""
    bottleneck_s: float
    """Seconds of the slowest stage."""


def partition(problem: StageProblem) -> Partition | None:
    """Return the partition with the least bottleneck, or None if no partition fits; of equal ones that with the earliest bounds."""
    stages, layers = problem.time_SL.shape
    time_SP, memory_SP = _prefix(problem.time_SL), _prefix(problem.memory_SL)
    best = np.full(layers + 1, np.inf)
    best[0] = 0.0
    earlier = np.arange(layers + 1)[:, None] < np.arange(layers + 1)
    chosen = np.zeros((stages, layers + 1), dtype=np.int64)
    for stage in range(stages):
        time = time_SP[stage] - time_SP[stage][:, None] + problem.time_extra_S[stage]
        memory = memory_SP[stage] - memory_SP[stage][:, None] + problem.memory_extra_S[stage]
        cost = np.where(earlier & (memory <= problem.capacity_S[stage] + BYTE), np.maximum(best[:, None], time), np.inf)
        chosen[stage] = cost.argmin(axis=0)
        best = cost.min(axis=0)
    if not np.isfinite(best[layers]):
        return None
    bounds = [layers]
    for stage in range(stages - 1, -1, -1):
        bounds.append(int(chosen[stage, bounds[-1]]))
    return Partition(bounds=tuple(reversed(bounds)), bottleneck_s=float(best[layers]))


def least_overflow(problem: StageProblem) -> tuple[float, Partition]:
    """Return the fewest bytes that the worst stage lacks over all partitions (<= 0: one fits), and that partition."""
    free = np.full(len(problem.capacity_S), np.inf)
    # The least bottleneck of bytes above the capacity; shifted so that it is not negative.
    shift = float(problem.capacity_S.max())
    found = partition(
        StageProblem(
            time_SL=problem.memory_SL,
            time_extra_S=problem.memory_extra_S - problem.capacity_S + shift,
            memory_SL=problem.memory_SL,
            memory_extra_S=problem.memory_extra_S,
            capacity_S=free,
        )
    )
    assert found is not None
    return found.bottleneck_s - shift, found


def fits_N(memory_NL: np.ndarray, *, extra_NS: np.ndarray, capacity: float) -> np.ndarray:
    """Return bool [N]: does any partition of N cases over equal stages fit? Filling every stage from the left is exact for this question."""
    cases, layers = memory_NL.shape
    stages = extra_NS.shape[1]
    prefix = np.concatenate([np.zeros((cases, 1)), np.cumsum(memory_NL, axis=1)], axis=1)
    at, good = np.zeros(cases, dtype=np.int64), np.ones(cases, dtype=bool)
    rows = np.arange(cases)
    for stage in range(stages):
        # Later stages need a layer each.
        most = layers - (stages - 1 - stage)
        limit = prefix[rows, at] + capacity + BYTE - extra_NS[:, stage]
        reach = np.minimum((prefix <= limit[:, None]).sum(axis=1) - 1, most)
        good &= reach > at
        at = np.maximum(reach, np.minimum(at + 1, most))
    return good & (at == layers)


def partition_ilp(problem: StageProblem, *, time_limit_s: float | None = None) -> float | None:
    """Return the least bottleneck by integer programming (None: infeasible); small cases only, an oracle for `partition`.

    Raises InputError if PuLP or HiGHS is not installed, InfeasibleError if the limit stops it without a proof.
    """
    try:
        import highspy  # noqa: F401
        import pulp
    except ImportError:
        raise InputError('stages: PuLP and HiGHS are not installed; pip install "moesim[solvers]", or use the dynamic program') from None
    stages, layers = problem.time_SL.shape
    program = pulp.LpProblem("stages", pulp.LpMinimize)
    # PuLP 3.3 moved the making of variables from a class to the problem, and warns about the old way
    make = getattr(program, "add_variable", pulp.LpVariable)
    scale = float(problem.time_SL.max() + problem.time_extra_S.max()) or 1.0
    slowest = make("z", lowBound=0)
    on = [[make(f"x_{layer}_{stage}", cat=pulp.LpBinary) for stage in range(stages)] for layer in range(layers)]
    program += slowest
    for layer in range(layers):
        program += pulp.lpSum(on[layer]) == 1
        if layer:
            # A later layer is never on an earlier stage: ranges are contiguous.
            program += pulp.lpSum(s * on[layer][s] for s in range(stages)) >= pulp.lpSum(s * on[layer - 1][s] for s in range(stages))
    byte_scale = float(max(problem.memory_SL.max(), 1.0))
    for s in range(stages):
        program += pulp.lpSum(on[layer][s] for layer in range(layers)) >= 1
        program += pulp.lpSum(float(problem.time_SL[s, k] / scale) * on[k][s] for k in range(layers)) + float(problem.time_extra_S[s] / scale) <= slowest
        room = float((problem.capacity_S[s] - problem.memory_extra_S[s]) / byte_scale)
        if np.isfinite(room):
            program += pulp.lpSum(float(problem.memory_SL[s, k] / byte_scale) * on[k][s] for k in range(layers)) <= room
    program.solve(pulp.HiGHS(msg=False, gapRel=0.0, threads=1, timeLimit=time_limit_s))
    if program.sol_status == pulp.LpSolutionInfeasible:
        return None
    if program.sol_status != pulp.LpSolutionOptimal:
        raise InfeasibleError("stages: the integer program was stopped before it had a proof; raise its time limit, or use the dynamic program")
    where = [max(range(stages), key=lambda s: on[layer][s].varValue) for layer in range(layers)]
    return max(sum(float(problem.time_SL[s, k]) for k in range(layers) if where[k] == s) + float(problem.time_extra_S[s]) for s in range(stages))


def _prefix(values_SL: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(values_SL), 1)), np.cumsum(values_SL, axis=1)], axis=1)
