"""Block coordinate descent on a chain of layers: re-solve layers with their neighbours fixed, until nothing changes.

Layers of one parity do not touch each other, so half of them are solved at once, each exactly (`transport`). Cost never
rises. A start is grown layer by layer from the first (`forward`). Several chains of the same shape (nodes) are joined
into one by a layer pair without transitions. Shapes: L layers, E experts, G ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.solvers.affinity.transport import transport_nE
from moesim.solvers.search import Deadline, expired


def hop_cost(transitions_LEE: np.ndarray, group_LE: np.ndarray, hop_GG: np.ndarray) -> float:
    """Return the total cost of the transitions under a placement."""
    return float(sum((table * hop_GG[one[:, None], other[None, :]]).sum() for table, one, other in zip(transitions_LEE, group_LE, group_LE[1:], strict=False)))


def neighbour_gain_nEG(transitions_LEE: np.ndarray, group_LE: np.ndarray, layers: slice, hop_GG: np.ndarray) -> np.ndarray:
    """Return float64 [n, E, G]: minus the hop cost of every expert of the layers on every rank, their neighbours being fixed."""
    count, experts = group_LE.shape
    ranks = len(hop_GG)
    order = np.argsort(group_LE, axis=1, kind="stable")
    rows = np.arange(count)[layers]
    # experts of a rank side by side make the sum over a rank a sum over an axis, far cheaper than a product with a 0/1 matrix
    flow = np.zeros((len(rows), experts, ranks))
    for index, layer in enumerate(rows.tolist()):
        if layer > 0:
            flow[index] += transitions_LEE[layer - 1].take(order[layer - 1], axis=0).reshape(ranks, -1, experts).sum(axis=1).T
        if layer < count - 1:
            flow[index] += transitions_LEE[layer].take(order[layer + 1], axis=1).reshape(experts, ranks, -1).sum(axis=2)
    return -(flow @ hop_GG)


def forward(transitions_LEE: np.ndarray, first_E: np.ndarray, hop_GG: np.ndarray) -> np.ndarray:
    """Return int64 [L, E]: a placement grown from that of the first layer, every layer best for the one before it."""
    group = np.empty((len(transitions_LEE) + 1, len(first_E)), dtype=np.int64)
    group[0] = first_E
    for layer, table in enumerate(transitions_LEE):
        gain = neighbour_gain_nEG(table[None], np.stack((group[layer], group[layer])), slice(1, 2), hop_GG)[0]
        group[layer + 1] = transport_nE(gain[None], _greedy_E(gain)[None], swaps_only=True)[0]
    return group


def _greedy_E(gain_EG: np.ndarray) -> np.ndarray:
    """Return an assignment with equal experts per rank: experts with most to lose choose first."""
    experts, ranks = gain_EG.shape
    room = np.full(ranks, experts // ranks)
    group = np.empty(experts, dtype=np.int64)
    best_two = np.partition(gain_EG, -2, axis=1)[:, -2:] if ranks > 1 else np.repeat(gain_EG, 2, axis=1)
    for expert in np.argsort(best_two[:, 0] - best_two[:, 1], kind="stable"):
        rank = int(np.where(room > 0, gain_EG[expert], -np.inf).argmax())
        group[expert] = rank
        room[rank] -= 1
    return group


def descend(
    transitions_LEE: np.ndarray, group_LE: np.ndarray, hop_GG: np.ndarray, *, sweeps: int = 50, deadline: Deadline = None
) -> tuple[np.ndarray, int, bool]:
    """Return a placement that no change of one layer improves, the sweeps made, and whether the deadline cut it short.

    The cost is never above that of `group_LE`.
    """
    group = np.array(group_LE, dtype=np.int64)
    layers = len(group)
    quiet = 0
    for half in range(2 * sweeps):
        if expired(deadline):
            return group, half // 2, True
        part = slice(half % 2, layers, 2)
        gain = neighbour_gain_nEG(transitions_LEE, group, part, hop_GG)
        better = transport_nE(gain, group[part])
        # rounding must not trade one best assignment for another for ever
        rise = _sum_n(gain, better) - _sum_n(gain, group[part])
        better = np.where((rise > 0)[:, None], better, group[part])
        quiet = 0 if (better != group[part]).any() else quiet + 1
        group[part] = better
        if quiet >= 2:
            return group, half // 2 + 1, False
    return group, sweeps, False


def _sum_n(gain_nEG: np.ndarray, group_nE: np.ndarray) -> np.ndarray:
    return np.asarray(np.take_along_axis(gain_nEG, group_nE[:, :, None], axis=2).sum(axis=(1, 2)))
