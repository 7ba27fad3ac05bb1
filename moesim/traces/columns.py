"""Fixed-width Parquet tables ↔ NumPy columns, bounded before they are decoded.

Every column is required (no nulls) and either a plain integer/float or a FixedSizeBinary of whole array rows.
zstd level 3, page checksums, row groups of at most 64 Ki rows and 64 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.pages import BadPage, check_pages

GROUP_ROWS = 1 << 16
GROUP_BYTES = 64 << 20
MAX_GROUP_ROWS = 1 << 20
MAX_GROUP_BYTES = 192 << 20
"""A reader refuses a row group that decodes to more."""
DICTIONARY_COLUMNS = ("step", "rank", "request", "position", "phase", "window", "layer", "stage", "map_epoch")
_ENCODINGS = {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY", "BIT_PACKED"}
_PHYSICAL = {1: "INT32", 2: "INT32", 4: "INT32", 8: "INT64"}

Spec = Mapping[str, "np.dtype[Any] | int"]
"""Column → NumPy dtype, or the bytes of a FixedSizeBinary."""


def width_of(kind: np.dtype[Any] | int) -> int:
    """Return the bytes of one value."""
    return kind if isinstance(kind, int) else kind.itemsize


def group_rows(spec: Spec) -> int:
    """Return how many rows of a table make a row group."""
    return max(1, min(GROUP_ROWS, GROUP_BYTES // sum(width_of(kind) for kind in spec.values())))


def schema_of(spec: Spec) -> Any:
    """Return the Arrow schema of a table."""
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.binary(kind) if isinstance(kind, int) else pa.from_numpy_dtype(kind), nullable=False) for name, kind in spec.items()])


def open_writer(path: Any, spec: Spec) -> Any:
    """Return a ParquetWriter for a table."""
    import pyarrow.parquet as pq

    names = [name for name in spec if name in DICTIONARY_COLUMNS]
    return pq.ParquetWriter(
        path,
        schema_of(spec),
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=names,
        write_statistics=[name for name in spec if name == "step"],
        write_page_checksum=True,
        store_schema=False,
        data_page_size=1 << 20,
        dictionary_pagesize_limit=1 << 18,
    )


def to_table(spec: Spec, columns: Mapping[str, np.ndarray]) -> Any:
    """Return an Arrow table over the arrays, without a copy where they are contiguous."""
    import pyarrow as pa

    arrays = []
    for name, kind in spec.items():
        values = np.ascontiguousarray(columns[name])
        if isinstance(kind, int):
            arrays.append(
                pa.FixedSizeBinaryArray.from_buffers(pa.binary(kind), len(values), [None, pa.py_buffer(values.reshape(len(values), -1).view(np.uint8).data)])
            )
        else:
            arrays.append(pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(values), [None, pa.py_buffer(values.astype(kind, copy=False).data)]))
    return pa.Table.from_arrays(arrays, schema=schema_of(spec))


def write_table(path: Any, spec: Spec, columns: Mapping[str, np.ndarray]) -> None:
    """Write a whole table."""
    with open_writer(path, spec) as writer:
        writer.write_table(to_table(spec, columns), row_group_size=group_rows(spec))


class TableReader:
    """An opened Parquet file whose layout has been checked against a table's columns."""

    def __init__(self, file: BinaryIO, spec: Spec, *, rows: int, place: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.file, self.spec, self.place = file, spec, place
        try:
            self._parquet = pq.ParquetFile(
                pa.PythonFile(file, mode="r"),
                page_checksum_verification=True,
                memory_map=False,
                pre_buffer=False,
                thrift_string_size_limit=16 << 20,
                thrift_container_size_limit=1 << 20,
            )
            self._metadata = self._parquet.metadata
            self._check(rows)
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as cause:
            raise TraceError(f"{place}: is not a readable Parquet table ({' '.join(str(cause).split())[:160]}); copy or record it again") from None

    def _check(self, rows: int) -> None:
        metadata, place = self._metadata, self.place
        remedy = "the file does not match its manifest; copy or record it again"
        if metadata.num_rows != rows:
            raise TraceError(describe(place, "rows", metadata.num_rows, f"must be {rows} as in the manifest", remedy))
        if metadata.num_row_groups > 1 + rows:
            raise TraceError(describe(place, "row groups", metadata.num_row_groups, f"must be <= {rows}", remedy))
        schema = self._parquet.schema
        found = [schema.column(i) for i in range(len(schema))]
        if [column.path for column in found] != list(self.spec):
            raise TraceError(describe(place, "columns", [column.path for column in found][:12], f"must be {list(self.spec)}", remedy))
        for column, (name, kind) in zip(found, self.spec.items(), strict=True):
            if isinstance(kind, int):
                fits = column.physical_type == "FIXED_LEN_BYTE_ARRAY" and column.length == kind
            else:
                fits = column.physical_type == _PHYSICAL[kind.itemsize]
            if not fits or column.max_definition_level or column.max_repetition_level:
                raise TraceError(
                    describe(
                        place, f"column {name}", f"{column.physical_type}({column.length})", f"must be a required column of {width_of(kind)} B values", remedy
                    )
                )
        self.arrow_schema = schema.to_arrow_schema()
        for name, kind in self.spec.items():
            if not isinstance(kind, int) and str(self.arrow_schema.field(name).type) != kind.name:
                raise TraceError(describe(place, f"column {name}", str(self.arrow_schema.field(name).type), f"must be {kind.name}", remedy))
        row_bytes = sum(width_of(kind) for kind in self.spec.values())
        self.rows_of_group = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if sum(self.rows_of_group) != rows or any(not 0 < n <= MAX_GROUP_ROWS or n * row_bytes > MAX_GROUP_BYTES for n in self.rows_of_group):
            raise TraceError(
                describe(
                    place,
                    "row group",
                    max(self.rows_of_group, default=0),
                    f"must have 1..{min(MAX_GROUP_ROWS, MAX_GROUP_BYTES // row_bytes)} rows",
                    "write smaller row groups",
                )
            )

    def statistics(self, group: int, column: int) -> tuple[int, int] | None:
        """Return the smallest and largest value that the footer claims, if any."""
        try:
            statistics = self._metadata.row_group(group).column(column).statistics
            if statistics is None or not statistics.has_min_max:
                return None
            return int(statistics.min), int(statistics.max)
        except (ValueError, OverflowError, TypeError, AttributeError):
            return None

    def read(self, group: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
        """Decode one row group into columns; a FixedSizeBinary becomes uint8 [rows, width]."""
        import pyarrow as pa

        rows = self.rows_of_group[group]
        try:
            self._check_chunks(group, rows)
            table = self._parquet.read_row_group(group, columns=names, use_threads=False)
            if table.num_rows != rows:
                raise TraceError(describe(self.place, f"row group {group}", table.num_rows, f"must hold {rows} rows", "copy or record it again"))
            return {name: self._array(table.column(name), self.spec[name], rows) for name in (names or self.spec)}
        except BadPage as cause:
            raise TraceError(f"{self.place}: row group {group} {cause}; copy or record it again") from None
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as cause:
            raise TraceError(f"{self.place}: row group {group} is damaged ({' '.join(str(cause).split())[:160]}); copy or record it again") from None

    def _check_chunks(self, group: int, rows: int) -> None:
        chunks = self._metadata.row_group(group)
        for index, (name, kind) in enumerate(self.spec.items()):
            chunk = chunks.column(index)
            if chunk.compression not in ("ZSTD", "UNCOMPRESSED") or not set(chunk.encodings) <= _ENCODINGS or chunk.num_values != rows or chunk.file_path:
                raise TraceError(
                    describe(
                        self.place,
                        f"column {name}",
                        f"{chunk.compression} {chunk.encodings} {chunk.num_values} values",
                        f"must be zstd with {rows} values",
                        "record it again",
                    )
                )
            start = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                start = min(start, chunk.dictionary_page_offset)
            if start < 4 or chunk.total_compressed_size < 0:
                raise BadPage("lies outside the file")
            # a dictionary column decodes through 4-byte indices
            check_pages(self.file, start=start, length=chunk.total_compressed_size, rows=rows, width=max(width_of(kind), 4))

    def _array(self, column: Any, kind: np.dtype[Any] | int, rows: int) -> np.ndarray:
        parts = []
        for chunk in column.chunks:
            if chunk.null_count:
                raise ValueError("a value is missing")
            width = width_of(kind)
            flat = (
                np.frombuffer(chunk.buffers()[1], dtype=np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
                if len(chunk)
                else np.empty(0, np.uint8)
            )
            parts.append(flat.reshape(len(chunk), width) if isinstance(kind, int) else flat.view(kind))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
