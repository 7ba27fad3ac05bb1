"""Bytes of a table file, plain or gzip, of bounded size."""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

from moesim.errors import HardwareError, describe
from moesim.files import read_bytes

MAX_CSV_BYTES = 512 * 2**20


def read_inflated(path: Path) -> bytes:
    """Return the content of `path`, unpacked if its name ends in `.gz`. Raises HardwareError if it is too big or damaged."""
    data = read_bytes(path, limit=MAX_CSV_BYTES, error=HardwareError)
    if path.suffix == ".gz":
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
                data = stream.read(MAX_CSV_BYTES + 1)
        except (OSError, EOFError, zlib.error) as cause:
            raise HardwareError(f"{path}: is not a gzip file ({cause}); copy it again") from None
        if len(data) > MAX_CSV_BYTES:
            raise HardwareError(describe(str(path), "decompressed size", f"> {MAX_CSV_BYTES} B", f"must be <= {MAX_CSV_BYTES} B"))
    return data
