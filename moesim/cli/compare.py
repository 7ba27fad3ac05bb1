"""`moesim compare`: a plan's prediction beside what was measured under it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli import options
from moesim.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def compare(
    trace: Annotated[str, typer.Argument(help="recorded run (trace folder of serve-demo --trace-out or capture), or HOST:PORT of a live deployment")],
    model: options.Model,
    hardware: options.Hardware,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan that was applied; default: the map that was in force last")] = None,
    after: Annotated[str | None, typer.Option("--after", help="trace recorded under the plan, where TRACE was recorded before it")] = None,
    times: options.Times = "model",
    settings: options.Set = None,
    strict: options.Strict = False,
    steps: Annotated[int, typer.Option("--steps", min=4, max=2000, help="with HOST:PORT: how many of the last steps are measured")] = 128,
    as_json: options.AsJson = False,
) -> None:
    """Put rank loads, bytes and step times that are predicted for a plan beside those that were measured, with signed errors."""
    from moesim.cli.output import emit_json

    chosen = options.parse_settings(settings)
    if _is_address(trace):
        from moesim.api.comparing_live import compare_live

        if plan is not None or after is not None or times != "model":
            raise InputError("compare: a live deployment is compared with its installed plan; leave out --plan, --after and --times, or give a trace")
        report = compare_live(trace, model=model, hardware=hardware, steps=steps, settings=chosen, strict=strict)
    else:
        from moesim.api.comparing import compare as run

        report = run(trace, model=model, hardware=hardware, plan=plan, after=after, times=times, settings=chosen, strict=strict)
    if as_json:
        emit_json(report)
    else:
        _show(report)


def _is_address(text: str) -> bool:
    from moesim.runtime.control import parse_address

    if text.startswith("synthetic:") or Path(text).exists():
        return False
    try:
        parse_address(text)
    except InputError:
        return False
    return True


def _show(report: dict[str, Any]) -> None:
    from moesim.cli.output import note, table

    def row(name: str, one: dict[str, Any]) -> tuple[str, ...]:
        cells = [f"{one[key]:.4g}" if one[key] is not None else "–" for key in ("predicted", "measured")]
        return (name, *cells, f"{100 * one['error']:+.1f} %" if one["error"] is not None else "–")

    load = report["rank_load"]
    rows = [row("balance (mean / max)", load["balance"])]
    rows += [row(f"busiest rank of layer {layer['layer']}, pairs per token", layer["busiest"]) for layer in load["layers"][:8]]
    rows += [row("bytes to other ranks per token", report["bytes_per_token"])]
    rows += [row(f"step ms, {phase}, {figure}", one) for phase, figures in report["step_ms"].items() for figure, one in figures.items()]
    rows += [row(f"stage {name}, ms per step", one) for name, one in report["stages_ms"].items()]
    table(f"Plan {report['plan']} on {report['hardware']}", ("", "predicted", "measured", "error"), rows)
    note(f"\n{report['steps']['measured']} steps measured; predicted from the routing of: {report['basis']} ({report['steps']['predicted']} steps)")
    note(f"rank loads measured from {load['measured_from']}: mean error {100 * load['mean_abs_error']:.2f} % of an even load")
