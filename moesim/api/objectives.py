"""What `solve` is asked for: the name of an objective and documents in, the objective with its data out.

The data are the decode batch (from the steps of the trace), the expert times of the cost model, and the tokens to plan traffic on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.costs.model import CostModel
from moesim.errors import InputError, TraceError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.affinity.plan import AffinityEvidence, gather_evidence, traffic_evidence
from moesim.solvers.affinity.result import HOPS, AffinityResult
from moesim.solvers.affinity.routes import TokenRoutes, read_routes, split_routes
from moesim.solvers.baselines import solve_linear
from moesim.solvers.objective import Decode, ExpertSeconds, Objective, parse_weights
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult
from moesim.traces.routing_trace import DECODE, DUMMY, RoutingTrace
from moesim.traces.transform import subset

UNITS = {
    "balance": "time of the slowest rank over a perfect spread, summed over layers",
    "activated": "experts that a batch activates on the slowest rank, summed over layers",
    "latency": "predicted seconds of dispatch, experts and combine on the slowest rank, summed over layers",
    "traffic": "ranks (and nodes, racks) that a token reaches in a layer; with copies of experts, other than its own",
    "hops": "share of transitions that leave the rank (and the node)",
}
CURVE_POINTS = 64
"""Loads at which the exchange is priced; between them it is interpolated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An objective with its data, and where they come from."""

    objective: Objective
    routings: list[RoutingTrace]
    """The traces, reduced to decode tokens where the objective is about them."""
    batch_tokens: int | None = None
    phase: str | None = None
    """Of the tokens planned for; None: as recorded."""
    unseen: TokenRoutes | None = None
    """Tokens held out from planning for traffic."""

    @property
    def unit(self) -> str:
        """Of the cost."""
        return UNITS[self.objective.alone] if self.objective.alone else "1 is the ideal of every term"

    def evidence(self, result: PlacementResult, problem: PlacementProblem, seed: int) -> AffinityEvidence | None:
        """Return what the placement is worth on tokens held out and on their null; None where traffic is no concern."""
        routes = self.objective.routes
        if routes is None or self.unseen is None:
            return None
        if isinstance(result, AffinityResult) and result.objective == HOPS:
            return gather_evidence(result, routes, self.unseen, num_ranks=problem.num_ranks, ranks_per_node=problem.ranks_per_node, seed=seed)
        plain = solve_linear(problem, seed=seed).slot_to_expert_LS
        return traffic_evidence(result.slot_to_expert_LS, plain, problem.slot_rank_S, problem.levels, routes, self.unseen, seed=seed)


def asked_for(text: str, routings: list[RoutingTrace], *, model: MoEModel, cluster: Cluster, batch: int | None, seed: int) -> Asked:
    """Return the objective that `text` names with what it needs.

    batch: decode tokens per step over all ranks; None takes the mean of the trace's steps. Raises InputError if the objective is unknown,
    TraceError if the traces lack the tokens or the steps that it needs.
    """
    terms = {name for name, _ in parse_weights(text)}
    decode, seconds, phase, seen, unseen = None, None, None, None, None
    if batch is not None and batch < 1:
        raise InputError(describe("solve", "batch", batch, "must be >= 1 tokens per step"))
    if {"activated", "latency"} & terms:
        tokens, phase = _steps_of(routings[0])
        if phase == "decode":
            routings = [subset(item, phases=["decode"]) if item.kind == "tokens" else item for item in routings]
        tokens = batch or tokens
        if tokens is None or ("activated" in terms and phase != "decode" and batch is None):
            remedy = "give --batch, or a trace with decode steps"
            raise TraceError(f"{routings[0].source}: holds no decode steps, so the tokens of a step are not known for {text!r}; {remedy}")
        decode = Decode(tokens=tokens, top_k=model.top_k)
        if "latency" in terms:
            seconds = expected_seconds(CostModel(cluster, model), decode, low_latency=phase == "decode")
    if {"traffic", "hops"} & terms:
        if len(routings) > 1:
            raise InputError(f"solve: objective {text!r} takes one trace; it counts what the tokens of that trace reach")
        if routings[0].kind != "tokens":
            raise TraceError(f"{routings[0].source}: holds counts only; objective {text!r} needs the choices of every token")
        seen, unseen = split_routes(read_routes(routings[0]), seed=seed)
    # what leaves a leaf takes so many times as long as what stays behind it
    rack_weight = cluster.fabric_oversubscription - 1.0
    objective = Objective.parse(text, decode=decode, expert_seconds=seconds, routes=seen, rack_weight=rack_weight)
    return Asked(objective=objective, routings=routings, batch_tokens=None if decode is None else decode.tokens, phase=phase, unseen=unseen)


def _steps_of(trace: RoutingTrace) -> tuple[int | None, str | None]:
    """Return the mean tokens of a decode step, or of any step where there is none, and which of the two; None where steps are not known."""
    if trace.kind != "tokens":
        return None, None
    every: dict[int, int] = {}
    decode: dict[int, int] = {}
    for batch in trace.batches():
        for kept, steps in ((batch.phase_T != DUMMY, every), (batch.phase_T == DECODE, decode)):
            for step, count in zip(*np.unique(batch.step_T[kept], return_counts=True), strict=True):
                steps[int(step)] = steps.get(int(step), 0) + int(count)
    steps = decode or every
    return (max(1, round(sum(steps.values()) / len(steps))) if steps else None), "decode" if decode else "prefill"


def expected_seconds(costs: CostModel, decode: Decode, *, low_latency: bool) -> ExpertSeconds:
    """Return the predicted time of every rank from the expected tokens of its slots: its experts, and its end of dispatch and combine.

    A batch activates about Σ a slots of a rank; the busiest so many are given all of its tokens, and the time is interpolated between the
    whole numbers around Σ a, because the cost model knows whole slots and whole tokens only. low_latency: the exchange of decode.
    """
    arrivals, ends_s = _exchange_curve(costs, decode, low_latency)

    def seconds(tokens_LRC: np.ndarray, mask_LRC: np.ndarray) -> np.ndarray:
        tokens = np.where(mask_LRC, tokens_LRC, 0.0)
        active_LR = decode.active(np.minimum(tokens / decode.tokens, 1.0)).sum(axis=2)
        # tokens that are not there sort behind slots that are empty
        order = np.argsort(np.where(mask_LRC, -tokens, 1.0), axis=2, kind="stable")
        tokens, mask = np.take_along_axis(tokens, order, axis=2), np.take_along_axis(np.broadcast_to(mask_LRC, tokens.shape), order, axis=2)
        total, sums = tokens.sum(axis=2), np.cumsum(tokens, axis=2)
        some = (tokens > 0).sum(axis=2)
        low = np.minimum(np.floor(active_LR), some).astype(np.int64)
        times = []
        for count in (low, np.minimum(low + 1, some)):
            held = np.take_along_axis(sums, np.maximum(count - 1, 0)[..., None], axis=2)[..., 0]
            stretch = np.divide(total, held, out=np.zeros_like(total), where=(held > 0) & (count > 0))
            part = np.where(np.arange(tokens.shape[2]) < count[..., None], tokens * stretch[..., None], 0.0)
            times.append(costs.experts(part, slot_mask=mask).seconds)
        experts = times[0] + np.clip(active_LR - low, 0.0, 1.0) * (times[1] - times[0])
        return np.asarray(experts + np.interp(total, arrivals, ends_s))

    return seconds


def _exchange_curve(costs: CostModel, decode: Decode, low_latency: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return assignments that arrive at a rank and the seconds to receive them and to send the answers, if all sources send alike."""
    ranks, top_k = costs.cluster.num_ranks, decode.top_k
    nodes = max(1, ranks // costs.cluster.devices_per_node)
    arrivals = np.concatenate(([0.0], np.geomspace(1.0, decode.tokens * top_k + 1.0, CURVE_POINTS)))
    own = arrivals[:, None, None] / ranks
    if low_latency:
        copies = costs.copies("low_latency", assign_RR=np.broadcast_to(own, (len(arrivals), ranks, ranks)))
        algorithm = "low_latency"
    else:
        # a token goes once to every rank and node that holds some of its choices
        tokens = own * ranks / top_k
        copies = costs.copies(
            "normal",
            copy_RR=np.broadcast_to(tokens * (1 - (1 - 1 / ranks) ** top_k), (len(arrivals), ranks, ranks)),
            node_RN=np.broadcast_to(tokens * (1 - (1 - 1 / nodes) ** top_k), (len(arrivals), ranks, nodes)),
        )
        algorithm = "normal"
    ends = costs.exchange(algorithm, "dispatch", copies=copies).recv_s + costs.exchange(algorithm, "combine", copies=copies).send_s
    return arrivals, np.maximum.accumulate(ends.max(axis=1))
