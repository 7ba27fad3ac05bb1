"""Do the slots fit: how many every rank gets, and whether their weights fit its memory, before anything is solved.

What cannot be is an `InfeasibleError` with the requirement that is violated, where, by how much, and the largest choice that would fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.errors import InfeasibleError, InputError, describe
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.moe_model import MoEModel
from moesim.plan import Plan, linear
from moesim.sim import memory
from moesim.units import format_bytes


def slots_per_rank(model: MoEModel, cluster: Cluster, redundant: int, given: int | Sequence[int] | None, old: Plan | None) -> np.ndarray:
    """Return int64 [R]: those of the running plan, those given, or experts and redundant slots dealt as evenly as they go.

    Raises InfeasibleError if there are fewer slots than experts, or a rank has more slots than a layer has experts.
    """
    ranks, experts = cluster.num_ranks, model.num_experts
    if not 0 <= redundant <= 1 << 16:
        raise InputError(describe("solve", "redundant", redundant, "must be in 0..65536"))
    if given is not None and (redundant or old is not None):
        raise InputError("solve: --slots-per-rank says how many slots there are; leave out --redundant and --from")
    if old is not None:
        if old.num_ranks != ranks:
            raise InputError(describe(old.source, "num_ranks", old.num_ranks, f"must equal the {ranks} devices of {cluster.name}"))
        if redundant and old.num_slots != experts + redundant:
            rule = f"must be {old.num_slots - experts}, as in the running plan {old.source}"
            raise InputError(describe("solve", "redundant", redundant, rule, "leave it out"))
        return np.bincount(old.slot_rank_S, minlength=ranks)
    if given is None:
        slots = np.bincount(np.arange(experts + redundant) % ranks, minlength=ranks)
    else:
        slots = np.full(ranks, given) if isinstance(given, int) else np.array(list(given), dtype=np.int64)
        if slots.shape != (ranks,) or (slots < 0).any():
            raise InputError(describe("solve", "slots_per_rank", slots.tolist(), f"must be one number >= 0, or one for each of the {ranks} ranks"))
    if int(slots.sum()) < experts:
        missing, least = experts - int(slots.sum()), -(-experts // ranks)
        raise InfeasibleError(
            f"solve: {int(slots.sum())} slots of a layer do not hold its {experts} experts: {missing} missing, first in layer {model.moe_layer_ids[0]}; "
            f"give every rank {least} slots (--slots-per-rank {least})",
            requirement="one slot for every expert of a layer",
            where=f"layer {model.moe_layer_ids[0]}",
            missing=missing,
            relaxation=f"--slots-per-rank {least}",
        )
    if int(slots.max()) > experts:
        rank, most = int(slots.argmax()), experts * (ranks - 1)
        relaxation = f"--redundant {most}" if given is None else f"--slots-per-rank {experts}"
        raise InfeasibleError(
            f"solve: rank {rank} has {int(slots[rank])} slots per layer, but no expert may sit twice on a rank and a layer has {experts}: "
            f"{int(slots[rank]) - experts} slots have no expert to hold; at most {relaxation}",
            requirement="no expert twice on a rank",
            where=f"rank {rank}",
            missing=int(slots[rank]) - experts,
            relaxation=relaxation,
        )
    return slots


def check_memory(model: MoEModel, cluster: Cluster, slots_R: np.ndarray, weight_memory: float | None) -> None:
    """Raise InfeasibleError if the weights of a rank, its slots included, exceed `weight_memory` bytes, or the device if None."""
    name = memory.device_tier(cluster)
    tier = cluster.tiers[name]
    room = tier.capacity_bytes / (cluster.devices_per_node if tier.shared else 1)
    if weight_memory is not None:
        if not weight_memory > 0:
            raise InputError(describe("solve", "weight_memory", weight_memory, "must be > 0 bytes"))
        room = weight_memory
    ranks, experts = cluster.num_ranks, model.num_experts
    plain = linear(model=model.name, num_experts=experts, moe_layer_ids=model.moe_layer_ids, experts_L=model.experts_L, num_ranks=ranks)
    slot_bytes = sizes.expert_bytes(model) * len(model.moe_layer_ids)
    fixed = float((memory.weight_bytes_R(model, plain, attention_tp=1) - np.bincount(plain.slot_rank_S, minlength=ranks) * slot_bytes).max())
    need_R = fixed + slots_R * slot_bytes
    rank = int(need_R.argmax())
    missing = float(need_R[rank]) - room
    if missing <= 0:
        return
    fitting = int((room - fixed) // slot_bytes)
    if fitting * ranks >= experts:
        relaxation = f"--redundant {fitting * ranks - experts}"
        remedy = f"at most {fitting} slots per rank fit, so at most {relaxation}"
    elif fitting > 0:
        relaxation = f"at least {-(-experts // fitting)} devices"
        remedy = f"{fitting} slots per rank fit: use {relaxation}"
    else:
        relaxation, remedy = None, "not even one slot fits: use devices with more memory"
    raise InfeasibleError(
        f"solve: rank {rank} of {cluster.name} needs {format_bytes(need_R[rank])} of {name} for weights, {int(slots_R[rank])} slots per layer among them, "
        f"must be <= {format_bytes(room)}; {format_bytes(missing)} are missing: {remedy}",
        requirement=f"weights fit {name}",
        where=f"rank {rank}",
        missing=missing,
        relaxation=relaxation,
    )
