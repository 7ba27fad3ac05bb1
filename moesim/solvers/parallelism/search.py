"""Complete search of the declared space: memory first, then bounds at peak rates, then the cost model, then the partition of stages.

A point is given up only if a point already measured dominates its bound (see `front`), so the Pareto front, and with it the best point under any service
level, is that of an exhaustive search. Disaggregated deployments are pairs of pools: TTFT and rate of one, TPOT and rate of the other, the smaller rate
counting; only the pools' Pareto points of every instance size can be part of a Pareto pair. Values are minimised: (tpot, ttft, -requests/s), in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.costs.group import Group
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism.front import Front
from moesim.solvers.parallelism.points import Measure, PointModel, Points
from moesim.solvers.parallelism.pools import Choice, phases
from moesim.solvers.parallelism.result import Counts
from moesim.solvers.parallelism.space import Shape, Space, ratios, shapes, total_devices
from moesim.solvers.parallelism.step_time import StepTimer
from moesim.solvers.parallelism.workload import Workload

Deadline = Callable[[], float] | None
MIXED, PAIR = 0, 1
"""First entry of an item: (MIXED, choice) or (PAIR, prefill choice, count, decode choice, count)."""


@dataclass(slots=True)
class Entry:
    """The points of one shape and role that fit into memory, and what is known of them."""

    shape: Shape
    role: str
    points: Points
    values: np.ndarray
    """Bounds, or exact values where `known`."""
    known: np.ndarray

    def choice(self, index: int) -> Choice:
        """Return one point."""
        points = self.points
        return Choice(self.shape, int(points.micro_N[index]), int(points.batch_N[index]), int(points.prompts_N[index]))


@dataclass(slots=True)
class Search:
    """One search; `run` fills the fronts."""

    model: MoEModel
    cluster: Cluster
    workload: Workload
    space: Space
    timer: StepTimer
    prune: bool = True
    """False: measure every point that fits (tests compare with it)."""
    counts: Counts = field(default_factory=Counts)
    front: Front = field(default_factory=lambda: Front(3))
    pools: dict[tuple[str, int], Front] = field(default_factory=dict)
    """(role, devices of an instance) → front of (latency, -rate per instance)."""
    entries: list[Entry] = field(default_factory=list)
    tightest: list[tuple[float, Shape, str, int]] = field(default_factory=list)
    """Per shape and role with a point that does not fit: least bytes lacking by arithmetic, and which point."""
    timed_out: bool = False
    points: PointModel = field(init=False)
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.points = PointModel(self.model, self.cluster, self.workload, self.space)
        self.total = total_devices(self.space, self.cluster)

    def run(self, deadline: Deadline) -> None:
        """Search until done or the deadline is over."""
        by_group: dict[Group, list[Entry]] = {}
        found = shapes(self.space, self.model, self.cluster)
        self.counts.shapes, self.counts.groups = len(found), len({shape.group for shape in found})
        sizes: dict[tuple[str, int], int] = {}
        for shape in found:
            for role in self.roles(shape):
                points = self.points.points(shape, role)
                self.counts.points += len(points)
                sizes[role, shape.devices] = sizes.get((role, shape.devices), 0) + len(points)
                entry = self._enter(shape, role, points)
                if entry is not None:
                    by_group.setdefault(shape.group, []).append(entry)
        self.counts.pairs = sum(
            count * other * len(ratios(self.total, size, second))
            for (role, size), count in sizes.items()
            if role == "prefill"
            for (kind, second), other in sizes.items()
            if kind == "decode"
        )
        self.entries = [entry for members in by_group.values() for entry in members]
        # Groups that promise most come first, and pairs before mixed pools: what they reach prunes the rest.
        promise = {
            group: min(float(entry.values[:, -1].min()) / (self.total if entry.role == "mixed" else entry.shape.devices) for entry in members)
            for group, members in by_group.items()
        }
        order = sorted(by_group, key=lambda group: (promise[group], group))
        self._visit_all([entry for group in order for entry in by_group[group] if entry.role != "mixed"], deadline)
        self._pair(deadline)
        for deep in (False, True):
            self._visit_all([entry for group in order for entry in by_group[group] if entry.role == "mixed" and (entry.shape.pp > 1) is deep], deadline)
        self.counts.cost_calls = self.timer.calls
        self.counts.clamped = self.timer.clamped

    def roles(self, shape: Shape) -> list[str]:
        """Return the roles that instances of a shape can have."""
        roles = ["mixed"] if "mixed" in self.space.modes and self.total % shape.devices == 0 else []
        if "disaggregated" in self.space.modes and self.workload.decode_steps and shape.devices < self.total:
            roles += ["prefill", "decode"]
        return roles

    def _visit_all(self, entries: list[Entry], deadline: Deadline) -> None:
        for position, entry in enumerate(entries):
            if deadline is not None and deadline() <= 0 and (entry.role != "mixed" or self.front.items):
                # Without any answer yet the search goes on to the first mixed deployment.
                self.timed_out = True
                self.counts.unvisited += sum(len(later.points) for later in entries[position:])
                return
            self._visit(entry)

    # --- points ---------------------------------------------------------------------------------------------------

    def _enter(self, shape: Shape, role: str, points: Points) -> Entry | None:
        if not len(points):
            return None
        fits = self.points.fits(shape, role, points)
        self.counts.memory += int((~fits).sum())
        if not fits.all():
            lacking = self.points.overflow_floor(shape, role, points)
            lacking[fits] = np.inf
            worst = int(lacking.argmin())
            self.tightest.append((float(lacking[worst]), shape, role, worst))
        if not fits.any():
            return None
        points = points.take(np.flatnonzero(fits))
        measure = self.points.measure(shape, role, points, *phases(role, self.timer, self.points, shape, floor=True))
        return Entry(shape, role, points, self._values(shape, role, measure), np.zeros(len(points), dtype=bool))

    def _values(self, shape: Shape, role: str, measure: Measure) -> np.ndarray:
        if role == "prefill":
            return np.stack([measure.ttft_N, -measure.rate_N], axis=1)
        if role == "decode":
            return np.stack([measure.tpot_N, -measure.rate_N], axis=1)
        rate = self.carried(measure.rate_N * (self.total // shape.devices), measure.ttft_N, measure.tpot_N)
        return np.stack([measure.tpot_N, measure.ttft_N, -rate], axis=1)

    def carried(self, rate: np.ndarray, ttft: np.ndarray, tpot: np.ndarray) -> np.ndarray:
        """Return requests per second: the capacity, or what the requests in flight can keep busy (Little's law)."""
        if self.workload.concurrency is None:
            return rate
        return np.minimum(rate, self.workload.concurrency / (ttft + self.workload.decode_steps * tpot))

    def _front(self, entry: Entry) -> Front:
        if entry.role == "mixed":
            return self.front
        return self.pools.setdefault((entry.role, entry.shape.devices), Front(2))

    def _visit(self, entry: Entry) -> None:
        front = self._front(entry)
        open_N = ~front.dominates(entry.values) if self.prune else np.ones(len(entry.points), dtype=bool)
        self.counts.rates += int((~open_N).sum())
        if not open_N.any():
            return
        self.bound(entry)
        if entry.shape.pp == 1:
            chosen = np.flatnonzero(open_N)
            entry.known[:] = True
            self.counts.evaluated += len(chosen)
            front.add(entry.values[chosen], [(MIXED, entry.choice(index)) for index in chosen.tolist()])
            return
        chosen = np.flatnonzero(open_N)
        chosen = chosen[np.lexsort((chosen, entry.values[chosen, -1]))]
        while len(chosen):
            if self.prune:
                open_N = ~front.dominates(entry.values[chosen])
                self.counts.pipeline += int((~open_N).sum())
                chosen = chosen[open_N]
            while len(chosen):
                index, chosen = int(chosen[0]), chosen[1:]
                self.counts.evaluated += 1
                if front.add(self.settle(entry, index)[None], [(MIXED, entry.choice(index))]):
                    break

    def bound(self, entry: Entry) -> None:
        """Replace the bounds at peak rates by those of the cost model; exact for one stage."""
        times = phases(entry.role, self.timer, self.points, entry.shape)
        measure = self.points.measure(entry.shape, entry.role, entry.points, *times, self._handover(entry))
        values = self._values(entry.shape, entry.role, measure)
        entry.values = np.where(entry.known[:, None], entry.values, values)

    def settle(self, entry: Entry, index: int) -> np.ndarray:
        """Return the exact values of one point."""
        if not entry.known[index]:
            point = entry.points.take(np.array([index]))
            times = phases(entry.role, self.timer, self.points, entry.shape)
            measure, _, _ = self.points.exact(entry.shape, entry.role, point, *times, self._handover(entry))
            entry.values[index] = self._values(entry.shape, entry.role, measure)[0]
            entry.known[index] = True
        return np.asarray(entry.values[index])

    def _handover(self, entry: Entry) -> float:
        return self.timer.handover_s(entry.shape.group.tp, entry.shape.pp) if entry.role == "prefill" else 0.0

    # --- pairs ----------------------------------------------------------------------------------------------------

    def _pair(self, deadline: Deadline) -> None:
        prefills = sorted((size, front) for (role, size), front in self.pools.items() if role == "prefill")
        decodes = sorted((size, front) for (role, size), front in self.pools.items() if role == "decode")
        for size, first in prefills:
            for other, second in decodes:
                counts = ratios(self.total, size, other)
                if not counts:
                    continue
                if deadline is not None and deadline() <= 0 and len(self.front.items):
                    self.timed_out = True
                    return
                self._pair_fronts(first, second, np.array(counts))

    def _pair_fronts(self, first: Front, second: Front, counts: np.ndarray) -> None:
        shape = (len(counts), len(first.items), len(second.items))
        rate = np.minimum(counts[:, 0, None, None] * -first.values_FD[None, :, None, 1], counts[:, 1, None, None] * -second.values_FD[None, None, :, 1])
        ttft = np.broadcast_to(first.values_FD[None, :, None, 0], shape)
        tpot = np.broadcast_to(second.values_FD[None, None, :, 0], shape)
        values = np.stack([tpot.ravel(), ttft.ravel(), -self.carried(rate, ttft, tpot).ravel()], axis=1)
        self.counts.pairs_evaluated += len(values)
        kept = np.flatnonzero(~self.front.dominates(values))
        items: list[tuple[Any, ...]] = []
        for flat in kept.tolist():
            ratio, a, b = np.unravel_index(flat, shape)
            items.append((PAIR, first.items[a][1], int(counts[ratio, 0]), second.items[b][1], int(counts[ratio, 1])))
        self.front.add(values[kept], items)
