"""What notebooks and users import: replay a trace, solve for a plan, search a split, weigh rebalancing, serve requests – names or paths in, reports out.

`replay` → `Replay` (report, ledger, plan); `solve` → `Solution` (report, plan); `trace_statistics` → `TraceStatistics` (report, arrays);
`serve` → `Serving` (report, times of every request); `parallelize`, `rebalance` and `validate_…` → report. A report is the
JSON object that the command line prints; its keys are stable. Bad input raises an `InputError` that says what to change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.api.comparing import compare
    from moesim.api.documents import trace_shape
    from moesim.api.parallel import parallelize
    from moesim.api.published.validate import validate_published
    from moesim.api.rebalancing import rebalance
    from moesim.api.replaying import replay
    from moesim.api.running import Replay
    from moesim.api.serving import Serving, serve
    from moesim.api.solving import Solution, solve
    from moesim.api.statistics import TraceStatistics, trace_statistics
    from moesim.api.validation import validate_run
    from moesim.api.validation_kernels import validate_kernels

__all__ = [
    "Replay",
    "Serving",
    "Solution",
    "TraceStatistics",
    "compare",
    "parallelize",
    "rebalance",
    "replay",
    "serve",
    "solve",
    "trace_shape",
    "trace_statistics",
    "validate_kernels",
    "validate_published",
    "validate_run",
]

_HOME = {
    "Replay": "running",
    "Solution": "solving",
    "compare": "comparing",
    "parallelize": "parallel",
    "rebalance": "rebalancing",
    "replay": "replaying",
    "serve": "serving",
    "Serving": "serving",
    "solve": "solving",
    "trace_shape": "documents",
    "TraceStatistics": "statistics",
    "trace_statistics": "statistics",
    "validate_kernels": "validation_kernels",
    "validate_published": "published.validate",
    "validate_run": "validation",
}


def __getattr__(name: str) -> Any:
    """Import a part when it is first asked for, so that a replay does not wait for the planner."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
