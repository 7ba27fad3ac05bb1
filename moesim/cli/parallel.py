"""`moesim parallel`: how to split a model over a machine – degrees, batches, redundancy, pools – with the Pareto front and the reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def parallel(
    model: Annotated[str, typer.Option("--model", help="model name, config.json or its folder")],
    hardware: Annotated[str, typer.Option("--hardware", help="hardware name like h100-sxm-8x4, or a YAML file")],
    requests: Annotated[str | None, typer.Option("--requests", help="request trace whose mean lengths and demand are taken where none are given")] = None,
    prompt: Annotated[int | None, typer.Option("--prompt", help="tokens per prompt; 4096 where there is no request trace")] = None,
    output: Annotated[int | None, typer.Option("--output", help="tokens generated per request; 512 where there is no request trace")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="requests in flight; default: as many as fit")] = None,
    rate: Annotated[float | None, typer.Option("--rate", help="requests per second that have to be carried")] = None,
    ttft: Annotated[float | None, typer.Option("--ttft-ms", help="longest time to the first token")] = None,
    tpot: Annotated[float | None, typer.Option("--tpot-ms", help="longest mean time per further token")] = None,
    routing: Annotated[str, typer.Option("--routing", help="balanced, zipf:S, or a trace whose expert loads are taken")] = "balanced",
    objective: Annotated[str, typer.Option("--objective", help="throughput (per device) or latency")] = "throughput",
    modes: Annotated[str, typer.Option("--modes", help="mixed, disaggregated, or both with a comma")] = "mixed,disaggregated",
    time_limit: Annotated[float | None, typer.Option("--time-limit", help="seconds; a search cut short says TIME_LIMIT")] = None,
    out: Annotated[Path | None, typer.Option("-o", help="write the plan of the best deployment; two pools give two files")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Search tensor, expert, data and pipeline degrees, batches and prefill/decode pools completely, within memory and service levels."""
    from moesim import api
    from moesim.cli.output import emit_json, note

    report = api.parallelize(
        model=model,
        hardware=hardware,
        prompt_tokens=prompt or (None if requests else 4096),
        output_tokens=output or (None if requests else 512),
        requests=requests,
        concurrency=concurrency,
        arrival_rps=rate,
        ttft_ms=ttft,
        tpot_ms=tpot,
        routing=routing,
        objective=objective,
        modes=tuple(modes.split(",")),
        time_limit_s=time_limit,
        plan_path=out,
    )
    if as_json:
        emit_json(report)
    else:
        print_parallel(report)
    for plan in report["plans"]:
        note(f"wrote {plan['path']}, the {plan['role']} plan")


def print_parallel(report: dict[str, Any]) -> None:
    """Print the best deployment, what lost, and the front for people."""
    from moesim.cli.output import note, table

    best = report["best"]
    note(f"{report['model']} on {report['hardware']}, routing {report['routing']}: {report['status']}")
    columns = ["deployment", "TTFT ms", "TPOT ms", "tokens/s/device"]

    def row(name: str, point: dict[str, Any]) -> tuple[str, str, str, str]:
        return f"{name}{point['label']}", f"{point['ttft_ms']:.1f}", f"{point['tpot_ms']:.2f}", f"{point['output_tokens_per_s_per_gpu']:,.0f}"

    table("", columns, [row("best: ", best), *([row("runner-up: ", report["runner_up"])] if report["runner_up"] else [])])
    for line in report["reasons"]:
        note(f"- {line}")
    front = [row("* " if point["meets_slo"] else "  ", point) for point in report["front"][:12]]
    table(f"\nPareto front ({len(report['front'])} points, highest throughput first; * meets the service levels)", columns, front)
