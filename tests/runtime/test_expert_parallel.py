"""Spreading experts over ranks changes no bit for permutations and only rounding for replicas; mixed maps are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import Plan, linear  # noqa: E402
from moesim.runtime.expert_parallel import ExpertParallelExperts  # noqa: E402
from moesim.runtime.model import build, build_distributed, facts, moe_layers  # noqa: E402
from moesim.runtime.slot_map import SlotMap  # noqa: E402
from moesim.runtime.spec import ModelSpec  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.dist

COMMON = {
    "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 256, "pad_token_id": None, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "qwen3_moe": {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "olmoe": {"num_experts": 16, "num_experts_per_tok": 4},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16},
}


def spec_of(family: str, dtype: str = "float32") -> ModelSpec:
    return ModelSpec(name=family, config={"model_type": family, **COMMON, **FAMILIES[family]}, dtype=dtype, skew=0.5)


def experts_of(family: str) -> int:
    fields = FAMILIES[family]
    return int(str(fields.get("num_experts", fields.get("num_local_experts"))))


def permutation(family: str, ranks: int, seed: int) -> Plan:
    return linear(model=family, num_experts=experts_of(family), moe_layer_ids=(0, 1), num_ranks=ranks, kind="random", seed=seed)


def replicated(family: str, ranks: int, seed: int) -> Plan:
    """Uneven ranks, empty slots, replicas with unequal shares, an expert twice on one rank."""
    generator = np.random.Generator(np.random.PCG64(seed))
    experts = experts_of(family)
    per_rank = generator.integers(1, 4, ranks) + -(-experts // ranks)
    slots = int(per_rank.sum())
    table = np.stack([generator.permutation(np.concatenate([np.arange(experts), generator.integers(-1, experts, slots - experts)])) for _ in range(2)])
    share = np.where(table >= 0, generator.random(table.shape) + 0.1, 0.0)
    for row in range(2):
        for expert in range(experts):
            share[row, table[row] == expert] /= share[row, table[row] == expert].sum()
    return Plan(
        model=family, num_experts=experts, moe_layer_ids=(0, 1), num_ranks=ranks, slot_to_expert_LS=table,
        slot_rank_S=np.repeat(np.arange(ranks), per_rank), share_LS=share,
    )  # fmt: skip


def inputs(spec: ModelSpec, ranks: int) -> tuple[Any, Any, Any]:
    """Hidden states, expert ids and weights per rank; ranks hold different numbers of tokens, the last of four none."""
    experts = experts_of(spec.name)
    choices = int(spec.config["num_experts_per_tok"])
    generator = torch.Generator().manual_seed(3)
    sizes = [13, 40, 7, 0, 9, 21, 1, 30][:ranks]
    hidden = [torch.randn(size, 64, generator=generator).to(getattr(torch, spec.dtype)) for size in sizes]
    scores = [torch.randn(size, experts, generator=generator) - torch.arange(experts) / 4 for size in sizes]
    ids = [torch.topk(score, choices).indices for score in scores]
    weights = [torch.softmax(torch.topk(score, choices).values, 1) for score in scores]
    return hidden, ids, weights


def layer_outputs(rank: int, size: int, group: Any, spec: ModelSpec, plans: list[Plan]) -> list[tuple[Any, Any, Any]]:
    hidden, ids, weights = inputs(spec, size)
    results = []
    with torch.no_grad():
        for plan in plans:
            _, layers = build_distributed(spec, plan, rank=rank, group=group)
            output = layers[1](hidden[rank], ids[rank], weights[rank])
            results.append((output.float().numpy(), layers[1].take_counts()[0], layers[1].slot_map.local(rank)))
    return results


def alone(spec: ModelSpec, ranks: int, batch: int) -> list[np.ndarray]:
    """The same tokens through one process: our module without a group, and the experts of transformers."""
    hidden, ids, weights = inputs(spec, batch)
    joined = torch.cat(hidden), torch.cat(ids), torch.cat(weights)
    plan = linear(model=spec.name, num_experts=experts_of(spec.name), moe_layer_ids=(0, 1), num_ranks=1)
    with torch.no_grad():
        _, layers = build_distributed(spec, plan, rank=0, group=None)
        ours = layers[1](*joined).float()
        theirs = moe_layers(build(spec))[1].experts(*joined).float()
    sizes = [len(part) for part in hidden]
    assert float((ours - theirs).abs().max()) <= (1e-5 if spec.dtype == "float32" else 0.05) * float(theirs.abs().max())
    return [part.numpy() for part in ours.split(sizes)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_permutations_are_bitwise_equal_to_one_process_and_replicas_within_tolerance(family: str, dtype: str, ranks: int) -> None:
    spec = spec_of(family, dtype)
    permutations = [permutation(family, ranks, seed) for seed in range(3)]
    replicas = [replicated(family, ranks, seed) for seed in range(3)]
    expected = alone(spec, 1, ranks)
    answers = run_ranks(ranks, layer_outputs, spec, permutations + replicas)
    tolerance = 1e-5 if dtype == "float32" else 0.03
    for rank in range(ranks):
        for output, _, _ in answers[rank][:3]:
            assert output.tobytes() == expected[rank].tobytes()
        for output, _, _ in answers[rank][3:]:
            assert np.abs(output - expected[rank]).max(initial=0) <= tolerance * max(np.abs(expected[rank]).max(initial=1), 1)


def test_received_counts_follow_routing_and_shares() -> None:
    spec = spec_of("qwen3_moe")
    plan = replicated("qwen3_moe", 4, 0)
    answers = run_ranks(4, layer_outputs, spec, [plan])
    _, ids, _ = inputs(spec, 4)
    loads = np.bincount(torch.cat(ids).reshape(-1).numpy(), minlength=16)
    received = np.concatenate([answer[0][1] for answer in answers])
    by_expert = np.zeros(16)
    np.add.at(by_expert, plan.slot_to_expert_LS[1][plan.slot_to_expert_LS[1] >= 0], received[plan.slot_to_expert_LS[1] >= 0])
    assert by_expert.tolist() == loads.tolist()
    assert received[plan.slot_to_expert_LS[1] < 0].sum() == 0
    shares = plan.shares_LS()[1]
    wanted = np.where(plan.slot_to_expert_LS[1] >= 0, loads[plan.slot_to_expert_LS[1]] * shares, 0)
    assert np.abs(received - wanted).max() <= 4, "at most one token per source rank off the exact share"


def test_choice_of_replicas_honours_shares_in_the_limit() -> None:
    plan = replicated("mixtral", 4, 1)
    slot_map = SlotMap.of(plan, 0, 0)
    slots = slot_map.choose(torch.arange(8).repeat(4000)[:, None], 2)
    measured = np.bincount(slots.numpy(), minlength=plan.num_slots) / 4000
    assert np.abs(measured - plan.shares_LS()[0]).max() < 2e-3


def mixed(rank: int, size: int, group: Any, spec: ModelSpec, plans: list[Plan], epochs: list[int]) -> str:
    hidden, ids, weights = inputs(spec, size)
    with torch.no_grad():
        _, layers = build_distributed(spec, plans[rank], rank=rank, group=group, slot_capacity=16)
        for row, experts in enumerate(layers):
            experts.use(SlotMap.of(plans[rank], row, epochs[rank]))
        layers[0](hidden[rank], ids[rank], weights[rank])
    return "exchanged"


@pytest.mark.parametrize("case", ["epoch", "map", "slots per rank"])
def test_a_rank_with_another_epoch_or_map_is_refused_by_all(case: str) -> None:
    plans, epochs = [permutation("qwen3_moe", 3, 0)] * 3, [4, 4, 4]
    if case == "epoch":
        epochs[2] = 5
    elif case == "map":
        plans = [*plans[:2], permutation("qwen3_moe", 3, 1)]
    else:
        plans = [*plans[:2], replicated("qwen3_moe", 3, 0)]
    answers = run_ranks(3, mixed, spec_of("qwen3_moe"), plans, epochs, raw=True)
    assert [kind for kind, _ in answers] == ["error"] * 3
    assert {value[0] for _, value in answers} == {"MapMismatch"}
    assert "epoch 4" in answers[0][1][1]


def gradients(rank: int, size: int, group: Any, spec: ModelSpec, plan: Plan) -> tuple[Any, dict[int, Any]]:
    hidden, ids, weights = inputs(spec, size)
    _, layers = build_distributed(spec, plan, rank=rank, group=group)
    leaf = hidden[rank].clone().requires_grad_()
    layers[1].requires_grad_(True)
    layers[1](leaf, ids[rank], weights[rank]).square().sum().backward()
    first, last = layers[1].slot_map.local(rank)
    return leaf.grad.numpy(), {int(plan.slot_to_expert_LS[1, first + q]): layers[1].down_proj.grad[q].numpy() for q in range(last - first)}


def test_gradients_flow_through_the_exchange() -> None:
    spec = spec_of("qwen3_moe")
    hidden, ids, weights = inputs(spec, 2)
    one = linear(model="qwen3_moe", num_experts=16, moe_layer_ids=(0, 1), num_ranks=1)
    _, layers = build_distributed(spec, one, rank=0, group=None)
    layers[1].requires_grad_(True)
    leaf = torch.cat(hidden).requires_grad_()
    layers[1](leaf, torch.cat(ids), torch.cat(weights)).square().sum().backward()
    answers = run_ranks(2, gradients, spec, permutation("qwen3_moe", 2, 5))
    assert np.concatenate([answer[0] for answer in answers]).tobytes() == leaf.grad.numpy().tobytes()
    for _, by_expert in answers:
        for expert, gradient in by_expert.items():
            assert gradient.tobytes() == layers[1].down_proj.grad[expert].numpy().tobytes()


def whole_model(rank: int, size: int, group: Any, spec: ModelSpec, plans: list[Plan]) -> list[bytes]:
    tokens = torch.from_numpy(np.random.Generator(np.random.PCG64(rank)).integers(0, 256, (2, 9)))
    with torch.no_grad():
        return [build_distributed(spec, plan, rank=rank, group=group)[0](input_ids=tokens).logits.numpy().tobytes() for plan in plans]


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_logits_of_the_whole_model_do_not_depend_on_the_permutation(family: str) -> None:
    spec = spec_of(family)
    answers = run_ranks(4, whole_model, spec, [permutation(family, 4, seed) for seed in range(4)])
    assert all(len(set(outputs)) == 1 for outputs in answers)
    assert len({outputs[0] for outputs in answers}) == 4, "ranks serve different tokens"


def test_an_unregistered_expert_tensor_is_refused() -> None:
    from moesim.errors import ModelError
    from moesim.runtime.model import skeleton

    model = skeleton(spec_of("mixtral"))
    template = moe_layers(model)[0].experts
    template.register_parameter("down_proj_scale", torch.nn.Parameter(torch.ones(8, device="meta")))
    experts, layer_ids, _ = facts(model)
    plan = linear(model="m", num_experts=experts, moe_layer_ids=layer_ids, num_ranks=1)
    with pytest.raises(ModelError, match="down_proj_scale"):
        ExpertParallelExperts(template, SlotMap.of(plan, 0, 0), rank=0)
