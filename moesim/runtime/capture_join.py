"""What the ranks of one run recorded, each in a folder of its own, joined to one trace, in bounded memory.

Rows are ordered by step and then by rank, as one recorder would have written them. Steps that not all ranks have are left out; the provenance counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from moesim.errors import TraceError, describe
from moesim.runtime.capture_spool import check_target
from moesim.traces.manifest import TABLES
from moesim.traces.open import open_trace
from moesim.traces.routing_trace import RoutingTrace, TokenBatch
from moesim.traces.writer import TraceWriter, _columns_of


def join(folders: Sequence[Path], target: Path) -> int:
    """Join the traces of the ranks to `target`; return its rows. Raises TraceError if they are not of one run."""
    traces = [open_trace(str(folder)) for folder in folders]
    first = traces[0]
    for trace in traces[1:]:
        if trace.shape != first.shape:
            raise TraceError(describe(trace.source, "shape", trace.shape.model, f"must be that of {first.source}", "join the ranks of one run"))
    check_target(target)
    steps = [int(trace.provenance.get("steps", 0)) for trace in traces]
    count = min(steps)
    provenance = {**first.provenance, "steps": count, "steps_left_out": sum(steps) - count * len(steps)}
    streams = [_steps(trace) for trace in traces]
    rows = 0
    with TraceWriter(target, first.shape, columns=_columns_of(first), provenance=provenance, facts={"parallel": first.facts["parallel"]}) as writer:
        for number in range(count):
            for rank, stream in enumerate(streams):
                batch = next(stream, None)
                if batch is None or int(batch.step_T[0]) != number:
                    raise TraceError(f"{traces[rank].source}: lacks step {number}, which other ranks have; join the ranks of one run")
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
    return rows


def _steps(trace: RoutingTrace) -> Iterator[TokenBatch]:
    """Yield the rows of one step after another."""
    held: list[TokenBatch] = []
    for batch in trace.batches():
        borders = np.flatnonzero(np.diff(batch.step_T.astype(np.int64))) + 1
        for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(batch)], strict=True):
            part = batch.take(slice(start, stop))
            if held and int(held[0].step_T[0]) != int(part.step_T[0]):
                yield _whole(held)
                held = []
            held.append(part)
    if held:
        yield _whole(held)


def _whole(parts: list[TokenBatch]) -> TokenBatch:
    from moesim.traces.routing_trace import concatenate

    return concatenate(parts)
