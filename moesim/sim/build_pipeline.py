"""Micro-batches through pipeline stages: the Steps of a schedule as Ops, with the messages between stages.

A stage sends activations (and gradients) from each rank to the rank of equal place in the next stage. The message leaves after the sender's exchanges
where both need the same port, otherwise beside them; the receiver goes on with other Steps until it needs what comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.costs.model import CostModel
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.sim.build_layer import BatchTimes, Layers, Site, Walk, side_by_side
from moesim.sim.ops import COMM, Job, Op, Program
from moesim.sim.schedules import BACKWARD, FORWARD, INPUTS, WEIGHTS, Unit
from moesim.sim.settings import Settings
from moesim.sim.stages import Stages


class Pipeline:
    """Adds the Ops of one Program, stage by stage."""

    def __init__(
        self,
        program: Program,
        stages: Stages,
        sites: Sequence[Site],
        batches: Sequence[BatchTimes],
        *,
        cluster: Cluster,
        model: MoEModel,
        settings: Settings,
        costs: CostModel,
    ) -> None:
        self.program, self.stages, self.sites, self.batches = program, stages, sites, batches
        self.cluster, self.model, self.costs = cluster, model, costs
        row_of = {layer: row for row, layer in enumerate(model.moe_layer_ids)}
        self._layers = [[Layers(site, times, settings, row_of) for times in batches] for site in sites]
        self._came: dict[tuple[str, int, int], list[int]] = {}
        """(kind, micro-batch, chunk) → Ops that its inputs came with."""
        self._source: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        passes = len(batches[0].tokens_PR)
        self.sent_P = {"intra_node": np.zeros(passes), "inter_node": np.zeros(passes)}
        """Bytes that have been sent between stages."""

    def run(self) -> None:
        """Add all Steps."""
        for stage, step in self.stages.order.in_order():
            ends = side_by_side([self._walk(stage, unit) for unit in step])
            for unit, last in zip(step, ends, strict=True):
                self._hand_on(unit, last)

    def _walk(self, stage: int, unit: Unit) -> Walk:
        kind, micro, chunk = unit
        layers, walker = self.stages.layers[chunk], self._layers[stage][micro]
        embed, head = chunk == 0, self.model.num_layers if chunk == self.stages.order.num_chunks - 1 else None
        if kind == FORWARD:
            return walker.forward(layers, self._came.pop((FORWARD, micro, chunk), []), embed=embed, head=head)
        if kind == WEIGHTS:
            return walker.weight_gradients(layers, embed=embed, head=head)
        return walker.backward(layers, self._came.pop((BACKWARD, micro, chunk)), embed=embed, head=head, weights=kind == BACKWARD)

    def _hand_on(self, unit: Unit, last: list[int]) -> None:
        kind, micro, chunk = unit
        final = self.stages.order.num_chunks - 1
        if kind == FORWARD and chunk == final:
            self._came[BACKWARD, micro, chunk] = last
        elif kind == FORWARD:
            self._came[FORWARD, micro, chunk + 1] = self._send(micro, chunk, chunk + 1, last)
        elif kind in (BACKWARD, INPUTS) and chunk:
            self._came[BACKWARD, micro, chunk - 1] = self._send(micro, chunk, chunk - 1, last)

    def _send(self, micro: int, chunk: int, following: int, deps: list[int]) -> list[int]:
        """Add the message from one chunk's stage to another's; return what the receiver waits for."""
        here, there = self.stages.order.stage_of(chunk, micro), self.stages.order.stage_of(following, micro)
        if here == there:
            return deps
        site, ranks = self.sites[here], self.stages.ranks
        inside = self.cluster.node_of(here * ranks) == self.cluster.node_of(there * ranks)
        nbytes = self.batches[micro].tokens_PR * self.model.hidden_size * DTYPE_BYTES[self.model.dtype]
        self.sent_P["intra_node" if inside else "inter_node"] += nbytes.sum(axis=1)
        time = self.costs.p2p(nbytes, nodes=1 if inside else 2)
        port, lane = "scale_up" if inside else "scale_out", f"p2p {here}-{there}"
        sends = self.program.local(
            "p2p",
            site.spread(time.seconds),
            lane=COMM if port == site.port else lane,
            port=f"{port}.out",
            deps=deps,
            provenance=site.spread(np.asarray(time.provenance)),
            ranks_R=site.mask_R,
        )
        source_R, mask_R = self._pairs(here, there)
        # The message arrives as it leaves: the sender's port sets the pace.
        arrival = Job(port=f"{port}.in", work_s=np.zeros_like(source_R, dtype=np.float64), side="recv")
        return [self.program.add(Op(label="p2p_arrival", lane=lane, jobs=(arrival,), deps=(sends,), source_R=source_R, ranks_R=mask_R))]

    def _pairs(self, here: int, there: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the rank whose message every rank waits for, and the ranks of both stages."""
        found = self._source.get((here, there))
        if found is None:
            source_R, mask_R = np.full(self.stages.num_ranks, -1), np.zeros(self.stages.num_ranks, dtype=bool)
            source_R[self.stages.columns(there)] = np.arange(self.stages.num_ranks)[self.stages.columns(here)]
            mask_R[self.stages.columns(here)] = mask_R[self.stages.columns(there)] = True
            found = self._source[here, there] = source_R, mask_R
        return found
