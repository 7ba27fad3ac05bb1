"""`moesim replay`: run a routing trace on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli import options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def replay(
    trace: options.Trace,
    model: options.Model,
    hardware: options.Hardware,
    plan: options.PlanFile = None,
    placement: options.Placement = "linear",
    requests: Annotated[
        str | None, typer.Option("--requests", help="serve these, routed as the trace says: a file, a shipped name, synthetic:poisson:RATE,prompt=…,…")
    ] = None,
    settings: options.Set = None,
    tokens_per_step: options.TokensPerStep = None,
    map_layers: options.MapLayers = None,
    times: options.Times = "model",
    strict: options.Strict = False,
    seed: options.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for metrics.json, steps.csv and timeline.json")] = None,
    plots: Annotated[bool, typer.Option("--plots", help="also draw figures (SVG) to --out")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Run a routing trace on a cluster with expert parallelism and report where the time goes."""
    from moesim import api
    from moesim.cli.output import counting, emit_json, note
    from moesim.errors import InputError

    if plan is not None and placement != "linear":
        raise InputError("replay: --plan and --placement exclude each other; give one")
    if plots and out is None:
        raise InputError("replay: --plots needs --out, the folder for the figures")
    if requests is not None:
        if tokens_per_step is not None or times != "model":
            raise InputError("replay: --tokens-per-step and --times do not go with --requests, which decide what a step holds; drop them")
        served = api.serve(
            requests,
            trace=trace,
            model=model,
            hardware=hardware,
            plan=plan,
            placement=placement,
            settings=options.parse_settings(settings),
            map_layers=map_layers,
            strict=strict,
            seed=seed,
            keep_rows=out is not None,
        )
        files = served.write(out, plots=plots) if out is not None else []
        if as_json:
            emit_json(served.report)
        else:
            print_serving(served.report)
        for path in files:
            note(f"wrote {path}")
        return
    with counting("forward passes") as progress:
        result = api.replay(
            trace,
            model=model,
            hardware=hardware,
            plan=plan,
            placement=placement,
            settings=options.parse_settings(settings),
            tokens_per_step=tokens_per_step,
            map_layers=map_layers,
            times=times,
            strict=strict,
            seed=seed,
            progress=progress,
        )
    files = result.write(out, plots=plots) if out is not None else []
    if as_json:
        emit_json(result.report)
    else:
        print_replay(result.report)
    for path in files:
        note(f"wrote {path}")


def print_replay(report: dict[str, Any]) -> None:
    """Print a replay for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes

    routing, step = report["routing"], report["step_ms"]
    note(f"{routing['source']} on {report['hardware']}, model {report['model']}, placement {report['placement']['solver']}")
    if routing["synthetic"]:
        note(f"routing is synthetic: {routing['synthetic']}")
    if routing["sampled_from_counts"]:
        note("routing is sampled independently from expert counts; correlations between layers are lost")
    recorded = report.get("times")
    if recorded is not None:
        shares = ", ".join(f"{share:.1%} {name}" for name, share in recorded["work_share"].items())
        note(f"recorded times drive the replay ({shares}; waits {recorded['waits']}, map {recorded['map']})")
    rows: list[tuple[str, str]] = [
        ("steps / tokens", f"{report['steps']} / {report['tokens']}"),
        ("step time mean / p99", f"{step['mean']:.3f} / {step['p99']:.3f} ms"),
        *([("recorded step time mean", f"{recorded['recorded_step_ms']['mean']:.3f} ms")] if recorded is not None else []),
        ("throughput", f"{report['tokens_per_s']:,.{0 if report['tokens_per_s'] >= 100 else 2}f} tokens/s"),
        *_spent(report),
        ("balance (mean / max load)", f"{report['balance']['mean_over_max']:.3f}, worst layer {report['balance']['worst_layer']:.3f}"),
        ("remote ranks (nodes) per token and layer", f"{report['traffic']['distinct_remote_ranks']:.2f} ({report['traffic']['distinct_remote_nodes']:.2f})"),
        ("bytes local / node / network", " / ".join(format_bytes(report["bytes"][key]) for key in ("local", "intra_node", "inter_node"))),
        *((f"memory ({tier})", f"{format_bytes(peak)}: {uses(report['memory_by_use'][tier])}") for tier, peak in report["memory"].items()),
        *offload_rows(report),
        *change_rows(report["change"]),
    ]
    table("", ["", "value"], rows)
    total = step["mean"] or 1.0
    parts = sorted(report["breakdown_ms"].items(), key=lambda item: -item[1])
    table("\nwhere a step's time goes (mean over ranks)", ["part", "ms", "share"], [(name, f"{value:.4f}", f"{value / total:.1%}") for name, value in parts])
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items() if share > 0)
    note(f"\ntimes are {shares}")


def uses(held: dict[str, float]) -> str:
    """Return what memory holds, the largest first."""
    from moesim.units import format_bytes

    return ", ".join(f"{use} {format_bytes(nbytes)}" for use, nbytes in sorted(held.items(), key=lambda item: -item[1]) if nbytes > 0)


def offload_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what caches and links did, if experts lay in another tier."""
    from moesim.units import format_bytes, format_time

    cache = report["cache"]
    if cache["hit_rate"] is None:
        return []
    links = {name: nbytes for name, nbytes in report["bytes"].items() if name not in ("local", "intra_node", "inter_node")}
    waits = [(cause, seconds) for cause, seconds in report["stall_s"].items() if cause != "straggler" and seconds > 0]
    special = [(name, cache[name]) for name in ("computed", "low_precision", "skipped") if cache[name]]
    rows = [
        ("experts: hits / late hits / misses", f"{cache['hits']} / {cache['late_hits']} / {cache['misses']}, hit rate {cache['hit_rate']:.1%}"),
        *([("misses not loaded whole", ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in special))] if special else []),
        *([("prefetches / useless", f"{cache['prefetches']} / {cache['useless_prefetches']}")] if cache["prefetches"] else []),
        ("experts copied", ", ".join(f"{format_bytes(nbytes)} over {name}" for name, nbytes in links.items())),
    ]
    return rows + ([("waited for", ", ".join(f"{cause.replace('_', ' ')} {format_time(seconds)}" for cause, seconds in waits))] if waits else [])


def change_rows(change: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Return what a balancer and ranks that came and went did."""
    from moesim.units import format_bytes, format_time

    if change is None:
        return []
    refused = {name: change[name] for name in ("declined", "refused", "aborted") if change[name]}
    rows = [
        ("rebalances", f"{change['rebalances']} of {change['decisions']} decisions" + "".join(f", {count} {name}" for name, count in refused.items())),
        ("ranks that serve", " → ".join(f"{epoch['ranks']}" for epoch in change["epochs"] if epoch["reason"] != "rebalance")),
        ("moved / staged at most", f"{format_bytes(change['moved_bytes'])} / {format_bytes(change['staging_peak_bytes'])}"),
        ("pause / downtime", f"{format_time(change['pause_s'])} / {format_time(change['downtime_s'])}"),
    ]
    if change["downtime_s"] or change["experts_lost"]:
        rows.append(("lost experts / tokens run again", f"{change['experts_lost']} / {change['tokens_retried']}"))
    return rows


def _spent(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of energy and cost, where the hardware declares them."""
    return [
        *([("energy", f"{report['energy']['joules_per_token']:.4g} J/token")] if "energy" in report else []),
        *([("cost", f"{report['cost']['per_million_tokens']:.4g} $ per million tokens")] if "cost" in report else []),
    ]


def print_serving(report: dict[str, Any]) -> None:
    """Print a replay that requests drive for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes

    asked, kv, shape = report["requests"], report["kv"], report["deployment"]
    degrees = ", ".join(f"{key} {value}" for key, value in shape.items())
    note(f"{asked['source']} ({asked['format']}) on {report['hardware']}, model {report['model']}, {degrees}")
    if report["routing"] is not None:
        note(f"routing: {report['routing']['source']} ({report['routing']['use']})")
    for reason, count in (*asked["excluded"].items(), *asked["refused"].items()):
        note(f"left out: {count} × {reason}")
    names = [name for name in ("ttft_ms", "tpot_ms", "latency_ms") if asked[name] is not None]
    rows = [(name.removesuffix("_ms"), *(f"{value:,.2f}" for value in asked[name].values())) for name in names]
    table("", ["ms", "mean", "p50", "p95", "p99"], rows)
    peak = ", ".join(f"{tier} {format_bytes(value)}" for tier, value in report["memory"].items())
    facts: list[tuple[str, str]] = [
        ("requests finished", f"{asked['finished']:,} in {report['simulated_s']:,.1f} s"),
        ("goodput", f"{asked['goodput']['share']:.1%}, {asked['goodput']['requests_per_s']:,.2f} requests/s"),
        ("output tokens/s", f"{report['output_tokens_per_s']:,.0f}"),
        ("steps, busy", f"{report['steps']:,}, {report['utilisation']:.1%}"),
        ("KV blocks in use at most", f"{kv['peak_share']:.1%}; {peak}"),
        ("preemptions", f"{kv['preemptions']:,}"),
        ("prefix hits", f"{kv['prefix_hit_rate']:.1%} of prompt tokens"),
        *_spent(report),
    ]
    table("", ["", "value"], facts)
    note("times are " + ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items() if share > 0))
