"""Shares that depend on where a token comes from: own rank before own node before the rest, without losing balance.

A choice (token, expert) is served on its own rank, in its own node, or beyond. What a replica serves in all is bounded by a
cap on the time of its rank. For given totals the best assignment of sources to replicas is greedy, nearest first, because
distances nest; the totals move from the balanced split towards the nearest one, expert by expert, as far as the caps allow.
The program `lp` decides both at once, for small cases. Copies here are choices that leave a rank or a node, counted before a
token's choices for one destination are merged.
Shapes: L layers, R ranks (sources and destinations), N nodes, E experts, S slots, Q pairs to decide, M experts to decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.solvers.dispatch_core import MAX_CELLS, PLACE, DispatchResult, Replicas, make_dispatch
from moesim.solvers.dispatch_fast import solve_fast
from moesim.solvers.dispatch_lp import highs, run_lp, solve_lp

ROUNDS = 12
"""Rounds in which experts share the room that is left on their ranks."""
MAX_LP_COLUMNS = 200_000
"""Most columns of a layer's program."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LocalDispatch:
    """A split that knows the source of a token, and its copies against the equal split."""

    dispatch: DispatchResult
    """The same split summed over sources: `share_LS` is what a plan carries, and what the ranks' loads follow from."""
    source_share_LRS: np.ndarray
    """float64 [L, R, S]: for a token whose home is rank r, the probability that a choice of the slot's expert is served by the slot."""
    node_share_LNS: np.ndarray
    """float64 [L, N, S]: the same, averaged over the sources of a node: a table for routers that know only the node."""
    choices: float
    """(token, expert) choices in all."""
    remote: float
    """Choices served off their own rank."""
    internode: float
    """Choices served off their own node."""
    equal_remote: float
    """`remote` if the slots of an expert served equal shares of every source."""
    equal_internode: float
    """`internode` under the equal split."""


def copies_of(replicas: Replicas, load_LRE: np.ndarray, share: np.ndarray, *, ranks_per_node: int) -> tuple[float, float]:
    """Return the choices served off their own rank and off their own node.

    load_LRE: float [L, R, E], tokens by source rank. share: float [L, S], or [L, R, S] by source rank.
    """
    ranks = replicas.num_ranks
    key_P, place_P = np.append(replicas.key_P, -1), np.append(replicas.place_P, 0)
    remote = beyond = 0.0
    source = np.arange(ranks)[:, None]
    for layer, load_RE in enumerate(load_LRE):
        slots = np.flatnonzero(key_P[replicas.pair_LS[layer]] >= 0)
        pair = replicas.pair_LS[layer, slots]
        part = load_RE[:, key_P[pair] - layer * replicas.num_experts] * share[layer][..., slots]
        rank = place_P[pair] - layer * ranks
        remote += float(part[source != rank].sum())
        beyond += float(part[source // ranks_per_node != rank // ranks_per_node].sum())
    return remote, beyond


@dataclass(slots=True)
class _Choice:
    """The pairs to decide and the tokens for them."""

    replicas: Replicas
    pair_Q: np.ndarray
    group_Q: np.ndarray
    rank_Q: np.ndarray
    layer_Q: np.ndarray
    load_MR: np.ndarray
    """float64 [M, R]: tokens of every expert by source rank."""
    width: int
    """Ranks per node."""

    @classmethod
    def of(cls, replicas: Replicas, load_LRE: np.ndarray, width: int) -> _Choice:
        """Pick the experts with tokens and more than one rank."""
        wanted = (replicas.ranks_LE > 1) & (load_LRE.sum(axis=1) > 0)
        pairs = np.flatnonzero(wanted.ravel()[replicas.key_P])
        keys, group = np.unique(replicas.key_P[pairs], return_inverse=True)
        layer, expert = np.divmod(keys, replicas.num_experts)
        place = replicas.place_P[pairs]
        return cls(replicas, pairs, group, place % replicas.num_ranks, place // replicas.num_ranks, load_LRE[layer, :, expert], width)

    def by_group(self, value_Q: np.ndarray) -> np.ndarray:
        """Return [M]: sums over the pairs of an expert."""
        return np.bincount(self.group_Q, weights=value_Q, minlength=len(self.load_MR))

    def by_rank(self, value_Q: np.ndarray) -> np.ndarray:
        """Return [L, R]: sums over the pairs of a rank."""
        shape = (self.replicas.num_layers, self.replicas.num_ranks)
        return np.bincount(self.replicas.place_P[self.pair_Q], weights=value_Q, minlength=shape[0] * shape[1]).reshape(shape)

    def by_node(self, value_Q: np.ndarray) -> np.ndarray:
        """Return [M, N]: sums over the pairs of an expert in a node."""
        nodes = self.replicas.num_ranks // self.width
        index = self.group_Q * nodes + self.rank_Q // self.width
        return np.bincount(index, weights=value_Q, minlength=len(self.load_MR) * nodes).reshape(-1, nodes)

    def nearest_Q(self, share_Q: np.ndarray) -> np.ndarray:
        """Return [Q]: tokens of every pair if each source took its nearest replica, and those without one near split by `share_Q`."""
        groups, nodes = len(self.load_MR), self.replicas.num_ranks // self.width
        own = self.load_MR[self.group_Q, self.rank_Q]
        away = self.load_MR.copy()
        away[self.group_Q, self.rank_Q] = 0.0
        away_MN = away.reshape(groups, nodes, self.width).sum(axis=2)
        held_MN = self.by_node(np.ones(self.rank_Q.size))
        near = (away_MN / np.maximum(held_MN, 1))[self.group_Q, self.rank_Q // self.width]
        far_M = (away_MN * (held_MN == 0)).sum(axis=1)
        return own + near + far_M[self.group_Q] * share_Q

    def approach(self, balanced_Q: np.ndarray, near_Q: np.ndarray, room_LR: np.ndarray) -> np.ndarray:
        """Return totals between `balanced_Q` and `near_Q` that raise no rank by more than `room_LR` in all."""
        theta_M = np.zeros(len(self.load_MR))
        change = near_Q - balanced_Q
        rise = np.maximum(change, 0.0)
        for _ in range(ROUNDS):
            left_Q = (1.0 - theta_M)[self.group_Q]
            wanted = self.by_rank(rise * left_Q)
            room = np.maximum(room_LR - self.by_rank(change * theta_M[self.group_Q]), 0.0)
            part = np.minimum(1.0, np.divide(room, wanted, out=np.ones_like(room), where=wanted > 0))
            part_Q = np.where(rise > 0, part[self.layer_Q, self.rank_Q], 1.0)
            least_M = np.ones(len(theta_M))
            np.minimum.at(least_M, self.group_Q, part_Q)
            theta_M = np.minimum(theta_M + (1.0 - theta_M) * least_M, 1.0)
        return balanced_Q + change * theta_M[self.group_Q]

    def transport(self, total_Q: np.ndarray) -> np.ndarray:
        """Return [Q, R]: tokens that every pair takes from every source, nearest first; `total_Q` sums to the tokens of an expert."""
        groups, nodes, every = len(self.load_MR), self.replicas.num_ranks // self.width, np.arange(self.rank_Q.size)
        flow = np.zeros((self.rank_Q.size, self.replicas.num_ranks))
        left_MR = self.load_MR.copy()
        own = np.minimum(left_MR[self.group_Q, self.rank_Q], total_Q)
        flow[every, self.rank_Q] = own
        left_MR[self.group_Q, self.rank_Q] -= own
        left_Q = total_Q - own
        node_Q = self.rank_Q // self.width
        give_MNR, take_MN = left_MR.reshape(groups, nodes, self.width), self.by_node(left_Q)
        give_MN = give_MNR.sum(axis=2)
        met = np.minimum(give_MN, take_MN)
        given = np.divide(met, give_MN, out=np.zeros_like(met), where=give_MN > 0)
        taken = np.divide(met, take_MN, out=np.zeros_like(met), where=take_MN > 0)[self.group_Q, node_Q]
        part = np.divide(left_Q, take_MN[self.group_Q, node_Q], out=np.zeros_like(left_Q), where=take_MN[self.group_Q, node_Q] > 0)
        flow.reshape(-1, nodes, self.width)[every, node_Q] += (give_MNR * given[..., None])[self.group_Q, node_Q] * part[:, None]
        left_MR = (give_MNR * (1.0 - given)[..., None]).reshape(self.load_MR.shape)
        left_Q = left_Q * (1.0 - taken)
        rest = self.by_group(left_Q)[self.group_Q]
        flow += left_MR[self.group_Q] * np.divide(left_Q, rest, out=np.zeros_like(left_Q), where=rest > 0)[:, None]
        return flow


def _lp_flows(choice: _Choice, room_LR: np.ndarray, node_cost: float) -> np.ndarray:
    """Return [Q, R]: flows of least cost whose totals keep within the room of every rank, [L, R] tokens; HiGHS, layer by layer."""
    module, solver = highs()
    flow = np.zeros((choice.rank_Q.size, choice.replicas.num_ranks))
    sources = np.arange(choice.replicas.num_ranks)
    for layer in np.unique(choice.layer_Q):
        pairs = np.flatnonzero(choice.layer_Q == layer)
        unit = max(float(choice.load_MR[choice.group_Q[pairs]].sum()) / pairs.size, 1e-300)
        pair, source = np.nonzero(choice.load_MR[choice.group_Q[pairs]] > 1e-9 * unit)
        if pair.size > MAX_LP_COLUMNS:
            raise InputError(describe(f"{PLACE} lp", "sources x pairs of a layer", pair.size, f"must be <= {MAX_LP_COLUMNS}", "use the method fast"))
        group, rank = choice.group_Q[pairs[pair]], choice.rank_Q[pairs[pair]]
        cost = (rank != source) * 1.0 + (rank // choice.width != sources[source] // choice.width) * (node_cost - 1.0)
        rows, row = np.unique(group * sources.size + source, return_inverse=True)
        wanted = choice.load_MR[rows // sources.size, rows % sources.size] / unit
        used, use = np.unique(rank, return_inverse=True)
        columns = np.arange(pair.size)
        x, _ = run_lp(
            module,
            solver,
            cost=cost,
            lower=np.zeros(pair.size),
            upper=np.full(pair.size, module.kHighsInf),
            row_lower=np.concatenate([wanted, np.full(used.size, -module.kHighsInf)]),
            row_upper=np.concatenate([wanted, room_LR[layer, used] / unit + 1e-9]),
            row=np.concatenate([row, rows.size + use]),
            column=np.concatenate([columns, columns]),
            value=np.ones(2 * pair.size),
        )
        flow[pairs[pair], source] = np.maximum(x, 0.0) * unit
    return flow


def solve_local(
    replicas: Replicas, load_LRE: np.ndarray, *, ranks_per_node: int, tolerance: float = 0.0, node_cost: float = 4.0, method: str = "fast"
) -> LocalDispatch:
    """Serve tokens near their source while no layer's slowest rank gets slower than the balanced split by more than `tolerance`.

    load_LRE: float [L, R, E], tokens >= 0 by source rank. ranks_per_node: >= 1, divides R. tolerance: >= 0, relative.
    node_cost: >= 1, a copy that leaves the node in copies that stay in it; only `lp` trades them, the fast method prefers nearer always.
    method: `fast`, or `lp` for the exact optimum. Raises InputError if a value is out of range, or HiGHS is missing for `lp`.
    """
    load = np.array(load_LRE, dtype=np.float64)
    shape = (replicas.num_layers, replicas.num_ranks, replicas.num_experts)
    if load.shape != shape:
        raise InputError(describe(PLACE, "load by source, shape", load.shape, f"must be [layers, ranks, experts] = {shape}"))
    if load.size > MAX_CELLS or replicas.num_layers * replicas.num_ranks * replicas.pair_LS.shape[1] > MAX_CELLS:
        raise InputError(describe(PLACE, "layers x ranks x slots", load.shape, f"must be <= {MAX_CELLS} cells", "solve fewer layers at a time"))
    bad = ~np.isfinite(load) | (load < 0) | (load > 1e200)
    if bad.any():
        layer, rank, expert = (int(i) for i in np.argwhere(bad)[0])
        raise InputError(
            describe(PLACE, f"load of layer {layer}, source rank {rank}, expert {expert}", float(load[layer, rank, expert]), "must be finite and >= 0")
        )
    if ranks_per_node < 1 or replicas.num_ranks % ranks_per_node:
        raise InputError(describe(PLACE, "ranks_per_node", ranks_per_node, f"must divide the {replicas.num_ranks} ranks"))
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise InputError(describe(PLACE, "tolerance", tolerance, "must be finite and >= 0"))
    if not (np.isfinite(node_cost) and node_cost >= 1):
        raise InputError(describe(PLACE, "node_cost", node_cost, "must be finite and >= 1"))
    if method not in ("fast", "lp"):
        raise InputError(describe(PLACE, "method", method, "must be fast or lp"))
    load_LE = load.sum(axis=1)
    balanced = solve_fast(replicas, load_LE) if method == "fast" else solve_lp(replicas, load_LE)
    choice = _Choice.of(replicas, load, ranks_per_node)
    share_P = np.zeros(replicas.key_P.size + 1)
    np.add.at(share_P, replicas.pair_LS, balanced.share_LS)
    share_P = share_P[:-1]
    load_Q = load_LE.ravel()[replicas.key_P[choice.pair_Q]]
    start_Q = load_Q * share_P[choice.pair_Q]
    cap_LR = balanced.time_L[:, None] * (1.0 + tolerance) * replicas.speed_R
    room_LR = cap_LR - replicas.time_KLR(load_LE[None], share_P)[0] * replicas.speed_R
    if method == "fast":
        flow = choice.transport(choice.approach(start_Q, choice.nearest_Q(share_P[choice.pair_Q]), room_LR))
    else:
        flow = _lp_flows(choice, room_LR + choice.by_rank(start_Q), node_cost)
    share_P[choice.pair_Q] = flow.sum(axis=1) / load_Q
    share_P = replicas.normal_P(share_P)
    source = _source_share(replicas, choice, flow, share_P)
    result = make_dispatch(
        replicas, load_LE[None], np.ones(1) if load_LE.any() else np.zeros(1), share_P, balanced.dual_KLR, solver=f"dispatch-local-{method}", status="FEASIBLE"
    )
    remote, internode = copies_of(replicas, load, source, ranks_per_node=ranks_per_node)
    equal_remote, equal_internode = copies_of(replicas, load, replicas.share_LS(replicas.equal_P), ranks_per_node=ranks_per_node)
    return LocalDispatch(
        dispatch=result,
        source_share_LRS=source,
        node_share_LNS=_node_share(replicas, load, source, ranks_per_node),
        choices=float(load.sum()),
        remote=remote,
        internode=internode,
        equal_remote=equal_remote,
        equal_internode=equal_internode,
    )


def _source_share(replicas: Replicas, choice: _Choice, flow_QR: np.ndarray, share_P: np.ndarray) -> np.ndarray:
    """Return [L, R, S]: flows as shares of every source's tokens; sources without tokens take the overall share."""
    sent = np.zeros_like(choice.load_MR)
    np.add.at(sent, choice.group_Q, flow_QR)
    sent_QR = sent[choice.group_Q]
    by_source = np.repeat(np.append(share_P / replicas.slots_P, 0.0)[:, None], replicas.num_ranks, axis=1)
    part = np.divide(flow_QR, sent_QR, out=np.repeat(share_P[choice.pair_Q][:, None], replicas.num_ranks, axis=1), where=sent_QR > 0)
    by_source[choice.pair_Q] = part / replicas.slots_P[choice.pair_Q, None]
    return np.ascontiguousarray(by_source[replicas.pair_LS].transpose(0, 2, 1))


def _node_share(replicas: Replicas, load_LRE: np.ndarray, source_LRS: np.ndarray, width: int) -> np.ndarray:
    """Return [L, N, S]: shares of the sources of a node, weighted by their tokens."""
    expert_P = np.append(replicas.key_P % replicas.num_experts, 0)
    layers, ranks, slots = source_LRS.shape
    weight = np.take_along_axis(load_LRE, expert_P[replicas.pair_LS][:, None, :].repeat(ranks, axis=1), axis=2).reshape(layers, -1, width, slots)
    shares = source_LRS.reshape(layers, -1, width, slots)
    total = weight.sum(axis=2)
    return np.where(total > 0, (weight * shares).sum(axis=2) / np.where(total > 0, total, 1.0), shares.mean(axis=2))
