"""How fast the disk under a folder is: a file is written, forced out and read back past the page cache where the system allows that."""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError

BLOCK = 1 << 20
PAGE = 4096
PAGES = 64
"""Single pages that are read for the latency."""


def measure_disk(out: Path, nbytes: int) -> dict[str, Any]:
    """Write and read back a file of `nbytes` beside `out`: bytes/s, latency, capacity, and `how` it was read; raise InputError if it cannot be written."""
    path = out.with_name(f".{out.name}.disk-{os.getpid()}")
    block = os.urandom(BLOCK)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            begin = time.perf_counter()
            for _ in range(nbytes // BLOCK):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
        handle, how = _opened(path)
        try:
            latency, read = _timed(handle, nbytes)
        finally:
            os.close(handle)
        capacity = os.statvfs(path).f_frsize * os.statvfs(path).f_blocks
    except OSError as cause:
        raise InputError(f"{out}: cannot be written ({cause.strerror or cause}); check the folder and the free space") from None
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return {"read_Bps": nbytes / read, "write_Bps": nbytes / written, "latency_s": latency, "capacity": float(capacity), "how": how}


def _opened(path: Path) -> tuple[int, str]:
    """Open a file for reading, as far from the page cache as the file system lets, and say how far that is."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(handle, [mmap.mmap(-1, PAGE)], 0)
                return handle, "past the page cache (O_DIRECT); the host of a virtual machine may still cache it"
            except OSError:
                os.close(handle)
    handle = os.open(path, os.O_RDONLY)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        return handle, "after dropping it from the page cache (posix_fadvise), a request that the system may ignore"
    return handle, "through the page cache, which may have held it"


def _timed(handle: int, nbytes: int) -> tuple[float, float]:
    """Return the median seconds of one page at a random place, and the seconds of the whole file in order."""
    page, block = mmap.mmap(-1, PAGE), mmap.mmap(-1, BLOCK)  # aligned to pages, as O_DIRECT wants
    samples = []
    for place in np.random.Generator(np.random.PCG64(0)).permutation(nbytes // PAGE)[:PAGES].tolist():
        begin = time.perf_counter()
        os.preadv(handle, [page], place * PAGE)
        samples.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for start in range(0, nbytes, BLOCK):
        os.preadv(handle, [block], start)
    return float(np.median(samples)), time.perf_counter() - begin
