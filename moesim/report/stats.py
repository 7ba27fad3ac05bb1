"""The files of `moesim trace stats --out DIR`: stats.json, a CSV per table and an SVG per figure; equal statistics give equal bytes.

Load curves show every layer's experts, busiest first; drift shows plans of a window (row) under another's load (column); affinity shows what
choices tell about each other beside the same with the dependence shuffled away; redundancy shows bound and reached balance against slots.
Shapes: K windows, L layers, E experts, N numbers of extra slots.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import InputError
from moesim.files import write_atomic
from moesim.solvers.statistics import AffinityStatistics, Drift, LoadCurves, Row, SlotValue

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUANTILES = (0.1, 0.5, 0.9)
"""Of the layers, drawn in the load curves."""


def write_statistics(
    report: dict[str, Any],
    folder: Path,
    *,
    curves: LoadCurves,
    drift: Drift | None,
    inter_layer: AffinityStatistics | None,
    coactivation: AffinityStatistics | None,
    slots: SlotValue | None,
    reached_N: np.ndarray | None,
) -> list[Path]:
    """Write everything that was measured and return the paths."""
    paths = [folder / "stats.json", folder / "layers.csv"]
    write_atomic(paths[0], json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_atomic(paths[1], _csv(report["load"]["layers"]))
    figures: dict[str, Callable[[Figure], None]] = {"load_curves": lambda figure: _load_curves(figure, curves, report["moe_layer_ids"])}
    if drift is not None:
        paths.append(folder / "drift.csv")
        write_atomic(paths[-1], _csv(drift.rows()))
        figures["drift"] = lambda figure: _drift(figure, drift)
    for name, found in (("affinity", inter_layer), ("coactivation", coactivation)):
        if found is not None:
            paths.append(folder / f"{name}.csv")
            write_atomic(paths[-1], _csv(found.rows()))
    if inter_layer is not None or coactivation is not None:
        figures["affinity"] = lambda figure: _affinity(figure, inter_layer, coactivation)
    if slots is not None and reached_N is not None:
        paths.append(folder / "redundancy.csv")
        write_atomic(paths[-1], _csv(report["redundancy"]))
        figures["redundancy"] = lambda figure: _redundancy(figure, slots, reached_N, int(report["ranks"]))
    return paths + [_draw(folder / f"{name}.svg", draw) for name, draw in figures.items()]


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(rows[0]))
    for row in rows:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row.values()])
    return text.getvalue()


def _draw(path: Path, draw: Callable[[Figure], None]) -> Path:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('--out: figures need Matplotlib, which is not installed; pip install "moesim[report]"') from None
    # the salt and the missing date make the bytes repeatable
    with matplotlib.rc_context({"svg.hashsalt": "moesim", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    write_atomic(path, buffer.getvalue())
    return path


def _load_curves(figure: Figure, curves: LoadCurves, layer_ids: Sequence[int]) -> None:
    left, right = figure.subplots(1, 2)
    experts = curves.share_LE.shape[1]
    times = curves.share_LE * experts
    rank = np.arange(1, experts + 1)
    low, middle, high = np.quantile(times, QUANTILES, axis=0)
    left.fill_between(rank, low, high, alpha=0.3, label="10 % to 90 % of layers")
    left.plot(rank, middle, label="median layer")
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xlabel="experts, busiest first", ylabel="load / mean load")
    left.legend()
    right.bar(np.array(layer_ids), curves.max_over_mean_L)
    right.set(xlabel="layer", ylabel="hottest expert / mean")


def _drift(figure: Figure, drift: Drift) -> None:
    tables = [("share of the load that moved", drift.l1_KK)] + ([] if drift.transfer_KK is None else [("balance of the row's plan", drift.transfer_KK)])
    axes = np.atleast_1d(figure.subplots(1, 2))
    for axis, (title, table) in zip(axes, tables, strict=False):
        image = axis.imshow(table)
        axis.set(title=title, xlabel="window", ylabel="window")
        figure.colorbar(image, ax=axis)
    for axis in axes[len(tables) :]:
        axis.set_axis_off()


def _affinity(figure: Figure, inter_layer: AffinityStatistics | None, coactivation: AffinityStatistics | None) -> None:
    for axis, found, label in zip(figure.subplots(1, 2), (inter_layer, coactivation), ("layer pair", "layer"), strict=True):
        if found is None:
            axis.set_axis_off()
            continue
        row = np.arange(len(found.information_n))
        axis.plot(row, found.information_n, marker=".", label="recorded")
        axis.plot(row, found.null_information_n, marker=".", label="shuffled")
        axis.set(xlabel=label, ylabel="information of a pair of choices, bits")
        axis.legend()


def _redundancy(figure: Figure, slots: SlotValue, reached_N: np.ndarray, ranks: int) -> None:
    axis = figure.subplots()
    axis.plot(slots.extra_N / ranks, slots.total_N, marker="o", label="no placement is better")
    axis.plot(slots.extra_N / ranks, reached_N, marker="o", label="planned")
    axis.set(xlabel="redundant slots per rank and layer", ylabel="balance")
    axis.legend()
