"""`moesim plan`: exit codes, one JSON object on stdout, and files that go out and come back the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.cli.main import main
from moesim.model import load_model
from moesim.plan import Plan
from moesim.solvers.problem import PlacementProblem
from moesim.solvers.registry import solve, to_plan
from tests.solvers.instances import lognormal

MODEL = load_model("tiny-moe")
RANKS = 4


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Run `moesim plan …`; return exit code, stdout and stderr."""
    with pytest.raises(SystemExit) as stop:
        main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def run_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    code, out, err = run(capsys, *words, "--json")
    assert code == 0, err
    node = json.loads(out)
    assert isinstance(node, dict)
    return node


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    problem = PlacementProblem(load_KLE=lognormal(len(MODEL.moe_layer_ids), MODEL.num_experts), num_ranks=RANKS, slots_per_rank_R=np.array(5))
    plan = to_plan(
        solve(problem),
        model=MODEL.name,
        num_experts=MODEL.num_experts,
        moe_layer_ids=MODEL.moe_layer_ids,
        num_ranks=RANKS,
        fingerprints={"model": MODEL.sha256},
    )
    plan.write(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_show_prints_what_the_plan_holds(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    node = run_json(capsys, "show", plan_file)
    assert (node["schema"], node["slots"], node["ranks"], node["experts"]) == ("moesim.plan-show/1", 20, RANKS, MODEL.num_experts)
    assert node["sha256"] == Plan.read(plan_file).sha256
    assert node["result"]["solver"] == "greedy"
    code, out, err = run(capsys, "show", plan_file)
    assert (code, out) == (0, "")
    assert "greedy" in err


@pytest.mark.parametrize(("name", "file"), [("sglang", "m.json"), ("trtllm", "m.yaml"), ("vllm-ascend", "m.json"), ("eplb", "m.json"), ("eplb", "m.npz")])
def test_export_and_import_return_the_same_map(capsys: pytest.CaptureFixture[str], plan_file: Path, name: str, file: str) -> None:
    target, returned = plan_file.parent / file, plan_file.parent / "back.json"
    assert run_json(capsys, "export", plan_file, "--format", name, "-o", target)["map_sha256"] == Plan.read(plan_file).map_sha256
    node = run_json(capsys, "import", "--format", name, target, "--model", MODEL.name, "--ranks", RANKS, "-o", returned)
    assert node["result"]["status"] == "IMPORTED"
    change = run_json(capsys, "diff", plan_file, returned)
    assert change["identical"]
    assert change["slots"] == 0


def test_diff_counts_what_moves(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    plan = Plan.read(plan_file)
    other = plan_file.parent / "other.json"
    table = np.array(plan.slot_to_expert_LS)
    table[0] = np.roll(table[0], 5)
    Plan(
        model=plan.model, num_experts=plan.num_experts, moe_layer_ids=plan.moe_layer_ids, slot_to_expert_LS=table, slot_rank_S=plan.slot_rank_S, num_ranks=RANKS
    ).write(other)
    change = run_json(capsys, "diff", plan_file, other)
    assert change["slots"] == int((table != plan.slot_to_expert_LS).sum()) == sum(change["ranks"].values())
    assert list(change["layers"]) == [str(plan.moe_layer_ids[0])]


def test_check_accepts_a_plan_that_fits(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    node = run_json(capsys, "check", plan_file, "--model", MODEL.name, "--hardware", f"h100-sxm-{RANKS}")
    assert node["ok"]
    assert node["problems"] == []


def test_check_fails_with_exit_code_1_and_the_rule(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    code, _, err = run(capsys, "check", plan_file, "--hardware", "h100-sxm-8")
    assert code == 1
    assert "num_ranks = 4 must equal the 8 devices" in err
    code, out, err = run(capsys, "check", plan_file, "--model", "mixtral-8x7b", "--json")
    assert code == 1
    assert json.loads(out)["problems"]
    assert "num_experts" in err


def test_a_damaged_plan_is_bad_input(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    plan_file.write_text(plan_file.read_text().replace('"num_ranks":4', '"num_ranks":5'))
    for words in (
        ("show", plan_file),
        ("check", plan_file),
        ("diff", plan_file, plan_file),
        ("export", plan_file, "--format", "eplb", "-o", plan_file.parent / "x.json"),
    ):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert "sha256" in err
        assert "Traceback" not in err


def test_an_unknown_format_is_named(capsys: pytest.CaptureFixture[str], plan_file: Path) -> None:
    code, _, err = run(capsys, "export", plan_file, "--format", "tensorrt", "-o", plan_file.parent / "x.json")
    assert code == 2
    assert "sglang, trtllm, vllm-ascend, eplb" in err
