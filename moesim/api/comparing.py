"""`compare`: what was predicted for a plan beside what was measured under it – rank loads, bytes, step times, with signed errors.

The prediction knows the routing of the steps before the plan was in force (those of another map in the trace, or of another trace), as a planner does; where
there are none, it knows that of the measured steps themselves, and the report says so. Measured is what the ranks counted and timed (the trace's kernel and
step tables); without counts, loads follow from routes and recorded map. Loads and bytes are per token, because the two sets of steps differ in size.
A signed error is (predicted − measured) / measured. Shapes: S steps, L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.documents import cluster_of, model_of, read_plan, trace_of
from moesim.api.recorded import epochs_of, maps_of
from moesim.api.replaying import replay
from moesim.balance import balance_of
from moesim.errors import InputError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan
from moesim.sim.recorded import OPS
from moesim.traces.manifest import STAGES
from moesim.traces.routing_trace import DECODE, DUMMY, BatchSource, GroupInfo, RoutingTrace, TokenBatch

SCHEMA = "moesim.compare/1"
RUNTIME = {"dispatch": "low_latency"}
"""How moesim's own runtime exchanges: one row per (token, expert)."""


class SelectedSteps:
    """The rows of another source that belong to some of its steps."""

    def __init__(self, base: BatchSource, steps: np.ndarray) -> None:
        self._base, self._steps, self._at = base, steps, list[int]()
        groups = []
        for index in range(len(base.groups)):
            batch = self._chosen(index)
            if len(batch):
                self._at.append(index)
                groups.append(GroupInfo(rows=len(batch), step_min=int(batch.step_T.min()), step_max=int(batch.step_T.max())))
        self.groups: list[GroupInfo] = groups

    def _chosen(self, index: int) -> TokenBatch:
        batch = self._base.read(index)
        return batch.take(np.isin(batch.step_T, self._steps))

    def read(self, index: int) -> TokenBatch:
        """Return the rows of one unit."""
        return self._chosen(self._at[index])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Steps:
    """Which steps of a trace were served under which map."""

    step_S: np.ndarray
    epoch_S: np.ndarray
    plan_of: dict[int, Plan]

    def under(self, plan: Plan) -> np.ndarray:
        """Return the steps under the same map as `plan`."""
        same = [epoch for epoch, other in self.plan_of.items() if _same(other, plan)]
        return self.step_S[np.isin(self.epoch_S, same)]


def compare(
    trace: str | RoutingTrace,
    *,
    model: str | MoEModel,
    hardware: str | Cluster,
    plan: str | Path | Plan | None = None,
    after: str | RoutingTrace | None = None,
    times: str = "model",
    settings: Mapping[str, str] | None = None,
    strict: bool = False,
) -> dict[str, Any]:
    """Return prediction and measurement side by side, schema moesim.compare/1.

    trace: a recorded run. plan: the plan in question (default: the map that was in force last). after: a second recording, under the plan; without one, the
    steps of `trace` under the plan are measured. times: `model`, or `trace` to rescale the durations recorded before. settings: as in `replay`; a trace of
    moesim's runtime is replayed with the runtime's dispatch unless told otherwise. Raises InputError if no step was served under the plan.
    """
    moe_model, cluster = model_of(model), cluster_of(hardware)
    before = trace_of(trace, moe_model, 0, None)
    measured = before if after is None else trace_of(after, moe_model, 0, None)
    known = _steps_of(measured, moe_model)
    chosen = known.plan_of[int(known.epoch_S[-1])] if plan is None else read_plan(plan)
    under = known.under(chosen)
    if not len(under):
        rule = f"is the map of none of the {len(known.plan_of)} epochs of {measured.source}"
        raise InputError(describe("compare", "--plan", chosen.source, rule, "apply the plan first, or give the trace recorded under it as --after"))
    basis, basis_steps = "other trace", None
    if after is None:
        earlier = known.step_S[~np.isin(known.step_S, under) & (known.step_S < under.max())]
        basis, basis_steps = ("steps before", earlier) if len(earlier) else ("same steps", under)
    routes = before if basis_steps is None else _only(before, basis_steps)
    ours = str(before.provenance.get("tool", "")).startswith("moesim")
    execution = {**(RUNTIME if ours else {}), **(settings or {})}
    run = replay(routes, model=moe_model, hardware=cluster, plan=chosen, times=times, settings=execution, strict=strict, as_recorded=True)
    shown = _only(measured, under)
    tokens, prefill_steps, counted_LR = _counted(shown, chosen)
    kernels = _kernels(measured, under)
    load_LR, loads_from = counted_LR, "routes and recorded map"
    if kernels is not None:
        rows_LR = _expert_rows(kernels, moe_model, chosen.num_ranks)
        if rows_LR.any():
            load_LR, loads_from = rows_LR, "counts of the ranks"
    predicted_tokens = int(run.report["tokens"])
    wall_S = _walls(measured, kernels, under)
    is_prefill_P = np.isin(np.asarray(run.ledger.step), _prefill_steps(routes))
    report: dict[str, Any] = {
        "schema": SCHEMA, "plan": chosen.source, "map_sha256": chosen.map_sha256, "hardware": cluster.name, "times": times, "settings": execution,
        "basis": basis, "steps": {"predicted": int(run.report["steps"]), "measured": len(under)},
        "tokens": {"predicted": predicted_tokens, "measured": tokens},
        "rank_load": loads_beside(run.ledger.load_LR, load_LR, predicted_tokens, tokens, moe_model),
        "step_ms": step_times_beside(np.asarray(run.ledger.duration_s) * 1e3, is_prefill_P, wall_S * 1e3, np.isin(under, prefill_steps)),
        "bytes_per_token": _bytes(run.report["bytes"], predicted_tokens, kernels, tokens),
        "stages_ms": _stages(run.ledger.total_s, int(run.report["steps"]), kernels, len(under), chosen.num_ranks), "provenance": run.report["provenance"],
    }  # fmt: skip
    report["rank_load"]["measured_from"] = loads_from
    return report


# --- what was measured ------------------------------------------------------------------------------------------------


def _steps_of(trace: RoutingTrace, model: MoEModel) -> _Steps:
    table = None if trace.tables is None else trace.tables("steps")
    if table is None or not len(table["step"]):
        raise TraceError(f"{trace.source}: has no table of steps (steps.parquet), so nothing was timed; record it with serve-demo --trace-out")
    step_S = np.unique(table["step"].astype(np.int64))
    ranks = int(table["rank"].max()) + 1
    plan_of = maps_of(trace, model, ranks)
    if not plan_of:
        raise TraceError(f"{trace.source}: manifest: parallel.plans is missing, so the map in force is unknown; record it with moesim")
    epoch_S = epochs_of(trace, step_S)
    unknown = sorted(set(epoch_S.tolist()) - set(plan_of))
    if unknown:
        raise TraceError(f"{trace.source}: manifest: parallel.plans lacks the map of epoch {unknown[0]}; record it again")
    return _Steps(step_S=step_S, epoch_S=epoch_S, plan_of=plan_of)


def _only(trace: RoutingTrace, steps: np.ndarray) -> RoutingTrace:
    if trace.tokens is None:
        raise TraceError(f"{trace.source}: holds counts, not tokens; nothing in it was measured")
    source = SelectedSteps(trace.tokens, steps)
    return replace(trace, tokens=source, num_rows=sum(group.rows for group in source.groups))


def _counted(trace: RoutingTrace, plan: Plan) -> tuple[int, np.ndarray, np.ndarray]:
    """Return tokens, the steps with prompt tokens, and float64 [L, R]: the loads that routes and map give."""
    tokens, prefill = 0, set[int]()
    load_LE = np.zeros((trace.shape.num_layers, trace.shape.num_experts))
    for batch in trace.batches():
        real = batch.phase_T != DUMMY
        tokens += int(real.sum())
        prefill |= set(np.unique(batch.step_T[real & (batch.phase_T != DECODE)]).tolist())
        for row in range(load_LE.shape[0]):
            ids = batch.experts_TLK[real, row]
            ids = ids if batch.valid_TLK is None else ids[batch.valid_TLK[real, row]]
            load_LE[row] += np.bincount(ids.ravel(), minlength=load_LE.shape[1])
    return tokens, np.array(sorted(prefill), dtype=np.int64), plan.rank_load_LR(load_LE)


def _prefill_steps(trace: RoutingTrace) -> np.ndarray:
    found = [np.unique(batch.step_T[(batch.phase_T != DECODE) & (batch.phase_T != DUMMY)]) for batch in trace.batches()]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, dtype=np.int64)


def _kernels(trace: RoutingTrace, steps: np.ndarray) -> dict[str, np.ndarray] | None:
    """Return the kernel rows of `steps`; None unless every step has some."""
    table = None if trace.tables is None else trace.tables("kernels")
    if table is None:
        return None
    mine = np.isin(table["step"], steps)
    if len(np.unique(table["step"][mine])) != len(steps):
        return None
    return {name: np.asarray(values[mine]) for name, values in table.items()}


def _expert_rows(kernels: Mapping[str, np.ndarray], model: MoEModel, ranks: int) -> np.ndarray:
    load_LR = np.zeros((len(model.moe_layer_ids), ranks))
    mine = kernels["stage"] == STAGES.index("experts")
    row = np.searchsorted(np.array(model.moe_layer_ids), kernels["layer"][mine])
    np.add.at(load_LR, (row, kernels["rank"][mine]), kernels["tokens"][mine])
    return load_LR


def _walls(trace: RoutingTrace, kernels: Mapping[str, np.ndarray] | None, steps: np.ndarray) -> np.ndarray:
    """Return float64 [S]: seconds of every step on the rank that took longest; of its stages where they were timed, so that pauses do not count."""
    table: Mapping[str, np.ndarray]
    if kernels is not None:
        table, begin, end = kernels, kernels["t_ns"], kernels["t_ns"] + kernels["dur_ns"]
    else:
        assert trace.tables is not None
        found = trace.tables("steps")
        assert found is not None
        table, begin, end = found, found["t_start_ns"], found["t_end_ns"]
    mine = np.isin(table["step"], steps)
    at = np.searchsorted(steps, table["step"][mine].astype(np.int64))
    ranks = int(table["rank"].max()) + 1
    low, high = np.full((len(steps), ranks), np.iinfo(np.int64).max), np.full((len(steps), ranks), np.iinfo(np.int64).min)
    np.minimum.at(low, (at, table["rank"][mine]), begin[mine])
    np.maximum.at(high, (at, table["rank"][mine]), end[mine])
    return np.asarray(np.where(high >= low, high.astype(np.float64) - low.astype(np.float64), 0.0).max(axis=1) * 1e-9)


# --- side by side -----------------------------------------------------------------------------------------------------


def beside(predicted: float, measured: float | None) -> dict[str, float | None]:
    """Return a predicted and a measured figure with the signed error."""
    error = (predicted - measured) / measured if measured else None
    return {"predicted": predicted, "measured": measured, "error": error}


def loads_beside(predicted_LR: np.ndarray, measured_LR: np.ndarray, predicted_tokens: int, tokens: int, model: MoEModel) -> dict[str, Any]:
    """Return the loads of the ranks per token, both ways, layer by layer."""
    guess_LR, seen_LR = predicted_LR / max(predicted_tokens, 1), measured_LR / max(tokens, 1)
    even_L1 = np.maximum(seen_LR.mean(axis=1, keepdims=True), 1e-300)
    error_LR = (guess_LR - seen_LR) / even_L1
    layers = []
    for row, layer in enumerate(model.moe_layer_ids):
        most = beside(float(guess_LR[row].max()), float(seen_LR[row].max()))
        layers.append({"layer": layer, "busiest": most, "predicted_R": guess_LR[row].tolist(), "measured_R": seen_LR[row].tolist()})
    return {
        "unit": "(token, expert) pairs per token of the step", "layers": layers, "mean_abs_error": float(np.abs(error_LR).mean()),
        "worst_error": float(error_LR.ravel()[np.abs(error_LR).argmax()]),
        "balance": beside(balance_of(predicted_LR).mean_over_max, balance_of(measured_LR).mean_over_max),
    }  # fmt: skip


def step_times_beside(predicted_P: np.ndarray, prefill_P: np.ndarray, measured_S: np.ndarray, prefill_S: np.ndarray) -> dict[str, Any]:
    """Return mean, median and 95th percentile of step times (ms), both ways, by phase."""
    figures: dict[str, Callable[[np.ndarray], float]] = {
        "mean": lambda values: float(values.mean()),
        "p50": lambda values: float(np.percentile(values, 50)),
        "p95": lambda values: float(np.percentile(values, 95)),
    }
    result: dict[str, Any] = {}
    for name, mine, seen in (("all", predicted_P >= 0, measured_S >= 0), ("prefill", prefill_P, prefill_S), ("decode", ~prefill_P, ~prefill_S)):
        if mine.any() and seen.any():
            result[name] = {key: beside(of(predicted_P[mine]), of(measured_S[seen])) for key, of in figures.items()}
    return result


def _bytes(predicted: Mapping[str, Any], predicted_tokens: int, kernels: Mapping[str, np.ndarray] | None, tokens: int) -> dict[str, float | None]:
    """Return the bytes of dispatch and combine that leave a rank, per token."""
    sent = float(predicted["intra_node"] + predicted["inter_node"]) / max(predicted_tokens, 1)
    return beside(sent, None if kernels is None else float(kernels["bytes"].sum()) / max(tokens, 1))


def _stages(total_s: Mapping[str, float], predicted_steps: int, kernels: Mapping[str, np.ndarray] | None, steps: int, ranks: int) -> dict[str, Any]:
    """Return ms per step and rank by stage; waiting for other ranks is in the measured exchanges."""
    found: dict[str, float] = {}
    for label, seconds in total_s.items():
        name = OPS.get(label, label)
        found[name] = found.get(name, 0.0) + seconds * 1e3 / max(predicted_steps, 1)
    if kernels is None:
        return {name: beside(value, None) for name, value in found.items()}
    seen = np.bincount(kernels["stage"], weights=kernels["dur_ns"] * 1e-6, minlength=len(STAGES)) / steps / ranks
    names = [name for name in STAGES if name in found or seen[STAGES.index(name)]]
    return {name: beside(found.get(name, 0.0), float(seen[STAGES.index(name)])) for name in names}


def _same(left: Plan, right: Plan) -> bool:
    return left.map_sha256 == right.map_sha256 and np.array_equal(left.shares_LS(), right.shares_LS())
