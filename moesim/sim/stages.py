"""Which ranks run which layers: pipeline stages of a plan on a cluster.

Stage s is ranks s·R … (s+1)·R-1; each is an expert-parallel group of the plan's R ranks. The layers of the model are cut into chunks, one a
stage unless the schedule says otherwise. Placement of experts is by layer, so the slots of a layer live on the ranks of its stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, PlanError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.schedules import Schedule, schedule
from moesim.sim.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """Layers and ranks of the stages of one deployment."""

    order: Schedule
    ranks: int
    """R, ranks of a stage."""
    layers: tuple[range, ...]
    """Chunk → layers of the model."""

    @property
    def count(self) -> int:
        """p, the number of stages."""
        return self.order.num_stages

    @property
    def num_ranks(self) -> int:
        """Ranks of all stages."""
        return self.count * self.ranks

    def columns(self, stage: int) -> slice:
        """Return the ranks of `stage`."""
        return slice(stage * self.ranks, (stage + 1) * self.ranks)

    def mask_R(self, stage: int) -> np.ndarray | None:
        """Return bool [all ranks], those of `stage`; None if there is no other stage."""
        if self.count == 1:
            return None
        return np.arange(self.num_ranks) // self.ranks == stage

    def layers_of(self, stage: int) -> tuple[int, ...]:
        """Return the layers whose weights `stage` holds, ascending."""
        return tuple(layer for chunk in self.order.chunks_of(stage) for layer in self.layers[chunk])

    def holds(self, stage: int, chunk: int) -> bool:
        """Whether `stage` holds the weights of `chunk`; the first one has the embedding, the last (-1) the head."""
        return chunk % self.order.num_chunks in self.order.chunks_of(stage)


def stages_of(cluster: Cluster, model: MoEModel, plan: Plan, settings: Settings) -> Stages:
    """Return the stages of `plan`. Raises PlanError if they do not fit the cluster, InputError if the settings do not fit the plan."""
    count, wanted = plan.parallel.pp, settings.pipeline
    if plan.num_ranks * count != cluster.num_ranks:
        what = f"must equal the {cluster.num_ranks} devices of {cluster.name}" + (f" over its {count} pipeline stages" if count > 1 else "")
        raise PlanError(describe(plan.source, "num_ranks", plan.num_ranks, what, "solve for this hardware, or name the hardware of the plan"))
    devices = cluster.devices_per_node
    if plan.num_ranks % devices and devices % plan.num_ranks:
        raise PlanError(describe(plan.source, "num_ranks", plan.num_ranks, f"must divide, or be a multiple of, the {devices} devices of a node in every stage"))
    if wanted.stages not in (1, count):
        raise InputError(describe("--set", "pipeline.stages", wanted.stages, f"must be 1 or the plan's parallel.pp, {count}", "leave it out"))
    if count == 1 and not wanted.train and (wanted.micro_batches or wanted.layers):
        raise InputError(describe("--set", "pipeline", wanted.micro_batches or wanted.layers, "needs pipeline stages or training", "add pipeline.stages=P"))
    if count > 1 and settings.micro_batches > 1:
        rule = "must be 1 with pipeline stages: their micro-batches are not cut again"
        raise InputError(describe("--set", "micro_batches", settings.micro_batches, rule, "use pipeline.micro_batches"))
    if settings.change.is_on and count > 1:
        raise InputError(describe("--set", "pipeline.stages", count, "must be 1 where ranks or plans change during a run"))
    order = schedule(wanted.order, stages=count, micro_batches=settings.parts(count), virtual=wanted.virtual)
    return Stages(order=order, ranks=plan.num_ranks, layers=_cut(model, order.num_chunks, wanted.layer_counts()))


def _cut(model: MoEModel, chunks: int, counts: tuple[int, ...]) -> tuple[range, ...]:
    if not counts:
        if chunks > model.num_layers:
            raise InputError(describe("--set", "pipeline.stages", chunks, f"chunks must be at most the {model.num_layers} layers of {model.name}"))
        counts = tuple(model.num_layers // chunks + (index < model.num_layers % chunks) for index in range(chunks))
    if len(counts) != chunks or sum(counts) != model.num_layers:
        rule = f"must be {chunks} numbers with sum {model.num_layers}, the layers of {model.name}"
        raise InputError(describe("--set", "pipeline.layers", ",".join(map(str, counts)), rule))
    ends = np.cumsum(counts).tolist()
    return tuple(range(end - size, end) for end, size in zip(ends, counts, strict=True))
