"""A checkpoint is about logical experts: saved under one placement and mesh, it is loaded under any other, optimizer state included."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")
pytest.importorskip("torch.distributed.checkpoint")  # here once, instead of in every forked rank
pytest.importorskip("torch.distributed.tensor")

from moesim.plan import Parallel, Plan, linear  # noqa: E402
from moesim.runtime import checkpoint  # noqa: E402
from moesim.runtime.digest import digest  # noqa: E402
from moesim.runtime.mesh import Layout, join  # noqa: E402
from moesim.runtime.model import build_part, skeleton  # noqa: E402
from moesim.runtime.pipeline import Stage  # noqa: E402
from moesim.runtime.spec import ModelSpec  # noqa: E402
from moesim.runtime.training import sum_gradients  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.dist
EXPERTS, LAYERS, SEQUENCES = 8, (0, 1), 4
CONFIG = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "pad_token_id": None, "eos_token_id": 2,
}  # fmt: skip


def spec_of(seed: int = 0) -> ModelSpec:
    return ModelSpec(name="tiny", config=CONFIG, seed=seed, num_experts=EXPERTS, moe_layer_ids=LAYERS, top_k=2)


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Let transformers import its model once, before any rank is forked."""
    skeleton(spec_of())


def permuted(ranks: int, seed: int = 3, **degrees: int) -> Plan:
    plan = linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=ranks, kind="random", seed=seed)
    return replace(plan, parallel=Parallel(**degrees))


def replicated(ranks: int, **degrees: int) -> Plan:
    """Uneven ranks, an empty slot, experts on several ranks and one twice on the same."""
    table = np.array([[0, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, -1], [7, 6, 5, 4, 3, 2, 1, 0, 0, 7, 7, -1]])
    slots = np.sort(np.arange(12) % ranks)
    slots[0:3] = 0
    return Plan(
        model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, slot_to_expert_LS=table, slot_rank_S=slots, num_ranks=ranks, parallel=Parallel(**degrees),
    )  # fmt: skip


class Run:
    """One rank of a training run on the same global batch, whatever the mesh."""

    def __init__(self, rank: int, size: int, store: str, plan: Plan, seed: int) -> None:
        self.mesh = join(torch.distributed.FileStore(store, size), Layout.of(plan), rank=rank, timeout_s=20, host="127.0.0.1")
        self.held = build_part(spec_of(seed), plan, self.mesh)
        self.stage = Stage(self.held.model, self.mesh)
        self.optimizer = torch.optim.Adam(self.held.model.parameters(), lr=1e-2)

    def step(self) -> float:
        """Train on this replica's share; return its part of the loss."""
        tokens = torch.from_numpy(np.random.Generator(np.random.PCG64(7)).integers(0, 64, (SEQUENCES, 9)))
        mine = tokens.split(SEQUENCES // self.mesh.layout.dp)[self.mesh.replica]
        logits = self.stage(mine)[0]
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), mine[:, 1:].flatten(), reduction="sum")
        self.optimizer.zero_grad()
        loss.backward()
        sum_gradients(self.held, self.mesh)
        self.optimizer.step()
        return float(loss.detach()) if self.mesh.tp_index == 0 else 0.0

    def digests(self) -> dict[str, set[bytes]]:
        """Return what this rank holds: expert weights and moments by logical expert, all else by name."""
        found: dict[str, set[bytes]] = {}
        for layer, experts in zip(self.held.layer_ids, self.held.experts, strict=True):
            for local, expert in enumerate(experts.slot_map.slot_to_expert_S[experts.first : experts.last].tolist()):
                if expert < 0:
                    continue
                found.setdefault(f"{layer}.{expert}", set()).add(digest(experts.read_expert(local)))
                for name in experts.tensor_names:
                    for moment in ("exp_avg", "exp_avg_sq"):
                        row = self.optimizer.state[getattr(experts, name)][moment][local]
                        found.setdefault(f"{moment}.{layer}.{expert}.{name}", set()).add(digest(row.contiguous().numpy()))
        for name, value in self.held.dense.items():
            if name not in self.held.dealt:
                found[name] = {digest(value.detach().contiguous().numpy())}
        return found


def train_and_save(rank: int, size: int, group: Any, folder: str, plan: Plan) -> Any:
    run = Run(rank, size, f"{folder}/first", plan, seed=0)
    run.step()
    checkpoint.save(Path(folder) / "saved", run.held, run.mesh, spec_of(), run.optimizer)
    return run.digests(), [run.step() for _ in range(3)]


def load_and_train(rank: int, size: int, group: Any, folder: str, plan: Plan) -> Any:
    run = Run(rank, size, f"{folder}/second", plan, seed=1)
    checkpoint.load(Path(folder) / "saved", run.held, run.mesh, spec_of(1), run.optimizer)
    return run.digests(), [run.step() for _ in range(3)]


def joined(ranks: list[Any]) -> tuple[dict[str, set[bytes]], np.ndarray]:
    found: dict[str, set[bytes]] = {}
    for part, _ in ranks:
        for key, values in part.items():
            found.setdefault(key, set()).update(values)
    return found, np.sum([losses for _, losses in ranks], axis=0)


CASES = {
    "replicas on 4 ranks, permuted on 2": (replicated(4), permuted(2)),
    "permuted on 2 ranks, replicas on 4": (permuted(2), replicated(4)),
    "TP2 on 4 ranks, none on 2": (replicated(4, tp=2), permuted(2)),
    "none on 2 ranks, TP2 on 4": (permuted(2), permuted(4, tp=2, seed=9)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_one_plan_saves_another_loads_and_trains_on(case: str, tmp_path: Path) -> None:
    first, second = CASES[case]
    weights, losses = joined(run_ranks(first.num_ranks, train_and_save, str(tmp_path), first))
    again, more = joined(run_ranks(second.num_ranks, load_and_train, str(tmp_path), second))
    assert all(len(values) == 1 for values in [*weights.values(), *again.values()]), "copies of one expert differ"
    shared = set(weights) & set(again)
    assert {f"{layer}.{expert}" for layer in LAYERS for expert in range(EXPERTS)} <= shared and "model.embed_tokens.weight" in shared
    assert all(weights[key] == again[key] for key in shared)
    assert more == pytest.approx(losses, rel=1e-5), "weights and moments decide the losses of the next steps"
    assert losses[0] > losses[1] > losses[2]


def test_every_expert_is_saved_once_whatever_its_replicas(tmp_path: Path) -> None:
    run_ranks(4, train_and_save, str(tmp_path), replicated(4, tp=2))
    held: dict[str, list[int]] = {}
    for path in (tmp_path / "saved").glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for key, entry in header.items():
            if key != "__metadata__":
                held.setdefault(key, []).append(int(np.prod(entry["shape"], dtype=np.int64)))
    experts = [key for key in held if key.startswith("layers.")]
    assert len(experts) == len(LAYERS) * EXPERTS * 2 and all(len(held[key]) == 1 for key in experts)
    assert held["model.layers.0.self_attn.q_proj.weight"] == [32 * 32 // 2] * 2, "tensor-parallel parts lie side by side"
    assert held["model.embed_tokens.weight"] == [64 * 32]


def attempt(rank: int, size: int, group: Any, folder: str, store: int, what: str, spec: ModelSpec) -> str:
    from moesim.errors import MoesimError

    run = Run(rank, size, f"{folder}/{store}", permuted(size), seed=0)
    try:
        if what == "save":
            checkpoint.save(Path(folder) / "saved", run.held, run.mesh, spec)
        else:
            checkpoint.load(Path(folder) / "saved", run.held, run.mesh, spec, run.optimizer if what == "load state" else None)
    except MoesimError as error:
        return str(error)
    return "done"


def test_damage_and_other_models_are_refused_on_all_ranks(tmp_path: Path) -> None:
    stores = itertools.count()

    def on(ranks: int, what: str, spec: ModelSpec) -> list[str]:
        return run_ranks(ranks, attempt, str(tmp_path), next(stores), what, spec)

    spec = spec_of()
    assert all("does not exist" in answer for answer in on(2, "load", spec))
    assert on(2, "save", spec) == ["done"] * 2
    assert all("is in use" in answer for answer in on(2, "save", spec))
    assert on(1, "load", spec) == ["done"]
    assert "no optimizer state" in on(1, "load state", spec)[0]
    assert "num_experts" in on(1, "load", replace(spec, num_experts=16))[0]
    path = sorted((tmp_path / "saved").glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert all("changed or damaged" in answer for answer in on(2, "load", spec))
    path.unlink()
    assert all("is missing" in answer for answer in on(2, "load", spec))
