"""Attention and dense layers split over a tensor-parallel group, by the model's own plan where it has one.

A plan names modules and styles (`colwise`: rows of the weight are dealt out; `rowwise`: columns, and outputs are summed;
`…_gather_output`, `…_split_input`: the values between stay whole). Ranks of a group see the same tokens; for the experts, which
belong to all ranks of the stage, each takes an equal share of them. All of it carries gradients.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from moesim.errors import PlanError, describe
from moesim.runtime.mesh import Mesh

HEADS = {"layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.k_proj": "colwise", "layers.*.self_attn.v_proj": "colwise"}
OWN = {
    "gpt_oss": {**HEADS, "layers.*.self_attn.sinks": "colwise", "layers.*.self_attn.o_proj": "rowwise"},
    "deepseek_v3": {
        "layers.*.self_attn.q_proj": "colwise", "layers.*.self_attn.q_b_proj": "colwise", "layers.*.self_attn.kv_b_proj": "colwise",
        "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj", "layers.*.self_attn.o_proj": "rowwise",
    },
}  # fmt: skip
"""For the families whose configuration has no plan for the attention: split by heads."""
PARTIAL = "replicated_with_grad_allreduce"
DIMS = {"colwise": 0, "colwise_gather_output": 0, "rowwise": 1, "rowwise_split_input": 1}
"""Which dimension of a weight is dealt out."""


class _Sum(torch.autograd.Function):
    """Sum over the group forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        return all_sum(value, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _SumBack(torch.autograd.Function):
    """Identity forward, sum over the group backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_sum(gradient, ctx.group), None


class _Take(torch.autograd.Function):
    """This rank's part of dimension `dim` forward; all parts' gradients backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
        ctx.dim, ctx.group, ctx.size = dim, group, value.shape[dim]
        return part(value, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return all_parts(gradient, ctx.dim, ctx.size, ctx.group), None, None


class _Join(torch.autograd.Function):
    """All ranks' parts side by side forward; this rank's part of the gradient backward."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, dim: int, size: int, group: Any) -> torch.Tensor:
        ctx.dim, ctx.group = dim, group
        return all_parts(value, dim, size, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return part(gradient, ctx.dim, ctx.group), None, None, None


def bounds(size: int, group: Any) -> list[tuple[int, int]]:
    """Return begin and end of every rank's part of `size`."""
    ranks = group.size()
    return [(size * index // ranks, size * (index + 1) // ranks) for index in range(ranks)]


def part(value: torch.Tensor, dim: int, group: Any) -> torch.Tensor:
    """Return this rank's part of dimension `dim`."""
    begin, end = bounds(value.shape[dim], group)[group.rank()]
    return value.narrow(dim, begin, end - begin).contiguous()


def all_parts(value: torch.Tensor, dim: int, size: int, group: Any) -> torch.Tensor:
    """Return the ranks' parts of a dimension of `size`, side by side."""
    rows = value.movedim(dim, 0).contiguous()
    counts = [end - begin for begin, end in bounds(size, group)]
    result = rows.new_empty((size, *rows.shape[1:]))
    mine = rows.shape[0]
    group.alltoall_base(result, rows.repeat(len(counts), *[1] * (rows.ndim - 1)), counts, [mine] * len(counts)).wait()
    return result.movedim(0, dim).contiguous() if dim else result


def all_sum(value: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the sum of the ranks' values; added in the order of the ranks, so that all get the same bits."""
    ranks = group.size()
    return all_parts(value[None], 0, ranks, group).sum(0) if ranks > 1 else value


class SharedTokens(nn.Module):
    """The experts behind a tensor-parallel group: each rank hands in its share of the tokens and gets all results."""

    def __init__(self, experts: nn.Module, group: Any) -> None:
        super().__init__()
        self.shared, self.group = experts, group

    def forward(self, hidden_NH: torch.Tensor, expert_Nk: torch.Tensor, weight_Nk: torch.Tensor) -> torch.Tensor:
        """Return [N, H] as the experts alone would."""
        mine = self.shared(_Take.apply(hidden_NH, 0, self.group), part(expert_Nk, 0, self.group), _Take.apply(weight_Nk, 0, self.group))
        result: torch.Tensor = _Join.apply(mine, 0, hidden_NH.shape[0], self.group)
        return result


def split(model: nn.Module, mesh: Mesh, place: str) -> tuple[dict[str, int], list[str]]:
    """Let the modules of a skeleton work on their part of the weights; return name of a parameter → dimension dealt out,
    and the names of those whose gradients are partial sums.

    Raises PlanError if the heads or widths do not divide, or the model's plan has a style that is not known here.
    """
    if mesh.tp is None:
        return {}, []
    config: Any = model.config
    tp = mesh.layout.tp
    plan = {**(getattr(config, "base_model_tp_plan", None) or {}), **OWN.get(config.model_type, {})}
    plan = {pattern: style for pattern, style in plan.items() if ".experts" not in pattern}
    kv_heads = config.num_attention_heads if config.model_type in ("deepseek_v2", "deepseek_v3") else config.num_key_value_heads
    for name, heads in (("attention heads", config.num_attention_heads), ("key-value heads", kv_heads)):
        if heads % tp:
            raise PlanError(describe(place, "parallel.tp", tp, f"must divide the {heads} {name} of the model"))
    dealt: dict[str, int] = {}
    partial: list[str] = []
    for pattern, style in plan.items():
        wanted = re.compile(rf"(?:.*\.)?{re.escape(pattern).replace(re.escape('*'), '[0-9]+')}")
        for name, module in model.named_modules():
            if not wanted.fullmatch(name):
                continue
            if style == PARTIAL:
                partial += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            elif style == "mla_kv_a_proj" and isinstance(module, nn.Linear):
                _share_rotary_key(module, config.kv_lora_rank, mesh.tp)
            elif style in DIMS and isinstance(module, nn.Linear):
                dealt |= _deal(name, module, style, mesh.tp, place)
            else:
                raise PlanError(describe(place, "parallel.tp", tp, f"cannot be served: the model splits {pattern} as {style!r}", "use tp 1"))
        dealt |= {name: 0 for name, _ in model.named_parameters() if wanted.fullmatch(name)}
    return dealt, partial


def _deal(name: str, module: nn.Linear, style: str, group: Any, place: str) -> dict[str, int]:
    """Give `module` the forward pass of its style; return which dimensions of its parameters are dealt out."""
    dim, size = DIMS[style], group.size()
    if module.weight.shape[dim] % size:
        raise PlanError(describe(place, "parallel.tp", size, f"must divide the {module.weight.shape[dim]} features of {name}"))
    width = module.weight.shape[0]

    def colwise(value: torch.Tensor) -> torch.Tensor:
        result = linear(_SumBack.apply(value, group), module.weight, module.bias)
        return _Join.apply(result, result.ndim - 1, width, group) if style == "colwise_gather_output" else result

    def rowwise(value: torch.Tensor) -> torch.Tensor:
        if style == "rowwise_split_input":
            value = _Take.apply(value, value.ndim - 1, group)
        result: torch.Tensor = _Sum.apply(linear(value, module.weight), group)
        return result if module.bias is None else result + module.bias

    module.forward = rowwise if dim else colwise
    names = {f"{name}.weight": dim}
    return names | ({f"{name}.bias": 0} if module.bias is not None and not dim else {})


def _share_rotary_key(module: nn.Linear, latent: int, group: Any) -> None:
    """Sum the gradient of the part of a projection, behind the first `latent` features, that every head uses as it is."""

    def forward(value: torch.Tensor) -> torch.Tensor:
        result = linear(value, module.weight, module.bias)
        return torch.cat((result[..., :latent], _SumBack.apply(result[..., latent:], group)), -1)

    module.forward = forward


def sum_partial_gradients(parameter: nn.Parameter, group: Any) -> None:
    """Let the gradient of a parameter that every rank holds, but uses for its own heads only, be the whole one."""
    if parameter.requires_grad:
        parameter.register_hook(lambda gradient: all_sum(gradient, group))
