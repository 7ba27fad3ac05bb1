"""What a solver answers: a placement, its value, how far from it the best possible can be, and how it stopped.

`value` and `bound` are balances (1.0 is perfect, larger is better): Σ over layers of the mean rank load divided
by Σ of the largest, and a certified upper bound of what any placement of the problem reaches. Under another objective they
are its ideal over the cost reached and over the proven least cost.
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
    frontier: Sequence[FrontierPoint] | None = None
    """What growing budgets buy, if a repair was asked for it."""

    @property
    def risk(self) -> str:
        """Risk measure over windows."""
        return "mean" if self.objective == "balance" else self.objective.removeprefix("robust:")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrontierPoint:
    """The best placement found for a budget of moved slots."""

    slots: int
    """Moved."""
    value: float
    slot_to_expert_LS: np.ndarray


@dataclass(slots=True, kw_only=True)
class ObjectiveResult(PlacementResult):
    """A placement with its cost under an objective; `value` is reference / cost, `bound` reference / `cost_bound`.

    The reference is the ideal of the objective, or `cost_bound` where that is less.
    """

    cost: float
    """In the unit of the only term, or relative to the ideal (1) for a weighted sum; see `moesim.solvers.objective`."""
    cost_bound: float
    """No placement of the problem costs less under an equal split (for latency: if the callable keeps its promise)."""


def objective_name(problem: PlacementProblem, risk: str) -> str:
    """Return the name of the objective under a risk measure, refusing unknown measures."""
    if risk not in ("mean", "worst"):
        metrics.risk_tail(risk)
    return "balance" if problem.num_windows == 1 else f"robust:{risk}"


def cost_weight_KL(problem: PlacementProblem, weight_K: np.ndarray) -> np.ndarray:
    """Return float64 [K, L]: weight of a window's slowest rank in the cost of a layer, so that costs sum to the mean imbalance."""
    ideal = metrics.ideal_KL(problem.load_KLE, problem.speed_R).sum(axis=1)
    per_window = np.divide(weight_K, ideal, out=np.zeros(len(ideal)), where=ideal > 0)
    return np.repeat(per_window[:, None], problem.num_layers, axis=1)


def make_result(
    problem: PlacementProblem,
    slot_to_expert_LS: np.ndarray,
    *,
    solver: str,
    status: str,
    iterations: int = 0,
    risk: str = "mean",
    bound_KL: np.ndarray | None = None,
    cost_bound_L: np.ndarray | None = None,
) -> PlacementResult:
    """Score a placement against the problem's bound and name its status honestly.

    status: what the solver claims; FEASIBLE is raised to OPTIMAL where the gap proves it, OPTIMAL lowered to FEASIBLE where it does not.
    bound_KL: the problem's `layer_bound_KL`, if known. cost_bound_L: proven cost of every layer (see `cost_weight_KL`) under the mean risk.
    """
    table = np.ascontiguousarray(slot_to_expert_LS, dtype=np.int32)
    speed, weight_K = problem.speed_R, problem.weight_K
    peak_KL = metrics.rank_time_KLR(table, problem.slot_rank_S, problem.load_KLE, speed).max(axis=2)
    ideal = metrics.ideal_KL(problem.load_KLE, speed)
    value = metrics.fold_windows(peak_KL, ideal, weight_K, risk)
    lower = layer_bound_KL(problem) if bound_KL is None else bound_KL
    bound = metrics.fold_windows(lower, ideal, weight_K, risk)
    if cost_bound_L is not None and risk == "mean":
        cost = np.maximum(cost_bound_L, (lower * cost_weight_KL(problem, weight_K)).sum(axis=0))
        idle = float(weight_K[ideal.sum(axis=1) == 0].sum())
        bound = min(bound, 1.0 / (float(cost.sum()) + idle))
    assert value <= bound * (1 + 1e-7), f"bound {bound} of {solver} is below its value {value}"
    bound = max(bound, value)
    gap = (bound - value) / bound
    if status in ("FEASIBLE", "OPTIMAL"):
        status = "OPTIMAL" if gap <= OPTIMAL_GAP else "FEASIBLE"
    return PlacementResult(
        slot_to_expert_LS=table, objective=objective_name(problem, risk), value=value, bound=bound, gap=gap, status=status, solver=solver, iterations=iterations
    )


def to_plan(
    result: PlacementResult,
    *,
    model: str,
    num_experts: int,
    moe_layer_ids: Sequence[int],
    num_ranks: int | None = None,
    slots_per_rank_R: np.ndarray | None = None,
    parallel: Parallel | None = None,
    fingerprints: Mapping[str, str] | None = None,
    experts_L: tuple[int, ...] | None = None,
) -> Plan:
    """Wrap a result as a plan document.

    slots_per_rank_R: int [R]; needed where ranks have unequal slots, else S / `num_ranks` each.
    Raises InputError if the slots do not divide by the ranks, or do not sum to those of the placement.
    """
    from moesim import __version__

    slots = result.slot_to_expert_LS.shape[1]
    if slots_per_rank_R is None:
        if not num_ranks or slots % num_ranks:
            raise InputError(describe("plan", "slots", slots, f"must be a multiple of the {num_ranks} ranks", "pass slots_per_rank_R"))
        slots_per_rank_R = np.full(num_ranks, slots // num_ranks)
    num_ranks = len(slots_per_rank_R)
    if int(np.sum(slots_per_rank_R)) != slots:
        raise InputError(describe("plan", "slots_per_rank_R", int(np.sum(slots_per_rank_R)), f"must sum to the {slots} slots of the placement"))
    return Plan(
        model=model,
        num_experts=num_experts,
        moe_layer_ids=tuple(moe_layer_ids),
        slot_to_expert_LS=result.slot_to_expert_LS,
        slot_rank_S=np.repeat(np.arange(num_ranks), slots_per_rank_R),
        num_ranks=num_ranks,
        share_LS=result.share_LS,
        experts_L=experts_L,
        parallel=Parallel(ep=num_ranks, dp=num_ranks) if parallel is None else parallel,
        fingerprints=dict(fingerprints or {}),
        source=f"solver {result.solver}",
        result={
            "objective": result.objective,
            "value": result.value,
            "bound": result.bound,
            "gap": result.gap,
            "status": result.status,
            "solver": result.solver,
            "version": __version__,
        },
    )
