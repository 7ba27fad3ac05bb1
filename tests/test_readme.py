"""The README's commands run as printed, in their order, in an empty folder."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDS_MORE = ("RECORDER_DUMPS", "CHECKPOINT", "CUT_OFF", "my-trace", "my-machine", "HOST:PORT", "serve-demo", "live-", "pip ", "make ")
"""Words of lines that stand for the user's own files or start something that runs on."""


def commands() -> list[list[str]]:
    lines = [line.split("  #")[0].strip() for block in (ROOT / "README.md").read_text().split("```")[1::2] for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("moesim ") and not any(word in line for word in NEEDS_MORE)]


def test_the_readme_opens_with_the_two_commands() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line.split("  ")[0] for line in lines[3:5]] == ["make demo", "make test"]


def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    found = commands()
    assert len(found) >= 5
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for words in found:
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, (words, done.stderr)
    assert {"plan.json", "expert-location.json", "out"} <= {path.name for path in tmp_path.iterdir()}
