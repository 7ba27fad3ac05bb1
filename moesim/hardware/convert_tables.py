"""Measured kernel and collective timings: CSV (plain or gzip) in, Parquet in SI units out.

Columns keep their source names unless they carry a unit: `latency` → `latency_s`, `X_us` → `X_s`, `X_bandwidth_gbps` → `X_Bps`.
`latency` is milliseconds, except in all-to-all tables by backend and phase, where the source states microseconds. Collective tables give
`message_size` in elements of the full buffer; `message_bytes` is added. Same input → same bytes with the same pyarrow.
Run: `python -m moesim.hardware.convert_tables SOURCE_FOLDER TARGET_FOLDER --licence TEXT --origin TEXT`; with `--facts key=value,...` the files are
those of other tools (`moesim.hardware.measured`), and one table per operator comes out, `<kind>_<tool>`, all files of a kind joined.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from moesim.errors import HardwareError, describe
from moesim.files import write_atomic
from moesim.hardware.table_files import read_inflated
from moesim.hardware.table_layouts import ELEMENT_BYTES, Layout, recognise

AIC_ORIGIN = "Python package aiconfigurator-core 0.12.0 (repository ai-dynamo/aiconfigurator, src/aiconfigurator_core/systems)"
AIC_LICENCE = "Apache-2.0, (c) NVIDIA CORPORATION & AFFILIATES"


REMARKS = {
    "moe_sglang0.5.14": "At moe_ep_size > 1 the balanced rows do not fall as 1/EP and are slower than the power_law rows: use moe_ep_size = 1 for cost models",
    "wideep_moe_generation_sglang0.5.10": "num_tokens is the total over all EP ranks",
    "wideep_moe_context_sglang0.5.10": "num_tokens is the total over all EP ranks, all of them rows of the timed rank, which has "
    "num_tokens * topk / moe_ep_size choices: so read, time is one line in choices and rows at every moe_ep_size",
    "mla_context_sglang0.5.14": "Some keys occur twice: two runs",
    "mla_generation_sglang0.5.14": "Some keys occur twice: two runs",
}


def read_csv(path: Path) -> dict[str, list[str]]:
    """Return the columns of a CSV file (gzip if the name ends in `.gz`) as lists of text.

    Raises HardwareError if the file is too big, damaged, ragged, empty, or has a column twice.
    """
    data = read_inflated(path)
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as cause:
        raise HardwareError(f"{path}: is not a CSV file in UTF-8 ({cause})") from None
    if len(rows) < 2 or not rows[0]:
        raise HardwareError(f"{path}: has no rows; a table is one header line and at least one row")
    header, body = rows[0], rows[1:]
    if len(set(header)) != len(header):
        raise HardwareError(describe(str(path), "header", header, "must name every column once"))
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise HardwareError(describe(str(path), f"line {number}", f"{len(row)} cells", f"must have {len(header)} cells"))
    return {name: [row[index] for row in body] for index, name in enumerate(header)}


def to_si(columns: Mapping[str, list[str]], layout: Layout | None, place: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the columns as arrays in SI units, and the unit of each column that has one.

    Raises HardwareError if a time or bandwidth is not a number, is not finite, or is negative.
    """
    arrays: dict[str, np.ndarray] = {}
    units: dict[str, str] = {}
    for name, cells in columns.items():
        if name == "latency":
            new, unit, factor = "latency_s", "s", layout.latency_unit_s if layout else 1e-3
        elif name.endswith("_us"):
            new, unit, factor = name[:-3] + "_s", "s", 1e-6
        elif name.endswith("_bandwidth_gbps"):
            new, unit, factor = name[: -len("_bandwidth_gbps")] + "_Bps", "B/s", 1e9
        else:
            arrays[name] = _plain(cells)
            continue
        try:
            values = np.array([float(cell) for cell in cells])
        except ValueError as cause:
            raise HardwareError(f"{place}: {name} must hold numbers ({cause})") from None
        if not np.isfinite(values).all() or (values < 0).any():
            raise HardwareError(describe(place, name, values[~(values >= 0) | ~np.isfinite(values)][0], "must be finite and >= 0"))
        # Dividing by an exact power of ten rounds once; multiplying by 1e-3 would round twice.
        arrays[new], units[new] = (values * factor if factor >= 1 else values / round(1 / factor)), unit
    if "message_size" in arrays:
        dtype_column = next((name for name in ("nccl_dtype", "allreduce_dtype") if name in arrays), None)
        units["message_size"] = "elements"
        if dtype_column is not None:
            unknown = sorted(set(arrays[dtype_column]) - set(ELEMENT_BYTES))
            if unknown:
                raise HardwareError(describe(place, dtype_column, unknown[0], f"must be one of {sorted(ELEMENT_BYTES)}"))
            arrays["message_bytes"] = arrays["message_size"] * np.array([ELEMENT_BYTES[name] for name in arrays[dtype_column]], dtype=np.int64)
            units["message_bytes"] = "B"
    return arrays, units


def _plain(cells: list[str]) -> np.ndarray:
    if all(re.fullmatch(r"[+-]?\d{1,18}", cell) for cell in cells):
        return np.array([int(cell) for cell in cells], dtype=np.int64)
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        return np.array(cells, dtype=object)


def write_table(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as a checksummed zstd Parquet file; text becomes a sorted dictionary."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    fields, columns = [], []
    for name, array in arrays.items():
        if array.dtype == object:
            names, codes = np.unique(array.astype(str), return_inverse=True)
            column: pa.Array = pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int16)), pa.array(names.tolist(), pa.string()))
        else:
            column = pa.array(array)
        columns.append(column)
        fields.append(pa.field(name, column.type, nullable=False))
    table = pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=dict(metadata)))
    measured = [name for name in arrays if name.endswith(("_s", "_Bps"))]

    def write(target: Path) -> None:
        pq.write_table(
            table,
            target,
            compression="zstd",
            compression_level=19,
            write_page_checksum=True,
            row_group_size=1 << 20,
            data_page_version="2.0",
            use_dictionary=[name for name in arrays if name not in measured],
            column_encoding=dict.fromkeys(measured, "BYTE_STREAM_SPLIT"),
        )

    write_atomic(path, write)


def convert_folder(source: Path, target: Path, *, origin: str = AIC_ORIGIN, licence: str = AIC_LICENCE) -> tuple[str, ...]:
    """Convert every `*.csv` and `*.csv.gz` of `source` to `target/<stem>.parquet`; return the stems.

    Raises HardwareError if `source` is not a folder or holds no CSV file.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise HardwareError(f"{source}: is not a folder; give the folder that holds the CSV files")
    paths = sorted(path for path in source.iterdir() if path.name.endswith((".csv", ".csv.gz")))
    if not paths:
        raise HardwareError(f"{source}: holds no *.csv or *.csv.gz file")
    stems = []
    for path in paths:
        stem = path.name.removesuffix(".gz").removesuffix(".csv")
        columns = read_csv(path)
        layout = recognise(list(columns))
        arrays, units = to_si(columns, layout, str(path))
        version = re.search(r"(?:sglang|trtllm|vllm|nccl)\d[\w.]*$", stem)
        description = (layout.description if layout else "Measured timings") + (f". {REMARKS[stem]}" if stem in REMARKS else "")
        metadata = {
            "kind": layout.kind if layout else "unknown",
            "description": description,
            "source": origin,
            "licence": licence,
            "version": version.group() if version else "",
            "units": json.dumps(units, sort_keys=True),
        }
        write_table(target / f"{stem}.parquet", arrays, metadata)
        stems.append(stem)
    return tuple(stems)


KINDS = {
    "gemm": "Dense matrix product [m,k]·[k,n] on one GPU",
    "grouped_gemm": "Up and down projection of all experts of one GPU (llmservingsim: the whole fused layer); assignments is all tokens of all experts, "
    "active the experts that have any, slots those on the GPU; inter_size is per tensor-parallel rank",
    "attn_context": "MHA or GQA kernel, one layer, one GPU; isl new tokens over prefix cached ones",
    "attn_generation": "MHA or GQA kernel, one layer, one GPU; step is the KV length before the call",
    "attn_mixed": "MHA or GQA kernel of one batch with one prefill chunk and n_decode decoding sequences",
    "mla_expanded": "MLA attention kernel in its expanded form, one layer, one GPU",
    "mla_generation": "MLA attention kernel in its absorbed form, one layer, one GPU; step is the KV length before the call",
    "collective": "NCCL collectives and messages (send_recv); message_bytes is the full buffer",
    "stream": "Element-wise operators; moved_bytes is what they read and write",
    "sampler": "Sampling of the next token of every sequence from its logits",
}
"""Tables that the readers of other tools' files give, and their description."""


def convert_measured(
    paths: Sequence[Path], target: Path, *, facts: Mapping[str, float], origin: str, licence: str, parts: Mapping[str, Sequence[str]] | None = None
) -> tuple[str, ...]:
    """Convert files of other tools to canonical tables `target/<kind>_<tool>.parquet`; return the stems.

    facts: sizes of the model that was measured. parts: kind → the parts to keep (default: all).
    Raises HardwareError if a file is no table of a known tool.
    """
    from moesim.hardware.measured import read_measured

    found: dict[str, list[dict[str, np.ndarray]]] = {}
    for path in paths:
        for table in read_measured(path, facts):
            wanted = (parts or {}).get(table.kind)
            if table.kind in KINDS and len(table.rows["latency_s"]) and (wanted is None or table.part in wanted):
                found.setdefault(f"{table.kind}_{table.source}", []).append(table.rows)
    for stem, tables in found.items():
        joined = {name: np.concatenate([rows[name] for rows in tables]) for name in tables[0]}
        whole = {
            name: values.astype(np.int64) if values.dtype.kind == "f" and not name.endswith("_s") and bool((values == np.rint(values)).all()) else values
            for name, values in joined.items()
        }
        order = np.lexsort([np.unique(values.astype(str), return_inverse=True)[1] if values.dtype == object else values for values in reversed(whole.values())])
        kind, tool = stem.rsplit("_", 1)
        metadata = {"kind": kind, "description": KINDS[kind], "source": origin, "licence": licence, "version": tool}
        metadata["units"] = json.dumps({"latency_s": "s"} | ({"moved_bytes": "B"} if "moved_bytes" in whole else {}), sort_keys=True)
        write_table(target / f"{stem}.parquet", {name: values[order] for name, values in whole.items()}, metadata)
    return tuple(sorted(found))


def main(arguments: Sequence[str] | None = None) -> None:
    """Convert the folder named on the command line."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m moesim.hardware.convert_tables", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--origin", default=AIC_ORIGIN, help="where the numbers come from")
    parser.add_argument("--licence", default=AIC_LICENCE)
    parser.add_argument("--facts", help="key=value,... of the measured model; the files are those of other tools")
    given = parser.parse_args(arguments)
    if given.facts is None:
        stems = convert_folder(given.source, given.target, origin=given.origin, licence=given.licence)
    else:
        facts = {key: float(value) for key, _, value in (item.partition("=") for item in given.facts.split(",") if item)}
        paths = sorted(path for path in given.source.iterdir() if path.name.endswith((".csv", ".csv.gz")))
        stems = convert_measured(paths, given.target, facts=facts, origin=given.origin, licence=given.licence)
    for stem in stems:
        print(stem)


if __name__ == "__main__":
    main()
