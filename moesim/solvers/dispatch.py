"""How the tokens of a replicated expert are split among its slots, given the load: exact, fast, or near the source.

A placement lasts minutes, a split one batch: with the slots as they are, only the shares change and nothing moves.
`fast` suits every batch, `lp` proves the optimum. Both return a certificate that `dual_bound_L` recomputes.
Shapes: K windows, L layers, E experts, S slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from moesim.errors import InputError, describe
from moesim.plan import Plan
from moesim.solvers.dispatch_core import PLACE, DispatchResult, Replicas, dual_bound_L, experts_of, make_dispatch, set_dual_KLR, window_scale_K
from moesim.solvers.dispatch_fast import TOLERANCE, solve_fast
from moesim.solvers.dispatch_local import LocalDispatch, copies_of, solve_local
from moesim.solvers.dispatch_lp import solve_lp

__all__ = [
    "DISPATCHERS",
    "DispatchResult",
    "Drift",
    "LocalDispatch",
    "Replicas",
    "copies_of",
    "dispatch_fast",
    "dispatch_local",
    "dispatch_lp",
    "dual_bound_L",
    "held_out",
    "solve_dispatch",
    "solve_equal",
    "with_shares",
]


def solve_equal(replicas: Replicas, load: np.ndarray) -> DispatchResult:
    """Score the equal split, which needs no load; its certificate is the set of ranks that are the fullest."""
    load_KLE = replicas.checked_load(load)
    scale_K = window_scale_K(load_KLE, None)
    time_KLR = replicas.time_KLR(load_KLE, replicas.equal_P)
    if len(load_KLE) == 1:
        dual = set_dual_KLR(replicas, load_KLE[0], time_KLR[0])
    else:
        dual = np.repeat(scale_K[:, None, None] / replicas.speed_R.sum(), replicas.num_layers, axis=1).repeat(replicas.num_ranks, axis=2)
    return make_dispatch(replicas, load_KLE, scale_K, replicas.equal_P, dual, solver="equal", status="BASELINE")


DISPATCHERS: dict[str, Callable[[Replicas, np.ndarray], DispatchResult]] = {"equal": solve_equal, "fast": solve_fast, "lp": solve_lp}
"""Methods by name."""


def _dispatcher(method: str) -> Callable[[Replicas, np.ndarray], DispatchResult]:
    if method not in DISPATCHERS:
        raise InputError(describe(PLACE, "method", method, f"must be one of {', '.join(sorted(DISPATCHERS))}"))
    return DISPATCHERS[method]


def dispatch_lp(
    load: np.ndarray,
    slot_to_expert_LS: np.ndarray,
    slot_rank_S: np.ndarray,
    num_ranks: int,
    speed_R: np.ndarray | None = None,
    *,
    window_weight_K: np.ndarray | None = None,
    gentle: bool = True,
) -> DispatchResult:
    """Return the shares with the least possible time of the slowest rank, proven.

    load: float [L, E], or [K, L, E] for one split over several windows (weighted mean of their slowest times, every window
    scaled to equal load). slot_to_expert_LS: int [L, S], -1 where empty. slot_rank_S: int [S]. speed_R: float [R] > 0.
    gentle: of the best splits take one that moves the fewest tokens from the equal split. Raises InputError if a value is out of range or
    HiGHS is not installed.
    """
    return solve_lp(Replicas.of(slot_to_expert_LS, slot_rank_S, num_ranks, experts_of(load), speed_R), load, window_weight_K=window_weight_K, gentle=gentle)


def dispatch_fast(
    load: np.ndarray,
    slot_to_expert_LS: np.ndarray,
    slot_rank_S: np.ndarray,
    num_ranks: int,
    speed_R: np.ndarray | None = None,
    *,
    tolerance: float = TOLERANCE,
) -> DispatchResult:
    """Return shares whose slowest rank is within `tolerance` of the optimum in every layer; arguments as for `dispatch_lp`, one window.

    For many batches of one placement build `Replicas` once and call `solve_fast`.
    """
    return solve_fast(Replicas.of(slot_to_expert_LS, slot_rank_S, num_ranks, experts_of(load), speed_R), load, tolerance=tolerance)


def dispatch_local(
    load_LRE: np.ndarray,
    slot_to_expert_LS: np.ndarray,
    slot_rank_S: np.ndarray,
    num_ranks: int,
    speed_R: np.ndarray | None = None,
    *,
    ranks_per_node: int,
    tolerance: float = 0.0,
    node_cost: float = 4.0,
    method: str = "fast",
) -> LocalDispatch:
    """Return shares by source rank that keep tokens near home at the cost of at most `tolerance` of balance.

    load_LRE: float [L, R, E], tokens by source rank; the rest as for `solve_local`. A plan carries `dispatch.share_LS`; a
    router on rank r (node n) draws among the slots of an expert by `source_share_LRS[:, r]` (`node_share_LNS[:, n]`) instead.
    """
    replicas = Replicas.of(slot_to_expert_LS, slot_rank_S, num_ranks, experts_of(load_LRE), speed_R)
    return solve_local(replicas, load_LRE, ranks_per_node=ranks_per_node, tolerance=tolerance, node_cost=node_cost, method=method)


def solve_dispatch(plan: Plan, load_LE: np.ndarray, method: str = "lp", *, speed_R: np.ndarray | None = None) -> DispatchResult:
    """Split the load of a plan's experts by the method `lp`, `fast` or `equal`; pass the result to `with_shares`."""
    solver, table, rank_S = _dispatcher(method), plan.slot_to_expert_LS, plan.slot_rank_S
    if plan.experts_L is not None:
        # the methods want a slot for every expert: those that a layer does not have get one more each, from which they serve nothing
        absent = ~plan.present_LE
        more = np.sort(np.where(absent, np.arange(plan.num_experts), -1), axis=1)[:, -int(absent.sum(axis=1).max()) :]
        table, rank_S = np.hstack((table, more)), np.append(rank_S, np.full(more.shape[1], plan.num_ranks - 1))
    result = solver(Replicas.of(table, rank_S, plan.num_ranks, plan.num_experts, speed_R), load_LE)
    return replace(result, share_LS=result.share_LS[:, : plan.num_slots])


def with_shares(plan: Plan, share_LS: np.ndarray | None, result: DispatchResult | None = None) -> Plan:
    """Return the plan with other shares (None: equal split); its placement, and so `map_sha256`, stays.

    result: where the shares come from; recorded under `dispatch` in the plan's result. Raises PlanError if the shares do not fit.
    """
    facts = {key: value for key, value in plan.result.items() if key != "dispatch"}
    return replace(plan, share_LS=share_LS, result=facts if result is None else {**facts, "dispatch": result.facts()})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drift:
    """Balance (Σ ideal / Σ slowest, 1 is perfect) of one placement on windows 1 .. K-1, by where the shares come from."""

    equal_W: np.ndarray
    """float64 [K-1]: slots of an expert serve equal shares."""
    held_out_W: np.ndarray
    """float64 [K-1]: shares found on the window before."""
    current_W: np.ndarray
    """float64 [K-1]: shares found on the window itself, as per-batch dispatch does."""


def held_out(
    load_KLE: np.ndarray, slot_to_expert_LS: np.ndarray, slot_rank_S: np.ndarray, num_ranks: int, speed_R: np.ndarray | None = None, *, method: str = "lp"
) -> Drift:
    """Score shares found on window i on window i + 1, beside the equal split and shares found on window i + 1 itself.

    load_KLE: float [K, L, E], K >= 2 windows in order of time. Raises InputError if there are fewer.
    """
    replicas = Replicas.of(slot_to_expert_LS, slot_rank_S, num_ranks, experts_of(load_KLE), speed_R)
    load, solver = replicas.checked_load(load_KLE), _dispatcher(method)
    if len(load) < 2:
        raise InputError(describe(PLACE, "windows", len(load), "must be >= 2 to score shares on a window they were not made for"))
    ideal_K = load.sum(axis=(1, 2)) / replicas.speed_R.sum()
    found = [solver(replicas, window) for window in load]

    def balance(share_LS: np.ndarray, window: int) -> float:
        share_P = np.zeros(replicas.key_P.size + 1)
        np.add.at(share_P, replicas.pair_LS, share_LS)
        slowest = float(replicas.time_KLR(load[window : window + 1], share_P[:-1]).max(axis=2).sum())
        return float(ideal_K[window]) / slowest if slowest > 0 else 1.0

    equal_LS, later = replicas.share_LS(replicas.equal_P), range(1, len(load))
    return Drift(
        equal_W=np.array([balance(equal_LS, k) for k in later]),
        held_out_W=np.array([balance(found[k - 1].share_LS, k) for k in later]),
        current_W=np.array([found[k].balance for k in later]),
    )
