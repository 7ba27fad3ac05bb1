"""Paged KV blocks and prefix sharing, counted by hand."""

from __future__ import annotations

import pytest

from moesim.errors import InputError
from moesim.sim.serving.kv import Holding, KvPool
from moesim.sim.serving.settings import ServingSettings
from moesim.traces.requests.document import Request
from tests.sim.serving.toys import pool, requests_of, run


def test_blocks_are_counted_and_returned() -> None:
    kv, held = KvPool(10, 16), Holding()
    assert kv.grow(held, 33) and (held.blocks, kv.free) == (3, 7)
    assert kv.grow(held, 48) and kv.free == 7
    assert not kv.grow(held, 161) and kv.free == 7
    kv.release(held)
    assert kv.free == 10 and kv.used == 0 and kv.peak == 3


def test_a_known_prefix_is_shared_and_the_last_block_of_it_goes_first() -> None:
    kv, first, second = KvPool(12, 16, id_tokens=32), Holding(), Holding()
    ids = (7, 8, 9)
    assert kv.match(ids, 100) == 0
    kv.grow(first, 100)
    kv.learn(first, ids)
    assert kv.match(ids, 100) == 3
    assert kv.match(ids, 96) == 2  # one token is always left to compute
    kv.share(second, ids[:2])
    assert (second.blocks, kv.free) == (4, 5)
    kv.release(first)
    assert kv.used == 4 and kv.free == 6  # id 9 waits for its next use
    kv.release(second)
    third = Holding()
    assert kv.grow(third, 16 * 8) and kv.match(ids, 100) == 2  # 9 first, then 8 is in the way
    assert kv.grow(third, 16 * 9) and kv.match(ids, 100) == 1
    assert not kv.grow(third, 16 * 13)


def test_a_block_size_that_does_not_divide_the_ids_is_refused() -> None:
    with pytest.raises(InputError, match="block_size = 48 must divide the 512 tokens"):
        KvPool(10, 48, 512)


def test_prefix_hits_save_their_tokens() -> None:
    seen: list[int] = []

    def note(prompt: int, decodes: int) -> float:
        seen.append(prompt)
        return 1.0

    # b begins like a (two blocks of 32), c is a itself: its last block is full, so one block is computed again.
    rows = [Request("a", 0.0, 100, 1, (1, 2, 3)), Request("b", 5.0, 80, 1, (1, 2)), Request("c", 10.0, 96, 1, (1, 2, 3))]
    done, _ = run(requests_of(rows, block_tokens=32), ServingSettings(max_num_seqs=4, max_num_batched_tokens=256), pool(note, blocks=64))
    assert seen == [100, 16, 32]
    assert sum(seen) == 276 - 128
    off = ServingSettings(max_num_seqs=4, max_num_batched_tokens=256, prefix_cache=False)
    seen.clear()
    run(requests_of(rows, block_tokens=32), off, pool(note, blocks=64))
    assert seen == [100, 80, 96]
