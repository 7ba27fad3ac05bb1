"""`moesim solve`: compute an expert placement, prove it, predict its gain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def solve(
    traces: Annotated[list[str], typer.Argument(help="one trace, or several as windows of the load")],
    model: Annotated[str, typer.Option("--model", help="model name, config.json or its folder")],
    hardware: Annotated[str, typer.Option("--hardware", help="hardware name like h100-sxm-8x4, or a YAML file")],
    output: Annotated[Path, typer.Option("-o", "--output", help="where to write the plan")],
    objective: Annotated[
        str | None, typer.Option("--objective", help="balance, robust (default for several traces), traffic (ranks a token reaches) or hops")
    ] = None,
    redundant: Annotated[int, typer.Option("--redundant", help="extra slots per layer, over all ranks")] = 0,
    dispatch: Annotated[str, typer.Option("--dispatch", help="how replicas share tokens: equal, lp (optimal for these loads) or fast")] = "equal",
    previous: Annotated[Path | None, typer.Option("--from", help="plan that runs now; the new one is a repair of it")] = None,
    move_budget: Annotated[str | None, typer.Option("--move-budget", help="bytes of weights that may change, like 20GB")] = None,
    solver: Annotated[str | None, typer.Option("--solver", help="greedy, eplb, eplb-global, eplb-zigzag, milp, cp-sat, repair, linear …")] = None,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="seconds; a search cut short says TIME_LIMIT")] = None,
    map_layers: Annotated[str | None, typer.Option("--map-layers", help="cycle, or trace:model pairs, where the layers differ")] = None,
    seed: Annotated[int, typer.Option("--seed", help="seed of the search and of synthetic routing")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Compute placement and replication for all layers, validate them independently and predict the gain."""
    from moesim import api
    from moesim.cli.output import emit_json, note

    budget = None if move_budget is None else _bytes(move_budget)
    result = api.solve(
        traces,
        model=model,
        hardware=hardware,
        objective=objective,
        redundant=redundant,
        solver=solver,
        previous=previous,
        move_budget_bytes=budget,
        time_limit_s=time_limit,
        map_layers=map_layers,
        dispatch=dispatch,
        seed=seed,
    )
    result.plan.write(output)
    if as_json:
        emit_json(result.report)
    else:
        print_solution(result.report)
    note(f"wrote {output}")


def _bytes(text: str) -> float:
    from moesim.errors import InputError, describe
    from moesim.units import parse

    try:
        value = float(text) if text.replace(".", "", 1).isdigit() else parse(text, "bytes")
    except ValueError as error:
        raise InputError(describe("--move-budget", "bytes", text, str(error))) from None
    return value


def print_solution(report: dict[str, Any]) -> None:
    """Print a solution for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes

    note(f"{report['model']} on {report['hardware']}: {report['slots']} slots per layer on {report['ranks']} ranks, solver {report['solver']}")
    rows = [
        ("objective", f"{report['objective']} = {report['value']:.4f}"),
        ("bound", f"{report['bound']:.4f} (gap {report['gap']:.2%}), {report['status']}"),
        ("planned balance", f"{report['balance']['planned']:.4f}, worst layer {report['balance']['per_layer_min']:.4f}"),
    ]
    if report["moved"]["slots"] is not None:
        rows.append(("moved", f"{report['moved']['slots']} slots, {format_bytes(report['moved']['bytes'])}"))
    if "mode" in report["windows"]:
        windows = report["windows"]
        scores = ", ".join(f"{mode} {score:.4f}" for mode, score in sorted(windows["held_out"].items(), key=lambda item: -item[1])[:3])
        rows.append((f"mode of {windows['count']} windows", f"{windows['mode']} (held out: {scores})"))
    if report["affinity"] is not None:
        evidence = report["affinity"]
        note(f"for {evidence['applies_to']}")
        for key, text in (("in_sample", "tokens planned on"), ("held_out", "unseen tokens"), ("null", "unseen tokens, shuffled")):
            rows.append((f"{evidence['unit']}, {text}", f"{evidence['contiguous'][key]:.4f} → {evidence['plan'][key]:.4f}"))
    if report["predicted"] is not None:
        predicted = report["predicted"]
        rows.append(
            ("predicted step, linear → plan", f"{predicted['step_ms']['linear']:.3f} → {predicted['step_ms']['plan']:.3f} ms ({predicted['gain']:+.1%})")
        )
        rows.append(("predicted balance, linear → plan", f"{predicted['balance']['linear']:.3f} → {predicted['balance']['plan']:.3f}"))
    table("", ["", "value"], rows)
