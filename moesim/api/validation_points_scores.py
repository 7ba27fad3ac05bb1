"""What errors of points amount to: summaries, the floor that equal inputs set, rankings beside trivial rules, and how good a chosen layout is.

Relative errors, positive where the prediction is larger. A floor is the mean absolute relative error of the best function of the inputs: in every group of
rows with equal inputs, the one value with the least error. Kendall's tau is tau-b. Fractions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from math import sqrt
from typing import Any, TypeVar

import numpy as np

from moesim.api.validation_points_read import Point

MIN_LAYOUTS = 4
Row = TypeVar("Row")


def error_floor(groups: Iterable[Sequence[float]]) -> float | None:
    """Return the mean absolute relative error of the best function of the inputs; None of nothing."""
    total, count = 0.0, 0
    for values in groups:
        true = np.asarray(values, dtype=np.float64)
        # The least sum of |x - t| / t is at one of the values.
        total += float((np.abs(true[:, None] - true[None, :]) / true[None, :]).sum(axis=1).min()) if len(true) > 1 else 0.0
        count += len(true)
    return total / count if count else None


def grouped(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> list[list[Row]]:
    """Return rows with equal keys together, in order of first appearance."""
    found: dict[Hashable, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return list(found.values())


def kendall(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Return Kendall's tau-b; None where one side is constant."""
    a, b = (np.sign(np.subtract.outer(side, side))[np.triu_indices(len(side), 1)] for side in (np.asarray(left), np.asarray(right)))
    scale = sqrt(float(np.abs(a).sum()) * float(np.abs(b).sum()))
    return float((a * b).sum()) / scale if scale else None


def throughput(point: Point, ttft_ms: float, tpot_ms: float, share: float) -> float:
    """Return output tokens/s/GPU by Little's law: all clients always have a request of `share` of the nominal output in flight."""
    output = share * point.output
    return point.clients * output / (ttft_ms + tpot_ms * max(output - 1.0, 0.0)) * 1e3 / point.gpus


def ranking(rows: Sequence[tuple[Point, float, float, float, float]]) -> dict[str, Any]:
    """Return median tau by quantity for moesim and the two trivial rules; rows: point, measured and predicted TPOT, measured and predicted throughput.

    Rows of one model, engine, version and lengths are ranked among themselves, where there are at least three.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for group in grouped(rows, lambda row: (row[0].model, row[0].backend, row[0].version, row[0].prompt, row[0].output)):
        if len(group) < 3:
            continue
        batch_tp = [one[0].clients / one[0].decode.dp / sqrt(one[0].decode.tp) for one in group]
        per_gpu = [one[0].clients / one[0].gpus for one in group]
        taus = {
            "tpot.moesim": kendall([one[1] for one in group], [one[2] for one in group]),
            "tpot.batch/√tp": kendall([one[1] for one in group], batch_tp),
            "throughput.moesim": kendall([one[3] for one in group], [one[4] for one in group]),
            "throughput.batch per GPU": kendall([one[3] for one in group], per_gpu),
        }
        if all(value is not None for value in taus.values()):
            for name, value in taus.items():
                found[name].append(float(value or 0.0))
    return {
        "groups": len(next(iter(found.values()), [])),
        "median_tau": {name: float(np.median(values)) for name, values in found.items()},
        "mean_tau": {name: float(np.mean(values)) for name, values in found.items()},
    }


def choice(rows: Sequence[tuple[Point, float, float]]) -> dict[str, Any]:
    """Return how far the layout of the highest predicted throughput per GPU is below the best measured one; rows: point, measured, predicted.

    Groups are rows of equal model, engine, version, lengths and clients with at least `MIN_LAYOUTS` layouts.
    """
    losses = []
    for group in grouped(rows, lambda row: (row[0].model, row[0].backend, row[0].version, row[0].prompt, row[0].output, row[0].clients)):
        if len({row[0].layout for row in group}) >= MIN_LAYOUTS:
            chosen = max(group, key=lambda row: row[2])
            losses.append(1.0 - chosen[1] / max(row[1] for row in group))
    if not losses:
        return {"groups": 0, "mean_loss": None, "worst_loss": None, "share_within_5_percent": None}
    each = np.asarray(losses)
    return {"groups": len(each), "mean_loss": float(each.mean()), "worst_loss": float(each.max()), "share_within_5_percent": float((each <= 0.05).mean())}
