"""Predictions for the rows of any measured table on a cluster: the cost model asked row by row.

First choice is the device's (or its donor's, transferred) table of the same kind and key, interpolated along its first axis; then the operator's own
cost: product, experts, attention, link. Rows that neither can express come back as NaN with a reason. Nothing here reads the measured times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moesim.costs.attention import AttentionCost
from moesim.costs.exchange import COMMUNICATION_SMS, ExchangeCost
from moesim.costs.experts import ExpertCost
from moesim.costs.gemm import Gemm
from moesim.costs.holdout import GRIDS, codes_of, interpolate
from moesim.costs.links import OPERATIONS, LinkModel
from moesim.costs.mixed import factor_of
from moesim.costs.provenance import Policy, Provenance, Timing
from moesim.costs.roofline import Roofline
from moesim.costs.tables import Rows, Tables
from moesim.costs.traffic import balanced_counts
from moesim.errors import MoesimError
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import Attention, MoEModel

EXPERT_DTYPES = {"fp8_block": "fp8", "fp8": "fp8", "bfloat16": "bfloat16", "BF16": "bfloat16", "float16": "bfloat16", "w4a16_mxfp4": "mxfp4", "int4_wo": "int4"}
"""`moe_dtype` of a table → expert dtype of a model."""
JOINED: tuple[str, ...] = (
    *("gemm", "moe", "wideep_moe_generation", "attn_context", "attn_generation", "mla_context", "mla_generation"),
    *("wideep_mla_context", "wideep_mla_generation", "custom_allreduce", "moe_a2a"),
)
"""Kinds whose rows are looked up by key before the operator is asked."""
TABLE_KINDS = {"moe_a2a": "moe_a2a_1node"}
"""Kind → kind of the stem, where they differ."""
MAX_SLOTS = 4096
MAX_RANKS = 512
Columns = Mapping[str, np.ndarray]


_ENGINE = re.compile(r"sglang|vllm|trtllm")
_USED_BY = {"infersim": "sglang", "frontier": "vllm", "llmservingsim": "vllm"}


def engine_of(stem: str, source: str, rows: Columns) -> str:
    """Return the serving engine that a table was measured with: as its name or its `framework` column says, else the one that the source profiles."""
    named = stem if "framework" not in rows else f"{stem} {str(rows['framework'][0]).lower()}" if len(rows["framework"]) else stem
    match = _ENGINE.search(named)
    return match.group() if match else _USED_BY.get(source, "sglang")


class Predictor:
    """Times of a cluster for the rows of measured tables."""

    def __init__(self, cluster: Cluster, engine: str, *, tables: Tables | None = None, strict: bool = False) -> None:
        """Prepare; engine: whose tables are preferred. tables: other tables than the cluster's (held-out ones)."""
        self._cluster = cluster
        self._engine = engine
        self._policy = Policy(strict=strict, place=cluster.name)
        self.tables = tables or Tables(cluster, engine)
        self._roofline = Roofline(cluster, self.tables, self._policy)
        self._product = Gemm(self.tables, self._roofline, self._policy)
        # NCCL itself is asked for, never an engine's own all-reduce.
        self._links = LinkModel(cluster, self.tables, self._policy, "nccl")

    def __call__(self, kind: str, rows: Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return seconds (NaN: none), `Provenance` codes, why there is none (text, else empty), and how many table rows were looked up in."""
        count = len(rows["latency_s"])
        seconds, codes = np.full(count, np.nan), np.full(count, int(Provenance.ROOFLINE), dtype=np.uint8)
        reason = np.full(count, "", dtype=object)
        used = 0
        if kind in JOINED:
            reference = self._reference(kind, rows)
            if reference is not None:
                used = len(reference["latency_s"])
                seconds, on_key = interpolate(kind, reference, rows)
                best = np.where(on_key, np.uint8(Provenance.MEASURED), np.uint8(Provenance.INTERPOLATED))
                codes = np.where(np.isfinite(seconds), np.maximum(best, np.uint8(reference.worst)), codes)
        ask = getattr(self, f"_{kind}") if kind in SHAPES else None
        open_rows = np.flatnonzero(~np.isfinite(seconds))
        if len(open_rows) and ask is not None:
            self._ask(ask, {name: values[open_rows] for name, values in rows.items()}, open_rows, seconds, codes, reason)
        reason[~np.isfinite(seconds) & (reason == "")] = "no table has the key, and no operator of the cost model computes it"
        return seconds, codes, reason, used

    def _ask(self, ask: Any, rows: Columns, place: np.ndarray, seconds: np.ndarray, codes: np.ndarray, reason: np.ndarray) -> None:
        """Ask group by group, so that an impossible group stops no other."""
        shapes = codes_of(rows, SHAPES.get(ask.__name__[1:], ()))
        for shape in np.unique(shapes):
            at = np.flatnonzero(shapes == shape)
            try:
                with np.errstate(all="ignore"):  # what overflows comes back as no time
                    timed = ask({name: values[at] for name, values in rows.items()})
            except (MoesimError, ValueError, OverflowError, MemoryError) as cause:
                reason[place[at]] = " ".join(str(cause).split())[:160]
                continue
            if isinstance(timed, str):
                reason[place[at]] = timed
            else:
                seconds[place[at]] = np.where((timed.seconds > 0) & np.isfinite(timed.seconds), timed.seconds, np.nan)
                codes[place[at]] = np.broadcast_to(timed.provenance, timed.seconds.shape)

    def _reference(self, kind: str, rows: Columns) -> Rows | None:
        grid, stem_kind = GRIDS[kind], TABLE_KINDS.get(kind, kind)
        axes = [axis for axis, _ in grid.axes]
        columns = [name for name in (*grid.groups, *axes) if name in rows and name != "kernel_source" and self.tables.has(stem_kind, name)]
        if not set(axes) <= set(columns):
            return None
        found = self.tables.rows(stem_kind, *columns, "latency_s")
        if found is not None and "prefix" in rows and "prefix" not in found:
            found["prefix"] = np.zeros(len(found["latency_s"]))
        return found

    # --- operators: rows of one shape -------------------------------------------------------------------------

    def _gemm(self, rows: Columns) -> Timing:
        return self._product("gemm", rows["m"], int(rows["n"][0]), int(rows["k"][0]), str(rows["gemm_dtype"][0]))

    def _grouped_gemm(self, rows: Columns) -> Timing | str:
        slots = int(rows["slots"][0])
        dtype = EXPERT_DTYPES.get(str(rows["moe_dtype"][0]))
        if dtype is None:
            return f"expert dtype {rows['moe_dtype'][0]} is not known"
        if not 1 <= slots <= MAX_SLOTS or rows["inter_size"][0] < 1:
            return f"experts of a device must be in 1..{MAX_SLOTS}, and no narrower than 1"
        model = _model(hidden=int(rows["hidden_size"][0]), ffn=int(rows["inter_size"][0]), experts=slots, top_k=8, expert_dtype=dtype)
        law = ExpertCost(model, self.tables, self._roofline, self._policy).law(1)
        active = np.clip(np.rint(rows["active"]), 1, slots)[:, None]
        total = np.rint(rows["assignments"])[:, None]
        place = np.arange(slots)[None]
        loads = np.where(place < active, total // active + (place < total % active), 0).astype(np.int64)
        return law(loads, None)

    def _moe(self, rows: Columns) -> Timing | str:
        if str(rows["distribution"][0]) not in ("balanced", "uniform"):
            return f"distribution {rows['distribution'][0]}: the loads of the experts are not stated, and no table has the shape"
        expert_parallel = rows["moe_ep_size"]
        local = rows["num_experts"] / expert_parallel
        return self._grouped_gemm(
            {
                "slots": local,
                "active": np.minimum(local, rows["num_tokens"] * rows["topk"] / expert_parallel),
                "assignments": rows["num_tokens"] * rows["topk"] / expert_parallel,
                "hidden_size": rows["hidden_size"],
                "inter_size": rows["inter_size"] / rows["moe_tp_size"],
                "moe_dtype": rows["moe_dtype"],
            }
        )

    def _wideep_moe_generation(self, rows: Columns) -> Timing | str:
        return self._moe(rows)

    def _wideep_moe_eplb(self, rows: Columns) -> Timing | str:
        """Time the rank from the tokens that reach it.

        A token reaches the rank if one of its k choices, each with chance q, falls there: share = 1 − (1 − q)^k gives q, and tokens·k·q assignments.
        """
        ranks, tokens = rows["moe_ep_size"], np.maximum(rows["num_tokens"], rows["rank0_num_tokens"])
        share = np.minimum(rows["rank0_num_tokens"] / tokens, 1.0 - 0.5 / (tokens + 1.0))
        chance = -np.expm1(np.log1p(-share) / rows["topk"])
        local = rows["num_slots"] / ranks
        assignments = np.maximum(np.rint(tokens * rows["topk"] * chance), 1.0)
        return self._grouped_gemm(
            {
                "slots": local,
                "active": np.minimum(local, assignments),
                "assignments": assignments,
                "hidden_size": rows["hidden_size"],
                "inter_size": rows["inter_size"] / rows["moe_tp_size"],
                "moe_dtype": rows["moe_dtype"],
            }
        )

    def sorted_experts(self, rows: Columns) -> np.ndarray:
        """Return the seconds of balanced rows of DeepEP's prefill experts, all of one number of ranks; `num_tokens` are rows of the timed rank."""
        slots = int(rows["num_experts"][0] // rows["moe_ep_size"][0])
        dtype = EXPERT_DTYPES[str(rows["moe_dtype"][0])]
        model = _model(hidden=int(rows["hidden_size"][0]), ffn=int(rows["inter_size"][0]), expert_dtype=dtype)
        law = ExpertCost(model, self.tables, self._roofline, self._policy).law(1, sorts=True)
        choices = np.rint(rows["num_tokens"] * rows["topk"] / rows["moe_ep_size"]).astype(np.int64)[:, None]
        loads = choices // slots + (np.arange(slots) < choices % slots)
        return law(loads, None).seconds + law.row_s * rows["num_tokens"]

    def _attention(self, rows: Columns) -> AttentionCost:
        cache = str(rows["kv_cache_dtype"][0]) if "kv_cache_dtype" in rows else "bfloat16"
        model = _model(heads=int(rows["num_heads"][0]), kv_dtype="fp8" if cache.startswith("fp8") else "bfloat16")
        return AttentionCost(model, self.tables, self._product, self._roofline, self._policy, "bfloat16")

    def _attn(self, phase: str, batch: np.ndarray, tokens: np.ndarray, length: np.ndarray, rows: Columns) -> Timing | str:
        heads, kv_heads, dim, window = (int(rows[name][0]) for name in ("num_heads", "num_key_value_heads", "head_dim", "window_size"))
        if min(heads, kv_heads, dim) < 1 or window < 0:
            return "head shape must be positive"
        return self._attention(rows).core(phase, batch, tokens, length, heads=heads, kv_heads=kv_heads, head_dim=dim, window=window)

    def _attn_context(self, rows: Columns) -> Timing | str:
        return self._attn("prefill", rows["batch_size"], rows["batch_size"] * rows["isl"], rows["isl"] + rows["prefix"], rows)

    def _attn_generation(self, rows: Columns) -> Timing | str:
        return self._attn("decode", rows["batch_size"], rows["batch_size"], rows["step"] + 1.0, rows)

    def _attn_mixed(self, rows: Columns) -> Timing | str:
        one = np.ones(len(rows["latency_s"]))
        prefill = self._attn("prefill", one, rows["prefill_chunk"], rows["prefill_chunk"] + rows["kv_prefill"], rows)
        decode = self._attn("decode", rows["n_decode"], rows["n_decode"], rows["kv_decode"], rows)
        if isinstance(prefill, str) or isinstance(decode, str):
            return "head shape must be positive"
        shape = (int(rows["num_heads"][0]), int(rows["num_key_value_heads"][0]), int(rows["head_dim"][0]))
        mixed = self._attention(rows).mixed_of(shape)
        factor = factor_of(mixed, rows["prefill_chunk"], rows["kv_prefill"], rows["n_decode"], rows["kv_decode"])
        seconds = (prefill.seconds + decode.seconds) * factor
        return Timing(seconds=seconds, provenance=np.maximum(np.maximum(prefill.provenance, decode.provenance), np.uint8(Provenance.CALIBRATED)))

    def _mla_expanded(self, rows: Columns) -> Timing | str:
        heads, tokens = int(rows["num_heads"][0]), rows["batch_size"] * rows["isl"]
        return self._attention(rows).core("prefill", rows["batch_size"], tokens, rows["isl"], heads=heads, kv_heads=heads, head_dim=192, value_dim=128)

    def _mla_generation(self, rows: Columns) -> Timing | str:
        return self._attention(rows).mla_core(rows["batch_size"], rows["step"] + 1.0, heads=int(rows["num_heads"][0]))

    def _stream(self, rows: Columns) -> Timing:
        return self._roofline.stream(str(rows["operator"][0]), rows["moved_bytes"])

    def _sampler(self, rows: Columns) -> Timing:
        return self._roofline.sampling(rows["sequences"], int(rows["vocab"][0]))

    def _collective(self, rows: Columns) -> Timing | str:
        operation, ranks, nodes = str(rows["op_name"][0]), int(rows["num_gpus"][0]), int(rows["num_nodes"][0])
        size = rows["message_bytes"]
        if operation == "send_recv":
            return self._links.p2p(size, nodes)
        if operation == "alltoall" and nodes == 1 and ranks > 1:
            return self._links.all_to_all(size * (ranks - 1) / ranks, size * 0, ranks=ranks, devices=ranks, one_after_the_other=False)
        if operation not in OPERATIONS or ranks < 2:
            return f"collective {operation} over {ranks} devices is not modelled"
        return self._links.collective(operation, size, ranks, nodes)

    def _deepep_ll(self, rows: Columns) -> Timing | str:
        return self._exchange("low_latency", rows)

    def _deepep_normal(self, rows: Columns) -> Timing | str:
        if int(rows["sms"][0]) != COMMUNICATION_SMS:
            return f"other than {COMMUNICATION_SMS} SMs for communication"
        return self._exchange("normal", rows)

    def _exchange(self, algorithm: str, rows: Columns) -> Timing | str:
        nodes, hidden, top_k, experts = (int(rows[name][0]) for name in ("node_num", "hidden_size", "num_topk", "num_experts"))
        devices = self._cluster.devices_per_node if nodes > 1 else min(8, self._cluster.devices_per_node)
        if nodes * devices > MAX_RANKS:
            return f"more than {MAX_RANKS} ranks"
        model = _model(hidden=hidden, experts=experts, top_k=top_k, expert_dtype="fp8")
        cost = ExchangeCost(model, devices, self.tables, self._links, self._policy)
        limit = 4 if algorithm == "normal" else None
        counts = balanced_counts(num_ranks=nodes * devices, devices=devices, num_experts=experts, top_k=top_k, max_nodes=limit)
        scaled = {name: values * rows["num_token"][:, None, None] for name, values in counts.items()}
        timed = cost(algorithm, str(rows["stage"][0]), **scaled)  # type: ignore[arg-type]
        return Timing(seconds=np.maximum(timed.send_s, timed.recv_s).max(axis=-1), provenance=timed.provenance.max(axis=-1))


SHAPES: dict[str, tuple[str, ...]] = {
    "gemm": ("n", "k", "gemm_dtype"),
    "grouped_gemm": ("slots", "hidden_size", "inter_size", "moe_dtype"),
    "moe": ("num_experts", "hidden_size", "inter_size", "moe_dtype", "moe_tp_size", "moe_ep_size", "distribution", "topk"),
    "wideep_moe_generation": ("num_experts", "hidden_size", "inter_size", "moe_dtype", "moe_tp_size", "moe_ep_size", "distribution", "topk"),
    "wideep_moe_eplb": ("num_slots", "hidden_size", "inter_size", "moe_dtype", "moe_tp_size", "moe_ep_size"),
    "attn_context": ("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype"),
    "attn_generation": ("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype"),
    "attn_mixed": ("num_heads", "num_key_value_heads", "head_dim", "window_size", "kv_cache_dtype"),
    "mla_expanded": ("num_heads", "kv_cache_dtype"),
    "mla_generation": ("num_heads", "kv_cache_dtype"),
    "stream": ("operator",),
    "sampler": ("vocab",),
    "collective": ("op_name", "num_gpus", "num_nodes"),
    "deepep_ll": ("node_num", "hidden_size", "num_topk", "num_experts", "stage"),
    "deepep_normal": ("node_num", "hidden_size", "num_topk", "num_experts", "stage", "sms"),
}
"""Kind → the columns that one question to the cost model shares."""


def _model(
    *, hidden: int = 7168, ffn: int = 2048, experts: int = 256, top_k: int = 8, expert_dtype: str = "bfloat16", heads: int = 128, kv_dtype: str = "bfloat16"
) -> MoEModel:
    """Return a model that has nothing but the sizes of the row at hand; MLA sizes are those of the tables."""
    attention = Attention(
        kind="gqa", num_heads=heads, num_kv_heads=heads, head_dim=128, kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128
    )
    return MoEModel(
        name="rows of a table",
        num_layers=1,
        hidden_size=hidden,
        vocab_size=1,
        attention=attention,
        dense_ffn_size=0,
        moe_layer_ids=(0,),
        num_experts=experts,
        top_k=top_k,
        expert_ffn_size=ffn,
        num_shared_experts=0,
        shared_ffn_size=0,
        num_groups=1,
        top_k_groups=1,
        gate_activation="softmax",
        dtype="bfloat16",
        expert_dtype=expert_dtype,
        weight_dtype="bfloat16",
        kv_dtype=kv_dtype,
        gated_ffn=True,
        tie_embeddings=False,
        max_position=1 << 20,
    )
