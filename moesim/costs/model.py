"""The cost model of one model on one cluster: every operator's time, with the class of each number.

Arrays in, `Timing` out, any leading shape; no work takes no time. Tables of the cluster's device come first, then models calibrated on them, then the
roofline; `strict` refuses what is worse than a recorded duration. One object serves one replay: what it read and fitted is kept.
Shapes: R ranks, N nodes, C slots of a rank (padded).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from moesim.costs.attention import AttentionCost
from moesim.costs.exchange import ExchangeCost, ExchangeTiming
from moesim.costs.experts import ExpertCost
from moesim.costs.gemm import Gemm
from moesim.costs.links import LinkModel
from moesim.costs.mixed import MixedBatches, factor_of
from moesim.costs.provenance import Policy, Timing, timing, total, zero_where
from moesim.costs.provenance import Provenance as Provenance
from moesim.costs.roofline import Roofline
from moesim.costs.stages import StageCost
from moesim.costs.tables import Tables
from moesim.costs.traffic import Ports
from moesim.errors import CostError, describe
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import DTYPE_BYTES, MoEModel

ENGINES = ("sglang", "trtllm", "vllm")


class CostModel:
    """Operator and collective times of `model` on `cluster`."""

    def __init__(self, cluster: Cluster, model: MoEModel, *, strict: bool = False, backend: str = "sglang", expert_kernel: str = "") -> None:
        """Prepare the costs; tables are read when an operator first needs them.

        strict: raise CostError, naming operator, table and missing key, instead of using a class worse than `TRACE`.
        backend: the serving engine whose tables are preferred, one of `ENGINES`. expert_kernel: part of the name of the experts' kernels, where it is
        known that others than the engine's usual ones ran.
        """
        if backend not in ENGINES:
            raise CostError(describe("costs", "backend", backend, f"must be one of {', '.join(ENGINES)}"))
        self.cluster = cluster
        self.model = model
        self._policy = Policy(strict=strict, place=cluster.name)
        tables = self._tables = Tables(cluster, backend)
        self._bytes = DTYPE_BYTES.get(model.dtype, 2.0)
        self._linear = _linear_dtype(model)
        self.roofline = Roofline(cluster, tables, self._policy)
        self.gemm = Gemm(tables, self.roofline, self._policy)
        self.links = LinkModel(cluster, tables, self._policy, backend)
        self._stages = StageCost(model, tables)
        self._attention = AttentionCost(model, tables, self.gemm, self.roofline, self._policy, self._linear)
        self._experts = ExpertCost(model, tables, self.roofline, self._policy, expert_kernel)
        self._exchange = ExchangeCost(model, cluster.devices_per_node, tables, self.links, self._policy, self.roofline.reached_Bps)

    @property
    def strict(self) -> bool:
        """Whether times worse than recorded ones are refused."""
        return self._policy.strict

    @property
    def fallbacks(self) -> Mapping[str, str]:
        """Operator → table and key that were missing, for the operators used so far."""
        return dict(self._policy.taken)

    # --- dense operators --------------------------------------------------------------------------------------

    def attention(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Timing:
        """Return the time of ONE layer's attention block: norm, projections, core attention, output projection.

        phase: `prefill` or `decode`. sequences, new_tokens, context [...]: per rank, sequences in the batch, their new tokens in all, and the mean
        KV length with the new tokens. tp: ranks that share the heads. Raises CostError if tp does not divide the heads.
        """
        found = self._stages.attention(phase, sequences, new_tokens, context) if tp == 1 else None
        return self._attention(phase=phase, sequences=sequences, new_tokens=new_tokens, context=context, tp=tp) if found is None else found

    def attention_projections(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        """Return the part of `attention` that depends on the tokens alone; a batch of both phases has it once."""
        return self._attention.projections(_float(tokens), tp)

    def attention_before_scores(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        """Return the part of `attention` of a decode batch that comes before its scores."""
        return self._attention.before_scores(_float(tokens), tp)

    def attention_core(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Timing:
        """Return the rest of `attention`, which depends on phase and context; arguments as there."""
        return self._attention.core_of(phase, sequences, new_tokens, context, tp)

    def mixed_factor(self, *, chunk: np.ndarray, prefix: np.ndarray, decodes: np.ndarray, context: np.ndarray, tp: int = 1) -> np.ndarray:
        """Return what `attention_core` of both phases together is to be multiplied by where one batch has both, 1 where no table of the device tells.

        chunk, prefix [...]: new prompt tokens in all, and mean KV length before them; decodes, context [...]: decoding tokens and their mean KV length.
        """
        return factor_of(self.mixed_batches(tp), _float(chunk), _float(prefix), _float(decodes), _float(context))

    def mixed_batches(self, tp: int = 1) -> MixedBatches | None:
        """Return the table behind `mixed_factor`, for single batches; None where no table of the device tells."""
        return self._attention.mixed_batches(tp)

    def gate(self, tokens: np.ndarray, experts: int | None = None) -> Timing:
        """Return the time of norm, router GEMM and top-k for `tokens` [...] tokens in a layer with so many experts (None: E)."""
        tokens = _float(tokens)
        model = self.model
        experts = model.num_experts if experts is None else experts
        found = self._stages("gate", tokens) if experts == model.num_experts else None
        if found is not None:
            return found
        scores = self.gemm("gate", tokens, max(experts, 1), model.hidden_size, "bfloat16" if self._bytes <= 2 else model.dtype)
        choose = self.roofline.stream("top_k", tokens * (8.0 * experts + 8.0 * model.top_k))
        return total(self._norm(tokens), scores, choose)

    def experts(self, slot_tokens: np.ndarray, *, slot_mask: np.ndarray | None = None, expert_tp: int = 1, rows: np.ndarray | None = None) -> Timing:
        """Return the time of the routed experts of every rank.

        slot_tokens [..., R, C]: tokens of every slot. slot_mask [R, C] or [..., R, C], True where the slot exists (None: all do). expert_tp: ranks
        that share one expert. rows [..., R]: distinct tokens that reach every rank, where they come once each (high-throughput exchanges) and are
        copied to their experts there; None: they come sorted.
        """
        tokens = np.asarray(slot_tokens)
        present = None if slot_mask is None else np.broadcast_to(np.asarray(slot_mask, dtype=bool), tokens.shape)
        law = self._experts.law(expert_tp, tokens.shape[-1], sorts=rows is not None)
        timed = law(tokens, present)
        return timed if rows is None or not law.row_s else Timing(seconds=timed.seconds + law.row_s * rows, provenance=timed.provenance)

    def masked_rows(self, tokens: np.ndarray, ranks: int, expert_tp: int = 1) -> np.ndarray:
        """Return the seconds that a rank's experts take longer over `tokens` [n] gathered from all `ranks` than over its own choices of them alone."""
        return self._experts.masked_seconds(_float(tokens), ranks, expert_tp)

    def shared_experts(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        """Return the time of the shared experts of a layer for `tokens` [...] tokens, split over `tp` ranks; 1: each rank has all for tokens of its own."""
        found = self._stages("shared_experts", _float(tokens)) if tp == 1 else None
        return self._ffn("shared_experts", _float(tokens), -(-self.model.shared_ffn_size // tp)) if found is None else found

    def dense_ffn(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        """Return the time of a dense layer's norm and FFN, split over `tp` ranks."""
        tokens = _float(tokens)
        if self.model.dense_ffn_size <= 0:
            return timing(np.zeros(tokens.shape), Provenance.MEASURED)
        found = self._stages("dense_ffn", tokens) if tp == 1 else None
        return total(self._norm(tokens), self._ffn("dense_ffn", tokens, -(-self.model.dense_ffn_size // tp))) if found is None else found

    def head(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        """Return the time of the final norm and the LM head for `tokens` positions, the vocabulary split over `tp` ranks."""
        tokens = _float(tokens)
        found = self._stages("head", tokens) if tp == 1 else None
        if found is not None:
            return found
        dtype = "bfloat16" if self._bytes <= 2 else self.model.dtype
        return total(self._norm(tokens), self.gemm("head", tokens, -(-self.model.vocab_size // tp), self.model.hidden_size, dtype))

    def sampling(self, sequences: np.ndarray) -> Timing:
        """Return the time of sampling the next token of `sequences` [...] sequences from their logits."""
        return self.roofline.sampling(_float(sequences), self.model.vocab_size)

    @cached_property
    def weight_Bps(self) -> float:
        """Highest bytes/s at which a measured product has read weights twice as large as the last-level cache; the memory's peak where no table tells.

        Repeated products of a small matrix find it in the cache, those of a model's layers, one after another, do not.
        """
        peak, cache = self.roofline.memory_Bps, self.cluster.device.l2_bytes
        rows = self._tables.rows("gemm", "m", "n", "k", "latency_s", where={"gemm_dtype": "bfloat16"}, transfer=False) if cache else None
        if rows is None:
            return peak
        moved = 2.0 * rows["n"].astype(np.float64) * rows["k"]
        large = (moved >= 2.0 * float(cache or 0.0)) & (rows["m"] <= 16)
        return min(float((moved[large] / rows["latency_s"][large]).max()), peak) if large.any() else peak

    def embedding(self, tokens: np.ndarray) -> Timing:
        """Return the time of looking up `tokens` embeddings."""
        found = self._stages("embedding", _float(tokens))
        return self.roofline.stream("embedding", 2.0 * _float(tokens) * self.model.hidden_size * self._bytes) if found is None else found

    def _norm(self, tokens: np.ndarray) -> Timing:
        return self.roofline.stream("norm", 3.0 * tokens * self.model.hidden_size * self._bytes)

    def _ffn(self, operator: str, tokens: np.ndarray, width: int) -> Timing:
        if width <= 0:
            return timing(np.zeros(tokens.shape), Provenance.MEASURED)
        up = 2 if self.model.gated_ffn else 1
        parts = (
            self.gemm(f"{operator}.up", tokens, up * width, self.model.hidden_size, self._linear),
            self.roofline.stream(f"{operator}.activation", tokens * (up + 1.0) * width * self._bytes),
            self.gemm(f"{operator}.down", tokens, self.model.hidden_size, width, self._linear),
        )
        return zero_where(total(*parts), tokens <= 0)

    # --- communication ----------------------------------------------------------------------------------------

    def all_reduce(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        """Return the time to sum tensors of `nbytes` [...] over `ranks` devices on `nodes` nodes."""
        return self.links.collective("all_reduce", nbytes, ranks, nodes)

    def all_gather(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        """Return the time until every device holds the `nbytes` [...] that all hold together."""
        return self.links.collective("all_gather", nbytes, ranks, nodes)

    def reduce_scatter(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        """Return the time to sum tensors of `nbytes` [...] and leave each device its share."""
        return self.links.collective("reduce_scatter", nbytes, ranks, nodes)

    def p2p(self, nbytes: np.ndarray, *, nodes: int = 1) -> Timing:
        """Return the time of one message of `nbytes` [...] between two devices of a node (nodes = 1) or of two nodes (2)."""
        return self.links.p2p(nbytes, nodes)

    def tier_copy(self, tier: str, nbytes: np.ndarray) -> Timing:
        """Return the time of one copy of `nbytes` [...] between a memory tier of the node and a device, which gets an equal part of what devices share."""
        source = self.cluster.tiers[tier]
        return self.links.tier_copy(source.link or "host", nbytes, source.read_Bps / (self.cluster.devices_per_node if source.shared else 1))

    def copies(self, algorithm: str, *, assign_RR: np.ndarray | None = None, copy_RR: np.ndarray | None = None, node_RN: np.ndarray | None = None) -> Ports:
        """Return the token copies on every port in the direction of dispatch, to be given to `exchange` for both of its stages."""
        return self._exchange.copies(algorithm, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN)

    def exchange(
        self,
        algorithm: str,
        stage: str,
        *,
        assign_RR: np.ndarray | None = None,
        copy_RR: np.ndarray | None = None,
        node_RN: np.ndarray | None = None,
        copies: Ports | None = None,
    ) -> ExchangeTiming:
        """Return times and bytes of dispatch or combine; counts are always in the direction of dispatch.

        algorithm: `normal`, `low_latency`, `direct` or `2dh`; stage: `dispatch` or `combine`. assign_RR [..., R, R]: (token, expert) pairs from source to
        target rank; copy_RR: distinct tokens per target rank; node_RN [..., R, N]: distinct tokens per target node. Only `low_latency` needs
        assign_RR, only the others copy_RR, only `normal` over several nodes node_RN; or `copies` instead of all three. Raises CostError if a count
        that is needed is missing, or the ranks do not fill their nodes.
        """
        return self._exchange(algorithm, stage, assign_RR=assign_RR, copy_RR=copy_RR, node_RN=node_RN, copies=copies)

    def payload_bytes(self, stage: str) -> float:
        """Return the bytes of one token's copy in `dispatch` or `combine`."""
        return self._exchange.payload_bytes(stage)


def _float(tokens: np.ndarray) -> np.ndarray:
    return np.maximum(np.asarray(tokens, dtype=np.float64), 0.0)


def _linear_dtype(model: MoEModel) -> str:
    """Return the `gemm_dtype` of the dense linear layers."""
    if model.weight_dtype == "fp8":
        return "fp8_block" if model.weight_block else "fp8"
    return "bfloat16" if model.weight_dtype in ("bfloat16", "float16") else model.weight_dtype
