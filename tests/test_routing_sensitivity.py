"""docs/routing-sensitivity.md is what its script writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "routing-sensitivity.md"
SCRIPT = ROOT / "benchmarks" / "routing_sensitivity.py"
COMMAND = f"python {SCRIPT.relative_to(ROOT).as_posix()}"


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_a_case_is_replayed_under_every_routing(tmp_path: Path) -> None:
    out = tmp_path / "page.md"
    subprocess.run([sys.executable, SCRIPT, "--case", "flame-decode-32", "--out", out], cwd=tmp_path, timeout=120, check=True)
    table = [row for row in rows(out.read_text()) if len(row) == 8][2:]
    assert [row[2] for row in table] == ["traced", "balanced", "zipf:1.0", "power-law:1.2"]
    step, balance = [float(row[3]) for row in table], [float(row[7]) for row in table]
    assert balance[1] > balance[0] > max(balance[2:]), "real routing of this model is less even than balanced, more even than a power law"
    assert step[1] < step[0] < min(step[2:])
    for row, shown in zip(table[1:], step[1:], strict=True):
        assert float(row[4].rstrip("%")) / 100 == pytest.approx(shown / step[0] - 1, abs=2e-3)


def test_the_page_names_its_command_and_holds_every_case() -> None:
    text = PAGE.read_text()
    assert COMMAND in text.splitlines()[2] and "do not edit" in text.splitlines()[2]
    assert len([row for row in rows(text) if len(row) == 8]) == 2 + 4 * SCRIPT.read_text().count('    Case("')
