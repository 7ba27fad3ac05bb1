"""`serve`: requests, a model, a machine, routing and serving settings in; latencies and throughput out."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moesim.api.documents import cluster_of, model_of, need_equal_layers, read_plan, trace_of
from moesim.api.serving_deployment import deployment_of, group_of, routing_of
from moesim.api.serving_report import serving_report
from moesim.errors import InputError, describe
from moesim.files import write_atomic
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request, Requests
from moesim.traces.requests.open import open_requests
from moesim.traces.routing_trace import RoutingTrace


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """What serving returns."""

    report: dict[str, Any]
    rows: list[tuple[str, float, float, float, float]]
    """Id, arrival, time to first token, time per output token and latency (s) of every request, where they were asked for."""

    def write(self, folder: Path, *, plots: bool = False) -> list[Path]:
        """Write metrics.json and requests.csv to `folder`; the wall time is left out, so that equal runs give equal bytes."""
        if plots:
            raise InputError("replay: --plots draws forward passes; a replay of requests has none to draw, drop it")
        stable = {key: value for key, value in self.report.items() if key != "wall_s"}
        metrics, table = folder / "metrics.json", folder / "requests.csv"
        write_atomic(metrics, json.dumps(stable, indent=2, allow_nan=False) + "\n")

        def fill(path: Path) -> None:
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(["request", "arrival_s", "ttft_ms", "tpot_ms", "latency_ms"])
                writer.writerows((name, f"{at:.6f}", *(f"{value * 1e3:.6f}" for value in rest)) for name, at, *rest in self.rows)

        write_atomic(table, fill)
        return [metrics, table]


def serve(
    requests: str | Path | Requests,
    *,
    trace: str | RoutingTrace,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    placement: str = "linear",
    settings: Mapping[str, str] | Settings | None = None,
    map_layers: str | None = None,
    backend: str = "vllm",
    strict: bool = False,
    seed: int = 0,
    keep_rows: bool = False,
) -> Serving:
    """Serve requests on a cluster whose devices are shared out to equal instances; `trace` says how tokens are routed.

    plan, placement: as for `replay`; they place the experts of one stage. An instance has
    num_ranks / (all instances · pp) ranks per stage, attention_tp of which share an attention replica. keep_rows: keep the times of
    every request. Raises InputError if any document breaks a rule, or if they do not fit each other.
    """
    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    need_equal_layers(moe_model, "a replay of requests")
    chosen = settings if isinstance(settings, Settings) else Settings.parse(settings or {})
    _check_settings(chosen)
    asked = requests if isinstance(requests, Requests) else open_requests(requests, seed=seed)
    placed = read_plan(plan) if plan is not None else None
    if placed is not None:
        placed.check_model(name=moe_model.name, num_experts=moe_model.num_experts, moe_layer_ids=moe_model.moe_layer_ids, experts_L=moe_model.experts_L)
    if placed is None and placement != "linear":
        from moesim.api.replaying import placed_plan

        placed = placed_plan(None, placement, trace_of(trace, moe_model, seed, map_layers), moe_model, cluster, seed)
    group = group_of(cluster, moe_model, chosen, placed)
    routing = routing_of(trace, moe_model, seed, map_layers)
    deployment = deployment_of(cluster, moe_model, chosen, group=group, routing=routing, plan=placed, backend=backend, strict=strict, seed=seed)
    rows: list[tuple[str, float, float, float, float]] = []

    def note(request: Request, arrival: float, queued: float, first: float, end: float) -> None:
        tpot = (end - first) / (request.output_tokens - 1) if request.output_tokens > 1 else 0.0
        rows.append((request.id, arrival, first - arrival, tpot, end - arrival))

    run = deployment.run(asked, on_finish=note if keep_rows else None)
    return Serving(report=serving_report(run, asked, deployment, time.perf_counter() - began), rows=rows)


def _check_settings(settings: Settings) -> None:
    """Raise InputError for a setting that acts on traced passes only."""
    defaults = Settings()
    for item in fields(Settings):
        if item.name not in ("attention_tp", "host_overhead_us", "serving") and getattr(settings, item.name) != getattr(defaults, item.name):
            raise InputError(describe("--set", item.name, "a value", "acts on traced passes and does not go with requests", "drop it, or drop --requests"))
