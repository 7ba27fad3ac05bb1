"""The published integer programs, as small oracles and baselines: ExFlow's, and MoETuner's two.

ExFlow (Yao et al., arXiv 2401.08383): one binary per expert and rank, one hop variable per transition; tokens with the
same pair of experts share a variable here, weighted by their number. MoETuner (Go and Mahajan, arXiv 2502.06643): cluster the
experts of every layer by load, then name the clusters for the least tail of traffic. PuLP and HiGHS are imported when called.
Neither scales: the linear relaxation is near 0 (every expert 1/G everywhere). A run that stops early is never OPTIMAL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity.problem import AffinityProblem
from moesim.solvers.affinity.result import AffinityResult, contiguous_LE
from moesim.solvers.affinity.solve import hops_result
from moesim.solvers.affinity.transport import one_hot_nEG

MAX_VARIABLES = 200_000
MARGIN = 1e-7
"""Taken off HiGHS' bound for its tolerances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramAnswer:
    """How a program ended."""

    proven: bool
    """The solver finished and proved its optimum."""
    bound: float
    """Lower bound on the objective; -inf: none."""
    values: dict[str, float] | None
    """Value of every variable by name; None: no solution was found."""


def solve_exflow_ilp(problem: AffinityProblem, *, seconds: float = 60.0, threads: int = 1) -> AffinityResult:
    """Minimise hops by ExFlow's program; TIME_LIMIT with the contiguous placement if none was found in time.

    Raises InputError if PuLP or HiGHS is missing, the program is too large, hop costs differ, or there is a load cap.
    """
    hops, table = problem.hop_GG, problem.transitions_LEE
    layers, experts, ranks = problem.num_layers, problem.num_experts, problem.num_ranks
    if problem.load_slack is not None or len(np.unique(hops[~np.eye(ranks, dtype=bool)])) > 1:
        raise InputError(describe("exflow-ilp", "problem", "nodes or a load cap", "is not what the published program states", "use solve_hops"))
    used = np.argwhere(table > 0)
    _check_size("exflow-ilp", layers * experts * ranks + len(used))
    pulp = _import_pulp("exflow-ilp")
    program = pulp.LpProblem("exflow", pulp.LpMinimize)
    make = getattr(program, "add_variable", pulp.LpVariable)
    on = [[[make(f"x_{layer}_{expert}_{rank}", cat=pulp.LpBinary) for rank in range(ranks)] for expert in range(experts)] for layer in range(layers)]
    hop = [make(f"r_{index}", lowBound=0, upBound=1) for index in range(len(used))]
    program += pulp.lpSum(float(table[tuple(where)]) * one for where, one in zip(used, hop, strict=True))
    for rows in on:
        for row in rows:
            program += pulp.lpSum(row) == 1
        for rank in range(ranks):
            program += pulp.lpSum(row[rank] for row in rows) == problem.per_rank
    for (layer, one, other), variable in zip(used.tolist(), hop, strict=True):
        for rank in range(ranks):
            program += variable >= on[layer][one][rank] - on[layer + 1][other][rank]
            program += variable >= on[layer + 1][other][rank] - on[layer][one][rank]
    answer = _run(pulp, program, seconds, threads)
    group = contiguous_LE(layers, experts, ranks)
    if answer.values is not None:
        group = np.array([[int(np.argmax([answer.values[one.name] for one in row])) for row in rows] for rows in on])
    unit = float(hops.max()) if ranks > 1 else 1.0
    bound = max(0.0, answer.bound) * unit * (1 - MARGIN)
    return hops_result(problem, group, solver="exflow-ilp", status="FEASIBLE" if answer.proven else "TIME_LIMIT", cost_bound=bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoETunerAnswer:
    """MoETuner's placement with the objectives of its two programs."""

    result: AffinityResult
    """The placement, scored by hops like all others."""
    load_deviation: float
    """Σ over layers and clusters of |load - mean load|."""
    tail: float
    """Σ over layer pairs of the largest traffic between two ranks."""
    proven: bool
    """Both programs were solved to the end."""


def solve_moetuner_ilp(problem: AffinityProblem, *, seconds: float = 60.0, threads: int = 1) -> MoETunerAnswer:
    """Cluster by load, then name clusters for the least tail of traffic; equal clusters, equal bandwidths.

    seconds: for every one of the L + 1 programs. Raises InputError if PuLP or HiGHS is missing or a program is too large.
    """
    layers, ranks = problem.num_layers, problem.num_ranks
    _check_size("moetuner-ilp", (layers - 1) * (1 + ranks * ranks) + layers * ranks * ranks)
    pulp = _import_pulp("moetuner-ilp")
    clusters, done = [], []
    for load in problem.load_LE:
        row, proven = _cluster(pulp, load, ranks, seconds, threads)
        clusters.append(row)
        done.append(proven)
    cluster_LE = np.stack(clusters)
    held = one_hot_nEG(cluster_LE, ranks)
    traffic = np.matmul(held[:-1].transpose(0, 2, 1), np.matmul(problem.transitions_LEE, held[1:]))
    label_LC, proven = _name(pulp, traffic, seconds, threads)
    group = np.take_along_axis(label_LC, cluster_LE, axis=1)
    everything = proven and all(done)
    spread = np.einsum("lec,le->lc", held, problem.load_LE)
    return MoETunerAnswer(
        result=hops_result(problem, group, solver="moetuner-ilp", status="BASELINE" if everything else "TIME_LIMIT"),
        load_deviation=float(np.abs(spread - spread.mean(axis=1, keepdims=True)).sum()),
        tail=tail_of(traffic, label_LC),
        proven=everything,
    )


def tail_of(traffic_LCC: np.ndarray, label_LC: np.ndarray) -> float:
    """Return Σ over layer pairs of the largest traffic between clusters on different ranks."""
    apart = label_LC[:-1, :, None] != label_LC[1:, None, :]
    return float(np.where(apart, traffic_LCC, 0.0).max(axis=(1, 2)).sum())


def _cluster(pulp: Any, load_E: np.ndarray, ranks: int, seconds: float, threads: int) -> tuple[np.ndarray, bool]:
    """Return the cluster of every expert, and whether it is a proven optimum; contiguous if none was found."""
    experts = len(load_E)
    program = pulp.LpProblem("cluster", pulp.LpMinimize)
    make = getattr(program, "add_variable", pulp.LpVariable)
    on = [[make(f"x_{expert}_{rank}", cat=pulp.LpBinary) for rank in range(ranks)] for expert in range(experts)]
    deviation = [make(f"d_{rank}", lowBound=0) for rank in range(ranks)]
    scale = float(load_E.sum()) or 1.0
    program += pulp.lpSum(deviation)
    for row in on:
        program += pulp.lpSum(row) == 1
    for rank in range(ranks):
        program += pulp.lpSum(row[rank] for row in on) == experts // ranks
        total = pulp.lpSum(float(load) / scale * row[rank] for load, row in zip(load_E, on, strict=True))
        program += deviation[rank] >= total - 1.0 / ranks
        program += deviation[rank] >= 1.0 / ranks - total
    answer = _run(pulp, program, seconds, threads)
    if answer.values is None:
        return np.arange(experts) // (experts // ranks), False
    return np.array([int(np.argmax([answer.values[one.name] for one in row])) for row in on]), answer.proven


def _name(pulp: Any, traffic_LCC: np.ndarray, seconds: float, threads: int) -> tuple[np.ndarray, bool]:
    """Return int64 [L, C]: the rank of every cluster for the least tail, and whether it is proven."""
    layers, ranks = len(traffic_LCC) + 1, traffic_LCC.shape[1]
    program = pulp.LpProblem("name", pulp.LpMinimize)
    make = getattr(program, "add_variable", pulp.LpVariable)
    on = [[[make(f"y_{layer}_{cluster}_{rank}", cat=pulp.LpBinary) for rank in range(ranks)] for cluster in range(ranks)] for layer in range(layers)]
    tail = [make(f"z_{layer}", lowBound=0) for layer in range(layers - 1)]
    scale = float(traffic_LCC.max()) or 1.0
    program += pulp.lpSum(tail)
    for rows in on:
        for index in range(ranks):
            program += pulp.lpSum(rows[index]) == 1
            program += pulp.lpSum(row[index] for row in rows) == 1
    for layer, weights in enumerate(traffic_LCC / scale):
        for one in range(ranks):
            for other in range(ranks):
                # summed over the ranks other than that of the first cluster, so one row per pair of ends suffices
                for rank in range(ranks):
                    program += tail[layer] >= float(weights[one, other]) * (on[layer][one][rank] - on[layer + 1][other][rank])
    answer = _run(pulp, program, seconds, threads)
    if answer.values is None:
        return np.tile(np.arange(ranks), (layers, 1)), False
    return np.array([[int(np.argmax([answer.values[one.name] for one in row])) for row in rows] for rows in on]), answer.proven


def _import_pulp(name: str) -> Any:
    try:
        import highspy  # noqa: F401
        import pulp
    except ImportError:
        raise InputError(f'{name}: PuLP and HiGHS are not installed; pip install "moesim[solvers]", or use the method descent') from None
    return pulp


def _check_size(name: str, variables: int) -> None:
    if variables > MAX_VARIABLES:
        raise InputError(
            describe(name, "variables", variables, f"must be <= {MAX_VARIABLES}", "this program is an oracle for small cases; use the method descent")
        )


def _run(pulp: Any, program: Any, seconds: float, threads: int) -> ProgramAnswer:
    """Solve to optimality or the time limit, and believe HiGHS' own status only."""
    import highspy

    program.solve(pulp.HiGHS(msg=False, timeLimit=seconds, threads=threads, gapRel=0.0))
    solver = program.solverModel
    proven = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    info = solver.getInfo()
    feasible = info.primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
    variables = program.variables()
    values = {one.name: float(one.varValue) for one in variables} if feasible and all(one.varValue is not None for one in variables) else None
    bound = float(info.mip_dual_bound)
    return ProgramAnswer(proven=proven and values is not None, bound=bound if np.isfinite(bound) else -np.inf, values=values)
