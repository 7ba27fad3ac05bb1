"""`trace_statistics`: what in a trace explains a plan – skew, drift, affinity beside its null, and what redundant slots can buy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, need_equal_layers, trace_shape
from moesim.errors import InputError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.affinity.routes import read_routes
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve
from moesim.solvers.statistics import AffinityStatistics, Drift, LoadCurves, SlotValue, coactivation, drift, inter_layer_affinity, load_curves, slot_value
from moesim.traces.open import check_fits, open_trace
from moesim.traces.routing_trace import RoutingTrace

MAX_WINDOWS = 8
"""Windows that the steps of a trace are merged into."""
MAX_TOKENS = 20_000
"""Tokens that affinity is measured on; 5,000 are enough for profiles to stop over-fitting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceStatistics:
    """The statistics of a trace, with arrays for figures."""

    report: dict[str, Any]
    curves: LoadCurves
    drift: Drift | None
    """None for a single window."""
    inter_layer: AffinityStatistics | None
    """None for a trace of counts, or of one layer."""
    coactivation: AffinityStatistics | None
    """None for a trace of counts, or top-1 routing."""
    slots: SlotValue | None
    """None where no hardware is given."""
    reached_N: np.ndarray | None
    """float64 [N]: balance that the planner reaches with so many extra slots."""

    def write(self, folder: Path) -> list[Path]:
        """Write stats.json, tables and figures to `folder`; return their paths."""
        from moesim.report.stats import write_statistics

        return write_statistics(
            self.report,
            folder,
            curves=self.curves,
            drift=self.drift,
            inter_layer=self.inter_layer,
            coactivation=self.coactivation,
            slots=self.slots,
            reached_N=self.reached_N,
        )


def trace_statistics(
    traces: str | RoutingTrace | Sequence[str | RoutingTrace],
    *,
    model: str | MoEModel,
    hardware: str | Cluster | None = None,
    max_tokens: int = MAX_TOKENS,
    map_layers: str | None = None,
    seed: int = 0,
) -> TraceStatistics:
    """Measure one trace, or several as windows.

    hardware: its devices are the ranks that plans are made for; None leaves out what needs ranks. max_tokens: sample for affinity.
    Raises InputError if a document breaks a rule or they do not fit each other.
    """
    listed = [traces] if isinstance(traces, (str, RoutingTrace)) else list(traces)
    if not listed:
        raise InputError("trace stats: no trace given; name at least one")
    if max_tokens < 1:
        raise InputError(describe("trace stats", "max_tokens", max_tokens, "must be >= 1"))
    moe_model = model_of(model)
    need_equal_layers(moe_model, "trace statistics")
    ranks = None if hardware is None else cluster_of(hardware).num_ranks
    routings = [_opened(item, moe_model, map_layers, seed) for item in listed]
    if len({item.shape.moe_layer_ids for item in routings}) > 1:
        raise TraceError("trace stats: the traces are of different layers; give --map-layers, or one at a time")
    names, load_KLE = _windows(routings)
    layer_ids = routings[0].shape.moe_layer_ids
    total = load_KLE.sum(axis=0)
    curves = load_curves(total)
    moved = drift(load_KLE, planner=None if ranks is None else _planner(ranks), names=names) if len(load_KLE) > 1 else None
    hops = company = None
    if routings[0].kind == "tokens":
        routes = read_routes(routings[0], max_tokens=max_tokens)
        hops = inter_layer_affinity(routes, seed=seed) if routes.num_layers > 1 else None
        company = coactivation(routes, seed=seed) if routes.experts_TLK.shape[2] > 1 else None
    value = reached = None
    if ranks is not None:
        value = slot_value(total, num_ranks=ranks)
        reached = np.array([_plan(total, ranks, int(extra)).value for extra in value.extra_N])
    report = {
        "schema": "moesim.trace-stats/1",
        "traces": [item.source for item in routings],
        "model": moe_model.name,
        "kind": routings[0].kind,
        "synthetic": any(item.is_synthetic for item in routings),
        "num_experts": moe_model.num_experts,
        "top_k": moe_model.top_k,
        "moe_layer_ids": list(layer_ids),
        "ranks": ranks,
        "tokens": float(total.sum() / (len(total) * moe_model.top_k)),
        "load": {
            "max_over_mean": float(curves.max_over_mean_L.mean()),
            "cv": float(curves.cv_L.mean()),
            "gini": float(curves.gini_L.mean()),
            "layers": [{**row, "layer": layer_ids[index]} for index, row in enumerate(curves.rows())],
            "unused_experts": int((total == 0).sum()),
        },
        "drift": None
        if moved is None
        else {
            "windows": list(moved.names),
            "l1": moved.l1_KK.tolist(),
            "cosine": moved.cosine_KK.tolist(),
            "transfer": None if moved.transfer_KK is None else moved.transfer_KK.tolist(),
            "transfer_loss": None if moved.transfer_KK is None else moved.transfer_loss,
        },
        "affinity": _dependence(hops),
        "coactivation": _dependence(company),
        "redundancy": None
        if value is None or reached is None
        else [{**row, "balance_reached": float(one)} for row, one in zip(value.rows(), reached, strict=True)],
    }
    return TraceStatistics(report=report, curves=curves, drift=moved, inter_layer=hops, coactivation=company, slots=value, reached_N=reached)


def _opened(ref: str | RoutingTrace, model: MoEModel, map_layers: str | None, seed: int) -> RoutingTrace:
    """Return a trace of some layers of the model, or of all of them if `map_layers` says which stand for which."""
    shape = trace_shape(model)
    routing = ref if isinstance(ref, RoutingTrace) else open_trace(ref, shape=shape, seed=seed)
    inside = set(routing.shape.moe_layer_ids) <= set(shape.moe_layer_ids) and map_layers is None
    return check_fits(routing, replace(shape, moe_layer_ids=routing.shape.moe_layer_ids) if inside else shape, map_layers)


def _windows(routings: Sequence[RoutingTrace]) -> tuple[tuple[str, ...], np.ndarray]:
    """Return names and loads [K, L, E]: one window per trace, or up to `MAX_WINDOWS` of a single one."""
    if len(routings) > 1:
        return tuple(Path(item.source).name for item in routings), np.stack([item.counts_WLE("all")[0] for item in routings]).astype(np.float64)
    only = routings[0]
    if only.kind == "counts":
        steps = len(only.stored_windows)
    else:
        groups = [] if only.tokens is None else list(only.tokens.groups)
        steps = max((group.step_max for group in groups), default=0) - min((group.step_min for group in groups), default=0) + 1
    names, counts = only.windows(-(-steps // MAX_WINDOWS))
    return names, counts.astype(np.float64)


def _plan(load_LE: np.ndarray, ranks: int, extra: int) -> Any:
    slots = np.bincount(np.arange(load_LE.shape[1] + extra) % ranks, minlength=ranks)
    return solve(PlacementProblem(load_KLE=load_LE, num_ranks=ranks, slots_per_rank_R=slots), "greedy", options={"restarts": 0})


def _planner(ranks: int) -> Any:
    """Return a planner with one slot per expert, dealt as evenly as they go."""

    def planner(load_LE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slots = np.sort(np.arange(load_LE.shape[1]) % ranks)
        return _plan(load_LE, ranks, 0).slot_to_expert_LS, slots

    return planner


def _dependence(found: AffinityStatistics | None) -> dict[str, Any] | None:
    if found is None:
        return None
    means = (found.information_n, found.null_information_n, found.top_share_n, found.null_top_share_n)
    names = ("information_bits", "null_information_bits", "top_share", "null_top_share")
    return {**{name: float(column.mean()) for name, column in zip(names, means, strict=True)}, "rows": found.rows()}
