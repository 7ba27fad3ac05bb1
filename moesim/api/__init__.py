"""What notebooks and users import: replay a trace, solve for a plan, search a split, weigh rebalancing – names or paths in, reports out.

`replay` → `Replay` (report, ledger, plan); `solve` → `Solution` (report, plan); `parallelize` and `rebalance` → report. A report is the
JSON object that the command line prints; its keys are stable. Bad input raises an `InputError` that says what to change.
"""

from moesim.api.documents import trace_shape
from moesim.api.parallel import parallelize
from moesim.api.rebalancing import rebalance
from moesim.api.replaying import replay
from moesim.api.running import Replay
from moesim.api.solving import Solution, solve

__all__ = ["Replay", "Solution", "parallelize", "rebalance", "replay", "solve", "trace_shape"]
