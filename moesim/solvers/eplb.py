"""EPLB: DeepSeek's expert-parallel load balancer, and the zig-zag variant that evolved from it.

Three steps: pack routing groups onto nodes, give extra slots to the experts with the largest load per replica
inside every node, pack replicas onto the node's ranks. Where the groups do not divide by the nodes (or `global`),
everything is one node and one group. Packing takes items by falling load (ties: first comes first) and gives each
to the lightest pack with room; `zigzag` deals them in snake order instead. Loads are float32, as in the original,
so that ties fall the same way. All layers advance in lock step. An expert may come to sit twice on one rank.
Source: github.com/deepseek-ai/EPLB (the mechanism; this is an implementation from its description).
Shapes: B rows (layers, or layers × nodes), L layers, E experts, S slots, X most replicas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InfeasibleError, describe
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.result import PlacementResult, make_result
from moesim.solvers.search import Deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class EplbMaps:
    """The three arrays that EPLB returns."""

    physical_to_logical_LS: np.ndarray
    """int64 [L, S]: expert of every slot."""
    logical_to_physical_LEX: np.ndarray
    """int64 [L, E, X]: slots of every expert in the order the replicas were made, padded with -1."""
    expert_count_LE: np.ndarray
    """int64 [L, E]: replicas of every expert."""


def _pack(load_BN: np.ndarray, packs: int, zigzag: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pack N items per row into `packs` packs of N / packs items; return pack [B, N] and position in the pack [B, N]."""
    rows, items = load_BN.shape
    if items == packs:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), dtype=np.int64)
    order = np.argsort(-load_BN, axis=1, kind="stable")
    pack, position = np.empty((rows, items), dtype=np.int64), np.empty((rows, items), dtype=np.int64)
    if zigzag:
        lap, place = np.divmod(np.arange(items), packs)
        np.put_along_axis(pack, order, np.where(lap % 2 == 0, place, packs - 1 - place)[None], axis=1)
        np.put_along_axis(position, order, np.broadcast_to(lap, (rows, items)), axis=1)
        return pack, position
    row = np.arange(rows)
    total = np.zeros((rows, packs), dtype=load_BN.dtype)
    # a full pack's total becomes infinite, so that it is never the lightest
    used = np.zeros((rows, packs), dtype=np.int64)
    for item in order.T:
        lightest = total.argmin(axis=1)
        pack[row, item] = lightest
        position[row, item] = used[row, lightest]
        used[row, lightest] += 1
        total[row, lightest] += load_BN[row, item]
        total[row, lightest] = np.where(used[row, lightest] == items // packs, np.inf, total[row, lightest])
    return pack, position


def _replicate(load_BE: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give extra slots to the expert with the largest load per replica; return expert [B, S], replica number [B, S], count [B, E]."""
    rows, experts = load_BE.shape
    expert = np.tile(np.arange(slots), (rows, 1))
    number = np.zeros((rows, slots), dtype=np.int64)
    count = np.ones((rows, experts), dtype=np.int64)
    size = load_BE.copy()
    row = np.arange(rows)
    for slot in range(experts, slots):
        most = size.argmax(axis=1)
        expert[:, slot] = most
        number[:, slot] = count[row, most]
        count[row, most] += 1
        size[row, most] = load_BE[row, most] / count[row, most].astype(load_BE.dtype)
    return expert, number, count


def eplb_maps(load_LE: np.ndarray, *, slots: int, groups: int, nodes: int, ranks: int, policy: str = "auto", zigzag: bool = False) -> EplbMaps:
    """Compute EPLB's maps.

    load_LE: expert loads [L, E]. policy: `auto` is hierarchical if the groups divide by the nodes, else global; or `global`.
    Raises InfeasibleError if the slots do not divide by the ranks, the ranks by the nodes, or the experts by the groups.
    """
    load = np.asarray(load_LE, dtype=np.float32)
    layers, experts = load.shape
    if policy == "global" or groups % nodes:
        groups = nodes = 1
    for key, value, divisor, what in (("slots", slots, ranks, "ranks"), ("ranks", ranks, nodes, "nodes"), ("experts", experts, groups, "groups")):
        if value % divisor:
            raise InfeasibleError(
                describe("eplb", key, value, f"must be a multiple of the {divisor} {what}", f"add {divisor - value % divisor}, or use the solver greedy")
            )
    if slots < experts:
        raise InfeasibleError(describe("eplb", "slots", slots, f"must be >= the {experts} experts", f"{experts - slots} missing per layer"))
    group_size, node_slots, node_experts = experts // groups, slots // nodes, experts // nodes
    pack, position = _pack(load.reshape(layers, groups, group_size).sum(axis=2), nodes, zigzag)
    place = ((pack * (groups // nodes) + position) * group_size)[:, :, None] + np.arange(group_size)
    place_to_expert = np.argsort(place.reshape(layers, experts), axis=1)
    node_load = np.take_along_axis(load, place_to_expert, axis=1).reshape(layers * nodes, node_experts)
    local, number, count = _replicate(node_load, node_slots)
    replica_load = np.take_along_axis(node_load / count.astype(np.float32), local, axis=1)
    pack, position = _pack(replica_load, ranks // nodes, zigzag)
    source = np.argsort(pack * (slots // ranks) + position, axis=1)
    in_node = np.take_along_axis(local, source, axis=1).reshape(layers, nodes, node_slots) + (np.arange(nodes) * node_experts)[:, None]
    table = np.take_along_axis(place_to_expert, in_node.reshape(layers, slots), axis=1)
    numbers = np.take_along_axis(number, source, axis=1).reshape(layers, slots)
    counts = np.empty((layers, experts), dtype=np.int64)
    np.put_along_axis(counts, place_to_expert, count.reshape(layers, experts), axis=1)
    physical = np.full((layers, experts, int(counts.max())), -1, dtype=np.int64)
    physical[np.arange(layers)[:, None], table, numbers] = np.arange(slots)
    return EplbMaps(physical_to_logical_LS=table, logical_to_physical_LEX=physical, expert_count_LE=counts)


def _solve(problem: PlacementProblem, name: str, policy: str, zigzag: bool) -> PlacementResult:
    slots = problem.slots_per_rank_R
    if (slots != slots[0]).any():
        raise InfeasibleError(describe(name, "slots_per_rank", slots.tolist(), "must be equal on all ranks", "use the solver greedy"))
    load_LE = (problem.load_KLE * problem.weight_K[:, None, None]).sum(axis=0)
    maps = eplb_maps(
        load_LE, slots=problem.num_slots, groups=problem.num_groups, nodes=problem.num_nodes, ranks=problem.num_ranks, policy=policy, zigzag=zigzag
    )
    return make_result(problem, maps.physical_to_logical_LS, solver=name, status="BASELINE", iterations=problem.num_slots)


def solve_eplb(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """EPLB's own choice between its hierarchical and its global form."""
    return _solve(problem, "eplb", "auto", False)


def solve_eplb_global(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """EPLB with one node and one group."""
    return _solve(problem, "eplb-global", "global", False)


def solve_eplb_zigzag(problem: PlacementProblem, *, seed: int = 0, deadline: Deadline = None, options: Mapping[str, Any] | None = None) -> PlacementResult:
    """EPLB with snake-order packing in place of lightest-first."""
    return _solve(problem, "eplb-zigzag", "auto", True)
