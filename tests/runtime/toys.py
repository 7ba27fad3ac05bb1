"""A small MoE layer without transformers, spread over ranks: for tests of what moves and of what training does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moesim.plan import Plan
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.slot_map import SlotMap


class Experts(nn.Module):
    """Gated experts as transformers has them; every weight a function of the seed."""

    def __init__(self, experts: int, hidden: int, width: int, dtype: Any, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.gate_up_proj = nn.Parameter((torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5).to(dtype))
        self.down_proj = nn.Parameter((torch.randn(experts, hidden, width, generator=generator) / width**0.5).to(dtype))

    def _apply_gate(self, value: torch.Tensor) -> torch.Tensor:
        gate, up = value.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up


class Toy(nn.Module):
    """Two MoE layers with routers, residual connections and a head; `rank` holds the slots that `plan` gives it."""

    def __init__(self, plan: Plan, *, rank: int, group: Any, dtype: Any = torch.float32, hidden: int = 16, width: int = 8, top_k: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.top_k, self.dtype = top_k, dtype
        self.routers = nn.ParameterList(nn.Parameter(torch.randn(plan.num_experts, hidden, generator=generator)) for _ in range(plan.num_layers))
        self.head = nn.Parameter((torch.randn(8, hidden, generator=generator) / 4).to(dtype))
        self.layers = nn.ModuleList()
        for row in range(plan.num_layers):
            whole, slot_map = Experts(plan.num_experts, hidden, width, dtype, row), SlotMap.of(plan, row, 0)
            weights = {name: getattr(whole, name).data for name in ("gate_up_proj", "down_proj")}
            layer = ExpertParallelExperts(whole, slot_map, rank=rank, group=group, slot_capacity=plan.num_experts + 4)
            for local, expert in enumerate(slot_map.slot_to_expert_S[layer.first : layer.last].tolist()):
                for name in weights if expert >= 0 else ():
                    layer.tensor(name)[local] = weights[name][expert]
            self.layers.append(layer)

    def forward(self, tokens_NH: torch.Tensor) -> torch.Tensor:
        """Return [N, 8]."""
        hidden = tokens_NH.to(self.dtype)
        for router, layer in zip(self.routers, self.layers, strict=True):
            weight, expert = torch.softmax(hidden.float() @ router.T, -1).topk(self.top_k)
            hidden = hidden + layer(hidden, expert, weight.to(self.dtype))
        return hidden @ self.head.T

    @property
    def dense(self) -> list[nn.Parameter]:
        """What all ranks hold alike."""
        return [*self.routers, self.head]
