"""`moesim validate --points`: measured closed loops beside predictions, for people and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def show_points(
    source: str,
    *,
    hardware: str,
    model: str | None,
    requests_trace: str | None,
    map_layers: str | None,
    strict: bool,
    seed: int,
    write: str | None,
    fit: str | None,
    as_json: bool,
) -> None:
    """Score points and print the report; write: a Markdown page; fit: fit the host overheads into this file instead."""
    from moesim.api.validation_points import fit_overheads, validate_points
    from moesim.cli.output import emit_json

    if fit is not None:
        report = {"schema": "moesim.overheads/1", **fit_overheads(source, hardware=hardware, target=Path(fit), seed=seed)}
        emit_json(report)
        return
    report = validate_points(source, hardware=hardware, model=model, requests_trace=requests_trace, map_layers=map_layers, strict=strict, seed=seed)
    if write is not None:
        from moesim.api.validation_points_page import OTHER_ROUTING, write_page

        other = None
        if requests_trace is None:
            dense = {row["model"] for row in report["rows"]} - {row["model"] for row in report["rows"] if row["routed"]}
            other = validate_points(
                source, hardware=hardware, model=model, requests_trace=OTHER_ROUTING, strict=strict, seed=seed, wanted=lambda point: point.model not in dense
            )
        write_page(report, Path(write), other)
    if as_json:
        emit_json(report)
    else:
        print_points(report)


def print_points(report: dict[str, Any]) -> None:
    """Print the validation of points."""
    from moesim.api.validation_points_page import COLUMNS, group_rows, notes
    from moesim.cli.output import note, table

    table("", COLUMNS, group_rows(report))
    for line in notes(report):
        note(line)
