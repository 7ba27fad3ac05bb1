"""A Hugging Face MoE model with seeded random weights, whole or spread over ranks by a plan.

Weights are a function of (seed, parameter name), those of an expert of (seed, layer, expert, tensor): every rank makes
only what it holds, and any rank can make any expert again. `skew` tilts the routers: all token embeddings share one
direction, and the router row of the expert at popularity rank p (a seeded permutation per layer) answers it with
-skew·log p, so that loads look Zipf-like while every token still routes by its own content. The tilt is part of
the model's weights; placements neither see nor cause it.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from moesim.errors import ModelError, describe
from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan
from moesim.runtime.digest import digest
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.spec import ModelSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOT_PASSED = ("model_type", "architectures", "auto_map", "quantization_config", "torch_dtype", "dtype", "transformers_version")
SHARED_DIRECTION = 0.7
"""Weight of the direction that all embeddings share, relative to their own part."""


def skeleton(spec: ModelSpec) -> nn.Module:
    """Return the model's modules without memory for weights; raise ModelError if transformers refuses the configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        fields = {key: value for key, value in spec.config.items() if key not in NOT_PASSED}
        config = AutoConfig.for_model(spec.config["model_type"], **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[spec.dtype], attn_implementation="eager", trust_remote_code=False)
    except Exception as cause:  # transformers raises whatever it likes on a bad configuration
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise ModelError(f"{spec.source}: transformers cannot build this model ({reason}); check the configuration") from None
    model.eval()
    if not moe_layers(model) or (spec.moe_layer_ids and facts(model) != (spec.num_experts, spec.moe_layer_ids, spec.top_k)):
        built = facts(model) if moe_layers(model) else "a dense model"
        raise ModelError(f"{spec.source}: transformers builds {built} (experts, MoE layers, top-k) from it, which is not what the configuration says to moesim")
    return model


def moe_layers(model: nn.Module) -> dict[int, nn.Module]:
    """Return layer index → MoE block (the module that has `experts`), in the order of the layers."""
    found = {}
    for name, _ in model.named_modules():
        if name.endswith(".experts"):
            block = model.get_submodule(name.rpartition(".")[0])
            found[int(name.split(".layers.")[1].split(".")[0])] = block
    return dict(sorted(found.items()))


def router_of(block: nn.Module, num_experts: int) -> nn.Module:
    """Return the router of a MoE block: its child with a weight of one row per expert."""
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if name != "experts" and isinstance(weight, torch.Tensor) and weight.ndim == 2 and weight.shape[0] == num_experts:
            return child
    raise ModelError(f"{type(block).__name__}: has no router with one row per expert; this model family is not supported")


def facts(model: nn.Module) -> tuple[int, tuple[int, ...], int]:
    """Return (experts per layer, MoE layer indices, experts per token) of a skeleton or model."""
    blocks = moe_layers(model)
    counts = {int(block.experts.gate_up_proj.shape[0]) for block in blocks.values()}
    if len(counts) != 1:
        raise ModelError(describe("model", "experts per layer", sorted(counts), "must be the same in all MoE layers"))
    return counts.pop(), tuple(blocks), int(model.config.num_experts_per_tok)


def _normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    key = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    return torch.from_numpy(np.random.Generator(np.random.PCG64(key)).standard_normal(shape, np.float32)).mul_(std)


def expert_tensor(spec: ModelSpec, layer: int, expert: int, name: str, shape: tuple[int, ...], transposed: bool) -> torch.Tensor:
    """Return one tensor of one expert as the seed defines it; `layer` is the index in the model."""
    fan_in = shape[-2] if transposed and len(shape) == 2 else shape[-1]
    std = 0.1 if len(shape) == 1 else 1 / math.sqrt(fan_in)
    return _normal(spec.seed, f"layers.{layer}.experts.{expert}.{name}", shape, std).to(DTYPES[spec.dtype])


def _fill(model: nn.Module, spec: ModelSpec) -> None:
    """Give every parameter and buffer that is still without memory its seeded value."""
    from transformers import PreTrainedModel

    assert isinstance(model, PreTrainedModel)
    made: dict[int, nn.Parameter] = {}
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                full = f"{module_name}.{name}"
                if parameter.ndim == 1:
                    value = torch.ones(parameter.shape) if name == "weight" else torch.zeros(parameter.shape)
                else:
                    std = 1.0 if isinstance(module, nn.Embedding) else 1 / math.sqrt(parameter.shape[-1])
                    value = _normal(spec.seed, full, tuple(parameter.shape), std)
                if isinstance(module, nn.Embedding):
                    value += SHARED_DIRECTION * _direction(spec, parameter.shape[-1])
                made[id(parameter)] = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.device.type == "meta"]
        for name in buffers:
            setattr(module, name, torch.zeros_like(getattr(module, name), device="cpu"))
        if buffers and "RotaryEmbedding" in type(module).__name__:
            model._init_weights(module)


def _direction(spec: ModelSpec, hidden: int) -> torch.Tensor:
    return _normal(spec.seed, "shared direction", (hidden,), 1.0).sign()


def _tilt_routers(model: nn.Module, spec: ModelSpec, num_experts: int) -> None:
    for layer, block in moe_layers(model).items():
        weight = router_of(block, num_experts).weight
        hidden = weight.shape[1]
        popularity = torch.argsort(_normal(spec.seed, f"layers.{layer}.popularity", (num_experts,), 1.0)) + 1
        answer = -spec.skew * popularity.float().log()
        gain = math.sqrt(1 + SHARED_DIRECTION**2) / SHARED_DIRECTION / hidden
        weight.data += (answer[:, None] * gain * _direction(spec, hidden)).to(weight.dtype)


def build(spec: ModelSpec) -> nn.Module:
    """Return the whole model in this process, with the experts module of transformers."""
    model = skeleton(spec)
    num_experts, _, _ = facts(model)
    with torch.no_grad():
        for layer, block in moe_layers(model).items():
            for name, parameter in list(block.experts.named_parameters()):
                shape, transposed = tuple(parameter.shape[1:]), block.experts.is_transposed
                rows = [expert_tensor(spec, layer, expert, name, shape, transposed) for expert in range(parameter.shape[0])]
                setattr(block.experts, name, nn.Parameter(torch.stack(rows), requires_grad=False))
        _fill(model, spec)
        _tilt_routers(model, spec, num_experts)
    return model


def distribute(model: nn.Module, spec: ModelSpec, plan: Plan, *, rank: int, group: Any, slot_capacity: int | None = None) -> list[ExpertParallelExperts]:
    """Replace the experts of a skeleton by those slots of `plan` that `rank` owns; return the new modules, layer by layer."""
    num_experts, layer_ids, _ = facts(model)
    plan.check_model(name=spec.name, num_experts=num_experts, moe_layer_ids=layer_ids)
    result = []
    for row, (layer, block) in enumerate(moe_layers(model).items()):
        experts = ExpertParallelExperts(block.experts, SlotMap.of(plan, row, 0), rank=rank, group=group, slot_capacity=slot_capacity)
        for local, expert in enumerate(experts.slot_map.slot_to_expert_S[experts.first : experts.last].tolist()):
            for name in experts.tensor_names if expert >= 0 else ():
                experts.tensor(name)[local] = expert_tensor(spec, layer, expert, name, experts.shapes[name], experts.is_transposed)
        block.experts = experts
        result.append(experts)
    return result


def build_distributed(spec: ModelSpec, plan: Plan, *, rank: int, group: Any, slot_capacity: int | None = None) -> tuple[nn.Module, list[ExpertParallelExperts]]:
    """Return this rank's part of the model, and its expert modules layer by layer."""
    model = skeleton(spec)
    with torch.no_grad():
        experts = distribute(model, spec, plan, rank=rank, group=group, slot_capacity=slot_capacity)
        _fill(model, spec)
        _tilt_routers(model, spec, plan.num_experts)
    return model, experts


def fingerprint(model: nn.Module, spec: ModelSpec) -> str:
    """Return a SHA-256 over the specification and the weights that every rank holds alike (all but the experts)."""
    parts = [canonical_json(spec.content())]
    for name, parameter in sorted(model.named_parameters()):
        if ".experts." not in name:
            parts.append(name.encode() + digest(parameter.detach().contiguous().view(torch.uint8).numpy()))
    return sha256_hex(b"".join(parts))
