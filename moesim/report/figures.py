"""Figures of a run, read off its Ledger: rank load, link use, where the time goes, the timeline of one pass.

matplotlib is imported when a figure is asked for; figures are drawn without pyplot, so there is no state outside of them, and a file of a figure is
the same bytes for the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim.ledger import Ledger

KINDS = ("breakdown", "load", "links", "timeline")
MAX_BARS = 64
"""Most passes (or blocks of passes) that the breakdown shows one by one."""
_COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#DDAA33", "#BB5566", "#004488", "#999933", "#882255")


def figure(ledger: Ledger, kind: str = "breakdown") -> Any:
    """Return a matplotlib Figure of one of `KINDS`. Raises InputError for another kind, or if matplotlib is not installed."""
    if kind not in KINDS:
        raise InputError(describe("plot", "kind", kind, f"must be one of {', '.join(KINDS)}"))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("plot: needs matplotlib, which is not installed; install moesim[report]") from None
    result = Figure(figsize=(8.0, 4.5), layout="constrained")
    FigureCanvasAgg(result)
    {"breakdown": _breakdown, "load": _load, "links": _links, "timeline": _timeline}[kind](ledger, result.add_subplot(), result)
    return result


def write_figures(ledger: Ledger, folder: Path) -> list[Path]:
    """Write every figure as SVG to `folder` and return the paths."""
    import io

    import matplotlib

    from moesim.files import write_atomic

    paths = []
    for kind in KINDS:
        text = io.BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "moesim", "svg.fonttype": "none", "savefig.dpi": 100}):
            figure(ledger, kind).savefig(text, format="svg", metadata={"Date": None, "Creator": "moesim"})
        paths.append(folder / f"{kind}.svg")
        write_atomic(paths[-1], text.getvalue())
    return paths


def _colour(labels: list[str]) -> dict[str, str]:
    return {label: _COLOURS[index % len(_COLOURS)] for index, label in enumerate(sorted(labels))}


def _breakdown(ledger: Ledger, axes: Any, _: Any) -> None:
    """Stacked seconds per label: a bar per pass, or per group of passes where there are many."""
    parts = ledger.breakdown_s()
    rows = ledger.sums.rows
    bars = min(rows, MAX_BARS)
    group = np.arange(rows) * bars // max(rows, 1)
    size = np.bincount(group, minlength=bars)
    colours, bottom = _colour(list(parts)), np.zeros(bars)
    for label, values in sorted(parts.items(), key=lambda item: -float(item[1].sum())):
        height = np.bincount(group, weights=values, minlength=bars) / size * 1e3
        axes.bar(np.arange(bars), height, bottom=bottom, width=0.9, label=label, color=colours[label])
        bottom += height
    axes.set(xlabel="pass" if rows == bars and ledger.sums.block == 1 else f"passes, in {bars} groups", ylabel="ms, mean over ranks")
    axes.set_title("where the time goes")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _load(ledger: Ledger, axes: Any, whole: Any) -> None:
    """Load of every rank and MoE layer over the mean of its layer."""
    load = ledger.load_LR.astype(np.float64)
    mean = load.mean(axis=1, keepdims=True) if load.size else np.ones((0, 1))
    image = axes.imshow(
        load / np.where(mean > 0, mean, 1.0) if load.size else np.zeros((1, 1)), aspect="auto", cmap="viridis", vmin=0.0, interpolation="nearest"
    )
    ids = list(ledger.moe_layer_ids)
    shown = np.unique(np.linspace(0, len(ids) - 1, min(len(ids), 12)).astype(int)) if ids else np.zeros(0, dtype=int)
    axes.set_yticks(shown, [str(ids[row]) for row in shown])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="rank", ylabel="layer", title="load of a rank over the mean of its layer")
    whole.colorbar(image, ax=axes)


def _links(ledger: Ledger, axes: Any, _: Any) -> None:
    """Share of the run in which every rank's ports worked at their full rate."""
    ports = {port: seconds for port, seconds in sorted(ledger.port_s.items()) if port != "sm" and seconds.any()}
    elapsed = float(np.sum(ledger.duration_s)) or 1.0
    width = 0.8 / max(len(ports), 1)
    colours = _colour(list(ports))
    for index, (port, seconds) in enumerate(ports.items()):
        axes.bar(np.arange(len(seconds)) + (index - (len(ports) - 1) / 2) * width, seconds / elapsed * 100, width=width, label=port, color=colours[port])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="rank", ylabel="% of the run at full rate", title="use of ports")
    if ports:
        axes.legend(fontsize="small")


def _timeline(ledger: Ledger, axes: Any, _: Any) -> None:
    """The lanes of every rank in the last pass that was kept."""
    kept = list(ledger.intervals())
    kept = [interval for interval in kept if interval.step == kept[-1].step]
    lanes = sorted({interval.lane for interval in kept})
    labels = sorted({interval.label for interval in kept})
    colours = _colour(labels)
    origin = min((float(interval.start_R[np.isfinite(interval.start_R)].min()) for interval in kept if np.isfinite(interval.start_R).any()), default=0.0)
    for label in labels:
        spans: dict[float, list[tuple[float, float]]] = {}
        for interval in kept:
            if interval.label != label:
                continue
            begin_R = interval.start_R if interval.gate is None else np.maximum(interval.start_R, np.minimum(interval.gate, interval.end_R))
            for rank, (begin, end) in enumerate(zip(begin_R.tolist(), interval.end_R.tolist(), strict=True)):
                if -np.inf < begin < end < np.inf:
                    spans.setdefault(rank + lanes.index(interval.lane) * 0.8 / len(lanes), []).append(((begin - origin) * 1e3, (end - begin) * 1e3))
        for index, (row, bars) in enumerate(sorted(spans.items())):
            axes.broken_barh(bars, (row - 0.4, 0.8 / len(lanes)), color=colours[label], linewidth=0, label=label if index == 0 else None)
    axes.set(xlabel="ms", ylabel="rank", title=f"step {kept[-1].step if kept else '-'}, lanes {' / '.join(lanes)}")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.invert_yaxis()
    if labels:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
