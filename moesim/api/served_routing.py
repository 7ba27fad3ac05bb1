"""How the tokens of a measured run are taken to be routed where no trace is given: as popular experts were in a model that was counted.

Nobody recorded the routing of the recorded runs and of the end-to-end points. What is measured is how expert counts were spread in two models: DeepSeek-V3,
while a server decoded a benchmark of 1,000 prompt and 1,000 output tokens, and OLMoE, on text of six kinds, each counted by itself, as a benchmark sends
one kind. How even a router ends up is what its training asks of it: sigmoid gates are evened out by a bias per expert, as DeepSeek-V3's are; softmax gates
by a loss term, as OLMoE's are. A model shares the curve of the counted model with gates like its own (popularity by rank, relative to the number of
experts), each layer in an order of its own; choices of tokens are independent. Nothing here is fitted.
Shapes: L MoE layers, E experts, M counted layers (one per kind of text), C points of a curve.
"""

from __future__ import annotations

import csv

import numpy as np

from moesim.api.published.loads import SKEW, TOPS
from moesim.api.serving_deployment import Routing
from moesim.costs.group_loads import capped_LE
from moesim.model.moe_model import MoEModel
from moesim.traces.open import open_trace

WORKLOAD = "decode_in1000out1000"
COUNTS = "olmoe-1b-7b-counts"
SOURCES = {"sigmoid": f"DeepSeek-V3 {WORKLOAD}", "softmax": f"OLMoE {COUNTS}"}
"""Activation of the gates → what was counted."""
SOURCE = " or ".join(f"{source} ({gates} gates)" for gates, source in SOURCES.items())
USE = "assumed: experts as popular as in a model with like gates that was counted, choices drawn"
EXPERTS = 256
"""Experts of DeepSeek-V3."""


def served_routing(model: MoEModel, seed: int = 0) -> Routing | None:
    """Return the assumed routing of a served model; None for a dense one."""
    layers, experts = len(model.moe_layer_ids), model.num_experts
    if not layers:
        return None
    evened = model.gate_activation != "softmax"
    at_C, curve_MC = _evened_by_bias() if evened else _evened_by_loss()
    chosen_LC = curve_MC[np.arange(layers) * len(curve_MC) // layers]
    # The curve at every expert's end; what an expert gets is the step from the one before.
    ends_E = np.arange(experts + 1) / experts
    load_LE = np.diff(np.stack([np.interp(ends_E, at_C, curve_C) for curve_C in chosen_LC]), axis=1)
    shuffled_LE = np.random.Generator(np.random.PCG64(seed)).permuted(load_LE, axis=1)
    source = SOURCES["sigmoid" if evened else "softmax"]
    return Routing(source=source, kind="counts", synthetic=source, assign_LE=capped_LE(shuffled_LE, model.top_k), drawn=True, use=USE)


def _evened_by_bias() -> tuple[np.ndarray, np.ndarray]:
    """Return shares of the experts [C], the most popular first, and the shares of the choices that they get, [M, C]."""
    with SKEW.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["workload"] == WORKLOAD]
    rows.sort(key=lambda row: int(row["layer"]))
    at_C = np.array([0, *TOPS, EXPERTS]) / EXPERTS
    return at_C, np.array([[0.0, *(float(row[f"share_top{count}"]) for count in TOPS), 1.0] for row in rows])


def _evened_by_loss() -> tuple[np.ndarray, np.ndarray]:
    """Return the same of OLMoE; M: its counted layers in order, every kind of text of each."""
    count_MWE = open_trace(COUNTS).counts_WLE().swapaxes(0, 1).astype(np.float64)
    count_ME = -np.sort(-count_MWE.reshape(-1, count_MWE.shape[2]), axis=1)
    ends_ME = np.pad(np.cumsum(count_ME, axis=1), ((0, 0), (1, 0)))
    return np.arange(ends_ME.shape[1]) / (ends_ME.shape[1] - 1), ends_ME / ends_ME[:, -1:]
