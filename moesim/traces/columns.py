"""Fixed-width Parquet tables ↔ NumPy columns, bounded before they are decoded.

Every column is required (no nulls) and either a plain integer/float or a FixedSizeBinary of whole array rows.
zstd level 3, page checksums, row groups of at most 64 Ki rows and 64 MiB.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from moesim.errors import TraceError
from moesim.traces.layout import BadLayout, Spec, check_pages, read_footer, width_of

GROUP_ROWS = 1 << 16
GROUP_BYTES = 64 << 20
DICTIONARY_COLUMNS = ("step", "rank", "request", "position", "phase", "window", "layer", "stage", "map_epoch")


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
            self.groups = read_footer(file, spec, rows=rows)
            file.seek(0)
            self._parquet = pq.ParquetFile(pa.PythonFile(file, mode="r"), page_checksum_verification=True, memory_map=False, pre_buffer=False)
        except BadLayout as cause:
            raise TraceError(f"{place}: {cause}; copy or record it again") from None
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as cause:
            raise TraceError(f"{place}: is not a readable Parquet table ({_short(cause)}); copy or record it again") from None

    def read(self, index: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
        """Decode one row group into columns; a FixedSizeBinary becomes uint8 [rows, width]."""
        import pyarrow as pa

        group = self.groups[index]
        try:
            for chunk, kind in zip(group.chunks, self.spec.values(), strict=True):
                check_pages(self.file, chunk, kind, rows=group.rows)
            table = self._parquet.read_row_group(index, columns=names, use_threads=False)
            if table.num_rows != group.rows:
                raise BadLayout(f"decodes to {table.num_rows} rows instead of {group.rows}")
            return {name: self._array(table.column(name), self.spec[name]) for name in (names or self.spec)}
        except BadLayout as cause:
            raise TraceError(f"{self.place}: row group {index} {cause}; copy or record it again") from None
        except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as cause:
            raise TraceError(f"{self.place}: row group {index} is damaged ({_short(cause)}); copy or record it again") from None

    def _array(self, column: Any, kind: np.dtype[Any] | int) -> np.ndarray:
        parts = []
        for chunk in column.chunks:
            arrow = f"fixed_size_binary[{kind}]" if isinstance(kind, int) else kind.name
            if chunk.null_count or str(chunk.type) != arrow:
                raise BadLayout(f"decodes to {chunk.type} with {chunk.null_count} missing values instead of {arrow}")
            width = width_of(kind)
            flat = (
                np.frombuffer(chunk.buffers()[1], dtype=np.uint8, count=len(chunk) * width, offset=chunk.offset * width)
                if len(chunk)
                else np.empty(0, np.uint8)
            )
            parts.append(flat.reshape(len(chunk), width) if isinstance(kind, int) else flat.view(kind))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _short(cause: BaseException) -> str:
    return " ".join(str(cause).split())[:160] or type(cause).__name__
