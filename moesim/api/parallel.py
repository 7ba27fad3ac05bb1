"""`parallelize`: a model, a machine and requests in; the best split with its front, its reasons and its plans out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, need_equal_layers, trace_of, windows_of
from moesim.costs.model import CostModel
from moesim.errors import InputError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan

if TYPE_CHECKING:
    from moesim.solvers.parallelism import ParallelismResult, Workload
    from moesim.traces.requests.document import Request


def parallelize(
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    prompt_tokens: int | None = None,
    output_tokens: int | None = None,
    requests: str | None = None,
    concurrency: int | None = None,
    arrival_rps: float | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    routing: str = "balanced",
    objective: str = "throughput",
    modes: tuple[str, ...] = ("mixed", "disaggregated"),
    time_limit_s: float | None = None,
    plan_path: str | Path | None = None,
) -> dict[str, Any]:
    """Search how to split a model over all devices of a cluster; return the report of `moesim parallel`.

    requests: a request trace whose mean lengths and demand (arrival rate, or clients of a closed loop) are taken where they are not given; without one,
    prompt_tokens and output_tokens have to be. routing: `balanced`, `zipf:S`, or a trace (name, path, `synthetic:…`) whose expert loads are taken. The
    other arguments are those of `moesim.solvers.parallelism`. plan_path: where to write the plan of the best deployment; one with two pools gives two
    files, `.prefill` and `.decode` before the suffix. Raises InfeasibleError, naming the smallest violated requirement, if no deployment will do.
    """
    from moesim.solvers.parallelism import Slo, Space, Workload, plan_parallelism

    began = time.perf_counter()
    moe_model, cluster = model_of(model), cluster_of(hardware)
    need_equal_layers(moe_model, "a search of parallel degrees")
    named = routing == "balanced" or routing.startswith("zipf:")
    load: str | np.ndarray = routing if named else windows_of([trace_of(routing, moe_model, 0, None)], "balance")[0]
    if requests is not None:
        asked = _asked(requests)
        prompt_tokens, output_tokens = prompt_tokens or asked["prompt_tokens"], output_tokens or asked["output_tokens"]
        if concurrency is None and arrival_rps is None:
            concurrency, arrival_rps = asked["concurrency"], asked["arrival_rps"]
    if prompt_tokens is None or output_tokens is None:
        raise InputError("parallel: the lengths of a request are missing; give --prompt and --output, or --requests")
    workload = Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, concurrency=concurrency, arrival_rps=arrival_rps, routing=load)
    limit = None if time_limit_s is None else (lambda: time_limit_s - (time.perf_counter() - began))
    slo = Slo(ttft_ms=ttft_ms, tpot_ms=tpot_ms)
    result = plan_parallelism(moe_model, cluster, workload, slo, CostModel, space=Space(modes=modes), deadline=limit, objective=objective)
    written = [] if plan_path is None else _write(plans_of(result, workload, moe_model, cluster), Path(plan_path))
    return {
        "schema": "moesim.parallel/1",
        "model": moe_model.name,
        "hardware": cluster.name,
        "routing": routing,
        "requests": requests,
        "wall_s": time.perf_counter() - began,
        "plans": written,
        **result.as_dict(),
    }


def _asked(ref: str) -> dict[str, Any]:
    """Return what a request trace asks for on average: lengths, rounded up, and its arrivals per second or its clients."""
    from moesim.traces.requests.open import open_requests

    trace = open_requests(ref)
    count = prompts = outputs = 0
    last = 0.0
    for first in trace:
        last = first.arrival_s
        request: Request | None = first
        while request is not None:
            count, prompts, outputs = count + 1, prompts + request.prompt_tokens, outputs + request.output_tokens
            request = request.then
    if count == 0:
        raise InputError(f"{ref}: holds no request")
    rate = count / last if trace.clients is None and last > 0 else None
    return {"prompt_tokens": -(-prompts // count), "output_tokens": -(-outputs // count), "concurrency": trace.clients, "arrival_rps": rate}


def plans_of(result: ParallelismResult, workload: Workload, model: MoEModel, cluster: Cluster) -> dict[str, Plan]:
    """Return role → plan of one instance of every pool of the best deployment: its degrees, and the placement that its times assume.

    A plan's ranks are those of one expert-parallel group; stage s of a pipeline has the ranks s·R … (s + 1)·R - 1.
    Raises InputError if the model has no experts to place.
    """
    from moesim import __version__
    from moesim.solvers.parallelism import packed_placement

    if not model.moe_layer_ids:
        raise InputError(f"{model.name}: has no MoE layers, so there is no placement to write; leave out the plan")
    layers = len(model.moe_layer_ids)
    load_LE = np.broadcast_to(workload.assign_LE(model), (layers, model.num_experts))
    plans = {}
    for pool in result.best.pools:
        ranks = pool.parallel.ep
        plans[pool.role] = Plan(
            model=model.name,
            num_experts=model.num_experts,
            moe_layer_ids=model.moe_layer_ids,
            slot_to_expert_LS=packed_placement(load_LE, ranks, pool.slots_per_rank),
            slot_rank_S=np.repeat(np.arange(ranks), pool.slots_per_rank),
            num_ranks=ranks,
            parallel=pool.parallel,
            fingerprints={"model": model.sha256, "hardware": cluster.sha256},
            result={
                "objective": result.objective,
                "status": result.status,
                "solver": "parallelism",
                "version": __version__,
                "role": pool.role,
                "instances": pool.instances,
                "stage_layers": [list(one) for one in pool.stage_layers],
                "micro_batches": pool.micro_batches,
                "batch": pool.batch,
                "prefill_batch": pool.prefill_batch,
                "ttft_ms": result.best.ttft_ms,
                "tpot_ms": result.best.tpot_ms,
                "output_tokens_per_s_per_gpu": result.best.output_tokens_per_s_per_gpu,
            },
            source=f"moesim parallel, {pool.role} pool",
        )
        plans[pool.role].check_model(name=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L)
    return plans


def _write(plans: dict[str, Plan], path: Path) -> list[dict[str, str]]:
    written = []
    for role, plan in plans.items():
        target = path if len(plans) == 1 else path.with_name(f"{path.stem}.{role}{path.suffix}")
        plan.write(target)
        written.append({"role": role, "path": str(target), "sha256": plan.sha256})
    return written
