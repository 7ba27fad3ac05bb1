"""Figures and frames: the numbers drawn are those of the Ledger, files are the same bytes for the same run, nothing is imported for a plain replay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moesim import api
from moesim.errors import InputError
from moesim.report.figures import KINDS, write_figures
from moesim.report.figures import figure as figure_of

pytest.importorskip("matplotlib", reason="figures need matplotlib")
pytest.importorskip("pandas", reason="frames need pandas")


@pytest.fixture(scope="module")
def replay() -> api.Replay:
    return api.replay("synthetic:zipf:1.0,tokens=512,steps=4", model="flame-moe-290m", hardware="h100-sxm-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_is_drawn_without_pyplot(replay: api.Replay, kind: str) -> None:
    figure = replay.plot(kind)
    axes = figure.axes[0]
    assert axes.get_title() and (axes.patches or axes.images or axes.collections)
    assert figure_of(replay.ledger, kind).axes[0].get_title() == axes.get_title()


def test_the_bars_are_the_breakdown(replay: api.Replay) -> None:
    bars = replay.plot("breakdown").axes[0].containers
    drawn = {bar.get_label(): sum(patch.get_height() for patch in bar) for bar in bars}
    assert drawn == pytest.approx({label: values.sum() * 1e3 for label, values in replay.ledger.breakdown_s().items()})
    heights = replay.plot("links").axes[0].containers
    assert max(patch.get_height() for bar in heights for patch in bar) <= 100


def test_the_heat_map_is_the_load(replay: api.Replay) -> None:
    image = replay.plot("load").axes[0].images[0].get_array()
    load = replay.ledger.load_LR
    assert np.asarray(image) == pytest.approx(load / load.mean(axis=1, keepdims=True))
    assert load.sum() == replay.load_LE.sum()


def test_files_of_figures_are_the_same_bytes_in_every_process(replay: api.Replay, tmp_path: Path) -> None:
    write_figures(replay.ledger, tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from moesim import api;"
        "r = api.replay('synthetic:zipf:1.0,tokens=512,steps=4', model='flame-moe-290m', hardware='h100-sxm-8');"
        "r.write(Path(sys.argv[1]), plots=True)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env={"PYTHONHASHSEED": "5", "PATH": ""})
    for kind in KINDS:
        assert (tmp_path / "here" / f"{kind}.svg").read_bytes() == (tmp_path / "there" / f"{kind}.svg").read_bytes(), kind


def test_frames_show_conservation(replay: api.Replay) -> None:
    ranks, steps = replay.ledger.to_pandas("ranks"), replay.ledger.to_pandas()
    assert ranks["intra_out_bytes"].sum() == pytest.approx(ranks["intra_in_bytes"].sum()) and ranks["intra_out_bytes"].sum() > 0
    assert ranks["intra_out_bytes"].sum() == pytest.approx(replay.report["bytes"]["intra_node"])
    for lane in ("compute", "comm"):
        assert (ranks[f"lane.{lane}_s"] <= ranks["elapsed_s"] * (1 + 1e-12)).all()
    parts = [name for name in steps.columns if name.endswith("_s") and name not in ("start_s", "duration_s")]
    assert steps[parts].sum(axis=1).to_numpy() == pytest.approx(steps["duration_s"].to_numpy())
    assert ranks["load"].sum() == replay.ledger.to_pandas("loads")["load"].sum() == replay.load_LE.sum()
    intervals = replay.ledger.to_pandas("intervals")
    assert set(intervals["step"]) == {0, 1, 2, 3} and (intervals["end_s"] >= intervals["start_s"]).all()
    assert len(replay.ledger.to_pandas("counters")) == 3 * 4 * 8


def test_unknown_names_are_refused_with_the_known_ones(replay: api.Replay) -> None:
    with pytest.raises(InputError, match="breakdown"):
        replay.plot("pie")
    with pytest.raises(InputError, match="steps"):
        replay.ledger.to_pandas("rows")


def test_a_plain_replay_imports_neither() -> None:
    code = (
        "import sys; from moesim import api; from pathlib import Path;"
        "r = api.replay('synthetic:balanced,tokens=64', model='flame-moe-290m', hardware='h100-sxm-8'); r.write(Path(sys.argv[1]));"
        "print([name for name in ('matplotlib', 'pandas', 'moesim.sim.recorded', 'moesim.report.figures') if name in sys.modules])"
    )
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
