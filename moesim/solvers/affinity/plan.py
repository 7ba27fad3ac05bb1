"""Plan for affinity on one part of a trace and say what it is worth on the other, beside its null.

The evidence has three columns for the plan and for the contiguous placement: the tokens planned on, tokens held out, and
the held-out tokens with the affinity shuffled away (`null`). A gain that the null shows too is not affinity; one that
only the first column shows is chance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.affinity.fanout import FanoutProblem, solve_fanout
from moesim.solvers.affinity.null import shuffle_choices, shuffle_layers
from moesim.solvers.affinity.problem import AffinityProblem
from moesim.solvers.affinity.replicas import Levels, remote_L
from moesim.solvers.affinity.result import APPLIES_TO, FANOUT, HOPS, AffinityResult, contiguous_LE, group_of
from moesim.solvers.affinity.routes import MAX_TOKENS, TokenRoutes, read_routes, split_routes
from moesim.solvers.affinity.scores import distinct_L, score_fanout, score_hops
from moesim.solvers.affinity.solve import solve_hops
from moesim.solvers.affinity.transitions import count_transitions
from moesim.solvers.search import Deadline
from moesim.traces.routing_trace import RoutingTrace

OBJECTIVES = (HOPS, FANOUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvidenceRow:
    """One placement's cost on three sets of tokens; smaller is better."""

    placement: str
    """`contiguous` or `plan`."""
    in_sample: float
    """On the tokens planned on."""
    held_out: float
    """On tokens that the planner never saw."""
    null: float
    """On the held-out tokens without affinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityEvidence:
    """What a placement is worth, and how much of it is affinity."""

    objective: str
    unit: str
    """What the costs count."""
    applies_to: str
    """The execution whose traffic this is."""
    tokens_in_sample: int
    tokens_held_out: int
    contiguous: EvidenceRow
    plan: EvidenceRow

    @property
    def gain_in_sample(self) -> float:
        """Cost saved against contiguous on the tokens planned on."""
        return self.contiguous.in_sample - self.plan.in_sample

    @property
    def gain_held_out(self) -> float:
        """Cost saved against contiguous on unseen tokens."""
        return self.contiguous.held_out - self.plan.held_out

    @property
    def gain_null(self) -> float:
        """Cost saved against contiguous without affinity: the part that skewed loads alone give."""
        return self.contiguous.null - self.plan.null

    @property
    def gain_from_affinity(self) -> float:
        """Gain on unseen tokens beyond that of the null."""
        return self.gain_held_out - self.gain_null

    def as_dict(self) -> dict[str, object]:
        """Return plain values for JSON, gains included."""
        return {**asdict(self), "gain_held_out": self.gain_held_out, "gain_null": self.gain_null}

    def rows(self) -> list[dict[str, object]]:
        """Return the table: one row per placement and one for the gain."""
        table: list[dict[str, object]] = [
            {"placement": row.placement, "in_sample": row.in_sample, "held_out": row.held_out, "null": row.null} for row in (self.contiguous, self.plan)
        ]
        return [*table, {"placement": "gain", "in_sample": self.gain_in_sample, "held_out": self.gain_held_out, "null": self.gain_null}]


@dataclass(frozen=True, slots=True, kw_only=True)
class AffinityPlan:
    """A placement and the evidence for it."""

    result: AffinityResult
    evidence: AffinityEvidence


def plan_affinity(
    trace: RoutingTrace | TokenRoutes,
    *,
    num_ranks: int,
    ranks_per_node: int = 0,
    objective: str = HOPS,
    pairs: str = "all",
    node_weight: float = 1.0,
    load_slack: float | None = None,
    method: str = "auto",
    restarts: int | None = None,
    plan_share: float = 0.5,
    split_by: str = "request",
    max_tokens: int = MAX_TOKENS,
    seed: int = 0,
    deadline: Deadline = None,
) -> AffinityPlan:
    """Plan on a share of the tokens and score on the rest.

    objective: `inter_layer_hops` or `token_fanout`. pairs: of transitions, `all` or `top1`. node_weight: cost of leaving the node on top
    of leaving the rank. load_slack: how much busier than in a balanced plan the busiest rank may be; None: no limit.
    Raises InputError if the objective is unknown or the ranks do not divide the experts, TraceError if the trace has no tokens.
    """
    if objective not in OBJECTIVES:
        raise InputError(describe("affinity", "objective", objective, f"must be one of {', '.join(OBJECTIVES)}"))
    routes = trace if isinstance(trace, TokenRoutes) else read_routes(trace, max_tokens=max_tokens)
    seen, unseen = split_routes(routes, share=plan_share, by=split_by, seed=seed)
    if objective == HOPS:
        counts = count_transitions(seen, pairs)
        problem = AffinityProblem(
            transitions_LEE=counts.transitions_LEE,
            load_LE=counts.load_LE,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            node_weight=node_weight,
            load_slack=load_slack,
        )
        result = solve_hops(problem, method=method, seed=seed, restarts=restarts, deadline=deadline)
    else:
        fanout = FanoutProblem(routes=seen, num_ranks=num_ranks, ranks_per_node=ranks_per_node, node_weight=node_weight, load_slack=load_slack)
        result = solve_fanout(fanout, method="co-activation" if method == "auto" else method, deadline=deadline)
    evidence = gather_evidence(
        result, seen, unseen, num_ranks=num_ranks, ranks_per_node=ranks_per_node or num_ranks, pairs=pairs, node_weight=node_weight, seed=seed
    )
    return AffinityPlan(result=result, evidence=evidence)


def traffic_evidence(
    table_LS: np.ndarray, plain_LS: np.ndarray, slot_rank_S: np.ndarray, levels: Levels, seen: TokenRoutes, unseen: TokenRoutes, *, seed: int = 0
) -> AffinityEvidence:
    """Score a placement with copies, or over racks, beside a plain one of the same slots: places reached, with copies those other than a token's own."""
    tables, ranks = {"contiguous": plain_LS, "plan": table_LS}, int(slot_rank_S.max()) + 1
    columns = []
    for sample in (seen, unseen, shuffle_choices(unseen, seed=seed)):
        cells = len(sample) * sample.num_layers
        costs = {}
        for name, table in tables.items():
            if table.shape[1] == sample.num_experts:
                rank_LE = slot_rank_S[np.argsort(table, axis=1)]
                costs[name] = sum(weight * float(distinct_L(sample, rank_LE // per_place).sum()) for per_place, weight in levels) / cells
            else:
                costs[name] = float(remote_L(sample, table, slot_rank_S, ranks, levels).sum()) / cells
        columns.append(costs)
    made = {name: EvidenceRow(placement=name, in_sample=columns[0][name], held_out=columns[1][name], null=columns[2][name]) for name in tables}
    names = ("ranks", "nodes", "racks")
    unit = " + ".join(name if weight == 1 else f"{weight:g} · {name}" for name, (_, weight) in zip(names, levels, strict=False))
    return AffinityEvidence(
        objective=FANOUT,
        unit=f"{unit} per token and layer" + ("" if table_LS.shape[1] == seen.num_experts else ", its own left out"),
        applies_to=APPLIES_TO[FANOUT],
        tokens_in_sample=len(seen),
        tokens_held_out=len(unseen),
        contiguous=made["contiguous"],
        plan=made["plan"],
    )


def gather_evidence(
    result: AffinityResult,
    seen: TokenRoutes,
    unseen: TokenRoutes,
    *,
    num_ranks: int,
    ranks_per_node: int,
    pairs: str = "all",
    node_weight: float = 1.0,
    seed: int = 0,
) -> AffinityEvidence:
    """Score a placement and the contiguous one on tokens planned on, unseen tokens, and the null of the unseen ones."""
    layers, experts = result.slot_to_expert_LS.shape
    places = {"contiguous": contiguous_LE(layers, experts, num_ranks), "plan": group_of(result, num_ranks)}
    hops = result.objective == HOPS
    node_weight = node_weight if ranks_per_node < num_ranks else 0.0
    samples = (seen, unseen, shuffle_layers(unseen, seed=seed) if hops else shuffle_choices(unseen, seed=seed))
    columns = []
    for sample in samples:
        if hops:
            table = count_transitions(sample, pairs).transitions_LEE
            columns.append({name: score_hops(table, group, ranks_per_node=ranks_per_node, node_weight=node_weight).cost for name, group in places.items()})
        else:
            scores = {
                name: score_fanout(sample, group, num_ranks=num_ranks, ranks_per_node=ranks_per_node, node_weight=node_weight) for name, group in places.items()
            }
            columns.append({name: score.cost for name, score in scores.items()})
    made = {name: EvidenceRow(placement=name, in_sample=columns[0][name], held_out=columns[1][name], null=columns[2][name]) for name in ("contiguous", "plan")}
    unit = "share of transitions that leave the rank" if hops else "ranks per token and layer"
    if node_weight > 0:
        unit += f" + {node_weight:g} · {'share of transitions that leave the node' if hops else 'nodes per token and layer'}"
    return AffinityEvidence(
        objective=result.objective,
        unit=unit,
        applies_to=APPLIES_TO[result.objective],
        tokens_in_sample=len(seen),
        tokens_held_out=len(unseen),
        contiguous=made["contiguous"],
        plan=made["plan"],
    )
