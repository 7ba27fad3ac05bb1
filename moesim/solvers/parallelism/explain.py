"""Describes chosen points as deployments, finds the runner-up, and says in words and numbers why it lost and what the constraints cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from moesim.solvers.parallelism.pools import Choice, describe_pool
from moesim.solvers.parallelism.result import Deployment
from moesim.solvers.parallelism.search import MIXED, Search
from moesim.solvers.parallelism.workload import Slo
from moesim.units import format_bytes

KINDS = {
    "all_reduce": "communication (all-reduce of tensor parallelism)",
    "exchange": "communication (exchange of expert parallelism)",
    "imbalance": "imbalance of expert loads",
    "bubble": "pipeline bubbles and hops",
    "idle": "idle devices (the other pool, or the requests in flight, set the rate)",
    "attention": "attention",
    "experts": "experts",
    "dense_ffn": "dense FFN",
    "gate": "gate",
    "shared_experts": "shared experts",
    "ends": "embedding and head",
    "floor": "peak rates",
    "prefill stalls": "prefill stalls",
}
"""Part → what it is called."""
OBJECTIVES = ("throughput", "latency")


def rank(values: np.ndarray, objective: str) -> tuple[float, ...]:
    """Return what the objective minimises, lexicographically, from (tpot, ttft, -rate)."""
    tpot, ttft, loss = (float(one) for one in values)
    return (loss, tpot, ttft) if objective == "throughput" else (tpot, ttft, loss)


def meets(values_ND: np.ndarray, slo: Slo | None, arrival_rps: float | None) -> np.ndarray:
    """Return bool [N]: service levels kept and arrivals carried."""
    good = np.ones(len(values_ND), dtype=bool)
    if slo is not None and slo.tpot_ms is not None:
        good &= values_ND[:, 0] * 1e3 <= slo.tpot_ms
    if slo is not None and slo.ttft_ms is not None:
        good &= values_ND[:, 1] * 1e3 <= slo.ttft_ms
    if arrival_rps is not None:
        good &= -values_ND[:, 2] >= arrival_rps
    return good


def deployment(search: Search, item: tuple[Any, ...], values: np.ndarray, slo: Slo | None) -> Deployment:
    """Return the deployment of an item of the front."""
    if item[0] == MIXED:
        members = [("mixed", item[1], search.total // item[1].shape.devices)]
    else:
        members = [("prefill", item[1], item[2]), ("decode", item[3], item[4])]
    pools = tuple(describe_pool(choice, role, count, search.points, search.timer, slo) for role, choice, count in members)
    tpot, ttft, rate = float(values[0]), float(values[1]), -float(values[2])
    spent: dict[str, float] = {}
    for pool in pools:
        for name, seconds in pool.gpu_s_per_request.items():
            spent[name] = spent.get(name, 0.0) + seconds
    spent["idle"] = max(search.total / rate - sum(spent.values()), 0.0)
    return Deployment(
        mode="mixed" if item[0] == MIXED else "disaggregated",
        label=label(search, item),
        pools=pools,
        devices=search.total,
        ttft_ms=1e3 * ttft,
        tpot_ms=1e3 * tpot,
        requests_per_s=rate,
        output_tokens_per_s_per_gpu=rate * search.workload.output_tokens / search.total,
        gpu_s_per_request=spent,
    )


def label(search: Search, item: tuple[Any, ...]) -> str:
    """Return one line for people."""

    def one(role: str, choice: Choice, count: int) -> str:
        group = choice.shape.group
        shown = [f"tp {group.tp}", f"dp {group.dp}", f"ep {group.ep}", f"expert_tp {group.expert_tp}", f"pp {choice.shape.pp}"]
        shown += [f"batch {choice.batch}"] * (choice.batch > 0) + [f"prompts {choice.prompts}"] * (choice.prompts > 0)
        shown += [f"micro-batches {choice.micro}"] * (choice.micro > 1)
        shown += [f"redundant {group.slots * group.ep - search.model.num_experts}"] * (group.slots * group.ep > search.model.num_experts)
        return f"{count} x {role} ({', '.join(shown)})"

    if item[0] == MIXED:
        return one("mixed", item[1], search.total // item[1].shape.devices)
    return one("prefill", item[1], item[2]) + " + " + one("decode", item[3], item[4])


def degrees(search: Search, item: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what makes deployments different: shapes without redundancy, and counts."""

    def plain(choice: Choice) -> tuple[int, ...]:
        group = choice.shape.group
        return group.tp, group.dp, group.ep, group.expert_tp, choice.shape.pp

    if item[0] == MIXED:
        return MIXED, plain(item[1])
    return item[0], plain(item[1]), item[2], plain(item[3]), item[4]


def runner_up(search: Search, best: tuple[Any, ...], objective: str, slo: Slo | None) -> tuple[tuple[Any, ...], np.ndarray] | None:
    """Return the best item of other degrees that meets the constraints: over all mixed points (best bound first), and over the front's pairs."""
    taken, arrival = degrees(search, best), search.workload.arrival_rps
    found: tuple[tuple[float, ...], tuple[Any, ...], np.ndarray] | None = None

    def offer(item: tuple[Any, ...], values: np.ndarray) -> None:
        nonlocal found
        if degrees(search, item) != taken and meets(values[None], slo, arrival)[0]:
            key = rank(values, objective)
            if found is None or (key, item) < found[:2]:
                found = key, item, values.copy()

    for item, values in zip(search.front.items, search.front.values_FD, strict=True):
        offer(item, values)
    if not search.timed_out:
        waiting = [entry for entry in search.entries if entry.role == "mixed" and degrees(search, (MIXED, entry.choice(0))) != taken]
        bounds = {index: _promise(entry.values, objective, slo, arrival) for index, entry in enumerate(waiting)}
        for index in sorted(bounds, key=lambda one: (bounds[one], one)):
            if found is not None and bounds[index] >= found[0]:
                break
            entry = waiting[index]
            search.bound(entry)
            for point in sorted(range(len(entry.points)), key=lambda one: (rank(entry.values[one], objective), one)):
                if found is not None and rank(entry.values[point], objective) >= found[0]:
                    break
                if meets(entry.values[point][None], slo, arrival)[0]:
                    offer((MIXED, entry.choice(point)), search.settle(entry, point))
    return None if found is None else found[1:]


def _promise(values: np.ndarray, objective: str, slo: Slo | None, arrival: float | None) -> tuple[float, ...]:
    good = values[meets(values, slo, arrival)]
    return min((rank(one, objective) for one in good), default=(np.inf, np.inf, np.inf))


def lost_by(best: Deployment, other: Deployment, objective: str) -> dict[str, float]:
    """Return what the runner-up spends beyond the best by part: device-seconds per request, or ms of TPOT."""
    mine, theirs = (_spent(one, objective) for one in (best, other))
    return {name: theirs.get(name, 0.0) - mine.get(name, 0.0) for name in sorted({*mine, *theirs})}


def _spent(one: Deployment, objective: str) -> Mapping[str, float]:
    if objective == "throughput":
        return one.gpu_s_per_request
    parts = dict(one.pools[-1].parts_ms.get("decode", {}))
    parts["prefill stalls"] = max(one.tpot_ms - sum(parts.values()), 0.0)
    return parts


def reasons(search: Search, best: Deployment, other: Deployment | None, excess: Mapping[str, float], objective: str, slo: Slo | None) -> Iterable[str]:
    """Yield why the runner-up lost, and what memory and service levels cost."""
    unit = "device-seconds per request" if objective == "throughput" else "ms of TPOT"
    if other is not None:
        total = sum(excess.values())
        worst, gained = (choose(excess, key=lambda name: (excess[name], name)) for choose in (max, min))
        text = f"runner-up {other.label}: {other.output_tokens_per_s_per_gpu:.4g} against {best.output_tokens_per_s_per_gpu:.4g} output tokens/s/GPU, "
        text += f"TPOT {other.tpot_ms:.4g} against {best.tpot_ms:.4g} ms, TTFT {other.ttft_ms:.4g} against {best.ttft_ms:.4g} ms; "
        text += f"it spends {total:+.3g} {unit}"
        text += f", most of it on {KINDS.get(worst, worst)} ({excess[worst]:+.3g})" if excess[worst] > 0 else ""
        yield text + (f", and saves on {KINDS.get(gained, gained)} ({excess[gained]:+.3g})" if excess[gained] < 0 else "")
        for pool in other.pools:
            if pool.next_batch.startswith(("memory", "SLO")):
                yield f"runner-up's {pool.role} pool is held back by {pool.next_batch}"
    for pool in best.pools:
        if pool.next_batch:
            yield f"best's {pool.role} pool: {pool.next_batch}"
    free = min(range(len(search.front.items)), key=lambda index: rank(search.front.values_FD[index], objective))
    values = search.front.values_FD[free]
    if not meets(values[None], slo, search.workload.arrival_rps)[0]:
        name = label(search, search.front.items[free])
        per_gpu = -values[2] * search.workload.output_tokens / search.total
        yield f"without the service levels: {name} reaches {per_gpu:.4g} output tokens/s/GPU at TPOT {1e3 * values[0]:.4g} ms and TTFT {1e3 * values[1]:.4g} ms"


def least_missing(search: Search) -> tuple[float, str] | None:
    """Return the fewest bytes that any refused point lacks and which it is; best bound first, so that few are accounted exactly."""
    best: tuple[float, str] | None = None
    for floor, shape, role, index in sorted(search.tightest):
        if best is not None and floor >= best[0]:
            break
        points = search.points.points(shape, role)
        missing, stage = search.points.missing(shape, role, points.take(np.array([index])))
        group = shape.group
        if missing > 0 and (best is None or missing < best[0]):
            text = (
                f"tp {group.tp}, dp {group.dp}, ep {group.ep}, expert_tp {group.expert_tp}, pp {shape.pp}, {role} batch "
                f"{int(points.batch_N[index] or points.prompts_N[index])}: every device of stage {stage.stage} "
                f"(layers {stage.layers[0]}..{stage.layers[1] - 1}) needs {format_bytes(stage.used_bytes)} (weights {format_bytes(stage.weights_bytes)}, "
                f"KV {format_bytes(stage.kv_bytes)}, activations {format_bytes(stage.activation_bytes)}, "
                f"staging {format_bytes(stage.staging_bytes)}) of {format_bytes(stage.capacity_bytes)}"
            )
            best = missing, text
    return best
