"""The layer program for PuLP and HiGHS, warm-started.

PuLP calls a run that stopped at a limit with an incumbent "Optimal"; only its `sol_status` and the bound that HiGHS
reports are believed here, and the placement is rounded and scored again by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.errors import InfeasibleError
from moesim.solvers.exact import LayerAnswer, LayerModel, LayerSolver, solve_layers, table_of, threads_of
from moesim.solvers.greedy import int_option
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult
from moesim.solvers.search import Deadline

MARGIN = 2e-8
"""Taken off HiGHS' bound (scaled cost, about 1) for its feasibility tolerances of 1e-9."""


def solve_milp(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Solve exactly with PuLP and HiGHS; option `max_nodes` bounds the search tree of a layer."""
    return solve_layers(
        problem, "milp", deadline, layer_solver(seed=seed, threads=threads_of(options), max_nodes=int_option(options or {}, "max_nodes", 100_000, 1, 2**31 - 1))
    )


def layer_solver(*, seed: int, threads: int, max_nodes: int) -> LayerSolver:
    """Return a solver of layer programs; raise InfeasibleError if PuLP or HiGHS is not installed."""
    try:
        import highspy
        import pulp
    except ImportError:
        raise InfeasibleError(
            'solver milp: PuLP and HiGHS are not installed; pip install "moesim[solvers]", or use the solver greedy',
            requirement="an installed solver",
            where="solver milp",
            missing="pulp, highspy",
            relaxation="--solver greedy",
        ) from None

    class WarmHiGHS(pulp.HiGHS):  # type: ignore[misc]
        """PuLP's HiGHS with a start solution."""

        start: list[float]

        def callSolver(self, lp: Any) -> None:
            solution = highspy.HighsSolution()
            solution.col_value = self.start
            lp.solverModel.setSolution(solution)
            super().callSolver(lp)

        def findSolutionValues(self, lp: Any) -> Any:
            try:
                return super().findSolutionValues(lp)
            except KeyError:
                # PuLP does not know HiGHS' status of a run stopped by its node limit; values are assigned by then
                feasible = lp.solverModel.getInfo().primal_solution_status == int(highspy.SolutionStatus.kSolutionStatusFeasible)
                return pulp.LpStatusNotSolved, pulp.LpSolutionIntegerFeasible if feasible else pulp.LpSolutionNoSolutionFound

    def solve(model: LayerModel, seconds: float | None) -> LayerAnswer:
        program, start, copies_on = _program(pulp, model)
        solver = WarmHiGHS(
            msg=False,
            gapRel=0.0,
            gapAbs=1e-8,
            threads=threads,
            timeLimit=seconds,
            random_seed=seed % 2**31,
            mip_max_nodes=max_nodes,
            mip_feasibility_tolerance=1e-9,
            primal_feasibility_tolerance=1e-9,
        )
        solver.start = [start[variable.name] for variable in program.variables()]
        program.solve(solver)
        if program.sol_status == pulp.LpSolutionInfeasible:
            raise InfeasibleError("solver milp: HiGHS finds no placement although one is known; this is a fault of the model")
        info = program.solverModel.getInfo()
        found = None
        if program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible) and all(
            v.varValue is not None for row in copies_on for v in row.values()
        ):
            found = _table(model, copies_on)
        bound = float(info.mip_dual_bound)
        return LayerAnswer(
            table_RC=found,
            bound=bound - MARGIN if np.isfinite(bound) else 0.0,
            proven=program.sol_status == pulp.LpSolutionOptimal,
            steps=max(0, int(info.mip_node_count)),
        )

    return solve


def _table(model: LayerModel, copies_on: list[dict[tuple[int, int], Any]]) -> np.ndarray | None:
    counts = np.zeros((len(model.fill_R), len(copies_on)), dtype=np.int64)
    for expert, variables in enumerate(copies_on):
        for (_, rank), variable in variables.items():
            counts[rank, expert] += round(variable.varValue)
    good = (counts.sum(axis=1) == model.fill_R).all() and (counts.sum(axis=0) >= 1).all() and counts.max() <= model.most_per_rank
    return table_of(counts, model.hint_RC.shape[1]) if good else None


def _program(pulp: Any, model: LayerModel) -> tuple[Any, dict[str, float], list[dict[tuple[int, int], Any]]]:
    """Return the program, the start value of every variable, and the y variables of every expert by (copies, rank)."""
    windows, experts, _ = model.size_KEN.shape
    ranks = range(len(model.fill_R))
    program = pulp.LpProblem("layer", pulp.LpMinimize)
    # PuLP 3.3 moved the making of variables from a class to the problem, and warns about the old way
    make = getattr(program, "add_variable", pulp.LpVariable)
    start: dict[str, float] = {}
    time = [make(f"z_{k}", lowBound=float(model.floor_K[k])) for k in range(windows)]
    program += pulp.lpSum(float(weight) * z for weight, z in zip(model.weight_K, time, strict=True))
    on: list[dict[tuple[int, int], Any]] = []
    load: list[list[list[Any]]] = [[[] for _ in ranks] for _ in range(windows)]
    held = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in model.hint_RC])
    for expert in range(experts):
        count_of = {copies: make(f"n_{expert}_{copies}", cat=pulp.LpBinary) for copies in model.copies[expert]}
        placed = {
            (copies, rank): make(f"y_{expert}_{copies}_{rank}", lowBound=0, upBound=min(copies, model.most_per_rank), cat=pulp.LpInteger)
            for copies in count_of
            for rank in ranks
        }
        program += pulp.lpSum(count_of.values()) == 1
        for copies, chosen in count_of.items():
            program += pulp.lpSum(placed[copies, rank] for rank in ranks) == copies * chosen
            start[chosen.name] = float(held[:, expert].sum() == copies)
            for rank in ranks:
                program += placed[copies, rank] <= min(copies, model.most_per_rank) * chosen
                start[placed[copies, rank].name] = float(held[rank, expert]) * start[chosen.name]
                for k in range(windows):
                    load[k][rank].append(float(model.size_KEN[k, expert, copies - 1]) * placed[copies, rank])
        on.append(placed)
    for rank in ranks:
        program += pulp.lpSum(variable for placed in on for (_, where), variable in placed.items() if where == rank) == int(model.fill_R[rank])
        for k in range(windows):
            program += pulp.lpSum(load[k][rank]) <= float(model.speed_R[rank]) * time[k]
    for first, second in model.rank_kinds():
        total = [pulp.lpSum(float(weight) * pulp.lpSum(load[k][rank]) for k, weight in enumerate(model.weight_K)) for rank in (first, second)]
        program += total[0] >= total[1]
    size = model.sizes_KE(model.hint_RC)
    for k in range(windows):
        start[time[k].name] = float(max(((held * size[k]).sum(axis=1) / model.speed_R).max(), model.floor_K[k]))
    return program, start, on
