"""Ops and Programs: what a batch does on a stage, without any time.

An Op occupies one lane (a serial queue: `compute`, `comm`, `copy`) of each of its ranks, in the order of the
Program. A local Op has one Job per rank. A collective Op has send and receive Jobs: a rank's sends run from the
moment it arrives, its receives from the moment the last rank of its group (or the one rank it names) arrives, and it
leaves when both are done. Work is in seconds at the full rate of the Job's port. An Op with `sm_share` takes SMs of its
rank while it is there, and slows the Jobs on `sm` beside it. Shapes: R ranks, P independent passes ([R] or [P, R]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moesim.errors import SimulationError

COMPUTE, COMM, COPY = "compute", "comm", "copy"

Decide = Callable[[np.ndarray], np.ndarray]
"""A decision hook: the times at which the Op could start on each rank → its work on each rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Work on one port of every rank."""

    port: str
    """Shared hardware that the work occupies: `sm`, `scale_up.out`, `scale_out.in`, `host.in` …"""
    work_s: np.ndarray
    """float64 [R] or [P, R]: seconds at full rate."""
    side: Literal["send", "recv"] = "send"
    """`send` starts when the rank arrives, `recv` when the whole group has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """One step of a Program on some ranks."""

    label: str
    """What it is, for breakdowns: `attention`, `dispatch`, `experts` …"""
    lane: str
    jobs: tuple[Job, ...]
    deps: tuple[int, ...] = ()
    """Earlier Ops of the Program that must have ended on the same rank."""
    group_R: np.ndarray | None = None
    """int [R]: process group of every rank for a collective; None for a local Op."""
    ranks_R: np.ndarray | None = None
    """bool [R]: ranks that take part; None: all."""
    layer: int = -1
    provenance: np.ndarray | int = 0
    """uint8 class code of the work, broadcastable to it."""
    decide: Decide | None = None
    """Called once when the Op is reached; replaces the work of the first Job (a miss that must be loaded)."""
    source_R: np.ndarray | None = None
    """int [R]: the one rank whose arrival a rank's receives wait for (beside its own), instead of the group's; -1: none."""
    sm_share: float = 0.0
    """Share of its rank's SMs, in [0, 1), that it takes from start to end: Jobs on `sm` of Ops without one run that much slower."""


@dataclass(slots=True)
class Program:
    """Ops in issue order; a lane runs its Ops in this order on every rank."""

    num_ranks: int
    ops: list[Op] = field(default_factory=list)
    cache: dict = field(default_factory=dict, repr=False, compare=False)
    """What evaluation has worked out about the Ops, by their number."""

    def add(self, op: Op) -> int:
        """Append `op` and return its index. Raises SimulationError if it depends on itself or a later Op."""
        index = len(self.ops)
        if any(not 0 <= dep < index for dep in op.deps):
            raise SimulationError(f"program: op {index} ({op.label}) depends on {op.deps}, must depend on earlier ops only; a dependency is cyclic")
        if not op.jobs:
            raise SimulationError(f"program: op {index} ({op.label}) has no job; every op occupies a port")
        if not 0 <= op.sm_share < 1:
            raise SimulationError(f"program: op {index} ({op.label}) has sm_share = {op.sm_share}, must be in [0, 1)")
        for name, array in (("group_R", op.group_R), ("ranks_R", op.ranks_R), ("source_R", op.source_R)):
            if array is not None and np.shape(array) != (self.num_ranks,):
                raise SimulationError(f"program: op {index} ({op.label}) has {name} of shape {np.shape(array)}, must be [{self.num_ranks}]")
        if op.source_R is not None and not (op.source_R.min() >= -1 and op.source_R.max() < self.num_ranks):
            raise SimulationError(f"program: op {index} ({op.label}) has a source outside -1..{self.num_ranks - 1}")
        if op.group_R is not None and op.source_R is not None:
            raise SimulationError(f"program: op {index} ({op.label}) has both group_R and source_R; receives wait for one of them")
        for job in op.jobs:
            if job.work_s.shape[-1] != self.num_ranks:
                raise SimulationError(f"program: op {index} ({op.label}) has work for {job.work_s.shape[-1]} ranks, must be {self.num_ranks}")
            if not self._is_work(job.work_s):
                raise SimulationError(f"program: op {index} ({op.label}) has work that is not finite and >= 0; check its costs")
        self.ops.append(op)
        return index

    def _is_work(self, work_s: np.ndarray) -> bool:
        """Return whether all work is finite and >= 0; where Ops take rows of one array, that array is looked at once."""
        whole = work_s if work_s.base is None else work_s.base
        seen = self.cache.get(("work", id(whole)))
        if seen is None or seen[0] is not whole:
            self.cache["work", id(whole)] = seen = (whole, isinstance(whole, np.ndarray) and _finite(whole))
        return bool(seen[1]) or _finite(work_s)

    def local(
        self,
        label: str,
        work_s: np.ndarray,
        *,
        lane: str = COMPUTE,
        port: str = "sm",
        deps: Sequence[int] = (),
        layer: int = -1,
        provenance: np.ndarray | int = 0,
        ranks_R: np.ndarray | None = None,
        decide: Decide | None = None,
    ) -> int:
        """Append an Op in which every rank works alone for `work_s` ([R] or [P, R] seconds)."""
        job = Job(port=port, work_s=np.asarray(work_s, dtype=np.float64))
        return self.add(Op(label=label, lane=lane, jobs=(job,), deps=tuple(deps), layer=layer, provenance=provenance, ranks_R=ranks_R, decide=decide))

    def collective(
        self,
        label: str,
        send_s: np.ndarray,
        recv_s: np.ndarray,
        *,
        group_R: np.ndarray,
        port: str,
        lane: str = COMM,
        deps: Sequence[int] = (),
        layer: int = -1,
        provenance: np.ndarray | int = 0,
        ranks_R: np.ndarray | None = None,
        sm_share: float = 0.0,
    ) -> int:
        """Append an exchange within groups: `send_s` from a rank's arrival, `recv_s` from its group's."""
        send = Job(port=f"{port}.out", work_s=np.asarray(send_s, dtype=np.float64))
        recv = Job(port=f"{port}.in", work_s=np.asarray(recv_s, dtype=np.float64), side="recv")
        group = np.asarray(group_R)
        return self.add(
            Op(
                label=label,
                lane=lane,
                jobs=(send, recv),
                deps=tuple(deps),
                group_R=group,
                layer=layer,
                provenance=provenance,
                ranks_R=ranks_R,
                sm_share=sm_share,
            )
        )


def _finite(work_s: np.ndarray) -> bool:
    return not work_s.size or bool(work_s.min() >= 0 and work_s.max() < np.inf)
