"""Host overheads of the engines, and the lengths of an unknown client, fitted on calibrating rows alone: dense models, half of the inputs by hash.

Times grow almost linearly with an overhead, so every row is simulated without overheads, with one per step and with one per sequence, and the rest of the
grid follows from these. Clients that fall in and out of step bend that line, so from the best of the grid the search goes on by simulation.
Milliseconds unless said otherwise. Shapes: r rows, s·q·f overheads per step, sequence and request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.engines import FOLDER, is_overlapped
from moesim.api.validation_points_read import Point
from moesim.api.validation_points_run import LENGTHS, OVERLAPPED, Overhead, Overheads, Runner, client_of
from moesim.api.validation_points_scores import grouped
from moesim.errors import MoesimError
from moesim.files import sha256_hex, write_atomic

RUNS, MIN_ROWS = 96, 6
"""Calibrating rows of a version that are simulated at most, and those that it needs for overheads of its own."""
STEPS = np.arange(0.0, 3001.0, 100.0)
"""Overheads per step that are tried, µs."""
SEQUENCES = np.arange(0.0, 101.0, 5.0)
"""Overheads per running sequence of a step that are tried, µs."""
FRONTS = np.arange(0.0, 201.0, 10.0)
"""Overheads per request that are tried, ms."""
MOVES = ((200.0, 0.0), (-200.0, 0.0), (0.0, 10.0), (0.0, -10.0), (200.0, -10.0), (-200.0, 10.0))
"""Overheads per step and per sequence that are added where simulation searches on, µs; what one explains the other explains too, hence the last two."""
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
    errors: dict[tuple[str, str], np.ndarray] = {}
    for keys in (lambda row: row.version, client_of, lambda row: "*"):
        for group in grouped(sample, lambda row: (row.backend, keys(row))):  # noqa: B023
            unknown = any(client_of(row) == "* undated" for row in group)
            tries = (_best(group, runner, one) for one in (LENGTHS if unknown else LENGTHS[:1]))
            tpot, ttft, best, errors[group[0].backend, keys(group[0])] = min(tries, key=lambda one: one[0] + one[1])
            entry = {"backend": group[0].backend, "version": keys(group[0]), "step_us": best.step_us, "sequence_us": best.sequence_us}
            entry |= {"front_ms": best.front_ms, "lengths": best.lengths}
            found.append(entry | {"rows": len(group), "mean_abs_tpot_error": round(tpot, 4), "median_abs_ttft_error": round(ttft, 4)})
    found += _overlapped(found, errors)
    document = {
        "comment": "host overheads fitted on calibrating rows by `moesim validate --points default --hardware h100-sxm-8 --fit-overheads FILE`",
        "overheads": sorted(found, key=lambda one: (one["backend"], one["version"])),
    }
    write_atomic(target, json.dumps(document, indent=1) + "\n")
    return document


def _overlapped(found: Sequence[dict[str, Any]], errors: Mapping[tuple[str, str], np.ndarray]) -> list[dict[str, Any]]:
    """Return pools for versions that overlap host and device of engines whose calibrating rows do not: what fits TPOT in all those that do at once.

    errors: by engine and version, sums of |error| of TPOT, [s, q]; one engine alone may leave what is per step and what per sequence open.
    """
    known = [key for key in errors if is_overlapped(*key)]
    if not known:
        return []
    s, q = np.unravel_index(int(np.sum([errors[key] for key in known], axis=0).argmin()), (len(STEPS), len(SEQUENCES)))
    best = {"step_us": float(STEPS[s]), "sequence_us": float(SEQUENCES[q]), "rows": 0, "mean_abs_tpot_error": None, "median_abs_ttft_error": None}
    alone = [one for one in found if one["version"].startswith("* ") and one["backend"] not in {backend for backend, _ in known}]
    return [{**one, **best, "version": f"{one['version']} {OVERLAPPED}"} for one in alone]


def _best(group: Sequence[Point], runner: Runner, lengths: str) -> tuple[float, float, Overhead, np.ndarray]:
    """Return the least errors of TPOT and TTFT under what an unknown client may do, the overheads that give them, and sums of |error| of TPOT, [s, q]."""
    used, kept, times = [], [], []
    for row in group:
        try:
            times.append([_times(row, runner, Overhead(step_us=step, sequence_us=each, lengths=lengths)) for step, each in PROBES])
            kept.append([row.tpot_ms, row.ttft_ms])
            used.append(row)
        except MoesimError:
            continue  # does not fit: it is not scored either
    if not kept:
        return float("inf"), float("inf"), Overhead(), np.zeros((len(STEPS), len(SEQUENCES)))
    time_r32, true_r2 = np.array(times), np.array(kept, dtype=np.float64)
    slope_r22 = (time_r32[:, 1:] - time_r32[:, :1]) / np.array(PROBES)[1:].max(axis=1)[:, None]
    time_sqr2 = time_r32[:, 0] + STEPS[:, None, None, None] * slope_r22[:, 0] + SEQUENCES[None, :, None, None] * slope_r22[:, 1]
    error_sqr = np.abs(time_sqr2[..., 0] / true_r2[:, 0] - 1.0)
    ttft_sqf = np.median(np.abs((time_sqr2[..., 1, None] + FRONTS) / true_r2[:, 1, None] - 1.0), axis=2)
    s, q, _ = np.unravel_index(int((error_sqr.mean(axis=2)[:, :, None] + ttft_sqf).argmin()), ttft_sqf.shape)
    best = _simulated(used, true_r2, runner, float(STEPS[s]), float(SEQUENCES[q]), lengths)
    moved = True
    while moved:
        tries = [(best[2].step_us + step, best[2].sequence_us + each) for step, each in MOVES]
        near = [_simulated(used, true_r2, runner, step, each, lengths) for step, each in tries if 0 <= step <= STEPS[-1] and 0 <= each <= SEQUENCES[-1]]
        nearest = min(near, key=lambda one: one[0] + one[1])
        moved = nearest[0] + nearest[1] < best[0] + best[1]
        best = nearest if moved else best
    return *best, error_sqr.sum(axis=2)


def _simulated(rows: Sequence[Point], true_r2: np.ndarray, runner: Runner, step_us: float, each_us: float, lengths: str) -> tuple[float, float, Overhead]:
    """Return the errors of TPOT and TTFT under overheads per step and sequence, with the overhead per request that suits TTFT."""
    time_r2 = np.array([_times(row, runner, Overhead(step_us=step_us, sequence_us=each_us, lengths=lengths)) for row in rows])
    ttft_f = np.median(np.abs((time_r2[:, 1, None] + FRONTS) / true_r2[:, 1, None] - 1.0), axis=0)
    best = Overhead(step_us=step_us, sequence_us=each_us, front_ms=float(FRONTS[ttft_f.argmin()]), lengths=lengths)
    errors = np.abs(np.array([_times(row, runner, best) for row in rows]) / true_r2 - 1.0)
    return float(errors[:, 0].mean()), float(np.median(errors[:, 1])), best


def _times(row: Point, runner: Runner, one: Overhead) -> tuple[float, float]:
    runner.overheads = Overheads(by_version={(row.backend, "*"): one})
    guess = runner.predict(row)
    return guess.tpot_ms, guess.ttft_ms
