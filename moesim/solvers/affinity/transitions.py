"""Joint statistics of the choices of tokens: between consecutive layers, and within a layer.

`transitions_LEE[l, e, f]` counts pairs (choice e in layer l, choice f in layer l + 1) of the same token: all K×K pairs,
or only the pair of best choices (`top1`). `coactivation_LEE[l, e, f]` counts tokens that chose both e and f in layer l.
Counts are whole numbers in float64. Shapes: T tokens, L MoE layers, K choices, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity.routes import TokenRoutes, stream
from moesim.traces.routing_trace import RoutingTrace

PAIRS = ("all", "top1")
MAX_CELLS = 1 << 27
_CHUNK = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """How often experts of consecutive layers serve the same token."""

    transitions_LEE: np.ndarray
    """float64 [L - 1, E, E]: pairs counted from layer l (rows) to l + 1 (columns)."""
    load_LE: np.ndarray
    """float64 [L, E]: choices of every expert."""
    tokens: int
    """T, tokens counted."""
    pairs: str
    """`all` or `top1`."""


class TransitionCounter:
    """Adds up transitions batch by batch."""

    def __init__(self, layers: int, experts: int, pairs: str = "all") -> None:
        if pairs not in PAIRS:
            raise InputError(describe("affinity", "pairs", pairs, f"must be one of {', '.join(PAIRS)}"))
        if layers < 2:
            raise InputError(describe("affinity", "MoE layers", layers, "must be >= 2 to have transitions", "use the objective token_fanout"))
        _check_size(layers, experts)
        self._experts, self._pairs, self._tokens = experts, pairs, 0
        self._table = np.zeros((layers - 1, experts * experts))
        self._load = np.zeros((layers, experts))

    def add(self, experts_TLK: np.ndarray, valid_TLK: np.ndarray | None = None) -> None:
        """Count the tokens of a batch."""
        width = 1 if self._pairs == "top1" else experts_TLK.shape[2]
        step = max(1, _CHUNK // width**2)
        self._tokens += len(experts_TLK)
        self._load += _count_LE(experts_TLK, valid_TLK, self._experts)
        for start in range(0, len(experts_TLK), step):
            part = experts_TLK[start : start + step, :, :width].astype(np.int32)
            real = None if valid_TLK is None else valid_TLK[start : start + step, :, :width]
            for layer, table in enumerate(self._table):
                key = part[:, layer, :, None] * self._experts + part[:, layer + 1, None, :]
                flat = key.ravel() if real is None else key[real[:, layer, :, None] & real[:, layer + 1, None, :]]
                table += np.bincount(flat, minlength=self._experts**2)

    def result(self) -> Transitions:
        """Return the counts so far."""
        layers = len(self._table)
        return Transitions(
            transitions_LEE=self._table.reshape(layers, self._experts, self._experts).copy(), load_LE=self._load.copy(), tokens=self._tokens, pairs=self._pairs
        )


def count_transitions(routes: TokenRoutes, pairs: str = "all") -> Transitions:
    """Return the transitions of a sample of tokens."""
    counter = TransitionCounter(routes.num_layers, routes.num_experts, pairs)
    counter.add(routes.experts_TLK, routes.valid_TLK)
    return counter.result()


def stream_transitions(trace: RoutingTrace, pairs: str = "all") -> Transitions:
    """Return the transitions of a whole trace, one batch in memory at a time."""
    counter = TransitionCounter(trace.shape.num_layers, trace.shape.num_experts, pairs)
    for experts, valid, _, _ in stream(trace):
        counter.add(experts, valid)
    return counter.result()


def loads_LE(routes: TokenRoutes) -> np.ndarray:
    """Return float64 [L, E]: how often every expert was chosen."""
    return _count_LE(routes.experts_TLK, routes.valid_TLK, routes.num_experts)


def coactivation_LEE(routes: TokenRoutes) -> np.ndarray:
    """Return float64 [L, E, E]: tokens that chose both experts of a layer; symmetric, the diagonal is 0."""
    experts, (_, layers, width) = routes.num_experts, routes.experts_TLK.shape
    _check_size(layers, experts)
    table = np.zeros((layers, experts * experts))
    first, second = np.triu_indices(width, 1)
    if not first.size:
        return table.reshape(layers, experts, experts)
    step = max(1, _CHUNK // len(first))
    for start in range(0, len(routes), step):
        part = routes.experts_TLK[start : start + step].astype(np.int32)
        real = None if routes.valid_TLK is None else routes.valid_TLK[start : start + step]
        for layer in range(layers):
            key = part[:, layer, first] * experts + part[:, layer, second]
            flat = key.ravel() if real is None else key[real[:, layer, first] & real[:, layer, second]]
            table[layer] += np.bincount(flat, minlength=experts**2)
    square = table.reshape(layers, experts, experts)
    square = square + square.transpose(0, 2, 1)
    square[:, np.arange(experts), np.arange(experts)] = 0.0
    return square


def _count_LE(experts_TLK: np.ndarray, valid_TLK: np.ndarray | None, experts: int) -> np.ndarray:
    layers = experts_TLK.shape[1]
    rows = [experts_TLK[:, layer].ravel() if valid_TLK is None else experts_TLK[:, layer][valid_TLK[:, layer]] for layer in range(layers)]
    return np.stack([np.bincount(row, minlength=experts) for row in rows]).astype(np.float64)


def _check_size(layers: int, experts: int) -> None:
    if layers * experts**2 > MAX_CELLS:
        raise InputError(describe("affinity", "layers × experts²", layers * experts**2, f"must be <= {MAX_CELLS}", "plan fewer layers at a time"))
