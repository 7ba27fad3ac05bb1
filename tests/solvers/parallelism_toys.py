"""A small model, a small machine and arbitrary cost models, on which the planner of parallelism is compared with brute force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.costs.exchange import ExchangeTiming
from moesim.costs.provenance import Provenance, Timing, timing
from moesim.hardware.cluster import Cluster, Device, Link, Tier
from moesim.model.moe_model import Attention, MoEModel

GIB = 2.0**30


def machine(devices: int = 4, nodes: int = 1, *, memory: float = 1e6, bandwidth: float = 1e12) -> Cluster:
    """Return a machine without tables; memory in bytes."""
    device = Device(
        name="toy",
        kind="gpu",
        peak_flops={"bfloat16": 1e15},
        num_sms=10,
        gemm_efficiency=0.5,
        memory_efficiency=0.5,
        kernel_launch_s=1e-6,
    )
    links = {
        "scale_up": Link(name="scale_up", bandwidth_Bps=bandwidth / 10, latency_s=1e-6),
        "scale_out": Link(name="scale_out", bandwidth_Bps=bandwidth / 50, latency_s=3e-6),
    }
    tiers = {"hbm": Tier(name="hbm", capacity_bytes=memory, read_Bps=bandwidth, write_Bps=bandwidth)}
    return Cluster(name="toys", device=device, tiers=tiers, links=links, devices_per_node=devices, num_nodes=nodes)


def tiny(*, layers: int = 4, dense: int = 1, experts: int = 8, top_k: int = 2, shared: int = 16, tied: bool = False, window: int | None = None) -> MoEModel:
    """Return a bfloat16 model with `dense` dense layers at its start (all of them dense: no experts)."""
    moe = tuple(range(dense, layers))
    return MoEModel(
        name="tiny",
        num_layers=layers,
        hidden_size=32,
        vocab_size=100,
        attention=Attention(
            kind="gqa",
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            sliding_window=window,
            sliding_every=2 if window else None,
            sliding_layer_ids=tuple(range(0, layers, 2)) if window else (),
        ),
        dense_ffn_size=64 if dense else 0,
        moe_layer_ids=moe,
        num_experts=experts if moe else 0,
        top_k=top_k if moe else 0,
        expert_ffn_size=16 if moe else 0,
        num_shared_experts=1 if shared and moe else 0,
        shared_ffn_size=shared if moe else 0,
        num_groups=1,
        top_k_groups=1,
        gate_activation="softmax",
        dtype="bfloat16",
        expert_dtype="bfloat16",
        weight_dtype="bfloat16",
        kv_dtype="bfloat16",
        gated_ffn=True,
        tie_embeddings=tied,
        max_position=4096,
    )


@dataclass
class ToyCosts:
    """A cost model without any sense: positive numbers that wobble with every argument, the same for the same arguments."""

    seed: int
    scale: float = 1e-3

    def _wobble(self, name: str, *values: Any) -> np.ndarray:
        phase = float(sum(map(ord, name)) % 17 + self.seed % 1000)
        total = np.asarray(phase)
        for index, value in enumerate(values):
            total = total + np.asarray(value, dtype=np.float64) * (0.37 + 0.11 * index)
        return np.asarray(self.scale * (1.0 + np.sin(total * 1.7)) ** 2)

    def _timed(self, name: str, *values: Any) -> Timing:
        return timing(self._wobble(name, *values), Provenance.ROOFLINE)

    def attention(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("attention" + phase, sequences, new_tokens, context, tp)

    weight_Bps = float("inf")

    def sampling(self, sequences: np.ndarray) -> Timing:
        return self._timed("sampling", sequences)

    def attention_projections(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("projections", tokens, tp)

    def mixed_factor(self, *, chunk: np.ndarray, **_: object) -> np.ndarray:
        return np.ones(np.shape(chunk))

    def mixed_batches(self, tp: int = 1) -> None:
        return None

    def attention_core(self, *, phase: str, sequences: np.ndarray, new_tokens: np.ndarray, context: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("core" + phase, sequences, new_tokens, context, tp)

    def gate(self, tokens: np.ndarray) -> Timing:
        return self._timed("gate", tokens)

    def experts(self, slot_tokens: np.ndarray, *, slot_mask: np.ndarray | None = None, expert_tp: int = 1) -> Timing:
        return self._timed("experts", slot_tokens.sum(axis=-1), slot_tokens.max(axis=-1), expert_tp)

    def masked_rows(self, tokens: np.ndarray, ranks: int, expert_tp: int = 1) -> np.ndarray:
        return np.zeros(len(tokens))

    def shared_experts(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("shared", tokens, tp)

    def dense_ffn(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("dense", tokens, tp)

    def head(self, tokens: np.ndarray, tp: int = 1) -> Timing:
        return self._timed("head", tokens, tp)

    def embedding(self, tokens: np.ndarray) -> Timing:
        return self._timed("embedding", tokens)

    def all_reduce(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        return self._timed("reduce", nbytes, ranks, nodes)

    def all_gather(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        return self._timed("gather", nbytes, ranks, nodes)

    def reduce_scatter(self, nbytes: np.ndarray, ranks: int, *, nodes: int = 1) -> Timing:
        return self._timed("scatter", nbytes, ranks, nodes)

    def p2p(self, nbytes: np.ndarray, *, nodes: int = 1) -> Timing:
        return self._timed("p2p", nbytes, nodes)

    def exchange(self, algorithm: str, stage: str, *, copies: Any = None) -> ExchangeTiming:
        sent, received = self._wobble(algorithm + stage, copies.up_out, copies.out_out), self._wobble(stage, copies.up_in, copies.out_in)
        return ExchangeTiming(send_s=sent, recv_s=received, provenance=np.zeros(sent.shape, dtype=np.uint8))

    def payload_bytes(self, stage: str) -> float:
        return 64.0
