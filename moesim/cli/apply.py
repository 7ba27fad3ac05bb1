"""`moesim apply`: carry a plan out on a live deployment, or show what it would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="plan file")],
    to: Annotated[str, typer.Option("--to", help="HOST:PORT of the deployment's control port; its token in MOESIM_TOKEN")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="change nothing; show what would move, the predicted gain and when it pays")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask on a terminal")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Check, stage, install and verify PLAN on a running deployment; its ranks serve on and keep their pids.

    Exit code 0: installed or already there; 1: refused, failed or put back; 2: bad plan file or address.
    """
    import sys

    from moesim.cli.output import emit_json, note
    from moesim.errors import ApplyError
    from moesim.plan import Plan
    from moesim.runtime.client import apply_plan
    from moesim.runtime.control import parse_address

    parse_address(to)
    document = Plan.read(plan)
    progress = None if as_json else note
    if not dry_run and not yes and not as_json and sys.stdin.isatty():
        print_report(apply_plan(to, document, dry_run=True))
        if not typer.confirm("install it?", err=True):
            raise SystemExit(1)
    report = apply_plan(to, document, dry_run=dry_run, on_progress=progress)
    if as_json:
        emit_json(report)
    else:
        print_report(report)
    if report["status"] == "rolled_back":
        raise ApplyError(f"verification failed: {report['reason']}; the old placement was put back and serves on as epoch {report['epoch']}")


def print_report(report: dict[str, Any]) -> None:
    """Print a report for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes

    moved, balance = report["moved"], report["balance"]
    figures = {name: "-" if value is None else f"{value:.4f}" for name, value in balance.items()}
    staging, word = report.get("staging_bytes"), "predicted, " if report["status"] == "dry-run" else ""
    parts = ", ".join(f"{name.removesuffix('_ms')} {value:.1f}" for name, value in report.get("pause_parts_ms", {}).items())
    pays = "never" if report["break_even_steps"] is None else f"after {report['break_even_steps']} steps"
    rows = [
        ["moved", f"{moved['slots']} slots, {format_bytes(moved['bytes'])}, {format_bytes(moved['between_ranks'])} of it between ranks"],
        ["balance", f"{figures['before']} before, {figures['predicted']} predicted, {figures['after']} after"],
        ["pause", f"{word}{report['pause_ms']:.1f} ms{f' ({parts})' if parts else ''}, pays {pays}"],
        ["staging", "-" if staging is None else f"{format_bytes(staging)} on the rank that needs most"],
        ["outputs equal", {True: "yes", False: "no", None: "-"}[report["outputs_equal"]]],
    ]
    table(f"{report['status']}: epoch {report['epoch']}, map {report['map_sha256'][:12]}", ["what", "figure"], rows)
    if report["status"] == "dry-run":
        pairs = [[f"rank {source}", *[format_bytes(value) for value in row]] for source, row in enumerate(moved["rank_pairs"])]
        note("")
        table("bytes from rank (row) to rank", ["", *[str(rank) for rank in range(len(pairs))]], pairs)
