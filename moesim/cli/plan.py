"""`moesim plan show | diff | check | export | import`: look at plans, compare them, and carry them to and from serving engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True, help="Show, compare, check, export and import plans."
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
File = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")]
Format = Annotated[str, typer.Option("--format", help="sglang, trtllm, vllm-ascend or eplb.")]


@app.command()
def show(plan: File, json: Json = False) -> None:
    """Show what a plan holds and what its solver reported."""
    from moesim.cli.output import emit_json, table
    from moesim.plan import Plan
    from moesim.plan_formats import summary

    facts = summary(Plan.read(plan))
    if json:
        emit_json({"schema": "moesim.plan-show/1", **facts})
        return
    result = facts["result"]
    rows = [
        ("model", facts["model"]),
        ("layers × slots", f"{facts['layers']} × {facts['slots']} for {facts['experts']} experts"),
        ("ranks", f"{facts['ranks']}, {facts['slots_per_rank']['min']}..{facts['slots_per_rank']['max']} slots each"),
        ("replicas", f"at most {facts['replicas']['most']}; {facts['replicas']['replicated_experts_per_layer']:.1f} replicated experts per layer"),
        ("empty, duplicate slots", f"{facts['empty_slots']}, {facts['duplicate_slots']}"),
        ("solver", f"{result.get('solver', '?')}, {result.get('status', '?')}"),
    ]
    if isinstance(result.get("value"), float):
        rows.append(
            (str(result.get("objective", "value")), f"{result['value']:.4f} of at most {result.get('bound', 1.0):.4f} (gap {result.get('gap', 0.0):.2%})")
        )
    rows.append(("sha256", facts["sha256"]))
    table(str(plan), ("", "value"), rows)


@app.command()
def diff(old: File, new: File, json: Json = False) -> None:
    """Show which slots and ranks change from one plan to another."""
    from moesim.cli.output import emit_json, note, table
    from moesim.plan import Plan
    from moesim.plan_formats import difference

    change = difference(Plan.read(old), Plan.read(new))
    if json:
        emit_json({"schema": "moesim.plan-diff/1", **change})
        return
    verdict = "same placement" if change["identical"] else "different placement"
    note(f"{change['slots']} of {change['slots_total']} slots change, {change['fetched_experts']} experts have to be fetched: {verdict}")
    if change["slots"]:
        table("", ("rank", "slots"), sorted(change["ranks"].items(), key=lambda item: (-item[1], int(item[0])))[:20])


@app.command()
def check(
    plan: File,
    model: Annotated[str | None, typer.Option("--model", help="Model that the plan has to fit.")] = None,
    hardware: Annotated[str | None, typer.Option("--hardware", help="Hardware that the plan has to fit.")] = None,
    json: Json = False,
) -> None:
    """Check that a plan is whole and fits a model and a machine; exits 1 if it does not fit."""
    from moesim.cli.output import emit_json, note
    from moesim.errors import MoesimError
    from moesim.plan import Plan

    document = Plan.read(plan)
    problems, remarks = _fit(document, model, hardware)
    if json:
        emit_json({"schema": "moesim.plan-check/1", "ok": not problems, "problems": problems, "remarks": remarks, "sha256": document.sha256})
    for remark in remarks:
        note(f"note: {remark}")
    if problems:
        raise MoesimError(problems[0])
    if not json:
        note(f"{plan}: ok")


def _fit(plan: Any, model: str | None, hardware: str | None) -> tuple[list[str], list[str]]:
    """Return the rules that the plan breaks and remarks on what is legal but unusual."""
    from moesim.errors import PlanError, describe
    from moesim.plan_formats import summary

    problems: list[str] = []
    facts = summary(plan)
    remarks = [
        f"{facts[key]} {text}"
        for key, text in (("duplicate_slots", "slots hold an expert that their rank has already"), ("empty_slots", "slots are empty"))
        if facts[key]
    ]
    moe_model = cluster = None
    if model is not None:
        from moesim.model import load_model

        moe_model = load_model(model)
        try:
            plan.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
        except PlanError as error:
            problems.append(str(error))
    if hardware is not None:
        from moesim.hardware import load_cluster

        cluster = load_cluster(hardware)
        if plan.num_ranks != cluster.num_ranks:
            problems.append(
                describe(
                    plan.source, "num_ranks", plan.num_ranks, f"must equal the {cluster.num_ranks} devices of {cluster.name}", "solve again for this hardware"
                )
            )
    if moe_model is not None and cluster is not None and not problems:
        from moesim.model.sizes import expert_bytes
        from moesim.units import format_bytes

        need = facts["slots_per_rank"]["max"] * plan.num_layers * expert_bytes(moe_model) / plan.parallel.expert_tp
        room = cluster.memory.capacity_bytes
        if need > room:
            problems.append(
                describe(
                    plan.source,
                    "expert weights of the fullest rank",
                    format_bytes(need),
                    f"must be <= {format_bytes(room)}, the memory of {cluster.device.name}",
                    "use more ranks",
                )
            )
    for key, document in (("model", moe_model), ("hardware", cluster)):
        made_for = plan.fingerprints.get(key)
        if document is not None and made_for and document.sha256 and made_for != document.sha256:
            remarks.append(f"made for another version of the {key} description")
    return problems, remarks


@app.command("export")
def export(
    plan: File,
    format: Format,
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write; eplb also writes .npz.")],
    model: Annotated[str | None, typer.Option("--model", help="Model, for the number of its hidden layers; sglang needs it.")] = None,
    mtp_layers: Annotated[int, typer.Option("--mtp-layers", help="trtllm: multi-token-prediction layers to add after the hidden ones.")] = 0,
    updates: Annotated[int, typer.Option("--layer-updates-per-iter", help="trtllm: 0 keeps the placement static.")] = 0,
    json: Json = False,
) -> None:
    """Write a plan in the format of a serving engine."""
    from moesim.cli.output import emit_json, note
    from moesim.plan import Plan
    from moesim.plan_formats import export_plan

    document = Plan.read(plan)
    layers = None
    name = model or (document.model if format == "sglang" else None)
    if name is not None:
        from moesim.model import load_model

        moe_model = load_model(name)
        document.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
        layers = moe_model.num_layers
    export_plan(document, format, output, num_hidden_layers=layers, mtp_layers=mtp_layers, layer_updates_per_iter=updates)
    if json:
        emit_json(
            {
                "schema": "moesim.plan-export/1",
                "format": format,
                "output": str(output),
                "layers": document.num_layers,
                "slots": document.num_slots,
                "map_sha256": document.map_sha256,
            }
        )
    note(f"wrote {output}")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A placement file of a serving engine.")],
    format: Format,
    model: Annotated[str, typer.Option("--model", help="Model that the placement is for.")],
    ranks: Annotated[int, typer.Option("--ranks", help="Expert-parallel ranks that share the slots.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Plan file to write.")],
    json: Json = False,
) -> None:
    """Read a placement of a serving engine as a plan."""
    from moesim.cli.output import emit_json, note
    from moesim.model import load_model
    from moesim.plan_formats import import_plan, summary

    moe_model = load_model(model)
    plan = import_plan(
        source,
        format,
        model=moe_model.name,
        num_experts=moe_model.num_experts,
        moe_layer_ids=moe_model.moe_layer_ids,
        experts_L=moe_model.experts_L,
        num_ranks=ranks,
        num_hidden_layers=moe_model.num_layers,
    )
    plan.write(output)
    if json:
        emit_json({"schema": "moesim.plan-import/1", "format": format, "output": str(output), **summary(plan)})
    note(f"wrote {output}")
