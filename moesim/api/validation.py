"""`validate_run`: a recorded serving run in; the same requests simulated, prediction beside measurement, out.

A run is a folder with requests.jsonl (arrival_time in epoch seconds, queued_ts, first_token_ts and last_token_ts in monotonic seconds, input_toks,
output_toks) and meta.json (degrees and limits under engine_kwargs). Only arrivals, lengths, degrees and limits enter the simulation; nothing is fitted.
What meta.json leaves open is assumed, and the report says so.
TTFT = first_token_ts - queued_ts, TPOT = (last_token_ts - first_token_ts) / (output_toks - 1), latency = last_token_ts - queued_ts; a request is queued
when the scheduler sees it, at the end of the step in which it arrives. Errors are relative to the measurement, positive where the prediction is larger.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of
from moesim.api.served_routing import served_routing
from moesim.api.serving_deployment import Deployment, deployment_of, group_with, routing_of
from moesim.api.serving_report import provenance
from moesim.api.validation_run_read import Run, read_run, shipped_runs
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.sim.serving.simulate import ServingRun
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request, Requests
from moesim.traces.routing_trace import RoutingTrace

SCHEMA = "moesim.validate/1"
QUANTITIES = ("ttft", "tpot", "latency")
PEERS = {"LLMServingSim, Qwen3-30B-A3B on RTX PRO 6000 (published)": {"ttft": -0.136, "tpot": -0.017}}
"""Published mean errors of another simulator on a run of this kind."""
_STEP = 0.05
"""Relative change of step times from which sensitivities are taken, both ways; smaller ones drown in which request meets which step."""
_USED = {
    "tensor_parallel_size": "attention_tp",
    "max_num_seqs": "serving.max_num_seqs",
    "max_num_batched_tokens": "serving.max_num_batched_tokens",
    "max_model_len": "serving.max_model_len",
    "pipeline_parallel_size": "serving.pp",
    "block_size": "serving.block_size",
    "gpu_memory_utilization": "serving.memory_share",
    "num_gpu_blocks_override": "serving.num_gpu_blocks",
    "enable_chunked_prefill": "serving.chunked_prefill",
    "enable_prefix_caching": "serving.prefix_cache",
    "async_scheduling": "serving.schedule_ahead",
}
"""Argument of the engine → setting."""
_OTHERS = ("all2all_backend", "model", "data_parallel_size", "enable_expert_parallel", "kv_cache_dtype", "quantization")
_ASKED = ("tensor_parallel_size", "data_parallel_size", "enable_expert_parallel", "max_num_seqs", "max_num_batched_tokens")
"""Arguments whose absence a reader of the report should know of."""


def validate_run(
    run: str | Path | Run,
    *,
    model: str | MoEModel | None = None,
    hardware: str | Cluster,
    requests_trace: str | RoutingTrace | None = None,
    settings: Mapping[str, str] | None = None,
    map_layers: str | None = None,
    strict: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Simulate a recorded run and return the report of `moesim.validate/1`.

    model: None takes the name in meta.json. requests_trace: routing of a MoE model; None: as a served model's experts were popular. settings: override
    what meta.json says. Raises InputError if a document breaks a rule.
    """
    began = time.perf_counter()
    recorded = run if isinstance(run, Run) else read_run(run)
    name = recorded.engine.get("model")
    if model is None and not isinstance(name, str):
        raise InputError(f"{recorded.place / 'meta.json'}: engine_kwargs.model is missing; give --model")
    moe_model, cluster = model_of(model if model is not None else str(name)), cluster_of(hardware)
    moe_model = _quantized(recorded, moe_model)
    deployment = _deployment(recorded, moe_model, cluster, requests_trace, settings or {}, map_layers, strict, seed)
    predicted, done = _simulate(recorded, deployment, 1.0)
    scored = [one for one in recorded.requests if one.id in recorded.measured and one.id in predicted]
    excluded = dict(recorded.excluded)
    for reason, count in done.refused.items():
        excluded[reason] = excluded.get(reason, 0) + count
    if not scored:
        raise InputError(f"{recorded.place}: no request is left to score; excluded: {excluded}")
    true, guess = _columns(scored, recorded.measured), _columns(scored, predicted)
    around = [_columns(scored, _simulate(recorded, deployment, 1.0 + sign * _STEP)[0]) for sign in (-1, 1)]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "run": str(recorded.place.name),
        "model": moe_model.name,
        "hardware": cluster.name,
        "deployment": _describe(deployment),
        "settings": {
            key: value for key, value in deployment.settings.report().items() if key.startswith("serving.") or key in ("attention_tp", "host_overhead_us")
        },
        "assumed": _assumed(recorded, deployment),
        "ignored": sorted(key for key in recorded.engine if key not in _USED and key not in _OTHERS),
    }
    for quantity in QUANTITIES:
        report[quantity] = _errors(true[quantity], guess[quantity])
    report["throughput"] = _throughput(scored, recorded.measured, predicted)
    report["sensitivity"] = {
        quantity: float((around[1][quantity].mean() - around[0][quantity].mean()) / (2 * _STEP) / guess[quantity].mean()) for quantity in QUANTITIES
    }
    report |= {
        "peers": PEERS,
        "rows_scored": len(scored),
        "rows_calibrated": 0,
        "rows_excluded": excluded,
        "first_excluded": recorded.first_excluded or None,
        "error_floor": None,
        "routing": deployment.routing.report() if deployment.routing is not None else None,
        "provenance": provenance(done, deployment),
        "fallbacks": dict(deployment.costs.fallbacks),
        "simulated_s": done.simulated_s,
        "steps": done.sums.steps,
        "wall_s": time.perf_counter() - began,
    }
    return report


def _deployment(
    run: Run, model: MoEModel, cluster: Cluster, trace: str | RoutingTrace | None, overrides: Mapping[str, str], map_layers: str | None, strict: bool, seed: int
) -> Deployment:
    """Return what meta.json describes. Raises InputError for an argument that is no value of its setting."""
    place = f"{run.place / 'meta.json'}: engine_kwargs"
    items = {setting: str(run.engine[key]) for key, setting in _USED.items() if run.engine.get(key) is not None}
    if run.blocks is not None:
        items.setdefault("serving.num_gpu_blocks", str(run.blocks))
    # vLLM gathers all tokens on all ranks unless it is given a library of all-to-all kernels.
    backend = str(run.engine.get("all2all_backend") or "allgather_reducescatter")
    items["serving.all2all"] = "gather" if backend in ("allgather_reducescatter", "naive") else "exchange"
    settings = Settings.parse({**items, **overrides})
    tp, dp = settings.attention_tp, run.dp
    # With a flag vLLM spreads whole experts over all ranks; without, it splits every expert over them.
    spread = run.engine.get("enable_expert_parallel") or 1
    ep = tp * dp if spread is True else spread
    if tp * dp % ep:
        raise InputError(describe(place, "expert parallel size", ep, f"must divide the {tp * dp} ranks (tensor {tp} × data {dp})"))
    group = group_with(model, tp=tp, dp=dp, expert_tp=tp * dp // ep if model.moe_layer_ids else 1)
    routing = served_routing(model, seed) if trace is None else routing_of(trace, model, seed, map_layers)
    return deployment_of(cluster, model, settings, group=group, routing=routing, strict=strict, seed=seed)


def _quantized(run: Run, model: MoEModel) -> MoEModel:
    """Return the model as the engine was told to quantize it. Raises InputError for weights of a type that the model's config does not have."""
    if str(run.engine.get("kv_cache_dtype", "auto")).startswith("fp8"):
        model = replace(model, kv_dtype="fp8")
    asked = str(run.engine.get("quantization") or "")
    if not asked or not model.dtype == model.weight_dtype == model.expert_dtype:
        return model
    if asked.startswith("fp8"):
        return replace(model, weight_dtype="fp8", expert_dtype="fp8")
    place = f"{run.place / 'meta.json'}: engine_kwargs"
    raise InputError(describe(place, "quantization", asked, f"is not that of {model.name}", "give the config.json of the quantized checkpoint with --model"))


def _assumed(run: Run, deployment: Deployment) -> dict[str, Any]:
    """Return argument → value of what meta.json leaves open."""
    settings = deployment.settings.report()
    values = {name: settings[_USED[name]] if name in _USED else 1 if name == "data_parallel_size" else False for name in _ASKED}
    if not deployment.model.moe_layer_ids:
        del values["enable_expert_parallel"]
    return {name: value for name, value in values.items() if run.engine.get(name) is None}


def _simulate(run: Run, deployment: Deployment, scale: float) -> tuple[dict[str, tuple[float, float, float]], ServingRun]:
    found: dict[str, tuple[float, float, float]] = {}

    def note(request: Request, arrival: float, queued: float, first: float, end: float) -> None:
        found[request.id] = (queued, first, end)

    requests = Requests(source=str(run.place), format="run", read=lambda: iter(run.requests))
    return found, deployment.run(requests, scale=scale, on_finish=note)


def _columns(requests: list[Request], times: Mapping[str, tuple[float, float, float]]) -> dict[str, np.ndarray]:
    """Return quantity → float64 [requests]; TPOT of those with more than one token."""
    stamps = np.array([times[one.id] for one in requests])
    output = np.array([one.output_tokens for one in requests])
    several = output > 1
    return {
        "ttft": stamps[:, 1] - stamps[:, 0],
        "tpot": (stamps[several, 2] - stamps[several, 1]) / (output[several] - 1),
        "latency": stamps[:, 2] - stamps[:, 0],
    }


def _errors(true: np.ndarray, guess: np.ndarray) -> dict[str, Any]:
    """Return errors of the mean and of the 99th percentile, and of single requests."""
    if not len(true):
        return {"n": 0}
    each = np.abs(guess - true) / np.maximum(true, 1e-12)
    low, high = np.percentile(true, 99), np.percentile(guess, 99)
    return {
        "n": len(true),
        "mean_error": float(guess.mean() / true.mean() - 1.0),
        "p99_error": float(high / low - 1.0),
        "mean_abs_error": float(each.mean()),
        "median_abs_error": float(np.median(each)),
        "p90_abs_error": float(np.percentile(each, 90)),
        "measured_ms": {"mean": float(true.mean() * 1e3), "p99": float(low * 1e3)},
        "predicted_ms": {"mean": float(guess.mean() * 1e3), "p99": float(high * 1e3)},
    }


def _throughput(
    requests: list[Request], measured: Mapping[str, tuple[float, float, float]], predicted: Mapping[str, tuple[float, float, float]]
) -> dict[str, Any]:
    """Return the error of the output tokens per second from the first queued request to the last token."""
    tokens = sum(one.output_tokens for one in requests)
    rate = [tokens / (max(times[one.id][2] for one in requests) - min(times[one.id][0] for one in requests)) for times in (measured, predicted)]
    error = rate[1] / rate[0] - 1.0
    return {
        "n": 1,
        "mean_error": error,
        "p99_error": error,
        "mean_abs_error": abs(error),
        "median_abs_error": abs(error),
        "p90_abs_error": abs(error),
        "measured_tokens_per_s": rate[0],
        "predicted_tokens_per_s": rate[1],
    }


def _describe(deployment: Deployment) -> dict[str, int]:
    group = deployment.group
    return {
        "tp": group.tp,
        "dp": group.dp,
        "ep": group.ep,
        "expert_tp": group.expert_tp,
        "pp": deployment.settings.serving.pp,
        "kv_blocks": deployment.blocks,
    }


__all__ = ["Run", "read_run", "shipped_runs", "validate_run"]
