"""The Ledger: what ran where and when; every metric, timeline and conservation check is read from it.

Bounded memory whatever the length of a run: when every pass began and how long it took are kept exactly (24 B a pass); sums per label are kept per pass
up to `MAX_BLOCKS` passes, and beyond per block of 2, 4, 8 … consecutive passes; sums per rank, lane, port and link are totals; single intervals, loads
and levels of counters are kept for the first `keep_passes`. Seconds and bytes. Shapes: P passes, B blocks, L MoE layers, R ranks.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.costs.provenance import Provenance
from moesim.errors import InputError, describe
from moesim.sim.evaluate import Times
from moesim.sim.ops import Op, Program

if TYPE_CHECKING:
    from moesim.sim.loads import StepLoads

CLASSES = tuple(item.name.lower() for item in Provenance)
MAX_BLOCKS = 1 << 15
"""Most rows of sums per label; a power of two."""
RANK_LOAD, KV_ENTRIES = "rank load: tokens × experts", "KV cache: entries"
"""Counters of every replay."""
MAX_LEVELS = 1 << 16
"""Most levels that a counter keeps."""


@dataclass(frozen=True, slots=True)
class Interval:
    """One Op of one pass on all ranks."""

    step: int
    layer: int
    label: str
    lane: str
    start_R: np.ndarray
    gate: np.ndarray | None
    end_R: np.ndarray
    uses: tuple[tuple[str, np.ndarray, np.ndarray], ...] = ()
    """Port, begin [R] and end [R] of every Job."""
    source_R: np.ndarray | None = None
    """The one rank that a rank's receives wait for; None: all of its group, or nobody."""
    group_R: np.ndarray | None = None
    """Process group of every rank; None for an Op without receives from a group."""


@dataclass(slots=True)
class Sums:
    """Sums per label over blocks of passes; a block grows to twice the passes whenever the table would exceed `MAX_BLOCKS` rows."""

    block: int = 1
    """Passes per row."""
    passes: int = 0
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    """Label → float64 [rows allocated]."""

    @property
    def rows(self) -> int:
        """B, blocks begun."""
        return -(-self.passes // self.block)

    def add(self, values: Mapping[str, np.ndarray], passes: int) -> None:
        """Add P values per label for the next P passes."""
        while -(-(self.passes + passes) // self.block) > MAX_BLOCKS:
            for label, values_B in self.tables.items():
                folded = np.zeros_like(values_B)
                folded[: len(values_B) // 2] = values_B[0::2] + values_B[1::2]
                self.tables[label] = folded
            self.block *= 2
        row_P = (self.passes + np.arange(passes)) // self.block
        size = 64
        while size <= row_P[-1]:
            size *= 2
        for label in set(values) | set(self.tables):
            table = self.tables.get(label)
            if table is None:
                table = self.tables[label] = np.zeros(size)
            elif len(table) < size:
                table = self.tables[label] = np.concatenate([table, np.zeros(size - len(table))])
            if label in values:
                np.add.at(table, row_P, values[label])
        self.passes += passes

    def per_pass(self) -> dict[str, np.ndarray]:
        """Return label → [B] mean value per pass of the block, sorted by label."""
        counts = np.full(self.rows, self.block)
        if self.rows:
            counts[-1] = self.passes - self.block * (self.rows - 1)
        return {label: self.tables[label][: self.rows] / counts for label in sorted(self.tables)}


@dataclass(slots=True)
class Ledger:
    """Columnar record of a run."""

    num_ranks: int
    keep_passes: int = 16
    step: array[int] = field(default_factory=lambda: array("q"))
    start_s: array[float] = field(default_factory=lambda: array("d"))
    duration_s: array[float] = field(default_factory=lambda: array("d"))
    sums: Sums = field(default_factory=Sums)
    """Seconds per label, mean over ranks; with `idle` they add up to the pass times where lanes do not overlap."""
    total_s: dict[str, float] = field(default_factory=dict)
    """Label → seconds over all passes, mean over ranks."""
    class_s: np.ndarray = field(default_factory=lambda: np.zeros(len(CLASSES)))
    """Rank-seconds of work by provenance class."""
    label_s: dict[str, np.ndarray] = field(default_factory=dict)
    """Label → float64 [R]: seconds of every rank."""
    lane_s: dict[str, np.ndarray] = field(default_factory=dict)
    """Lane → float64 [R]: seconds in which it was taken; a lane is serial, so never more than the run took."""
    port_s: dict[str, np.ndarray] = field(default_factory=dict)
    """Port → float64 [R]: seconds in which it was used; in exchanges, seconds of work at its full rate."""
    port_bytes: dict[str, np.ndarray] = field(default_factory=dict)
    """`intra_out`, `intra_in`, `inter_out`, `inter_in` → float64 [R]: bytes that exchanges sent and received."""
    moe_layer_ids: tuple[int, ...] = ()
    """Layer of every row of `load_LR`."""
    load_LR: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    """int64 [L, R]: (token, expert) pairs that every rank computed."""
    levels: dict[str, list[tuple[float, np.ndarray]]] = field(default_factory=dict)
    """Counter → (time, float64 [R]) in order of time: bytes resident in a tier, tokens of a rank."""
    _kept: list[tuple[Program, Times, int, int, float, int]] = field(default_factory=list)

    def record(self, program: Program, times: Times, *, steps: list[int], begin_s: float, overhead_s: float = 0.0) -> float:
        """Add P passes that ran one after another from `begin_s`; their Times count from 0. Returns when the last one ended."""
        finish_P = np.atleast_1d(times.finish).astype(np.float64) + overhead_s
        passes, ranks = len(finish_P), self.num_ranks
        start_P = begin_s + np.r_[0.0, np.cumsum(finish_P[:-1])]
        parts: dict[tuple[str, str, str, int], np.ndarray] = {}
        for index, op in enumerate(program.ops):
            start, end, gate = times.start[index], times.end[index], times.gate[index]
            if op.ranks_R is not None:  # -inf on ranks that do not take part
                start, end = np.where(op.ranks_R, start, 0.0), np.where(op.ranks_R, end, 0.0)
                gate = None if gate is None else np.where(op.ranks_R, gate, 0.0)
            length = end - start
            if length.shape != (passes, ranks):
                length = np.broadcast_to(length, (passes, ranks))
            if gate is not None:
                wait = np.minimum(gate - start, length)
                if op.source_R is None:  # a message that has not come yet holds nobody up: the rank does other work
                    _add(parts, ("straggler_wait", op.lane, "", -1), wait)
                length = length - wait
            code = self._class_of(op.provenance, length)
            _add(parts, (op.label, op.lane, op.jobs[0].port if len(op.jobs) == 1 else "", code), length)
            for job in op.jobs if len(op.jobs) > 1 else ():
                _add(parts, ("", "", job.port, -1), np.broadcast_to(job.work_s, (passes, ranks)))
        sums: dict[str, np.ndarray] = {}
        ones, every = np.ones(ranks), np.ones(passes)
        for (label, lane, port, code), total_PR in parts.items():
            total_R = every @ total_PR
            if port:
                _add(self.port_s, port, total_R)
            if label:
                _add(sums, label, total_PR @ ones)
                _add(self.label_s, label, total_R)
                _add(self.lane_s, lane, total_R)
            if code >= 0:
                self.class_s[code] += total_R.sum()
        sums["overhead"] = np.full(passes, overhead_s * ranks)
        values = {label: np.asarray(value) / ranks for label, value in sums.items()}
        values["idle"] = np.maximum(finish_P - np.sum(list(values.values()), axis=0), 0.0)
        self.sums.add(values, passes)
        for label, value in values.items():
            self.total_s[label] = self.total_s.get(label, 0.0) + float(value.sum())
        for row in range(min(passes, max(0, self.keep_passes - len(self.step)))):
            self._kept.append((program, times, row, passes, float(start_P[row]), steps[row]))
        self.step.extend(steps)
        self.start_s.frombytes(start_P.astype(np.float64).tobytes())
        self.duration_s.frombytes(finish_P.tobytes())
        return float(start_P[-1] + finish_P[-1])

    def _class_of(self, provenance: np.ndarray | int, length: np.ndarray) -> int:
        """Return the class of an Op's time, or -1 if it has several; then they are counted here."""
        codes = np.asarray(provenance)
        first = int(codes.flat[0])
        if codes.size == 1 or bool((codes == first).all()):
            return first
        self.class_s += np.bincount(np.broadcast_to(codes, length.shape).ravel(), weights=length.ravel(), minlength=len(CLASSES))
        return -1

    def add_loads(self, loads: StepLoads, moe_layer_ids: tuple[int, ...]) -> None:
        """Add the (token, expert) pairs of the passes recorded last, or of one of their micro-batches."""
        load_PLR = loads.rank_load_PLR
        if not self.load_LR.size:
            rounds = load_PLR.shape[1] // len(moe_layer_ids)  # a layer may have a row for each of its rounds
            self.moe_layer_ids = tuple(layer for layer in moe_layer_ids for _ in range(rounds))
            self.load_LR = np.zeros(load_PLR.shape[1:], dtype=np.int64)
        self.load_LR += load_PLR.sum(axis=0)
        self.add_levels(RANK_LOAD, load_PLR.sum(axis=1))

    def add_bytes(self, port_bytes: Mapping[str, np.ndarray]) -> None:
        """Add bytes that the ranks' ports carried; port → [R]."""
        for port, values in port_bytes.items():
            _add(self.port_bytes, port, values)

    def add_levels(self, counter: str, value_PR: np.ndarray) -> None:
        """Note the levels of a counter at the start of the passes recorded last, for those of them that are kept."""
        first = len(self.step) - len(value_PR)
        for row in range(min(len(value_PR), max(0, self.keep_passes - first)) if value_PR.shape[1] == self.num_ranks else 0):
            self.set_level(counter, self.start_s[first + row], value_PR[row])

    def set_level(self, counter: str, at_s: float, value_R: np.ndarray) -> None:
        """Note that a counter stands at `value_R` on every rank from `at_s` on; values of one moment are added up. Beyond `MAX_LEVELS` nothing is kept."""
        levels = self.levels.setdefault(counter, [])
        value = np.asarray(value_R, dtype=np.float64)
        if levels and levels[-1][0] == at_s:
            levels[-1] = (at_s, levels[-1][1] + value)
        elif len(levels) < MAX_LEVELS:
            levels.append((float(at_s), value))

    def intervals(self) -> Iterator[Interval]:
        """Yield the Ops of the kept passes on the run's clock, pass by pass."""
        for program, times, row, passes, offset, step in self._kept:
            for index, op in enumerate(program.ops):
                gate = times.gate[index]
                start, end = (np.broadcast_to(value, (passes, self.num_ranks))[row] + offset for value in (times.start[index], times.end[index]))
                ready = None if gate is None else np.broadcast_to(gate, (passes, self.num_ranks))[row] + offset
                uses = tuple(self._use(times, op, index, position, row, passes, offset, start, ready, end) for position in range(len(op.jobs)))
                yield Interval(step, op.layer, op.label, op.lane, start, ready, end, uses, op.source_R, op.group_R)

    def _use(
        self,
        times: Times,
        op: Op,
        index: int,
        position: int,
        row: int,
        passes: int,
        offset: float,
        start: np.ndarray,
        ready: np.ndarray | None,
        end: np.ndarray,
    ) -> tuple[str, np.ndarray, np.ndarray]:
        """Return the port of a Job, and when it was used."""
        job = op.jobs[position]
        if times.spans:
            begin, over = (np.broadcast_to(value, (passes, self.num_ranks))[row] + offset for value in times.spans[index][position])
            return job.port, begin, over
        begin = ready if ready is not None and job.side == "recv" else start
        if op.decide is not None and position == 0:  # a hook has set the work
            return job.port, begin, end
        return job.port, begin, np.minimum(begin + np.broadcast_to(job.work_s, (passes, self.num_ranks))[row], end)

    # --- metrics ---------------------------------------------------------------------------------

    @property
    def simulated_s(self) -> float:
        """Seconds from the first to the last moment of the run."""
        return self.start_s[-1] + self.duration_s[-1] if self.step else 0.0

    def step_ms(self) -> dict[str, float]:
        """Return mean, p50, p95 and p99 of the pass times, ms."""
        values = np.asarray(self.duration_s) * 1e3
        p50, p95, p99 = np.percentile(values, [50, 95, 99])
        return {"mean": float(values.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}

    def breakdown_s(self) -> dict[str, np.ndarray]:
        """Return label → [B] mean seconds per pass and rank; with `idle`, labels sum to the pass time when lanes do not overlap.

        A block is one pass as long as there are at most `MAX_BLOCKS` of them, else `sums.block` consecutive ones.
        """
        return {label: values for label, values in self.sums.per_pass().items() if values.any()}

    def mean_breakdown_s(self) -> dict[str, float]:
        """Return label → mean seconds per pass and rank over the whole run."""
        return {label: value / len(self.step) for label, value in sorted(self.total_s.items()) if value}

    def provenance(self) -> dict[str, float]:
        """Return class → share of the work's time."""
        total = self.class_s.sum()
        return {name: float(value / total) if total else 0.0 for name, value in zip(CLASSES, self.class_s, strict=True)}

    # --- tables ----------------------------------------------------------------------------------

    def to_pandas(self, table: str = "steps") -> Any:
        """Return one of the tables of `columns` as a DataFrame. Raises InputError for another name, or if pandas is not installed."""
        data = self.columns(table)
        try:
            import pandas
        except ImportError:
            raise InputError("to_pandas: needs pandas, which is not installed; install moesim[report]") from None
        return pandas.DataFrame(data)

    def columns(self, table: str) -> dict[str, np.ndarray]:
        """Return the columns of a table; seconds and bytes.

        `steps`: one row per pass with its seconds per label (the mean of its block where passes were merged). `ranks`: one row per rank with seconds per
        lane, label and port, bytes per port, tokens. `intervals`: one row per Op and rank of the kept passes. `loads`: one row per MoE layer and rank.
        `counters`: one row per counter, moment and rank. Conservation can be read off: bytes out and in have the same sum over `ranks`, no lane is taken
        for longer than `elapsed_s`, labels add up to the step.
        """
        tables = {"steps": self._steps, "ranks": self._ranks, "intervals": self._interval_rows, "loads": self._loads, "counters": self._counters}
        if table not in tables:
            raise InputError(describe("to_pandas", "table", table, f"must be one of {', '.join(tables)}"))
        return tables[table]()

    def _steps(self) -> dict[str, np.ndarray]:
        block = np.arange(len(self.step)) // self.sums.block
        result = {"step": np.array(self.step), "start_s": np.array(self.start_s), "duration_s": np.array(self.duration_s)}
        return {**result, **{f"{label}_s": values[block] for label, values in self.breakdown_s().items()}}

    def _ranks(self) -> dict[str, np.ndarray]:
        result: dict[str, np.ndarray] = {"rank": np.arange(self.num_ranks), "elapsed_s": np.full(self.num_ranks, float(np.sum(self.duration_s)))}
        for prefix, values in (("lane", self.lane_s), ("label", self.label_s), ("port", self.port_s)):
            result.update({f"{prefix}.{name}_s": values[name] for name in sorted(values)})
        result.update({f"{port}_bytes": value for port, value in sorted(self.port_bytes.items())})
        result["load"] = self.load_LR.sum(axis=0)
        return {name: values for name, values in result.items() if len(values) == self.num_ranks}

    def _interval_rows(self) -> dict[str, np.ndarray]:
        parts, ranks = list(self.intervals()), self.num_ranks
        result: dict[str, np.ndarray] = {
            name: np.repeat(np.array([getattr(part, name) for part in parts], dtype=kind), ranks)
            for name, kind in (("step", np.int64), ("layer", np.int64), ("label", object), ("lane", object))
        }
        result["rank"] = np.tile(np.arange(ranks), len(parts))
        for name in ("start", "end"):
            result[f"{name}_s"] = np.concatenate([getattr(part, f"{name}_R") for part in parts]) if parts else np.zeros(0)
        result["gate_s"] = np.concatenate([np.full(ranks, np.nan) if part.gate is None else part.gate for part in parts]) if parts else np.zeros(0)
        return result

    def _loads(self) -> dict[str, np.ndarray]:
        layers, ranks = self.load_LR.shape
        return {
            "layer": np.repeat(np.array(self.moe_layer_ids, dtype=np.int64), ranks),
            "rank": np.tile(np.arange(ranks), layers),
            "load": self.load_LR.reshape(-1),
        }

    def _counters(self) -> dict[str, np.ndarray]:
        rows = [
            (name, at_s, rank, float(value)) for name, levels in sorted(self.levels.items()) for at_s, value_R in levels for rank, value in enumerate(value_R)
        ]
        kinds = {"counter": object, "at_s": np.float64, "rank": np.int64, "value": np.float64}
        return {name: np.array([row[index] for row in rows], dtype=kind) for index, (name, kind) in enumerate(kinds.items())}


def _add(table: dict[Any, np.ndarray], key: Any, values: np.ndarray) -> None:
    if key in table:
        table[key] += values
    else:
        table[key] = np.array(values, dtype=np.float64)
