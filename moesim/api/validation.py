"""`validate_run`: a recorded serving run in; the same requests simulated, prediction beside measurement, out.

A run is a folder with requests.jsonl (arrival_time in epoch seconds, queued_ts, first_token_ts and last_token_ts in monotonic seconds, input_toks,
output_toks) and meta.json (degrees and limits under engine_kwargs). Only arrivals, lengths, degrees and limits enter the simulation; nothing is fitted.
TTFT = first_token_ts - queued_ts, TPOT = (last_token_ts - first_token_ts) / (output_toks - 1), latency = last_token_ts - queued_ts; a request is queued
when the scheduler sees it, at the end of the step in which it arrives. Errors are relative to the measurement, positive where the prediction is larger.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of
from moesim.api.served_routing import served_routing
from moesim.api.serving_deployment import Deployment, deployment_of, group_with, routing_of
from moesim.api.serving_report import provenance
from moesim.errors import InputError, MoesimError, describe
from moesim.files import parse_json, read_bytes, read_json
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.sim.serving.simulate import ServingRun
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Request, Requests, check_request
from moesim.traces.routing_trace import RoutingTrace

SCHEMA = "moesim.validate/1"
QUANTITIES = ("ttft", "tpot", "latency")
PEERS = {"LLMServingSim, Qwen3-30B-A3B on RTX PRO 6000 (published)": {"ttft": -0.136, "tpot": -0.017}}
"""Published mean errors of another simulator on a run of this kind."""
_STEP = 0.05
"""Relative change of step times from which sensitivities are taken, both ways; smaller ones drown in which request meets which step."""
_LIMIT = 1 << 28
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
}
"""Argument of the engine → setting."""
_OTHERS = ("all2all_backend", "model", "data_parallel_size", "enable_expert_parallel", "kv_cache_dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A recorded run."""

    place: Path
    engine: Mapping[str, Any]
    """engine_kwargs of meta.json."""
    blocks: int | None
    """KV blocks of a replica, where meta.json says."""
    requests: tuple[Request, ...]
    """In order of arrival."""
    measured: Mapping[str, tuple[float, float, float]]
    """Request id → queued_ts, first_token_ts, last_token_ts."""
    excluded: Mapping[str, int]
    """Reason → rows that are not scored."""


def shipped_runs() -> dict[str, Path]:
    """Return the runs of the package by name."""
    folder = Path(__file__).parent / "runs"
    return {path.name: path for path in sorted(folder.iterdir()) if (path / "meta.json").is_file()}


def read_run(ref: str | Path) -> Run:
    """Read a run by the path of its folder or its shipped name. Raises InputError if a file is missing or breaks a rule."""
    folder = Path(ref)
    if not folder.is_dir():
        shipped = shipped_runs()
        if str(ref) not in shipped:
            raise InputError(f"{ref}: is neither a folder with requests.jsonl and meta.json nor a shipped run; shipped: {', '.join(shipped)}")
        folder = shipped[str(ref)]
    meta = read_json(folder / "meta.json")
    engine = meta.get("engine_kwargs") if isinstance(meta, dict) else None
    if not isinstance(engine, dict):
        raise InputError(f"{folder / 'meta.json'}: engine_kwargs is missing; it holds the degrees and limits of the engine")
    cache = meta.get("kv_cache")
    blocks = cache.get("num_gpu_blocks") if isinstance(cache, dict) else None
    place = folder / "requests.jsonl"
    rows, measured, excluded = [], {}, {"impossible row": 0, "no measured times": 0}
    for number, line in enumerate(read_bytes(place, limit=_LIMIT).splitlines(), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{place}: line {number}")
        if not isinstance(row, dict):
            raise InputError(f"{place}: line {number}: must be a JSON object, one request")
        try:
            name, at, prompt, output = str(row.get("request_id", number)), float(row["arrival_time"]), row["input_toks"], row["output_toks"]
            if type(prompt) is not int or type(output) is not int:
                raise ValueError
            check_request(f"{place}: line {number}", at, prompt, output)
        except (KeyError, TypeError, ValueError, MoesimError):
            excluded["impossible row"] += 1
            continue
        rows.append((at, name, prompt, output))
        stamps = [row.get(key) for key in ("queued_ts", "first_token_ts", "last_token_ts")]
        times = [float(one) for one in stamps if isinstance(one, int | float) and not isinstance(one, bool)]
        if len(times) == 3 and times[0] < times[1] <= times[2]:
            measured[name] = (times[0], times[1], times[2])
        else:
            excluded["no measured times"] += 1
    if not measured:
        raise InputError(f"{place}: no request has queued_ts, first_token_ts and last_token_ts; there is nothing to compare with")
    if len({row[1] for row in rows}) != len(rows):
        raise InputError(f"{place}: a request_id appears twice; every request needs its own")
    rows.sort()
    first = rows[0][0]
    requests = tuple(Request(name, at - first, prompt, output) for at, name, prompt, output in rows)
    known = blocks if isinstance(blocks, int) and blocks > 0 else None
    return Run(
        place=folder, engine=engine, blocks=known, requests=requests, measured=measured, excluded={key: count for key, count in excluded.items() if count}
    )


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
    if str(recorded.engine.get("kv_cache_dtype", "auto")).startswith("fp8"):
        moe_model = replace(moe_model, kv_dtype="fp8")
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
    dp = run.engine.get("data_parallel_size") or 1
    if type(dp) is not int or not 1 <= dp <= 65536:
        raise InputError(describe(place, "data_parallel_size", dp, "must be an integer in 1..65536"))
    tp = settings.attention_tp
    # Without expert parallelism vLLM splits every expert over all ranks.
    shards = 1 if run.engine.get("enable_expert_parallel") else tp * dp
    group = group_with(model, tp=tp, dp=dp, expert_tp=shards if model.moe_layer_ids else 1)
    routing = served_routing(model, seed) if trace is None else routing_of(trace, model, seed, map_layers)
    return deployment_of(cluster, model, settings, group=group, routing=routing, strict=strict, seed=seed)


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
