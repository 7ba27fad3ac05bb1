"""The placement of one MoE layer as lookup tables: which slot serves which token of which expert.

Shapes: E experts, S slots, R ranks, X the largest number of replicas, N tokens, k experts per token. Replicas are chosen
by rule, not by chance: the j-th token that a rank sends to an expert takes point j·R + rank of the golden-ratio sequence
in [0, 1), and the slot whose interval of cumulative shares holds that point. Integers only, so all machines agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.plan import Plan
from moesim.runtime.moves import placement_sha256

if TYPE_CHECKING:
    import torch

_GOLDEN = 0x9E3779B1
_ONE = 1 << 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMap:
    """One layer of a plan, ready for dispatch."""

    layer: int
    """Row of the plan."""
    epoch: int
    """Number of plans installed before this one."""
    map_sha256: str
    """Identity of the whole plan's placement and shares; every exchange carries its first 16 bytes."""
    slot_to_expert_S: np.ndarray
    """int32 [S], -1 where empty."""
    slots_per_rank_R: np.ndarray
    """int64 [R]."""
    slot_EX: np.ndarray
    """int64 [E, X]: slots of every expert, the last one repeated."""
    limit_EX: np.ndarray
    """int64 [E, X]: end of a slot's interval of cumulative shares, in units of 2^-32."""

    @classmethod
    def of(cls, plan: Plan, row: int, epoch: int) -> SlotMap:
        """Build the tables of row `row` of `plan`."""
        table, share = plan.slot_to_expert_LS[row], plan.shares_LS()[row]
        replicas = plan.replicas_LE[row]
        width = int(replicas.max())
        slot_EX = np.zeros((plan.num_experts, width), np.int64)
        limit_EX = np.full((plan.num_experts, width), _ONE, np.int64)
        for expert in range(plan.num_experts):
            slots = np.flatnonzero(table == expert)
            slot_EX[expert] = slots[-1]
            slot_EX[expert, : slots.size] = slots
            limit_EX[expert, : slots.size - 1] = np.rint(np.cumsum(share[slots])[:-1] * _ONE)
        return cls(
            layer=row, epoch=epoch, map_sha256=placement_sha256(plan), slot_to_expert_S=table,
            slots_per_rank_R=np.bincount(plan.slot_rank_S, minlength=plan.num_ranks).astype(np.int64), slot_EX=slot_EX, limit_EX=limit_EX,
        )  # fmt: skip

    @property
    def num_slots(self) -> int:
        """S, slots of the layer over all ranks."""
        return int(self.slot_to_expert_S.size)

    def local(self, rank: int) -> tuple[int, int]:
        """Return the first slot of `rank` and one past its last."""
        ends = np.cumsum(self.slots_per_rank_R)
        return int(ends[rank] - self.slots_per_rank_R[rank]), int(ends[rank])

    def choose(self, expert_Nk: torch.Tensor, rank: int) -> torch.Tensor:
        """Return int64 [N·k]: the slot of every (token, choice) that `rank` sends."""
        import torch

        flat = expert_Nk.reshape(-1).long()
        slots = torch.from_numpy(self.slot_EX).to(flat.device)
        if self.slot_EX.shape[1] == 1:
            return slots[flat, 0]
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=slots.shape[0])
        start = torch.cumsum(counts, 0) - counts
        nth = torch.empty_like(flat)
        nth[order] = torch.arange(flat.numel(), device=flat.device) - start[flat[order]]
        point = ((nth * len(self.slots_per_rank_R) + rank) * _GOLDEN) & (_ONE - 1)
        limits = torch.from_numpy(self.limit_EX).to(flat.device)[flat]
        replica = (point[:, None] >= limits).sum(1)
        return slots[flat, replica]
