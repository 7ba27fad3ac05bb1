"""Summarise a trace: what is in it, how skewed it is, what it costs on disk."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesim.traces.open import stored_path
from moesim.traces.routing_trace import PHASES, RoutingTrace, count_LE


def summarise(trace: RoutingTrace) -> dict[str, Any]:
    """Return the report of `moesim trace info`, reading the whole trace once.

    imbalance is max/mean of an expert's count per layer over the whole trace (1: balanced).
    """
    shape = trace.shape
    count = np.zeros((shape.num_layers, shape.num_experts), dtype=np.int64)
    report: dict[str, Any] = {
        "schema": "moesim.trace-info/1",
        "source": trace.source,
        "kind": trace.kind,
        "routing": trace.routing,
        "model": shape.model,
        "num_experts": shape.num_experts,
        **({} if shape.experts_L is None else {"experts_per_layer": list(shape.experts_L)}),
        "top_k": shape.top_k,
        "moe_layer_ids": list(shape.moe_layer_ids),
        "num_groups": shape.num_groups,
        "top_k_groups": shape.top_k_groups,
        "rows": trace.num_rows,
    }
    if trace.kind == "counts":
        table = trace.counts_WLE()
        count += table.sum(axis=0)
        report |= {"windows": list(trace.stored_windows), "tokens": float(count.sum() / (shape.num_layers * shape.top_k))}
    else:
        phases = np.zeros(len(PHASES), dtype=np.int64)
        steps: set[int] = set()
        requests: set[int] = set()
        ranks: set[int] = set()
        missing = 0
        columns: set[str] = set()
        for batch in trace.batches():
            count += count_LE(batch, shape.num_experts)
            phases += np.bincount(batch.phase_T, minlength=len(PHASES))
            steps.update(np.unique(batch.step_T).tolist())
            ranks.update(np.unique(batch.rank_T).tolist())
            requests.update(np.unique(batch.request_T).tolist())
            missing += 0 if batch.valid_TLK is None else int((~batch.valid_TLK).sum())
            columns |= {name.removesuffix("_TLK") for name in ("weights_TLK", "predicted_TLK", "valid_TLK") if getattr(batch, name) is not None}
        report |= {
            "tokens": int(phases.sum()),
            "steps": len(steps),
            "requests": len(requests),
            "ranks": len(ranks),
            "phases": {name: int(n) for name, n in zip(PHASES, phases, strict=True) if n},
            "missing_choices": missing,
            "columns": sorted(columns),
        }
    mean = count.mean(axis=1)
    imbalance = np.divide(count.max(axis=1), mean, out=np.ones(len(mean)), where=mean > 0)
    size = _bytes_on_disk(trace)
    cells = trace.num_rows * shape.num_layers
    report |= {
        "imbalance": {
            "per_layer": [round(float(x), 6) for x in imbalance],
            "mean": round(float(imbalance.mean()), 6),
            "worst": round(float(imbalance.max()), 6),
            "unused_experts": int((count == 0).sum()),
        },
        "bytes": size,
        "bytes_per_token_layer": round(size / cells, 4) if size and cells and trace.kind == "tokens" else None,
        "dropped_rows": trace.facts.get("dropped_rows", 0),
        "parallel": _degrees(trace.facts.get("parallel")),
        "fingerprint": trace.fingerprint,
        "provenance": dict(trace.provenance),
    }
    return report


def _degrees(parallel: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the parallel degrees; of the recorded maps, which are long, only their number."""
    if not isinstance(parallel, dict) or not isinstance(parallel.get("plans"), dict):
        return parallel
    return {**parallel, "plans": len(parallel["plans"])}


def _bytes_on_disk(trace: RoutingTrace) -> int | None:
    if trace.is_synthetic and trace.source == trace.synthetic:
        return None
    path = stored_path(trace)
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else None
