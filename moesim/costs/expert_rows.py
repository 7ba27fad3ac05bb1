"""Rows of tables of experts, as loads of one rank: balanced rows by number of slots, and what a row costs beside its choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

FULL = 0.98
"""Share of the slots that have tokens from which rows of random routing count as balanced."""
BUSY = 2.0
"""Times the least time of a table from which its rows count as work, not launches."""


@dataclass(frozen=True, slots=True)
class Balanced:
    """Balanced rows of one number of slots: total assignments of the rank against time."""

    slots: int
    assignments: np.ndarray
    seconds: np.ndarray
    ranks: int = 1
    """Over how many ranks the experts were spread when one of them was timed."""

    @classmethod
    def build(cls, slots: int, assignments: np.ndarray, seconds: np.ndarray, ranks: int = 1) -> Balanced:
        """Sort the rows and average those of equal load."""
        keys, index = np.unique(assignments, return_inverse=True)
        return cls(slots, keys.astype(np.float64), np.bincount(index.ravel(), weights=seconds) / np.bincount(index.ravel()), ranks)


def grouped_rows(rows: Mapping[str, np.ndarray], mine: np.ndarray) -> list[Balanced]:
    """Return the rows of one expert shape in which (nearly) all slots have tokens, by number of slots."""
    even = mine & (rows["active"] >= FULL * rows["slots"])
    used = even if even.any() else mine
    counts = np.unique(rows["slots"][used])
    return [Balanced.build(int(count), rows["assignments"][at], rows["latency_s"][at]) for count in counts if (at := used & (rows["slots"] == count)).any()]


def by_slots(rows: Mapping[str, np.ndarray], seconds: np.ndarray) -> list[Balanced]:
    """Return rows of uniform routing over expert-parallel ranks, `num_tokens` on all of them, by number of slots of the timed one."""
    slots = rows["num_experts"] // rows["moe_ep_size"]
    assignments = rows["num_tokens"] * rows["topk"] / rows["moe_ep_size"]
    ranks = int(rows["moe_ep_size"].max())
    return [Balanced.build(int(count), assignments[slots == count], seconds[slots == count], ranks) for count in np.unique(slots)]


def row_seconds(rows: Mapping[str, np.ndarray]) -> float:
    """Return the seconds per row of a table that times rank 0 on the rows of all `num_tokens` tokens, of which it has num_tokens · topk / ranks choices.

    Least relative squares of seconds = first + per choice · choices + per row · rows over the rows that take twice the least time or more, which the
    launches no longer rule. Tables of 4 to 256 ranks tell the two slopes apart.
    """
    seconds = rows["latency_s"]
    busy = seconds >= BUSY * seconds.min()
    terms = np.stack([np.ones(len(seconds)), rows["num_tokens"] * rows["topk"] / rows["moe_ep_size"], rows["num_tokens"]], axis=1)
    if np.linalg.matrix_rank(terms[busy]) < terms.shape[1]:
        return 0.0
    return max(float(np.linalg.lstsq(terms[busy] / seconds[busy, None], np.ones(int(busy.sum())), rcond=None)[0][2]), 0.0)
