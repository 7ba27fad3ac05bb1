"""Scores of measured tables: leave one out or predicted, and what a report says about one quantity.

A `Score` holds the predictions of one table's rows; a quantity is what one file times, one table or several. Errors are relative and signed,
predicted / measured − 1. The link model and the rank-load model are scored apart, on held-out numbers of nodes and on the load-balancing table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.error_summary import error_summary
from moesim.costs.exchange import COMMUNICATION_SMS
from moesim.costs.holdout import GRIDS, leave_one_out, merge_repeats
from moesim.costs.predict import Predictor, engine_of
from moesim.costs.provenance import Provenance
from moesim.costs.tables import Rows, Tables
from moesim.errors import CostError, InputError
from moesim.files import read_yaml
from moesim.hardware import Cluster
from moesim.hardware.measured import read_measured
from moesim.hardware.measured_columns import Measured

PEERS = Path(__file__).with_name("peers.yaml")
NOT_SCORED = {"wideep_moe_context": "scored apart: every number of ranks from the others"}


@dataclass(slots=True, kw_only=True)
class Score:
    """Predictions of one table's rows."""

    table: Measured
    method: str
    """`leave_one_out`, `tables` (other tables of the hardware) or `transfer` (a donor's); what most rows were predicted by."""
    measured: np.ndarray
    predicted: np.ndarray
    """NaN: not scored."""
    codes: np.ndarray
    excluded: dict[str, int]
    calibrated: int
    """Rows that were used and never scored: the border of the grid, or another table's rows."""
    floor: float | None
    axes: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def errors(self) -> np.ndarray:
        """Return the relative errors of the scored rows."""
        known = np.isfinite(self.predicted)
        return np.asarray(self.predicted[known] / self.measured[known] - 1.0)


def score_table(table: Measured, cluster: Cluster, owned: Callable[[Measured], bool] | None, backend: str | None, strict: bool) -> Score:
    excluded = dict(table.excluded)
    if table.kind not in GRIDS:
        count = len(table.rows["latency_s"])
        if count:
            excluded[NOT_SCORED.get(table.kind, "no operator of the cost model computes it")] = count
        empty = np.zeros(0)
        return Score(table=table, method="none", measured=empty, predicted=empty, codes=empty, excluded=excluded, calibrated=0, floor=None)
    is_own = owned is not None and owned(table)
    rows, merged, floor = merge_repeats(table.kind, table.rows) if len(table.rows["latency_s"]) else (table.rows, {}, None)
    for reason, count in merged.items():
        excluded[reason] = excluded.get(reason, 0) + count
    axes: dict[str, np.ndarray] = {}
    if not len(rows["latency_s"]):
        empty = np.zeros(0)
        return Score(table=table, method="none", measured=empty, predicted=empty, codes=empty, excluded=excluded, calibrated=0, floor=floor)
    if is_own:
        predicted, axes = leave_one_out(table.kind, rows)
        border = int(np.isnan(predicted).sum())
        codes = np.full(len(predicted), int(Provenance.INTERPOLATED), dtype=np.uint8)
        if border:
            excluded["border of the grid: no neighbours to predict it from"] = border
        method, calibrated = "leave_one_out", border
    else:
        predictor = Predictor(cluster, backend or engine_of(table.stem, table.source, table.rows), strict=strict)
        predicted, codes, reasons, calibrated = predictor(table.kind, rows)
        names, counts = np.unique(reasons[np.isnan(predicted)].astype(str), return_counts=True)
        for reason, count in zip(names.tolist(), counts.tolist(), strict=True):
            excluded[reason] = excluded.get(reason, 0) + count
        known = np.isfinite(predicted)
        if strict and (codes[known] > Provenance.TRACE).any():
            worst = Provenance(int(codes[known].max())).name.lower()
            raise CostError(f"{cluster.name}: {table.stem}: only {worst} times are left for some rows, and --strict refuses them; drop --strict")
        method = "transfer" if known.any() and np.median(codes[known]) == Provenance.EXTRAPOLATED else "tables"
    return Score(
        table=table,
        method=method,
        measured=rows["latency_s"],
        predicted=predicted,
        codes=codes,
        excluded=excluded,
        calibrated=calibrated,
        floor=floor,
        axes=axes,
    )


# --- link model, rank load ----------------------------------------------------------------------------------------


class _Without(Tables):
    """Tables without the rows of one number of nodes, or of expert-parallel ranks; one node alone has a table of its own, of another version, which stays."""

    held = ("node_num", 0)

    def rows(self, kind: str, *columns: str, where: Mapping[str, Any] | None = None, transfer: bool = True) -> Rows | None:
        found = super().rows(kind, *columns, where=where, transfer=transfer)
        column, value = self.held
        if found is None or column not in found or kind.endswith("_1node"):
            return found
        keep = found[column] != value
        kept = Rows({name: values[keep] for name, values in found.items()})
        kept.worst = found.worst
        return kept if keep.any() else None


def score_models(cluster: Cluster, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Return DeepEP times of every number of nodes, predicted by the link model from the others; and the timed rank of the load-balancing table."""
    result: dict[str, dict[str, Any]] = {}
    if cluster.tables is None:
        return result
    for path in sorted(path for path in cluster.tables.glob("deepep_*_1to8nodes_*.parquet") if wanted(path.stem)):
        scores = []
        for table in read_measured(path):
            if table.kind == "deepep_normal":
                table.leave_out(table.rows["sms"] != COMMUNICATION_SMS, f"other than {COMMUNICATION_SMS} SMs for communication")
            rows, merged, floor = merge_repeats(table.kind, table.rows)
            predicted = np.full(len(rows["latency_s"]), np.nan)
            codes = np.full(len(predicted), int(Provenance.CALIBRATED), dtype=np.uint8)
            for nodes in np.unique(rows["node_num"]).tolist():
                mine = rows["node_num"] == nodes
                tables = _Without(cluster, "sglang")
                tables.held = ("node_num", int(nodes))
                one = {name: values[mine] for name, values in rows.items()}
                predicted[mine], codes[mine], _, _ = Predictor(cluster, "sglang", tables=tables)(table.kind, one)
            excluded = {**table.excluded, **merged}
            scores.append(
                Score(
                    table=table,
                    method="leave_one_out",
                    measured=rows["latency_s"],
                    predicted=predicted,
                    codes=codes,
                    excluded=excluded,
                    calibrated=0,
                    floor=floor,
                    axes={f"{int(nodes)} nodes": np.where(rows["node_num"] == nodes, predicted, np.nan) for nodes in np.unique(rows["node_num"])},
                )
            )
        result[f"{path.stem}, link model"] = quantity_of(scores)
    for path in sorted(path for path in cluster.tables.glob("wideep_moe_context_*.parquet") if wanted(path.stem)):
        for table in read_measured(path):
            result[f"{path.stem}, other numbers of ranks"] = quantity_of([_other_ranks(table, cluster)])
    for path in sorted(path for path in cluster.tables.glob("wideep_moe_eplb_*.parquet") if wanted(path.stem)):
        for table in read_measured(path):
            rows, merged, floor = merge_repeats(table.kind, table.rows)
            predicted, codes, _, _ = Predictor(cluster, "trtllm")(table.kind, rows)
            axes = {name: np.where(rows["op_name"] == name, predicted, np.nan) for name in np.unique(rows["op_name"].astype(str))}
            score = Score(
                table=table,
                method="tables",
                measured=rows["latency_s"],
                predicted=predicted,
                codes=codes,
                excluded=merged,
                calibrated=0,
                floor=floor,
                axes=axes,
            )
            result[f"{path.stem}, from rank load"] = quantity_of([score])
    return result


def _other_ranks(table: Measured, cluster: Cluster) -> Score:
    """Score the experts of a prefill with every number of ranks from the tables of the others; rows of uniform routing, whose loads are known."""
    table.leave_out(table.rows["distribution"] != "uniform", "the loads of the experts are not stated")
    rows = table.rows
    predicted = np.full(len(rows["latency_s"]), np.nan)
    ranks = rows["moe_ep_size"]
    for count in np.unique(ranks).tolist():
        mine = ranks == count
        tables = _Without(cluster, "sglang")
        tables.held = ("moe_ep_size", int(count))
        one = {name: values[mine] for name, values in rows.items()}
        predicted[mine] = Predictor(cluster, "sglang", tables=tables).sorted_experts(one)
    return Score(
        table=table,
        method="leave_one_out",
        measured=rows["latency_s"],
        predicted=predicted,
        codes=np.full(len(predicted), int(Provenance.CALIBRATED), dtype=np.uint8),
        excluded=dict(table.excluded),
        calibrated=0,
        floor=None,
        axes={f"{int(count)} ranks": np.where(ranks == count, predicted, np.nan) for count in np.unique(ranks)},
    )


# --- what a report says ---------------------------------------------------------------------------------------------


def _shares(codes: np.ndarray) -> dict[str, float]:
    return {item.name.lower(): float((codes == item).mean()) for item in Provenance if (codes == item).any()}


def merge_counts(items: Iterable[Mapping[str, int]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for item in items:
        for reason, count in item.items():
            if count:
                result[reason] = result.get(reason, 0) + count
    return dict(sorted(result.items()))


def quantity_of(scores: list[Score]) -> dict[str, Any]:
    errors = np.concatenate([score.errors for score in scores])
    codes = np.concatenate([score.codes[np.isfinite(score.predicted)] for score in scores])
    floors = [score.floor for score in scores if score.floor is not None]
    methods = [score.method for score in scores if len(score.errors)]
    method = max(dict.fromkeys(methods), key=methods.count) if methods else "none"
    parts = {}
    if len(scores) > 1:
        parts = {score.table.part or score.table.kind: {**error_summary(score.errors), "method": score.method} for score in scores}
    for score in scores:
        prefix = f"{score.table.part}, " if len(scores) > 1 and score.table.part else ""
        if len(score.axes) > 1:
            for axis, predicted in score.axes.items():
                known = np.isfinite(predicted)
                parts[f"{prefix}along {axis}" if score.method == "leave_one_out" else f"{prefix}{axis}"] = error_summary(
                    predicted[known] / score.measured[known] - 1.0
                )
    return {
        **error_summary(errors),
        "method": method,
        "rows_scored": len(errors),
        "rows_calibrated": sum(score.calibrated for score in scores),
        "rows_excluded": merge_counts(score.excluded for score in scores),
        "error_floor": float(np.mean(floors)) if floors else None,
        "provenance": _shares(codes),
        "parts": parts,
        "peers": _peers(scores, method),
    }


def _peers(scores: list[Score], method: str) -> list[dict[str, Any]]:
    published = read_yaml(PEERS, error=InputError)["kernels"]
    chosen = [*published["transfer" if method == "transfer" else "measured"]] if method != "none" else []
    for kind in dict.fromkeys(score.table.kind for score in scores):
        chosen += published.get(kind, [])
    return chosen
