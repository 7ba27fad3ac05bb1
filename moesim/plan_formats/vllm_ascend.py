"""vLLM-Ascend and MindIE: the expert map behind `expert_map_path`.

`{"moe_layer_count": L, "layer_list": [{"layer_id": 0.., "device_count": R, "device_list": [{"device_id": 0.., "device_expert": [experts]}]}]}`.
Layers are MoE layers numbered from 0, in order; every device of every layer has equally many experts, none of them twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import PlanError, describe
from moesim.files import read_json, write_atomic
from moesim.plan import Plan
from moesim.plan_formats.checks import MAX_LAYERS, as_dict, as_int, as_rows, need_layers


def write(plan: Plan, path: Path, **_: Any) -> None:
    """Write one entry per MoE layer and device."""
    table_LRC = plan.slot_to_expert_LS.reshape(plan.num_layers, plan.num_ranks, -1).tolist()
    layers = [
        {"layer_id": layer, "device_count": plan.num_ranks, "device_list": [{"device_id": rank, "device_expert": experts} for rank, experts in enumerate(row)]}
        for layer, row in enumerate(table_LRC)
    ]
    write_atomic(path, json.dumps({"moe_layer_count": plan.num_layers, "layer_list": layers}, indent=1) + "\n")


def read(path: Path, *, num_experts: int, moe_layer_ids: tuple[int, ...], num_ranks: int, **_: Any) -> np.ndarray:
    """Return [L, S]: the experts of all devices side by side."""
    place = str(path)
    node = as_dict(read_json(path, error=PlanError), place, {"moe_layer_count", "layer_list"})
    count = as_int(node["moe_layer_count"], place, "moe_layer_count", 1, MAX_LAYERS)
    layers = node["layer_list"]
    if not isinstance(layers, list) or len(layers) != count:
        raise PlanError(
            describe(
                place,
                "layer_list",
                f"{len(layers) if isinstance(layers, list) else type(layers).__name__} entries",
                f"must have moe_layer_count = {count} entries",
            )
        )
    need_layers(count, len(moe_layer_ids), path, "layer_list", "one per MoE layer of the model")
    rows = []
    for number, layer in enumerate(layers):
        key = f"layer_list[{number}]"
        entry = as_dict(layer, f"{place}: {key}", {"device_count", "device_list"}, frozenset({"layer_id"}))
        if as_int(entry.get("layer_id", number), place, f"{key}.layer_id", 0, MAX_LAYERS) != number:
            raise PlanError(describe(place, f"{key}.layer_id", entry["layer_id"], f"must be {number}: MoE layers are numbered from 0 in order"))
        if as_int(entry["device_count"], place, f"{key}.device_count", 1, 65536) != num_ranks:
            raise PlanError(describe(place, f"{key}.device_count", entry["device_count"], f"must equal the {num_ranks} ranks"))
        devices = entry["device_list"]
        if not isinstance(devices, list) or len(devices) != num_ranks:
            raise PlanError(f"{place}: {key}.device_list must have {num_ranks} entries, one per device")
        lists = []
        for rank, item in enumerate(devices):
            device = as_dict(item, f"{place}: {key}.device_list[{rank}]", {"device_expert"}, frozenset({"device_id"}))
            if as_int(device.get("device_id", rank), place, f"{key}.device_list[{rank}].device_id", 0, 65535) != rank:
                raise PlanError(describe(place, f"{key}.device_list[{rank}].device_id", device["device_id"], f"must be {rank}: devices are listed in order"))
            lists.append(device["device_expert"])
        experts = as_rows(lists, place, f"{key}.device_expert", high=num_experts - 1)
        twice = np.argwhere(np.diff(np.sort(experts, axis=1), axis=1) == 0)
        if len(twice):
            raise PlanError(describe(place, f"{key}.device_list[{twice[0][0]}].device_expert", experts[twice[0][0]].tolist(), "must not hold an expert twice"))
        rows.append(experts.ravel().tolist())
    return as_rows(rows, place, "device_expert", high=num_experts - 1)
