"""The placement of a deployment that has lost ranks: what survives stays where it is, what is lost is put into free slots.

Pure arithmetic on plans. An expert that a surviving rank holds needs no copy: its replicas serve on. One that no survivor
holds goes to the survivor with the most free slots of that layer, else into the slot of an expert with another copy; its
weights come from where the deployment got them when it started. Shapes: L layers, S slots, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moesim.errors import PlanError, describe
from moesim.plan import Plan
from moesim.runtime.moves import local_tables


def check_can_shrink(plan: Plan) -> None:
    """Raise PlanError if a deployment with the degrees of `plan` cannot go on without one of its ranks."""
    for name in ("tp", "pp", "expert_tp"):
        if getattr(plan.parallel, name) > 1:
            rule = "must be 1: the ranks left do not hold the whole model"
            raise PlanError(describe(plan.source, f"parallel.{name}", getattr(plan.parallel, name), rule, "start the deployment again"))


def shrunk(plan: Plan, survivors: Sequence[int], slot_capacity: int) -> Plan:
    """Return the placement on the `survivors` (ranks of `plan`, ascending), which are numbered anew from 0.

    slot_capacity: most slots of a rank. Raises PlanError if the survivors have no room for every expert.
    """
    share_LS = plan.shares_LS()
    width = max(slot_capacity, *(int((plan.slot_rank_S == rank).sum()) for rank in survivors))
    tables = np.full((len(survivors), plan.num_layers, width), -1, np.int64)
    shares = np.zeros(tables.shape)
    held = []
    for place, rank in enumerate(survivors):
        mine = plan.slot_rank_S == rank
        held.append(int(mine.sum()))
        tables[place, :, : held[-1]], shares[place, :, : held[-1]] = plan.slot_to_expert_LS[:, mine], share_LS[:, mine]
    for layer in range(plan.num_layers):
        here = tables[:, layer]  # a view: what is assigned below lands in `tables`
        for expert in sorted(set(plan.slot_to_expert_LS[layer].tolist()) - {-1} - set(here.reshape(-1).tolist())):
            here[_room(here, layer, expert)] = expert
        for expert in np.unique(here[here >= 0]):
            slots = here == expert
            total = shares[:, layer][slots].sum()
            shares[:, layer][slots] = shares[:, layer][slots] / total if total > 0 else 1 / slots.sum()
        shares[:, layer][here < 0] = 0
    used = [max(count, int((tables[place] >= 0).any(0).nonzero()[0].max(initial=-1)) + 1) for place, count in enumerate(held)]
    parallel, size = plan.parallel, len(survivors)
    degrees = {name: size for name in ("dp", "ep") if getattr(parallel, name) > 1}
    return replace(
        plan, num_ranks=size, parallel=replace(parallel, **degrees), slot_rank_S=np.repeat(np.arange(size), used),
        slot_to_expert_LS=np.concatenate([tables[place][:, :count] for place, count in enumerate(used)], axis=1),
        share_LS=None if plan.share_LS is None else np.concatenate([shares[place][:, :count] for place, count in enumerate(used)], axis=1),
        result={}, source=f"{plan.source}, shrunk",
    )  # fmt: skip


def _room(here_RQ: np.ndarray, layer: int, expert: int) -> tuple[int, int]:
    """Return (rank, slot) for an expert without one: empty on the emptiest rank, else one of the most replicated expert."""
    empty_R = (here_RQ < 0).sum(1)
    if empty_R.max():
        rank = int(empty_R.argmax())
        return rank, int((here_RQ[rank] < 0).argmax())
    experts, copies = np.unique(here_RQ, return_counts=True)
    if copies.max() == 1:
        raise PlanError(f"layer row {layer}: the {here_RQ.shape[0]} ranks left have room for {here_RQ.size} experts and none for expert {expert}")
    rank, slot = np.argwhere(here_RQ == experts[copies.argmax()])[-1]
    return int(rank), int(slot)


def to_fill(old: Plan, survivors: Sequence[int], new: Plan, place: int) -> list[tuple[int, int, int]]:
    """Return (layer row, local slot, expert) of the slots whose weights rank `place` of `new` = shrunk(old, survivors, …) does not hold."""
    before, after = local_tables(old)[survivors[place]], local_tables(new)[place]
    same = np.zeros(after.shape, bool)
    same[:, : before.shape[1]] = after[:, : before.shape[1]] == before
    return [(int(row), int(slot), int(after[row, slot])) for row, slot in np.argwhere(~same & (after >= 0))]
