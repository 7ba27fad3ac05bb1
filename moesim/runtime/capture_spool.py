"""Recording what was routed: every rank spools rows to a file of its own; a finished prefix becomes a `moetrace/1` folder.

A spool is three append-only files of fixed-size records per rank: tokens (step, request, position, phase, routes), kernels
(step, layer, stage, begin, duration, bytes, tokens) and steps (step, epoch, tokens by phase, begin, end; written last), and
one plan per epoch. Whole steps only, so any common number of steps of all ranks is a consistent trace. Expert ids are logical:
what the router chose, before any placement. A rank's files are bounded; stage times end first, at `MAX_KERNEL_ROWS`.
That is the deployment's own recorder; `moesim.runtime.capture` records any Hugging Face model.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.files import read_json
from moesim.plan import Plan
from moesim.traces.archive import FILE_NAME, MANIFEST
from moesim.traces.manifest import KERNELS_SPEC
from moesim.traces.routing_trace import TokenBatch, TraceShape
from moesim.traces.writer import TraceWriter

STEP = np.dtype([("step", "<u4"), ("epoch", "<u4"), ("prefill", "<u4"), ("decode", "<u4"), ("start_ns", "<i8"), ("end_ns", "<i8")])
ROW = np.dtype([(name, kind) for name, kind in KERNELS_SPEC.items() if name != "rank"])
"""One stage of one step on one rank."""
MAX_SPOOL_BYTES = 1 << 30
"""Per rank; recording ends there, serving goes on, and the manifest says so."""
MAX_KERNEL_ROWS = 1 << 21
"""Of all ranks together, because publishing holds them in memory: 80 MB. Later steps have routes, but no stage times."""
MAX_EPOCHS = 256
"""Maps that a trace names."""


def token_dtype(shape: TraceShape) -> np.dtype:
    """Return the record of one token and forward pass."""
    return np.dtype([("step", "<u4"), ("request", "<u8"), ("position", "<u4"), ("phase", "u1"), ("routes", shape.dtype, (shape.num_layers, shape.top_k))])


class Spool:
    """Appends one rank's rows to its files."""

    def __init__(self, folder: Path, rank: int, shape: TraceShape, *, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.shape, self._dtype, self._folder, self._rank = shape, token_dtype(shape), folder, rank
        self._tokens = (folder / f"tokens-{rank}").open("wb")
        self._kernels = (folder / f"kernels-{rank}").open("wb")
        self._steps = (folder / f"steps-{rank}").open("wb")
        self._kernel_rows, self._timed = MAX_KERNEL_ROWS // ranks, True
        self._epoch = -1
        self.full = False

    def add(
        self, *, step: int, epoch: int, phase: int, requests: np.ndarray, positions: np.ndarray, experts_LNk: Sequence[Any], start_ns: int, end_ns: int,
        plan: Plan | None = None, stages: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Append one step; `experts_LNk` holds per layer the ids [N, k] that the router chose; plan: the map in force; stages: rows of `ROW`."""
        if self.full:
            return
        rows = np.empty(len(requests), self._dtype)
        rows["step"], rows["request"], rows["position"], rows["phase"] = step, requests, positions, phase
        for layer, ids in enumerate(experts_LNk):
            rows["routes"][:, layer] = ids.numpy()
        prefill = len(rows) if phase == 0 else 0
        self._tokens.write(rows.tobytes())
        self._tokens.flush()
        self._kernel_rows -= 0 if stages is None else len(stages)
        self._timed = self._timed and stages is not None and self._kernel_rows >= 0
        if self._timed and stages is not None:
            self._kernels.write(stages.tobytes())
            self._kernels.flush()
        if plan is not None and self._rank == 0 and epoch != self._epoch:
            plan.write(self._folder / f"plan-{epoch}")
            self._epoch = epoch
        self._steps.write(np.array([(step, epoch, prefill, len(rows) - prefill, start_ns, end_ns)], STEP).tobytes())
        self._steps.flush()
        self.full = self._tokens.tell() > MAX_SPOOL_BYTES

    def close(self) -> None:
        """Close the files."""
        self._tokens.close()
        self._kernels.close()
        self._steps.close()


def spooled_steps(folder: Path, ranks: int) -> int:
    """Return how many steps all ranks have written."""
    paths = [folder / f"steps-{rank}" for rank in range(ranks)]
    return min((path.stat().st_size // STEP.itemsize if path.exists() else 0) for path in paths)


def publish(folder: Path, ranks: int, shape: TraceShape, target: Path, provenance: Mapping[str, Any]) -> int:
    """Write the steps that all ranks have spooled as a trace to `target`, replacing it whole; return the number of rows."""
    count = spooled_steps(folder, ranks)
    fresh = target.parent / f".{target.name}.new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    steps = [np.fromfile(folder / f"steps-{rank}", STEP, count) for rank in range(ranks)]
    starts = [np.concatenate([[0], np.cumsum(table["prefill"].astype(np.int64) + table["decode"])]) for table in steps]
    # Bounded, because behind the last whole step a rank may be in the middle of writing a row.
    tokens = [np.memmap(folder / f"tokens-{rank}", token_dtype(shape), mode="r", shape=(int(starts[rank][-1]),)) for rank in range(ranks)]
    try:
        plans = _plans(folder, steps[0]["epoch"])
        facts = {"parallel": parallel_facts(ranks, plans), "clock": "CLOCK_MONOTONIC"}
        with TraceWriter(fresh, shape, provenance={**provenance, "steps": count}, facts=facts) as writer:
            for index in range(count):
                for rank in range(ranks):
                    rows = np.array(tokens[rank][starts[rank][index] : starts[rank][index + 1]])
                    writer.append(
                        TokenBatch(
                            step_T=rows["step"], rank_T=np.full(len(rows), rank, np.uint16), request_T=rows["request"], position_T=rows["position"],
                            phase_T=rows["phase"], experts_TLK=np.ascontiguousarray(rows["routes"]),
                        )
                    )  # fmt: skip
            joined = np.stack(steps, axis=1).reshape(-1) if count else np.empty(0, STEP)
            if count:
                names = {"step": "step", "map_epoch": "epoch", "n_prefill": "prefill", "n_decode": "decode", "t_start_ns": "start_ns", "t_end_ns": "end_ns"}
                table = {column: joined[name] for column, name in names.items()}
                writer.add_table("steps", {**table, "rank": np.tile(np.arange(ranks, dtype=np.uint16), count)})
            kernels = _kernels(folder, ranks, steps)
            if kernels is not None:
                writer.add_table("kernels", kernels)
        _replace(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return int(sum(start[-1] for start in starts))


def _plans(folder: Path, epochs: np.ndarray) -> dict[str, Any]:
    """Return epoch → plan for the maps that steps were served under, the first `MAX_EPOCHS` of them."""
    paths = {str(epoch): folder / f"plan-{epoch}" for epoch in np.unique(epochs).tolist()[:MAX_EPOCHS]}
    return {epoch: read_json(path) for epoch, path in paths.items() if path.exists()}


def _kernels(folder: Path, ranks: int, steps: Sequence[np.ndarray]) -> dict[str, np.ndarray] | None:
    """Return the columns of the kernel table, sorted by step, rank and time; None if no stage was timed."""
    parts = []
    for rank in range(ranks):
        path = folder / f"kernels-{rank}"
        rows = np.fromfile(path, ROW) if path.exists() else np.empty(0, ROW)
        parts.append(rows[np.isin(rows["step"], steps[rank]["step"])])
    joined = np.concatenate(parts)
    if not len(joined):
        return None
    rank_K = np.repeat(np.arange(ranks, dtype=np.uint16), [len(rows) for rows in parts])
    order = np.lexsort((joined["t_ns"], rank_K, joined["step"]))
    return {"rank": rank_K[order], **{name: joined[name][order] for name in ROW.names or ()}}


def parallel_facts(ranks: int, plans: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a manifest says of `ranks` expert-parallel ranks: their degrees, which all of a run's plans share, and the plans by epoch."""
    told = next(iter(plans.values()))["parallel"] if plans else {}
    tp = int(told.get("tp", 1))
    return {"tp": tp, "ep": ranks, "dp": ranks // tp, "pp": int(told.get("pp", 1)), **({"plans": dict(plans)} if plans else {})}


def check_target(target: Path) -> None:
    """Raise InputError if `target` exists and holds anything but a trace, because publishing replaces it."""
    if target.exists() and not target.is_dir():
        raise InputError(f"{target}: is a file; give a folder for the trace")
    strangers = sorted(path.name for path in target.iterdir() if path.name != MANIFEST and not FILE_NAME.match(path.name)) if target.exists() else []
    if strangers:
        raise InputError(f"{target}: holds {strangers[0]!r}, which is not part of a trace; give an empty or new folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise InputError(f"{target}: cannot be written ({cause.strerror or cause}); check the folder and its permissions") from None


def _replace(fresh: Path, target: Path) -> None:
    """Put `fresh` where `target` is in one move: a process that is killed here leaves one or the other."""
    check_target(target)
    if not target.exists():
        os.rename(fresh, target)
        return
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    if _exchange(fresh, target):  # what was at `target` is now at `fresh`
        os.rename(fresh, old)
    else:
        os.rename(target, old)
        os.rename(fresh, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders (Linux); return False where the system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, swap = -100, 2
    return bool(call(at_cwd, os.fsencode(one.absolute()), at_cwd, os.fsencode(other.absolute()), swap) == 0)
