"""How the tokens of a measured run are taken to be routed where no trace is given: as popular experts were in a model that was counted.

Nobody recorded the routing of the recorded runs and of the end-to-end points. What was counted elsewhere is how choices spread over the experts of four
models: Qwen3-30B-A3B (prompts), gpt-oss-20b (its answers), OLMoE (text of six kinds, each by itself, as a benchmark sends one kind) and DeepSeek-V3, while
a server decoded a benchmark of 1,000 prompt and 1,000 output tokens. A model takes the curve (popularity by rank, relative to the number of experts) of the
counted model of its own family; one whose family was not counted that of a model with gates like its own, since how even a router ends up is what its
training asks of it: sigmoid gates are evened out by a bias per expert, as DeepSeek-V3's are, softmax gates by a loss term, as OLMoE's are.
Every layer has an order of its own, and choices of tokens are independent. Where routing is limited to groups of experts as DeepSeek-V3's is, popular
experts share groups: contiguous ranks carry what was counted there. Nothing here is fitted.
Shapes: L MoE layers, E experts, M counted layers (one per kind of text), C points of a curve.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from moesim.api.published.loads import SKEW, TOPS, popularity_LE
from moesim.api.serving_deployment import Routing
from moesim.costs.group_loads import capped_LE
from moesim.model.moe_model import MoEModel
from moesim.traces.open import open_trace

WORKLOAD = "decode_in1000out1000"
COUNTS = "olmoe-1b-7b-counts"
COUNTED = Path(__file__).parent / "popularity" / "counted.csv"
EXPERTS, GROUPS = 256, 8
"""Of DeepSeek-V3."""
FAMILIES = {"Qwen3": "qwen3-30b-a3b", "GptOss": "gpt-oss-20b"}
"""How the names of a family's architectures begin → the model of it that was counted."""
GATES = {"sigmoid": f"DeepSeek-V3 {WORKLOAD}", "softmax": f"OLMoE {COUNTS}"}
"""Activation of the gates → what was counted, for other families."""
SOURCE = f"{' or '.join(FAMILIES.values())} (their families), else {' or '.join(f'{source} ({gates} gates)' for gates, source in GATES.items())}"
USE = "assumed: experts as popular as in a counted model, choices drawn"
Curve = tuple[np.ndarray, np.ndarray]
"""Shares of the experts [C], the most popular first, and the shares of the choices that they get, [M, C]."""


def served_routing(model: MoEModel, seed: int = 0) -> Routing | None:
    """Return the assumed routing of a served model; None for a dense one."""
    layers, experts = len(model.moe_layer_ids), model.num_experts
    if not layers:
        return None
    source, curve = counted_for(model)
    if (experts, model.num_groups, curve) == (EXPERTS, GROUPS, deepseek_v3):
        popular_LE = popularity_LE(WORKLOAD, experts, seed)
        load_LE = popular_LE[np.arange(layers) * len(popular_LE) // layers]
    else:
        at_C, curve_MC = curve()
        chosen_LC = curve_MC[np.arange(layers) * len(curve_MC) // layers]
        # The curve at every expert's end; what an expert gets is the step from the one before.
        ends_E = np.arange(experts + 1) / experts
        load_LE = np.diff(np.stack([np.interp(ends_E, at_C, curve_C) for curve_C in chosen_LC]), axis=1)
        load_LE = np.random.Generator(np.random.PCG64(seed)).permuted(load_LE, axis=1)
    return Routing(source=source, kind="counts", synthetic=source, assign_LE=capped_LE(load_LE, model.top_k), drawn=True, use=USE)


def counted_for(model: MoEModel) -> tuple[str, Callable[[], Curve]]:
    """Return what was counted of a model like `model`: its name, and its curve."""
    for start, name in FAMILIES.items():
        if model.architecture.startswith(start):
            return name, partial(counted, name)
    gates = "softmax" if model.gate_activation == "softmax" else "sigmoid"
    return GATES[gates], olmoe if gates == "softmax" else deepseek_v3


def deepseek_v3() -> Curve:
    """Return the curve of DeepSeek-V3; M: its MoE layers."""
    with SKEW.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["workload"] == WORKLOAD]
    rows.sort(key=lambda row: int(row["layer"]))
    at_C = np.array([0, *TOPS, EXPERTS]) / EXPERTS
    return at_C, np.array([[0.0, *(float(row[f"share_top{count}"]) for count in TOPS), 1.0] for row in rows])


def olmoe() -> Curve:
    """Return the same of OLMoE; M: its counted layers in order, every kind of text of each."""
    count_MWE = open_trace(COUNTS).counts_WLE().swapaxes(0, 1).astype(np.float64)
    count_ME = -np.sort(-count_MWE.reshape(-1, count_MWE.shape[2]), axis=1)
    ends_ME = np.pad(np.cumsum(count_ME, axis=1), ((0, 0), (1, 0)))
    return np.arange(ends_ME.shape[1]) / (ends_ME.shape[1] - 1), ends_ME / ends_ME[:, -1:]


def counted(name: str) -> Curve:
    """Return the same of a model of the package's summary; M: its counted layers."""
    with COUNTED.open(newline="", encoding="utf-8") as lines:
        rows = sorted((row for row in csv.DictReader(lines) if row["model"] == name), key=lambda row: int(row["layer"]))
    curve_MC = np.array([[0.0, *(float(row[f"top_{part}_of_32"]) for part in range(1, 32)), 1.0] for row in rows])
    return np.arange(33) / 32, curve_MC
