"""Collectives by algorithm, as Ops: from the bytes of every rank pair, or the size of the buffer, to the steps in which they move.

A message of m bytes takes α + m / (β · efficiency(m)) with α, β and the efficiency curve of the `Link` it crosses: `scale_up` inside a node, else
`scale_out` (a device's share of its NIC; between leaves that divided by the oversubscription). With n ranks and a buffer of m bytes, all of one link:
  ring         all-reduce 2(n-1)(α + m/nβ), all-gather and reduce-scatter (n-1)(α + m/nβ); neighbour waits for neighbour, not for all
  tree         all-reduce over two binary trees, each pipelining half of the buffer: 2(⌈log2 n⌉ α + m/β)
  in_switch    all-reduce 2α + m/β, all-gather and reduce-scatter α + (n-1)/n · m/β: the switch adds and copies (one node)
  two_level    inside the nodes and between devices of equal index one after another
Sizes are those of `costs.links`: all_reduce the tensor, all_gather the gathered result, reduce_scatter the input. Bytes, seconds, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.costs.traffic import ports
from moesim.errors import SimulationError, describe
from moesim.hardware.cluster import Cluster, Link
from moesim.sim.network import port_link
from moesim.sim.ops import COMM, Job, Op, Program

UP, OUT = "scale_up", "scale_out"
REDUCTIONS = ("ring", "tree", "in_switch", "two_level")
EXCHANGES = ("direct", "pairwise", "2dh")


class Collectives:
    """Adds collectives to one Program of one cluster; every method returns the Ops that later ones depend on."""

    def __init__(self, program: Program, cluster: Cluster, *, sm_share: float = 0.0, lane: str = COMM) -> None:
        """sm_share: SMs that communication takes from computation beside it, the declared interference coefficient."""
        if program.num_ranks != cluster.num_ranks:
            raise SimulationError(describe("collectives", "ranks", program.num_ranks, f"must be the {cluster.num_ranks} of {cluster.name}"))
        self.program, self.cluster, self.sm_share, self.lane = program, cluster, sm_share, lane
        self.node_R = np.arange(cluster.num_ranks) // cluster.devices_per_node
        self.leaf_R = np.arange(cluster.num_ranks) // cluster.ranks_per_leaf
        self.bytes_R: dict[str, np.ndarray] = {f"{link}.{way}": np.zeros(cluster.num_ranks) for link in (UP, OUT) for way in ("out", "in")}
        """Port → bytes that have been added so far."""
        self.messages_R: dict[str, np.ndarray] = {UP: np.zeros(cluster.num_ranks), OUT: np.zeros(cluster.num_ranks)}
        """Link → messages sent so far."""

    # --- reductions and gathers ------------------------------------------------------------------

    def all_reduce(self, nbytes: float, *, group_R: np.ndarray, algorithm: str = "ring", deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Sum a tensor of `nbytes` over every group; group_R: int [R], -1 for ranks that take no part."""
        if algorithm == "two_level":
            inside, between, devices = self._levels(group_R)
            last = self.reduce_scatter(nbytes, group_R=inside, deps=deps, layer=layer)
            last = self.all_reduce(nbytes / devices, group_R=between, deps=last, layer=layer)
            return self.all_gather(nbytes, group_R=inside, deps=last, layer=layer)
        if algorithm == "tree":
            last = self._at_once("reduce", nbytes, nbytes, nbytes / 2, "depth", group_R, deps, layer)
            return self._at_once("broadcast", nbytes, nbytes, nbytes / 2, "depth", group_R, last, layer)
        if algorithm == "in_switch":
            self._one_node("all_reduce", group_R)
            return self._at_once("all_reduce", nbytes, nbytes, nbytes, "twice", group_R, deps, layer)
        last = self._ring("reduce_scatter", nbytes, group_R, deps, layer, algorithm)
        return self._ring("all_gather", nbytes, group_R, last, layer, algorithm)

    def all_gather(self, nbytes: float, *, group_R: np.ndarray, algorithm: str = "ring", deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Give every rank of a group the `nbytes` of which each holds an equal part."""
        return self._one_way("all_gather", nbytes, group_R, algorithm, deps, layer)

    def reduce_scatter(self, nbytes: float, *, group_R: np.ndarray, algorithm: str = "ring", deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Sum `nbytes` over every group and leave each rank an equal part."""
        return self._one_way("reduce_scatter", nbytes, group_R, algorithm, deps, layer)

    def _one_way(self, label: str, nbytes: float, group_R: np.ndarray, algorithm: str, deps: Sequence[int], layer: int) -> list[int]:
        gather = label == "all_gather"
        if algorithm == "two_level":
            inside, between, devices = self._levels(group_R)
            stages = [(between, nbytes / devices), (inside, nbytes)]
            last = list(deps)
            for group, size in stages if gather else stages[::-1]:
                last = self._ring(label, size, group, last, layer, "ring")
            return last
        if algorithm == "in_switch":
            self._one_node(label, group_R)
            size_R = self._sizes(group_R)
            part, rest = nbytes / size_R, nbytes * (size_R - 1) / size_R
            return self._at_once(label, part if gather else rest, rest if gather else part, nbytes, "once", group_R, deps, layer)
        return self._ring(label, nbytes, group_R, deps, layer, algorithm)

    def _ring(self, label: str, nbytes: float, group_R: np.ndarray, deps: Sequence[int], layer: int, algorithm: str) -> list[int]:
        if algorithm != "ring":
            raise SimulationError(describe(label, "algorithm", algorithm, f"must be one of {', '.join(REDUCTIONS)}; tree is for all_reduce"))
        target_R, size_R = self._neighbours(group_R, 1), self._sizes(group_R)
        last = list(deps)
        for step in range(int(size_R.max(initial=1)) - 1):
            last = self._pairwise(label, target_R, np.where(step < size_R - 1, nbytes / size_R, 0.0), last, layer)
        return last

    def _at_once(
        self,
        label: str,
        out: float | np.ndarray,
        into: float | np.ndarray,
        message: float,
        latency: str,
        group_R: np.ndarray,
        deps: Sequence[int],
        layer: int,
    ) -> list[int]:
        """Add one Op in which every rank of a group streams `out` and `into` bytes; groups across nodes use the slower link."""
        group, size_R = self._check_group(group_R), self._sizes(group_R)
        active = (group >= 0) & (size_R > 1)
        across = active & np.isin(group, [g for g in np.unique(group) if len(np.unique(self.node_R[group == g])) > 1])
        far = across & np.isin(group, [g for g in np.unique(group) if len(np.unique(self.leaf_R[group == g])) > 1])
        alphas = {"once": np.ones(len(group)), "twice": np.full(len(group), 2.0), "depth": np.ceil(np.log2(size_R))}[latency]
        jobs = []
        for link, mine in ((UP, active & ~across), (OUT, across)):
            if mine.any():
                alpha, seconds = self._link(link).latency_s * alphas, self._seconds_per_byte(link, np.full(len(group), message), far)
                for way, nbytes in (("out", out), ("in", into)):
                    work = np.where(mine, alpha + nbytes * seconds, 0.0)
                    self.bytes_R[f"{link}.{way}"] += np.where(mine, nbytes, 0.0)
                    jobs.append(Job(port=f"{link}.{way}", work_s=work, side="send" if way == "out" else "recv"))
                self.messages_R[link] += mine
        if not jobs:
            return list(deps)
        return [self._add(label, jobs, deps, layer, ranks_R=active, group_R=np.where(group < 0, group.max() + 1, group))]

    # --- exchanges -------------------------------------------------------------------------------

    def all_to_all(
        self,
        bytes_RR: np.ndarray,
        *,
        algorithm: str = "direct",
        messages_RR: np.ndarray | None = None,
        serial: bool = False,
        label: str = "all_to_all",
        deps: Sequence[int] = (),
        layer: int = -1,
    ) -> list[int]:
        """Move bytes_RR[s, d] from s to d; a pair without bytes costs nothing.

        algorithm: `direct` (all messages at once, both links side by side), `pairwise` (R - 1 rounds of one message), `2dh` (first over the scale-up
        link to the device of the target's index, then over the NIC: D - 1 and N - 1 messages instead of R - 1). messages_RR: messages of every pair,
        default one. serial: every message pays its latency, one after another; otherwise they overlap and a port pays it once.
        """
        pairs = self._check_pairs(bytes_RR)
        count = (pairs > 0).astype(np.float64) if messages_RR is None else np.where(pairs > 0, messages_RR, 0.0)
        if algorithm == "direct":
            return [self._exchange(label, pairs, count, serial, deps, layer)]
        if algorithm == "2dh":
            first, second = self.two_levels(pairs)
            last = list(deps)
            for stage in (first, second):
                if stage.any():
                    last = [self._exchange(label, stage, (stage > 0).astype(np.float64), serial, last, layer)]
            return last
        if algorithm != "pairwise":
            raise SimulationError(describe(label, "algorithm", algorithm, f"must be one of {', '.join(EXCHANGES)}"))
        last, ranks = list(deps), np.arange(len(pairs))
        for shift in range(1, len(pairs)):
            target = (ranks + shift) % len(pairs)
            last = self._pairwise(label, target, pairs[ranks, target], last, layer)
        return last

    def two_levels(self, bytes_RR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rank-pair bytes of the two stages of `2dh`: inside the nodes, then between devices of equal index."""
        width, nodes = self.cluster.devices_per_node, self.cluster.num_nodes
        blocks = bytes_RR.reshape(nodes, width, nodes, width)
        inside, between = np.zeros(blocks.shape), np.zeros(blocks.shape)
        for node in range(nodes):
            inside[node, :, node, :] = blocks[node].sum(axis=1)
        index = np.arange(width)
        between[:, index, :, index] = blocks.sum(axis=1).transpose(2, 0, 1)
        for stage in (inside, between):
            np.fill_diagonal(stage.reshape(bytes_RR.shape), 0.0)
        return inside.reshape(bytes_RR.shape), between.reshape(bytes_RR.shape)

    def expert_exchange(
        self,
        stage: str,
        token_bytes: float,
        *,
        algorithm: str,
        assign_RR: np.ndarray | None = None,
        copy_RR: np.ndarray | None = None,
        node_RN: np.ndarray | None = None,
        deps: Sequence[int] = (),
        layer: int = -1,
    ) -> list[int]:
        """Dispatch or combine (stage) as DeepEP does, from the counts of `costs.traffic`.

        `normal` relays one copy per token and node (both links side by side: it forwards in small chunks); `low_latency` sends a message per token
        and expert; `direct` and `2dh` as all_to_all, one copy per token and rank.
        """
        if stage not in ("dispatch", "combine"):
            raise SimulationError(describe("expert exchange", "stage", stage, "must be dispatch or combine"))
        width = min(self.cluster.devices_per_node, self.cluster.num_ranks)
        back = stage == "combine"
        if algorithm == "2dh" and copy_RR is not None:
            stages = list(self.two_levels(np.asarray(copy_RR, dtype=np.float64) * token_bytes))
            last = list(deps)
            for pairs in [pairs.T for pairs in stages[::-1]] if back else stages:
                if pairs.any():
                    last = [self._exchange(stage, pairs, (pairs > 0).astype(np.float64), False, last, layer)]
            return last
        copies = _hops(algorithm, width, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN)
        copies = copies.T if back else copies
        messages = copies if algorithm == "low_latency" else (copies > 0).astype(np.float64)
        return [self._exchange(stage, self._check_pairs(copies * token_bytes), messages, False, deps, layer)]

    def sparse_all_gather(self, need_RK: np.ndarray, owner_K: np.ndarray, bytes_K: np.ndarray, *, deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Send shard k of bytes_K[k] from its owner to every rank that needs it; need_RK: bool."""
        return self.all_to_all(self._shards(need_RK, owner_K, bytes_K), label="sparse_all_gather", deps=deps, layer=layer)

    def sparse_reduce_scatter(self, have_RK: np.ndarray, owner_K: np.ndarray, bytes_K: np.ndarray, *, deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Send what ranks have of shard k (bool have_RK, bytes_K[k]) to its owner, which adds it up."""
        return self.all_to_all(self._shards(have_RK, owner_K, bytes_K).T, label="sparse_reduce_scatter", deps=deps, layer=layer)

    def p2p(self, source: np.ndarray, target: np.ndarray, nbytes: np.ndarray | float, *, deps: Sequence[int] = (), layer: int = -1) -> list[int]:
        """Send `nbytes` from every source to its target, each rank at most once in either list."""
        target_R = np.full(self.cluster.num_ranks, -1)
        size_R = np.zeros(self.cluster.num_ranks)
        if len(np.unique(source)) != len(source) or len(np.unique(target)) != len(target):
            raise SimulationError(describe("p2p", "pairs", list(zip(source, target, strict=True)), "must name every rank at most once on each side"))
        target_R[source], size_R[source] = target, nbytes
        return self._pairwise("p2p", target_R, size_R, deps, layer)

    # --- steps -----------------------------------------------------------------------------------

    def _exchange(self, label: str, pairs: np.ndarray, messages: np.ndarray, serial: bool, deps: Sequence[int], layer: int) -> int:
        same = self.node_R[:, None] == self.node_R[None, :]
        moving, far = ~np.eye(len(pairs), dtype=bool), self.leaf_R[:, None] != self.leaf_R[None, :]
        jobs = []
        for link, mine in ((UP, same & moving), (OUT, ~same)):
            nbytes, count = np.where(mine, pairs, 0.0), np.where(mine, messages, 0.0)
            if not nbytes.any():
                continue
            seconds = nbytes * self._seconds_per_byte(link, nbytes / np.maximum(count, 1.0))
            # a NIC fills its share of the uplink and its leaf side by side
            uplink = seconds * (far if link == OUT else False) * self.cluster.fabric_oversubscription
            for way, axis in (("out", 1), ("in", 0)):
                number = count.sum(axis=axis)
                work = self._link(link).latency_s * (number if serial else number > 0) + np.maximum(seconds.sum(axis=axis), uplink.sum(axis=axis))
                jobs.append(Job(port=f"{link}.{way}", work_s=work, side="send" if way == "out" else "recv"))
                self.bytes_R[f"{link}.{way}"] += nbytes.sum(axis=axis)
            self.messages_R[link] += count.sum(axis=1)
        if not jobs:
            jobs = [Job(port=f"{UP}.out", work_s=np.zeros(len(pairs)))]
        return self._add(label, jobs, deps, layer, group_R=np.zeros(len(pairs), dtype=np.int64))

    def _pairwise(self, label: str, target_R: np.ndarray, nbytes_R: np.ndarray, deps: Sequence[int], layer: int) -> list[int]:
        """Add one Op in which every rank sends one message to its target (-1: none)."""
        ranks = np.arange(len(target_R))
        sends = (target_R >= 0) & (target_R != ranks) & (nbytes_R > 0)
        if not sends.any():
            return list(deps)
        source_R = np.full(len(ranks), -1)
        source_R[target_R[sends]] = ranks[sends]
        inside, far = self.node_R[ranks] == self.node_R[target_R], self.leaf_R[ranks] != self.leaf_R[target_R]
        jobs = []
        for link, mine in ((UP, sends & inside), (OUT, sends & ~inside)):
            if not mine.any():
                continue
            out = np.where(mine, self._link(link).latency_s + nbytes_R * self._seconds_per_byte(link, nbytes_R, far & mine), 0.0)
            into = np.zeros(len(ranks))
            into[target_R[mine]] = out[mine]
            jobs += [Job(port=f"{link}.out", work_s=out), Job(port=f"{link}.in", work_s=into, side="recv")]
            self.bytes_R[f"{link}.out"][mine] += nbytes_R[mine]
            self.bytes_R[f"{link}.in"][target_R[mine]] += nbytes_R[mine]
            self.messages_R[link] += mine
        return [self._add(label, jobs, deps, layer, ranks_R=sends | (source_R >= 0), source_R=source_R)]

    def _add(self, label: str, jobs: Sequence[Job], deps: Sequence[int], layer: int, **who: np.ndarray) -> int:
        return self.program.add(Op(label=label, lane=self.lane, jobs=tuple(jobs), deps=tuple(deps), layer=layer, sm_share=self.sm_share, **who))  # type: ignore[arg-type]

    # --- links and groups ------------------------------------------------------------------------

    def _link(self, name: str) -> Link:
        return port_link(self.cluster, name)

    def _seconds_per_byte(self, name: str, message: np.ndarray, far: np.ndarray | bool = False) -> np.ndarray:
        """Return the time of a byte in messages of a size; far: where they leave the leaf, for the NIC."""
        link = self._link(name)
        bandwidth = link.bandwidth_Bps / max(link.shared_by, 1) / np.where(far & (name == OUT), self.cluster.fabric_oversubscription, 1.0)
        curve = link.efficiency
        return 1.0 / (bandwidth * np.interp(np.log(np.maximum(message, 1.0)), np.log(curve.size_bytes), curve.efficiency))

    def _check_group(self, group_R: np.ndarray) -> np.ndarray:
        group = np.asarray(group_R)
        if group.shape != self.node_R.shape or group.min() < -1:
            raise SimulationError(describe("collective", "group_R", group.shape, f"must be [{len(self.node_R)}] with groups >= 0, or -1"))
        return group

    def _check_pairs(self, bytes_RR: np.ndarray) -> np.ndarray:
        pairs = np.asarray(bytes_RR, dtype=np.float64)
        if pairs.shape != (len(self.node_R),) * 2 or not (pairs >= 0).all():
            raise SimulationError(describe("exchange", "bytes_RR", pairs.shape, f"must be [{len(self.node_R)}, {len(self.node_R)}] with bytes >= 0"))
        return pairs

    def _sizes(self, group_R: np.ndarray) -> np.ndarray:
        group = self._check_group(group_R)
        return np.where(group < 0, 1, np.bincount(group + 1)[group + 1])

    def _neighbours(self, group_R: np.ndarray, shift: int) -> np.ndarray:
        target_R = np.full(len(group_R), -1)
        for name in np.unique(group_R[group_R >= 0]):
            members = np.flatnonzero(group_R == name)
            target_R[members] = np.roll(members, -shift)
        return target_R

    def _one_node(self, label: str, group_R: np.ndarray) -> None:
        group = self._check_group(group_R)
        for name in np.unique(group[group >= 0]):
            if len(np.unique(self.node_R[group == name])) > 1:
                raise SimulationError(describe(label, "group", int(name), "spans nodes; in_switch needs one switch", "use two_level"))

    def _levels(self, group_R: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the groups inside nodes, those between devices of equal place, and the devices a node. Every node must have as many."""
        group = self._check_group(group_R)
        inside, between = np.full(len(group), -1), np.full(len(group), -1)
        widths = set()
        for name in np.unique(group[group >= 0]):
            for node in np.unique(self.node_R[group == name]):
                members = np.flatnonzero((group == name) & (self.node_R == node))
                inside[members] = name * self.cluster.num_nodes + node
                between[members] = name * self.cluster.num_ranks + np.arange(len(members))
                widths.add(len(members))
        if len(widths) != 1:
            raise SimulationError(describe("two_level", "group_R", sorted(widths), "members a node must be the same number on every node"))
        return inside, between, widths.pop()

    def _shards(self, need_RK: np.ndarray, owner_K: np.ndarray, bytes_K: np.ndarray) -> np.ndarray:
        need = np.asarray(need_RK, dtype=bool)
        if need.shape != (len(self.node_R), len(owner_K)) or len(owner_K) != len(bytes_K):
            raise SimulationError(describe("sparse collective", "shapes", (need.shape, len(owner_K), len(bytes_K)), "must be [R, K], [K] and [K]"))
        pairs = np.zeros((len(self.node_R),) * 2)
        for rank, shard in np.argwhere(need).tolist():
            pairs[owner_K[shard], rank] += bytes_K[shard]
        np.fill_diagonal(pairs, 0.0)
        return pairs


def _hops(algorithm: str, devices: int, *, assign_RR: np.ndarray | None, copy_RR: np.ndarray | None, node_RN: np.ndarray | None) -> np.ndarray:
    """Return float64 [..., R, R]: copies on every hop from rank to rank in the direction of dispatch, relays included; the diagonal stays local."""
    ports(algorithm, devices, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN)  # checks the arguments
    pairs = np.asarray(assign_RR if algorithm == "low_latency" else copy_RR, dtype=np.float64)
    if algorithm in ("low_latency", "direct"):
        return pairs
    nodes = pairs.shape[-1] // devices
    blocks = pairs.reshape(*pairs.shape[:-2], nodes, devices, nodes, devices)
    result = np.zeros(blocks.shape)
    local = np.einsum("...rr->...r", pairs)
    for a in range(nodes):
        inner = blocks.sum(axis=-4)[..., :, a, :] if algorithm == "normal" else blocks[..., a, :, :, :].sum(axis=-2)
        result[..., a, :, a, :] += inner
        for b in range(nodes):
            if a == b:
                continue
            if algorithm == "normal":
                between = np.asarray(node_RN)[..., a * devices : (a + 1) * devices, b]
            else:
                between = blocks[..., a, :, b, :].sum(axis=-2)
            index = np.arange(devices)
            result[..., a, index, b, index] += between
    flat = result.reshape(pairs.shape)
    index = np.arange(pairs.shape[-1])
    flat[..., index, index] = local
    return flat
