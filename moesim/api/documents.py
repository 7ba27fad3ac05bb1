"""From names, paths or documents to documents that fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from moesim.errors import ModelError, describe
from moesim.hardware.cluster import Cluster
from moesim.hardware.load import load_cluster
from moesim.model.hf_config import load_model
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.traces.open import check_fits, open_trace
from moesim.traces.routing_trace import RoutingTrace, TraceShape


def trace_shape(model: MoEModel) -> TraceShape:
    """Return what a routing trace has to agree with to run on `model`."""
    if not model.moe_layer_ids:
        raise ModelError(f"{model.name}: has no MoE layers, so there is no routing to replay; name a model with experts")
    return TraceShape(
        model=model.name,
        num_experts=model.num_experts,
        top_k=model.top_k,
        moe_layer_ids=model.moe_layer_ids,
        num_groups=model.num_groups,
        top_k_groups=model.top_k_groups,
        experts_L=model.experts_L,
    )


def need_equal_layers(model: MoEModel, what: str) -> None:
    """Raise ModelError if the layers of a model have unequally many experts, which `what` does not understand."""
    if model.experts_L is not None:
        raise ModelError(describe(model.source or model.name, "experts per layer", list(model.experts_L), f"must be equal in all layers for {what}"))


def model_of(ref: str | MoEModel) -> MoEModel:
    """Return the model that a name or path stands for."""
    return ref if isinstance(ref, MoEModel) else load_model(ref)


def cluster_of(ref: str | Cluster) -> Cluster:
    """Return the cluster that a name or path stands for."""
    return ref if isinstance(ref, Cluster) else load_cluster(ref)


def trace_of(ref: str | RoutingTrace, model: MoEModel, seed: int, map_layers: str | None, *, any_top_k: bool = False) -> RoutingTrace:
    """Return the trace that a name, path or `synthetic:…` stands for, fitted to `model`."""
    shape = trace_shape(model)
    routing = ref if isinstance(ref, RoutingTrace) else open_trace(ref, shape=shape, seed=seed)
    return check_fits(routing, shape, map_layers, any_top_k=any_top_k)


def read_plan(ref: str | Path | Plan) -> Plan:
    """Return the plan that a path stands for."""
    return ref if isinstance(ref, Plan) else Plan.read(Path(ref))


def windows_of(routings: Sequence[RoutingTrace], objective: str) -> np.ndarray:
    """Return float64 [K, L, E]: one window per trace; a single trace under `robust` gives its own windows."""
    if len(routings) == 1 and objective == "robust":
        return _of_layers(routings[0], "step").astype(np.float64)
    return np.concatenate([_of_layers(routing, "all") for routing in routings]).astype(np.float64)


def _of_layers(routing: RoutingTrace, window: str) -> np.ndarray:
    """Return int64 [W, L, E]: counts per layer of the model, whose experts serve all rounds of their layer."""
    table = routing.counts_WLE(window)
    return table.reshape(len(table), -1, routing.rounds, routing.shape.num_experts).sum(axis=2)
