"""What the ranks counted over a window of steps, put together: loads of experts and of ranks, seconds, exchanges.

Shapes: L MoE layers, E experts, R ranks of the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moesim.balance import balance_of
from moesim.errors import InputError, describe

MAX_STEP = 1 << 53


def gather(answers: Sequence[dict[str, Any]], num_ranks: int) -> dict[str, Any]:
    """Add up the answers of all ranks to `window`; pipeline stages, which hold different layers, are laid one after another."""
    rows = [np.array(answer["rows_LE"]) for answer in answers]
    rows_RLE = np.stack([np.concatenate(rows[place::num_ranks]) for place in range(num_ranks)])
    load_LR = rows_RLE.sum(2).T
    return {
        "rows_LE": rows_RLE.sum(0), "load_LR": load_LR, "balance": balance_of(load_LR).mean_over_max,
        "compute_s": sum(answer["compute_s"] for answer in answers), "step_ms": float(np.mean([answer["step_ms"] for answer in answers])),
        "epochs": sorted({epoch for answer in answers for epoch in answer["epochs"]}),
    }  # fmt: skip


def counts_answer(answers: Sequence[dict[str, Any]], num_ranks: int) -> dict[str, Any]:
    """Return the answer to `counts`: the window, its steps on every rank (`each_R`), and what ranks have sent in exchanges since they started."""
    total_bytes, total_s = (sum(answer["exchanged"][index] for answer in answers) for index in (0, 1))
    window = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in gather(answers, num_ranks).items()}
    return {
        **window, "exchanged_bytes": total_bytes, "exchanged_s": total_s, "steps": min(answer["steps"] for answer in answers),
        "expert_bytes": answers[0]["expert_bytes"], "each_R": [answer["each"] for answer in answers],
    }  # fmt: skip


def window_of(request: dict[str, Any]) -> tuple[int, int]:
    """Return (first, last) of a request for counts; raise InputError if they are not the ends of a window of steps."""
    first, last = request.get("first"), request.get("last")
    if not isinstance(first, int) or not isinstance(last, int) or isinstance(first, bool) or isinstance(last, bool):
        raise InputError(describe("counts", "first, last", [first, last], "must be two step numbers"))
    if not 0 <= first < last <= MAX_STEP:
        raise InputError(describe("counts", "first, last", [first, last], "must be 0 <= first < last"))
    return first, last
