"""SGLang: `--init-expert-location FILE.json`.

`{"physical_to_logical_map": [[S experts] × hidden layers]}` and nothing else: SGLang hands the keys to a function, so that any further
key stops the server. Dense layers have rows too; they get the trivial placement (slot p holds expert p mod E).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, PlanError
from moesim.files import read_json, write_atomic
from moesim.plan import Plan
from moesim.plan_formats.checks import as_dict, as_rows, need_layers

KEY = "physical_to_logical_map"


def write(plan: Plan, path: Path, *, num_hidden_layers: int | None, **_: Any) -> None:
    """Write one row per hidden layer."""
    if num_hidden_layers is None:
        raise InputError("export to sglang: the file has a row for every hidden layer, dense ones too; name the model with --model")
    rows = np.tile(np.arange(plan.num_slots) % plan.num_experts, (num_hidden_layers, 1))
    rows[list(plan.moe_layer_ids)] = plan.slot_to_expert_LS
    write_atomic(path, json.dumps({KEY: rows.tolist()}, separators=(", ", ": ")) + "\n")


def read(path: Path, *, num_experts: int, moe_layer_ids: tuple[int, ...], num_hidden_layers: int | None, **_: Any) -> np.ndarray:
    """Return [L, S]: the rows of the MoE layers."""
    if path.suffix in (".pt", ".pth"):
        raise PlanError(f"{path}: is a torch file; convert it to JSON with torch.load(…, weights_only=True) and json.dump of its lists")
    node = read_json(path, error=PlanError)
    if isinstance(node, dict) and "logical_count" in node:
        raise PlanError(f"{path}: holds expert counts (logical_count), not a placement; import it with `moesim trace import --format sglang`")
    rows = as_rows(as_dict(node, str(path), {KEY})[KEY], str(path), KEY, high=num_experts - 1)
    if num_hidden_layers is not None:
        need_layers(len(rows), num_hidden_layers, path, KEY, "one per hidden layer of the model")
    elif len(rows) <= moe_layer_ids[-1]:
        need_layers(len(rows), moe_layer_ids[-1] + 1, path, KEY, "at least one per layer up to the last MoE layer")
    return rows[list(moe_layer_ids)]
