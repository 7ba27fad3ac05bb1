"""What the formats share: rules for a plan that leaves and for tables that come in.

Tables from outside are lists in lists; every size is checked before an array is built. Shapes: L layers, S slots, E experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import PlanError, describe
from moesim.plan import MAX_SLOTS, Plan

MAX_LAYERS = 4096


def check_exportable(plan: Plan, format: str, *, duplicates: bool) -> None:
    """Raise PlanError if the format cannot hold the plan: empty slots, unequal ranks or layers, unequal shares, an expert twice on a rank."""
    place, table = plan.source, plan.slot_to_expert_LS
    if plan.experts_L is not None:
        rule = f"must be equal in all layers for {format}, which holds one number of experts"
        raise PlanError(describe(place, "experts_per_layer", list(plan.experts_L), rule, "keep the plan in moesim's own format"))
    if plan.num_slots % plan.num_ranks or (plan.slot_rank_S != np.arange(plan.num_slots) * plan.num_ranks // plan.num_slots).any():
        per_rank = np.bincount(plan.slot_rank_S, minlength=plan.num_ranks)
        raise PlanError(
            describe(
                place,
                "slots per rank",
                [int(per_rank.min()), int(per_rank.max())],
                f"must be equal on all {plan.num_ranks} ranks for {format}",
                "solve again with a multiple of the ranks as slots",
            )
        )
    if (table < 0).any():
        layer, slot = np.argwhere(table < 0)[0]
        raise PlanError(
            describe(place, f"slot_to_expert[{layer}][{slot}]", -1, f"must be an expert: {format} has no empty slots", "solve again with fewer slots")
        )
    if plan.share_LS is not None:
        equal = 1.0 / np.take_along_axis(plan.replicas_LE, table, axis=1)
        if np.abs(plan.share_LS - equal).max() > 1e-9:
            raise PlanError(f"{place}: replicas serve unequal shares, which {format} cannot say; export a plan whose replicas share equally")
    if not duplicates:
        rows = np.sort(table.reshape(plan.num_layers, plan.num_ranks, -1), axis=2)
        twice = np.argwhere(rows[:, :, 1:] == rows[:, :, :-1])
        if len(twice):
            layer, rank, slot = twice[0]
            raise PlanError(
                describe(
                    place,
                    f"expert {int(rows[layer, rank, slot])} on rank {rank} in layer {layer}",
                    "2 copies",
                    f"must be at most one for {format}",
                    "solve with the solver greedy",
                )
            )


def as_dict(node: Any, place: str, keys: set[str], optional: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return `node` if it is an object with exactly these keys, or raise PlanError."""
    if not isinstance(node, dict):
        raise PlanError(f"{place}: must be an object with the keys {sorted(keys)}, not {type(node).__name__}")
    extra, missing = sorted(map(str, set(node) - keys - optional)), sorted(keys - set(node))
    if extra or missing:
        raise PlanError(f"{place}: unknown keys {extra[:8]}, missing keys {missing}; this format has exactly {sorted(keys)}")
    return node


def as_int(value: Any, place: str, key: str, low: int, high: int) -> int:
    """Return an integer within low..high, or raise PlanError."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise PlanError(describe(place, key, value, f"must be an integer in {low}..{high}"))
    return value


def as_rows(value: Any, place: str, key: str, *, high: int, low: int = 0, length: int | None = None) -> np.ndarray:
    """Return int64 [rows, length] from a list of rows of equal length with integers in low..high, or raise PlanError."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) for row in value) or not value[0]:
        raise PlanError(f"{place}: {key} must be a non-empty list of rows of integers")
    width = len(value[0]) if length is None else length
    if len(value) > MAX_LAYERS or width > MAX_SLOTS or len(value) * width > MAX_SLOTS * 64:
        raise PlanError(describe(place, f"{key} size", [len(value), width], f"must be <= {MAX_LAYERS} rows of <= {MAX_SLOTS}"))
    for number, row in enumerate(value):
        if len(row) != width:
            raise PlanError(describe(place, f"length of {key}[{number}]", len(row), f"must be {width}, like that of the other rows"))
        wrong = next((item for item in row if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high), None)
        if wrong is not None:
            raise PlanError(describe(place, f"{key}[{number}]", wrong, f"must hold integers in {low}..{high}"))
    return np.array(value, dtype=np.int64)


def need_layers(found: int, wanted: int, path: Path, key: str, what: str) -> None:
    """Raise PlanError unless a file has as many rows as the model has layers."""
    if found != wanted:
        raise PlanError(describe(str(path), f"rows of {key}", found, f"must be {wanted}, {what}", "name the model that the file was made for"))
