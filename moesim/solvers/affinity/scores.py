"""Scores of a placement on tokens it may never have seen: hops between layers, ranks and nodes reached within a layer.

A token whose home rank is any rank with equal chance reaches d ranks with its choices, d · (1 - 1/G) of them remote.
Shapes: T tokens, L MoE layers, K choices, E experts, G ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.solvers.affinity.routes import TokenRoutes

_WORD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HopScore:
    """Where the transitions of tokens go."""

    cross_rank: float
    """Share of the transitions that leave the rank."""
    cross_node: float
    """Share of the transitions that leave the node."""
    cost: float
    """cross_rank + node_weight · cross_node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FanoutScore:
    """How many places a token reaches in a layer, averaged over tokens and layers."""

    ranks: float
    """Distinct ranks."""
    nodes: float
    """Distinct nodes."""
    remote_ranks: float
    """Distinct ranks other than the home, for a home drawn evenly."""
    remote_nodes: float
    """Distinct nodes other than that of the home, for a home drawn evenly."""
    choices: float
    """Choices of a token, the most ranks it can reach."""
    cost: float
    """ranks + node_weight · nodes."""


def score_hops(transitions_LEE: np.ndarray, group_LE: np.ndarray, *, ranks_per_node: int, node_weight: float = 1.0) -> HopScore:
    """Score the transitions of tokens under a placement; no transition at all costs nothing."""
    total = float(transitions_LEE.sum())
    crossing = []
    for place in (group_LE, group_LE // ranks_per_node):
        cross = sum(float(table[one[:, None] != other].sum()) for table, one, other in zip(transitions_LEE, place, place[1:], strict=False))
        crossing.append(cross / total if total > 0 else 0.0)
    return HopScore(cross_rank=crossing[0], cross_node=crossing[1], cost=crossing[0] + node_weight * crossing[1])


def distinct_L(routes: TokenRoutes, place_nE: np.ndarray, layers_n: np.ndarray | None = None) -> np.ndarray:
    """Return int64 [n]: distinct places that the tokens reach, summed over tokens.

    place_nE: rank or node of every expert. layers_n: the layers that its rows are for; None: all.
    """
    layers = np.arange(routes.num_layers) if layers_n is None else layers_n
    result = np.zeros(len(layers), dtype=np.int64)
    for row, layer in enumerate(layers.tolist()):
        at_TK = place_nE[row][routes.experts_TLK[:, layer]]
        for word in range(int(place_nE.max()) // _WORD + 1):
            inside = at_TK // _WORD == word
            if routes.valid_TLK is not None:
                inside &= routes.valid_TLK[:, layer]
            bits = np.where(inside, np.left_shift(np.uint64(1), (at_TK % _WORD).astype(np.uint64)), np.uint64(0))
            result[row] += int(np.bitwise_count(np.bitwise_or.reduce(bits, axis=1)).sum())
    return result


def score_fanout(routes: TokenRoutes, group_LE: np.ndarray, *, num_ranks: int, ranks_per_node: int, node_weight: float = 1.0) -> FanoutScore:
    """Score the ranks and nodes that tokens reach within a layer."""
    cells = len(routes) * routes.num_layers
    ranks = float(distinct_L(routes, group_LE).sum()) / cells
    nodes = float(distinct_L(routes, group_LE // ranks_per_node).sum()) / cells
    choices = (routes.experts_TLK.size if routes.valid_TLK is None else int(routes.valid_TLK.sum())) / cells
    return FanoutScore(
        ranks=ranks,
        nodes=nodes,
        remote_ranks=ranks * (1 - 1 / num_ranks),
        remote_nodes=nodes * (1 - ranks_per_node / num_ranks),
        choices=choices,
        cost=ranks + node_weight * nodes,
    )
