"""The exact split: one small linear program per layer, handed to HiGHS in memory.

minimise Σ_k α_k z_k, such that fractions f of an expert's pairs sum to 1 and base_kr + Σ load_ke f <= speed_r z_k on every rank.
Only experts on several ranks have columns, only their ranks have rows. HiGHS's duals are not believed: they become a
certificate whose bound numpy computes again. Shapes: K windows, L layers, R ranks, P pairs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import InfeasibleError, InputError, describe
from moesim.solvers.dispatch_core import PLACE, DispatchResult, Replicas, make_dispatch, set_dual_KLR, window_scale_K

NEGLIGIBLE = 1e-9
"""Experts below this share of the mean load per speed in every window are split equally; HiGHS drops such coefficients."""
SLACK = 1e-9
"""Room on top of the optimum that the second program gets: HiGHS meets rows to 1e-9 only."""
MAX_COLUMNS = 1 << 21


def highs() -> tuple[Any, Any]:
    """Return the module highspy and a silent solver; raise InputError if HiGHS is not installed."""
    try:
        import highspy
    except ImportError:
        raise InputError(f'{PLACE} lp: HiGHS is not installed; pip install "moesim[solvers]", or use the method fast') from None
    solver = highspy.Highs()
    settings = {"output_flag": False, "threads": 1, "random_seed": 0, "primal_feasibility_tolerance": 1e-9, "dual_feasibility_tolerance": 1e-9}
    for key, value in settings.items():
        solver.setOptionValue(key, value)
    return highspy, solver


def run_lp(
    module: Any,
    solver: Any,
    *,
    cost: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    row_lower: np.ndarray,
    row_upper: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    value: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise cost · x over the given bounds, with coefficients by (row, column); return x and the row duals.

    Raises InfeasibleError if HiGHS does not prove an optimum.
    """
    order = np.lexsort((row, column))
    program = module.HighsLp()
    program.num_col_, program.num_row_ = cost.size, row_lower.size
    program.col_cost_, program.col_lower_, program.col_upper_ = cost, lower, upper
    program.row_lower_, program.row_upper_ = row_lower, row_upper
    matrix = program.a_matrix_
    matrix.format_ = module.MatrixFormat.kColwise
    matrix.start_ = np.searchsorted(column[order], np.arange(cost.size + 1)).astype(np.int32)
    matrix.index_, matrix.value_ = row[order].astype(np.int32), value[order]
    program.a_matrix_ = matrix
    solver.clearSolver()
    solver.passModel(program)
    solver.run()
    if solver.getModelStatus() != module.HighsModelStatus.kOptimal:
        stopped = solver.modelStatusToString(solver.getModelStatus())
        raise InfeasibleError(f"{PLACE} lp: HiGHS stopped with {stopped!r} on a program that has an optimum; this is a fault of the model")
    solution = solver.getSolution()
    return np.array(solution.col_value), np.array(solution.row_dual)


def solve_lp(replicas: Replicas, load: np.ndarray, *, window_weight_K: np.ndarray | None = None, gentle: bool = True) -> DispatchResult:
    """Split every expert's tokens so that the slowest rank of every layer is as fast as the placement allows.

    load: float [L, E] or [K, L, E], tokens >= 0; several windows share one split that minimises their weighted mean.
    window_weight_K: float [K] >= 0, importance of every window; None: all equal. gentle: of the best splits take one that moves
    the fewest tokens from the equal split, which ages better than any corner of the program; False saves the second program.
    Raises InputError if a value is out of range or HiGHS is not installed.
    """
    load_KLE = replicas.checked_load(load)
    scale_K = window_scale_K(load_KLE, window_weight_K)
    module, solver = highs()
    share = replicas.equal_P.copy()
    windows = len(load_KLE)
    dual_KLR = np.zeros((windows, replicas.num_layers, replicas.num_ranks))
    edges = np.searchsorted(replicas.key_P, np.arange(replicas.num_layers + 1) * replicas.num_experts)
    iterations = 0
    for layer in range(replicas.num_layers):
        here = slice(int(edges[layer]), int(edges[layer + 1]))
        share[here], dual_KLR[:, layer], steps = _layer(module, solver, replicas, load_KLE[:, layer], scale_K, layer, here, gentle)
        iterations += steps
    if windows == 1:
        dual_KLR = set_dual_KLR(replicas, load_KLE[0], dual_KLR[0])
    return make_dispatch(replicas, load_KLE, scale_K, share, dual_KLR, solver="dispatch-lp", status="FEASIBLE", iterations=iterations)


def _layer(
    module: Any, solver: Any, replicas: Replicas, load_KE: np.ndarray, scale_K: np.ndarray, layer: int, here: slice, gentle: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the shares of the layer's pairs, its certificate [K, R] and the simplex iterations."""
    speed, windows, ranks = replicas.speed_R, len(load_KE), replicas.num_ranks
    expert_P, rank_P = replicas.key_P[here] - layer * replicas.num_experts, replicas.place_P[here] - layer * ranks
    share = replicas.equal_P[here].copy()
    flat = np.repeat(scale_K[:, None] / speed.sum(), ranks, axis=1)
    total = load_KE.sum(axis=1)
    scaled = load_KE * speed.sum() / np.where(total > 0, total, 1.0)[:, None]
    weight = scale_K * total
    if weight.sum() <= 0:
        return share, flat, 0
    decide = (replicas.ranks_LE[layer] > 1) & (scaled[weight > 0].max(axis=0) > NEGLIGIBLE * speed.min())
    free = np.flatnonzero(decide[expert_P])
    base_KR = np.stack([np.bincount(rank_P, weights=np.where(decide[expert_P], 0.0, row[expert_P] * share), minlength=ranks) for row in scaled])
    rows, rank_row = np.unique(rank_P[free], return_inverse=True)
    fractions, group = np.unique(expert_P[free], return_inverse=True)
    columns = free.size + windows
    if columns * windows > MAX_COLUMNS:
        raise InputError(describe(PLACE, "windows x slots to decide", columns * windows, f"must be <= {MAX_COLUMNS}", "merge windows"))
    k = np.repeat(np.arange(windows), free.size)
    at = np.tile(np.arange(free.size), windows)
    size = scaled[k, expert_P[free][at]]
    some = size > 1e-9
    load_row, sum_row, floors = (k * rows.size + rank_row[at])[some], windows * rows.size + group, -base_KR[:, rows].ravel()
    infinite = module.kHighsInf
    x, dual = run_lp(
        module,
        solver,
        cost=np.concatenate([np.zeros(free.size), weight / weight.sum()]),
        lower=np.concatenate([np.zeros(free.size), (base_KR / speed).max(axis=1)]),
        upper=np.full(columns, infinite),
        row_lower=np.concatenate([np.full(windows * rows.size, -infinite), np.ones(fractions.size)]),
        row_upper=np.concatenate([floors, np.ones(fractions.size)]),
        row=np.concatenate([load_row, np.arange(windows * rows.size), sum_row]),
        column=np.concatenate([at[some], free.size + np.repeat(np.arange(windows), rows.size), np.arange(free.size)]),
        value=np.concatenate([size[some], -np.tile(speed[rows], windows), np.ones(free.size)]),
    )
    iterations = int(solver.getInfo().simplex_iteration_count)
    certificate = _certificate(base_KR, rows, -dual[: windows * rows.size].reshape(windows, -1), speed, weight / weight.sum(), scale_K)
    share[free] = x[: free.size]
    if gentle and free.size:
        # second program: keep the slowest times, move as few tokens from the equal split as possible (up and down columns per pair)
        equal = replicas.equal_P[here][free]
        held = np.bincount((k * rows.size + rank_row[at]), weights=size * equal[at], minlength=windows * rows.size)
        limit = floors - held + np.repeat(x[free.size :], rows.size) * np.tile(speed[rows], windows) * (1 + SLACK)
        moved = (weight / weight.sum()) @ scaled[:, expert_P[free]] + NEGLIGIBLE
        y, _ = run_lp(
            module,
            solver,
            cost=np.concatenate([moved, moved]),
            lower=np.zeros(2 * free.size),
            upper=np.concatenate([1.0 - equal, equal]),
            row_lower=np.concatenate([np.full(windows * rows.size, -infinite), np.zeros(fractions.size)]),
            row_upper=np.concatenate([limit, np.zeros(fractions.size)]),
            row=np.concatenate([load_row, load_row, sum_row, sum_row]),
            column=np.concatenate([at[some], at[some] + free.size, np.arange(2 * free.size)]),
            value=np.concatenate([size[some], -size[some], np.ones(free.size), -np.ones(free.size)]),
        )
        iterations += int(solver.getInfo().simplex_iteration_count)
        share[free] = equal + y[: free.size] - y[free.size :]
    return share, certificate, max(0, iterations)


def _certificate(base_KR: np.ndarray, rows: np.ndarray, dual_KR: np.ndarray, speed: np.ndarray, weight_K: np.ndarray, scale_K: np.ndarray) -> np.ndarray:
    """Return [K, R]: row duals, completed by the floor of z (the rank whose fixed load is largest) and scaled to the windows' weights."""
    result = np.zeros(base_KR.shape)
    result[:, rows] = np.maximum(dual_KR, 0.0)
    missing = np.maximum(weight_K - result @ speed, 0.0)
    fullest = (base_KR / speed).argmax(axis=1)
    result[np.arange(len(result)), fullest] += missing / speed[fullest]
    norm = result @ speed
    return np.where(norm[:, None] > 0, result * (scale_K / np.where(norm > 0, norm, 1.0))[:, None], scale_K[:, None] / speed.sum())
