"""What the planner answers: the best deployment, the Pareto front, what was searched, and why the others lost.

Frozen; `as_dict()` gives plain values for JSON. Seconds inside, ms where a name says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from moesim.costs.footprint import StageMemory
from moesim.errors import InfeasibleError
from moesim.plan import Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Equal instances with one role."""

    role: str
    """`mixed`, `prefill` or `decode`."""
    instances: int
    parallel: Parallel
    """Degrees of one instance."""
    devices: int
    """Devices of one instance."""
    micro_batches: int
    batch: int
    """Sequences that decode on one attention replica; 0 in a prefill pool."""
    prefill_batch: int
    """Prompts of a micro-batch on one attention replica; 0 in a decode pool."""
    slots_per_rank: int
    """Expert slots per rank and MoE layer; 0 for a dense model."""
    redundant_slots: int
    """Redundant slots per MoE layer."""
    stage_layers: tuple[tuple[int, int], ...]
    """First layer of every stage and the one after its last."""
    cycle_ms: Mapping[str, float]
    """Phase → one pass of all micro-batches, ms."""
    parts_ms: Mapping[str, Mapping[str, float]]
    """Phase → part → ms; the parts of a phase together are its cycle."""
    gpu_s_per_request: Mapping[str, float]
    """Part → device-seconds that one request costs in this pool, waiting left out."""
    memory: StageMemory
    """The fullest device."""
    next_batch: str
    """What keeps the next larger declared batch out, in words; empty if nothing does."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        values.update(
            parallel=asdict(self.parallel),
            stage_layers=[list(one) for one in self.stage_layers],
            memory=self.memory.as_dict(),
            cycle_ms=dict(self.cycle_ms),
            parts_ms={phase: dict(parts) for phase, parts in self.parts_ms.items()},
            gpu_s_per_request=dict(self.gpu_s_per_request),
        )
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One way to serve the workload."""

    mode: str
    """`mixed` or `disaggregated`."""
    label: str
    """One line for people."""
    pools: tuple[Pool, ...]
    devices: int
    """Devices in all."""
    ttft_ms: float
    tpot_ms: float
    requests_per_s: float
    output_tokens_per_s_per_gpu: float
    gpu_s_per_request: Mapping[str, float]
    """Part → device-seconds per request; together devices / requests_per_s."""

    @property
    def parallel(self) -> Parallel:
        """Degrees for a Plan: of the pool that decodes."""
        return self.pools[-1].parallel

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "mode": self.mode,
            "label": self.label,
            "devices": self.devices,
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "requests_per_s": self.requests_per_s,
            "output_tokens_per_s_per_gpu": self.output_tokens_per_s_per_gpu,
            "gpu_s_per_request": dict(self.gpu_s_per_request),
            "pools": [pool.as_dict() for pool in self.pools],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A point of the front, briefly."""

    label: str
    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s_per_gpu: float
    meets_slo: bool


@dataclass(slots=True, kw_only=True)
class Counts:
    """What was searched. Points are those of all roles; a point is counted in exactly one of memory, rates, pipeline and evaluated."""

    groups: int = 0
    shapes: int = 0
    points: int = 0
    memory: int = 0
    """Refused by exact memory."""
    rates: int = 0
    """Dominated even at peak rates: no cost model asked."""
    pipeline: int = 0
    """Dominated even with perfectly even stages: no partition sought."""
    evaluated: int = 0
    """Measured exactly."""
    unvisited: int = 0
    """Not reached before the deadline."""
    pairs: int = 0
    """Disaggregated deployments of the whole space: pairs of points times ratios, before any pruning."""
    pairs_evaluated: int = 0
    cost_calls: int = 0
    """Group and phase pairs for which the cost model was asked."""
    clamped: int = 0
    """Layer times that were raised to what peak rates allow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelismResult:
    """The plan and its proof."""

    objective: str
    status: str
    """OPTIMAL: the declared space was searched completely; TIME_LIMIT: the deadline stopped the search."""
    best: Deployment
    runner_up: Deployment | None
    """The best deployment of other degrees: over all mixed ones, and over pairs of the pools' Pareto points."""
    front: tuple[Summary, ...]
    """Pareto front of TPOT, TTFT and throughput, by falling throughput; service levels are not applied."""
    reasons: tuple[str, ...]
    """Why the runner-up lost, and what the constraints cost."""
    lost_by: Mapping[str, float]
    """Part → what the runner-up spends beyond the best: device-seconds per request, or ms of TPOT (objective latency)."""
    counts: Counts

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "objective": self.objective,
            "status": self.status,
            "best": self.best.as_dict(),
            "runner_up": None if self.runner_up is None else self.runner_up.as_dict(),
            "front": [asdict(one) for one in self.front],
            "reasons": list(self.reasons),
            "lost_by": dict(self.lost_by),
            "searched": asdict(self.counts),
        }


class NoDeploymentError(InfeasibleError):
    """No deployment of the declared space is feasible; says what is missing least and what would help."""

    def __init__(self, message: str, *, requirement: str, missing_bytes: float | None = None, relaxation: Mapping[str, float] | None = None) -> None:
        would_do = " or ".join(f"{name} = {value:.6g}" for name, value in (relaxation or {}).items())
        # requirement: `memory`, `slo`, `arrival` or `deadline`
        super().__init__(message, requirement=requirement, missing=missing_bytes, relaxation=would_do or None)
        self.missing_bytes = missing_bytes
        """Fewest bytes that any point lacks on a device, if memory is what is missing."""
        self.would_do = dict(relaxation or {})
        """Requirement → value that would be feasible."""
