"""The report of a replay that requests drive: latencies, throughput, memory, and where the step times come from."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.api.serving_deployment import Deployment
from moesim.costs import footprint
from moesim.costs.energy import cost, energy
from moesim.costs.group import nodes_of
from moesim.costs.provenance import Provenance
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES
from moesim.sim.serving.simulate import ServingRun
from moesim.traces.requests.document import Requests


def serving_report(run: ServingRun, requests: Requests, deployment: Deployment, wall_s: float) -> dict[str, Any]:
    """Return the report of a replay that requests drive; its keys are those of `moesim.replay/1`."""
    group, chosen, routing = deployment.group, deployment.settings.serving, deployment.routing
    tokens = run.output_tokens + run.prompt_tokens
    simulated = run.simulated_s
    loads = deployment.curves.steps.loads(group)
    balance = None
    if loads is not None:
        mean, most = loads.rank_LX.mean(axis=1), loads.rank_LX.max(axis=1)
        ratio = mean / most
        balance = {"mean_over_max": float(mean.sum() / most.sum()), "layer_mean": float(ratio.mean()), "worst_layer": float(ratio.min())}
    tier = deployment.cluster.memory.name
    powered = energy(deployment.cluster, simulated_s=simulated, state_s=_state_s(run, deployment), tokens=tokens)
    priced = cost(deployment.cluster, simulated_s=simulated, tokens=tokens, output_tokens=run.output_tokens)
    return {
        "schema": "moesim.replay/1",
        "model": deployment.model.name,
        "hardware": deployment.cluster.name,
        "deployment": {"tp": group.tp, "dp": group.dp, "ep": group.ep, "expert_tp": group.expert_tp, "pp": chosen.pp, "kv_blocks": deployment.blocks},
        "settings": deployment.settings.report(),
        "simulated_s": simulated,
        "wall_s": wall_s,
        "steps": run.sums.steps,
        "tokens": tokens,
        "tokens_per_s": tokens / simulated if simulated else 0.0,
        "output_tokens_per_s": run.output_tokens / simulated if simulated else 0.0,
        "step_ms": run.step.summary(),
        "breakdown_ms": _breakdown(run, deployment),
        "balance": balance,
        "memory": {tier: _peak_bytes(run, deployment)},
        "requests": {
            "source": requests.source,
            "format": requests.format,
            "finished": run.finished,
            "refused": run.refused,
            "excluded": dict(requests.excluded),
            "ttft_ms": run.ttft.summary(),
            "tpot_ms": run.tpot.summary(),
            "latency_ms": run.latency.summary(),
            "goodput": {"share": run.good / run.finished if run.finished else 0.0, "requests_per_s": run.good / simulated if simulated else 0.0},
        },
        "kv": {
            "peak_share": run.kv_peak,
            "preemptions": run.preemptions,
            "recomputed_tokens": run.recomputed_tokens,
            "prefix_hit_rate": run.prefix_tokens / run.prompt_tokens if run.prompt_tokens else 0.0,
            "transfers": run.transfers,
            "transfer_s": run.transfer_s,
        },
        "utilisation": run.sums.busy_s / (simulated * run.instances) if simulated else 0.0,
        "routing": routing.report() if routing is not None else None,
        "provenance": provenance(run, deployment),
        **({} if powered is None else {"energy": powered}),
        **({} if priced is None else {"cost": priced}),
    }


def _state_s(run: ServingRun, deployment: Deployment) -> dict[str, float]:
    """Return state (see `moesim.costs.energy`) → seconds in it, summed over devices; replicas that are not coupled step on devices of their own."""
    group, sums = deployment.group, run.sums
    ranks = group.ranks if deployment.curves.coupled else group.tp
    return {"compute": sums.prompt_s * ranks, "memory": sums.decode_s * ranks, "communication": sums.exchange_s * ranks}


def _peak_bytes(run: ServingRun, deployment: Deployment) -> float:
    group, chosen = deployment.group, deployment.settings.serving
    weights = float(footprint.weights_L(deployment.model, group).sum()) / chosen.pp + max(footprint.ends_bytes(deployment.model, group.tp, chosen.pp))
    kv = run.kv_peak * deployment.blocks * chosen.block_size * sizes.kv_bytes_per_token(deployment.model, group.tp) / chosen.pp
    return weights + kv


def _breakdown(run: ServingRun, deployment: Deployment) -> dict[str, float]:
    """Return the mean ms of a step in MoE (routed experts, exchanges), in host work, and in the rest."""
    steps = max(run.sums.steps, 1)
    whole, moe, host = run.sums.busy_s / steps * 1e3, run.sums.moe_s / steps * 1e3, deployment.settings.host_overhead_us * 1e-3
    return {"attention_and_dense": whole - moe - host, "moe": moe, "host": host}


def provenance(run: ServingRun, deployment: Deployment) -> dict[str, float]:
    """Return the share of time by class, in a step with the run's mean batch."""
    costs, model, group, sums = deployment.costs, deployment.model, deployment.group, run.sums
    slots = max(sums.steps * (group.dp if deployment.curves.coupled else 1), 1)
    decodes, new, chunks = sums.decodes / slots, sums.prompt_tokens / slots, sums.chunks / slots
    tokens = np.array([decodes * deployment.curves.verify + new])
    hidden = tokens * model.hidden_size * DTYPE_BYTES[model.dtype]
    moe, layers = len(model.moe_layer_ids), model.num_layers
    parts = [(layers, costs.attention_projections(tokens, group.tp)), (1, costs.head(np.array([decodes + chunks]), group.tp))]
    if sums.decodes:
        batch = np.array([decodes])
        context = np.array([sums.contexts / sums.decodes])
        parts.append((layers, costs.attention_core(phase="decode", sequences=batch, new_tokens=batch, context=context, tp=group.tp)))
    if sums.chunks:
        context = np.array([sums.prompt_contexts / sums.chunks])
        seqs = np.array([max(chunks, 1.0)])
        parts.append((layers, costs.attention_core(phase="prefill", sequences=seqs, new_tokens=np.array([new]), context=context, tp=group.tp)))
    if moe < layers:
        parts.append((layers - moe, costs.dense_ffn(tokens, tp=group.tp)))
    loads = deployment.curves.steps.loads(group)
    if loads is not None:
        parts.append((moe, costs.gate(tokens)))
        parts.append((moe, costs.experts(loads.slot_tokens(tokens * group.dp)[0, 0, :1], expert_tp=group.expert_tp)))
    if group.tp > 1:
        parts.append((2 * layers - moe, costs.all_reduce(hidden, group.tp, nodes=nodes_of(group.tp, deployment.cluster))))
    shares = dict.fromkeys((one.name.lower() for one in Provenance), 0.0)
    if sums.exchange_s:
        shares[_exchange_class(deployment, tokens * group.dp).name.lower()] += sums.exchange_s / max(sums.steps, 1)
    for count, timed in parts:
        shares[Provenance(int(np.asarray(timed.provenance).max())).name.lower()] += count * float(np.asarray(timed.seconds).sum())
    total = sum(shares.values())
    return {name: value / total if total else 0.0 for name, value in shares.items()}


def _exchange_class(deployment: Deployment, tokens: np.ndarray) -> Provenance:
    """Return the class of how tokens reach their experts and come back: all gather all, or all-to-all kernels."""
    costs, group = deployment.costs, deployment.group
    hidden = tokens * deployment.model.hidden_size * DTYPE_BYTES[deployment.model.dtype]
    nodes = nodes_of(group.ranks, deployment.cluster)
    loads = deployment.curves.steps.loads(group)
    if deployment.settings.serving.all2all == "gather" or loads is None or group.ep == 1:
        timed = costs.all_reduce if group.dp == 1 else costs.all_gather
        codes = timed(hidden, group.ranks, nodes=nodes).provenance
    else:
        copies = loads.ports("low_latency", tokens / group.ranks)
        codes = costs.exchange("low_latency", "dispatch", copies=copies).provenance
    return Provenance(int(np.asarray(codes).max()))
