"""The examples of docs/engine.md print what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"<!-- output of examples/(\w+\.py) -->\n```\n(.*?)```", re.DOTALL)


def shown() -> dict[str, str]:
    return dict(BLOCK.findall((DOCS / "engine.md").read_text()))


def test_every_example_is_on_the_page() -> None:
    assert sorted(shown()) == sorted(path.name for path in (DOCS / "examples").glob("*.py"))


@pytest.mark.parametrize("name", sorted(shown()))
def test_an_example_prints_what_the_page_shows(name: str) -> None:
    done = subprocess.run([sys.executable, DOCS / "examples" / name], capture_output=True, text=True, timeout=60, cwd=DOCS.parent, check=True)
    assert done.stdout == shown()[name]
