"""Times of one micro-batch on one stage group, layer by layer: the step-time model that planner and serving simulation share.

A layer is attention (all-reduced over tp), then a dense FFN (all-reduced) or gate → dispatch → experts, shared experts → combine. Tokens of a replica are
dealt evenly to its tp ranks, which are the sources of the exchange; shards of an expert gather what their experts receive and reduce what they give.
A group may instead gather all tokens on all ranks and reduce the results (one all-reduce if dp = 1); some kernels then handle the choices of other ranks'
experts too. The faster way is taken. Groups that only gather deal nothing: every tp rank routes all tokens of its replica, and shared experts are split over
tp as a dense FFN is. In a batch of both phases projections and FFNs see all tokens at once, scores are those of both phases times what one kernel for both
costs, and the exchange is that of prefill.
Dense products take no less than reading their weights from memory takes: tables of repeated products of one small matrix have it in the cache.
Shapes: n micro-batches, L layers, R ranks. Seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from moesim.costs.group import Group, nodes_of
from moesim.costs.group_loads import GroupLoads, Placement
from moesim.costs.mixed import MixedBatches
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import DTYPE_BYTES, MoEModel

PARTS = ("attention", "all_reduce", "dense_ffn", "gate", "exchange", "experts", "imbalance", "shared_experts", "ends", "floor")
"""Names of the parts of a pass: `imbalance` is what waiting for the busiest rank adds, `ends` embedding and head, `floor` what peak rates add."""


DRAWS = 32
"""Batches that are drawn for one time, all layers together, where choices are random."""


class Costs(Protocol):
    """What a step asks of a cost model; `moesim.costs.CostModel` is one."""

    @property
    def weight_Bps(self) -> float: ...
    def attention_projections(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def attention_core(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Any: ...
    def mixed_factor(self, *, chunk: np.ndarray, prefix: np.ndarray, decodes: np.ndarray, context: np.ndarray, tp: int = 1) -> np.ndarray: ...
    def mixed_batches(self, tp: int = 1) -> MixedBatches | None: ...
    def gate(self, tokens: np.ndarray) -> Any: ...
    def experts(self, slot_tokens: np.ndarray, *, slot_mask: np.ndarray | None = None, expert_tp: int = 1) -> Any: ...
    def masked_rows(self, tokens: np.ndarray, ranks: int, expert_tp: int = 1) -> np.ndarray: ...
    def shared_experts(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def dense_ffn(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def head(self, tokens: np.ndarray, tp: int = 1) -> Any: ...
    def sampling(self, sequences: np.ndarray) -> Any: ...
    def embedding(self, tokens: np.ndarray) -> Any: ...
    def all_reduce(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def all_gather(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def reduce_scatter(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Any: ...
    def p2p(self, nbytes: np.ndarray, *, nodes: int = 1) -> Any: ...
    def exchange(self, algorithm: str, stage: str, *, copies: Any = None) -> Any: ...
    def payload_bytes(self, stage: str) -> float: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What every attention replica of a group carries in n micro-batches; arrays float64 [n]."""

    prefill_seqs_n: np.ndarray
    prefill_tokens_n: np.ndarray
    """New prompt tokens in all."""
    prefill_context_n: np.ndarray
    """Mean KV length of these sequences, the new tokens included."""
    decode_seqs_n: np.ndarray
    decode_tokens_n: np.ndarray
    """One per sequence, more where drafts are verified."""
    decode_context_n: np.ndarray
    """Mean KV length, the new token included."""

    @classmethod
    def of(cls, phase: str, sequences_n: np.ndarray, tokens_each: float, context: float) -> Batch:
        """Return batches of one phase and of equal sequences."""
        none = np.zeros(len(sequences_n))
        full = (sequences_n, sequences_n * tokens_each, np.full(len(sequences_n), context))
        names = [f"{kind}_{what}_n" for kind in ("prefill", "decode") for what in ("seqs", "tokens", "context")]
        values = (*full, none, none, none) if phase == "prefill" else (none, none, none, *full)
        return cls(**dict(zip(names, values, strict=True)))

    @property
    def tokens_n(self) -> np.ndarray:
        """All new tokens."""
        return self.prefill_tokens_n + self.decode_tokens_n

    @property
    def phase(self) -> str:
        """`prefill`, `decode` or `mixed`."""
        if not self.prefill_tokens_n.any():
            return "decode"
        return "mixed" if self.decode_tokens_n.any() else "prefill"

    @property
    def key(self) -> tuple[bytes, ...]:
        """Equal for equal batches."""
        return tuple(getattr(self, name).tobytes() for name in self.__dataclass_fields__)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTimes:
    """What follows from the tokens of a replica alone, float64 [n]: seconds of one layer, and of the embedding."""

    reduce_n: np.ndarray
    """One all-reduce of the hidden states over tp."""
    dense_n: np.ndarray
    gate_n: np.ndarray
    shared_n: np.ndarray
    embedding_n: np.ndarray


class StepModel:
    """Evaluates groups; what depends on few of the degrees is computed once."""

    def __init__(
        self,
        model: MoEModel,
        cluster: Cluster,
        costs: Costs,
        assign_LE: np.ndarray,
        placement: Placement,
        *,
        draw_seed: int | None = None,
        all2all: str = "auto",
    ) -> None:
        """assign_LE: expected choices of every expert by one token, [MoE layers or 1, E]; its rows sum to top_k. placement: where experts lie.
        draw_seed: experts' times are means over random draws of a batch's choices; None: every slot has its expected tokens.
        all2all: how tokens reach their experts: `exchange`, `gather`, or `auto`, the faster of both.
        """
        self.model, self.cluster, self.costs = model, cluster, costs
        self._placement = placement
        self._assign_LE = assign_LE
        self._draw_seed, self._all2all = draw_seed, all2all
        self._bytes = DTYPE_BYTES[model.dtype]
        self._cache: dict[Hashable, Any] = {}

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

    def times(self, group: Group, batch: Batch) -> PassTimes:
        """Return the times of micro-batches of which every attention replica carries `batch`."""
        model, moe_ids = self.model, list(self.model.moe_layer_ids)
        tokens, key = batch.tokens_n, batch.key
        attention = self._once(("attention", group.tp, key), lambda: self.attention(batch, group.tp))
        dense = self.by_tokens(group, tokens)
        parts = {name: np.zeros(len(tokens)) for name in PARTS}
        count, moe_count = model.num_layers, len(moe_ids)
        layers = np.repeat((attention + dense.reduce_n + dense.dense_n)[:, None], count, axis=1)
        parts["attention"] += attention * count
        parts["all_reduce"] += dense.reduce_n * (2 * count - moe_count)
        if moe_count < count:
            layers += dense.reduce_n[:, None]
            parts["dense_ffn"] += dense.dense_n * (count - moe_count)
        if moe_ids:
            moe = self.moe(group, "decode" if batch.phase == "decode" else "prefill", tokens)
            layers[:, moe_ids] = (attention + dense.reduce_n + dense.gate_n)[:, None] + moe.pop("total")
            parts["gate"] += dense.gate_n * moe_count
            parts["shared_experts"] += dense.shared_n * moe_count
            for name, seconds_nL in moe.items():
                parts[name] += np.broadcast_to(seconds_nL, (len(tokens), seconds_nL.shape[1])).mean(axis=1) * moe_count
        last = self.head(batch.prefill_seqs_n + batch.decode_tokens_n, group.tp)
        parts["ends"] += dense.embedding_n + last
        near, far = self.hops(group.tp, tokens)
        return PassTimes(layer_nL=layers, first_n=dense.embedding_n, last_n=last, hop_n=(near, far), parts=parts)

    # --- parts ----------------------------------------------------------------------------------------------------

    def attention(self, batch: Batch, tp: int) -> np.ndarray:
        """Return float64 [n]: one layer's attention block."""
        total = np.zeros(len(batch.tokens_n))
        for phase in ("prefill", "decode"):
            seqs, tokens, context = (getattr(batch, f"{phase}_{name}_n") for name in ("seqs", "tokens", "context"))
            if tokens.any():
                total = total + np.asarray(self.costs.attention_core(phase=phase, sequences=seqs, new_tokens=tokens, context=context, tp=tp).seconds)
        if batch.phase == "mixed":
            prefix = np.maximum(batch.prefill_context_n - batch.prefill_tokens_n / np.maximum(batch.prefill_seqs_n, 1.0), 0.0)
            total = total * self.costs.mixed_factor(
                chunk=batch.prefill_tokens_n, prefix=prefix, decodes=batch.decode_tokens_n, context=batch.decode_context_n, tp=tp
            )
        return total + self.projections(batch.tokens_n, tp)

    def projections(self, tokens: np.ndarray, tp: int) -> np.ndarray:
        """Return float64 [n]: what of one layer's attention block follows from its tokens alone (for MLA, whose tables hold the block, the norm)."""
        found = np.asarray(self.costs.attention_projections(tokens, tp).seconds, dtype=np.float64)
        return found if self.model.attention.kind == "mla" else self._read(found, tokens, sizes.attention_weight_bytes(self.model, tp))

    def _read(self, seconds: np.ndarray, tokens: np.ndarray, nbytes: float) -> np.ndarray:
        """Return times held above that of reading weights."""
        return np.where(tokens > 0, np.maximum(seconds, nbytes / self.costs.weight_Bps), seconds)

    def by_tokens(self, group: Group, tokens: np.ndarray) -> TokenTimes:
        """Return what follows from the tokens [n] of a replica alone, whatever their phase."""
        dealt = self._all2all != "gather" and group.ep > 1
        return self._once(("by_tokens", group.tp, dealt, tokens.tobytes()), lambda: self._by_tokens(group.tp, tokens, dealt))

    def _by_tokens(self, tp: int, tokens: np.ndarray, dealt: bool) -> TokenTimes:
        model, costs, zero = self.model, self.costs, np.zeros(len(tokens))
        per_rank, hidden = np.ceil(tokens / tp) if dealt else tokens, tokens * (model.hidden_size * self._bytes)

        def seconds(timed: Any) -> np.ndarray:
            return np.asarray(timed.seconds, dtype=np.float64)

        moe = bool(model.moe_layer_ids)
        return TokenTimes(
            reduce_n=seconds(costs.all_reduce(hidden, tp, nodes=nodes_of(tp, self.cluster))) if tp > 1 else zero,
            dense_n=self._read(seconds(costs.dense_ffn(tokens, tp=tp)), tokens, sizes.dense_ffn_bytes(model, tp))
            if len(model.moe_layer_ids) < model.num_layers
            else zero,
            gate_n=seconds(costs.gate(per_rank)) if moe else zero,
            shared_n=seconds(costs.shared_experts(per_rank, tp=1 if dealt else tp)) if moe and model.num_shared_experts else zero,
            embedding_n=seconds(costs.embedding(tokens)),
        )

    def head(self, positions: np.ndarray, tp: int) -> np.ndarray:
        """Return float64 [n]: final norm, head and sampling for `positions` [n] tokens of a replica."""
        return self._once(("head", tp, positions.tobytes()), lambda: self._head(positions, tp))

    def _head(self, positions: np.ndarray, tp: int) -> np.ndarray:
        weights = sizes.embedding_bytes(self.model, tp) / (1 if self.model.tie_embeddings else 2)
        product = self._read(np.asarray(self.costs.head(positions, tp=tp).seconds, dtype=np.float64), positions, weights)
        return product + np.asarray(self.costs.sampling(positions).seconds, dtype=np.float64)

    def hops(self, tp: int, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 [n] twice: handing hidden states to the next stage, in the node and to another; all ranks send their part side by side."""
        sent = tokens * (self.model.hidden_size * self._bytes) / tp
        key = sent.tobytes()
        near = self._seconds(("p2p", 1, key), lambda: self.costs.p2p(sent, nodes=1)) if self.cluster.num_ranks > 1 else np.zeros(len(tokens))
        return near, self._seconds(("p2p", 2, key), lambda: self.costs.p2p(sent, nodes=2)) if self.cluster.num_nodes > 1 else near

    def moe(self, group: Group, phase: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return dispatch to combine, [n, L]: `total` and its parts `exchange`, `experts`, `imbalance`; shared experts are in the total."""
        shared = self.by_tokens(group, tokens).shared_n
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
            masked = self.costs.masked_rows(tokens * group.dp, group.ep, group.expert_tp)[:, None]
            gathered = self._gather(group, tokens * group.dp)[:, None] + masked + total
            # Shards of one expert have nothing to exchange.
            only = self._all2all == "gather" or group.ep == 1
            gathers = np.array(only) if only or self._all2all == "exchange" else gathered <= exchanged
            total = np.where(gathers, gathered, exchanged)
            mean, busiest = mean + gathers * masked, busiest + gathers * masked
        return {"total": total, "exchange": total - busiest - own, "experts": mean, "imbalance": busiest - mean}

    def _moe_times(self, group: Group, phase: str, all_tokens: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Return [3, n, L]: from the start of dispatch to the end of combine, the busiest rank's experts, and the mean rank's."""
        loads = self.loads(group)
        assert loads is not None
        slot_tokens = loads.slot_tokens(all_tokens)
        # Both phases load the experts alike.
        rows: dict[float, tuple[np.ndarray, np.ndarray]] = self._once(("experts", group.ep, group.expert_tp, group.slots), dict)
        fresh = [index for index, one in enumerate(all_tokens.tolist()) if one not in rows]
        if fresh:
            found = self._expert_times(group, loads, all_tokens[fresh], slot_tokens[fresh])
            rows.update((float(all_tokens[index]), (found[0][at], found[1][at])) for at, index in enumerate(fresh))
        each, busiest = (np.stack([rows[one][part] for one in all_tokens.tolist()]) for part in (0, 1))
        exchanged = np.full(busiest.shape, np.inf)
        if group.ep > 1 and self._all2all != "gather":
            compute = np.repeat(each, group.expert_tp, axis=2) + shared[:, None, None]
            # The busiest rank of a draw is not always the same one.
            exchanged = self._exchange(group, phase, loads, all_tokens, slot_tokens, compute) + busiest - each.max(axis=2)
        return np.stack([exchanged, busiest, each.mean(axis=2)])

    def _expert_times(self, group: Group, loads: GroupLoads, all_tokens: np.ndarray, slot_tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the times of routed experts: [n, L, X] of every rank, and [n, L] of the busiest one."""
        if self._draw_seed is None:
            each = np.asarray(self.costs.experts(slot_tokens, expert_tp=group.expert_tp).seconds)
            return each, each.max(axis=2)
        draws, layers = -(-DRAWS // len(loads.slot_LS)), len(loads.slot_LS)
        whole = np.ceil(all_tokens)
        # A generator per number of tokens: what is drawn for it does not depend on the numbers it is asked with.
        generators = [np.random.Generator(np.random.PCG64([self._draw_seed, int(count)])) for count in whole]
        drawn = np.concatenate([loads.drawn_slot_tokens(whole[[index]], one, draws) for index, one in enumerate(generators)])
        of_draw = np.asarray(self.costs.experts(drawn, expert_tp=group.expert_tp).seconds).reshape(len(whole), draws, layers, group.ep)
        return of_draw.mean(axis=1), of_draw.max(axis=3).mean(axis=1)

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
