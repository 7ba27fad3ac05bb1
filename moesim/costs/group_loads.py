"""What a placement makes of the routing: whole tokens per slot, and the copies on every port, for any number of tokens.

Every source rank sends equally many tokens, drawn from the same loads, so ports follow from sums over ranks without a rank-pair matrix. Choices of one
token are distinct experts but otherwise independent: loads say nothing about which experts are chosen together. Fractions of tokens are rounded within a
layer so that its total is kept; only `drawn_slot_tokens` adds the noise of a batch.
Shapes: L layers (1 stands for all if they are alike), X expert-parallel ranks, C slots of one, S = X·C slots, n token counts, R ranks = X·expert_tp.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from moesim.costs.group import Group
from moesim.costs.traffic import Ports
from moesim.errors import InputError, describe

Placement = Callable[[np.ndarray, int, int], np.ndarray]
"""(load_LE, ranks, slots per rank) → slot_to_expert_LS."""


def capped_LE(load_LE: np.ndarray, top_k: int) -> np.ndarray:
    """Scale loads [L, E] to expected choices of one token: rows sum to top_k, no entry exceeds 1; what an expert cannot take goes to the others."""
    full = np.zeros(load_LE.shape, dtype=bool)
    assign = np.zeros(load_LE.shape)
    for _ in range(top_k + 1):
        rest = np.where(full, 0.0, load_LE)
        left = top_k - full.sum(axis=1, keepdims=True)
        assign = np.where(full, 1.0, rest * (left / np.maximum(rest.sum(axis=1, keepdims=True), 1e-300)))
        over = (assign > 1.0) & ~full
        if not over.any():
            break
        full |= over
    return np.minimum(assign, 1.0)


def linear_placement(load_LE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Place experts in order; redundant slots repeat the first ones, as engines do without a balancer."""
    layers, experts = load_LE.shape
    return np.tile(np.arange(ranks * slots) % experts, (layers, 1))


class GroupLoads:
    """Loads of one expert-parallel group under one placement."""

    def __init__(self, assign_LE: np.ndarray, top_k: int, group: Group, *, devices_per_node: int, placement: Placement) -> None:
        """Place the experts; raise InputError if the placement leaves one out or has the wrong shape."""
        table = np.asarray(placement(assign_LE, group.ep, group.slots))
        layers, experts = assign_LE.shape
        if table.shape != (layers, group.ep * group.slots):
            raise InputError(describe("placement", "shape", table.shape, f"must be [{layers}, {group.ep * group.slots}]"))
        if table.min() < -1 or table.max() >= experts:
            raise InputError(describe("placement", "expert", [int(table.min()), int(table.max())], f"must be within -1..{experts - 1}"))
        row = np.arange(layers)[:, None]
        copies_LE = np.zeros((layers, experts))
        np.add.at(copies_LE, (np.broadcast_to(row, table.shape), np.maximum(table, 0)), (table >= 0).astype(np.float64))
        if not (copies_LE > 0).all():
            layer, expert = np.argwhere(copies_LE == 0)[0]
            raise InputError(describe("placement", f"layer {layer}", f"expert {expert}", "has no slot; every expert needs one"))
        share = assign_LE[row, np.maximum(table, 0)] / copies_LE[row, np.maximum(table, 0)]
        self.group = group
        self.top_k = top_k
        self.slot_LS = np.where(table >= 0, share, 0.0)
        """float64 [L, S]: expected choices of a slot by one token."""
        self.rank_LX = self.slot_LS.reshape(layers, group.ep, group.slots).sum(axis=2)
        node = max(1, group.ranks // devices_per_node) if group.ranks > devices_per_node else 1
        # A column is the ranks that hold the same shard of their experts; only these exchange tokens.
        self.column_nodes = min(node, group.ep)
        self.column_devices = group.ep // self.column_nodes

    @property
    def imbalance_L(self) -> np.ndarray:
        """float64 [L]: largest rank load over the mean."""
        return np.asarray(self.rank_LX.max(axis=1) / np.maximum(self.rank_LX.mean(axis=1), 1e-300))

    def slot_tokens(self, tokens_n: np.ndarray) -> np.ndarray:
        """Return int64 [n, L, X, C]: tokens of every slot when the group passes `tokens_n` tokens."""
        running = np.cumsum(self.slot_LS, axis=1) * np.asarray(tokens_n, dtype=np.float64)[:, None, None]
        # A hair above one half: sums that should be whole do not fall on either side by rounding.
        whole = np.floor(running + (0.5 + 1e-7)).astype(np.int64)
        counts = np.diff(whole, axis=2, prepend=0)
        return counts.reshape(len(whole), len(self.slot_LS), self.group.ep, self.group.slots)

    def drawn_slot_tokens(self, tokens_n: np.ndarray, generator: np.random.Generator, draws: int) -> np.ndarray:
        """Return int64 [n, draws·L, X, C]: the same for batches whose tokens choose at random: every slot's tokens are drawn by themselves."""
        chance = np.tile(self.slot_LS, (draws, 1))
        counts = generator.binomial(np.asarray(tokens_n, dtype=np.int64)[:, None, None], np.clip(chance, 0.0, 1.0)[None])
        return counts.reshape(len(tokens_n), len(chance), self.group.ep, self.group.slots)

    def surely_active_nL(self, tokens_n: np.ndarray) -> np.ndarray:
        """Return int64 [n, L]: slots of the busiest rank that have a token however fractions are rounded."""
        grouped = self.slot_LS.reshape(len(self.slot_LS), self.group.ep, self.group.slots)
        full = grouped * np.asarray(tokens_n, dtype=np.float64)[:, None, None, None] >= 1.0 + 1e-6
        return np.asarray(full.sum(axis=3).max(axis=2))

    # --- distinct ranks and nodes of a token ----------------------------------------------------------------------

    @cached_property
    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [L, X] and [L, nodes of a column]: chance that a token has at least one of its choices there."""
        weight = self.slot_LS / np.maximum(1.0 - self.slot_LS, 1e-3)
        weight = weight / np.maximum(weight.mean(axis=1, keepdims=True), 1e-300)
        layers, ep = len(weight), self.group.ep
        by_rank = _polynomials(weight.reshape(layers, ep, self.group.slots), self.top_k)
        rank = _hit(by_rank, self.top_k)
        by_node = by_rank.reshape(layers, self.column_nodes, self.column_devices, self.top_k + 1)
        node = by_node[:, :, 0]
        for device in range(1, self.column_devices):
            node = _multiply(node, by_node[:, :, device])
        return rank, _hit(node, self.top_k)

    def ports(self, algorithm: str, tokens_n: np.ndarray) -> Ports:
        """Return the copies [n, L, R] on every port in the direction of dispatch, each rank being the source of `tokens_n` tokens."""
        if algorithm == "low_latency":
            reach, node = self.rank_LX, self.rank_LX[:, :0]
        else:
            reach, node = self.hits
        ep, nodes, devices = self.group.ep, self.column_nodes, self.column_devices
        by_node = reach.reshape(-1, nodes, devices)
        own = np.repeat(by_node.sum(axis=2), devices, axis=1)
        everywhere = reach.sum(axis=1, keepdims=True)
        if algorithm == "normal":
            up_out, up_in = nodes * (own - reach), nodes * (devices - 1) * reach
            mine = np.repeat(node, devices, axis=1)
            out_out, out_in = node.sum(axis=1, keepdims=True) - mine, (nodes - 1) * mine
            if nodes == 1:
                out_out = out_in = np.zeros(reach.shape)
        elif algorithm in ("low_latency", "direct"):
            up_out, up_in = own - reach, (devices - 1) * reach
            out_out, out_in = everywhere - own, (ep - devices) * reach
        else:
            raise InputError(describe("parallelism", "algorithm", algorithm, "must be one of low_latency, normal, direct"))
        tokens = np.asarray(tokens_n, dtype=np.float64)[:, None, None]
        spread = [np.repeat(np.maximum(one, 0.0), self.group.expert_tp, axis=1) * tokens for one in (up_out, up_in, out_out, out_in, reach)]
        return Ports(*spread)


def _polynomials(weight_LGC: np.ndarray, top_k: int) -> np.ndarray:
    """Return [L, G, top_k + 1]: elementary symmetric polynomials of the weights of every group."""
    result: np.ndarray = np.zeros((len(weight_LGC), weight_LGC.shape[1], top_k + 1))
    result[..., 0] = 1.0
    for slot in range(weight_LGC.shape[2]):
        result[..., 1:] += result[..., :-1] * weight_LGC[..., slot, None]
    return result


def _multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    size = int(left.shape[-1])
    result: np.ndarray = np.zeros(np.broadcast_shapes(left.shape, right.shape))
    for degree in range(size):
        result[..., degree:] += left[..., degree, None] * right[..., : size - degree]
    return result


def _hit(group_LGK: np.ndarray, top_k: int) -> np.ndarray:
    """Return [L, G]: 1 - share of the choices of `top_k` slots that avoid a group; products from both sides, so that nothing is subtracted."""
    groups = group_LGK.shape[1]
    left = np.zeros(group_LGK.shape)
    right = np.zeros(group_LGK.shape)
    left[:, 0, 0] = right[:, -1, 0] = 1.0
    for index in range(1, groups):
        left[:, index] = _multiply(left[:, index - 1], group_LGK[:, index - 1])
        right[:, -1 - index] = _multiply(right[:, -index], group_LGK[:, -index])
    everything = _multiply(left[:, -1], group_LGK[:, -1])[:, top_k]
    missed = _multiply(left, right)[..., top_k]
    return np.clip(1.0 - missed / np.maximum(everything, 1e-300)[:, None], 0.0, 1.0)
