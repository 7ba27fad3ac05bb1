"""Read what other tools record: one module per format, each with `read(source, options) -> RoutingTrace`.

| format | source |
|---|---|
| `topk-csv` | CSV (.csv, .csv.gz) with the columns layer, token, e0…, optionally p0…, step, rank, request, position, phase |
| `counts-csv` | CSV with the columns layer, expert, count, other columns by `where` and `window_column` |
| `counts-json` | JSON [L, E] or [windows, L, E], bare or under logical_count |
| `sglang` | expert distribution recorder: stat, per_pass, per_token (.pt, folder of .pt), older .json |
| `vllm` | returned routed experts [tokens, L, k]: .npy, .npz, folder |
| `trtllm` | folder of meta_info.json and rank*.safetensors |
| `adrs` | expert-load.json with load_history |
| `exflow` | trace.npy [tokens, L], top-1 |
"""

from __future__ import annotations

import importlib
from pathlib import Path

from moesim.errors import TraceError, describe
from moesim.traces.importers.common import ImportOptions
from moesim.traces.routing_trace import RoutingTrace

FORMATS = ("topk-csv", "counts-csv", "counts-json", "sglang", "vllm", "trtllm", "adrs", "exflow")


def import_trace(form: str, source: Path, options: ImportOptions | None = None) -> RoutingTrace:
    """Read `source` in the format `form` into memory; raise TraceError if it breaks a rule of that format."""
    if form not in FORMATS:
        raise TraceError(describe("import", "format", form, f"must be one of {list(FORMATS)}"))
    module = importlib.import_module(f"moesim.traces.importers.{form.replace('-', '_')}")
    trace: RoutingTrace = module.read(Path(source), options or ImportOptions())
    return trace
