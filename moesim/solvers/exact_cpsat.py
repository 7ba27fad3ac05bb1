"""The layer program for OR-Tools CP-SAT, hinted.

CP-SAT counts in integers: loads become multiples of 2⁻³⁰ of the layer's ideal time, window weights of 2⁻²⁴, rounded
down. Rounding down only relaxes the program, so its bound stays a bound; the caller scores the placement in full precision.
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

UNITS = 2**30
WEIGHT_UNITS = 2**24


def solve_cpsat(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """Solve exactly with OR-Tools CP-SAT; option `max_effort` bounds the deterministic work on a layer."""
    return solve_layers(
        problem, "cp-sat", deadline, layer_solver(seed=seed, threads=threads_of(options), max_effort=int_option(options or {}, "max_effort", 60, 1, 10**6))
    )


def layer_solver(*, seed: int, threads: int, max_effort: int) -> LayerSolver:
    """Return a solver of layer programs; raise InfeasibleError if OR-Tools is not installed."""
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise InfeasibleError(
            'solver cp-sat: OR-Tools is not installed; pip install "moesim[solvers]", or use the solver greedy',
            requirement="an installed solver",
            where="solver cp-sat",
            missing="ortools",
            relaxation="--solver greedy",
        ) from None

    def solve(model: LayerModel, seconds: float | None) -> LayerAnswer:
        program = cp_model.CpModel()
        windows, experts, _ = model.size_KEN.shape
        ranks = range(len(model.fill_R))
        held = np.stack([np.bincount(row[row >= 0], minlength=experts) for row in model.hint_RC])
        load: list[list[list]] = [[[] for _ in ranks] for _ in range(windows)]
        on: list[dict] = []
        for expert in range(experts):
            count_of = {copies: program.new_bool_var(f"n_{expert}_{copies}") for copies in model.copies[expert]}
            placed = {
                (copies, rank): program.new_int_var(0, min(copies, model.most_per_rank), f"y_{expert}_{copies}_{rank}") for copies in count_of for rank in ranks
            }
            program.add_exactly_one(count_of.values())
            for copies, chosen in count_of.items():
                program.add(sum(placed[copies, rank] for rank in ranks) == copies * chosen)
                hinted = held[:, expert].sum() == copies
                program.add_hint(chosen, bool(hinted))
                for rank in ranks:
                    program.add(placed[copies, rank] <= min(copies, model.most_per_rank) * chosen)
                    program.add_hint(placed[copies, rank], int(held[rank, expert]) if hinted else 0)
                    for k in range(windows):
                        # floor: the relaxed side
                        load[k][rank].append(int(model.size_KEN[k, expert, copies - 1] / model.speed_R[rank] * UNITS) * placed[copies, rank])
            on.append(placed)
        whole_KE = (model.size_KEN * np.arange(1, model.size_KEN.shape[2] + 1)).max(axis=2)
        top = int(4 * max(float(whole_KE.sum(axis=1).max()), 1.0) / float(model.speed_R.min()) * UNITS)
        time = [program.new_int_var(int(model.floor_K[k] * UNITS * (1 - 1e-9)), top, f"z_{k}") for k in range(windows)]
        for rank in ranks:
            program.add(sum(variable for placed in on for (_, where), variable in placed.items() if where == rank) == int(model.fill_R[rank]))
            for k in range(windows):
                program.add(sum(load[k][rank]) <= time[k])
        for first, second in model.rank_kinds():
            program.add(sum(load[0][first]) >= sum(load[0][second]))
        weights = [1] if windows == 1 else [int(weight * WEIGHT_UNITS) for weight in model.weight_K]
        program.minimize(sum(weight * z for weight, z in zip(weights, time, strict=True)))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers = threads
        solver.parameters.random_seed = seed % 2**31
        solver.parameters.max_deterministic_time = float(max_effort)
        if seconds is not None:
            solver.parameters.max_time_in_seconds = seconds
        status = solver.solve(program)
        if status == cp_model.INFEASIBLE or status == cp_model.MODEL_INVALID:
            raise InfeasibleError("solver cp-sat: finds no placement although one is known; this is a fault of the model")
        found = None
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            counts = np.zeros((len(model.fill_R), experts), dtype=np.int64)
            for expert, placed in enumerate(on):
                for (_, rank), variable in placed.items():
                    counts[rank, expert] += solver.value(variable)
            found = table_of(counts, model.hint_RC.shape[1])
        scale = UNITS * (1 if windows == 1 else WEIGHT_UNITS)
        return LayerAnswer(table_RC=found, bound=solver.best_objective_bound / scale, proven=status == cp_model.OPTIMAL, steps=int(solver.num_branches))

    return solve
