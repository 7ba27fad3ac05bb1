"""`moesim validate --kernels`: measured kernel times beside predictions, for people."""

from __future__ import annotations

from typing import Any

OWN = "package"


def show_kernels(source: str | None, *, hardware: str, model: str | None, backend: str | None, strict: bool, as_json: bool) -> None:
    """Score a table, a folder, or the hardware's own tables, and print the report."""
    from moesim.api.validation_kernels import validate_kernels
    from moesim.cli.output import emit_json

    report = validate_kernels(None if source in (None, OWN) else source, hardware, model=model, backend=backend, strict=strict)
    if as_json:
        emit_json(report)
    else:
        print_kernels(report)


def print_kernels(report: dict[str, Any]) -> None:
    """Print the validation of tables."""
    from moesim.cli.output import note, table

    donor = f", donor {report['calibrated_from']}" if report["calibrated_from"] else ""
    note(f"{report['source']} on {report['hardware']}{donor}: {report['rows_scored']} rows scored, {report['rows_calibrated']} rows calibrate only")
    rows = []
    for name, quantity in report["quantities"].items():
        rows.append(_row(name, quantity))
        if "transfer" in quantity:
            rows.append(_row(f"  {name}, by transfer alone", quantity["transfer"]))
    table("", ["table", "rows", "mean error", "mean |error|", "median", "p90", "noise", "predicted by"], rows)
    for reason, count in report["rows_excluded"].items():
        note(f"excluded: {count} × {reason}")
    for name, message in report["files_refused"].items():
        note(f"refused: {name}: {message}")
    note("times are " + ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items()))
    peers = {(peer["tool"], peer["quantity"]): peer for quantity in report["quantities"].values() for peer in quantity["peers"]}
    for peer in peers.values():
        note(f"peer: {peer['tool']}: {peer['error']:.1%} ({peer['quantity']}; {peer['source']})")


def _row(name: str, quantity: dict[str, Any]) -> tuple[str, ...]:
    figures = [quantity[key] for key in ("mean_error", "mean_abs_error", "median_abs_error", "p90_abs_error", "error_floor")]
    shown = [("-" if value is None else f"{value:+.1%}" if index == 0 else f"{value:.1%}") for index, value in enumerate(figures)]
    return (name, str(quantity["n"]), *shown, quantity["method"].replace("_", " "))
