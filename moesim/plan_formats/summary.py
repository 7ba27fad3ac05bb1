"""What a plan holds and how two plans differ, as the objects that the command line prints."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.errors import PlanError, describe
from moesim.plan import Plan


def duplicates_LR(plan: Plan) -> np.ndarray:
    """Return int64 [L, R]: slots of a rank that hold an expert which the rank has already."""
    result = np.zeros((plan.num_layers, plan.num_ranks), dtype=np.int64)
    for rank in range(plan.num_ranks):
        rows = np.sort(plan.slot_to_expert_LS[:, plan.slot_rank_S == rank], axis=1)
        result[:, rank] = ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)).sum(axis=1)
    return result


def summary(plan: Plan) -> dict[str, Any]:
    """Return the facts of a plan."""
    per_rank = np.bincount(plan.slot_rank_S, minlength=plan.num_ranks)
    replicas = plan.replicas_LE
    return {
        "model": plan.model,
        "layers": plan.num_layers,
        "moe_layer_ids": list(plan.moe_layer_ids),
        "experts": plan.num_experts,
        **({} if plan.experts_L is None else {"experts_per_layer": list(plan.experts_L)}),
        "ranks": plan.num_ranks,
        "slots": plan.num_slots,
        "slots_per_rank": {"min": int(per_rank.min()), "max": int(per_rank.max())},
        "replicas": {"most": int(replicas.max()), "replicated_experts_per_layer": float((replicas > 1).sum(axis=1).mean())},
        "empty_slots": int((plan.slot_to_expert_LS < 0).sum()),
        "duplicate_slots": int(duplicates_LR(plan).sum()),
        "unequal_shares": plan.share_LS is not None,
        "parallel": {name: getattr(plan.parallel, name) for name in plan.parallel.__dataclass_fields__},
        "policies": dict(plan.policies),
        "fingerprints": dict(plan.fingerprints),
        "result": dict(plan.result),
        "sha256": plan.sha256,
        "map_sha256": plan.map_sha256,
    }


def difference(old: Plan, new: Plan) -> dict[str, Any]:
    """Return what changes from one plan to another: slots whose expert differs, their ranks, and replica counts.

    Raises PlanError if the plans differ in experts, layers, slots or ranks, so that slots do not correspond.
    """
    for key, before, after in (
        ("num_experts", old.num_experts, new.num_experts),
        ("experts_per_layer", old.experts_L, new.experts_L),
        ("moe_layer_ids", list(old.moe_layer_ids), list(new.moe_layer_ids)),
        ("num_slots", old.num_slots, new.num_slots),
        ("num_ranks", old.num_ranks, new.num_ranks),
    ):
        if before != after:
            raise PlanError(describe(new.source, key, after, f"must equal that of {old.source}, {before}", "only plans of the same shape can be compared"))
    if (old.slot_rank_S != new.slot_rank_S).any():
        raise PlanError(f"{new.source}: its slots belong to other ranks than those of {old.source}; only plans of the same shape can be compared")
    changed = old.slot_to_expert_LS != new.slot_to_expert_LS
    layers, slots = np.nonzero(changed)
    ranks = np.bincount(new.slot_rank_S[slots], minlength=new.num_ranks)
    replicas = old.replicas_LE != new.replicas_LE
    # a rank fetches an expert only if it did not hold it anywhere
    fetched = 0
    for rank in np.flatnonzero(ranks):
        own = new.slot_rank_S == rank
        for layer in np.unique(layers[new.slot_rank_S[slots] == rank]):
            fetched += len(set(new.slot_to_expert_LS[layer, own].tolist()) - set(old.slot_to_expert_LS[layer, own].tolist()) - {-1})
    return {
        "identical": bool(not changed.any() and np.array_equal(old.shares_LS(), new.shares_LS())),
        "slots": int(changed.sum()),
        "slots_total": int(changed.size),
        "fetched_experts": fetched,
        "layers": {str(new.moe_layer_ids[layer]): int(count) for layer, count in enumerate(changed.sum(axis=1)) if count},
        "ranks": {str(rank): int(count) for rank, count in enumerate(ranks) if count},
        "experts_with_other_replica_count": int(replicas.sum()),
        "shares_differ": bool(not np.array_equal(old.shares_LS(), new.shares_LS())),
        "map_sha256": {"old": old.map_sha256, "new": new.map_sha256},
    }
