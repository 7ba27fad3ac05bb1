"""What affinity planning answers: a placement with its value, a certified bound, and the execution it is meant for.

`value` and `bound` are shares, larger is better, as in the other solvers: 1 minus the cost relative to every transition
(or choice) taking the dearest way. `cost` is the same in its own unit: hop cost per transition, or ranks per token and layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from moesim.balance import balance_of
from moesim.solvers.affinity.problem import rank_load_LG
from moesim.solvers.affinity.transport import tables_nGC
from moesim.solvers.result import OPTIMAL_GAP, PlacementResult

HOPS = "inter_layer_hops"
FANOUT = "token_fanout"
APPLIES_TO = {
    HOPS: "context-coherent execution: a token stays on the rank of its last expert, as every rank can continue every token",
    FANOUT: "attention data parallelism with dispatch and combine in every layer: a token returns to its home rank after every layer",
}
"""Objective → the execution whose traffic it is."""


@dataclass(slots=True, kw_only=True)
class AffinityResult(PlacementResult):
    """A placement made for affinity, with its proof."""

    applies_to: str
    """The execution whose traffic the objective is."""
    cost: float
    """Hop cost per transition, or cost of reaching ranks per token and layer; smaller is better."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Parts of the cost, and the balance of the load planned on."""


def make_affinity_result(
    objective: str,
    group_LE: np.ndarray,
    *,
    ranks: int,
    load_LE: np.ndarray,
    cost: float,
    cost_bound: float,
    worst: float,
    status: str,
    solver: str,
    iterations: int = 0,
    metrics: Mapping[str, float] | None = None,
) -> AffinityResult:
    """Wrap a placement; FEASIBLE becomes OPTIMAL where the gap proves it, and OPTIMAL without proof becomes FEASIBLE.

    cost, cost_bound, worst: cost reached, proven lower bound, and cost of the dearest way, all in one unit.
    """
    assert cost_bound <= cost * (1 + 1e-9) + 1e-12, f"bound {cost_bound} of {solver} is above its cost {cost}"
    value = 1.0 - cost / worst if worst > 0 else 1.0
    bound = max(value, 1.0 - cost_bound / worst if worst > 0 else 1.0)
    gap = (bound - value) / bound if bound > 0 else 0.0
    if status in ("FEASIBLE", "OPTIMAL"):
        status = "OPTIMAL" if gap <= OPTIMAL_GAP else "FEASIBLE"
    balance = balance_of(rank_load_LG(group_LE, load_LE, ranks))
    return AffinityResult(
        slot_to_expert_LS=tables_nGC(group_LE, ranks).reshape(len(group_LE), -1).astype(np.int32),
        objective=objective,
        value=value,
        bound=bound,
        gap=gap,
        status=status,
        solver=solver,
        iterations=iterations,
        applies_to=APPLIES_TO[objective],
        cost=cost,
        metrics={**(metrics or {}), "balance": balance.mean_over_max},
    )


def group_of(result: PlacementResult, ranks: int) -> np.ndarray:
    """Return int64 [L, E]: the rank of every expert in a placement without copies."""
    table = result.slot_to_expert_LS.astype(np.int64)
    group = np.empty_like(table)
    np.put_along_axis(group, table, np.broadcast_to(np.arange(table.shape[1]) // (table.shape[1] // ranks), table.shape), axis=1)
    return group


def contiguous_LE(layers: int, experts: int, ranks: int) -> np.ndarray:
    """Return int64 [L, E]: experts dealt to ranks in blocks, as engines do without a plan."""
    return np.tile(np.arange(experts) // (experts // ranks), (layers, 1))
