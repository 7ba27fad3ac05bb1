"""The degrees of one pipeline stage: R = tp·dp ranks that attend = ep·expert_tp ranks that hold experts.

Ranks are contiguous: shards of a head, and shards of an expert, are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

from moesim.hardware.cluster import Cluster


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """The degrees of one pipeline stage."""

    tp: int
    dp: int
    ep: int
    expert_tp: int
    slots: int
    """Slots per expert-parallel rank and MoE layer; 0 for a dense model."""

    @property
    def ranks(self) -> int:
        """Devices of the stage."""
        return self.tp * self.dp


def nodes_of(ranks: int, cluster: Cluster) -> int:
    """Return how many nodes a run of neighbouring ranks covers."""
    return max(1, ranks // cluster.devices_per_node)
