"""`moesim calibrate`: measure the machine it runs on and write it as a hardware document with tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moesim.cli import options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("-o", "--out", help="hardware YAML to write; tables go to the folder <name>-tables beside it")],
    quick: Annotated[bool, typer.Option("--quick", help="fewer sizes and shorter samples: under a minute")] = False,
    ranks: Annotated[
        int | None, typer.Option("--ranks", min=1, max=64, help="devices to measure at once: GPUs, or processes that share the CPU [1; torchrun: its own]")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="measure the operator sizes of this model instead of a general grid, and its layers as launch serves them")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a calibration that was interrupted (its <name>-spool)")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Time matrix products, experts, attention, memory, disk, copies and collectives on this machine, all ranks at once."""
    from moesim.cli.output import emit_json, note, table
    from moesim.runtime.calibrate import calibrate as measure

    report = measure(out, quick=quick, ranks=ranks, model=model, resume=resume, on_progress=(lambda text: None) if as_json else note)
    if report is None:  # the launcher's first rank speaks for all
        return
    if as_json:
        emit_json(report)
        return
    table("Tables", ("table", "rows"), list(report["tables"].items()))
    table("\nMedian spread between samples", ("kind", "spread"), [(kind, f"{100 * value:.0f} %") for kind, value in report["spread"].items()])
    machine = report["machine"]
    note(f"\nlayers: {machine['layers']}; disk read {machine['disk']}")
    others = machine["others_cores"]
    if others is not None and others > 0.1 * machine["cores"]:
        note(f"warning: other work kept {others} of {machine['cores']} cores busy meanwhile; these numbers hold for a deployment beside as much of it")
    note(f"{out}: {report['num_ranks']} devices, {report['wall_s']:.1f} s; check it with: moesim hardware check {out}")
