"""A fast 128-bit digest of weights: it travels with every expert and decides whether two copies are equal.

Two lanes over 64-bit words w with fixed odd 64-bit keys k: Σ k·w and Σ k'·(w xor w>>32), per block of 32 KiB, the blocks
chained by an odd multiplier. An odd key makes any change of one word visible in the first lane; the second breaks
up pairs of changed top bits. Not cryptographic: it finds damage and mix-ups, not attacks. About 2.5 GB/s on one core.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

BLOCK_WORDS = 4096
DIGEST_BYTES = 16
_MASK = (1 << 64) - 1
_CHAIN = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)


@lru_cache(maxsize=1)
def _keys() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(0x6D6F6573))
    first, second = (generator.integers(0, 2**64, size=BLOCK_WORDS, dtype=np.uint64) | np.uint64(1) for _ in range(2))
    return first, second


def _finish(value: int) -> int:
    """Mix a 64-bit value one to one, so that a change anywhere reaches every bit."""
    value = ((value ^ (value >> 33)) * 0xFF51AFD7ED558CCD) & _MASK
    value = ((value ^ (value >> 33)) * 0xC4CEB9FE1A85EC53) & _MASK
    return value ^ (value >> 33)


def digest(data: np.ndarray) -> bytes:
    """Return 16 bytes that stand for the bytes of `data`, a contiguous array of any dtype."""
    raw = data.reshape(-1).view(np.uint8)
    if raw.size % 8:
        raw = np.concatenate([raw, np.zeros(8 - raw.size % 8, np.uint8)])
    words = raw.view(np.uint64)
    first, second = _keys()
    lanes = [data.nbytes, data.nbytes ^ _MASK]
    for start in range(0, words.size, BLOCK_WORDS):
        block = words[start : start + BLOCK_WORDS]
        sums = int(np.dot(block, first[: block.size])), int(np.dot(block ^ (block >> np.uint64(32)), second[: block.size]))
        lanes = [(lane * factor + value) & _MASK for lane, factor, value in zip(lanes, _CHAIN, sums, strict=True)]
    return b"".join(_finish(lane).to_bytes(8, "little") for lane in lanes)
