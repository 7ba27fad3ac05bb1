"""The least time that peak rates allow a layer: bytes that it must read over the memory's bandwidth, and FLOPs over the highest peak.

A weight that a layer uses is read once per pass, an expert if it surely has a token, the KV cache of every decoding sequence. The step times are held
above these floors, so a floor is a lower bound of what the planner calls a step, whatever the cost model says. Shapes: n sizes, L layers. Seconds.
"""

from __future__ import annotations

import numpy as np

from moesim.costs.footprint import slot_bytes
from moesim.costs.group import Group
from moesim.costs.group_loads import GroupLoads
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism.workload import Workload


class Floors:
    """Floors of one model on one device."""

    def __init__(self, model: MoEModel, cluster: Cluster, workload: Workload) -> None:
        tier = cluster.memory
        self._model, self._workload = model, workload
        self._Bps = tier.read_Bps
        self._flops = max(cluster.device.peak_flops.values(), default=np.inf)

    def __call__(self, group: Group, phase: str, sequences: np.ndarray, loads: GroupLoads | None) -> tuple[np.ndarray, np.ndarray]:
        """Return [n, L], and [n] of the head, for micro-batches of `sequences` on every attention replica."""
        model, tp, prefill = self._model, group.tp, phase == "prefill"
        each = self._workload.prompt_tokens if prefill else 1
        tokens = sequences * float(each)
        # Half of a prompt's pairs are masked; a window or a faster attention kernel may read less of the cache, never less than the window.
        context = each / 2 if prefill else self._workload.decode_context
        window = model.attention.sliding_window if model.attention.sliding_layer_ids else None
        seen = min(context, window) if window else context
        read = sizes.attention_weight_bytes(model, tp) + (0.0 if prefill else 1.0) * sequences * seen * sizes.kv_bytes_per_token_layer(model, tp)
        scores = sizes.attention_flops(model, seen, tp) if prefill or model.attention.kind != "mla" else 0.0
        work = tokens * (sizes.projection_flops(model, tp) * (1.0 if prefill or model.attention.kind != "mla" else 0.0) + scores)
        attention = np.maximum(read / self._Bps, work / self._flops)
        layers = np.repeat(attention[:, None], model.num_layers, axis=1)
        moe_ids = list(model.moe_layer_ids)
        dense_ids = sorted(set(range(model.num_layers)) - set(moe_ids))
        if dense_ids:
            reads, flops = sizes.dense_ffn_bytes(model, tp) / self._Bps, tokens * sizes.dense_ffn_flops(model, tp) / self._flops
            layers[:, dense_ids] += np.maximum(reads, flops)[:, None]
        if loads is not None:
            all_tokens = tokens * group.dp
            active = loads.surely_active_nL(all_tokens)
            routed = np.floor(all_tokens * model.top_k) / group.ranks * sizes.expert_flops(model) / self._flops
            experts = np.maximum(active * slot_bytes(model, group.expert_tp) / self._Bps, routed[:, None])
            shared = sizes.shared_ffn_bytes(model) / self._Bps if model.shared_ffn_size else 0.0
            layers[:, moe_ids] += experts + shared
        head = sizes.embedding_bytes(model, tp) / (1 if model.tie_embeddings else 2) / self._Bps
        return layers, np.full(len(sequences), head)
