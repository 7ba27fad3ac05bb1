"""What a training step needs beside the backward pass: gradients summed over those who hold the same weights.

The exchange of the experts brings every token's gradient to the slot that served it; replicas of an expert then hold a part
each. All other weights are shared by the data-parallel replicas. After `sum_gradients` equal weights have
equal gradients, bit for bit, so that optimizers keep them equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.mesh import Mesh
from moesim.runtime.model import Part
from moesim.runtime.tensor_parallel import all_sum


def sum_gradients(held: Part, mesh: Mesh) -> None:
    """Sum the gradients of weights that several ranks hold; a collective of all ranks of a stage, after `backward`."""
    if mesh.dp is not None:
        for parameter in held.dense.values():
            if parameter.grad is not None:
                mesh.dp.allreduce([parameter.grad]).wait()
    sum_replicas(held.experts, mesh.ep)


def sum_replicas(layers: Iterable[ExpertParallelExperts], group: Any) -> None:
    """Sum the gradients of replicas over the group; a collective after `backward`.

    Every expert gets a gradient, zero if no token came: where it lives must not decide whether an optimizer counts a step for it.
    """
    for experts in layers:
        for name in experts.tensor_names:
            parameter = getattr(experts, name)
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        table_S = torch.from_numpy(experts.slot_map.slot_to_expert_S.astype("int64"))
        copies_E = torch.bincount(table_S[table_S >= 0])
        shared = torch.nonzero(copies_E > 1).reshape(-1)
        if not len(shared):
            continue
        position_E = torch.full_like(copies_E, -1)
        position_E[shared] = torch.arange(len(shared))
        local = table_S[experts.first : experts.last]
        slots = torch.nonzero((local >= 0) & (position_E[local.clamp(min=0)] >= 0)).reshape(-1)
        place = position_E[local[slots]]
        for name in experts.tensor_names:
            gradient = getattr(experts, name).grad
            if gradient is not None:
                parts = gradient.new_zeros((len(shared), *gradient.shape[1:])).index_add_(0, place, gradient[slots])
                gradient[slots] = (parts if group is None else all_sum(parts, group))[place]
