"""`validate --run` of a captured run: a replay of its own routing scored against the times that its ranks recorded, the whole step and stage by stage.

Only routing, map and the calibrated hardware enter the prediction; nothing is fitted on the run. Errors are (predicted − measured) / measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moesim.api.comparing import compare
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.traces.archive import MANIFEST

SCHEMA = "moesim.validate/1"


def is_capture(ref: str) -> bool:
    """Return whether `ref` is a recorded trace, and not a folder of requests."""
    return Path(ref, MANIFEST).is_file() or (ref.endswith(".zip") and Path(ref).is_file())


def validate_capture(
    run: str, *, model: str | MoEModel, hardware: str | Cluster, settings: Mapping[str, str] | None = None, strict: bool = False
) -> dict[str, Any]:
    """Replay a captured run under the map that was in force last and return the errors of its steps, schema moesim.validate/1.

    Raises TraceError if the run recorded no times, InputError if the documents do not fit each other.
    """
    began = time.perf_counter()
    found = compare(run, model=model, hardware=hardware, settings=settings, strict=strict)
    quantities = {}
    for phase, figures in found["step_ms"].items():
        one: dict[str, Any] = {f"{name}_error": figure["error"] for name, figure in figures.items()}
        one |= {f"{side}_ms": {name: figure[side] for name, figure in figures.items()} for side in ("measured", "predicted")}
        quantities["step" if phase == "all" else f"step_{phase}"] = one
    return {
        "schema": SCHEMA, "run": str(run), "hardware": found["hardware"], "basis": found["basis"], **quantities, "stages_ms": found["stages_ms"],
        "rank_load": found["rank_load"], "bytes_per_token": found["bytes_per_token"], "rows_scored": found["steps"]["measured"], "rows_calibrated": 0,
        "rows_excluded": {}, "provenance": found["provenance"], "wall_s": time.perf_counter() - began,
    }  # fmt: skip
