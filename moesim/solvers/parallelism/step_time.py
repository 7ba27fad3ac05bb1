"""Times of the planner's micro-batches: the shared step model on the batches of a workload, held above what peak rates allow (`floors`).

Shapes: n sizes of a micro-batch, L layers. Seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from moesim.costs import footprint
from moesim.costs.group import Group
from moesim.costs.group_loads import Placement
from moesim.costs.step import PARTS, Batch, Costs, PassTimes, StepModel
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism.floors import Floors
from moesim.solvers.parallelism.workload import Workload

__all__ = ["PARTS", "CostsFactory", "PassTimes", "StepTimer"]

CostsFactory = Callable[[Cluster, MoEModel], Costs]


class StepTimer(StepModel):
    """The step model of one workload."""

    def __init__(self, model: MoEModel, cluster: Cluster, workload: Workload, costs: Costs, placement: Placement) -> None:
        super().__init__(model, cluster, costs, workload.assign_LE(model), placement)
        self.workload = workload
        self.calls = 0
        """Group and phase pairs that were evaluated."""
        self.clamped = 0
        """Layer times that a floor has raised."""
        self.floors = Floors(model, cluster, workload)

    def floor(self, group: Group, phase: str, sequences_n: np.ndarray) -> PassTimes:
        """Return the least times that peak rates allow; no cost model is asked."""
        return self._once(("floor", group, phase, sequences_n.tobytes()), lambda: self._floor(group, phase, sequences_n))

    def __call__(self, group: Group, phase: str, sequences_n: np.ndarray) -> PassTimes:
        """Return the times of micro-batches with `sequences_n` sequences on every attention replica; phase: `prefill` (whole prompts) or `decode`."""
        return self._once(("pass", group, phase, sequences_n.tobytes()), lambda: self._evaluate(group, phase, sequences_n))

    def handover_s(self, tp: int, pp: int) -> float:
        """Return the seconds in which the devices of a prefill instance, side by side, hand one prompt's KV cache to the decode pool."""
        nbytes = footprint.kv_L(self.model, tp, self.workload.prompt_tokens).sum() / pp
        nodes = 2 if self.cluster.num_nodes > 1 else 1
        return float(self._seconds(("handover", tp, pp), lambda: self.costs.p2p(np.array([nbytes]), nodes=nodes))[0])

    def _floor(self, group: Group, phase: str, sequences: np.ndarray) -> PassTimes:
        layers, last = self.floors(group, phase, sequences, self.loads(group))
        zero = np.zeros(len(sequences))
        return PassTimes(layer_nL=layers, first_n=zero, last_n=last, hop_n=(zero, zero))

    def _evaluate(self, group: Group, phase: str, sequences: np.ndarray) -> PassTimes:
        self.calls += 1
        each, context = (self.workload.prompt_tokens, self.workload.prompt_tokens) if phase == "prefill" else (1, self.workload.decode_context)
        found = self.times(group, Batch.of(phase, sequences, float(each), float(context)))
        floor = self.floor(group, phase, sequences)
        self.clamped += int((floor.layer_nL > found.layer_nL).sum() + (floor.last_n > found.last_n).sum())
        raised = np.maximum(found.layer_nL, floor.layer_nL)
        raised_last = np.maximum(found.last_n, floor.last_n)
        parts = found.parts | {"floor": (raised - found.layer_nL).sum(axis=1) + raised_last - found.last_n}
        return replace(found, layer_nL=raised, last_n=raised_last, parts=parts)
