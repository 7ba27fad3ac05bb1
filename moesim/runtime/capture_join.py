"""What the ranks of one run recorded, each in a folder of its own, joined to one trace, in bounded memory.

Rows are ordered by step and then by rank, as one recorder would have written them. Steps that not all ranks have are left out; the provenance counts them.
A rank that was killed has what it recorded up to its last checkpoint, always whole steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.runtime.capture_spool import check_target
from moesim.traces.manifest import TABLES
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import RoutingTrace, TokenBatch, concatenate
from moesim.traces.writer import TraceWriter, _columns_of

OF_ONE_RUN = ("run", "model_weights", "seed")
"""Facts of a recording in which the ranks of one run agree."""


def join(folders: Sequence[Path], target: Path) -> dict[str, int]:
    """Join the traces of the ranks to `target`; return its rows and steps, and the steps left out.

    Raises TraceError if they are not those of all ranks of one run, in their order.
    """
    if not folders:
        raise InputError("trace join: no folder given; name one per rank")
    traces = [open_trace(str(folder)) for folder in folders]
    first = traces[0]
    told = (first.facts.get("parallel") or {}).get("ep")
    if told is not None and told != len(traces):
        raise TraceError(describe(first.source, "ranks of the run", told, f"must be the {len(traces)} folders given", "name the folders of all ranks"))
    for trace in traces[1:]:
        if trace.shape != first.shape:
            raise TraceError(describe(trace.source, "shape", trace.shape.model, f"must be that of {first.source}", "join the ranks of one run"))
        for key in OF_ONE_RUN:
            if trace.provenance.get(key) != first.provenance.get(key):
                rule = f"must be the {first.provenance.get(key)!r} of {first.source}"
                raise TraceError(describe(trace.source, key, trace.provenance.get(key), rule, "join the ranks of one run"))
    check_target(target)
    steps = [_steps_of(trace) for trace in traces]
    count = min(steps)
    left_out = sum(steps) - count * len(steps)
    provenance = {**first.provenance, "steps": count, "steps_left_out": left_out}
    provenance.pop("unfinished", None)
    if any(trace.provenance.get("unfinished") for trace in traces):
        provenance["unfinished"] = True
    streams = [_steps(trace) for trace in traces]
    rows = 0
    facts = {key: first.facts[key] for key in ("parallel", "clock")}
    with TraceWriter(target, first.shape, columns=_columns_of(first), provenance=provenance, facts=facts) as writer:
        for number in range(count):
            for rank, stream in enumerate(streams):
                batch = next(stream, None)
                if batch is None or int(batch.step_T[0]) != number:
                    raise TraceError(f"{traces[rank].source}: lacks step {number}, which other ranks have; join the ranks of one run")
                if (batch.rank_T != rank).any():
                    raise TraceError(
                        describe(traces[rank].source, "rank", int(batch.rank_T[0]), f"must be {rank}", "name the folders in the order of the ranks")
                    )
                writer.append(batch)
                rows += len(batch)
        for name in TABLES:
            tables = [trace.tables(name) if trace.tables is not None else None for trace in traces]
            found = [table for table in tables if table is not None]
            if len(found) == len(traces):
                joined = {key: np.concatenate([table[key] for table in found]) for key in found[0]}
                order = np.lexsort((joined["t_ns" if name == "kernels" else "t_start_ns"], joined["rank"], joined["step"]))
                order = order[joined["step"][order] < count]
                writer.add_table(name, {key: values[order] for key, values in joined.items()})
    return {"rows": rows, "steps": count, "steps_left_out": left_out}


def _steps_of(trace: RoutingTrace) -> int:
    """Return how many steps a rank has recorded; they are numbered from 0."""
    groups = [] if trace.tokens is None else list(trace.tokens.groups)
    return max((group.step_max for group in groups), default=-1) + 1


def _steps(trace: RoutingTrace) -> Iterator[TokenBatch]:
    """Yield the rows of one step after another."""
    held: list[TokenBatch] = []
    for batch in trace.batches():
        borders = np.flatnonzero(np.diff(batch.step_T.astype(np.int64))) + 1
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(batch)], strict=True):
            part = batch.take(slice(start, stop))
            if held and int(held[0].step_T[0]) != int(part.step_T[0]):
                yield concatenate(held)
                held = []
            held.append(part)
    if held:
        yield concatenate(held)
