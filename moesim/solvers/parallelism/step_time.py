"""Times of one micro-batch on one stage group, layer by layer, from the cost model.

A layer is attention (all-reduced over tp), then a dense FFN (all-reduced) or gate → dispatch → experts, shared experts → combine. Tokens of a replica are
dealt evenly to its tp ranks, which are the sources of the exchange; shards of an expert gather what their experts receive and reduce what they give.
A group may instead gather all tokens on all ranks and reduce the results (one all-reduce if dp = 1); the faster way is taken. No layer is faster than the
peak rates allow (`floors`). Shapes: n sizes of a micro-batch, L layers, R ranks. Seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import DTYPE_BYTES, MoEModel
from moesim.solvers.parallelism import memory
from moesim.solvers.parallelism.floors import Floors
from moesim.solvers.parallelism.loads import GroupLoads, Placement
from moesim.solvers.parallelism.space import Group
from moesim.solvers.parallelism.workload import Workload

PARTS = ("attention", "all_reduce", "dense_ffn", "gate", "exchange", "experts", "imbalance", "shared_experts", "ends", "floor")
"""Names of the parts of a pass: `imbalance` is what waiting for the busiest rank adds, `ends` embedding and head, `floor` what peak rates add."""


class Costs(Protocol):
    """What the planner asks of a cost model; `moesim.costs.CostModel` is one."""

    def attention(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Any: ...
    def gate(self, tokens: np.ndarray) -> Any: ...
    def experts(self, slot_tokens: np.ndarray, *, slot_mask: np.ndarray | None = None, expert_tp: int = 1) -> Any: ...
    def shared_experts(self, tokens: np.ndarray) -> Any: ...
    def dense_ffn(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def head(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def embedding(self, tokens: np.ndarray) -> Any: ...
    def all_reduce(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def all_gather(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def reduce_scatter(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def p2p(self, nbytes: np.ndarray, *, nodes: int = 1) -> Any: ...
    def exchange(self, algorithm: str, stage: str, *, copies: Any = None) -> Any: ...
    def payload_bytes(self, stage: str) -> float: ...


CostsFactory = Callable[[Cluster, MoEModel], Costs]


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """One micro-batch of n sizes through the layers of a group."""

    layer_nL: np.ndarray
    first_n: np.ndarray
    """Seconds of the first stage beside its layers: the embedding."""
    last_n: np.ndarray
    """Seconds of the last stage beside its layers: final norm and head."""
    hop_n: tuple[np.ndarray, np.ndarray]
    """Seconds to hand the hidden states to the next stage, in the node and to another."""
    parts: dict[str, np.ndarray] = field(default_factory=dict)
    """Name of `PARTS` → float64 [n], all layers; together they are the pass without hops."""

    @property
    def total_n(self) -> np.ndarray:
        """float64 [n]: all layers and both ends."""
        return np.asarray(self.layer_nL.sum(axis=1) + self.first_n + self.last_n)


def nodes_of(ranks: int, cluster: Cluster) -> int:
    """Return how many nodes a run of neighbouring ranks covers."""
    return max(1, ranks // cluster.devices_per_node)


class StepTimer:
    """Evaluates groups; what depends on few of the degrees is computed once."""

    def __init__(self, model: MoEModel, cluster: Cluster, workload: Workload, costs: Costs, placement: Placement) -> None:
        self.model, self.cluster, self.workload, self.costs = model, cluster, workload, costs
        self.calls = 0
        """Group and phase pairs that were evaluated."""
        self.clamped = 0
        """Layer times that a floor has raised."""
        self._placement = placement
        self._assign_LE = workload.assign_LE(model)
        self._bytes = DTYPE_BYTES[model.dtype]
        self._cache: dict[Hashable, Any] = {}
        self.floors = Floors(model, cluster, workload)

    def loads(self, group: Group) -> GroupLoads | None:
        """Return the loads of a group; None for a dense model."""
        if not self.model.moe_layer_ids:
            return None
        return self._once(
            ("loads", group.ep, group.expert_tp, group.slots),
            lambda: GroupLoads(
                self._assign_LE,
                self.model.top_k,
                group,
                devices_per_node=self.cluster.devices_per_node,
                placement=self._placed,
            ),
        )

    def _placed(self, load_LE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
        # Shards of an expert lie where it lies: groups with equal ranks and slots share a placement.
        return self._once(("placement", ranks, slots), lambda: self._placement(load_LE, ranks, slots))

    def floor(self, group: Group, phase: str, sequences_n: np.ndarray) -> PassTimes:
        """Return the least times that peak rates allow; no cost model is asked."""
        return self._once(("floor", group, phase, sequences_n.tobytes()), lambda: self._floor(group, phase, sequences_n))

    def __call__(self, group: Group, phase: str, sequences_n: np.ndarray) -> PassTimes:
        """Return the times of micro-batches with `sequences_n` sequences on every attention replica; phase: `prefill` (whole prompts) or `decode`."""
        return self._once(("pass", group, phase, sequences_n.tobytes()), lambda: self._evaluate(group, phase, sequences_n))

    def handover_s(self, tp: int, pp: int) -> float:
        """Return the seconds in which the devices of a prefill instance, side by side, hand one prompt's KV cache to the decode pool."""
        nbytes = memory.kv_L(self.model, tp, self.workload.prompt_tokens).sum() / pp
        nodes = 2 if self.cluster.num_nodes > 1 else 1
        return float(self._seconds(("handover", tp, pp), lambda: self.costs.p2p(np.array([nbytes]), nodes=nodes))[0])

    # --- evaluation -----------------------------------------------------------------------------------------------

    def _floor(self, group: Group, phase: str, sequences: np.ndarray) -> PassTimes:
        layers, last = self.floors(group, phase, sequences, self.loads(group))
        zero = np.zeros(len(sequences))
        return PassTimes(layer_nL=layers, first_n=zero, last_n=last, hop_n=(zero, zero))

    def _evaluate(self, group: Group, phase: str, sequences: np.ndarray) -> PassTimes:
        self.calls += 1
        model, tp, moe_ids = self.model, group.tp, list(self.model.moe_layer_ids)
        each = self.workload.prompt_tokens if phase == "prefill" else 1
        tokens = sequences * float(each)
        zero = np.zeros(len(sequences))
        hidden = tokens * (model.hidden_size * self._bytes)
        per_rank = np.ceil(tokens / tp)
        key = (sequences.tobytes(), each)
        attention = self._seconds(("attention", phase, tp, key), lambda: self._attention(phase, sequences, tokens, tp))
        reduce = self._seconds(("all_reduce", tp, key), lambda: self.costs.all_reduce(hidden, tp, nodes=nodes_of(tp, self.cluster))) if tp > 1 else zero
        parts = {name: zero.copy() for name in PARTS}
        count, moe_count = model.num_layers, len(moe_ids)
        dense_layer = attention + reduce
        if moe_count < count:
            dense = self._seconds(("dense", tp, key), lambda: self.costs.dense_ffn(tokens, tp=tp))
            dense_layer = dense_layer + dense + reduce
            parts["dense_ffn"] += dense * (count - moe_count)
        layers = np.repeat(dense_layer[:, None], count, axis=1)
        parts["attention"] += attention * count
        parts["all_reduce"] += reduce * (count + (count - moe_count))
        if moe_ids:
            gate = self._seconds(("gate", tp, key), lambda: self.costs.gate(per_rank))
            shared = self._seconds(("shared", tp, key), lambda: self.costs.shared_experts(per_rank)) if model.num_shared_experts else zero
            moe = self._moe(group, phase, tokens, shared)
            layers[:, moe_ids] = (attention + reduce + gate)[:, None] + moe.pop("total")
            parts["gate"] += gate * moe_count
            parts["shared_experts"] += shared * moe_count
            for name, seconds_nL in moe.items():
                parts[name] += np.broadcast_to(seconds_nL, (len(sequences), seconds_nL.shape[1])).mean(axis=1) * moe_count
        first = self._seconds(("embedding", tp, key), lambda: self.costs.embedding(tokens))
        last = self._seconds(("head", tp, key), lambda: self.costs.head(sequences, tp=tp))
        floor = self.floor(group, phase, sequences)
        self.clamped += int((floor.layer_nL > layers).sum() + (floor.last_n > last).sum())
        raised = np.maximum(layers, floor.layer_nL)
        raised_last = np.maximum(last, floor.last_n)
        parts["ends"] += first + last
        parts["floor"] += (raised - layers).sum(axis=1) + raised_last - last
        sent = hidden / tp
        near = self._seconds(("p2p", 1, tp, key), lambda: self.costs.p2p(sent, nodes=1)) if self.cluster.num_ranks > 1 else zero
        far = self._seconds(("p2p", 2, tp, key), lambda: self.costs.p2p(sent, nodes=2)) if self.cluster.num_nodes > 1 else near
        return PassTimes(layer_nL=raised, first_n=first, last_n=raised_last, hop_n=(near, far), parts=parts)

    def _attention(self, phase: str, sequences: np.ndarray, tokens: np.ndarray, tp: int) -> Any:
        context = self.workload.prompt_tokens if phase == "prefill" else self.workload.decode_context
        return self.costs.attention(phase=phase, sequences=sequences, new_tokens=tokens, context=np.full(len(sequences), float(context)), tp=tp)

    def _moe(self, group: Group, phase: str, tokens: np.ndarray, shared: np.ndarray) -> dict[str, np.ndarray]:
        """Return dispatch to combine, [n, L]: `total` and its parts `exchange`, `experts`, `imbalance`; shared experts are in the total."""
        # What happens between gate and combine depends on the tokens of a rank, not on how attention is split: each such load is evaluated once.
        rows: dict[float, np.ndarray] = self._once(("moe", group.ranks, group.ep, group.expert_tp, group.slots, phase), dict)
        each = (tokens / group.tp).tolist()
        fresh = [index for index, one in enumerate(each) if one not in rows]
        if fresh:
            found = self._moe_times(group, phase, tokens[fresh] * group.dp, shared[fresh])
            rows.update((each[index], found[:, at]) for at, index in enumerate(fresh))
        exchanged, busiest, mean = np.stack([rows[one] for one in each], axis=1)
        own = shared[:, None]
        total = busiest + own
        if group.ranks > 1:
            total = np.minimum(exchanged, self._gather(group, tokens * group.dp)[:, None] + total)
        return {"total": total, "exchange": total - busiest - own, "experts": mean, "imbalance": busiest - mean}

    def _moe_times(self, group: Group, phase: str, all_tokens: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Return [3, n, L]: from the start of dispatch to the end of combine, the busiest rank's experts, and the mean rank's."""
        loads = self.loads(group)
        assert loads is not None
        slot_tokens = loads.slot_tokens(all_tokens)
        experts = np.asarray(self.costs.experts(slot_tokens, expert_tp=group.expert_tp).seconds)
        busiest, mean = experts.max(axis=2), experts.mean(axis=2)
        exchanged = np.full(busiest.shape, np.inf)
        if group.ep > 1:
            compute = np.repeat(experts, group.expert_tp, axis=2) + shared[:, None, None]
            exchanged = self._exchange(group, phase, loads, all_tokens, slot_tokens, compute)
        return np.stack([exchanged, busiest, mean])

    def _gather(self, group: Group, all_tokens: np.ndarray) -> np.ndarray:
        """Return the time to have all tokens on all ranks and to sum the results."""
        nbytes, nodes = all_tokens * (self.model.hidden_size * self._bytes), nodes_of(group.ranks, self.cluster)
        if group.dp == 1:
            return np.asarray(self.costs.all_reduce(nbytes, group.ranks, nodes=nodes).seconds)
        there = self.costs.all_gather(nbytes, group.ranks, nodes=nodes).seconds
        return np.asarray(there + self.costs.reduce_scatter(nbytes, group.ranks, nodes=nodes).seconds)

    def _exchange(self, group: Group, phase: str, loads: GroupLoads, all_tokens: np.ndarray, slot_tokens: np.ndarray, compute_nLR: np.ndarray) -> np.ndarray:
        """Return [n, L]: when the last rank has its tokens back; a rank sends when it is ready and has received when the last one has sent."""
        algorithm = "normal" if phase == "prefill" else "low_latency"
        copies = loads.ports(algorithm, all_tokens / group.ranks)
        dispatch = self.costs.exchange(algorithm, "dispatch", copies=copies)
        arrived = np.maximum(dispatch.send_s, dispatch.recv_s)
        if group.expert_tp > 1:
            # Every shard receives its share of what the expert gets, and the shards of an expert work on all of it.
            received = slot_tokens.sum(axis=3).max(axis=2).astype(np.float64)
            nodes = nodes_of(group.expert_tp, self.cluster)
            gather = self.costs.all_gather(received * self.costs.payload_bytes("dispatch"), group.expert_tp, nodes=nodes).seconds
            scatter = self.costs.reduce_scatter(received * self.costs.payload_bytes("combine"), group.expert_tp, nodes=nodes).seconds
            arrived = arrived + np.asarray(gather + scatter)[:, :, None]
        ready = arrived + compute_nLR
        combine = self.costs.exchange(algorithm, "combine", copies=copies)
        back = np.maximum(ready + combine.send_s, ready.max(axis=2, keepdims=True) + combine.recv_s)
        return np.asarray(back.max(axis=2))

    def _seconds(self, key: Hashable, make: Callable[[], Any]) -> np.ndarray:
        return self._once(key, lambda: np.asarray(make().seconds, dtype=np.float64))

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]
