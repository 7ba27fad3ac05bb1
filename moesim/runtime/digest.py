"""A fast 128-bit digest of weights: it travels with every expert and decides whether two copies are equal.

Two lanes over 64-bit words w with fixed odd 64-bit keys k: Σ k·w and Σ k'·(w xor w>>32), per block of 32 KiB, the blocks
chained by an odd multiplier. An odd key makes any change of one word visible in the first lane; the second breaks
up pairs of changed top bits. Larger arrays are folded first, 1 MiB at a time: the sums of its columns as a table of 2,048
words a row, and their xor as one of 2,053. Two words of 1 MiB never share a column in both tables, so one or two flipped
bits always show. Not cryptographic: it finds damage and mix-ups, not attacks. About 10 GB/s on one core (numpy's own copy: 20).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

BLOCK_WORDS = 4096
SEGMENT_WORDS = 1 << 17
"""Words folded together; less than 2,048 · 2,053."""
WIDTHS = (2048, 2053)
FOLD_FROM = 16 * sum(WIDTHS)
"""Words from which folding pays."""
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


def _columns(words: np.ndarray, width: int, add: np.ufunc) -> np.ndarray:
    """Return the columns' totals of `words` as a table of `width` columns, the last row cut short."""
    whole = words.size // width * width
    totals = add.reduce(words[:whole].reshape(-1, width), axis=0)
    rest = words[whole:]
    add(totals[: rest.size], rest, out=totals[: rest.size])
    return totals


def _fold(words: np.ndarray) -> np.ndarray:
    """Return the two tables' columns of all segments, chained by a one-to-one mix."""
    lanes = [np.zeros(width, np.uint64) for width in WIDTHS]
    for start in range(0, words.size, SEGMENT_WORDS):
        segment = words[start : start + SEGMENT_WORDS]
        for lane, add, factor in zip(lanes, (np.add, np.bitwise_xor), _CHAIN, strict=True):
            lane ^= lane >> np.uint64(32)
            lane *= np.uint64(factor)
            lane += _columns(segment, lane.size, add)
    return np.concatenate(lanes)


def digest(data: np.ndarray) -> bytes:
    """Return 16 bytes that stand for the bytes of `data`, a contiguous array of any dtype."""
    raw = data.reshape(-1).view(np.uint8)
    if raw.size % 8:
        raw = np.concatenate([raw, np.zeros(8 - raw.size % 8, np.uint8)])
    words = raw.view(np.uint64)
    if words.size >= FOLD_FROM:
        words = _fold(words)
    first, second = _keys()
    lanes = [data.nbytes, data.nbytes ^ _MASK]
    for start in range(0, words.size, BLOCK_WORDS):
        block = words[start : start + BLOCK_WORDS]
        sums = int(np.dot(block, first[: block.size])), int(np.dot(block ^ (block >> np.uint64(32)), second[: block.size]))
        lanes = [(lane * factor + value) & _MASK for lane, factor, value in zip(lanes, _CHAIN, sums, strict=True)]
    return b"".join(_finish(lane).to_bytes(8, "little") for lane in lanes)
