"""How to split a model over a machine: tensor, expert, data and pipeline degrees, redundancy, batches and pools, searched completely."""

from moesim.costs.group_loads import linear_placement
from moesim.solvers.parallelism.loads import packed_placement
from moesim.solvers.parallelism.plan import plan_parallelism
from moesim.solvers.parallelism.result import Deployment, NoDeploymentError, ParallelismResult, Pool
from moesim.solvers.parallelism.space import Space
from moesim.solvers.parallelism.workload import Slo, Workload

__all__ = [
    "Deployment",
    "NoDeploymentError",
    "ParallelismResult",
    "Pool",
    "Slo",
    "Space",
    "Workload",
    "linear_placement",
    "packed_placement",
    "plan_parallelism",
]
