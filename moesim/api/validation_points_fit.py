"""Host overheads of the engines, and the lengths of an unknown client, fitted on calibrating rows alone: dense models, half of the inputs by hash.

Times grow almost linearly with an overhead, so every row is simulated without overheads, with one per step and with one per sequence, and the rest of the
grid follows from these. Milliseconds unless said otherwise. Shapes: r rows, s·q·f overheads per step, sequence and request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.validation_points_read import Point
from moesim.api.validation_points_run import FOLDER, LENGTHS, OVERLAPPED, Overhead, Overheads, Runner, client_of, is_overlapped
from moesim.api.validation_points_scores import grouped
from moesim.errors import MoesimError
from moesim.files import sha256_hex, write_atomic

RUNS, MIN_ROWS = 12, 6
"""Calibrating rows of a version that are simulated, and those that it needs for overheads of its own."""
STEPS = np.arange(0.0, 3001.0, 100.0)
"""Overheads per step that are tried, µs."""
SEQUENCES = np.arange(0.0, 101.0, 5.0)
"""Overheads per running sequence of a step that are tried, µs."""
FRONTS = np.arange(0.0, 201.0, 10.0)
"""Overheads per request that are tried, ms."""
PROBES = ((0.0, 0.0), (1000.0, 0.0), (0.0, 20.0))
"""Overheads per step and per sequence that are simulated, µs."""


def fit_overheads(rows: Sequence[Point], runner: Runner, target: Path = FOLDER / "overheads.json") -> dict[str, Any]:
    """Fit the overheads on `rows`, which are all calibrating, write them to `target` and return them.

    A version takes what gives the least mean |error| of TPOT plus median |error| of TTFT. Versions with fewer than `MIN_ROWS` rows take those of their kind
    of client, pooled, or of the engine.
    """
    rows = [row for row in rows if row.ttft_ms is not None and row.tpot_ms is not None]
    versions = [group for group in grouped(rows, lambda row: (row.backend, row.version)) if len(group) >= MIN_ROWS]
    sample = [row for group in versions for row in sorted(group, key=lambda row: sha256_hex(row.id.encode()))[:RUNS]]
    found: list[dict[str, Any]] = []
    for keys in (lambda row: row.version, client_of, lambda row: "*"):
        for group in grouped(sample, lambda row: (row.backend, keys(row))):  # noqa: B023
            unknown = any(client_of(row) == "* undated" for row in group)
            tpot, ttft, best = min((_best(group, runner, one) for one in (LENGTHS if unknown else LENGTHS[:1])), key=lambda one: one[0] + one[1])
            entry = {"backend": group[0].backend, "version": keys(group[0]), "step_us": best.step_us, "sequence_us": best.sequence_us}
            entry |= {"front_ms": best.front_ms, "lengths": best.lengths}
            found.append(entry | {"rows": len(group), "mean_abs_tpot_error": round(tpot, 4), "median_abs_ttft_error": round(ttft, 4)})
    found += _overlapped(found)
    document = {
        "comment": "host overheads fitted on calibrating rows by `moesim validate --points default --hardware h100-sxm-8 --fit-overheads FILE`",
        "overheads": sorted(found, key=lambda one: (one["backend"], one["version"])),
    }
    write_atomic(target, json.dumps(document, indent=1) + "\n")
    return document


def _overlapped(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return pools for versions that overlap host and device of engines whose calibrating rows do not: the mean of what is left unhidden in those that do."""
    known = [one for one in found if is_overlapped(one["backend"], one["version"])]
    result = []
    for one in found:
        if known and one["version"].startswith("* ") and not any(other["backend"] == one["backend"] for other in known):
            means = {name: round(float(np.mean([other[name] for other in known])), 1) for name in ("step_us", "sequence_us")}
            result.append({**one, "version": f"{one['version']} {OVERLAPPED}", **means, "rows": 0, "mean_abs_tpot_error": None, "median_abs_ttft_error": None})
    return result


def _best(group: Sequence[Point], runner: Runner, lengths: str) -> tuple[float, float, Overhead]:
    """Return the least errors of TPOT and TTFT under what an unknown client may do, and the overheads that give them."""
    used, kept, times = [], [], []
    for row in group:
        try:
            times.append([_times(row, runner, Overhead(step_us=step, sequence_us=each, lengths=lengths)) for step, each in PROBES])
            kept.append([row.tpot_ms, row.ttft_ms])
            used.append(row)
        except MoesimError:
            continue  # does not fit: it is not scored either
    if not kept:
        return float("inf"), float("inf"), Overhead()
    time_r32, true_r2 = np.array(times), np.array(kept, dtype=np.float64)
    slope_r22 = (time_r32[:, 1:] - time_r32[:, :1]) / np.array(PROBES)[1:].max(axis=1)[:, None]
    time_sqr2 = time_r32[:, 0] + STEPS[:, None, None, None] * slope_r22[:, 0] + SEQUENCES[None, :, None, None] * slope_r22[:, 1]
    tpot_sq = np.abs(time_sqr2[..., 0] / true_r2[:, 0] - 1.0).mean(axis=2)
    ttft_sqf = np.median(np.abs((time_sqr2[..., 1, None] + FRONTS) / true_r2[:, 1, None] - 1.0), axis=2)
    s, q, f = np.unravel_index(int((tpot_sq[:, :, None] + ttft_sqf).argmin()), ttft_sqf.shape)
    best = Overhead(step_us=float(STEPS[s]), sequence_us=float(SEQUENCES[q]), front_ms=float(FRONTS[f]), lengths=lengths)
    # Clients whose requests are all alike fall in and out of step, which no slope foretells: the choice is judged as it is simulated.
    found = np.array([_times(row, runner, best) for row in used])
    errors = np.abs(found / true_r2 - 1.0)
    return float(errors[:, 0].mean()), float(np.median(errors[:, 1])), best


def _times(row: Point, runner: Runner, one: Overhead) -> tuple[float, float]:
    runner.overheads = Overheads(by_version={(row.backend, "*"): one})
    guess = runner.predict(row)
    return guess.tpot_ms, guess.ttft_ms
