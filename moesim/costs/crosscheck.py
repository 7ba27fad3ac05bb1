"""Leave-one-out errors of the expert law: how well a balanced load is predicted from the other loads of its table.

`holdout` scores rows by their neighbours on the grid; here the fitted law itself is asked, as a replay asks it. Errors are signed, predicted / measured − 1;
the smallest and the largest load have a neighbour on one side only and are not scored.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.costs.expert_rows import Balanced
from moesim.costs.experts import ExpertLaw
from moesim.costs.holdout import codes_of
from moesim.costs.provenance import Provenance
from moesim.costs.tables import Tables
from moesim.hardware.cluster import Cluster


def leave_one_out_experts(rows: Balanced) -> np.ndarray:
    """Return the error of the expert law at every inner balanced load."""
    errors = []
    for i in range(1, len(rows.assignments) - 1):
        law = ExpertLaw([Balanced(rows.slots, np.delete(rows.assignments, i), np.delete(rows.seconds, i))], scale=1.0, worst=Provenance.MEASURED)
        errors.append(float(law(balanced_load(rows.assignments[i], rows.slots), None).seconds[0]) / rows.seconds[i] - 1.0)
    return np.array(errors)


def balanced_load(assignments: float, slots: int) -> np.ndarray:
    """Return int64 [1, C]: the load dealt to the slots as evenly as integers allow."""
    quotient, more = divmod(int(assignments), slots)
    return (quotient + (np.arange(slots) < more)).astype(np.int64)[None]


def expert_law_errors(cluster: Cluster, *, engine: str = "sglang", sample: int = 1) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (what, errors) for the expert tables of a cluster; every `sample`-th shape of the large one is scored."""
    tables = Tables(cluster, engine)
    names = ("kernel_source", "moe_dtype", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size")
    rows = tables.rows("moe", *names, "num_tokens", "latency_s", where={"moe_ep_size": 1, "distribution": "balanced"}, transfer=False)
    if rows is not None:
        shape = codes_of(rows, names)
        errors = []
        for code in np.unique(shape)[::sample]:
            mine = np.flatnonzero(shape == code)
            loads = rows["num_tokens"][mine] * rows["topk"][mine]
            errors.append(leave_one_out_experts(Balanced.build(int(rows["num_experts"][mine[0]]), loads, rows["latency_s"][mine])))
        yield "experts", np.concatenate(errors)
    where = {"distribution": "uniform"}
    rows = tables.rows("wideep_moe_generation", "moe_ep_size", "num_experts", "topk", "num_tokens", "latency_s", where=where, transfer=False)
    if rows is not None:
        errors = []
        for ranks in np.unique(rows["moe_ep_size"]).tolist():
            mine = np.flatnonzero(rows["moe_ep_size"] == ranks)
            loads = rows["num_tokens"][mine] * rows["topk"][mine] / ranks
            errors.append(leave_one_out_experts(Balanced.build(int(rows["num_experts"][mine[0]] // ranks), loads, rows["latency_s"][mine])))
        yield "experts under EP", np.concatenate(errors)
