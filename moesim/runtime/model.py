"""A Hugging Face MoE model with seeded random weights, whole or spread over ranks by a plan and a mesh.

Weights are a function of (seed, parameter name), those of an expert of (seed, layer, expert, tensor): every rank makes
only the layers of its stage, its part of what tensor parallelism deals out and the experts of its slots, and any rank
can make any expert again. `skew` tilts the routers: all token embeddings share one direction, and the router row of the
expert at popularity rank p (a seeded permutation per layer) answers it with -skew·log p, so that loads look Zipf-like
while every token still routes by its own content. The tilt is part of the model's weights; placements neither see nor cause it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moesim.errors import ApplyError, ModelError, describe
from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan
from moesim.runtime.digest import digest
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.mesh import Mesh
from moesim.runtime.pipeline import cut
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.spec import ModelSpec
from moesim.runtime.tensor_parallel import SharedTokens, part, split, sum_partial_gradients

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


@dataclass(frozen=True, slots=True)
class _Origins:
    """What the parts of a whole model are called, whichever of them a rank keeps."""

    parameters: dict[int, tuple[str, bool]]
    """id of a parameter → its name, and whether it is an embedding."""
    blocks: dict[int, nn.Module]
    """MoE layer → its block."""

    @classmethod
    def of(cls, model: nn.Module) -> _Origins:
        parameters: dict[int, tuple[str, bool]] = {}
        for module_name, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):  # a tied weight goes by its first name
                parameters.setdefault(id(parameter), (f"{module_name}.{name}", isinstance(module, nn.Embedding)))
        return cls(parameters, moe_layers(model))


def _fill(model: nn.Module, spec: ModelSpec, origins: _Origins, dealt: dict[str, int], group: Any = None) -> dict[str, nn.Parameter]:
    """Give every parameter and buffer that is still without memory its seeded value; return those parameters by their names in the whole model.

    dealt: name → dimension of which this rank has its part of `group` only.
    """
    from transformers import PreTrainedModel

    assert isinstance(model, PreTrainedModel)
    made: dict[int, nn.Parameter] = {}
    result: dict[str, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            if id(parameter) not in made:
                full, is_embedding = origins.parameters[id(parameter)]
                if parameter.ndim == 1:
                    value = torch.ones(parameter.shape) if name == "weight" else torch.zeros(parameter.shape)
                else:
                    std = 1.0 if is_embedding else 1 / math.sqrt(parameter.shape[-1])
                    value = _normal(spec.seed, full, tuple(parameter.shape), std)
                if is_embedding:
                    value += SHARED_DIRECTION * _direction(spec, parameter.shape[-1])
                if full in dealt:
                    value = part(value, dealt[full], group)
                result[full] = made[id(parameter)] = nn.Parameter(value.to(parameter.dtype), requires_grad=parameter.requires_grad)
            setattr(module, name, made[id(parameter)])
        buffers = [name for name, buffer in module.named_buffers(recurse=False) if buffer.device.type == "meta"]
        for name in buffers:
            setattr(module, name, torch.zeros_like(getattr(module, name), device="cpu"))
        if buffers and "RotaryEmbedding" in type(module).__name__:
            model._init_weights(module)
    return result


def _direction(spec: ModelSpec, hidden: int) -> torch.Tensor:
    return _normal(spec.seed, "shared direction", (hidden,), 1.0).sign()


def _tilt_routers(blocks: dict[int, nn.Module], spec: ModelSpec, num_experts: int) -> None:
    for layer, block in blocks.items():
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
    origins = _Origins.of(model)
    with torch.no_grad():
        for layer, block in origins.blocks.items():
            for name, parameter in list(block.experts.named_parameters()):
                shape, transposed = tuple(parameter.shape[1:]), block.experts.is_transposed
                rows = [expert_tensor(spec, layer, expert, name, shape, transposed) for expert in range(parameter.shape[0])]
                setattr(block.experts, name, nn.Parameter(torch.stack(rows), requires_grad=False))
        _fill(model, spec, origins, {})
        _tilt_routers(origins.blocks, spec, num_experts)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank holds of a model."""

    model: nn.Module
    experts: list[ExpertParallelExperts]
    """Of the MoE layers of its stage, in their order."""
    layers: range
    """Layers of its stage."""
    layer_ids: tuple[int, ...]
    """MoE layers of its stage, as indices in the whole model."""
    dense: dict[str, nn.Parameter]
    """All other parameters, by their names in the whole model."""
    dealt: dict[str, int]
    """Those of which a tensor-parallel rank has one part → dimension."""


def build_part(spec: ModelSpec, plan: Plan, mesh: Mesh, *, slot_capacity: int | None = None) -> Part:
    """Return what the rank of `mesh` holds of the model under `plan`."""
    model = skeleton(spec)
    num_experts, layer_ids, _ = facts(model)
    plan.check_model(name=spec.name, num_experts=num_experts, moe_layer_ids=layer_ids)
    mesh.layout.check_layers(model.config.num_hidden_layers, layer_ids, plan.source)
    origins = _Origins.of(model)
    layers = mesh.layout.layers(mesh.stage, model.config.num_hidden_layers)
    held = {layer: block for layer, block in origins.blocks.items() if layer in layers}
    with torch.no_grad():
        dealt, partial = split(model, mesh, plan.source)
        cut(model, layers)
        experts = [_distribute(block, layer, spec, SlotMap.of(plan, layer_ids.index(layer), 0), mesh, slot_capacity) for layer, block in held.items()]
        dense = _fill(model, spec, origins, dealt, mesh.tp)
        _tilt_routers(held, spec, num_experts)
    for name in partial:
        if name in dense:
            sum_partial_gradients(dense[name], mesh.tp)
    return Part(model=model, experts=experts, layers=layers, layer_ids=tuple(held), dense=dense, dealt={key: dealt[key] for key in dealt if key in dense})


def _distribute(block: Any, layer: int, spec: ModelSpec, slot_map: SlotMap, mesh: Mesh, slot_capacity: int | None) -> ExpertParallelExperts:
    """Replace the experts of a block of a skeleton by the slots that this rank owns; `layer` is the index in the model."""
    experts = ExpertParallelExperts(block.experts, slot_map, rank=mesh.ep_rank, group=mesh.ep, slot_capacity=slot_capacity)
    for local, expert in enumerate(slot_map.slot_to_expert_S[experts.first : experts.last].tolist()):
        for name in experts.tensor_names if expert >= 0 else ():
            experts.tensor(name)[local] = expert_tensor(spec, layer, expert, name, experts.shapes[name], experts.is_transposed)
    block.experts = experts if mesh.tp is None else SharedTokens(experts, mesh.tp)
    return experts


def build_distributed(spec: ModelSpec, plan: Plan, *, rank: int, group: Any, slot_capacity: int | None = None) -> tuple[nn.Module, list[ExpertParallelExperts]]:
    """Return this rank's part of the model, and its expert modules layer by layer, where `group` is all there is."""
    held = build_part(spec, plan, Mesh.flat(rank=rank, size=plan.num_ranks, group=group), slot_capacity=slot_capacity)
    return held.model, held.experts


def fingerprint(held: Part, spec: ModelSpec) -> str:
    """Return a SHA-256 over the specification and the weights of a part that its data-parallel replicas hold alike (all but the experts)."""
    parts = [canonical_json(spec.content())]
    for name, parameter in sorted(held.dense.items()):
        parts.append(name.encode() + digest(parameter.detach().contiguous().view(torch.uint8).numpy()))
    return sha256_hex(b"".join(parts))


def agree(store: Any, mesh: Mesh, own: str) -> str:
    """Return one fingerprint of the whole model from those of all parts; raise ApplyError if two replicas of a part differ."""
    store.set(f"fingerprint/{mesh.rank}", own)
    found: dict[tuple[int, int], tuple[int, str]] = {}
    for rank in range(mesh.layout.world):
        place = mesh.layout.stage_of(rank), rank % mesh.layout.tp
        first, value = found.setdefault(place, (rank, store.get(f"fingerprint/{rank}").decode()))
        if store.get(f"fingerprint/{rank}").decode() != value:
            raise ApplyError(f"ranks {first} and {rank} built different weights; give all of them the same model, seed and versions of torch")
    return sha256_hex("".join(value for _, value in found.values()).encode())
