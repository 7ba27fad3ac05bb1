"""A loop of one's own, with one's own model and optimizer, is a deployment: `moesim apply` moves experts and moments, and the loss stays the same."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import linear  # noqa: E402
from tests.runtime.live import moesim as run_moesim  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.dist
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_loop.py"
RANKS = 2


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("own_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train_alone(rank: int, size: int, group: Any, folder: str, steps: int) -> Any:
    store = torch.distributed.FileStore(f"{folder}/alone", size)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return load_example().train(steps, attached=False)


def plan(seed: int) -> Any:
    return linear(model="own-loop", num_experts=8, moe_layer_ids=(0, 1), num_ranks=RANKS, kind="random", seed=seed)


def test_apply_works_against_a_loop_of_ones_own_and_changes_no_loss(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, str(EXAMPLE), "--ranks", str(RANKS), "--steps", "100000", "--pace", "0.01"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        control = json.loads(process.stdout.readline())["control"]
        reports = []
        for seed in (1, 2):
            path = tmp_path / f"{seed}.json"
            plan(seed).write(path)
            dry = run_moesim("apply", str(path), "--to", control, "--dry-run")
            assert dry.returncode == 0, dry.stderr
            shown = dry.stdout + dry.stderr
            assert all(word in shown for word in ("staging", "predicted", "pays", "bytes from rank", "between ranks")), shown
            result = run_moesim("apply", str(path), "--to", control, "--json")
            assert result.returncode == 0, result.stderr
            reports.append(json.loads(result.stdout))
        again = json.loads(run_moesim("apply", str(path), "--to", control, "--json").stdout)
        from moesim.errors import ApplyError
        from moesim.runtime import client

        with pytest.raises(ApplyError, match="saves no checkpoints"):
            client.save_checkpoint(control, str(tmp_path / "saved"))
        client.stop(control)
        losses = json.loads(process.stdout.readline())["losses"]
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert [(report["status"], report["epoch"], report["outputs"]["bitwise"]) for report in reports] == [("installed", 1, True), ("installed", 2, True)]
    assert again["status"] == "unchanged" and again["epoch"] == 2
    assert all(report["pause_ms"] >= report["stage_ms"] for report in reports), "ranks that train stand still while weights move"
    weights = 3 * 32 * 16 * 4
    assert reports[0]["moved"]["bytes"] == 3 * weights * reports[0]["moved"]["slots"], "weights and both moments move"
    reference = run_ranks(RANKS, train_alone, str(tmp_path), len(losses), timeout_s=300)
    assert losses == reference[0]
    assert losses[-1] < losses[0] / 2


def test_what_cannot_move_is_refused() -> None:
    from moesim.errors import ModelError
    from moesim.runtime.own_loop import _check_optimizer, _Spread
    from tests.runtime.toys import Toy

    toy = Toy(linear(model="m", num_experts=8, moe_layer_ids=(0, 1), num_ranks=1), rank=0, group=None)
    optimizer = torch.optim.Adam(toy.parameters())
    layer = toy.layers[0]
    layer.rows.attach(optimizer)
    layer.rows.tensors()
    found = _Spread(linear(model="m", num_experts=8, moe_layer_ids=(0, 1), num_ranks=1), list(toy.layers), None, 0)
    own = {id(parameter) for parameter in toy.parameters()}
    assert not layer.rows.has_pending_gradients()
    toy(torch.randn(5, 16)).sum().backward()
    assert layer.rows.has_pending_gradients(), "a plan has to wait for the optimizer"
    _check_optimizer(optimizer, own, found)
    with pytest.raises(ModelError, match="parameter 0.*has an expert dimension"):
        _check_optimizer(torch.optim.Adam([torch.nn.Parameter(torch.zeros(8, 16, 8))]), own, found)
    optimizer.state[layer.down_proj]["factored"] = torch.zeros(8, 16)
    with pytest.raises(ModelError, match=r"down_proj.factored.*must have the shape"):
        layer.rows.tensors()
    layer.rows.register_state("factored")
    assert "down_proj.factored" in layer.rows.tensors()
    layer.register_buffer("scale", torch.ones(8))
    with pytest.raises(ModelError, match="scale.*not registered"):
        layer.rows.tensors()
    layer.rows.register("scale", lambda: layer.scale)
    assert layer.expert_bytes == 3 * 16 * 8 * 4 + 64 + 8
