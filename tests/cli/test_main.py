"""The command line as a user meets it: exit codes, one JSON object, one-line errors, whole files, instant help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "moesim", *words], capture_output=True, text=True, timeout=120, **options)


FLAME = ("--model", "flame-moe-290m", "--hardware", "h100-sxm-8")


def refused(done: subprocess.CompletedProcess[str], *parts: str, code: int = 2) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    for part in parts:
        assert part in done.stderr


def test_replay_prints_one_json_object_and_writes_whole_files(tmp_path: Path) -> None:
    done = run("replay", "flame-moe-290m", *FLAME, "--out", str(tmp_path / "o"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["schema"] == "moesim.replay/1"
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["metrics.json", "steps.csv", "timeline.json"]
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert metrics == {key: value for key, value in report.items() if key != "wall_s"}
    events = json.loads((tmp_path / "o" / "timeline.json").read_text())["traceEvents"]
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X"]
    assert max(ends) == pytest.approx(report["simulated_s"] * 1e6, rel=1e-6)


def test_people_read_tables_on_stderr() -> None:
    done = run("replay", "flame-moe-290m", *FLAME)
    assert done.returncode == 0 and done.stdout == "" and "straggler_wait" in done.stderr and "times are" in done.stderr


def test_solve_export_import_and_replay_agree(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("solve", "flame-moe-290m", *FLAME, "--redundant", "8", "-o", str(plan), "--json").returncode == 0
    for form, name in (("sglang", "s.json"), ("trtllm", "t.yaml"), ("vllm-ascend", "a.json"), ("eplb", "e.json")):
        done = run("plan", "export", str(plan), "--format", form, "--model", "flame-moe-290m", "-o", str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        back = tmp_path / f"{form}.plan.json"
        done = run("plan", "import", "--format", form, str(tmp_path / name), "--model", "flame-moe-290m", "--ranks", "8", "-o", str(back))
        assert done.returncode == 0, done.stderr
        assert json.loads(back.read_text())["slot_to_expert"] == json.loads(plan.read_text())["slot_to_expert"], form
    assert run("plan", "check", str(plan), "--model", "flame-moe-290m", "--hardware", "h100-sxm-8").returncode == 0


def test_it_works_from_any_folder(tmp_path: Path) -> None:
    assert run("replay", "flame-moe-290m", *FLAME, "--json", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["replai"], ["did you mean 'replay'"]),
        (["replay", "flame-moe-290m", "--model", "flame-moe-290m", "--hardware", "h100-sxm-9000x9000"], ["h100-sxm-9000x9000"]),
        (["replay", "flame-moe-290m", "--model", "flame-290", "--hardware", "h100-sxm-8"], ["flame-290"]),
        (["replay", "flame-moe-290m", *FLAME, "--set", "dispatch"], ["must have the form key=value"]),
        (["replay", "flame-moe-290m", *FLAME, "--set", "dispach=normal"], ["did you mean 'dispatch'"]),
        (["replay", "flame-moe-290m", *FLAME, "--plan", "x", "--placement", "eplb"], ["exclude each other"]),
        (["replay", "flame-moe-290m", *FLAME, "--plan", "/nowhere/p.json"], ["/nowhere/p.json: does not exist"]),
        (["replay", "flame-moe-290m", "--model", "olmoe-1b-7b", "--hardware", "h100-sxm-8"], ["flame-moe-290m"]),
        (["replay", "synthetic:zopf:1", *FLAME], ["zopf"]),
        (["replay", "synthetic:zipf:nan", *FLAME], ["nan"]),
        (["solve", "flame-moe-290m", *FLAME, "-o", "/dev/null/x", "--redundant", "8"], ["cannot be written"]),
        (["solve", "flame-moe-290m", *FLAME, "-o", "p.json", "--from", "absent.json", "--move-budget", "20 GB/s"], ["--move-budget"]),
        (["apply", "absent.json", "--to", "127.0.0.1:1", "--yes"], ["absent.json"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words: list[str], parts: list[str], tmp_path: Path) -> None:
    refused(run(*words, cwd=tmp_path), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("format: moesim.hardware/1\nextends: h100-sxm-8\nlinks: {scale_up: {bandwidth: -1 GB/s}}\n", "bandwidth"),
        ("format: moesim.hardware/1\nextends: h100-sxm-8\nlinks: {scale_up: {bandwidth: 450}}\n", "unit"),
        ("format: moesim.hardware/1\nextends: h100-sxm-8\nlinks: {scale_up: {bandwith: 450 GB/s}}\n", "bandwith"),
    ],
)
def test_a_wrong_hardware_file_names_file_and_key(tmp_path: Path, text: str, part: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    refused(run("replay", "flame-moe-290m", "--model", "flame-moe-290m", "--hardware", str(path)), "mine.yaml", part)


def test_a_flipped_bit_and_a_truncated_shard_are_refused(tmp_path: Path) -> None:
    done = run("trace", "synth", "synthetic:zipf:1.0", "--model", "flame-moe-290m", "--tokens", "256", "-o", str(tmp_path / "t"))
    assert done.returncode == 0, done.stderr
    shard = next((tmp_path / "t").glob("tokens-*.parquet"))
    good = shard.read_bytes()
    shard.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    refused(run("replay", str(tmp_path / "t"), *FLAME), shard.name)
    shard.write_bytes(good[:-20])
    refused(run("replay", str(tmp_path / "t"), *FLAME), shard.name)


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    assert run("solve", "flame-moe-290m", *FLAME, "-o", str(path)).returncode == 0
    path.write_text(path.read_text().replace('"num_ranks":8', '"num_ranks":4'))
    refused(run("replay", "flame-moe-290m", *FLAME, "--plan", str(path)), "p.json", "changed or damaged")


def test_help_and_version_are_instant_and_import_nothing() -> None:
    code = (
        "import sys\nfrom moesim.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'numpy', 'typer', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")
    assert run("--version").stdout.startswith("moesim ")


def test_without_a_command_the_help_is_shown_and_the_exit_is_2() -> None:
    done = run()
    assert done.returncode == 2 and "Commands:" in done.stdout


def test_every_listed_command_explains_itself() -> None:
    from moesim.cli.main import COMMANDS

    for name in COMMANDS:
        done = run(name, "--help", env={**os.environ, "COLUMNS": "100"})
        assert done.returncode == 0 and "Usage" in done.stdout, (name, done.stderr)
