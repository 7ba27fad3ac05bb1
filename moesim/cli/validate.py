"""`moesim validate`: prediction beside measurement."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moesim.cli import options
from moesim.errors import InputError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def validate(
    hardware: Annotated[str | None, typer.Option("--hardware", help="hardware name like rtx-pro-6000-1, or a YAML file; not with --published")] = None,
    run: Annotated[
        str | None,
        typer.Option("--run", help="recorded run: folder with requests.jsonl and meta.json, the name of a shipped one, or a captured trace with step times"),
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option("--kernels", help="a table of measured kernel times, a folder of them, or `package`: the hardware's own (default without --run)"),
    ] = None,
    published: Annotated[str | None, typer.Option("--published", help="published throughput whose name contains this text, or `all` (minutes)")] = None,
    points: Annotated[
        str | None, typer.Option("--points", help="CSV of measured end-to-end rows (gzip too), or `default`: the package's own of the hardware")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="model name, config.json or its folder; default: as meta.json says")] = None,
    requests_trace: Annotated[
        str | None, typer.Option("--requests-trace", help="routing: name, folder, .zip or synthetic:…; default: experts as popular as in a served model")
    ] = None,
    settings: options.Set = None,
    map_layers: options.MapLayers = None,
    strict: options.Strict = False,
    seed: options.Seed = 0,
    backend: Annotated[str | None, typer.Option("--backend", help="with --kernels: engine whose tables are preferred; default: as the file says")] = None,
    write: Annotated[str | None, typer.Option("--write", help="with --points: also write the report as a Markdown page")] = None,
    fit_overheads: Annotated[str | None, typer.Option("--fit-overheads", help="with --points: fit host overheads on calibrating rows into this file")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Compare predictions with measurements: a recorded run (--run), kernels (--kernels), end-to-end rows (--points), published throughput (--published)."""
    if published is not None:
        from moesim.cli.validate_published import show_published

        if run is not None or kernels is not None or hardware is not None or model is not None:
            raise InputError("validate: --published states hardware and model of every figure; leave out --run, --kernels, --hardware and --model")
        show_published(published, strict=strict, seed=seed, as_json=as_json)
        return
    if hardware is None:
        raise InputError("validate: --hardware is missing; name the machine that was measured")
    if sum(one is not None for one in (run, kernels, points)) > 1:
        raise InputError("validate: more than one of --run, --kernels and --points is given; ask for one of them")
    if points is not None:
        from moesim.cli.validate_points import show_points

        show_points(
            points,
            hardware=hardware,
            model=model,
            requests_trace=requests_trace,
            map_layers=map_layers,
            strict=strict,
            seed=seed,
            write=write,
            fit=fit_overheads,
            as_json=as_json,
        )
        return
    if write is not None or fit_overheads is not None:
        raise InputError("validate: --write and --fit-overheads go with --points; add it or drop them")
    if run is None:
        from moesim.cli.validate_kernels import show_kernels

        show_kernels(kernels, hardware=hardware, model=model, backend=backend, strict=strict, as_json=as_json)
        return
    from moesim.api.validation import validate_run
    from moesim.api.validation_capture import is_capture, validate_capture
    from moesim.cli.output import emit_json

    if is_capture(run):
        if model is None:
            raise InputError("validate: --model is missing; name the model that was captured")
        captured = validate_capture(run, model=model, hardware=hardware, settings=options.parse_settings(settings), strict=strict)
        if as_json:
            emit_json(captured)
        else:
            print_capture(captured)
        return
    report = validate_run(
        run,
        model=model,
        hardware=hardware,
        requests_trace=requests_trace,
        settings=options.parse_settings(settings),
        map_layers=map_layers,
        strict=strict,
        seed=seed,
    )
    if as_json:
        emit_json(report)
    else:
        print_run(report)


def print_capture(report: dict[str, Any]) -> None:
    """Print the validation of a captured run for people: whole steps, then stage by stage."""
    from moesim.cli.output import note, table

    def row(name: str, measured: float, predicted: float, error: float | None) -> tuple[str, ...]:
        return (name, f"{measured:,.3f}", f"{predicted:,.3f}", "–" if error is None else f"{error:+.1%}")

    note(f"{report['run']} on {report['hardware']}: {report['rows_scored']} steps scored, none calibrated on; predicted from: {report['basis']}")
    rows = []
    for name in ("step", "step_prefill", "step_decode"):
        if name in report:
            one = report[name]
            rows += [row(f"{name}, {kind}", one["measured_ms"][kind], one["predicted_ms"][kind], one[f"{kind}_error"]) for kind in ("mean", "p50", "p95")]
    rows += [row(name, one["measured"], one["predicted"], one["error"]) for name, one in report["stages_ms"].items() if one["measured"] is not None]
    table("", ["ms", "measured", "predicted", "error"], rows)
    note("times are " + ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items() if share > 0))


def print_run(report: dict[str, Any]) -> None:
    """Print the validation of a run for people."""
    from moesim.cli.output import note, table

    note(f"{report['run']}: {report['model']} on {report['hardware']}, {report['rows_scored']} requests scored, none calibrated on")
    for reason, count in report["rows_excluded"].items():
        note(f"  excluded: {count} × {reason}")
    if report["first_excluded"]:
        note(f"  the first: {report['first_excluded']}")
    made, settings = report["deployment"], report["settings"]
    limits = f"{settings['serving.max_num_seqs']} sequences, {settings['serving.max_num_batched_tokens']:,} tokens a step, {made['kv_blocks']:,} KV blocks"
    note("deployment: " + ", ".join(f"{name} {made[name]}" for name in ("tp", "dp", "ep", "expert_tp", "pp")) + f"; a replica: {limits}")
    for title, found in (("assumed, as meta.json does not say", report["assumed"]), ("not simulated", report["ignored"])):
        if found:
            note(f"{title}: " + ", ".join(f"{name} {found[name]}" if isinstance(found, dict) else name for name in found))
    routing = report["routing"]
    if routing is not None:
        note(f"routing: {routing['source']} ({routing['use']})")
    rows = []
    for name in ("ttft", "tpot", "latency"):
        one = report[name]
        if one["n"]:
            values = [f"{one[kind][part]:,.2f}" for part in ("mean", "p99") for kind in ("measured_ms", "predicted_ms")]
            errors = (f"{one['mean_error']:+.1%}", f"{one['p99_error']:+.1%}", f"{one['median_abs_error']:.1%}", f"{report['sensitivity'][name]:.2f}")
            rows.append((name, *values, *errors))
    columns = ["ms", "measured", "predicted", "p99 measured", "predicted", "mean error", "p99 error", "median |error|", "d/d(step time)"]
    table("", columns, rows)
    rate = report["throughput"]
    note(f"output tokens/s: measured {rate['measured_tokens_per_s']:,.0f}, predicted {rate['predicted_tokens_per_s']:,.0f} ({rate['mean_error']:+.1%})")
    for peer, errors in report["peers"].items():
        note(f"peer: {peer}: " + ", ".join(f"{name} {error:+.1%}" for name, error in errors.items()))
    note("times are " + ", ".join(f"{name} {share:.1%}" for name, share in report["provenance"].items() if share > 0))
