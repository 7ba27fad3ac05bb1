"""Activated experts of a decode batch: how likely a slot is to be active, and which copy should serve.

A token picks expert e of a layer with probability p = top_k · load / Σ load (at most 1); a slot that serves the share s of its
expert's tokens is active in a batch of n tokens with probability 1 - (1 - p·s)^n. One serving copy activates less than a split.
Shapes: K windows, L layers, E experts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import InputError, describe

if TYPE_CHECKING:
    from moesim.solvers.problem import PlacementProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """The batch whose activations count."""

    tokens: int
    """n, tokens of the batch over all ranks."""
    top_k: int
    """Experts that a token picks in a layer."""

    def __post_init__(self) -> None:
        for key, value in (("tokens", self.tokens), ("top_k", self.top_k)):
            if value < 1:
                raise InputError(describe("objective", key, value, "must be >= 1"))

    def pick_KLE(self, load_KLE: np.ndarray) -> np.ndarray:
        """Return float64 [K, L, E]: probability that a token picks an expert."""
        total = load_KLE.sum(axis=2, keepdims=True)
        return np.minimum(np.divide(self.top_k * load_KLE, total, out=np.zeros_like(load_KLE), where=total > 0), 1.0)

    def active(self, pick: np.ndarray) -> np.ndarray:
        """Return the probability that a batch activates a slot that a token picks with probability `pick`."""
        with np.errstate(divide="ignore"):
            return -np.expm1(self.tokens * np.log1p(-np.asarray(pick)))


def serve_once_LS(problem: PlacementProblem, table_LS: np.ndarray, decode: Decode) -> np.ndarray:
    """Return float64 [L, S]: shares of 0 and 1 that let one copy of every expert serve all its tokens, on the rank that it burdens least."""
    activity = np.einsum("k,kle->le", problem.weight_K, decode.active(decode.pick_KLE(problem.load_KLE)))
    share = np.zeros(table_LS.shape)
    ranks = problem.slot_rank_S
    for layer, row in enumerate(table_LS):
        load = np.zeros(problem.num_ranks)
        copies = np.bincount(row[row >= 0], minlength=problem.num_experts)
        # experts without a choice first, then the most active
        for expert in np.lexsort((-activity[layer], copies > 1)):
            slots = np.flatnonzero(row == expert)
            burden = (load[ranks[slots]] + activity[layer, expert]) / problem.speed_R[ranks[slots]]
            slot = slots[int(burden.argmin())]
            share[layer, slot] = 1.0
            load[ranks[slot]] += activity[layer, expert]
    return share


def activated_L(problem: PlacementProblem, table_LS: np.ndarray, share_LS: np.ndarray, decode: Decode) -> np.ndarray:
    """Return float64 [L]: expected activated experts at the slowest rank under any shares, averaged over windows."""
    result = np.zeros(problem.num_layers)
    keys = problem.slot_rank_S[None, :] + np.arange(problem.num_layers)[:, None] * problem.num_ranks
    for pick, weight in zip(decode.pick_KLE(problem.load_KLE), problem.weight_K, strict=True):
        active = decode.active(np.take_along_axis(pick, np.maximum(table_LS, 0), axis=1) * share_LS * (table_LS >= 0))
        rank = np.bincount(keys.ravel(), weights=active.ravel(), minlength=problem.num_layers * problem.num_ranks).reshape(-1, problem.num_ranks)
        result += weight * (rank / problem.speed_R).max(axis=1)
    return result
