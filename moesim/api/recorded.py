"""`--times trace`: a trace's kernel table and the maps it was recorded under become the times that drive a replay.

A capture writes every map that was in force into the manifest (`parallel.plans`, by epoch) and the epoch of every step into the steps table. A trace
that names no map is taken to be recorded under linear blocks; its recorded tokens are then checked against that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moesim.api.running import Replay, builder_of
from moesim.errors import InputError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.loads import LoadCompiler
from moesim.sim.ops import Program
from moesim.sim.recorded import RecordedTimes
from moesim.sim.replay import build_batch
from moesim.sim.settings import Settings
from moesim.traces.routing_trace import RoutingTrace

MAX_PLANS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Recorded times, and the maps that were in force."""

    times: RecordedTimes
    plan_of: dict[int, Plan]
    """Epoch → map."""
    assumed: bool
    """True if the trace names no map."""

    def attach(self, builder: ProgramBuilder) -> None:
        """Let the recorded times drive the Programs of `builder`."""
        self.times.references = {epoch: self._reference(builder, plan) for epoch, plan in self.plan_of.items()}
        builder.recorded = self.times

    def _reference(self, builder: ProgramBuilder, plan: Plan) -> Any:
        if _same_map(builder.plan, plan):
            return None
        under = builder_of(builder.cluster, builder.model, plan, builder.costs, builder.settings)
        compiler = LoadCompiler(plan, ranks_per_node=builder.cluster.devices_per_node)

        def reference(passes: Sequence[Pass]) -> tuple[Program, np.ndarray]:
            program, _, parts = build_batch(passes, builder=under, compiler=compiler)
            return program, parts[0].rank_load_PLR

        return reference

    def annotate(self, result: Replay) -> Replay:
        """Return the replay with what drove it in its report: `times`, and how tokens were dealt to ranks."""
        times = self.times
        at = times.rows_of(result.ledger.step)
        report = dict(result.report)
        report["routing"] = {**report["routing"], "sharding": "recorded"}
        report["times"] = {**times.report(), "map": "assumed linear" if self.assumed else "recorded", "maps": len(self.plan_of)}
        report["times"]["recorded_step_ms"] = {"mean": float(times.wall_s[at].mean() * 1e3), "p50": float(np.median(times.wall_s[at]) * 1e3)}
        return replace(result, report=report)


def recorded_times(routing: RoutingTrace, model: MoEModel, cluster: Cluster, settings: Settings, tokens_per_step: int | None, strict: bool) -> Recorded:
    """Read the recorded times of a trace; raises TraceError if it has none or they cannot drive this replay, InputError for options they exclude."""
    kernels = routing.tables("kernels") if routing.tables is not None and routing.kind == "tokens" else None
    if kernels is None:
        raise TraceError(f"{routing.source}: has no table of kernel times (kernels.parquet); record a trace with stage times, or replay without --times trace")
    if tokens_per_step is not None:
        raise InputError(describe("--times trace", "--tokens-per-step", tokens_per_step, "must not be given; recorded times belong to the recorded steps"))
    recorded_tp = (routing.facts.get("parallel") or {}).get("tp")
    for key, default in Settings().report().items():
        value = settings.report()[key]
        allowed = [default, recorded_tp] if key == "attention_tp" else [default]
        if value not in allowed and key not in ("host_overhead_us", "dispatch"):
            raise InputError(describe("--set", key, value, f"must be {default!r} with --times trace", "recorded times are those of whole, undisturbed passes"))
    ranks = _recorded_ranks(routing, kernels)
    if ranks != cluster.num_ranks and len(kernels["rank"]):
        raise TraceError(
            describe(
                f"{routing.source}: table kernels", "ranks", ranks, f"must equal the {cluster.num_ranks} devices of {cluster.name}",
                f"replay on hardware with {ranks} devices, or without --times trace",
            )
        )  # fmt: skip
    times = RecordedTimes.of(
        kernels, num_ranks=cluster.num_ranks, num_layers=model.num_layers, moe_layer_ids=model.moe_layer_ids, source=routing.source, strict=strict
    )
    plan_of = maps_of(routing, model, ranks)
    assumed = not plan_of
    if assumed:
        plan_of = {0: linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L, num_ranks=ranks)}
    else:
        times.epoch_S = epochs_of(routing, times.step_S)
        missing = sorted(set(times.epoch_S.tolist()) - set(plan_of))
        if missing:
            raise TraceError(f"{routing.source}: manifest: parallel.plans lacks the map of epoch {missing[0]}, in force in recorded steps; record it again")
    replicas = any(int(plan.replicas_LE.max()) > 1 for plan in plan_of.values())
    times.exact_tokens = not replicas and not routing.facts.get("dropped_rows") and not routing.facts.get("sampling")
    return Recorded(times=times, plan_of=plan_of, assumed=assumed)


def _recorded_ranks(routing: RoutingTrace, kernels: Any) -> int:
    most = int(np.max(kernels["rank"], initial=0)) + 1
    told = (routing.facts.get("parallel") or {}).get("ep")
    return max(most, told) if isinstance(told, int) and not isinstance(told, bool) and told <= 65536 else most


def maps_of(routing: RoutingTrace, model: MoEModel, ranks: int) -> dict[int, Plan]:
    node = (routing.facts.get("parallel") or {}).get("plans")
    place = f"{routing.source}: manifest: parallel.plans"
    if node is None:
        return {}
    if not isinstance(node, dict) or not 1 <= len(node) <= MAX_PLANS or not all(key.isdecimal() and len(key) < 10 for key in node):
        raise TraceError(describe(place, "keys", str(node)[:80], f"must be 1..{MAX_PLANS} epochs, each with a plan", "record the trace again"))
    result = {int(key): Plan.from_content(content, f"{place}[{key}]") for key, content in node.items()}
    for plan in result.values():
        plan.check_model(name=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L)
        if plan.num_ranks != ranks:
            raise TraceError(describe(plan.source, "num_ranks", plan.num_ranks, f"must equal the {ranks} recorded ranks", "record the trace again"))
    return result


def epochs_of(routing: RoutingTrace, step_S: np.ndarray) -> np.ndarray:
    """Return the epoch of every step, from the steps table; 0 without one."""
    table = None if routing.tables is None else routing.tables("steps")
    if table is None:
        return np.zeros(len(step_S), dtype=np.int64)
    step, first = np.unique(table["step"].astype(np.int64), return_index=True)
    at = np.minimum(np.searchsorted(step, step_S), len(step) - 1)
    missing = step_S[step[at] != step_S]
    if missing.size:
        raise TraceError(f"{routing.source}: table steps: lacks step {int(missing[0])}, which the kernel table has; record the trace again")
    return table["map_epoch"].astype(np.int64)[first][at]


def _same_map(left: Plan, right: Plan) -> bool:
    return left.map_sha256 == right.map_sha256 and np.array_equal(left.shares_LS(), right.shares_LS())
