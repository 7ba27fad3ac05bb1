"""Nodes first, then ranks inside every node: the cheap links carry what the dear ones are spared.

The second stage solves all nodes at once, as one chain of layers with an empty layer pair between nodes; hops between
nodes no longer depend on it. Shapes: L layers, E experts, G ranks, N nodes, M = E / N experts of a node.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.affinity.descent import descend, forward
from moesim.solvers.search import Deadline


def flat_hops(ranks: int) -> np.ndarray:
    """Return float64 [G, G]: 1 between different ranks."""
    return 1.0 - np.eye(ranks)


def two_stage_LE(
    transitions_LEE: np.ndarray, first_E: np.ndarray, *, ranks: int, ranks_per_node: int, deadline: Deadline = None
) -> tuple[np.ndarray, int, bool]:
    """Return a placement, the sweeps made, and whether the deadline cut it short. first_E: rank of every expert in the first layer, to grow from."""
    nodes = ranks // ranks_per_node
    layers, experts = len(transitions_LEE) + 1, len(first_E)
    hops = flat_hops(nodes)
    node_LE, sweeps, cut = descend(transitions_LEE, forward(transitions_LEE, first_E // ranks_per_node, hops), hops, deadline=deadline)
    member_LNM = np.argsort(node_LE, axis=1, kind="stable").reshape(layers, nodes, experts // nodes)
    size = experts // nodes
    chain = np.zeros((nodes * layers - 1, size, size))
    start = np.empty((nodes * layers, size), dtype=np.int64)
    first = np.arange(size) // (experts // ranks)
    inside = flat_hops(ranks_per_node)
    for node in range(nodes):
        at = node * layers
        for layer in range(layers - 1):
            chain[at + layer] = transitions_LEE[layer][np.ix_(member_LNM[layer, node], member_LNM[layer + 1, node])]
        start[at : at + layers] = forward(chain[at : at + layers - 1], first, inside)
    local, more, late = descend(chain, start, inside, deadline=deadline)
    group = np.empty((layers, experts), dtype=np.int64)
    for node in range(nodes):
        np.put_along_axis(group, member_LNM[:, node], local[node * layers : (node + 1) * layers] + node * ranks_per_node, axis=1)
    return group, sweeps + more, cut or late
