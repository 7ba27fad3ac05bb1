"""Placements in the formats of serving engines: what they load at start-up, written and read exactly.

| format | file | rows | rank of slot p |
|---|---|---|---|
| `sglang` | JSON for `--init-expert-location` | all hidden layers | p // (S/R) |
| `trtllm` | YAML for `load_balancer` | MoE layers, keyed by layer index | p // (S/R) |
| `vllm-ascend` | JSON for `expert_map_path` | MoE layers, from 0 | listed |
| `eplb` | JSON or `.npz` of EPLB's three arrays | MoE layers, from 0 | p // (S/R) |

No format can say that a slot is empty, that ranks have unequal slots, that layers have unequally many experts, or that replicas share unequally:
such a plan is refused. A file for a model with unequal layers is read if it fills every slot of every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, PlanError, describe
from moesim.plan import Parallel, Plan
from moesim.plan_formats import eplb, sglang, trtllm, vllm_ascend
from moesim.plan_formats.checks import check_exportable
from moesim.plan_formats.summary import difference, summary

__all__ = ["FORMATS", "difference", "export_plan", "import_plan", "summary"]

FORMATS: dict[str, Any] = {"sglang": sglang, "trtllm": trtllm, "vllm-ascend": vllm_ascend, "eplb": eplb}


def _module(name: str) -> Any:
    if name not in FORMATS:
        raise InputError(describe("plan format", "--format", name, f"must be one of {', '.join(FORMATS)}"))
    return FORMATS[name]


def export_plan(plan: Plan, format: str, path: Path, *, num_hidden_layers: int | None = None, mtp_layers: int = 0, layer_updates_per_iter: int = 0) -> None:
    """Write a plan in an engine's format, whole or not at all.

    num_hidden_layers: layers of the model, dense ones included; `sglang` needs it. mtp_layers: `trtllm` only, multi-token-prediction layers
    after the hidden ones, which get the trivial placement. layer_updates_per_iter: `trtllm` only, 0 keeps the placement static.
    Raises PlanError if the format cannot hold the plan.
    """
    module = _module(format)
    check_exportable(plan, format, duplicates=format != "vllm-ascend")
    if num_hidden_layers is not None and plan.moe_layer_ids[-1] >= num_hidden_layers:
        raise PlanError(describe(plan.source, "moe_layer_ids", plan.moe_layer_ids[-1], f"must be below the {num_hidden_layers} hidden layers of the model"))
    if mtp_layers < 0 or layer_updates_per_iter < 0:
        raise InputError(describe(f"export to {format}", "mtp_layers, layer_updates_per_iter", [mtp_layers, layer_updates_per_iter], "must be >= 0"))
    module.write(plan, Path(path), num_hidden_layers=num_hidden_layers, mtp_layers=mtp_layers, layer_updates_per_iter=layer_updates_per_iter)


def import_plan(
    path: Path,
    format: str,
    *,
    model: str,
    num_experts: int,
    moe_layer_ids: Sequence[int],
    num_ranks: int,
    num_hidden_layers: int | None = None,
    experts_L: tuple[int, ...] | None = None,
) -> Plan:
    """Read an engine's placement as a plan with status IMPORTED.

    Raises PlanError, naming file and key, if the file is not of this format or does not fit the model and the ranks.
    """
    module = _module(format)
    if num_ranks < 1:
        raise InputError(describe(str(path), "--ranks", num_ranks, "must be >= 1"))
    read: Callable[..., np.ndarray] = module.read
    table = read(Path(path), num_experts=num_experts, moe_layer_ids=tuple(moe_layer_ids), num_ranks=num_ranks, num_hidden_layers=num_hidden_layers)
    slots = table.shape[1]
    if slots % num_ranks:
        raise PlanError(
            describe(str(path), "slots", slots, f"must be a multiple of the {num_ranks} ranks", "give the number of ranks that the placement was made for")
        )
    return Plan(
        model=model,
        num_experts=num_experts,
        moe_layer_ids=tuple(moe_layer_ids),
        slot_to_expert_LS=table,
        slot_rank_S=np.arange(slots) // (slots // num_ranks),
        num_ranks=num_ranks,
        experts_L=experts_L,
        parallel=Parallel(ep=num_ranks, dp=num_ranks),
        result={"status": "IMPORTED", "solver": format},
        source=str(path),
    )
