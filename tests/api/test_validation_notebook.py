"""The notebook of validation runs: as a script, on few rows, with a backend that draws nothing on a screen."""

from __future__ import annotations

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "validation.py"


@pytest.mark.slow
def test_the_notebook_draws_all_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    code = NOTEBOOK.read_text(encoding="utf-8")
    assert code.count("QUICK = False") == 1
    space: dict[str, object] = {"__name__": "notebook"}
    exec(compile(code.replace("QUICK = False", "QUICK = True"), str(NOTEBOOK), "exec"), space)
    assert len(plt.get_fignums()) == 5
    plt.close("all")
