"""The files of `--out DIR`: metrics.json, steps.csv, timeline.json and, if asked for, figures; each is written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from moesim.files import write_atomic
from moesim.report.perfetto import write_timeline
from moesim.sim.ledger import Ledger


def write_replay(report: dict[str, Any], ledger: Ledger, folder: Path, *, plots: bool = False) -> list[Path]:
    """Write the files of a replay to `folder` and return their paths; the wall time is left out, so that equal runs give equal bytes."""
    stable = {key: value for key, value in report.items() if key != "wall_s"}
    metrics, steps, timeline = folder / "metrics.json", folder / "steps.csv", folder / "timeline.json"
    write_atomic(metrics, json.dumps(stable, indent=2, allow_nan=False) + "\n")
    write_atomic(steps, steps_csv(ledger))
    write_timeline(ledger, timeline)
    if not plots:
        return [metrics, steps, timeline]
    from moesim.report.figures import write_figures

    return [metrics, steps, timeline, *write_figures(ledger, folder)]


def steps_csv(ledger: Ledger) -> str:
    """Return one line per pass: when it started, how long it took (ms), and where the time went (mean ms per rank).

    Where the Ledger has merged passes, a line stands for `passes` of them: the first one's step and start, and means.
    """
    breakdown, block = ledger.breakdown_s(), ledger.sums.block
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["step", "start_ms", "duration_ms", *(f"{label}_ms" for label in breakdown), *(["passes"] if block > 1 else [])])
    for row in range(ledger.sums.rows):
        durations = ledger.duration_s[row * block : (row + 1) * block]
        values = [ledger.start_s[row * block], sum(durations) / len(durations), *(values[row] for values in breakdown.values())]
        writer.writerow([ledger.step[row * block], *(f"{value * 1e3:.6f}" for value in values), *([len(durations)] if block > 1 else [])])
    return text.getvalue()
