"""`validate_points`: measured closed loops in; the same loops simulated, prediction beside measurement, out.

Rows are de-duplicated, then excluded by rules on input columns only, or because equal inputs disagree; rows that calibrate the host overheads are listed and
never scored. What cannot be simulated (an unknown model, one that does not fit) is excluded with its reason. Errors are relative and signed.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.engines import FOLDER
from moesim.api.error_summary import error_summary
from moesim.api.served_routing import SOURCE, USE
from moesim.api.validation_points_fit import fit_overheads as fitted
from moesim.api.validation_points_read import COPY, Point, Points, Refused, read_points, shipped_points
from moesim.api.validation_points_run import Overheads, Prediction, Runner, read_overheads
from moesim.api.validation_points_scores import choice, error_floor, grouped, ranking, throughput
from moesim.costs.model import ENGINES
from moesim.errors import InputError, MoesimError
from moesim.files import read_yaml, sha256_hex
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.traces.routing_trace import RoutingTrace

SCHEMA = "moesim.validate/1"
MOST_CLIENTS = 256
AGREEMENT = 1.05
"""Rows of equal inputs agree if their largest value is at most this times their smallest."""
QUANTITIES = ("ttft", "tpot", "throughput")
MEAN_SHARE = 0.9
"""Mean length of a request over the nominal one."""


def validate_points(
    source: str | Path | None = None,
    *,
    hardware: str | Cluster,
    model: str | MoEModel | None = None,
    requests_trace: str | None = None,
    map_layers: str | None = None,
    strict: bool = False,
    seed: int = 0,
    overheads: Overheads | None = None,
    wanted: Callable[[Point], bool] = lambda point: True,
) -> dict[str, Any]:
    """Return the report of `moesim validate --points`.

    source: a CSV file, gzipped or not; None or "default": the package's own of the hardware. model: stands for the model of every row.
    requests_trace: routing of MoE models; None draws balanced choices. wanted: which rows are looked at.
    Raises InputError if the file is not one of this kind, or nothing is left to score.
    """
    began = time.perf_counter()
    runner = Runner(hardware, model=model, requests_trace=requests_trace, map_layers=map_layers, strict=strict, seed=seed, overheads=overheads)
    points = read_points(_path(source, runner.base))
    rows, refused = _resolved([point for point in points.points if wanted(point)], runner)
    every = rows
    rows, copies = without_copies(rows)
    floors = _floors(every)
    refused += [*points.refused, *copies]
    rows, left_out = excluded(rows, every)
    refused += left_out
    used = calibrating_runs(runner) if overheads is None else set()
    calibrating = [row for row in rows if _run_of(row) in used]
    scored = [row for row in rows if _run_of(row) not in used]
    done: list[tuple[Point, Prediction]] = []
    for row in scored:
        try:
            done.append((row, runner.predict(row)))
        except MoesimError as cause:
            refused.append(Refused(id=row.id, reason="cannot be simulated", detail=str(cause)))
    if not done:
        first = next((f"; the first: {one.id}: {one.detail}" for one in refused if one.detail and one.reason != COPY), "")
        raise InputError(f"{points.source}: no row is left to score; {dict(Counter(one.reason for one in refused))}{first}")
    return _report(runner, points, done, calibrating, refused, floors, requests_trace, time.perf_counter() - began)


def _path(source: str | Path | None, cluster: Cluster) -> Path:
    if source is not None and str(source) != "default":
        return Path(source)
    shipped, device = shipped_points(), re.sub(r"-\d+(x\d+)?$", "", cluster.name)
    if device not in shipped:
        raise InputError(f"{cluster.name}: the package has no end-to-end points of {device}; give a CSV file with --points; shipped: {', '.join(shipped)}")
    return shipped[device]


# --- which rows are scored ----------------------------------------------------------------------------------------


def _resolved(points: Sequence[Point], runner: Runner) -> tuple[list[Point], list[Refused]]:
    """Return the rows under the most common label of their model, so that relabelled rows meet, and those whose model is not known."""
    rows, refused = [], []
    for point in points:
        try:
            runner.model_of(point)
            rows.append(point)
        except MoesimError as cause:
            refused.append(Refused(id=point.id, reason="unknown model", detail=str(cause)))
    labels: dict[str, Counter[str]] = {}
    for row in rows:
        labels.setdefault(runner.model_of(row).name, Counter())[row.model] += 1
    return [replace(row, model=labels[runner.model_of(row).name].most_common(1)[0][0]) for row in rows], refused


def without_copies(rows: Sequence[Point]) -> tuple[list[Point], list[Refused]]:
    """Return one of every measurement, the fullest row of it: equal times to the last digit at equal model, engine, lengths and clients are one run."""
    kept: list[Point] = []
    refused: list[Refused] = []
    for group in grouped(rows, lambda row: (row.model, row.backend, row.prompt, row.output, row.clients, row.ttft_ms, row.tpot_ms)):
        best = max(group, key=lambda row: row.filled)
        kept.append(best)
        refused += [Refused(id=row.id, reason=COPY, detail=best.id) for row in group if row is not best]
    return kept, refused


def excluded(rows: Sequence[Point], every: Sequence[Point]) -> tuple[list[Point], list[Refused]]:
    """Return the rows that may be scored, without the quantities that may not, and what was left out and why.

    every: all rows, copies included: the fuller copy of a run may name more inputs than the row that disagrees with it.
    """
    times: dict[tuple[object, ...], list[Point]] = {}
    for row in every:
        times.setdefault(row.inputs, []).append(row)
    kept: list[Point] = []
    refused: list[Refused] = []
    for row in rows:
        if row.clients >= MOST_CLIENTS:
            refused.append(Refused(id=row.id, reason=f"clients >= {MOST_CLIENTS}"))
        elif row.ttft_ms is not None and any(part is not None and part.workers is None for part in (row.decode, row.prefill)):
            refused.append(Refused(id=row.id, reason="worker counts missing: TPOT only"))
            kept.append(replace(row, ttft_ms=None))
        else:
            kept.append(row)
    result: list[Point] = []
    for row in kept:
        for name in ("ttft_ms", "tpot_ms"):
            values = [value for one in times[row.inputs] if (value := getattr(one, name)) is not None]
            if getattr(row, name) is not None and max(values) > AGREEMENT * min(values):
                refused.append(Refused(id=row.id, reason=f"equal inputs disagree: {name[:4]}"))
                row = replace(row, ttft_ms=None) if name == "ttft_ms" else replace(row, tpot_ms=None)
        if row.ttft_ms is not None or row.tpot_ms is not None:
            result.append(row)
    return result, refused


def calibrates(row: Point, runner: Runner) -> bool:
    """Return whether a row of a shipped file calibrates the host overheads: dense models, half of the inputs by hash, so that repeats stay together."""
    return not runner.model_of(row).moe_layer_ids and int(sha256_hex(repr(row.inputs).encode())[:8], 16) % 2 == 0


def calibrating_runs(runner: Runner) -> set[tuple[object, ...]]:
    """Return the measurements on which the overheads of the package rest; a row of any file that is one of them is not scored."""
    found = set()
    for path in shipped_points().values():
        rows, _ = _resolved(read_points(path).points, runner)
        found |= {_run_of(row) for row in excluded(without_copies(rows)[0], rows)[0] if calibrates(row, runner)}
    return found


def _run_of(row: Point) -> tuple[object, ...]:
    return (row.model.rsplit("/", 1)[-1].lower(), row.backend, row.prompt, row.output, row.clients, row.ttft_ms, row.tpot_ms)


def _floors(rows: Sequence[Point]) -> dict[str, dict[str, float | None]]:
    """Return the floors by quantity of every model and engine, disagreeing rows included."""
    found = {}
    for group in grouped([row for row in rows if row.clients < MOST_CLIENTS], lambda row: (row.model, row.backend)):
        same = grouped(group, lambda row: row.inputs)
        found[_label(group[0])] = {
            name: error_floor([values for one in same if (values := sorted({v for row in one if (v := getattr(row, f"{name}_ms")) is not None}))])
            for name in ("ttft", "tpot")
        }
    return found


def _label(row: Point) -> str:
    return f"{row.model} {row.backend}".strip()


# --- overheads ----------------------------------------------------------------------------------------------------


def fit_overheads(source: str | Path | None, *, hardware: str | Cluster, target: Path = FOLDER / "overheads.json", seed: int = 0) -> dict[str, Any]:
    """Fit the host overheads on the calibrating rows of a file alone, write them to `target` and return them."""
    runner = Runner(hardware, overheads=Overheads(), seed=seed)
    every, _ = _resolved(read_points(_path(source, runner.base)).points, runner)
    rows, _ = excluded(without_copies(every)[0], every)
    return fitted([row for row in rows if calibrates(row, runner)], runner, target)


# --- report -------------------------------------------------------------------------------------------------------


def _report(
    runner: Runner,
    points: Points,
    done: list[tuple[Point, Prediction]],
    calibrating: list[Point],
    refused: list[Refused],
    floors: dict[str, dict[str, float | None]],
    trace: str | RoutingTrace | None,
    wall_s: float,
) -> dict[str, Any]:
    rows = [_row(point, guess) | {"routed": bool(runner.model_of(point).moe_layer_ids)} for point, guess in done]
    groups = {}
    peers = read_yaml(FOLDER / "peers.yaml")
    for group in grouped(list(zip(rows, done, strict=True)), lambda one: _label(one[1][0])):
        first = group[0][1][0]
        model = runner.model_of(first)
        peer = {tool: found.get(f"{model.name} {first.backend}" if model.moe_layer_ids else "dense") for tool, found in peers.items()}
        groups[_label(first)] = {
            **{name: error_summary([row["errors"][name] for row, _ in group if row["errors"][name] is not None]) for name in QUANTITIES},
            "rows": len(group),
            "error_floor": floors.get(_label(first)),
            "peers": {
                tool: {name: {"mean_abs_error": pair[0], "median_abs_error": pair[1]} for name, pair in (found or {}).items()} for tool, found in peer.items()
            },
        }
    full = [(point, guess) for point, guess in done if point.ttft_ms is not None and point.tpot_ms is not None]
    speeds = [(point, *_speeds(point, guess)) for point, guess in full]
    tpots = [(point, float(point.tpot_ms or 0.0), guess.tpot_ms, true, said) for (point, guess), (_, true, said) in zip(full, speeds, strict=True)]
    classes: dict[str, float] = {}
    for _, guess in done:
        for name, share in guess.provenance.items():
            classes[name] = classes.get(name, 0.0) + share / len(done)
    known = [value["tpot"] for value in floors.values() if value["tpot"] is not None]
    return {
        "schema": SCHEMA,
        "mode": "points",
        "source": Path(points.source).name,
        "hardware": runner.base.name,
        "routing": {"source": trace or SOURCE, "use": "given" if trace else USE},
        **{name: error_summary([row["errors"][name] for row in rows if row["errors"][name] is not None]) for name in QUANTITIES},
        "groups": groups,
        "ranking": ranking(tpots),
        "layout_choice": choice(speeds),
        "overheads": [
            {"backend": key[0], "version": key[1], **{name: getattr(one, name) for name in one.__dataclass_fields__}}
            for key, one in sorted(runner.overheads.by_version.items())
        ],
        "rows_read": points.rows,
        "rows_scored": len(rows),
        "rows_calibrated": len(calibrating),
        "rows_excluded": dict(sorted(Counter(one.reason for one in refused).items())),
        "rows_repaired": dict(sorted(Counter(repair for point in points.points for repair in point.repairs).items())),
        "error_floor": float(np.mean(known)) if known else None,
        "provenance": dict(sorted(classes.items())),
        "columns_ignored": list(points.ignored),
        "engines_assumed": dict(sorted(Counter(point.backend or "(none)" for point, _ in done if point.backend not in ENGINES).items())),
        "rows": rows,
        "calibrating": [point.id for point in calibrating],
        "excluded": [{"id": one.id, "reason": one.reason, "detail": one.detail} for one in refused],
        "wall_s": wall_s,
    }


def _speeds(point: Point, guess: Prediction) -> tuple[float, float]:
    """Return measured and predicted throughput; the measurement's follows from its TTFT and TPOT."""
    assert point.ttft_ms is not None and point.tpot_ms is not None
    return throughput(point, point.ttft_ms, point.tpot_ms, MEAN_SHARE), throughput(point, guess.ttft_ms, guess.tpot_ms, MEAN_SHARE)


def _row(point: Point, guess: Prediction) -> dict[str, Any]:
    errors: dict[str, float | None] = {
        "ttft": None if point.ttft_ms is None else guess.ttft_ms / point.ttft_ms - 1.0,
        "tpot": None if point.tpot_ms is None else guess.tpot_ms / point.tpot_ms - 1.0,
        "throughput": None,
    }
    if point.ttft_ms is not None and point.tpot_ms is not None:
        true, said = _speeds(point, guess)
        errors["throughput"] = said / true - 1.0
    return {
        "id": point.id,
        "model": point.model,
        "backend": point.backend,
        "version": point.version,
        "clients": point.clients,
        "isl": point.prompt,
        "osl": point.output,
        "gpus": point.gpus,
        "measured_ms": {"ttft": point.ttft_ms, "tpot": point.tpot_ms},
        "predicted_ms": {"ttft": guess.ttft_ms, "tpot": guess.tpot_ms},
        "errors": errors,
        "repairs": list(point.repairs),
    }


__all__ = ["fit_overheads", "read_overheads", "validate_points"]
