"""`validate --published`: replay the setting of every published figure and put the prediction beside it.

Each row is one forward pass of a deployment through `api.replay`: its routing, its placement, its execution settings, nothing fitted on it; an engine's
host time per pass is the one that was fitted on end-to-end points of other models. Units: tokens/s per GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moesim.api.documents import cluster_of, model_of, trace_shape
from moesim.api.error_summary import error_summary
from moesim.api.published.loads import counts_trace, pass_trace
from moesim.api.replaying import replay
from moesim.api.solving import solve
from moesim.api.validation_points_run import read_overheads
from moesim.errors import InputError, describe
from moesim.files import read_yaml
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Parallel, Plan

SCHEMA = "moesim.validate/1"
FIGURES = Path(__file__).with_name("published.yaml")
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(_Strict):
    """One deployment and one pass of it."""

    name: str
    hardware: str
    phase: Literal["prefill", "decode"]
    tokens_per_gpu: Count
    """New prompt tokens, or tokens that decode."""
    tokens_per_request: Count = 1
    """Tokens that a decoding request has in a pass: more than one where drafts are verified."""
    accepted: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the drafts that the figure counts as accepted."""
    context: Count
    """Tokens of a prompt; KV entries of a decoding request."""
    routing: str
    experts: Literal["linear", "trivial", "eplb", "eplb-global"]
    redundant: Annotated[int, Field(ge=0, le=1 << 16)]
    settings: dict[str, str]
    engine: str = ""
    """Whose host time per pass is added; empty: none is known."""
    published: Positive | None = None
    within: Positive | None = None
    """Relative error that counts as a hit; none where the row is a variant that stands beside the scored one."""
    source: str
    peers: dict[str, Positive] = {}
    """What other tools predict."""


class Ratio(_Strict):
    """A published gain: the throughput of one row over that of another."""

    name: str
    of: str
    over: str
    published: Positive | None
    band: tuple[float | None, float | None]
    """Where the prediction has the right sign."""


class Excluded(_Strict):
    """A figure whose setting was not published."""

    name: str
    published: Positive
    reason: str


class Document(_Strict):
    """The file of figures."""

    format: Literal["moesim.published/1"]
    model: str
    sources: dict[str, str]
    rows: list[Row]
    ratios: list[Ratio] = []
    excluded: list[Excluded] = []


def read_figures(path: Path = FIGURES) -> Document:
    """Return the figures of a file. Raises InputError if it breaks a rule."""
    try:
        document = Document.model_validate(_merged(read_yaml(path, error=InputError), path.name))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path.name}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    names = [row.name for row in document.rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(describe(path.name, "rows.name", twice, "must be given once"))
    for row in document.rows:
        if row.source not in document.sources:
            raise InputError(describe(path.name, f"rows[{row.name}].source", row.source, f"must be one of {', '.join(document.sources)}"))
    for ratio in document.ratios:
        for key in ("of", "over"):
            if getattr(ratio, key) not in names:
                raise InputError(describe(path.name, f"ratios[{ratio.name}].{key}", getattr(ratio, key), "must be the name of a row"))
    return document


def _merged(node: Any, place: str) -> Any:
    """Return the document in which every row carries the keys of its deployment, its own keys last."""
    if not isinstance(node, dict) or not isinstance(node.get("rows"), list) or not all(isinstance(row, dict) for row in node["rows"]):
        raise InputError(f"{place}: must be a mapping with a list of rows")
    shared = node.get("deployments", {})
    rows = []
    for row in node["rows"]:
        name = row.get("deployment")
        if not isinstance(shared, dict) or not isinstance(name, str) or not isinstance(shared.get(name), dict):
            raise InputError(describe(place, f"rows[{row.get('name')}].deployment", name, "must be the name of a deployment"))
        rows.append({**shared[name], **{key: value for key, value in row.items() if key != "deployment"}})
    return {**{key: value for key, value in node.items() if key != "deployments"}, "rows": rows}


def validate_published(
    only: str | None = None, *, figures: Path = FIGURES, strict: bool = False, seed: int = 0, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Predict every published throughput, or those whose name contains `only`, and return the report.

    strict: refuse extrapolated and roofline times. progress: called with the name of every row before it is replayed.
    Raises InputError if the file breaks a rule, or no name contains `only`.
    """
    document = read_figures(figures)
    text = (only or "").lower()
    ratios = [ratio for ratio in document.ratios if text in ratio.name.lower() or (text in ratio.of.lower() and text in ratio.over.lower())]
    named = {name for ratio in ratios if text and text in ratio.name.lower() for name in (ratio.of, ratio.over)}
    chosen = [row for row in document.rows if text in row.name.lower() or row.name in named]
    if not chosen:
        raise InputError(describe("validate", "--published", only, "must be part of a row's name", f"rows: {', '.join(row.name for row in document.rows)}"))
    model = model_of(document.model)
    rows = {}
    # Rows that share their choices follow each other, so that these are drawn once.
    for row in sorted(chosen, key=lambda row: (row.phase, row.routing, row.hardware, row.tokens_per_gpu)):
        if progress is not None:
            progress(row.name)
        rows[row.name] = _predict(row, model, document.sources[row.source], strict, seed)
    scored = [item for item in rows.values() if item["within"] is not None]
    errors = np.array([item["error"] for item in scored])
    return {
        "schema": SCHEMA,
        "source": figures.name,
        "model": model.name,
        "throughput": error_summary(errors),
        "rows_scored": len(scored),
        "rows_calibrated": 0,
        "rows_excluded": {item.reason: 1 for item in document.excluded},
        "error_floor": None,
        "rows": [rows[row.name] for row in chosen],
        "ratios": [_ratio(ratio, rows) for ratio in ratios if ratio.of in rows and ratio.over in rows],
        "excluded": [item.model_dump() for item in document.excluded],
        "seed": seed,
    }


def plan_of(row: Row, model: MoEModel, cluster: Cluster, seed: int) -> Plan | None:
    """Return the placement of a row; None stands for one copy of every expert in order."""
    if row.experts == "linear":
        return None
    shape = trace_shape(model)
    if row.experts == "trivial":
        slots, ranks = model.num_experts + row.redundant, cluster.num_ranks
        if slots % ranks:
            raise InputError(describe("published row", row.name, slots, f"slots must be a multiple of the {ranks} GPUs"))
        return Plan(
            model=model.name,
            num_experts=model.num_experts,
            moe_layer_ids=model.moe_layer_ids,
            slot_to_expert_LS=np.tile(np.arange(slots) % model.num_experts, (shape.num_layers, 1)),
            slot_rank_S=np.arange(slots) // (slots // ranks),
            num_ranks=ranks,
            parallel=Parallel(ep=ranks, dp=ranks),
            result={"solver": "trivial", "status": "BASELINE"},
        )
    loads = counts_trace(shape, row.routing, seed)
    return solve(
        loads, model=model, hardware=cluster, objective="balance", redundant=row.redundant, solver=row.experts, weight_memory_bytes=math.inf, predict=False
    ).plan


def host_us(row: Row) -> float:
    """Return the host time of a pass: that of the engine's step and of every sequence (simulated drafts are sequences) of one GPU's scheduler."""
    if not row.engine:
        return 0.0
    known = {backend: one for (backend, version), one in read_overheads().by_version.items() if version == "*"}
    if row.engine not in known:
        raise InputError(describe("published row", row.name, row.engine, f"must be an engine with declared host overheads: {', '.join(sorted(known))}"))
    sequences = row.tokens_per_gpu / (row.context if row.phase == "prefill" else 1)
    return known[row.engine].step_us + known[row.engine].sequence_us * sequences


def _predict(row: Row, model: MoEModel, source: str, strict: bool, seed: int) -> dict[str, Any]:
    began = time.perf_counter()
    cluster = cluster_of(row.hardware)
    tokens = row.tokens_per_gpu * cluster.num_ranks
    trace = pass_trace(trace_shape(model), row.routing, phase=row.phase, tokens=tokens, context=row.context, each=row.tokens_per_request, seed=seed)
    plan = plan_of(row, model, cluster, seed)
    settings = {**row.settings, "host_overhead_us": f"{host_us(row):g}"}
    report = replay(trace, model=model, hardware=cluster, plan=plan, settings=settings, strict=strict, seed=seed).report
    counted = (1.0 + row.accepted * (row.tokens_per_request - 1)) / row.tokens_per_request
    predicted = report["tokens_per_s"] * counted / cluster.num_ranks
    error = None if row.published is None else predicted / row.published - 1.0
    return {
        **row.model_dump(include={"name", "hardware", "phase", "tokens_per_gpu", "tokens_per_request", "context", "routing", "experts", "redundant"}),
        "settings": settings,
        "source": source,
        "published": row.published,
        "predicted": predicted,
        "error": error,
        "within": row.within,
        "hit": None if error is None or row.within is None else abs(error) <= row.within,
        "peers": {} if row.published is None else {name: value / row.published - 1.0 for name, value in row.peers.items()},
        "step_ms": report["step_ms"]["mean"],
        "breakdown_ms": report["breakdown_ms"],
        "balance": report["balance"]["mean_over_max"],
        "provenance": report["provenance"],
        "wall_s": time.perf_counter() - began,
    }


def _ratio(ratio: Ratio, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    predicted = rows[ratio.of]["predicted"] / rows[ratio.over]["predicted"]
    low, high = ratio.band
    return {
        "name": ratio.name,
        "published": ratio.published,
        "predicted": predicted,
        "band": [low, high],
        "hit": (low is None or predicted >= low) and (high is None or predicted <= high),
    }
