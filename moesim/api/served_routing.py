"""How the tokens of a measured run are taken to be routed where no trace is given: as popular experts were in a served model.

Nobody recorded the routing of the recorded runs and of the end-to-end points. What is measured is how DeepSeek-V3's expert counts were spread while a
server decoded a benchmark of 1,000 prompt and 1,000 output tokens: per layer, the share of the most popular 1, 2, 4 … of 256 experts. Other models are
assumed to share that curve (popularity by rank, relative to the number of experts), each layer in an order of its own; choices of tokens are independent.
Nothing here is fitted.
Shapes: L MoE layers, E experts, C points of a curve.
"""

from __future__ import annotations

import csv

import numpy as np

from moesim.api.published.loads import SKEW, TOPS
from moesim.api.serving_deployment import Routing
from moesim.costs.group_loads import capped_LE
from moesim.model.moe_model import MoEModel

WORKLOAD = "decode_in1000out1000"
SOURCE = f"DeepSeek-V3 {WORKLOAD}"
USE = "assumed: experts as popular as in a server that was counted, choices drawn"
EXPERTS = 256
"""Experts of the model that was counted."""


def served_routing(model: MoEModel, seed: int = 0) -> Routing | None:
    """Return the assumed routing of a served model; None for a dense one."""
    layers, experts = len(model.moe_layer_ids), model.num_experts
    if not layers:
        return None
    curve_LC = _curves_LC()
    chosen_LC = curve_LC[np.arange(layers) * len(curve_LC) // layers]
    # The curve at every expert's end; what an expert gets is the step from the one before.
    at_C, ends_E = np.array([0, *TOPS, EXPERTS]) / EXPERTS, np.arange(experts + 1) / experts
    load_LE = np.diff(np.stack([np.interp(ends_E, at_C, curve_C) for curve_C in chosen_LC]), axis=1)
    shuffled_LE = np.random.Generator(np.random.PCG64(seed)).permuted(load_LE, axis=1)
    return Routing(source=SOURCE, kind="counts", synthetic=SOURCE, assign_LE=capped_LE(shuffled_LE, model.top_k), drawn=True, use=USE)


def _curves_LC() -> np.ndarray:
    """Return the share of the choices of the most popular experts, layer by layer."""
    with SKEW.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["workload"] == WORKLOAD]
    rows.sort(key=lambda row: int(row["layer"]))
    return np.array([[0.0, *(float(row[f"share_top{count}"]) for count in TOPS), 1.0] for row in rows])
