"""The trace of the model that was trained here: its bytes, the structure that training put into its routing, and the script that made it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.model import load_model
from moesim.plan import linear
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import TokenBatch, concatenate

FINGERPRINT = "7d09adb96a6eface939d576efda27475033a82d4cb42b4d259a44ed799a94b59"
TOKENS, LAYERS, EXPERTS, TOP_K = 7248, 6, 32, 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows() -> TokenBatch:
    """Reading checks every shard against the hash in the manifest, which the fingerprint covers."""
    return concatenate(list(open_trace("byte-moe").batches()))


def test_the_trace_is_the_one_that_was_recorded(rows: TokenBatch) -> None:
    trace, model = open_trace("byte-moe"), load_model("byte-moe")
    assert trace.fingerprint == FINGERPRINT and not trace.is_synthetic and trace.routing == "recorded"
    assert trace.shape.moe_layer_ids == model.moe_layer_ids == tuple(range(LAYERS))
    assert (trace.shape.num_experts, trace.shape.top_k) == (model.num_experts, model.top_k) == (EXPERTS, TOP_K)
    assert len(rows) == TOKENS and np.bincount(rows.phase_T).tolist() == [4 * 12 * 128, 4 * 12 * 23] and len(set(rows.request_T.tolist())) == 48
    assert rows.weights_TLK is not None and (np.diff(rows.weights_TLK.astype(np.float32), axis=2) <= 0).all()
    assert np.abs(rows.weights_TLK.astype(np.float32).sum(2) - 1).max() < 2e-3
    facts = trace.provenance
    assert facts["date"] == "2026-11-22" and facts["hardware"].startswith("CPU, 2 cores") and "PSF" in facts["text_licence"]
    losses = facts["training"]["loss_nats_per_byte"]
    assert all(kind["held out"] < 1.5 < np.log(256) for kind in losses.values()), "it has learned"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    return api.trace_statistics("byte-moe", model="byte-moe", hardware="h100-sxm-8").report


def test_routing_has_the_structure_that_its_shuffle_lacks(report: dict[str, Any]) -> None:
    hops, company = report["affinity"], report["coactivation"]
    assert hops["information_bits"] > 0.3 > 20 * hops["null_information_bits"]
    assert company["information_bits"] > 0.5 > 4 * company["null_information_bits"]
    assert hops["top_share"] > 1.4 * hops["null_top_share"]


def test_a_plan_for_one_kind_of_text_is_a_poor_one_for_another(report: dict[str, Any]) -> None:
    """The four kinds are two windows each; docstrings and topics are both English."""
    drift = report["drift"]
    transfer = np.array(drift["transfer"])
    kind = np.arange(8) // 2
    own, english = kind[:, None] == kind, np.isin(kind, (1, 2))
    foreign = ~own & ~(english[:, None] & english)
    assert transfer[own].mean() > 0.85 and transfer[foreign].mean() < 0.65
    assert drift["transfer_loss"] > 0.2


def test_predictions_of_the_next_router_hit_three_times_as_often_as_those_of_another_token(rows: TokenBatch) -> None:
    assert rows.predicted_TLK is not None

    def hits(predicted_TLK: np.ndarray) -> float:
        return float((predicted_TLK[..., None] == rows.experts_TLK[:, :, None, :]).any(-1).mean())

    other = np.random.Generator(np.random.PCG64(0)).permutation(TOKENS)
    assert hits(rows.predicted_TLK) > 0.65 and hits(rows.predicted_TLK) > 2.8 * hits(rows.predicted_TLK[other])


@pytest.mark.parametrize(("hardware", "ranks", "options"), [("laptop-1", 1, {"times": "trace"}), ("h100-sxm-8", 8, {})])
def test_a_replay_gives_every_rank_the_tokens_that_its_experts_were_chosen_for(hardware: str, ranks: int, options: dict[str, str], rows: TokenBatch) -> None:
    """Under the recorded map on one rank, under linear blocks on eight."""
    replayed = api.replay("byte-moe", model="byte-moe", hardware=hardware, **options)  # type: ignore[arg-type]
    plan = linear(model="byte-moe", num_experts=EXPERTS, moe_layer_ids=tuple(range(LAYERS)), num_ranks=ranks)
    rank_E = plan.slot_rank_S[np.argsort(plan.slot_to_expert_LS[0])]
    wanted_R = np.bincount(rank_E[rows.experts_TLK].ravel(), minlength=ranks)
    assert (replayed.ledger.load_LR.reshape(-1, ranks).sum(0) == wanted_R).all() and wanted_R.sum() == TOKENS * LAYERS * TOP_K
    if options:
        assert replayed.report["times"]["map"] == "recorded"


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_byte_moe", ROOT / "examples" / "train_byte_moe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_trains_records_and_says_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="the script trains with torch")
    pytest.importorskip("transformers", reason="the script trains a transformers model")
    module = script()
    code, docstrings = module.apart('"""Top."""\nx = 1\ndef f():\n    """Say."""\n    return x\n')
    assert code == "x = 1\ndef f():\n    return x" and docstrings == ["Top.", "Say."]
    text = {kind: {use: (f"{kind} {use} " * 99).encode() for use in ("train", "held out")} for kind in module.KINDS}
    for name, value in {"REQUESTS": 2, "NEW": 3, "EVALUATED": 2, "BATCH": 2, "corpus": lambda: text}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(sys, "argv", ["train_byte_moe.py", "-o", str(tmp_path / "t"), "--steps", "2", "--checkpoint", str(tmp_path / "model")])
    module.main()
    found = json.loads(capsys.readouterr().out)
    trace = open_trace(str(tmp_path / "t"))
    assert found["rows"] == trace.num_rows == 4 * 2 * (128 + 2) and trace.provenance["training"]["steps"] == 2
    assert trace.shape == open_trace("byte-moe").shape and trace.provenance["kinds"]["docstrings"].startswith("steps 3..5")
    assert list((tmp_path / "model").glob("*.safetensors"))


def test_training_and_held_out_text_are_apart_by_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="the script trains with torch")
    module = script()
    (tmp_path / "encodings").mkdir()
    (tmp_path / "test").mkdir()
    for number in range(200):
        (tmp_path / f"m{number}.py").write_text(f'"""Doc {number};"""\nx = {number};\n')
    (tmp_path / "encodings" / "cp1.py").write_text("table = 1\n")
    (tmp_path / "test" / "left_out.py").write_text("secret = 1\n")
    monkeypatch.setattr(module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    found = module.corpus()
    assert all(
        module.share(f"m{number}.py") == use for use in ("train", "held out") for number in range(200) if f"x = {number};".encode() in found["code"][use]
    )
    lines = [len(found["code"][use].splitlines()) for use in ("train", "held out")]
    assert sum(lines) == 200 and 10 < lines[1] < 45 and b"Doc" not in found["code"]["train"] and b"x =" not in found["docstrings"]["train"]
    assert b"table = 1" in found["tables"][module.share("encodings/cp1.py")] and not any(b"secret" in text for uses in found.values() for text in uses.values())
    assert len(found["topics"]["train"]) > 4 * len(found["topics"]["held out"]) > 0
