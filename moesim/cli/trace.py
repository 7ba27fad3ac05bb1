"""`moesim trace`: look at routing traces, bring them in from other tools, send them out, make them up, change them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli.output import emit_json, note, table

if TYPE_CHECKING:
    from moesim.traces.routing_trace import RoutingTrace, TraceShape

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Look at, import, export, synthesise and transform routing traces.",
)

Model = Annotated[str | None, typer.Option("--model", help="Model name, config.json or folder; gives layers, experts and top-k.")]
Output = Annotated[Path, typer.Option("-o", "--out", help="Trace folder to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Reference = Annotated[str, typer.Argument(help="Shipped name, trace folder, stored .zip, or synthetic:…")]


def shape_of(name: str | None) -> TraceShape | None:
    """Return the shape of a model by name or path."""
    if name is None:
        return None
    from moesim.errors import ModelError
    from moesim.model import load_model
    from moesim.traces.routing_trace import TraceShape

    model = load_model(name)
    if not model.moe_layer_ids:
        raise ModelError(f"{name}: has no MoE layers, so it has no routing; give a Mixture-of-Experts model")
    return TraceShape(
        model=model.name,
        num_experts=model.num_experts,
        top_k=model.top_k,
        moe_layer_ids=tuple(model.moe_layer_ids),
        num_groups=model.num_groups,
        top_k_groups=model.top_k_groups,
        experts_L=model.experts_L,
    )


@app.command()
def info(trace: Reference, model: Model = None, seed: int = 0, json: Json = False) -> None:
    """Print shape, rows, steps, phases, requests, skew, size and provenance of a trace."""
    from moesim.traces.open import open_trace
    from moesim.traces.summary import summarise

    report = summarise(open_trace(trace, shape=shape_of(model), seed=seed))
    if json:
        emit_json(report)
        return
    imbalance = report["imbalance"]
    rows: list[tuple[str, Any]] = [(key, report[key]) for key in ("source", "kind", "routing", "model", "num_experts", "top_k", "rows", "tokens")]
    rows += [(key, report[key]) for key in ("steps", "requests", "ranks", "phases", "missing_choices", "columns", "windows") if key in report]
    rows += [
        ("layers", len(report["moe_layer_ids"])),
        ("imbalance max/mean, mean over layers", imbalance["mean"]),
        ("imbalance max/mean, worst layer", imbalance["worst"]),
    ]
    rows += [(key, report[key]) for key in ("bytes", "bytes_per_token_layer", "fingerprint")]
    table("", ("trace", "value"), rows)
    table("", ("layer", "max/mean"), list(zip(report["moe_layer_ids"], imbalance["per_layer"], strict=True)))
    for key, value in report["provenance"].items():
        for line in value if isinstance(value, list) else [value]:
            note(f"{key}: {line}")


@app.command()
def stats(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="One trace, or several as windows of the load.")],
    model: Annotated[str, typer.Option("--model", help="Model name, config.json or folder.")],
    hardware: Annotated[str | None, typer.Option("--hardware", help="Its devices are the ranks that plans are made for.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for stats.json, tables and figures.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Sample for affinity.")] = 20_000,
    map_layers: Annotated[str | None, typer.Option("--map-layers", help="cycle, or trace:model pairs, where the layers differ.")] = None,
    seed: int = 0,
    json: Json = False,
) -> None:
    """Print what explains a plan: load curves, drift, affinity beside its null, what redundant slots buy."""
    from moesim import api

    found = api.trace_statistics(traces, model=model, hardware=hardware, max_tokens=max_tokens, map_layers=map_layers, seed=seed)
    paths = [] if out is None else found.write(out)
    if json:
        emit_json({**found.report, "files": [str(path) for path in paths]})
    else:
        from moesim.cli.trace_stats import print_statistics

        print_statistics(found.report)
    if out is not None:
        note(f"wrote {len(paths)} files to {out}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="File or folder of the other tool.")],
    out: Output,
    form: Annotated[str, typer.Option("--format", help="topk-csv, counts-csv, counts-json, sglang, vllm, trtllm, adrs or exflow.")],
    model: Model = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the model where --model is not given.")] = None,
    experts: Annotated[int | None, typer.Option("--experts", help="Experts per layer where --model is not given.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Experts per token where --model is not given.")] = None,
    layer_base: Annotated[int, typer.Option("--layer-base", help="Number of the model's first layer in the source, 0 or 1.")] = 0,
    interleave: Annotated[int, typer.Option("--interleave", help="Sequences whose tokens alternate in the source.")] = 1,
    phase: Annotated[str, typer.Option("--phase", help="prefill, decode or train.")] = "prefill",
    where: Annotated[list[str] | None, typer.Option("--where", help="counts-csv: keep rows with COLUMN=VALUE (repeatable).")] = None,
    window_column: Annotated[str | None, typer.Option("--window-column", help="counts-csv: column that names the windows.")] = None,
    merge_windows: Annotated[int, typer.Option("--merge-windows", help="Add up N consecutive windows.")] = 1,
    provenance: Annotated[
        list[str] | None, typer.Option("--provenance", help="Record KEY=VALUE in the manifest (repeatable): source, licence, hardware …")
    ] = None,
    keep_warmup: Annotated[bool, typer.Option("--keep-warmup", help="Do not mark identical tokens at the start as dummies.")] = False,
    json: Json = False,
) -> None:
    """Convert a recording of another tool into a trace folder."""
    from moesim.traces.importers import import_trace
    from moesim.traces.importers.common import ImportOptions

    options = ImportOptions(
        shape=shape_of(model),
        name=name,
        experts=experts,
        top_k=top_k,
        layer_base=layer_base,
        interleave=interleave,
        phase=phase,
        keep_warmup=keep_warmup,
        where=_pairs(where, "--where"),
        provenance=_pairs(provenance, "--provenance"),
        window_column=window_column,
        merge_windows=merge_windows,
    )
    _write(import_trace(form, source, options), out, json)


@app.command()
def export(
    trace: Reference,
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    form: Annotated[str, typer.Option("--format", help="topk-csv, counts-json, sglang or exflow.")],
    model: Model = None,
    layer_base: Annotated[int, typer.Option("--layer-base", help="topk-csv: number of the model's first layer, 0 or 1.")] = 0,
    json: Json = False,
) -> None:
    """Write a trace in the format of another tool."""
    from moesim.traces.export import export_trace
    from moesim.traces.open import open_trace

    layers = None
    if model is not None:
        from moesim.model import load_model

        layers = load_model(model).num_layers
    notes = export_trace(open_trace(trace, shape=shape_of(model)), form, out, layer_base=layer_base, num_layers=layers)
    if json:
        emit_json({"schema": "moesim.trace-export/1", "format": form, "out": str(out), "bytes": out.stat().st_size, "notes": notes})
        return
    for text in notes:
        note(text)
    note(f"wrote {out}")


@app.command()
def synth(
    spec: Annotated[str, typer.Argument(help="balanced, zipf:S, power-law:A, markov:P or topics:N, with or without synthetic: and options after commas.")],
    out: Output,
    model: Annotated[str, typer.Option("--model", help="Model name, config.json or folder.")],
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens per step over all ranks.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Forward passes.")] = None,
    requests: Annotated[int | None, typer.Option("--requests", help="Requests per step.")] = None,
    phase: Annotated[str | None, typer.Option("--phase", help="prefill, decode or train.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json: Json = False,
) -> None:
    """Write a synthetic trace; it stays labelled as synthetic."""
    from moesim.traces.open import open_trace
    from moesim.traces.routing_trace import SYNTHETIC

    text = SYNTHETIC + spec.removeprefix(SYNTHETIC)
    for key, value in (("tokens", tokens), ("steps", steps), ("requests", requests), ("phase", phase)):
        if value is not None:
            text += f",{key}={value}"
    _write(open_trace(text, shape=shape_of(model), seed=seed), out, json)


@app.command()
def transform(
    trace: Reference,
    out: Output,
    model: Model = None,
    map_layers: Annotated[str | None, typer.Option("--map-layers", help="Fit the trace to --model: cycle, or ROW:LAYER,…")] = None,
    layers: Annotated[str | None, typer.Option("--layers", help="Keep these model layers: 3,4,5")] = None,
    steps: Annotated[str | None, typer.Option("--steps", help="Keep recorded steps FIRST:LAST (windows of a counts trace).")] = None,
    requests: Annotated[int | None, typer.Option("--requests", help="Keep the first N requests.")] = None,
    phases: Annotated[str | None, typer.Option("--phases", help="Keep these phases: prefill,decode")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Keep the first N tokens.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option("--tokens-per-step", help="Cut into steps of N tokens.")] = None,
    shuffle: Annotated[str | None, typer.Option("--shuffle", help="layers or order: a null hypothesis for a solver's gain.")] = None,
    rule: Annotated[
        str | None, typer.Option("--rule", help="Route anew: top_k:2, top_p:0.4,6, grouped:8,1, null:4, mask:3/8, capacity:1.25 … joined by '+'.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    json: Json = False,
) -> None:
    """Select, cut, shuffle, route anew and map a trace, in this order."""
    from moesim.errors import TraceError
    from moesim.traces import transform as change
    from moesim.traces.open import check_fits, open_trace

    shape = shape_of(model)
    result = open_trace(trace, shape=shape, seed=seed)
    if any(value is not None for value in (layers, steps, requests, phases, max_tokens)):
        result = change.subset(
            result,
            layers=_numbers(layers, "--layers", ","),
            steps=_pair(steps),
            requests=requests,
            phases=None if phases is None else phases.split(","),
            max_tokens=max_tokens,
        )
    if tokens_per_step is not None:
        result = change.split_steps(result, tokens_per_step)
    if shuffle is not None:
        result = change.shuffle(result, shuffle, seed=seed)
    if rule is not None:
        result = change.apply_rules(result, rule)
    if map_layers is not None:
        if shape is None:
            raise TraceError("--map-layers: needs --model, the model to fit the trace to")
        result = check_fits(result, shape, map_layers)
    _write(result, out, json)


@app.command()
def repair(
    trace: Annotated[Path, typer.Argument(help="Folder of a recording that was cut off.")],
    out: Output,
    json: Json = False,
) -> None:
    """Copy what is complete of a recording that was killed to a new trace, marked as unfinished."""
    from moesim.traces.repair import repair as save

    manifest = save(trace, out)
    found = manifest.provenance["repaired"]
    if json:
        emit_json({"schema": "moesim.trace-repaired/1", "out": str(out), **found, "fingerprint": manifest.fingerprint})
        return
    note(f"wrote {out}: {found['rows']} rows; left out: {found['rows_left_out']} rows of a last step, {found['shards_left_out']} shards")


@app.command()
def join(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="What the ranks of one run recorded, in the order of the ranks.")],
    out: Output,
    json: Json = False,
) -> None:
    """Join what the ranks of one run recorded to one trace, up to the last step that all of them have."""
    from moesim.runtime.capture_join import join as put_together

    found = put_together(folders, out)
    if json:
        emit_json({"schema": "moesim.trace-joined/1", "out": str(out), **found})
        return
    note(f"wrote {out}: {found['rows']} rows of {found['steps']} steps; {found['steps_left_out']} steps that not all ranks have were left out")


def _pairs(texts: list[str] | None, flag: str) -> tuple[tuple[str, str], ...]:
    from moesim.errors import TraceError, describe

    for text in texts or []:
        if not text.partition("=")[1]:
            raise TraceError(describe("moesim trace import", flag, text, "must be KEY=VALUE"))
    return tuple((text.partition("=")[0], text.partition("=")[2]) for text in texts or [])


def _numbers(text: str | None, flag: str, separator: str) -> list[int] | None:
    from moesim.errors import TraceError, describe

    if text is None:
        return None
    parts = text.split(separator)
    if not all(part.strip().isdecimal() and len(part) < 12 for part in parts):
        raise TraceError(describe("moesim trace transform", flag, text, f"must be numbers separated by {separator!r}"))
    return [int(part) for part in parts]


def _pair(text: str | None) -> tuple[int, int] | None:
    from moesim.errors import TraceError, describe

    numbers = _numbers(text, "--steps", ":")
    if numbers is None:
        return None
    if len(numbers) > 2 or numbers[0] > numbers[-1]:
        raise TraceError(describe("moesim trace transform", "--steps", text, "must be FIRST:LAST or one number"))
    return numbers[0], numbers[-1]


def _write(trace: RoutingTrace, out: Path, json: bool) -> None:
    from moesim.traces.writer import write_trace

    manifest = write_trace(trace, out)
    notes = list(trace.provenance.get("notes", []))
    shape = manifest.shape
    if json:
        emit_json(
            {
                "schema": "moesim.trace-written/1",
                "out": str(out),
                "kind": manifest.kind,
                "routing": trace.routing,
                "model": shape.model,
                "num_experts": shape.num_experts,
                "top_k": shape.top_k,
                "moe_layer_ids": list(shape.moe_layer_ids),
                "rows": manifest.num_rows,
                "bytes": sum(s.bytes for s in manifest.shards),
                "fingerprint": manifest.fingerprint,
                "notes": notes,
            }
        )
        return
    for text in notes:
        note(text)
    rows = "windows" if manifest.kind == "counts" else "tokens"
    note(f"wrote {out}: {manifest.num_rows} {rows} × {shape.num_layers} layers, top-{shape.top_k} of {shape.num_experts} experts ({trace.routing})")
