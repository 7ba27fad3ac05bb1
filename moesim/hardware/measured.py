"""Measured tables of other tools: any file in, canonical rows in SI units out, recognised by its columns.

A file is CSV (plain, gzip, `.txt`) or Parquet of aiconfigurator, InferSim, Frontier, LLMServingSim or Vidur; one file may time several operators
and then gives several `Measured`. Units come from column names (`_us`, `_gbps`, `time_us`; `time_stats.*` and a bare `latency` are milliseconds); a foreign
spelling of the time column is understood if it states its unit (`duration_ns`, `Latency (us)`).
What the columns leave open (head shape, layer sizes) comes from the file's name or from `facts` of a model. Canonical columns by kind:
  gemm          gemm_dtype m n k                          grouped_gemm  moe_dtype hidden_size inter_size slots active assignments
  attn_*        num_heads num_key_value_heads head_dim window_size kv_cache_dtype attn_dtype batch_size isl|step, prefix
  mla_*         num_heads kv_cache_dtype batch_size isl|step       stream   operator tokens moved_bytes        sampler  sequences vocab
  collective    op_name num_gpus num_nodes message_bytes      attn_mixed   prefill_chunk kv_prefill n_decode kv_decode and the head shape
and, as the source has them, the tables of `table_layouts.LAYOUTS`. Every one has `latency_s`. A row that cannot be read is left out and counted.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moesim.errors import HardwareError, describe
from moesim.hardware.measured_columns import Columns, Facts, Measured
from moesim.hardware.measured_sources import READERS
from moesim.hardware.table_files import read_inflated

MAX_TABLE_ROWS = 2_000_000
_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_TIME = re.compile(r"^(?:latency|time|duration|elapsed)(?:_time)?[ _]*[(\[]?(ns|us|µs|ms|s)[)\]]?$", re.IGNORECASE)
"""A time column that states its unit."""
MAX_COLUMNS = 512
MAX_SIZE = 1e13
POSITIVE = frozenset(
    (
        "m",
        "n",
        "k",
        "hidden_size",
        "inter_size",
        "slots",
        "active",
        "assignments",
        "num_heads",
        "num_key_value_heads",
        "head_dim",
        "batch_size",
        "isl",
        "num_tokens",
        "num_token",
        "num_experts",
        "topk",
        "num_topk",
        "node_num",
        "num_gpus",
        "num_nodes",
        "message_bytes",
        "tokens",
        "sequences",
        "vocab",
        "moved_bytes",
        "moe_tp_size",
        "moe_ep_size",
        "num_slots",
        "rank0_num_tokens",
    )
)
"""Columns that must hold numbers from 1 on."""


def read_measured(path: Path, facts: Facts | None = None) -> tuple[Measured, ...]:
    """Return the tables of one file.

    facts: sizes of the model that was measured (see `moesim.api.validation_kernels.facts_of`), for sources that do not state them.
    Raises HardwareError naming the file and the columns that were expected if the header is of no known source, or the file is no table.
    """
    path = Path(path)
    columns, ragged = _read(path)
    for known in (columns, *_respelt(columns)):
        reader = next((one for one, needed in READERS if any(all(_has(known, name) for name in names) for names in needed)), None)
        if reader is not None:
            columns = known
            try:
                with np.errstate(all="ignore"):  # cells that are no sizes give rows that `_finish` drops
                    tables = reader(path, columns, dict(facts or {}))
            except (TypeError, ArithmeticError):  # arithmetic on cells of text
                raise HardwareError(f"{path}: one of {', '.join(columns)} holds text where sizes or times are expected; check the columns") from None
            for table in tables:
                _finish(table, ragged)
            return tuple(tables)
    headers = [names for _, needed in READERS for names in needed]
    nearest = sorted(headers, key=lambda names: (-sum(_has(columns, name) for name in names) / len(names), len(names), names))[:3]
    hints = [f"{' + '.join(names)} (lacks {', '.join(name for name in names if not _has(columns, name))})" for names in nearest]
    raise HardwareError(
        f"{path}: columns {', '.join(list(columns)[:12])} belong to no known table; expected columns, nearest first: {'; '.join(hints)}; "
        "a time may also be called latency, time, duration or elapsed with its unit behind, like latency_ms"
    )


def _respelt(columns: Columns) -> Iterator[Columns]:
    """Yield the columns with their one time column under the names that sources have for it, in the unit that goes with each."""
    found = [(name, match.group(1).lower()) for name in columns if (match := _TIME.match(name))]
    if len(found) == 1 and columns[found[0][0]].dtype.kind == "f":
        ((mine, unit),) = found
        for name, theirs in (("latency_s", "s"), ("latency_us", "us"), ("time_us", "us")):
            yield {**{key: values for key, values in columns.items() if key != mine}, name: columns[mine] * (_UNITS[unit] / _UNITS[theirs])}


def _has(columns: Columns, name: str) -> bool:
    return any(fully.startswith(name[:-1]) for fully in columns) if name.endswith("*") else name in columns


def _finish(table: Measured, ragged: int) -> None:
    table.rows = {name: values.astype(np.float64) if values.dtype.kind in "iub" else values for name, values in table.rows.items()}
    if ragged:
        table.excluded["line has too few or too many cells"] = ragged
    seconds = table.rows["latency_s"]
    absent = np.isnan(seconds)
    table.leave_out(absent, "time is missing or not a number")
    seconds = table.rows["latency_s"]
    table.leave_out(~np.isfinite(seconds) | (seconds <= 0), "time is not positive and finite")
    bad = np.zeros(len(table.rows["latency_s"]), dtype=bool)
    zero = bad.copy()
    for name, values in table.rows.items():
        if values.dtype.kind == "f":
            bad |= ~np.isfinite(values) | (values < 0) | (values > MAX_SIZE)
            zero |= (values < 1) & (name in POSITIVE)
        elif name in POSITIVE:
            bad |= True
    table.leave_out(bad, "a size is missing, negative, too large or not a number")
    table.leave_out(zero[~bad], "a size is below 1")


# --- reading ------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[Columns, int]:
    if path.suffix == ".parquet":
        return _read_parquet(path), 0
    data = read_inflated(path)
    try:
        lines = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(lines, [])]
        body, ragged = [], 0
        for row in lines:
            if len(row) == len(header):
                body.append(row)
            elif row:
                ragged += 1
            if len(body) > MAX_TABLE_ROWS:
                raise HardwareError(describe(str(path), "rows", f"> {MAX_TABLE_ROWS}", f"must be <= {MAX_TABLE_ROWS}"))
    except (UnicodeDecodeError, csv.Error) as cause:
        raise HardwareError(f"{path}: is not a CSV file in UTF-8 ({cause})") from None
    if not header or not body:
        raise HardwareError(f"{path}: has no rows; a table is one header line and at least one row of as many cells")
    if len(set(header)) != len(header) or len(header) > MAX_COLUMNS:
        raise HardwareError(describe(str(path), "header", ", ".join(header), f"must name at most {MAX_COLUMNS} columns, every one once"))
    return {name: _parse([row[index] for row in body]) for index, name in enumerate(header)}, ragged


def _parse(cells: list[str]) -> np.ndarray:
    """Return float64 if most cells are numbers (others NaN), else text."""
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        pass  # some cells are empty or text
    numbers = np.full(len(cells), np.nan)
    good = 0
    for index, cell in enumerate(cells):
        try:
            numbers[index] = float(cell)
        except ValueError:
            good += not cell.strip()
            continue
        good += 1
    return numbers if good * 2 > len(cells) and not np.isnan(numbers).all() else np.array(cells, dtype=object)


def _read_parquet(path: Path) -> Columns:
    from moesim.hardware.tables import read_table

    if not path.is_file():
        raise HardwareError(f"{path}: does not exist; check the path")
    rows = read_table(path.parent, path.name.removesuffix(".parquet"))
    if len(rows) > MAX_COLUMNS or not rows or not len(next(iter(rows.values()))):
        raise HardwareError(f"{path}: has no rows, or more than {MAX_COLUMNS} columns")
    return {name: values.astype(np.float64) if values.dtype.kind in "iuf" else values for name, values in rows.items()}
