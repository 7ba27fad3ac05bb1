"""`moesim replay`: run a routing trace on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def parse_settings(items: list[str]) -> dict[str, str]:
    """Split `key=value` words; raises InputError for one without `=` or given twice."""
    from moesim.errors import InputError, describe

    result: dict[str, str] = {}
    for item in items:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise InputError(describe("--set", "item", item, "must have the form key=value"))
        if key in result:
            raise InputError(describe("--set", "key", key, "is given twice; keep one"))
        result[key] = value
    return result


@app.command()
def replay(
    trace: Annotated[str, typer.Argument(help="name, folder or .zip of a trace, or synthetic:balanced, synthetic:zipf:1.0 …")],
    model: Annotated[str, typer.Option("--model", help="model name, config.json or its folder")],
    hardware: Annotated[str, typer.Option("--hardware", help="hardware name like h100-sxm-8x4, or a YAML file")],
    plan: Annotated[Path | None, typer.Option("--plan", help="plan to replay")] = None,
    placement: Annotated[str, typer.Option("--placement", help="linear, round_robin, random or eplb, where no plan is given")] = "linear",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: attention_tp, dispatch, shared_experts, host_overhead_us")] = None,
    tokens_per_step: Annotated[
        int | None, typer.Option("--tokens-per-step", help="tokens per forward pass over all ranks; default: the recorded steps")
    ] = None,
    map_layers: Annotated[str | None, typer.Option("--map-layers", help="cycle, or trace:model pairs, where the layers differ")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="refuse extrapolated and roofline times")] = False,
    seed: Annotated[int, typer.Option("--seed", help="seed of synthetic or sampled routing")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for metrics.json, steps.csv and timeline.json")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Run a routing trace on a cluster with expert parallelism and report where the time goes."""
    from moesim import api
    from moesim.cli.output import counting, emit_json, note
    from moesim.errors import InputError

    if plan is not None and placement != "linear":
        raise InputError("replay: --plan and --placement exclude each other; give one")
    with counting("forward passes") as progress:
        result = api.replay(
            trace,
            model=model,
            hardware=hardware,
            plan=plan,
            placement=placement,
            settings=parse_settings(settings or []),
            tokens_per_step=tokens_per_step,
            map_layers=map_layers,
            strict=strict,
            seed=seed,
            progress=progress,
        )
    files = result.write(out) if out is not None else []
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
    rows: list[tuple[str, str]] = [
        ("steps / tokens", f"{report['steps']} / {report['tokens']}"),
        ("step time mean / p99", f"{step['mean']:.3f} / {step['p99']:.3f} ms"),
        ("throughput", f"{report['tokens_per_s']:,.0f} tokens/s"),
        ("balance (mean / max load)", f"{report['balance']['mean_over_max']:.3f}, worst layer {report['balance']['worst_layer']:.3f}"),
        ("remote ranks per token and layer", f"{report['traffic']['distinct_remote_ranks']:.2f}"),
        ("bytes local / node / network", " / ".join(format_bytes(report["bytes"][key]) for key in ("local", "intra_node", "inter_node"))),
        *((f"memory ({tier})", format_bytes(peak)) for tier, peak in report["memory"].items()),
    ]
    table("", ["", "value"], rows)
    total = step["mean"] or 1.0
    parts = sorted(report["breakdown_ms"].items(), key=lambda item: -item[1])
    table("\nwhere a step's time goes (mean over ranks)", ["part", "ms", "share"], [(name, f"{value:.4f}", f"{value / total:.1%}") for name, value in parts])
    shares = ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items() if share > 0)
    note(f"\ntimes are {shares}")
