"""`parallelize`: a model, a machine and requests in; the best split with its front and reasons out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, trace_of, windows_of
from moesim.costs.model import CostModel
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel


def parallelize(
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    prompt_tokens: int,
    output_tokens: int,
    concurrency: int | None = None,
    arrival_rps: float | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    routing: str = "balanced",
    objective: str = "throughput",
    modes: tuple[str, ...] = ("mixed", "disaggregated"),
    time_limit_s: float | None = None,
) -> dict[str, Any]:
    """Search how to split a model over all devices of a cluster; return the report of `moesim parallel`.

    routing: `balanced`, `zipf:S`, or a trace (name, path, `synthetic:…`) whose expert loads are taken. The other arguments are those of
    `moesim.solvers.parallelism`. Raises InfeasibleError, naming the smallest violated requirement, if no deployment will do.
    """
    from moesim.solvers.parallelism import Slo, Space, Workload, plan_parallelism

    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    named = routing == "balanced" or routing.startswith("zipf:")
    load: str | np.ndarray = routing if named else windows_of([trace_of(routing, moe_model, 0, None)], "balance")[0]
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, concurrency=concurrency, arrival_rps=arrival_rps, routing=load)
    limit = None if time_limit_s is None else (lambda: time_limit_s - (time.perf_counter() - began))
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    result = plan_parallelism(moe_model, cluster, workload, slo, CostModel, space=Space(modes=modes), deadline=limit, objective=objective)
    return {
        "schema": "moesim.parallel/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "routing": routing,
        "wall_s": time.perf_counter() - began,
        **result.as_dict(),
    }
