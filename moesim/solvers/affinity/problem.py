"""The inter-layer affinity problem: transitions, loads, equal ranks in nodes, and how much balance may be given up.

Every rank holds E / G experts of every layer and no expert has a copy. A hop is a transition whose two experts sit on
different ranks; it costs 1, and 1 + `node_weight` if the ranks are on different nodes. Lowest total cost wins.
Shapes: L MoE layers, E experts, G ranks, C = E / G experts per rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.greedy import solve_greedy
from moesim.solvers.problem import PlacementProblem

PLACE = "affinity problem"


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityProblem:
    """Which experts of consecutive layers should share a rank?"""

    transitions_LEE: np.ndarray
    """float64 [L - 1, E, E]: weight of every transition from layer l (rows) to l + 1 (columns), finite and >= 0."""
    load_LE: np.ndarray
    """float64 [L, E]: load of every expert, finite and >= 0."""
    num_ranks: int
    """G, equal ranks; divides E."""
    ranks_per_node: int = 0
    """Consecutive ranks that share a node; 0: all of them."""
    node_weight: float = 1.0
    """What a hop between nodes costs on top of a hop between ranks, >= 0."""
    load_slack: float | None = None
    """The busiest rank of a layer may carry this share more than in the best balanced plan found, >= 0; None: no limit."""

    def __post_init__(self) -> None:
        table, load = np.array(self.transitions_LEE, dtype=np.float64), np.array(self.load_LE, dtype=np.float64)
        if load.ndim != 2 or load.size == 0 or len(load) < 2 or table.shape != (len(load) - 1, load.shape[1], load.shape[1]):
            raise InputError(describe(PLACE, "shapes", (table.shape, load.shape), "must be [layers - 1, experts, experts] and [layers, experts], layers >= 2"))
        for name, values in (("transitions", table), ("load", load)):
            if not np.isfinite(values).all() or (values < 0).any():
                raise InputError(describe(PLACE, name, float(values.min()), "must be finite and >= 0 throughout"))
        check_ranks(load.shape[1], self.num_ranks, self.ranks_per_node)
        for name, value in (("node_weight", self.node_weight), ("load_slack", self.load_slack)):
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(describe(PLACE, name, value, "must be a number >= 0"))
        for name, values in (("transitions_LEE", table), ("load_LE", load)):
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        object.__setattr__(self, "ranks_per_node", self.ranks_per_node or self.num_ranks)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.load_LE.shape[0])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.load_LE.shape[1])

    @property
    def per_rank(self) -> int:
        """C, experts of a layer on every rank."""
        return self.num_experts // self.num_ranks

    @property
    def num_nodes(self) -> int:
        """Nodes that the ranks form."""
        return self.num_ranks // self.ranks_per_node

    @property
    def hop_GG(self) -> np.ndarray:
        """float64 [G, G]: cost of a transition between two ranks."""
        node = np.arange(self.num_ranks) // self.ranks_per_node
        return (1.0 - np.eye(self.num_ranks)) + self.node_weight * (node[:, None] != node)

    @property
    def worst_hop(self) -> float:
        """Cost of the dearest hop."""
        return float(self.hop_GG.max()) if self.num_ranks > 1 else 1.0

    @property
    def total(self) -> float:
        """Weight of all transitions."""
        return float(self.transitions_LEE.sum())


def check_ranks(experts: int, ranks: int, ranks_per_node: int) -> None:
    """Raise InputError unless the experts divide by the ranks and the ranks by the nodes."""
    if ranks < 1 or experts % ranks:
        raise InputError(describe(PLACE, "num_ranks", ranks, f"must divide the {experts} experts", "affinity planning places equal experts on every rank"))
    if ranks_per_node < 0 or (ranks_per_node and ranks % ranks_per_node):
        raise InputError(describe(PLACE, "ranks_per_node", ranks_per_node, f"must divide the {ranks} ranks"))


def balanced_group_LE(load_LE: np.ndarray, ranks: int) -> np.ndarray:
    """Return int64 [L, E]: rank of every expert in the best balanced plan found."""
    layers, experts = load_LE.shape
    table = solve_greedy(PlacementProblem(load_KLE=load_LE, num_ranks=ranks, slots_per_rank_R=np.array(experts // ranks))).slot_to_expert_LS
    group = np.empty((layers, experts), dtype=np.int64)
    np.put_along_axis(group, table.astype(np.int64), np.broadcast_to(np.arange(experts) // (experts // ranks), table.shape), axis=1)
    return group


def rank_load_LG(group_LE: np.ndarray, load_LE: np.ndarray, ranks: int) -> np.ndarray:
    """Return float64 [L, G]: load of every rank."""
    layers = len(group_LE)
    key = group_LE + np.arange(layers)[:, None] * ranks
    return np.bincount(key.ravel(), weights=load_LE.ravel(), minlength=layers * ranks).reshape(layers, ranks)
