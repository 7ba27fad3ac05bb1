"""Validate the cost tables: measured kernel times against predictions, table by table.

A table that the hardware owns (the same rows) is scored leave-one-out; any other is predicted from what the hardware has: its own tables, or its
donor's, transferred. Rows are merged and left out by their inputs only, never by how well they are predicted; everything left out is counted with its
reason. Errors are relative, predicted / measured − 1. Quantities are named by the table's file stem.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moesim.api.kernel_scores import merge_counts, quantity_of, score_models, score_table
from moesim.costs.holdout import GRIDS, codes_of
from moesim.costs.tables import kind_of
from moesim.errors import HardwareError, InputError, MoesimError, describe
from moesim.files import read_yaml
from moesim.hardware import Cluster, load_cluster
from moesim.hardware.load import PACKAGE
from moesim.hardware.measured import read_measured
from moesim.hardware.measured_columns import SUFFIXES, Measured, stem_of
from moesim.model import MoEModel, load_model
from moesim.model.moe_model import DTYPE_BYTES

SCHEMA = "moesim.validate/1"
MAX_FILES = 2000
OWNED = 0.5
"""Share of a file's rows that must be rows of the hardware's own table for it to own the file."""
PUBLISHED = PACKAGE / "published"


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
            scores = [score_table(table, cluster, owned, backend, strict) for table in tables]
        except MoesimError as error:
            if alone:
                raise
            refused[name] = str(error)
            continue
        quantities[name] = quantity_of(scores)
        if own and cluster.calibrated_from is not None and any(score.method == "leave_one_out" for score in scores):
            # The same rows without the device's own tables: what the donor alone would have predicted.
            bare = replace(cluster, tables=None)
            quantities[name]["transfer"] = quantity_of([score_table(table, bare, None, backend, False) for table in read_measured(path)])
    if not quantities:
        raise HardwareError(next(iter(refused.values())) if refused else f"{source}: holds no table ({', '.join(SUFFIXES)})")
    if own:
        quantities |= score_models(cluster, lambda name: _wanted(name, only))
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
    "collective": ("nccl", "collective"),
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


# --- report -------------------------------------------------------------------------------------------------------


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
        "rows_excluded": merge_counts(item["rows_excluded"] for item in quantities.values()),
        "error_floor": float(np.mean(floors)) if floors else None,
        "provenance": dict(sorted(classes.items())),
        "files_refused": refused,
    }
