"""Which models can be served, how a large one is narrowed, and that asking for help needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import ModelError
from moesim.model.hf_config import load_model
from moesim.runtime.spec import FAMILIES, read_spec
from tests.runtime.live import CONFIG, write_config


def test_a_small_model_is_served_as_it_is(tmp_path: Path) -> None:
    spec = read_spec(str(write_config(tmp_path / "tiny")))
    assert (spec.name, spec.scaled, spec.num_experts, spec.moe_layer_ids, spec.top_k) == ("tiny", False, 16, (0, 1, 2), 4)
    assert spec.config["hidden_size"] == CONFIG["hidden_size"]
    assert read_spec(str(tmp_path / "tiny")).content() == spec.content(), "the folder stands for its config.json"


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
def test_a_large_model_is_narrowed_but_keeps_layers_experts_and_routing(name: str) -> None:
    spec, model = read_spec(name), load_model(name)
    assert spec.scaled and spec.config["hidden_size"] == 64
    assert (spec.num_experts, spec.moe_layer_ids, spec.top_k, spec.sha256) == (model.num_experts, model.moe_layer_ids, model.top_k, model.sha256)


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
def test_transformers_builds_the_narrowed_model_with_the_routing_of_the_full_one(name: str) -> None:
    pytest.importorskip("torch", reason="the runtime needs torch")
    pytest.importorskip("transformers", reason="the runtime needs transformers")
    from moesim.runtime.model import facts, skeleton

    model = load_model(name)
    assert facts(skeleton(read_spec(name))) == (model.num_experts, model.moe_layer_ids, model.top_k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mystery"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"num_experts": 0}, "no MoE layers"),
        ({"num_experts": -4}, "num_experts"),
        ({"hidden_size": 1 << 30}, "hidden_size"),
        ({"num_hidden_layers": "three"}, "num_hidden_layers"),
        ({"max_position_embeddings": 1 << 40}, "max_position_embeddings"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_spec(str(write_config(tmp_path / "bad", **changes)))


def test_full_scale_is_refused_where_it_cannot_fit() -> None:
    with pytest.raises(ModelError, match="weights"):
        read_spec("deepseek-v3", scale="full")


def test_names_and_files_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for name in ("no-such-model", str(tmp_path / "none.json"), str(tmp_path)):
        with pytest.raises(ModelError):
            read_spec(name)


def test_the_demo_models_are_small_and_known_families() -> None:
    for path in sorted((Path(__file__).parents[2] / "moesim/runtime/models").glob("*.json")):
        spec = read_spec(path.stem)
        assert not spec.scaled and json.loads(path.read_text())["model_type"] in FAMILIES


def test_help_refusals_and_calls_work_without_torch(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from moesim.cli.main import main\n"
        "for words in (['apply', '--help'], ['serve-demo', '--help'], ['apply', 'none.json', '--to', '127.0.0.1:9'], ['apply', 'p', '--to', 'x']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        print('code', end.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert [line for line in done.stdout.splitlines() if line.startswith("code")] == ["code 0", "code 0", "code 2", "code 2"]
    assert "Traceback" not in done.stderr
