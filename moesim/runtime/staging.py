"""Where experts are on their way: the stream of bytes between two ranks, the chunks of it under way, and the memory that they arrive in.

Memory is touched before anything arrives and kept for the next migration, so that it is the network that sets the pace and not the
system's first touch of every page.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moesim.runtime.digest import DIGEST_BYTES
from moesim.runtime.expert_rows import Reader
from moesim.runtime.moves import CHUNK_BYTES, Chunk, Move, cut

KEPT_BYTES = 256 << 20
"""Most memory that is kept between migrations; what is larger goes back, because the model needs it more often."""
PAGE_BYTES = 4096


class StagingMemory:
    """Memory for one migration after the other."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._spare: list[np.ndarray] = []

    def block(self, size: int) -> np.ndarray:
        """Return `size` bytes in which experts stay until the migration ends."""
        if size > self._block.size:
            self._block = np.empty(0, np.uint8)  # before more is asked for
            self._block = np.empty(size, np.uint8)
            self._block[::PAGE_BYTES] = 0
        return self._block[:size]

    def take(self) -> np.ndarray:
        """Return CHUNK_BYTES to send from."""
        return self._spare.pop() if self._spare else np.empty(CHUNK_BYTES, np.uint8)

    def give(self, spare: np.ndarray) -> None:
        """Take back what has been sent from; the last one is the next to be used."""
        self._spare.append(spare)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the next migration need not ask for."""
        return self._block.size

    def trim(self) -> StagingMemory:
        """Give back what is not worth keeping until the next migration."""
        if self._block.size > KEPT_BYTES:
            self._block = np.empty(0, np.uint8)
        return self


@dataclass(frozen=True, slots=True)
class Posted:
    """A chunk under way."""

    chunk: Chunk
    work: Any
    tensor: torch.Tensor
    """What is sent, or where it arrives; alive until the end."""
    spare: np.ndarray | None
    """A buffer to use again."""


@dataclass(slots=True)
class Stream:
    """The experts that go from one rank to another, one after the other."""

    moves: list[Move]
    offsets: list[int]
    """First byte of every expert, and the end."""
    pieces: list[tuple[int, int]]
    """Where it is cut."""
    digests: np.ndarray
    """uint8, of all its experts."""
    memory: np.ndarray
    """uint8, where they arrive; empty at the sender."""

    @classmethod
    def of(cls, moves: list[Move], readers: Mapping[int, Reader]) -> Stream:
        """Lay out the experts of `moves`."""
        offsets = list(accumulate((readers[move.layer].expert_bytes for move in moves), initial=0))
        pieces = cut(size for move in moves for size in readers[move.layer].row_bytes)
        return cls(moves, offsets, pieces, np.empty(len(moves) * DIGEST_BYTES, np.uint8), np.empty(0, np.uint8))

    @property
    def size(self) -> int:
        """Bytes of all experts."""
        return self.offsets[-1]

    def between(self, begin: int, end: int) -> Iterator[tuple[Move, int]]:
        """Yield the experts that have bytes in [begin, end), and where they begin."""
        for index in range(bisect_right(self.offsets, begin) - 1, len(self.moves)):
            if self.offsets[index] >= end:
                return
            yield self.moves[index], self.offsets[index]

    def expert(self, index: int) -> np.ndarray:
        """Return where expert `index` arrives."""
        return self.memory[self.offsets[index] : self.offsets[index + 1]]

    def told(self, index: int) -> bytes:
        """Return the digest that came with expert `index`."""
        return self.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES].tobytes()


def free_memory() -> int:
    """Return the bytes that this host can still hand out."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
