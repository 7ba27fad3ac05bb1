"""Validate the cost tables: measured kernel times against predictions, table by table.

A table that the hardware owns (the same rows) is scored leave-one-out; any other is predicted from what the hardware has: its own tables, or its
donor's, transferred. Rows are merged and left out by their inputs only, never by how well they are predicted; everything left out is counted with its
reason. Errors are relative, predicted / measured − 1. Quantities are named by the table's file stem.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.costs.holdout import GRIDS, codes_of, leave_one_out, merge_repeats
from moesim.costs.predict import Predictor, engine_of
from moesim.costs.provenance import Provenance
from moesim.costs.tables import Rows, Tables, kind_of
from moesim.errors import CostError, HardwareError, InputError, MoesimError, describe
from moesim.files import read_yaml
from moesim.hardware import Cluster, load_cluster
from moesim.hardware.load import PACKAGE
from moesim.hardware.measured import SUFFIXES, Measured, read_measured, stem_of
from moesim.model import MoEModel, load_model
from moesim.model.moe_model import DTYPE_BYTES

SCHEMA = "moesim.validate/1"
MAX_FILES = 2000
OWNED = 0.5
"""Share of a file's rows that must be rows of the hardware's own table for it to own the file."""
PEERS = Path(__file__).with_name("peers.yaml")
PUBLISHED = PACKAGE / "published"


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


def facts_of(model: MoEModel | None, cluster: Cluster | None = None) -> dict[str, float]:
    """Return the sizes that readers of measured tables may ask for."""
    facts: dict[str, float] = {}
    if model is not None:
        attention = model.attention
        facts = {
            "hidden_size": model.hidden_size,
            "num_heads": attention.num_heads,
            "num_kv_heads": attention.num_kv_heads,
            "head_dim": attention.head_dim,
            "kv_lora_rank": attention.kv_lora_rank or 0,
            "vocab_size": model.vocab_size,
            "dense_ffn_size": model.dense_ffn_size,
            "expert_ffn_size": model.expert_ffn_size,
            "top_k": model.top_k,
            "expert_bytes": DTYPE_BYTES.get(model.expert_dtype, 2.0),
        }
    if cluster is not None:
        facts |= {f"peak_{dtype}": value for dtype, value in cluster.device.peak_flops.items()}
    return facts


def validate_kernels(
    source: Path | str | None,
    hardware: Cluster | str,
    *,
    model: MoEModel | str | None = None,
    backend: str | None = None,
    strict: bool = False,
    only: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the report of `moesim validate --kernels`.

    source: a table, a folder of tables, or None for the package's own tables of the hardware (and, where it has a donor, what transfer alone gives).
    model: what was measured, for files that do not say. backend: engine whose tables are preferred (default: the one the file names).
    strict: refuse predictions worse than a recorded duration. only: words, one of which a table's name must contain (default: all tables).
    Raises HardwareError if the one file given, or every file of the folder, is no known table.
    """
    cluster = load_cluster(hardware) if isinstance(hardware, str) else hardware
    known = load_model(model) if isinstance(model, str) else model
    own = source is None
    files = [(name, path) for name, path in (_own_files(cluster) if source is None else _files(Path(source))) if _wanted(name, only)]
    alone = not own and Path(source or "").is_file()
    owned = _Owned(cluster)
    quantities: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name, path in files:
        try:
            tables = read_measured(path, facts_of(known or _model_beside(path), cluster))
            scores = [_score(table, cluster, owned, backend, strict) for table in tables]
        except MoesimError as error:
            if alone:
                raise
            refused[name] = str(error)
            continue
        quantities[name] = _quantity(scores)
        if own and cluster.calibrated_from is not None and any(score.method == "leave_one_out" for score in scores):
            # The same rows without the device's own tables: what the donor alone would have predicted.
            bare = replace(cluster, tables=None)
            quantities[name]["transfer"] = _quantity([_score(table, bare, None, backend, False) for table in read_measured(path)])
    if not quantities:
        raise HardwareError(next(iter(refused.values())) if refused else f"{source}: holds no table ({', '.join(SUFFIXES)})")
    if own:
        quantities |= _link_model(cluster, only)
    return _report(cluster, known, source, quantities, refused)


def _wanted(name: str, only: tuple[str, ...]) -> bool:
    return not only or any(word in name for word in only)


# --- what is scored -----------------------------------------------------------------------------------------------


def _files(source: Path) -> list[tuple[str, Path]]:
    """Return (name of the quantity, path): the file's stem, with its folders where two files share one."""
    if source.is_file():
        return [(stem_of(source), source)]
    if not source.is_dir():
        raise HardwareError(f"{source}: does not exist; give a measured table or a folder of them")
    paths = sorted(path for path in source.rglob("*") if path.is_file() and path.name.endswith(SUFFIXES) and not path.name.startswith("."))
    if len(paths) > MAX_FILES:
        raise HardwareError(describe(str(source), "files", len(paths), f"must be <= {MAX_FILES}", "give one folder of tables"))
    stems = [stem_of(path) for path in paths]
    return [(stem if stems.count(stem) == 1 else "/".join((*path.relative_to(source).parts[:-1], stem)), path) for stem, path in zip(stems, paths, strict=True)]


def _own_files(cluster: Cluster) -> list[tuple[str, Path]]:
    folders = [cluster.tables] if cluster.tables is not None else []
    device = re.sub(r"-\d+(x\d+)?$", "", cluster.name)
    if (PUBLISHED / device).is_dir():
        folders.append(PUBLISHED / device)
    if not folders:
        raise HardwareError(
            f"{cluster.name}: has no measured tables to validate on; give a file or a folder with --kernels, or hardware that has, like h100-sxm-8"
        )
    return [(path.stem, path) for folder in folders for path in sorted(folder.glob("*.parquet"))]


def _model_beside(path: Path) -> MoEModel | None:
    """Return the library model that a meta.yaml beside the file (or above it) names, or None."""
    for folder in (path.parent, path.parent.parent):
        for meta in sorted(folder.glob("*meta.yaml"))[:20]:
            if not path.name.startswith(meta.name.removesuffix("meta.yaml")):
                continue
            try:
                words = str(read_yaml(meta, error=InputError).get("model", "")).rsplit("/", 1)[-1].lower().split("-")
            except (MoesimError, AttributeError):
                continue
            for size in range(len(words), 0, -1):
                try:
                    return load_model("-".join(words[:size]))
                except MoesimError:
                    continue
    return None


class _Owned:
    """Which rows are the hardware's own."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._tables: dict[str, list[Measured]] | None = None

    def __call__(self, table: Measured) -> bool:
        if self._cluster.tables is None or table.kind not in GRIDS or not len(table.rows["latency_s"]):
            return False
        if self._tables is None:
            self._tables = {}
        for path in sorted(self._cluster.tables.glob("*.parquet")):
            if (kind_of(path.stem) or ("", ""))[0] not in KINDS_OF.get(table.kind, (table.kind,)):
                continue
            if path.stem not in self._tables:
                self._tables[path.stem] = list(read_measured(path))
            for own in self._tables[path.stem]:
                if own.kind == table.kind and own.part in ("", table.part) and _shared(own.rows, table.rows) >= OWNED:
                    return True
        return False


KINDS_OF = {
    "collective": ("nccl",),
    "deepep_ll": ("deepep_ll_1node", "deepep_ll_1to8nodes"),
    "deepep_normal": ("deepep_normal_1node", "deepep_normal_1to8nodes"),
    "moe_a2a": ("moe_a2a_1node",),
}
"""Canonical kind → kinds of the stems that hold it, where they differ."""


def _shared(own: Mapping[str, np.ndarray], rows: Mapping[str, np.ndarray]) -> float:
    """Return the share of `rows` that are rows of `own`: equal in every column that both have, time included."""
    common = tuple(sorted(set(own) & set(rows)))
    size = len(own["latency_s"])
    both = {}
    for name in common:
        joined = [column if column.dtype == object else column.astype(np.float64) for column in (own[name], rows[name])]
        if joined[0].dtype != joined[1].dtype:
            return 0.0
        both[name] = np.concatenate(joined)
    seconds = both["latency_s"].astype(np.float64)
    # Five digits: sources print times with different precision.
    scale = 10.0 ** np.floor(np.log10(np.maximum(seconds, 1e-30)))
    both["latency_s"] = np.rint(seconds / scale * 1e4) * scale
    code = codes_of(both, common)
    return float(np.isin(code[size:], code[:size]).mean())


def _score(table: Measured, cluster: Cluster, owned: _Owned | None, backend: str | None, strict: bool) -> Score:
    excluded = dict(table.excluded)
    if table.kind not in GRIDS:
        count = len(table.rows["latency_s"])
        if count:
            excluded[_NOT_SCORED.get(table.kind, "no operator of the cost model computes it")] = count
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


_NOT_SCORED = {"wideep_moe_context": "the meaning of num_tokens (total, per rank, received) is not settled in the source"}


# --- link model, rank load ----------------------------------------------------------------------------------------


class _Without(Tables):
    """Tables without the rows of one number of nodes; one node alone has a table of its own, of another version, which stays."""

    held_nodes = 0

    def rows(self, kind: str, *columns: str, where: Mapping[str, Any] | None = None, transfer: bool = True) -> Rows | None:
        found = super().rows(kind, *columns, where=where, transfer=transfer)
        if found is None or "node_num" not in found or kind.endswith("_1node"):
            return found
        keep = found["node_num"] != self.held_nodes
        kept = Rows({name: values[keep] for name, values in found.items()})
        kept.worst = found.worst
        return kept if keep.any() else None


def _link_model(cluster: Cluster, only: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    """Return DeepEP times of every number of nodes, predicted by the link model from the others; and the timed rank of the load-balancing table."""
    result: dict[str, dict[str, Any]] = {}
    if cluster.tables is None:
        return result
    for path in sorted(path for path in cluster.tables.glob("deepep_*_1to8nodes_*.parquet") if _wanted(path.stem, only)):
        scores = []
        for table in read_measured(path):
            if table.kind == "deepep_normal":
                table.leave_out(table.rows["sms"] != 20, "other than 20 SMs for communication")
            rows, merged, floor = merge_repeats(table.kind, table.rows)
            predicted = np.full(len(rows["latency_s"]), np.nan)
            codes = np.full(len(predicted), int(Provenance.CALIBRATED), dtype=np.uint8)
            for nodes in np.unique(rows["node_num"]).tolist():
                mine = rows["node_num"] == nodes
                tables = _Without(cluster, "sglang")
                tables.held_nodes = int(nodes)
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
        result[f"{path.stem}, link model"] = _quantity(scores)
    for path in sorted(path for path in cluster.tables.glob("wideep_moe_eplb_*.parquet") if _wanted(path.stem, only)):
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
            result[f"{path.stem}, from rank load"] = _quantity([score])
    return result


# --- report -------------------------------------------------------------------------------------------------------


def _figures(errors: np.ndarray) -> dict[str, Any]:
    if not len(errors):
        return {"n": 0, "mean_error": None, "mean_abs_error": None, "median_abs_error": None, "p90_abs_error": None}
    size = np.abs(errors)
    return {
        "n": len(errors),
        "mean_error": float(errors.mean()),
        "mean_abs_error": float(size.mean()),
        "median_abs_error": float(np.median(size)),
        "p90_abs_error": float(np.quantile(size, 0.9)),
    }


def _shares(codes: np.ndarray) -> dict[str, float]:
    return {item.name.lower(): float((codes == item).mean()) for item in Provenance if (codes == item).any()}


def _merge(items: Iterable[Mapping[str, int]]) -> dict[str, int]:
    result: dict[str, int] = {}
    for item in items:
        for reason, count in item.items():
            if count:
                result[reason] = result.get(reason, 0) + count
    return dict(sorted(result.items()))


def _quantity(scores: list[Score]) -> dict[str, Any]:
    errors = np.concatenate([score.errors for score in scores])
    codes = np.concatenate([score.codes[np.isfinite(score.predicted)] for score in scores])
    floors = [score.floor for score in scores if score.floor is not None]
    methods = [score.method for score in scores if len(score.errors)]
    method = max(dict.fromkeys(methods), key=methods.count) if methods else "none"
    parts = {}
    if len(scores) > 1:
        parts = {score.table.part or score.table.kind: {**_figures(score.errors), "method": score.method} for score in scores}
    for score in scores:
        prefix = f"{score.table.part}, " if len(scores) > 1 and score.table.part else ""
        if len(score.axes) > 1:
            for axis, predicted in score.axes.items():
                known = np.isfinite(predicted)
                parts[f"{prefix}along {axis}" if score.method == "leave_one_out" else f"{prefix}{axis}"] = _figures(
                    predicted[known] / score.measured[known] - 1.0
                )
    return {
        **_figures(errors),
        "method": method,
        "rows_scored": len(errors),
        "rows_calibrated": sum(score.calibrated for score in scores),
        "rows_excluded": _merge(score.excluded for score in scores),
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


def _report(
    cluster: Cluster, model: MoEModel | None, source: Path | str | None, quantities: dict[str, dict[str, Any]], refused: dict[str, str]
) -> dict[str, Any]:
    scored = sum(item["rows_scored"] for item in quantities.values())
    classes: dict[str, float] = {}
    for item in quantities.values():
        for name, share in item["provenance"].items():
            classes[name] = classes.get(name, 0.0) + share * item["rows_scored"] / max(scored, 1)
    floors = [item["error_floor"] for item in quantities.values() if item["error_floor"] is not None]
    return {
        "schema": SCHEMA,
        "mode": "kernels",
        "hardware": cluster.name,
        "calibrated_from": cluster.calibrated_from,
        "model": model.name if model else None,
        "source": "package" if source is None else str(source),
        "quantities": quantities,
        "rows_scored": scored,
        "rows_calibrated": sum(item["rows_calibrated"] for item in quantities.values()),
        "rows_excluded": _merge(item["rows_excluded"] for item in quantities.values()),
        "error_floor": float(np.mean(floors)) if floors else None,
        "provenance": dict(sorted(classes.items())),
        "files_refused": refused,
    }
