"""TensorRT-LLM: `moe_load_balancer.yaml`.

`initial_global_assignments` maps the true index of every MoE layer (dense layers counted) to its slots; readers before the
multi-token-prediction fix stop with a KeyError unless those layers, numbered after the hidden ones, are there too.
`layer_updates_per_iter` 0 is static, > 0 lets the engine rebalance that many layers per iteration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, PlanError, describe
from moesim.files import read_bytes, read_yaml, write_atomic
from moesim.plan import MAX_SLOTS, Plan
from moesim.plan_formats.checks import MAX_LAYERS, as_dict, as_int, as_rows

KEYS = {"initial_global_assignments", "num_slots", "layer_updates_per_iter"}
LIMIT_BYTES = 32 * 2**20
MAX_BRACKETS = 8


def write(plan: Plan, path: Path, *, num_hidden_layers: int | None, mtp_layers: int, layer_updates_per_iter: int, **_: Any) -> None:
    """Write the YAML with one line per layer."""
    rows = dict(zip(plan.moe_layer_ids, plan.slot_to_expert_LS.tolist(), strict=True))
    if mtp_layers:
        if num_hidden_layers is None:
            raise InputError("export to trtllm: multi-token-prediction layers are numbered after the hidden ones; name the model with --model")
        trivial = (np.arange(plan.num_slots) % plan.num_experts).tolist()
        rows.update({num_hidden_layers + layer: trivial for layer in range(mtp_layers)})
    lines = ["initial_global_assignments:"]
    lines += [f"  {layer}: [{', '.join(map(str, row))}]" for layer, row in rows.items()]
    lines += [f"num_slots: {plan.num_slots}", f"layer_updates_per_iter: {layer_updates_per_iter}", ""]
    write_atomic(path, "\n".join(lines))


def _check_depth(path: Path) -> None:
    """Refuse deeply nested brackets before they reach the YAML parser, whose time grows with the square of the depth."""
    text = np.frombuffer(read_bytes(path, limit=LIMIT_BYTES, error=PlanError), dtype=np.uint8)
    opened, closed = np.isin(text, np.frombuffer(b"[{", dtype=np.uint8)), np.isin(text, np.frombuffer(b"]}", dtype=np.uint8))
    depth = np.cumsum(opened.astype(np.int32) - closed)
    if depth.size and depth.max() > MAX_BRACKETS:
        raise PlanError(f"{path}: brackets nested {int(depth.max())} deep; this format has lists inside one mapping")


def read(path: Path, *, num_experts: int, moe_layer_ids: tuple[int, ...], **_: Any) -> np.ndarray:
    """Return [L, S]: the slots of the MoE layers; layers after the last one (multi-token prediction) are left out."""
    _check_depth(path)
    node = as_dict(read_yaml(path, limit=LIMIT_BYTES, error=PlanError), str(path), KEYS - {"layer_updates_per_iter"}, frozenset({"layer_updates_per_iter"}))
    slots = as_int(node["num_slots"], str(path), "num_slots", 1, MAX_SLOTS)
    as_int(node.get("layer_updates_per_iter", 0), str(path), "layer_updates_per_iter", 0, MAX_LAYERS)
    given = node["initial_global_assignments"]
    if not isinstance(given, dict) or not all(isinstance(layer, int) for layer in given):
        raise PlanError(
            f"{path}: initial_global_assignments must map layer indices to lists of experts; without it the engine starts from the trivial placement"
        )
    missing = [layer for layer in moe_layer_ids if layer not in given]
    if missing:
        raise PlanError(
            describe(
                str(path),
                "initial_global_assignments",
                sorted(given)[:8],
                f"must have every MoE layer; {missing[0]} is missing",
                "keys are true layer indices, dense layers counted",
            )
        )
    strange = sorted(layer for layer in given if layer not in moe_layer_ids and layer <= moe_layer_ids[-1])
    if strange:
        raise PlanError(
            describe(
                str(path),
                f"initial_global_assignments[{strange[0]}]",
                "a row",
                "must belong to a MoE layer of the model",
                "name the model that the file was made for",
            )
        )
    return as_rows([given[layer] for layer in moe_layer_ids], str(path), "initial_global_assignments", high=num_experts - 1, length=slots)
