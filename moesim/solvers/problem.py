"""The placement problem: expert loads in one or more windows, ranks with slots, what is wanted, and what may not change.

A window is a stretch of a trace with its own load; K windows say what the plan must be good for. A placement
fills every slot of every rank, except that a rank never needs more slots than there are experts when an
expert may not sit twice on one rank: such slots stay empty (-1). Where layers have unequally many experts, each has as many extra
slots as the largest, spread evenly over the ranks, and the rest stay empty; beside a running placement the slots that it fills.
Shapes: K windows, L MoE layers, E experts, R ranks, S = Σ slots_per_rank_R slots in rank order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.counts import normal_counts, present_LE
from moesim.errors import InfeasibleError, InputError, describe
from moesim.solvers.objective import BALANCE, Objective

PLACE = "placement problem"
MAX_CELLS = 1 << 27


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """Where should every expert live, in how many copies?"""

    load_KLE: np.ndarray
    """float64 [K, L, E] (or [L, E]: one window): tokens per expert, finite and >= 0."""
    num_ranks: int
    """R, ranks that share the experts of a layer."""
    slots_per_rank_R: np.ndarray
    """int [R] (or one number for all): expert slots of every rank."""
    ranks_per_node: int = 0
    """Consecutive ranks that share a node; 0: all of them."""
    ranks_per_rack: int = 0
    """Consecutive ranks whose nodes share a rack, a multiple of those of a node; 0: all of them."""
    num_groups: int = 1
    """Routing groups of experts; only the hierarchical EPLB policy looks at them."""
    previous: np.ndarray | None = None
    """int [L, S]: the running placement, to be moved away from as little as possible; None: there is none."""
    move_budget_slots: int | None = None
    """Slot positions, over all layers, whose expert may differ from `previous`; None: no limit."""
    allow_duplicates_on_rank: bool = False
    """True where one rank may hold an expert twice, which gives the rank a larger share of it."""
    device_speed_R: np.ndarray | None = None
    """float64 [R]: relative speed of every rank, > 0; None: all equal."""
    window_weight_K: np.ndarray | None = None
    """float64 [K]: importance of every window, >= 0, made to sum to 1; None: all equal."""
    objective: Objective = BALANCE
    """What a placement is judged by."""
    experts_L: tuple[int, ...] | None = None
    """Experts of every layer where they differ: those beyond are absent, without load and without slot; None: E in all layers."""

    def __post_init__(self) -> None:
        load = np.array(self.load_KLE, dtype=np.float64)
        load = load[None] if load.ndim == 2 else load
        if load.ndim != 3 or load.size == 0:
            raise InputError(describe(PLACE, "load shape", load.shape, "must be [windows, layers, experts] or [layers, experts], all > 0"))
        if load.size > MAX_CELLS:
            raise InputError(describe(PLACE, "load size", load.size, f"must be <= {MAX_CELLS} numbers", "merge windows"))
        bad = ~np.isfinite(load) | (load < 0)
        if bad.any():
            window, layer, expert = (int(i) for i in np.argwhere(bad)[0])
            raise InputError(
                describe(PLACE, f"load of window {window}, layer {layer}, expert {expert}", float(load[window, layer, expert]), "must be finite and >= 0")
            )
        if not 1 <= self.num_ranks <= 65536:
            raise InputError(describe(PLACE, "num_ranks", self.num_ranks, "must be in 1..65536"))
        self._check_absent(load)
        slots = np.array(self.slots_per_rank_R)
        if slots.dtype.kind not in "iu":
            raise InputError(describe(PLACE, "slots_per_rank", slots.tolist(), "must hold integers"))
        slots = np.full(self.num_ranks, slots, dtype=np.int64) if slots.ndim == 0 else slots.astype(np.int64)
        if slots.shape != (self.num_ranks,) or (slots < 0).any() or int(slots.sum()) * load.shape[1] > MAX_CELLS:
            raise InputError(describe(PLACE, "slots_per_rank", slots.tolist(), f"must be one number >= 0 for each of the {self.num_ranks} ranks"))
        self._set(load_KLE=load, slots_per_rank_R=slots, ranks_per_node=self.ranks_per_node or self.num_ranks)
        if self.ranks_per_node < 1 or (self.num_ranks % self.ranks_per_node and self.ranks_per_node < self.num_ranks):
            raise InputError(describe(PLACE, "ranks_per_node", self.ranks_per_node, f"must divide the {self.num_ranks} ranks"))
        self._set(ranks_per_rack=self.ranks_per_rack or self.num_ranks)
        if self.ranks_per_rack < self.num_ranks and (self.ranks_per_rack < 1 or self.ranks_per_rack % self.ranks_per_node):
            rule = f"must be a multiple of the {self.ranks_per_node} ranks of a node"
            raise InputError(describe(PLACE, "ranks_per_rack", self.ranks_per_rack, rule))
        if not 1 <= self.num_groups <= self.num_experts or any(count % self.num_groups for count in self.experts_L or (self.num_experts,)):
            raise InputError(describe(PLACE, "num_groups", self.num_groups, f"must divide the {self.num_experts} experts"))
        self._set(
            device_speed_R=self._vector("device_speed", self.device_speed_R, self.num_ranks, positive=True),
            window_weight_K=self._vector("window_weight", self.window_weight_K, self.num_windows, positive=False),
        )
        self._set(window_weight_K=self.weight_K / self.weight_K.sum())
        self._check_room()
        self._check_previous()
        self._check_objective()

    def _check_absent(self, load: np.ndarray) -> None:
        """Bring the counts of experts into their normal form; experts that a layer does not have must not have load there."""
        _, layers, experts = load.shape
        counts = normal_counts(self.experts_L, experts, layers, lambda value, rule: InputError(describe(PLACE, "experts_L", value, rule)))
        object.__setattr__(self, "experts_L", counts)
        if counts is None:
            return
        for window, layer, expert in np.argwhere(load * ~present_LE(counts, experts, layers))[:1]:
            rule = f"must be 0: the layer has {counts[layer]} experts"
            raise InputError(describe(PLACE, f"load of window {window}, layer {layer}, expert {expert}", float(load[window, layer, expert]), rule))
        if {"traffic", "hops"} & set(self.objective.terms):
            rule = f"needs equally many experts in all layers, here {sorted(set(counts))}"
            raise InputError(describe(PLACE, "objective", self.objective.name, rule, "plan for balance, activated or latency"))

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                value.setflags(write=False)
            object.__setattr__(self, name, value)

    def _vector(self, key: str, value: np.ndarray | None, length: int, *, positive: bool) -> np.ndarray:
        if value is None:
            return np.ones(length)
        vector = np.array(value, dtype=np.float64)
        if vector.shape != (length,) or not np.isfinite(vector).all() or (vector < 0).any() or vector.sum() <= 0 or (positive and (vector <= 0).any()):
            raise InputError(describe(PLACE, key, vector.tolist(), f"must be {length} finite number(s) {'> 0' if positive else '>= 0 with a positive sum'}"))
        return vector

    def _check_room(self) -> None:
        room = int(self.fill_R.sum())
        if room < self.num_experts:
            raise InfeasibleError(
                f"{PLACE}: every layer needs {self.num_experts} slots, one per expert, but the {self.num_ranks} ranks give {room}: "
                f"{self.num_experts - room} missing per layer, first in layer 0; add slots or ranks",
                requirement="one slot for every expert of a layer",
                where="layer 0",
                missing=self.num_experts - room,
                relaxation=f"at least {-(-self.num_experts // self.num_ranks)} slots on every rank",
            )

    def _check_objective(self) -> None:
        routes = self.objective.routes
        if routes is None or not {"traffic", "hops"} & set(self.objective.terms):
            return
        if "hops" in self.objective.terms and not self.one_slot_each:
            rule = f"needs equal ranks and one slot per expert, here {self.num_slots} slots for {self.num_experts} experts"
            raise InputError(describe(PLACE, "objective", self.objective.name, rule, "leave out the extra slots, or plan for traffic"))
        if "traffic" in self.objective.terms and self.num_ranks % self.ranks_per_rack:
            raise InputError(describe(PLACE, "ranks_per_rack", self.ranks_per_rack, f"must divide the {self.num_ranks} ranks where traffic is planned"))
        if (routes.num_layers, routes.num_experts) != (self.num_layers, self.num_experts):
            shape = (routes.num_layers, routes.num_experts)
            raise InputError(describe(PLACE, "routes (layers, experts)", shape, f"must be those of the load, {(self.num_layers, self.num_experts)}"))

    def _check_previous(self) -> None:
        if self.move_budget_slots is not None and (self.move_budget_slots < 0 or self.previous is None):
            raise InputError(describe(PLACE, "move_budget_slots", self.move_budget_slots, "must be >= 0 and needs a previous placement"))
        if self.previous is None:
            return
        table = np.array(self.previous, dtype=np.int32)
        if table.shape != (self.num_layers, self.num_slots):
            raise InputError(
                describe(
                    PLACE,
                    "previous shape",
                    table.shape,
                    f"must be [layers, slots] = {(self.num_layers, self.num_slots)}",
                    "the running plan has other layers or slots",
                )
            )
        if table.min() < -1 or table.max() >= self.num_experts:
            raise InputError(describe(PLACE, "previous", [int(table.min()), int(table.max())], f"must hold experts in 0..{self.num_experts - 1}, or -1"))
        self._set(previous=table)
        for layer, (row, count) in enumerate(zip(table, self.experts_L or (self.num_experts,) * len(table), strict=True)):
            if row.max() >= count:
                raise InputError(describe(PLACE, f"previous placement of layer {layer}", int(row.max()), f"must hold experts in 0..{count - 1}, or -1"))
            absent = np.setdiff1d(np.arange(count), row)
            if absent.size:
                raise InputError(
                    f"{PLACE}: previous placement has no slot for expert {absent[0]} in layer {layer} ({absent.size} missing there); it cannot be running"
                )

    @property
    def num_windows(self) -> int:
        """K, windows."""
        return int(self.load_KLE.shape[0])

    @property
    def num_layers(self) -> int:
        """L, MoE layers."""
        return int(self.load_KLE.shape[1])

    @property
    def num_experts(self) -> int:
        """E, experts of a layer."""
        return int(self.load_KLE.shape[2])

    @property
    def num_slots(self) -> int:
        """S, slots of a layer over all ranks."""
        return int(self.slots_per_rank_R.sum())

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks form."""
        return max(1, self.num_ranks // self.ranks_per_node)

    @property
    def one_slot_each(self) -> bool:
        """True where ranks are equal and no expert can have a copy."""
        return self.num_slots == self.num_experts and len(set(self.slots_per_rank_R.tolist())) == 1

    @property
    def levels(self) -> list[tuple[int, float]]:
        """(Ranks of a place, weight) of ranks, and of nodes and racks where there are several."""
        places = ((self.ranks_per_node, self.objective.node_weight), (self.ranks_per_rack, self.objective.rack_weight))
        return [(1, 1.0), *((per_place, weight) for per_place, weight in places if per_place < self.num_ranks)]

    @property
    def fill_R(self) -> np.ndarray:
        """int64 [R]: slots of every rank that a placement fills."""
        return self.slots_per_rank_R if self.allow_duplicates_on_rank else np.minimum(self.slots_per_rank_R, self.num_experts)

    @property
    def fill_LR(self) -> np.ndarray:
        """int64 [L, R]: slots of every rank that a placement fills in a layer; `fill_R` in all of them where layers are equal."""
        if self.experts_L is None:
            return np.broadcast_to(self.fill_R, (self.num_layers, self.num_ranks))
        if self.previous is not None:
            ends = np.cumsum(self.slots_per_rank_R)
            upto = np.pad(np.cumsum(self.previous >= 0, axis=1), ((0, 0), (1, 0)))
            return upto[:, ends] - upto[:, ends - self.slots_per_rank_R]
        extra = int(self.fill_R.sum()) - self.num_experts
        return np.stack([self._spread_R(experts, extra) for experts in self.experts_L])

    def _spread_R(self, experts: int, extra: int) -> np.ndarray:
        """Return int64 [R]: the slots of a layer with so many experts and extra slots, dealt out as evenly as the ranks' slots allow."""
        room = self.slots_per_rank_R if self.allow_duplicates_on_rank else np.minimum(self.slots_per_rank_R, experts)
        total = min(experts + extra, int(room.sum()))
        level = np.arange(int(room.max()) + 1)
        fill = np.minimum(room, np.flatnonzero(np.minimum(room, level[:, None]).sum(axis=1) <= total)[-1])
        fill[np.flatnonzero(room > fill)[: total - int(fill.sum())]] += 1
        return np.asarray(fill, dtype=np.int64)

    @property
    def speed_R(self) -> np.ndarray:
        """float64 [R]: relative speed of every rank."""
        return np.ones(self.num_ranks) if self.device_speed_R is None else self.device_speed_R

    @property
    def weight_K(self) -> np.ndarray:
        """float64 [K]: importance of every window, summing to 1."""
        return np.full(self.num_windows, 1.0 / self.num_windows) if self.window_weight_K is None else self.window_weight_K

    @property
    def slot_rank_S(self) -> np.ndarray:
        """int64 [S]: rank that owns every slot."""
        return np.repeat(np.arange(self.num_ranks), self.slots_per_rank_R)

    @property
    def rigid(self) -> bool:
        """True where every placement fills its slots without an expert twice on a rank (bounds may rely on it)."""
        if self.allow_duplicates_on_rank:
            return False
        return self.previous is None or self.move_budget_slots is None or not irregular_LR(self, self.previous).any()


def irregular_LR(problem: PlacementProblem, table_LS: np.ndarray) -> np.ndarray:
    """Return bool [L, R]: ranks that hold an expert twice or leave a slot empty that should be filled."""
    result = np.zeros((problem.num_layers, problem.num_ranks), dtype=bool)
    ends = np.cumsum(problem.slots_per_rank_R)
    for rank, (start, end) in enumerate(zip(ends - problem.slots_per_rank_R, ends, strict=True)):
        rows = np.sort(table_LS[:, start:end], axis=1)
        twice = ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).any(axis=1)
        result[:, rank] = (twice & (not problem.allow_duplicates_on_rank)) | ((rows >= 0).sum(axis=1) < problem.fill_R[rank])
    return result
