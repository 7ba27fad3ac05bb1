"""Bytes on every port for dispatch and combine: which copies cross NVLink and which the NIC.

Counts are in the direction of dispatch (token's rank → expert's rank); combine is the same traffic reversed. Shapes: R ranks = N nodes × D devices,
rank r = (node r // D, index r % D); leading dimensions are free.
  assign_RR[s, d]  (token, expert) pairs        copy_RR[s, d]  distinct (token, rank) pairs        node_RN[s, n]  distinct (token, node) pairs
`normal`: one copy per token and remote node, NIC to NIC between devices of equal index, then one per rank over NVLink. `low_latency`: one message
per pair. `direct`: one per token and rank. `2dh`: one per token and rank, first over NVLink to the device of the target's index, then over the NIC.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np

from moesim.errors import CostError, describe

ALGORITHMS = ("normal", "low_latency", "direct", "2dh")


@dataclass(frozen=True, slots=True)
class Ports:
    """Copies per rank in the direction of dispatch; float64 [..., R]."""

    up_out: np.ndarray
    """Leaving over the scale-up link."""
    up_in: np.ndarray
    out_out: np.ndarray
    """Leaving over the scale-out link."""
    out_in: np.ndarray
    local: np.ndarray
    """Staying on the rank."""

    def reversed(self) -> Ports:
        """Return the traffic of combine."""
        return Ports(self.up_in, self.up_out, self.out_in, self.out_out, self.local)


def devices_per_node(num_ranks: int, devices: int) -> int:
    """Return D for a group of ranks that starts on a node border; raise CostError if the last node is not filled."""
    if num_ranks <= devices:
        return num_ranks
    if num_ranks % devices:
        raise CostError(describe("exchange", "ranks", num_ranks, f"must be at most, or a multiple of, the {devices} devices of a node"))
    return devices


def ports(algorithm: str, devices: int, *, assign_RR: np.ndarray | None, copy_RR: np.ndarray | None, node_RN: np.ndarray | None) -> Ports:
    """Return the copies on every port in the direction of dispatch; `devices` is D. Only the counts that the algorithm uses need be given."""
    if algorithm not in ALGORITHMS:
        raise CostError(describe("exchange", "algorithm", algorithm, f"must be one of {', '.join(ALGORITHMS)}"))
    pairs = _given(assign_RR, "assign_RR") if algorithm == "low_latency" else _given(copy_RR, "copy_RR")
    num_ranks = pairs.shape[-1]
    if pairs.shape[-2] != num_ranks or num_ranks % devices:
        raise CostError(describe("exchange", "shape", pairs.shape, f"must end in [R, R] with R a multiple of the {devices} devices of a node"))
    nodes = num_ranks // devices
    lead = pairs.shape[:-2]
    blocks = pairs.reshape(*lead, nodes, devices, nodes, devices)
    local = np.einsum("...rr->...r", pairs).astype(np.float64)
    if algorithm == "normal":
        return _normal(blocks, local, None if nodes == 1 else _given(node_RN, "node_RN"), (*lead, num_ranks))
    if algorithm == "2dh":
        return _two_level(blocks, local, (*lead, num_ranks))
    # Matrix products with indicators of the nodes sum several times faster than reductions; float32 holds counts below 2^24 exactly.
    exact = pairs.dtype.kind in "iu" and int(pairs.max(initial=0)) * num_ranks < 1 << 24
    counts = pairs.astype(np.float32 if exact else np.float64)
    of_node_RN = np.repeat(np.eye(nodes, dtype=counts.dtype), devices, axis=0)
    to_node, from_node = counts @ of_node_RN, of_node_RN.T @ counts
    all_out, all_in = (to_node @ np.ones(nodes, dtype=counts.dtype)).astype(np.float64), from_node.sum(axis=-2).astype(np.float64)
    inner_out = np.einsum("...aia->...ai", to_node.reshape(*lead, nodes, devices, nodes)).reshape(local.shape)
    inner_in = np.einsum("...aaj->...aj", from_node.reshape(*lead, nodes, nodes, devices)).reshape(local.shape)
    return Ports(inner_out - local, inner_in - local, all_out - inner_out, all_in - inner_in, local)


def _given(array: np.ndarray | None, name: str) -> np.ndarray:
    if array is None:
        raise CostError(f"exchange: {name} is missing; the algorithm sends these copies")
    return np.asarray(array)


def _normal(blocks: np.ndarray, local: np.ndarray, node_RN: np.ndarray | None, shape: tuple[int, ...]) -> Ports:
    # Device i of the target's node relays what all devices of index i sent there, and serves its own node directly.
    relay = blocks.sum(axis=-4, dtype=np.float64)  # [..., i, node, j]
    kept = np.einsum("...ini->...ni", relay).reshape(shape)
    up_out = np.swapaxes(relay.sum(axis=-1), -1, -2).reshape(shape) - kept
    up_in = relay.sum(axis=-3).reshape(shape) - kept
    if node_RN is None:
        return Ports(up_out, up_in, np.zeros(shape), np.zeros(shape), local)
    nodes, devices = blocks.shape[-4], blocks.shape[-3]
    sent = node_RN.reshape(*shape[:-1], nodes, devices, nodes).astype(np.float64)
    own = np.einsum("...aia->...ai", sent)
    out_out = (sent.sum(axis=-1) - own).reshape(shape)
    out_in = (np.swapaxes(sent.sum(axis=-3), -1, -2) - own).reshape(shape)
    return Ports(up_out, up_in, out_out, out_in, local)


def _two_level(blocks: np.ndarray, local: np.ndarray, shape: tuple[int, ...]) -> Ports:
    inner = blocks.sum(axis=-2, dtype=np.float64)  # [..., a, i, j]: from device i to device j of the same node
    same = np.einsum("...aii->...ai", inner)
    up_out, up_in = (inner.sum(axis=-1) - same).reshape(shape), (inner.sum(axis=-2) - same).reshape(shape)
    outer = blocks.sum(axis=-3, dtype=np.float64)  # [..., a, b, j]
    stay = np.einsum("...aaj->...aj", outer)
    return Ports(up_out, up_in, (outer.sum(axis=-2) - stay).reshape(shape), (outer.sum(axis=-3) - stay).reshape(shape), local)


def balanced_counts(*, num_ranks: int, devices: int, num_experts: int, top_k: int, max_nodes: int | None = None) -> dict[str, np.ndarray]:
    """Return the expected counts of one token per rank under uniform routing, `assign_RR`, `copy_RR`, `node_RN`.

    max_nodes: a token's experts lie on at most so many nodes (DeepSeek's group-limited gate); None: any.
    """
    nodes = num_ranks // devices
    allowed = nodes if max_nodes is None else min(nodes, max_nodes)
    pool = num_experts * allowed // nodes

    def hit(share: float) -> float:
        there = num_experts * share
        if there.is_integer() and pool >= top_k:
            missed = comb(pool - int(there), top_k) / comb(pool, top_k)
        else:
            missed = max(1.0 - there / max(pool, 1), 0.0) ** top_k
        return allowed / nodes * (1.0 - missed)

    return {
        "assign_RR": np.full((num_ranks, num_ranks), top_k / num_ranks),
        "copy_RR": np.full((num_ranks, num_ranks), hit(1.0 / num_ranks)),
        "node_RN": np.full((num_ranks, nodes), hit(1.0 / nodes)),
    }
