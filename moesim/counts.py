"""Experts per MoE layer where layers differ: the rule of such counts, and which experts a layer lacks.

E is at least the largest count; a layer with n experts has the experts 0..n-1, the others are absent there. None stands for E experts in
every layer, and is the only way to say so. Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def normal_counts(experts_L: Iterable[int] | None, num_experts: int, layers: int, fail: Callable[[list[object], str], Exception]) -> tuple[int, ...] | None:
    """Return the counts, or None if all layers have `num_experts`; fail(counts, rule) makes the error where a rule is broken."""
    if experts_L is None:
        return None
    counts = list(experts_L)
    if len(counts) != layers:
        raise fail(list(counts), f"must have one count per MoE layer, {layers}")
    if any(isinstance(item, bool) or not isinstance(item, int) or not 1 <= item <= num_experts for item in counts):
        raise fail(list(counts), f"must hold integers in 1..{num_experts}, the number of experts")
    return None if min(counts) == num_experts else tuple(counts)


def present_LE(experts_L: tuple[int, ...] | None, num_experts: int, layers: int) -> np.ndarray:
    """Return bool [L, E]: experts that the layer has."""
    import numpy as np

    counts = np.full(layers, num_experts) if experts_L is None else np.asarray(experts_L)
    return np.asarray(np.arange(num_experts) < counts[:, None])
