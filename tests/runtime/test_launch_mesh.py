"""A model spread over tensor-parallel ranks and pipeline stages answers as one process does, forward, backward and while it decodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import PlanError  # noqa: E402
from moesim.plan import Parallel, Plan, linear  # noqa: E402
from moesim.runtime.mesh import Layout, Mesh, is_silent, join  # noqa: E402
from moesim.runtime.model import build_part, skeleton  # noqa: E402
from moesim.runtime.pipeline import Stage  # noqa: E402
from moesim.runtime.spec import ModelSpec  # noqa: E402
from moesim.runtime.training import sum_gradients  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

dist = pytest.mark.dist
COMMON = {
    "hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256,
    "pad_token_id": None, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 3, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    "olmoe": {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {"num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 4},
    "deepseek_v2": {
        "num_hidden_layers": 3, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
        "n_shared_experts": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "routed_scaling_factor": 16.0,
    },
    "deepseek_v3": {
        "num_hidden_layers": 4, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "q_lora_rank": 32,
        "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
        "num_key_value_heads": 4, "norm_topk_prob": True,
    },
}  # fmt: skip
BATCH, LENGTH, STEPS = 2, 9, 3


def spec_of(family: str) -> ModelSpec:
    return ModelSpec(name=family, config={"model_type": family, **COMMON, **FAMILIES[family]}, skew=0.5)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Let transformers import its models once, before any rank is forked."""
    for family in FAMILIES:
        skeleton(spec_of(family))


def plan_of(family: str, ranks: int, *, tp: int = 1, pp: int = 1, seed: int = 1) -> Plan:
    fields = FAMILIES[family]
    experts = next(int(fields[name]) for name in ("num_experts", "num_local_experts", "n_routed_experts") if name in fields)
    layers = range(int(fields.get("first_k_dense_replace", 0)), int(fields["num_hidden_layers"]))
    plan = linear(model=family, num_experts=experts, moe_layer_ids=tuple(layers), num_ranks=ranks, kind="random", seed=seed)
    return replace(plan, parallel=Parallel(tp=tp, ep=ranks, dp=ranks // tp, pp=pp))


def tokens_of(replica: int) -> Any:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(replica)).integers(0, 256, (BATCH, LENGTH)))


def answers(stage: Stage, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the output of a forward pass, and the tokens of a greedy decode."""
    with torch.inference_mode():
        output = stage(tokens)[0].numpy()
        chosen, cache = stage.next_tokens(tokens, None)
        decoded = [chosen]
        for _ in range(STEPS):
            chosen, cache = stage.next_tokens(chosen, cache)
            decoded.append(chosen)
    return output, torch.cat(decoded, 1).numpy()


def on_mesh(rank: int, size: int, group: Any, folder: str, families: list[str], degrees: dict[str, int]) -> list[Any]:
    layout = Layout(**degrees)
    mesh = join(torch.distributed.FileStore(f"{folder}/mesh", size), layout, rank=rank, timeout_s=20, host="127.0.0.1")
    result = []
    for family in families:
        held = build_part(spec_of(family), plan_of(family, layout.ranks, tp=layout.tp, pp=layout.pp), mesh)
        result.append((mesh.is_last, mesh.replica, *answers(Stage(held.model, mesh), tokens_of(mesh.replica))))
    return result


def alone(family: str, replicas: int) -> tuple[np.ndarray, np.ndarray]:
    """One process on the tokens of all replicas."""
    mesh = Mesh.flat(rank=0, size=1, group=None)
    held = build_part(spec_of(family), plan_of(family, 1), mesh)
    return answers(Stage(held.model, mesh), torch.cat([tokens_of(replica) for replica in range(replicas)]))


@dist
@pytest.mark.parametrize("degrees", [{"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"pp": 2, "tp": 2}], ids=["TP2xEP", "PP2xEP2", "PP2xTP2"])
def test_logits_and_answers_are_those_of_one_process(degrees: dict[str, int], tmp_path: Path) -> None:
    families = list(FAMILIES)
    ranks = run_ranks(4, on_mesh, str(tmp_path), families, degrees)
    for index, family in enumerate(families):
        output, decoded = alone(family, degrees.get("dp", 1))
        for is_last, replica, ours, tokens in (rank[index] for rank in ranks):
            rows = slice(BATCH * replica, BATCH * (replica + 1))
            assert (tokens == decoded[rows]).all(), family
            if is_last:
                assert np.abs(ours - output[rows]).max() <= 1e-5 * np.abs(output).max(), family


@dist
def test_pipeline_stages_change_no_bit(tmp_path: Path) -> None:
    families = list(FAMILIES)
    for name in ("flat", "staged"):
        (tmp_path / name).mkdir()
    flat = run_ranks(2, on_mesh, str(tmp_path / "flat"), families, {"dp": 2})
    staged = run_ranks(4, on_mesh, str(tmp_path / "staged"), families, {"dp": 2, "pp": 2})
    for index in range(len(families)):
        for replica in range(2):
            assert staged[2 + replica][index][2].tobytes() == flat[replica][index][2].tobytes()


def gradients(rank: int, size: int, group: Any, folder: str, family: str, degrees: dict[str, int]) -> tuple[float, dict[str, Any]]:
    layout = Layout(**degrees)
    mesh = Mesh.flat(rank=0, size=1, group=None)
    if size > 1:
        mesh = join(torch.distributed.FileStore(f"{folder}/mesh", size), layout, rank=rank, timeout_s=20, host="127.0.0.1")
    held = build_part(spec_of(family), plan_of(family, layout.ranks, tp=layout.tp), mesh)
    replicas = range(2) if size == 1 else [mesh.replica]
    tokens = torch.cat([tokens_of(replica) for replica in replicas])
    logits = Stage(held.model, mesh)(tokens)[0]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    loss.backward()
    sum_gradients(held, mesh)
    found = {name: value.grad.numpy() for name, value in held.dense.items() if value.grad is not None}
    for layer, experts in zip(held.layer_ids, held.experts, strict=True):
        for local, expert in enumerate(experts.slot_map.slot_to_expert_S[experts.first : experts.last].tolist()):
            found |= {f"{layer}.{expert}.{name}": getattr(experts, name).grad[local].numpy() for name in experts.tensor_names}
    return float(loss.detach()), {"dealt": (held.dealt, mesh.tp_index), **found}


@dist
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_tensor_parallelism_are_those_of_one_process(family: str, tmp_path: Path) -> None:
    ranks = run_ranks(4, gradients, str(tmp_path), family, {"tp": 2, "dp": 2})
    ((loss, whole),) = run_ranks(1, gradients, str(tmp_path), family, {})
    assert ranks[0][0] + ranks[2][0] == pytest.approx(loss, rel=1e-5)
    seen = set()
    for _, found in ranks:
        dealt, index = found.pop("dealt")
        for name, value in found.items():
            wanted = whole[name]
            if name in dealt:
                wanted = np.split(wanted, 2, axis=dealt[name])[index]
            assert np.abs(value - wanted).max() <= 2e-4 * np.abs(whole[name]).max() + 1e-7, name
            seen.add(name)
    assert seen == set(whole) - {"dealt"}


def test_ranks_are_numbered_by_stage_replica_and_tensor_parallel_index() -> None:
    layout = Layout.of(plan_of("qwen3_moe", 4, tp=2, pp=2))
    assert (layout.world, layout.ranks, layout.dp) == (8, 4, 2)
    places = [Mesh(layout=layout, rank=rank, ep=None) for rank in range(8)]
    assert [(one.stage, one.replica, one.tp_index) for one in places] == [(s, d, t) for s in range(2) for d in range(2) for t in range(2)]
    assert [place.share(5) for place in places[:2]] == [slice(0, 2), slice(2, 5)]
    assert [layout.layers(stage, 7) for stage in range(2)] == [range(0, 4), range(4, 7)]


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (Parallel(tp=3), "parallel.tp = 3 must divide num_ranks 4"),
        (Parallel(tp=2, dp=4), "parallel.dp = 4 must be 2"),
        (Parallel(ep=2), "parallel.ep = 2 must be 4"),
        (Parallel(ep=2, expert_tp=2), "parallel.expert_tp = 2 must be 1"),
    ],
)
def test_degrees_that_contradict_each_other_are_refused(parallel: Parallel, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Layout.of(replace(plan_of("mixtral", 4), parallel=parallel))


def test_a_stage_without_experts_and_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PlanError, match="without a MoE layer"):
        Layout(pp=3).check_layers(6, (3, 4, 5), "plan.json")
    plan = plan_of("mixtral", 4, tp=4)
    with pytest.raises(PlanError, match="key-value heads"):
        build_part(spec_of("mixtral"), plan, Mesh(layout=Layout.of(plan), rank=0, ep=None, tp=object()))


def test_only_a_plan_for_several_ranks_that_names_no_degree_is_silent() -> None:
    assert is_silent(Parallel(), 4) and not is_silent(Parallel(), 1) and not is_silent(Parallel(tp=2), 4)
