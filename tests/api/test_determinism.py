"""Equal inputs give equal bytes: in every process, whatever the order of hashes, and in the next version of Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

TRACE = ["synthetic:zipf:1.0,tokens=512,steps=12", "--model", "flame-moe-290m", "--hardware", "h100-sxm-8", "--seed", "3"]
COMMANDS = {
    "replay": ["replay", *TRACE, "--set", "micro_batches=2", "--out", "{out}"],
    "eplb": ["replay", *TRACE, "--placement", "eplb", "--out", "{out}"],
    "offload": [
        "replay",
        "synthetic:zipf:1.0,tokens=64,steps=4,phase=decode",
        *TRACE[1:],
        "--set",
        "offload.tier=dram",
        "--set",
        "offload.cache=lru",
        "--out",
        "{out}",
    ],
    "change": ["replay", *TRACE, "--set", "change.balancer=periodic:4", "--set", "change.planner_s=0", "--out", "{out}"],
    "solve": ["solve", *TRACE, "--redundant", "8", "-o", "{out}/plan.json"],
    "robust": ["solve", "synthetic:zipf:0.8,tokens=512,seed=1", *TRACE, "-o", "{out}/plan.json"],
}
PROGRAM = """
import sys
from moesim.cli.main import main
for line in sys.stdin.read().splitlines():
    try:
        main(line.split('\\t'))
    except SystemExit as end:
        if end.code:
            raise
"""


def written(folder: Path, python: str = sys.executable, hash_seed: str = "0", path: str = "") -> dict[str, bytes]:
    """Run all commands in one fresh process and return the files that they wrote."""
    lines = []
    for name, words in COMMANDS.items():
        (folder / name).mkdir(parents=True)
        lines.append("\t".join(word.replace("{out}", str(folder / name)) for word in words))
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, **({"PYTHONPATH": path} if path else {})}
    done = subprocess.run([python, "-c", PROGRAM], input="\n".join(lines), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written(tmp_path_factory.mktemp("here"))


def check(left: dict[str, bytes], right: dict[str, bytes]) -> None:
    assert set(left) == set(right) and len(left) == 4 * 3 + 2
    assert [name for name in left if left[name] != right[name]] == []


def test_two_processes_with_other_hashes_write_the_same_bytes(here: dict[str, bytes], tmp_path: Path) -> None:
    check(here, written(tmp_path, hash_seed="4711"))


@lru_cache
def other_python() -> str | None:
    """Another supported version of Python that has the dependencies, if there is one on the PATH."""
    for minor in (12, 13, 11):
        found = shutil.which(f"python3.{minor}")
        if minor == sys.version_info.minor or found is None:
            continue
        probe = subprocess.run([found, "-c", "import numpy, pyarrow, pydantic, simpy, typer, yaml, networkx, highspy, ortools"], capture_output=True)
        if probe.returncode == 0:
            return found
    return None


def test_the_next_python_writes_the_same_bytes(here: dict[str, bytes], tmp_path: Path) -> None:
    python = other_python()
    if python is None:
        pytest.skip("no other supported Python with the dependencies on the PATH")
    check(here, written(tmp_path, python, "1", str(Path(__file__).parents[2])))
