"""`moesim watch`: rebalance a running deployment by itself, and export what it sees and does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def watch(
    address: Annotated[str, typer.Argument(help="HOST:PORT of the deployment's control port; its token in MOESIM_TOKEN")],
    policy: Annotated[str, typer.Option("--policy", help="when to plan again: never, periodic:N, on_drift:T or budgeted:BYTES,N")] = "on_drift:0.9",
    window: Annotated[int, typer.Option("--window", help="steps that are observed (of the last 2048)")] = 64,
    every: Annotated[int, typer.Option("--every", help="steps between two decisions")] = 16,
    budget: Annotated[str, typer.Option("--budget", help="most that a change may move, like '2 GB', or cost, like '50 ms'; default: no limit")] = "",
    min_gain: Annotated[float, typer.Option("--min-gain", help="share by which a plan has to raise the balance")] = 0.02,
    min_interval: Annotated[int | None, typer.Option("--min-interval", help="least steps from one plan to the next; default: two windows")] = None,
    hysteresis: Annotated[
        float, typer.Option("--hysteresis", help="after a declined plan: by how much the balance has to fall before the next; 0: not at all")
    ] = 0.02,
    horizon: Annotated[int, typer.Option("--horizon", help="steps within which a plan has to pay for its installation; 0: any number")] = 1000,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="change nothing; say what would be done")] = False,
    once: Annotated[bool, typer.Option("--once", help="decide once, with a full window, and end")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="end after the deployment has served this many steps")] = None,
    duration: Annotated[float | None, typer.Option("--duration", min=0, help="end after this many seconds")] = None,
    metrics_port: Annotated[
        int | None, typer.Option("--metrics-port", min=0, max=65535, help="show figures to Prometheus on this port; 0: any free one")
    ] = None,
    metrics_host: Annotated[str, typer.Option("--metrics-host", help="address of the metrics port; anything but loopback shows them to others")] = "127.0.0.1",
    log: Annotated[Path | None, typer.Option("--log", help="file to which decisions, applies and errors are appended, one JSON object a line")] = None,
    give_up: Annotated[float, typer.Option("--give-up", min=0, help="seconds to wait for a deployment that does not serve; then exit code 3")] = 60.0,
    apply_timeout: Annotated[float, typer.Option("--apply-timeout", min=1, help="seconds that one apply may take")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object at the end")] = False,
) -> None:
    """Watch the loads of a running deployment; when they drift, plan a repair and install it if it pays.

    The decisions are those of `moesim rebalance` with the same settings (`change.window`, `change.every` …). Ctrl-C or SIGTERM ends the watch after
    the apply under way. Exit code 0: ended as asked; 1: --once, and the plan could not be installed; 2: bad input; 3: the deployment is gone.
    """
    import json
    import signal
    from contextlib import ExitStack
    from dataclasses import replace

    from moesim.api.watching import LIVE
    from moesim.api.watching import watch as watching
    from moesim.cli.output import emit_json, note
    from moesim.errors import ApplyError, InputError, describe
    from moesim.runtime.control import parse_address
    from moesim.runtime.metrics import Endpoint, Figures
    from moesim.runtime.watch import Limits

    parse_address(address)
    interval = 2 * window if min_interval is None else min_interval
    settings = replace(
        LIVE, balancer=policy, window=window, every=every, budget=budget, min_gain=min_gain, min_interval=interval, hysteresis=hysteresis, horizon=horizon
    )
    figures = Figures()
    with ExitStack() as stack:
        lines: Any = None
        if log is not None:
            try:
                lines = stack.enter_context(log.open("a", encoding="utf-8"))
            except OSError as cause:
                raise InputError(describe("watch", "--log", str(log), f"cannot be opened ({cause.strerror})")) from None

        def tell(event: dict[str, Any]) -> None:
            if lines is not None:
                lines.write(json.dumps(kept(event)) + "\n")
                lines.flush()
            if not as_json and (text := sentence(event, dry_run)):
                note(text)

        running = watching(address, settings=settings, limits=Limits(apply_s=apply_timeout, give_up_s=give_up), dry_run=dry_run, figures=figures, log=tell)
        if metrics_port is not None:
            endpoint = Endpoint(figures, metrics_host, metrics_port)
            stack.callback(endpoint.close)
            note(f"metrics: http://{endpoint.host}:{endpoint.port}/metrics")

        def end(number: int, frame: object) -> None:
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)  # the second time at once
            running.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, end))
        summary = running.run(max_steps=max_steps, duration_s=duration, max_decisions=1 if once else None)
    if as_json:
        emit_json(summary)
    else:
        print_summary(summary)
    if once and summary["last_apply"] not in (None, "installed", "unchanged"):
        raise ApplyError(f"the plan was not installed: {summary['last_apply']}")


def kept(event: dict[str, Any]) -> dict[str, Any]:
    """Return what the log keeps of an event: loads only where a plan was made from them."""
    return event if event.get("map_sha256") else {name: value for name, value in event.items() if name != "load_LE"}


def sentence(event: dict[str, Any], dry_run: bool) -> str | None:
    """Return the line that tells people of an event; None for what needs none."""
    from moesim.units import format_bytes, format_time

    if event["event"] == "decision" and event["balance_after"] is not None:
        pays = "never pays" if event["break_even_steps"] is None else f"pays after {event['break_even_steps']} steps"
        found = f"balance {event['balance']:.3f}, a plan gives {event['balance_after']:.3f}"
        change = f"{event['slots']} slots, {format_bytes(event['bytes'])}, saves {format_time(max(event['gain_s'], 0.0))} a step"
        act = ("would install it" if dry_run else "installing it") if event["kind"] == "repair" else f"declined: {event['kind'].replace('_', ' ')}"
        return f"step {event['step']}: {found} ({change}, costs {format_time(event['cost_s'])}, {pays}); {act}"
    if event["event"] == "apply":
        if event["result"] == "installed":
            return f"installed as epoch {event['epoch']}, pause {event['pause_ms']:.1f} ms, balance {event['balance']['after']:.3f}"
        return f"apply: {event['result']}: {event['reason']}"
    if event["event"] == "error" and event["phase"] != "apply":
        return f"{event['phase']}: {event['reason']}"
    if event["event"] == "plan":
        return f"map {event['map_sha256'][:12]} is installed"
    return "the deployment was restarted" if event["event"] == "restarted" else None


def print_summary(summary: dict[str, Any]) -> None:
    """Print a summary for people."""
    from moesim.cli.output import table
    from moesim.units import format_bytes, format_time

    def kinds(name: str) -> str:
        return ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in summary[name].items()) or "none"

    rows = [
        ["steps", f"{summary['steps']:.0f} in {format_time(summary['wall_s'])}"],
        ["balance at the end", f"{summary['balance_ratio']:.4f}" if "balance_ratio" in summary else "-"],
        ["decisions", kinds("decisions")],
        ["migrations", f"{kinds('migrations')}; {format_bytes(summary['migrated_bytes'])}"],
        ["pauses", f"{format_time(summary['pause_seconds']['sum'])}, the longest {format_time(summary['pause_seconds']['max'])}"],
        ["exchanged", f"{format_bytes(summary['all_to_all_bytes'])} in {format_time(summary['all_to_all_seconds'])} over all ranks"],
        ["errors", kinds("watch_errors")],
    ]
    table(f"watch ended: {summary['ended'].replace('_', ' ')}", ["what", "figure"], rows)
