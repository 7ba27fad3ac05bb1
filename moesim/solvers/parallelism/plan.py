"""Plans the parallelism of a model on a cluster: declared space in, the best deployment with its Pareto front, proof and reasons out."""

from __future__ import annotations

import numpy as np

from moesim.costs.group_loads import Placement
from moesim.errors import InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism import explain
from moesim.solvers.parallelism.loads import packed_placement
from moesim.solvers.parallelism.result import NoDeploymentError, ParallelismResult, Summary
from moesim.solvers.parallelism.search import Deadline, Search
from moesim.solvers.parallelism.space import Space, shapes, total_devices
from moesim.solvers.parallelism.step_time import CostsFactory, StepTimer
from moesim.solvers.parallelism.workload import Slo, Workload
from moesim.units import format_bytes


def plan_parallelism(
    model: MoEModel,
    cluster: Cluster,
    workload: Workload,
    slo: Slo | None,
    costs_factory: CostsFactory,
    *,
    space: Space | None = None,
    deadline: Deadline = None,
    objective: str = "throughput",
    placement: Placement = packed_placement,
    prune: bool = True,
) -> ParallelismResult:
    """Return the best way to split `model` over `cluster` for `workload`, and the Pareto front of TPOT, TTFT and throughput.

    costs_factory: `moesim.costs.CostModel`, or anything that makes `Costs` from (cluster, model). space: what may be chosen; None: `Space()`.
    deadline: returns the seconds left; None: no limit. objective: `throughput` (per device) or `latency` (TPOT, then TTFT), both within the service
    levels. placement: puts experts and copies into slots. prune: False measures every point that fits.
    Raises NoDeploymentError if nothing is feasible, InputError if an argument breaks a rule.
    """
    if objective not in explain.OBJECTIVES:
        raise InputError(describe("plan", "objective", objective, f"must be one of {', '.join(explain.OBJECTIVES)}"))
    chosen = space or Space()
    search = Search(model, cluster, workload, chosen, StepTimer(model, cluster, workload, costs_factory(cluster, model), placement), prune=prune)
    search.run(deadline)
    if not search.front.items:
        raise _nothing_fits(search)
    values, items = search.front.values_FD, search.front.items
    good = np.flatnonzero(explain.meets(values, slo, workload.arrival_rps)).tolist()
    if not good:
        raise _nothing_fast(search, slo)
    winner = min(good, key=lambda index: (explain.rank(values[index], objective), items[index]))
    best = explain.deployment(search, items[winner], values[winner], slo)
    second = explain.runner_up(search, items[winner], objective, slo)
    other = None if second is None else explain.deployment(search, second[0], second[1], slo)
    excess = {} if other is None else explain.lost_by(best, other, objective)
    search.counts.cost_calls = search.timer.calls
    return ParallelismResult(
        objective=objective,
        status="TIME_LIMIT" if search.timed_out else "OPTIMAL",
        best=best,
        runner_up=other,
        front=_front(search, slo),
        reasons=tuple(explain.reasons(search, best, other, excess, objective, slo)),
        lost_by=excess,
        counts=search.counts,
    )


def _front(search: Search, slo: Slo | None) -> tuple[Summary, ...]:
    values, items = search.front.values_FD, search.front.items
    good = explain.meets(values, slo, search.workload.arrival_rps)
    return tuple(
        Summary(
            label=explain.label(search, items[index]),
            ttft_ms=1e3 * float(values[index, 1]),
            tpot_ms=1e3 * float(values[index, 0]),
            output_tokens_per_s_per_gpu=-float(values[index, 2]) * search.workload.output_tokens / search.total,
            meets_slo=bool(good[index]),
        )
        for index in np.lexsort((values[:, 1], values[:, 0], values[:, 2])).tolist()
    )


def _nothing_fits(search: Search) -> NoDeploymentError:
    """Name the smallest violated requirement: bytes missing, or no consistent shape at all."""
    place = f"{search.model.name} on {search.total} devices of {search.cluster.name}"
    if search.timed_out:
        return NoDeploymentError(f"{place}: the deadline was over before any deployment was measured; give more time", requirement="deadline")
    if not search.tightest:
        raise InputError(
            f"{place}: space = {search.counts.shapes} consistent shapes, must hold a deployment of all {search.total} devices; degrees must satisfy tp*dp = "
            f"ep*expert_tp, divide {search.model.attention.num_heads} heads and the experts with redundancy, and fill or divide nodes; declare more degrees"
        )
    found = explain.least_missing(search)
    assert found is not None
    missing, where = found
    tier = search.cluster.memory
    needed = (missing + search.points.capacity) / search.space.memory_share
    more = _devices_that_fit(search)
    relaxation: dict[str, float] = {"device_memory_bytes": needed}
    remedy = f"devices with {format_bytes(needed)} in place of {format_bytes(tier.capacity_bytes)} would do"
    if more:
        relaxation["devices"] = more
        remedy = f"{more} such devices would do, or {remedy}"
    return NoDeploymentError(
        f"{place}: no deployment fits into memory; the nearest lacks {format_bytes(missing)} a device ({missing:.0f} bytes): {where}; {remedy}",
        requirement="memory",
        missing_bytes=missing,
        relaxation=relaxation,
    )


def _devices_that_fit(search: Search) -> int:
    """Return the fewest devices, of twice, four or up to 64 times as many, on which some mixed deployment fits; 0 if none does."""
    from dataclasses import replace

    for factor in (2, 4, 8, 16, 32, 64):
        cluster = replace(search.cluster, num_nodes=search.cluster.num_nodes * factor)
        space = replace(search.space, devices=search.total * factor)
        larger = Search(search.model, cluster, search.workload, space, search.timer)
        for shape in shapes(space, search.model, cluster):
            if total_devices(space, cluster) % shape.devices:
                continue
            points = larger.points.points(shape, "mixed")
            if len(points) and larger.points.fits(shape, "mixed", points).any():
                return larger.total
    return 0


def _nothing_fast(search: Search, slo: Slo | None) -> NoDeploymentError:
    """Name the requirement that is violated least by the deployment that comes nearest, and what each would have to be if the others stay."""
    values, arrival = search.front.values_FD, search.workload.arrival_rps
    limits: list[tuple[str, str, np.ndarray, float]] = []
    if slo is not None and slo.tpot_ms is not None:
        limits.append(("tpot_ms", "TPOT {:.4g} ms must be <= {:g} ms", values[:, 0] * 1e3, slo.tpot_ms))
    if slo is not None and slo.ttft_ms is not None:
        limits.append(("ttft_ms", "TTFT {:.4g} ms must be <= {:g} ms", values[:, 1] * 1e3, slo.ttft_ms))
    if arrival is not None:
        # As a limit on seconds per request, so that all requirements are of the kind "at most".
        limits.append(("arrival_rps", "{:.4g} requests/s must be >= {:g} requests/s", -1.0 / values[:, 2], 1.0 / arrival))
    excess = np.stack([measured / limit for _, _, measured, limit in limits], axis=1)
    nearest = int(excess.max(axis=1).argmin())
    broken = sorted(((float(excess[nearest, index]), index) for index in range(len(limits)) if excess[nearest, index] > 1.0), reverse=True)
    relaxation: dict[str, float] = {}
    for index, (name, _, measured, _) in enumerate(limits):
        others = [column for column in range(len(limits)) if column != index]
        open_F = (excess[:, others] <= 1.0).all(axis=1)
        if open_F.any():
            reached = float(measured[open_F].min())
            relaxation[name] = 1.0 / reached if name == "arrival_rps" else reached
    said = []
    for _, index in broken:
        name, text, measured, limit = limits[index]
        shown = (1.0 / measured[nearest], 1.0 / limit) if name == "arrival_rps" else (measured[nearest], limit)
        said.append(text.format(*shown))
    label = explain.label(search, search.front.items[nearest])
    remedy = " or ".join(f"{name} = {value:.6g}" for name, value in relaxation.items())
    if not relaxation:
        remedy = "relax several at once: " + ", ".join(
            f"{name} = {(1 / measured[nearest] if name == 'arrival_rps' else measured[nearest]):.6g}" for name, _, measured, _ in limits
        )
        relaxation = {name: float(1 / measured[nearest] if name == "arrival_rps" else measured[nearest]) for name, _, measured, _ in limits}
    return NoDeploymentError(
        f"{search.model.name} on {search.total} devices of {search.cluster.name}: no deployment meets the requirements; the nearest, {label}, misses: "
        f"{' and '.join(said)}; feasible: {remedy}",
        requirement="arrival" if limits[broken[0][1]][0] == "arrival_rps" else "slo",
        relaxation=relaxation,
    )
