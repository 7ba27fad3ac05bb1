"""The end of a training step: gradients of what is held more than once are summed, then every rank updates its parameters.

Replicated parts (attention, dense FFNs, shared experts, routers, embedding, head) are summed over the data-parallel ranks of their stage, an expert's
gradient over the ranks that hold a replica, and where the schedule keeps every chunk twice (dualpipe) over both of its stages. Adam reads gradient,
state and master copy and writes state and weights: a stream through memory. Shapes: R ranks of a stage, L MoE layers, S slots.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.model import CostModel
from moesim.costs.provenance import Timing, total
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.plan import Plan
from moesim.sim.build_layer import Site
from moesim.sim.holdings import Held, expert_parameters, held
from moesim.sim.ops import Program
from moesim.sim.pipeline_settings import PipelineSettings
from moesim.sim.stages import Stages


class StepEnd:
    """Gradient exchange and optimizer of every stage of one deployment; the same for all steps."""

    def __init__(self, cluster: Cluster, model: MoEModel, plan: Plan, costs: CostModel, stages: Stages, settings: PipelineSettings, *, tp: int) -> None:
        self.cluster, self.model, self.plan, self.costs, self.stages, self.settings, self.tp = cluster, model, plan, costs, stages, settings, tp
        self.held = held(model, plan, attention_tp=tp, stages=stages)
        self._replica_R = np.arange(cluster.num_ranks) % tp + np.arange(cluster.num_ranks) // stages.ranks * tp
        """Group of the ranks that hold the same part of what attention TP splits."""
        self._experts = [self._expert_replicas(stage) for stage in range(stages.count)]
        stage_R = np.arange(cluster.num_ranks) // stages.ranks
        self._mirror_R = np.minimum(stage_R, stages.count - 1 - stage_R) * stages.ranks + np.arange(cluster.num_ranks) % stages.ranks
        """Pairs of ranks of equal place in the two stages that hold the same chunks."""

    def add(self, program: Program, sites: list[Site]) -> None:
        """Add the end of a step to every stage, after all it computes."""
        last = [[site.last] for site in sites]
        if self.stages.order.name == "dualpipe":
            for stage in range(self.stages.count // 2):
                last[stage] = last[-1 - stage] = [self._sum_mirrored(program, sites, stage)]
        for stage, site in enumerate(sites):
            self._finish(stage, site, last[stage])

    def _finish(self, stage: int, site: Site, last: list[int]) -> None:
        mine, wanted, ranks = self.held[stage], self.settings, self.stages.ranks
        replicas, nodes = ranks // self.tp, max(1, ranks // max(self.cluster.devices_per_node, self.tp))
        port = "scale_up" if nodes == 1 else "scale_out"
        dense = np.full((1, ranks), mine.dense_parameters)
        experts = self._experts[stage]
        if experts is not None:
            last = [site.reduce("expert_gradients", experts, site.group_R, site.port, last)]
        if replicas > 1:
            reduce = self.costs.reduce_scatter if wanted.shard_optimizer else self.costs.all_reduce
            last = [site.reduce("gradients", reduce(wanted.gradient_bytes * dense, replicas, nodes=nodes), self._replica_R, port, last)]
        last = [site.timed("optimizer", self._optimizer(mine, replicas), last, self.model.num_layers)]
        if replicas > 1 and wanted.shard_optimizer:
            time = self.costs.all_gather(DTYPE_BYTES[self.model.dtype] * dense, replicas, nodes=nodes)
            site.reduce("parameters", time, self._replica_R, port, last)

    def _sum_mirrored(self, program: Program, sites: list[Site], stage: int) -> int:
        """Add the sum over the two stages that hold the same chunks."""
        other = self.stages.count - 1 - stage
        far = self.cluster.node_of(stage * self.stages.ranks) != self.cluster.node_of(other * self.stages.ranks)
        parameters_R = self.held[stage].dense_parameters + self.held[stage].slots_R * expert_parameters(self.model)
        time = self.costs.all_reduce(self.settings.gradient_bytes * parameters_R[None], ranks=2, nodes=2 if far else 1)
        work = sites[stage].spread(time.seconds) + sites[other].spread(time.seconds)
        return program.collective(
            "stage_gradients",
            np.zeros_like(work),
            work,
            group_R=self._mirror_R,
            port="scale_out" if far else "scale_up",
            deps=[sites[stage].last, sites[other].last],
            provenance=int(np.max(time.provenance)),
            ranks_R=np.isin(np.arange(self.stages.num_ranks) // self.stages.ranks, (stage, other)),
        )

    def _optimizer(self, mine: Held, replicas: int) -> Timing:
        wanted = self.settings
        own_R = mine.dense_parameters / (replicas if wanted.shard_optimizer else 1) + mine.slots_R * expert_parameters(self.model)
        moved = wanted.gradient_bytes + 2 * wanted.optimizer_bytes + DTYPE_BYTES[self.model.dtype]
        return self.costs.roofline.stream("optimizer", own_R[None] * moved)

    def _expert_replicas(self, stage: int) -> Timing | None:
        """Return the time [1, R] of summing replicated experts' gradients: one all-reduce per slot, one after another on its rank."""
        devices, ranks = self.cluster.devices_per_node, self.stages.ranks
        layers, replicas_LE = self.stages.layers_of(stage), self.plan.replicas_LE
        counts: dict[tuple[int, int], np.ndarray] = {}
        for row, layer in enumerate(self.model.moe_layer_ids):
            for expert in np.flatnonzero(replicas_LE[row] > 1).tolist() if layer in layers else ():
                owners = np.unique(self.plan.slot_rank_S[self.plan.slot_to_expert_LS[row] == expert])
                if len(owners) > 1:
                    across = len(np.unique(owners // devices)) > 1
                    key = (len(owners), len(owners) if across else 1)
                    counts.setdefault(key, np.zeros((1, ranks)))[0, owners] += 1.0
        if not counts:
            return None
        nbytes = self.settings.gradient_bytes * expert_parameters(self.model)
        parts = []
        for (members, nodes), count in sorted(counts.items()):
            one = self.costs.all_reduce(np.array([[nbytes]]), ranks=members, nodes=nodes)
            parts.append(Timing(seconds=one.seconds * count, provenance=np.broadcast_to(one.provenance, count.shape)))
        return total(*parts)
