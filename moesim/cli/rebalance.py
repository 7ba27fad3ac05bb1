"""`moesim rebalance`: is rebalancing worth it on this trace, and from which period on?"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesim.cli import options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def rebalance(
    traces: Annotated[list[str], typer.Argument(help="one trace, or several that are replayed one after another")],
    model: options.Model,
    hardware: options.Hardware,
    plan: options.PlanFile = None,
    placement: options.Placement = "linear",
    policy: Annotated[
        str | None, typer.Option("--policy", help="never, periodic:N, on_drift:T or budgeted:BYTES,N; default: change.balancer, else on_drift:0.9")
    ] = None,
    mode: Annotated[str | None, typer.Option("--mode", help="background or pause; default: change.mode")] = None,
    periods: Annotated[str, typer.Option("--periods", help="periods to sweep, in passes, like 1,4,16")] = "",
    planner_s: Annotated[float | None, typer.Option("--planner-s", help="time of the planner on the simulated clock, s")] = None,
    settings: options.Set = None,
    tokens_per_step: options.TokensPerStep = None,
    map_layers: options.MapLayers = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Replay with and without a balancer whose planner time, migration traffic and staging memory are charged."""
    from moesim import api
    from moesim.cli.output import counting, emit_json
    from moesim.errors import InputError, describe

    try:
        sweep = [int(word) for word in periods.split(",") if word]
    except ValueError:
        raise InputError(describe("--periods", "periods", periods, "must be integers with commas between them")) from None
    with counting("forward passes") as progress:
        report = api.rebalance(
            traces,
            model=model,
            hardware=hardware,
            plan=plan,
            placement=placement,
            policy=policy,
            mode=mode,
            periods=sweep,
            planner_s=planner_s,
            tokens_per_step=tokens_per_step,
            settings=options.parse_settings(settings),
            map_layers=map_layers,
            seed=seed,
            progress=progress,
        )
    if as_json:
        emit_json(report)
    else:
        print_rebalance(report)


def print_rebalance(report: dict[str, Any]) -> None:
    """Print the verdict, and the sweep if there was one, for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes, format_time

    found = report["verdict"]
    note(f"{report['model']} on {report['hardware']}, policy {report['policy']}, migration in {report['mode']}")
    note(f"rebalancing {'pays' if found['worth_it'] else 'does not pay'} on this trace: {found['gain']:+.1%}")
    even = found["break_even"]
    rows = [
        ("time without / with", f"{format_time(found['without_s'])} / {format_time(found['total_s'])}"),
        ("balance without / with", f"{found['balance']['without']:.3f} / {found['balance']['run']:.3f}"),
        ("rebalances", f"{found['rebalances']}"),
        ("moved", format_bytes(found["moved_bytes"])),
        ("pause / planner", f"{format_time(found['pause_s'])} / {format_time(found['planner_s'])}"),
    ]
    if found["rebalances"]:
        rows.append(("a rebalancing costs / saves per pass", f"{format_time(even['cost_s'])} / {format_time(even['saved_s_per_pass'])}"))
        interval = "never: passes do not get faster" if even["interval_passes"] is None else f"after {even['interval_passes']:.1f} passes"
        rows.append(("it has paid for itself", interval))
    table("", ["", "value"], rows)
    sweep = report["sweep"]
    if sweep is not None:
        lines = [(f"every {row['period']}", f"{row['gain']:+.1%}", f"{row['rebalances']}", format_bytes(row["moved_bytes"])) for row in sweep["rows"]]
        table("\nperiod in passes", ["", "gain", "rebalances", "moved"], lines)
        note(crossover(sweep))


def crossover(sweep: dict[str, Any]) -> str:
    """Return in words from which period on rebalancing pays."""
    first, below, last = sweep["break_even_period"], sweep["loses_up_to"], sweep["pays_up_to"]
    if first is None:
        return "no period of the sweep pays"
    losing = "" if below is None else f"; every {below} passes is too often"
    longest = max(row["period"] for row in sweep["rows"])
    late = f"; every {longest} passes is too late" if last < longest else ""
    return f"rebalancing pays from every {first} passes on{losing}{late}; best of the sweep: every {sweep['best_period']}"
