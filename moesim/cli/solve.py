"""`moesim solve`: compute an expert placement, prove it, predict its gain."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moesim.cli import options

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def solve(
    traces: Annotated[list[str], typer.Argument(help="one trace, or several as windows of the load")],
    model: options.Model,
    hardware: options.Hardware,
    output: Annotated[Path, typer.Option("-o", "--output", help="where to write the plan")],
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            help="balance, robust (default for several traces), activated (experts a decode batch reads), latency, traffic (ranks a token reaches), "
            "hops, or a sum like balance+activated:0.5",
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", help="decode tokens per step over all ranks; else the mean of the trace's steps")] = None,
    redundant: Annotated[int, typer.Option("--redundant", help="extra slots per layer, over all ranks")] = 0,
    slots: Annotated[str | None, typer.Option("--slots-per-rank", help="instead: slots of every rank, like 9 or 9,9,8,8")] = None,
    target_balance: Annotated[
        float | None, typer.Option("--target-balance", help="instead: the fewest slots per rank that reach this balance, like 0.95")
    ] = None,
    speeds: Annotated[str | None, typer.Option("--speeds", help="relative speed of every rank, like 1,1,0.5,1")] = None,
    weight_memory: Annotated[str | None, typer.Option("--weight-memory", help="memory of a device that weights may take, like 60GB")] = None,
    dispatch: Annotated[
        str,
        typer.Option(
            "--dispatch", help="how replicas share tokens: equal, lp (optimal for these loads), fast, or once (one copy serves; for --objective activated)"
        ),
    ] = "equal",
    previous: Annotated[Path | None, typer.Option("--from", help="plan that runs now; the new one is a repair of it")] = None,
    move_budget: Annotated[str | None, typer.Option("--move-budget", help="what may change: bytes of weights (20GB) or time of the migration (2s)")] = None,
    frontier: Annotated[bool, typer.Option("--frontier", help="with --from: also what every smaller budget buys")] = False,
    solver: Annotated[str | None, typer.Option("--solver", help="greedy, robust, repair, descent, affinity, eplb, milp, cp-sat, linear …")] = None,
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="seconds; a search cut short says TIME_LIMIT")] = None,
    map_layers: options.MapLayers = None,
    seed: options.Seed = 0,
    as_json: options.AsJson = False,
) -> None:
    """Compute placement and replication for all layers, validate them independently and predict the gain."""
    from moesim import api
    from moesim.cli.output import emit_json, note
    from moesim.errors import InfeasibleError

    each = _numbers(slots, "--slots-per-rank", int)
    budget = None if move_budget is None else _amount(move_budget, "--move-budget")
    timed = move_budget is not None and _is_time(move_budget)
    try:
        result = api.solve(
            traces,
            model=model,
            hardware=hardware,
            objective=objective,
            redundant=redundant,
            slots=each[0] if each is not None and len(each) == 1 else each,
            speeds=_numbers(speeds, "--speeds", float),
            weight_memory_bytes=None if weight_memory is None else _amount(weight_memory, "--weight-memory"),
            batch=batch,
            solver=solver,
            previous=previous,
            move_budget_bytes=None if timed else budget,
            move_budget_s=budget if timed else None,
            frontier=frontier,
            time_limit_s=time_limit,
            map_layers=map_layers,
            dispatch=dispatch,
            target_balance=target_balance,
            seed=seed,
        )
    except InfeasibleError as error:
        if as_json:
            parts = {key: getattr(error, key) for key in ("requirement", "where", "missing", "relaxation")}
            emit_json({"schema": "moesim.solve/1", "status": "INFEASIBLE", "message": str(error), **parts})
        raise
    result.plan.write(output)
    if as_json:
        emit_json(result.report)
    else:
        print_solution(result.report)
    note(f"wrote {output}")


def _is_time(text: str) -> bool:
    """Say whether a budget ends in a unit of time: `2s` is one, `2GB` is not."""
    return text.strip().endswith(("s", "min", "h"))


def _amount(text: str, flag: str) -> float:
    from moesim.errors import InputError, describe
    from moesim.units import parse

    try:
        if text.replace(".", "", 1).isdigit():
            return float(text)
        return parse(text, "seconds" if flag == "--move-budget" and _is_time(text) else "bytes")
    except ValueError as error:
        raise InputError(describe("moesim solve", flag, text, str(error))) from None


def _numbers(text: str | None, flag: str, kind: type[int] | type[float]) -> list[Any] | None:
    from moesim.errors import InputError, describe

    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(describe("moesim solve", flag, text, "must be numbers separated by ','")) from None


def print_solution(report: dict[str, Any]) -> None:
    """Print a solution for people."""
    from moesim.cli.output import note, table
    from moesim.units import format_bytes, format_time

    note(f"{report['model']} on {report['hardware']}: {report['slots']} slots per layer on {report['ranks']} ranks, solver {report['solver']}")
    rows = [
        ("objective", f"{report['objective']} = {report['value']:.4f}"),
        ("bound", f"{report['bound']:.4f} (gap {report['gap']:.2%}), {report['status']}"),
        ("planned balance", f"{report['balance']['planned']:.4f}, worst layer {report['balance']['per_layer_min']:.4f}"),
    ]
    if report["redundancy"] is not None:
        found = report["redundancy"]
        rows.append((f"for balance {found['target']:g}", f"{found['slots_per_rank']} slots a rank ({found['redundant']} redundant)"))
        rows.append(("fewer slots", f"none with less than {found['least_possible']} a rank can; tried {', '.join(_tried(one) for one in found['tried'])}"))
    if report["cost"] is not None:
        cost = report["cost"]
        least = "" if cost["bound"] is None else f", no placement below {cost['bound']:.6g}"
        rows.append(("cost", f"{cost['value']:.6g}{least}"))
        if cost["balanced"] is not None:
            rows.append(("cost of the balanced plan", f"{cost['balanced']:.6g}"))
        note(f"cost: {cost['unit']}" + (f"; {cost['batch_tokens']} tokens per step" if cost["batch_tokens"] else ""))
    if report["moved"]["slots"] is not None:
        migration = report["migration"]
        rows.append(("moved", f"{report['moved']['slots']} slots, {format_bytes(report['moved']['bytes'])}"))
        rows.append(("migration on idle links", f"{format_time(migration['transfer_s'])} + {format_time(migration['install_s'])} to install"))
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
        for name in ("balanced", "running"):
            if name in predicted["step_ms"]:
                change = predicted["step_ms"][name] / predicted["step_ms"]["plan"] - 1.0
                rows.append((f"predicted step, {name} → plan", f"{predicted['step_ms'][name]:.3f} → {predicted['step_ms']['plan']:.3f} ms ({change:+.1%})"))
        rows.append(("predicted balance, linear → plan", f"{predicted['balance']['linear']:.3f} → {predicted['balance']['plan']:.3f}"))
    if report["predicted"] is not None and report["migration"] is not None:
        steps = report["break_even_steps"]
        rows.append(("migration has paid for itself", "never: steps do not get faster" if steps is None else f"after {_steps(steps)}"))
    table("", ["", "value"], rows)
    if report["frontier"] is not None:
        table("", ("slots", "bytes", "balance", "gain per GB", "migration", "step ms", "pays after"), [_frontier_row(row) for row in report["frontier"]])


def _tried(one: tuple[int, float, float]) -> str:
    slots, value, bound = one
    return f"{slots}: {value:.4f} (at most {bound:.4f})"


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _frontier_row(row: dict[str, Any]) -> tuple[str, ...]:
    from moesim.units import format_bytes, format_time

    return (
        f"{row['slots']}{' (knee)' if row['knee'] else ''}",
        format_bytes(row["bytes"]),
        f"{row['balance']:.4f}",
        "" if row["gain_per_gb"] is None else f"{row['gain_per_gb']:+.4f}",
        format_time(row["migration_s"]),
        "" if row["step_ms"] is None else f"{row['step_ms']:.3f}",
        "" if row["step_ms"] is None else "never" if row["break_even_steps"] is None else _steps(row["break_even_steps"]),
    )
