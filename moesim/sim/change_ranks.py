"""Ranks that die, leave and join while passes run: detection, recovery from the survivors and the checkpoint, draining, loading.

After a failure the survivors serve what they still hold; what nobody holds is loaded from the checkpoint first. Shapes: R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moesim.errors import InputError, SimulationError, describe
from moesim.plan import Plan
from moesim.sim import memory
from moesim.sim.change_carrier import Carrier
from moesim.sim.change_serving import Serving, Steps
from moesim.sim.flows import Flow
from moesim.sim.membership import FAIL, JOIN, Event, Membership, lost_LE, refill
from moesim.sim.migration import CHECKPOINT, moves_between, way_of
from moesim.sim.network import Network
from moesim.sim.succession import check_next


class Ranks:
    """The events of a run, and what they ask of it."""

    def __init__(self, serving: Serving, carrier: Carrier, membership: Membership, events: Sequence[Event], load_KLE: Callable[[], np.ndarray]) -> None:
        """load_KLE: the loads that new placements are made for."""
        self.serving, self.carrier, self.membership, self._load_KLE = serving, carrier, membership, load_KLE
        self.waiting: list[tuple[str, tuple[int, ...]]] = []
        """Leaves, and joins that are loaded, until no other change is under way."""
        self._check(events)
        for event in sorted(events, key=lambda event: event.at_s):
            serving.env.process(self._occur(event))

    def _check(self, events: Sequence[Event]) -> None:
        serving = self.serving
        last = serving.cluster.num_ranks - 1
        for event in events:
            if max(event.ranks) > last:
                raise InputError(describe("event", "ranks", event.ranks, f"must be in 0..{last}, the ranks of {serving.cluster.name}"))
        if serving.builder.tp > 1 and (events or not serving.alive_R.all()):
            raise InputError(describe("event", "attention_tp", serving.builder.tp, "must be 1 where ranks change", "a rank that is gone breaks its TP group"))

    def _occur(self, event: Event) -> Steps:
        serving = self.serving
        yield serving.env.timeout(event.at_s)
        if event.kind == FAIL:
            ranks = tuple(rank for rank in event.ranks if serving.alive_R[rank])
            if ranks:
                serving.log(FAIL, ranks=ranks)
                serving.dead.append((serving.engine.now, ranks))
                if not serving.failure.triggered:
                    serving.failure.succeed()
            return
        if event.kind == JOIN:
            yield serving.env.timeout(self.membership.init_s)
            yield serving.env.all_of([serving.env.process(self._load_rank(rank)) for rank in event.ranks])
        self.waiting.append((event.kind, event.ranks))

    def _load_rank(self, rank: int) -> Steps:
        """Load everything but routed experts from the checkpoint."""
        serving, migration = self.serving, self.serving.migration
        way = way_of(Network(serving.cluster), CHECKPOINT, rank, serving.expert_bytes, migration)
        nbytes = float(memory.weight_bytes_R(serving.model, serving.plan, attention_tp=1)[rank])
        yield serving.env.timeout(way.latency_s + migration.message_s)
        if way.path:
            yield serving.engine.start_flow(Flow(f"weights of rank {rank}", nbytes, way.path, migration.discipline, ranks=way.ranks))

    def change_next(self) -> None:
        """Plan for the next ranks that leave or are ready to join."""
        serving, (kind, ranks) = self.serving, self.waiting.pop(0)
        alive_R = serving.alive_R.copy()
        alive_R[list(ranks)] = kind == JOIN
        serving.log(kind, ranks=ranks)
        if not np.array_equal(alive_R, serving.alive_R):
            self.carrier.begin(kind, self._placed(alive_R), alive_R, self.membership.placer_s if self.membership.placer else 0.0)

    def _placed(self, alive_R: np.ndarray) -> Plan:
        plan, load_KLE = self.serving.plan, self._load_KLE()
        if self.membership.placer is None:
            return refill(plan, alive_R, load_KLE.sum(axis=0))
        check_next(plan, target := self.membership.placer(load_KLE, plan, alive_R.copy()), alive_R, same_slots=False)
        return target

    def recover(self) -> Steps:
        """Leave the pass, rebuild the group over the survivors, and load what nobody holds; service stands still."""
        serving, out = self.serving, self.serving.out
        began = min(at_s for at_s, _ in serving.dead)
        self.carrier.abort("a rank died")
        while serving.dead:
            dead, serving.dead, serving.failure = serving.dead, [], serving.env.event()
            yield serving.env.timeout(max(max(at_s for at_s, _ in dead) + self.membership.detection_s - serving.engine.now, 0.0))
            alive_R = serving.alive_R.copy()
            gone = [rank for _, ranks in dead for rank in ranks]
            alive_R[gone] = False
            out.kv_entries_lost += float(serving.kv_R[gone].sum())
            yield serving.env.timeout(self.membership.rebuild_s)
            lost = int(lost_LE(serving.plan, alive_R).sum())
            new = refill(serving.plan, alive_R, self._load_KLE().sum(axis=0))
            moves = moves_between(serving.plan, new, ranks_per_node=serving.cluster.devices_per_node, alive_R=alive_R)
            if self.carrier.room(new, np.zeros(len(alive_R))) < 0:
                raise SimulationError(f"failure of ranks {gone}: no memory for the {lost} experts that nobody holds; keep more room or replicas")
            yield self.carrier.transfer(moves).done
            out.experts_lost += lost
            serving.install(new, alive_R, FAIL)
            serving.log("recovered", ranks=gone, experts_lost=lost)
        out.downtime_s += serving.engine.now - began
        if self.membership.placer is not None:
            self.carrier.begin("after failure", self._placed(serving.alive_R), serving.alive_R, self.membership.placer_s)
