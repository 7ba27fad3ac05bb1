"""Who sends to whom, in the two forms that `loads` compiles: counts of every rank pair, or the choices themselves.

Exchanges need sums over rank pairs, ports of ranks and not pairs, so on thousands of ranks, where most pairs are empty, nothing of
size R² is made: `ChosenRanks` adds up the choices. Both give equal numbers. Shapes: P passes, L MoE layers, R ranks, N nodes, T tokens, K choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesim.costs.traffic import Ports, devices_per_node, ports

LOCAL, NEAR, FAR, NONE = 0, 1, 2, 3


class Pairs(Protocol):
    """What both forms can say."""

    def ports(self, algorithm: str) -> Ports:
        """Return the copies on every port in the direction of dispatch, [P, L, R]."""

    def rows(self) -> np.ndarray:
        """Return float64 [P, L, R]: the distinct tokens that reach every rank, its own included."""

    def remote(self) -> tuple[int, int]:
        """Return the distinct (token, rank) and (token, node) pairs over all passes and layers that leave the rank, and the node."""

    def one(self, index: int) -> Pairs:
        """Return those of pass `index` alone (P = 1)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairCounts:
    """Counts of every rank pair."""

    assign_PLRR: np.ndarray
    """int32 [P, L, R, R]: assignments from source rank to destination rank."""
    copy_PLRR: np.ndarray
    """int32 [P, L, R, R]: distinct (token, destination rank) pairs: copies after deduplication per rank."""
    node_PLRN: np.ndarray
    """int32 [P, L, R, N]: distinct (token, destination node) pairs: copies when a node gets one per token."""
    devices: int
    """Ranks per node."""

    def ports(self, algorithm: str) -> Ports:
        """See `Pairs`."""
        devices = devices_per_node(self.copy_PLRR.shape[2], self.devices)
        return ports(algorithm, devices, assign_RR=self.assign_PLRR, copy_RR=self.copy_PLRR, node_RN=self.node_PLRN)

    def rows(self) -> np.ndarray:
        """See `Pairs`."""
        return np.asarray(self.copy_PLRR.sum(axis=2, dtype=np.float64))

    def remote(self) -> tuple[int, int]:
        """See `Pairs`."""
        home = np.arange(self.copy_PLRR.shape[2])
        ranks = int(self.copy_PLRR.sum()) - int(self.copy_PLRR[:, :, home, home].sum())
        return ranks, int(self.node_PLRN.sum()) - int(self.node_PLRN[:, :, home, home // self.devices].sum())

    def one(self, index: int) -> PairCounts:
        """See `Pairs`."""
        row = slice(index, index + 1 or None)
        return PairCounts(assign_PLRR=self.assign_PLRR[row], copy_PLRR=self.copy_PLRR[row], node_PLRN=self.node_PLRN[row], devices=self.devices)

    @classmethod
    def stack(cls, parts: Sequence[PairCounts]) -> PairCounts:
        """Join along the pass axis."""
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("assign_PLRR", "copy_PLRR", "node_PLRN")}
        return cls(**joined, devices=parts[0].devices)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChosenRanks:
    """The destination of every choice."""

    rank_LKT: np.ndarray
    """Integers [L, K, T]: destination rank; R: no choice."""
    group_T: np.ndarray
    """int64 [T], ascending: pass · R + source rank of every token."""
    num_passes: int
    num_ranks: int
    devices: int
    """Ranks per node."""

    def one(self, index: int) -> ChosenRanks:
        """See `Pairs`."""
        index %= self.num_passes
        low, high = np.searchsorted(self.group_T, [index * self.num_ranks, (index + 1) * self.num_ranks])
        group_T = self.group_T[low:high] - index * self.num_ranks
        return ChosenRanks(rank_LKT=self.rank_LKT[..., low:high], group_T=group_T, num_passes=1, num_ranks=self.num_ranks, devices=self.devices)

    def rows(self) -> np.ndarray:
        """See `Pairs`."""
        layers = []
        for rank_KT in self.rank_LKT:
            there_KT = (rank_KT < self.num_ranks) & _first(rank_KT)
            layers.append(self._count(there_KT, np.minimum(rank_KT.astype(np.int64), self.num_ranks - 1)))
        return np.stack(layers, axis=1)

    def remote(self) -> tuple[int, int]:
        """See `Pairs`."""
        source_T = self.group_T % self.num_ranks
        to_ranks = to_nodes = 0
        for rank_KT in self.rank_LKT:
            rank_KT = rank_KT.astype(np.int64)
            chosen = rank_KT < self.num_ranks
            node_KT = np.where(chosen, rank_KT // self.devices, self.num_ranks)
            to_ranks += int((_first(rank_KT) & chosen & (rank_KT != source_T)).sum())
            to_nodes += int((_first(node_KT) & chosen & (node_KT != source_T // self.devices)).sum())
        return to_ranks, to_nodes

    def ports(self, algorithm: str) -> Ports:
        """See `Pairs`."""
        layers = [np.stack(self._layer(algorithm, rank_KT.astype(np.int64))) for rank_KT in self.rank_LKT]
        return Ports(*np.stack(layers, axis=2))

    def _layer(self, algorithm: str, rank_KT: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the five counts of `Ports` for one layer, each float64 [P, R]."""
        ranks, devices = self.num_ranks, devices_per_node(self.num_ranks, self.devices)
        source_T = self.group_T % ranks
        chosen = rank_KT < ranks
        node_KT = np.where(chosen, rank_KT // devices, ranks)
        if algorithm != "low_latency":
            chosen = chosen & _first(rank_KT)
        target_KT = np.minimum(rank_KT, ranks - 1)
        same_rank, same_node, same_index = target_KT == source_T, node_KT == source_T // devices, target_KT % devices == source_T % devices
        local = self._count(chosen & same_rank, source_T)
        if algorithm in ("low_latency", "direct"):
            near, far = chosen & same_node & ~same_rank, chosen & ~same_node
            return self._count(near, source_T), self._count(near, target_KT), self._count(far, source_T), self._count(far, target_KT), local
        over = chosen & ~same_index
        if algorithm == "2dh":
            # Over NVLink to the device of the target's index, then over the NIC.
            relay_KT, far = source_T // devices * devices + target_KT % devices, chosen & ~same_node
            return self._count(over, source_T), self._count(over, relay_KT), self._count(far, relay_KT), self._count(far, target_KT), local
        # Over the NIC to the device of the source's index, once per node, then over NVLink.
        relay_KT, far = target_KT // devices * devices + source_T % devices, chosen & ~same_node & _first(node_KT)
        return self._count(over, relay_KT), self._count(over, target_KT), self._count(far, source_T), self._count(far, relay_KT), local

    def _count(self, where_KT: np.ndarray, rank_XT: np.ndarray) -> np.ndarray:
        """Return float64 [P, R]: how many of the choices in `where_KT` are at every rank of every pass."""
        place = self.group_T // self.num_ranks * self.num_ranks + rank_XT
        found = np.broadcast_to(place, where_KT.shape)[where_KT]
        return np.bincount(found, minlength=self.num_passes * self.num_ranks).reshape(self.num_passes, -1).astype(np.float64)


def _first(place_KT: np.ndarray) -> np.ndarray:
    """Return bool [K, T]: whether no earlier choice of the token goes to the same place."""
    first = np.ones(place_KT.shape, dtype=bool)
    for later in range(1, len(place_KT)):
        first[later] = (place_KT[:later] != place_KT[later]).all(axis=0)
    return first
