"""Layers with unequally many experts: a problem cut into parts whose layers are alike.

The costs of layers add up, so nothing is lost. A part has the experts of its layers and, of every rank, only the slots that these layers fill
(`PlacementProblem.fill_LR`); the other slots stay empty. Its windows weigh by their share of the ideal, so that its mean imbalance is its
part of the whole. Shapes: K windows, n layers of a part, s slots that they fill.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moesim.solvers import metrics
from moesim.solvers.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Layers of a problem that have equally many experts and fill the same slots of every rank."""

    layers_n: np.ndarray
    """Layers of the whole problem."""
    slots_ns: np.ndarray
    """Slots of the whole that they fill, in the order of the part's own slots."""
    problem: PlacementProblem
    """The same problem for these layers alone."""

    def of(self, table_LS: np.ndarray) -> np.ndarray:
        """Return [n, s]: this part of a placement."""
        return table_LS[self.layers_n[:, None], self.slots_ns]

    def put(self, table_LS: np.ndarray, own_ns: np.ndarray) -> None:
        """Write this part of a placement."""
        table_LS[self.layers_n[:, None], self.slots_ns] = own_ns


def parts_of(problem: PlacementProblem) -> list[Part]:
    """Return the parts of a problem, in order of their first layers; a problem with equal layers is its only part."""
    layers, slots = problem.num_layers, problem.num_slots
    if problem.experts_L is None:
        every = np.broadcast_to(np.arange(slots), (layers, slots))
        return [Part(layers_n=np.arange(layers), slots_ns=every, problem=problem)]
    fill_LR = problem.fill_LR
    kinds: dict[tuple[int, ...], list[int]] = {}
    for layer, (experts, fill_R) in enumerate(zip(problem.experts_L, fill_LR.tolist(), strict=True)):
        kinds.setdefault((experts, *fill_R), []).append(layer)
    if problem.previous is None:
        place_S = np.arange(slots) - np.searchsorted(problem.slot_rank_S, problem.slot_rank_S)
        filled_LS = place_S < fill_LR[:, problem.slot_rank_S]
    else:
        filled_LS = problem.previous >= 0
    ideal_KL = metrics.ideal_KL(problem.load_KLE, problem.speed_R)
    result = []
    for (experts, *fill), rows in kinds.items():
        at = np.array(rows)
        slots_ns = np.stack([np.flatnonzero(filled_LS[layer]) for layer in rows])
        weight_K = problem.weight_K
        if problem.objective.alone == "balance":
            whole_K = ideal_KL.sum(axis=1)
            shared_K = weight_K * np.divide(ideal_KL[:, at].sum(axis=1), whole_K, out=np.zeros(len(whole_K)), where=whole_K > 0)
            weight_K = shared_K if shared_K.sum() > 0 else weight_K
        own = replace(
            problem,
            load_KLE=problem.load_KLE[:, at, :experts],
            slots_per_rank_R=np.array(fill),
            experts_L=None,
            previous=None if problem.previous is None else problem.previous[at[:, None], slots_ns],
            window_weight_K=weight_K,
        )
        result.append(Part(layers_n=at, slots_ns=slots_ns, problem=own))
    return result
