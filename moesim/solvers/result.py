"""What a solver answers: a placement, its value, how far from it the best possible can be, and how it stopped.

`value` and `bound` are balances (1.0 is perfect, larger is better): Σ over layers of the mean rank load divided
by Σ of the largest, and a certified upper bound of what any placement of the problem reaches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.plan import Parallel, Plan
from moesim.solvers import metrics
from moesim.solvers.bounds import layer_bound_KL
from moesim.solvers.problem import PlacementProblem

OPTIMAL_GAP = 1e-6
"""A result may be called OPTIMAL only if its gap is at most this."""


@dataclass(slots=True, kw_only=True)
class PlacementResult:
    """A placement with its proof."""

    slot_to_expert_LS: np.ndarray
    """int32 [L, S]: expert of every slot, -1 where empty."""
    objective: str
    """`balance` for one window; `robust:<risk>` for several."""
    value: float
    """Balance reached under an equal split among replicas."""
    bound: float
    """Certified upper bound of `value` over all placements of the problem."""
    gap: float
    """(bound - value) / bound."""
    status: str
    """OPTIMAL, FEASIBLE, TIME_LIMIT or BASELINE."""
    solver: str
    iterations: int = 0
    """Moves or search steps made."""
    share_LS: np.ndarray | None = None
    """float64 [L, S]: share of its expert's tokens a slot serves; None: equal."""
    frontier: Sequence[tuple[int, float]] | None = None
    """(slots moved, value) pairs, if a repair was asked for them."""

    @property
    def risk(self) -> str:
        """Risk measure over windows."""
        return "mean" if self.objective == "balance" else self.objective.removeprefix("robust:")


def objective_name(problem: PlacementProblem, risk: str) -> str:
    """Return the name of the objective under a risk measure, refusing unknown measures."""
    if risk not in ("mean", "worst"):
        metrics.risk_tail(risk)
    return "balance" if problem.num_windows == 1 else f"robust:{risk}"


def make_result(
    problem: PlacementProblem, slot_to_expert_LS: np.ndarray, *, solver: str, status: str, iterations: int = 0, risk: str = "mean", bound_KL: np.ndarray | None = None,
) -> PlacementResult:
    """Score a placement against the problem's bound (or a tighter per-layer one) and name its status honestly.

    status: what the solver claims; FEASIBLE is raised to OPTIMAL where the gap proves it, OPTIMAL lowered to FEASIBLE where it does not.
    """
    table = np.ascontiguousarray(slot_to_expert_LS, dtype=np.int32)
    speed = problem.speed_R
    time = metrics.rank_time_KLR(table, problem.slot_rank_S, problem.load_KLE, speed)
    ideal = metrics.ideal_KL(problem.load_KLE, speed)
    value = metrics.fold_windows(time.max(axis=2), ideal, problem.window_weight_K, risk)  # type: ignore[arg-type]
    lower = layer_bound_KL(problem) if bound_KL is None else bound_KL
    # a bound may lie below the value by rounding alone
    bound = max(metrics.fold_windows(lower, ideal, problem.window_weight_K, risk), value)  # type: ignore[arg-type]
    gap = (bound - value) / bound
    if status in ("FEASIBLE", "OPTIMAL"):
        status = "OPTIMAL" if gap <= OPTIMAL_GAP else "FEASIBLE"
    return PlacementResult(slot_to_expert_LS=table, objective=objective_name(problem, risk), value=value, bound=bound, gap=gap, status=status, solver=solver, iterations=iterations)


def to_plan(
    result: PlacementResult, *, model: str, num_experts: int, moe_layer_ids: Sequence[int], num_ranks: int, slots_per_rank_R: np.ndarray | None = None,
    parallel: Parallel | None = None, fingerprints: Mapping[str, str] | None = None,
) -> Plan:
    """Wrap a result as a plan document.

    slots_per_rank_R: int [R]; needed where ranks have unequal slots, else S / R each.
    Raises InputError if the slots do not divide by the ranks and no `slots_per_rank_R` says who owns them.
    """
    from moesim import __version__

    slots = result.slot_to_expert_LS.shape[1]
    if slots_per_rank_R is None:
        if slots % num_ranks:
            raise InputError(describe("plan", "slots", slots, f"must be a multiple of the {num_ranks} ranks", "pass slots_per_rank_R"))
        slots_per_rank_R = np.full(num_ranks, slots // num_ranks)
    return Plan(
        model=model, num_experts=num_experts, moe_layer_ids=tuple(moe_layer_ids), slot_to_expert_LS=result.slot_to_expert_LS,
        slot_rank_S=np.repeat(np.arange(num_ranks), slots_per_rank_R), num_ranks=num_ranks, share_LS=result.share_LS,
        parallel=Parallel(ep=num_ranks, dp=num_ranks) if parallel is None else parallel, fingerprints=dict(fingerprints or {}), source=f"solver {result.solver}",
        result={"objective": result.objective, "value": result.value, "bound": result.bound, "gap": result.gap, "status": result.status, "solver": result.solver, "version": __version__},
    )
