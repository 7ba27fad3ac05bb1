"""Recorded stage times: the Ops of a Program take the durations that a trace recorded, instead of those of the cost model.

An Op on rank r takes `recorded · model(plan) / model(map in force when it was recorded)`: both sides are the cost model on the tokens of that pass, so
that its floors (launch, weights read once, latency) hold; the ratio is exactly 1 where the plan leaves the rank's load of the layer as it was. A rank
that computed nothing when recorded takes the model's time, scaled as the other ranks of that layer and pass are. A recorded exchange lasts from a
rank's arrival to its departure; where the ranks' clocks agree, the wait for the last arrival is left to the engine, so that it shrinks with the
imbalance. Work is of class `trace`, rescaled work of the model's class if that is worse.
Seconds. Shapes: P passes, C cells (layer, stage), L MoE layers, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.costs.provenance import Provenance
from moesim.errors import CostError, TraceError, describe
from moesim.sim.ops import Job, Op, Program
from moesim.traces.manifest import STAGES

if TYPE_CHECKING:
    from moesim.sim.batch import Pass

OPS = {
    "attention": "attention",
    "gate": "router",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "shared_experts": "shared",
    "dense_ffn": "dense",
    "embedding": "other",
    "head": "other",
}
"""Label of an Op → stage that it stands for. `other` of layer 0 is what runs before the layers, of any later layer what runs after them."""
EXCHANGES = ("dispatch", "combine")
WAIT_TOLERANCE = 0.01
"""Clocks agree if gaps between stages, and departures before the last arrival, are at most this share of the recorded time."""
COLUMNS = ("step", "rank", "layer", "stage", "t_ns", "dur_ns", "tokens")
MAX_CELLS = 1 << 25
"""Most durations (steps × layers × stages × ranks): 256 MiB an array."""

Reference = Callable[[Sequence["Pass"]], tuple[Program, np.ndarray]]
"""Passes → their Program under the map in force when they were recorded, and the load int64 [P, L, R] of every rank under it."""


@dataclass(frozen=True, slots=True)
class _Cell:
    """One stage of one layer in all steps."""

    own_SR: np.ndarray
    """float64 [steps, R]: seconds, without the wait where waits are told apart."""
    tokens_SR: np.ndarray


@dataclass(slots=True)
class RecordedTimes:
    """The kernel table of one trace, ready to drive Programs."""

    num_ranks: int
    source: str
    step_S: np.ndarray
    """int64, ascending: recorded steps."""
    waits: str
    """`separated` from the exchanges and left to the engine, or `as recorded` within their durations."""
    moe_layer_ids: tuple[int, ...]
    strict: bool = False
    epoch_S: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """[steps]: number of the map that was in force."""
    references: Mapping[int, Reference | None] = field(default_factory=dict)
    """Number of a map → how the model sees it; None: it is the plan that is replayed."""
    exact_tokens: bool = True
    """Do recorded tokens have to equal the compiled ones? Not with replicas or dropped rows."""
    wall_s: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """[steps]: from the first to the last stage of the rank that took longest."""
    used_s: dict[str, float] = field(default_factory=lambda: {"recorded": 0.0, "rescaled": 0.0, "modelled": 0.0})
    """Rank-seconds of work so far: as recorded, recorded and rescaled, and by the cost model alone."""
    _cells: dict[tuple[int, str], _Cell] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kernels: Mapping[str, np.ndarray], *, num_ranks: int, num_layers: int, moe_layer_ids: Sequence[int], source: str, strict: bool = False
    ) -> RecordedTimes:
        """Check a kernel table and build the times; raises TraceError naming the first row that breaks a rule.

        kernels: columns `COLUMNS`, several rows of one (step, rank, layer, stage) are added up. num_layers: of the model, dense ones included.
        strict: refuse work of a class worse than `trace`.
        """
        place = f"{source}: table kernels"
        step, rank, layer, stage, begin, length, tokens = (np.asarray(kernels[name]).astype(np.int64) for name in COLUMNS)
        if not len(step):
            raise TraceError(f"{place}: has no row; record the trace with stage times, or replay without --times trace")
        for name, values, high in (
            ("rank", rank, num_ranks - 1),
            ("stage", stage, len(STAGES) - 1),
            ("dur_ns", length, 1 << 53),
            ("t_ns", begin, 1 << 62),
            ("layer", layer, num_layers),
        ):
            bad = np.flatnonzero((values < 0) | (values > high))
            if bad.size:
                text = "nanoseconds >= 0" if name.endswith("_ns") else f"in 0..{high}"
                raise TraceError(describe(f"{place}, row {bad[0]}", name, int(values[bad[0]]), f"must be {text}", "record the trace again"))
        steps, step_at = np.unique(step, return_inverse=True)
        other = STAGES.index("other")
        key = np.where((stage == other) & (layer > 0), num_layers, layer) * len(STAGES) + stage
        cells, cell_at = np.unique(key, return_inverse=True)
        shape = (len(cells), len(steps), num_ranks)
        if int(np.prod(shape, dtype=np.float64)) > MAX_CELLS:
            raise TraceError(describe(place, "steps × stages × ranks", int(np.prod(shape, dtype=np.float64)), f"must be <= {MAX_CELLS}", "record fewer steps"))
        flat = (cell_at * shape[1] + step_at) * shape[2] + rank
        present = np.bincount(flat, minlength=int(np.prod(shape))).reshape(shape)
        if (present == 0).any():
            where_cell, where_step, where_rank = (int(value) for value in np.argwhere(present == 0)[0])
            at_layer, at_stage = divmod(int(cells[where_cell]), len(STAGES))
            raise TraceError(
                f"{place}: has no time of step {steps[where_step]}, rank {where_rank}, layer {at_layer}, stage {STAGES[at_stage]}, which other steps or ranks "
                "have; every recorded stage needs a time on every rank in every step: record it again, or replay without --times trace"
            )
        total = np.bincount(flat, weights=length.astype(np.float64), minlength=present.size).reshape(shape) * 1e-9
        rows = np.bincount(flat, weights=tokens.astype(np.float64), minlength=present.size).reshape(shape)
        wait = _waits(total, begin, length, step_at, rank, flat, cells % len(STAGES))
        own = total if wait is None else total - wait
        names = [(int(code) // len(STAGES), STAGES[int(code) % len(STAGES)]) for code in cells]
        first, last = (np.full((len(steps), num_ranks), limit) for limit in (np.iinfo(np.int64).max, np.iinfo(np.int64).min))
        np.minimum.at(first, (step_at, rank), begin)
        np.maximum.at(last, (step_at, rank), begin + length)
        return cls(
            num_ranks=num_ranks,
            source=source,
            step_S=steps,
            waits="as recorded" if wait is None else "separated",
            moe_layer_ids=tuple(moe_layer_ids),
            strict=strict,
            epoch_S=np.zeros(len(steps), dtype=np.int64),
            wall_s=(last - first).max(axis=1) * 1e-9,
            _cells={name: _Cell(own[index], rows[index]) for index, name in enumerate(names)},
        )

    def rows_of(self, steps: Sequence[int]) -> np.ndarray:
        """Return the positions of recorded steps; raises TraceError for one that has no times."""
        wanted = np.asarray(steps, dtype=np.int64)
        at = np.minimum(np.searchsorted(self.step_S, wanted), len(self.step_S) - 1)
        missing = wanted[self.step_S[at] != wanted]
        if missing.size:
            raise TraceError(
                f"{self.source}: table kernels: has no times of step {missing[0]} ({missing.size} of {wanted.size} steps of a batch are missing); "
                "record all steps with stage times, or replay without --times trace"
            )
        return at

    def drive(self, program: Program, batch: Sequence[Pass], load_PLR: np.ndarray) -> Program:
        """Return `program` of the passes `batch` with recorded work where there is any.

        load_PLR: (token, expert) pairs of every rank under the plan. Raises TraceError if a step or a stage does not fit the trace, or its tokens do
        not; CostError if strict and work is left of a class worse than `trace`.
        """
        steps = [item.step for item in batch]
        at = self.rows_of(steps)
        shape = (len(at), self.num_ranks)
        old: dict[tuple[int, str], np.ndarray] = {}
        load_then_PLR = load_PLR
        for epoch in np.unique(self.epoch_S[at]).tolist():
            reference = self.references.get(epoch)
            if reference is None:
                continue
            chosen = np.flatnonzero(self.epoch_S[at] == epoch).tolist()
            under, load = reference([batch[index] for index in chosen])
            load_then_PLR = load_PLR.copy() if load_then_PLR is load_PLR else load_then_PLR
            load_then_PLR[chosen] = load
            for op in under.ops:
                old.setdefault((op.layer, op.label), np.full(shape, np.nan))[chosen] = _longest(op)
        self._check_tokens(at, steps, load_then_PLR, np.concatenate([item.shape.tokens_PR for item in batch]))
        row_of = {layer: row for row, layer in enumerate(self.moe_layer_ids)}
        left, ops = dict(self._cells), []
        for op in program.ops:
            key = (max(op.layer, 0), OPS.get(op.label, ""))
            if op.label == "all_reduce" and self._is_reduced(op, program):
                ops.append(_rework(op, np.zeros(shape), int(Provenance.TRACE), self.waits))
                continue
            cell = left.pop(key, None)
            if cell is None:
                self.used_s["modelled"] += float(np.broadcast_to(_longest(op), shape).sum())
                ops.append(op)
                continue
            recorded = cell.own_SR[at]
            if self.num_ranks == 1 and op.label == "experts":  # one rank exchanges nothing; what it did around its experts is theirs
                recorded = recorded + sum(left.pop((op.layer, stage)).own_SR[at] for stage in EXCHANGES if (op.layer, stage) in left)
            same, new, before = np.ones(shape, dtype=bool), np.broadcast_to(_longest(op), shape), old.get((op.layer, op.label))
            if before is not None and op.layer in row_of:
                before = np.where(np.isnan(before), new, before)
                same = new == before
                if op.label == "experts":
                    same |= load_PLR[:, row_of[op.layer]] == load_then_PLR[:, row_of[op.layer]]
            codes: np.ndarray | int = int(Provenance.TRACE)
            work = recorded
            if not same.all():
                assert before is not None
                work = np.where(same, recorded, _rescaled(recorded, new, before))
                codes = np.where(same, Provenance.TRACE, np.maximum(np.asarray(op.provenance), Provenance.TRACE)).astype(np.uint8)
            self.used_s["recorded"] += float(work[same].sum())
            self.used_s["rescaled"] += float(work[~same].sum())
            ops.append(_rework(op, work, codes, self.waits))
        if left:
            layer, stage = next(iter(left))
            raise TraceError(
                f"{self.source}: table kernels: holds times of layer {layer}, stage {stage}, which the pass has none of or has twice; "
                "replay with the model that was recorded, without settings that split its stages"
            )
        if self.strict:
            _check_strict(ops, self.source)
        return Program(program.num_ranks, ops)

    def _is_reduced(self, op: Op, program: Program) -> bool:
        """Is the reduction over tensor-parallel ranks part of the recorded stage that it follows?"""
        return any((op.layer, OPS.get(program.ops[dep].label, "")) in self._cells for dep in op.deps)

    def _check_tokens(self, at: np.ndarray, steps: Sequence[int], load_PLR: np.ndarray, home_PR: np.ndarray) -> None:
        """Raise TraceError where the recorded tokens of a rank's experts are not those of the map that was in force.

        They are (token, expert) pairs; 0 everywhere means not recorded, and a producer may count the rank's own tokens instead.
        """
        for row, layer in enumerate(self.moe_layer_ids):
            cell = self._cells.get((layer, "experts"))
            if cell is None or not cell.tokens_SR.any() or not self.exact_tokens or (cell.tokens_SR[at] == home_PR).all():
                continue
            wrong = np.argwhere(cell.tokens_SR[at] != load_PLR[:, row])
            if wrong.size:
                index, rank = (int(value) for value in wrong[0])
                raise TraceError(
                    f"{self.source}: table kernels: rank {rank} computed {int(cell.tokens_SR[at][index, rank])} tokens in layer {layer} of step "
                    f"{steps[index]}, but the routes and the placement in force give {int(load_PLR[index, row, rank])}; the trace does not say the placement "
                    "it was recorded under, or its routes are incomplete: record it again"
                )

    def report(self) -> dict[str, Any]:
        """Return what drove the replay: steps, stages, shares of the work."""
        total = sum(self.used_s.values()) or 1.0
        stages = sorted({stage for _, stage in self._cells}, key=STAGES.index)
        return {"stages": stages, "waits": self.waits, "work_share": {name: value / total for name, value in self.used_s.items()}}


def _waits(
    total_CSR: np.ndarray, begin: np.ndarray, length: np.ndarray, step_at: np.ndarray, rank: np.ndarray, flat: np.ndarray, stage_C: np.ndarray
) -> np.ndarray | None:
    """Return float64 [C, S, R]: the part of every exchange in which a rank waits for the last to arrive; None if the time stamps cannot tell."""
    order = np.lexsort((begin, rank, step_at))
    follows = (np.diff(step_at[order]) == 0) & (np.diff(rank[order]) == 0)
    gaps = np.abs(begin[order][1:] - begin[order][:-1] - length[order][:-1])[follows]
    limit = WAIT_TOLERANCE * float(length.sum(dtype=np.float64))
    if float(gaps.sum(dtype=np.float64)) > limit:
        return None
    start = np.full(total_CSR.shape, np.iinfo(np.int64).max)
    end = np.full(total_CSR.shape, np.iinfo(np.int64).min)
    np.minimum.at(start.reshape(-1), flat, begin)
    np.maximum.at(end.reshape(-1), flat, begin + length)
    exchange = np.isin(stage_C, [STAGES.index(name) for name in EXCHANGES])
    gate = start.max(axis=2, keepdims=True)
    early = np.maximum(gate - end, 0)[exchange]
    if float(early.sum(dtype=np.float64)) > limit:
        return None
    wait = np.minimum((gate - start) * 1e-9, total_CSR)
    wait[~exchange] = 0.0
    return wait


def _longest(op: Op) -> np.ndarray:
    """Return the work of an Op, [R] or [P, R]: that of its longest Job."""
    work = op.jobs[0].work_s
    for job in op.jobs[1:]:
        work = np.maximum(work, job.work_s)
    return work


def _rescaled(recorded: np.ndarray, new: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return recorded · new / before; where `before` is 0, new · Σ recorded / Σ before over the ranks."""
    mean = before.sum(axis=1, keepdims=True)
    common = np.where(mean > 0, recorded.sum(axis=1, keepdims=True) / np.where(mean > 0, mean, 1.0), 1.0)
    return np.where(before > 0, recorded * (new / np.where(before > 0, before, 1.0)), new * common)


def _rework(op: Op, work: np.ndarray, codes: np.ndarray | int, waits: str) -> Op:
    """Return `op` with recorded work: an exchange lasts from the last arrival, or from the rank's own where waits are part of what was recorded."""
    if len(op.jobs) == 1:
        return replace(op, jobs=(replace(op.jobs[0], work_s=work),), provenance=codes)
    none = np.zeros_like(work)
    jobs = tuple(Job(port=job.port, side=job.side, work_s=work if (job.side == "recv") == (waits == "separated") else none) for job in op.jobs)
    assert op.group_R is not None
    group = op.group_R if waits == "separated" else np.arange(len(op.group_R))
    return replace(op, jobs=jobs, provenance=codes, group_R=group)


def _check_strict(ops: Sequence[Op], source: str) -> None:
    for op in ops:
        codes = np.broadcast_to(np.asarray(op.provenance), _longest(op).shape)
        bad = (codes > Provenance.TRACE) & (_longest(op) > 0)
        if bad.any():
            name = Provenance(int(codes[bad].max())).name.lower()
            raise CostError(
                f"{source}: layer {op.layer}, {op.label}: only a {name} estimate is left, and --strict refuses it: the trace has no time of this stage, or the "
                "plan changes its load and the hardware has no table for it; record the stage, use hardware with tables, or drop --strict"
            )
