"""The digest of an expert changes with every bit, with the order of its bytes and with its length."""

from __future__ import annotations

import numpy as np
import pytest

from moesim.runtime.digest import BLOCK_WORDS, COLUMNS, DIGEST_BYTES, FOLD_FROM, SEGMENT_ROWS, digest

SEGMENT_WORDS = SEGMENT_ROWS * COLUMNS


def random_bytes(size: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("size", [98304, 3 * BLOCK_WORDS * 8 + 5, 1000, 8 * FOLD_FROM, 8 * 2 * SEGMENT_WORDS + 1003])
def test_100_of_100_random_single_bit_flips_are_detected(size: int) -> None:
    data = random_bytes(size)
    clean = digest(data)
    generator = np.random.Generator(np.random.PCG64(1))
    for position, bit in zip(generator.integers(0, size, 100), generator.integers(0, 8, 100), strict=True):
        data[position] ^= np.uint8(1 << bit)
        assert digest(data) != clean
        data[position] ^= np.uint8(1 << bit)
    assert digest(data) == clean


def test_every_single_bit_of_a_small_array_counts() -> None:
    data = random_bytes(41)
    seen = {digest(data)}
    for position in range(41):
        for bit in range(8):
            data[position] ^= np.uint8(1 << bit)
            seen.add(digest(data))
            data[position] ^= np.uint8(1 << bit)
    assert len(seen) == 41 * 8 + 1


@pytest.mark.parametrize("bit", [0, 31, 32, 63])
def test_the_same_bit_flipped_in_two_words_is_detected(bit: int) -> None:
    words = random_bytes(8 * 300).view(np.uint64)
    seen = {digest(words)}
    for other in range(1, 300):
        words[[0, other]] ^= np.uint64(1 << bit)
        seen.add(digest(words))
        words[[0, other]] ^= np.uint64(1 << bit)
    assert len(seen) == 300


@pytest.mark.parametrize("distance", [1, COLUMNS, COLUMNS + 1, 4 * COLUMNS, SEGMENT_WORDS, SEGMENT_WORDS + COLUMNS])
@pytest.mark.parametrize("bit", [0, 31, 63])
def test_two_flipped_or_swapped_words_of_a_large_array_are_detected_at_any_distance(bit: int, distance: int) -> None:
    words = random_bytes(8 * 2 * SEGMENT_WORDS).view(np.uint64)
    clean = digest(words)
    for first in (0, 5000, SEGMENT_WORDS - distance - 1 if distance < SEGMENT_WORDS else 77):
        pair = [first, first + distance]
        words[pair] ^= np.uint64(1 << bit)
        assert digest(words) != clean
        words[pair] ^= np.uint64(1 << bit)
        words[pair] = words[pair[::-1]]
        assert digest(words) != clean
        words[pair] = words[pair[::-1]]
    assert digest(words) == clean


def test_large_arrays_of_one_value_and_rotated_ones_are_told_apart() -> None:
    words = random_bytes(8 * 2 * SEGMENT_WORDS).view(np.uint64)
    constant = [np.full(2 * SEGMENT_WORDS, value, np.uint64) for value in (0, 1, 1 << 63)]
    rolled = [np.roll(words, by) for by in (1, COLUMNS, COLUMNS + 1, SEGMENT_WORDS)]
    assert len({digest(array) for array in [words, words[:-1], *rolled, *constant]}) == 9


def test_swapped_words_and_blocks_and_lengths_are_told_apart() -> None:
    words = random_bytes(8 * 2 * BLOCK_WORDS).view(np.uint64)
    swapped = words.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    blocks = np.roll(words, BLOCK_WORDS)
    zeros = [digest(np.zeros(size, np.uint8)) for size in range(40)]
    assert len({digest(words), digest(swapped), digest(blocks), *zeros}) == 43
    assert len(digest(words)) == DIGEST_BYTES


def test_the_digest_is_of_bytes_not_of_numbers() -> None:
    values = np.array([0.0, 1.5, -2.0], np.float32)
    assert digest(values) == digest(values.view(np.uint8)) == digest(values.reshape(3, 1))
    assert digest(values) != digest(np.array([-0.0, 1.5, -2.0], np.float32))


def test_parts_stand_for_an_expert_together() -> None:
    rows = [random_bytes(size, seed) for seed, size in enumerate((8 * FOLD_FROM, 8 * FOLD_FROM, 40, 8 * FOLD_FROM + 3, 5))]
    seen = {digest(*rows), digest(rows[1], rows[0], *rows[2:])}
    for row in rows:
        for position in (0, row.size // 2, row.size - 1):
            row[position] ^= 2
            seen.add(digest(*rows))
            row[position] ^= 2
    assert len(seen) == 2 + 3 * len(rows)
