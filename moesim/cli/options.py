"""Options that several commands share, declared once: the annotation is the option, a command adds its default; and what their words mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trace = Annotated[str, typer.Argument(help="name, folder or .zip of a trace, or synthetic:balanced, synthetic:zipf:1.0 …")]
Model = Annotated[str, typer.Option("--model", help="model name, config.json or its folder")]
Hardware = Annotated[str, typer.Option("--hardware", help="hardware name like h100-sxm-8x4, or a YAML file, like that of moesim calibrate")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="plan to replay or to start with")]
Placement = Annotated[str, typer.Option("--placement", help="linear, round_robin, random or eplb, where no plan is given")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="key=value: dispatch=direct, offload.tier=dram, change.balancer=periodic:100 …; a wrong key lists all")
]
TokensPerStep = Annotated[int | None, typer.Option("--tokens-per-step", help="tokens per forward pass over all ranks; default: the recorded steps")]
MapLayers = Annotated[str | None, typer.Option("--map-layers", help="cycle, or trace:model pairs, where the layers differ")]
Times = Annotated[str, typer.Option("--times", help="model, or trace: the durations that the trace recorded, rescaled where the plan differs")]
Strict = Annotated[bool, typer.Option("--strict", help="refuse extrapolated and roofline times")]
Seed = Annotated[int, typer.Option("--seed", help="seed of synthetic or sampled routing, and of searches")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]


def parse_settings(items: list[str] | None) -> dict[str, str]:
    """Split the `key=value` words of `--set`; raises InputError for one without `=` or given twice."""
    from moesim.errors import InputError, describe

    result: dict[str, str] = {}
    for item in items or []:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise InputError(describe("--set", "item", item, "must have the form key=value"))
        if key in result:
            raise InputError(describe("--set", "key", key, "is given twice; keep one"))
        result[key] = value
    return result
