"""A small MoE layer without transformers, spread over ranks: for tests of what moves and of what training does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed import PrefixStore

from moesim.plan import Plan, linear
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.migration import Migration, live_digests
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.training import sum_replicas


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


class Training:
    """One rank's training of a Toy by Adam on tokens of its own, with migrations between steps."""

    def __init__(self, plan: Plan, *, rank: int, group: Any, store: Any, dtype: Any = torch.float32) -> None:
        self.plan, self.rank, self.group, self.store, self.epoch = plan, rank, group, store, 0
        self.toy = Toy(plan, rank=rank, group=group, dtype=dtype)
        self.layers = list(self.toy.layers)
        self.optimizer = torch.optim.Adam(self.toy.parameters(), lr=1e-2, eps=1e-3)
        for layer in self.layers:
            layer.rows.attach(self.optimizer)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's tokens [N, H] and targets [N, 8]; ranks have different numbers of them, some of them few."""
        generator = torch.Generator().manual_seed(step * 100 + self.rank)
        size = (24, 9, 1, 17, 0, 30, 5, 12)[self.rank]
        return torch.randn(size, 16, generator=generator), torch.randn(size, 8, generator=generator)

    def forward(self, step: int) -> torch.Tensor:
        """Return the outputs for the batch of `step`."""
        with torch.no_grad():
            return self.toy(self.batch(step)[0]).float()

    def step(self, step: int) -> float:
        """Train a step; return the loss over all ranks."""
        tokens, targets = self.batch(step)
        loss = (self.toy(tokens).float() - targets).square().sum() / 64
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.toy.dense:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self.group.allreduce([parameter.grad]).wait()
        sum_replicas(self.layers, self.group)
        self.optimizer.step()
        total = loss.detach().double()
        self.group.allreduce([total]).wait()
        return float(total)

    def migrate(self, plan: Plan) -> None:
        """Bring the experts to where `plan` has them."""
        self.epoch += 1
        migration = Migration(self.layers, self.plan, plan, rank=self.rank)
        migration.stage(PrefixStore(f"p2p/{self.epoch}", self.store), "127.0.0.1")
        migration.install(self.epoch)
        self.group.barrier().wait()  # the others may still be receiving
        migration.close()
        self.plan = plan

    def experts(self) -> dict[tuple[int, int], set[str]]:
        """Return by layer and expert the digests of what is held here: weights, and moments once there are any."""
        found: dict[tuple[int, int], set[str]] = {}
        for entry in live_digests(self.layers):
            found.setdefault((entry["row"], entry["expert"]), set()).add(entry["digest"])
        return found

    def weights(self) -> dict[tuple[int, int], Any]:
        """Return by layer and expert the weights held here, float32."""
        found = {}
        for layer in self.layers:
            for local, expert in enumerate(layer.slot_map.slot_to_expert_S[layer.first : layer.last].tolist()):
                if expert >= 0:
                    parts = [layer.tensor(name)[local].float().reshape(-1) for name in layer.tensor_names]
                    found[layer.slot_map.layer, expert] = torch.cat(parts).numpy()
        return found


def joined(parts: list[dict[tuple[int, int], set[str]]]) -> dict[tuple[int, int], set[str]]:
    """Return the digests of all ranks' copies by layer and expert."""
    found: dict[tuple[int, int], set[str]] = {}
    for part in parts:
        for key, values in part.items():
            found.setdefault(key, set()).update(values)
    return found


def any_plan(ranks: int, seed: int, *, experts: int = 12) -> Plan:
    """Return a random placement with replicas, uneven ranks, empty slots, an expert twice on a rank."""
    generator = np.random.Generator(np.random.PCG64(seed))
    per_rank = generator.integers(1, 4, ranks) + -(-experts // ranks)
    extra = int(per_rank.sum()) - experts
    table = np.stack([generator.permutation(np.concatenate([np.arange(experts), generator.integers(-1, experts, extra)])) for _ in range(2)])
    slot_rank = np.repeat(np.arange(ranks), per_rank)
    return Plan(model="toy", num_experts=experts, moe_layer_ids=(0, 1), slot_to_expert_LS=table, slot_rank_S=slot_rank, num_ranks=ranks)


def permuted(ranks: int, seed: int | None, *, experts: int = 12) -> Plan:
    """Return a random permutation, or the plain order if there is no seed; ranks are uneven where they do not divide."""
    return linear(model="toy", num_experts=experts, moe_layer_ids=(0, 1), num_ranks=ranks, kind="linear" if seed is None else "random", seed=seed or 0)
