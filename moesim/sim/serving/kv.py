"""The paged KV cache of one attention replica: blocks counted, prefix blocks by id.

A block is free, private to a sequence, or known by the id of the prefix that it ends. Known blocks are shared by reference count; those that nobody
uses stay until they are needed, the least recently used first, and of one sequence its last blocks before its first ones. Blocks and tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from math import ceil

from moesim.errors import InputError, describe


class Holding:
    """The blocks of one sequence."""

    __slots__ = ("blocks", "ids")

    def __init__(self) -> None:
        self.blocks = 0
        """All of them."""
        self.ids: list[int] = []
        """Known ones among them, in order."""


class KvPool:
    """Blocks of one attention replica."""

    def __init__(self, capacity: int, block_size: int, id_tokens: int = 0) -> None:
        """capacity: blocks. id_tokens: tokens that one prefix id stands for, a multiple of the block size; 0: there are no ids."""
        if id_tokens % block_size:
            raise InputError(describe("--set", "serving.block_size", block_size, f"must divide the {id_tokens} tokens of a prefix block of the requests"))
        self.capacity, self.block_size, self.id_tokens = capacity, block_size, id_tokens
        self.free = capacity
        self.peak = 0
        self.hit_tokens = 0
        self.evicted = 0
        self._per_id = id_tokens // block_size
        self._users: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.capacity - self.free - len(self._unused) * self._per_id

    def match(self, ids: tuple[int, ...], tokens: int) -> int:
        """Return how many leading ids are known; at least one of the prompt's `tokens` is left to compute."""
        most = min(len(ids), (tokens - 1) // self.id_tokens) if self.id_tokens else 0
        found = 0
        while found < most and ids[found] in self._users:
            found += 1
        return found

    def fits(self, held: Holding, ids: tuple[int, ...], tokens: int) -> bool:
        """Return whether a sequence that shares `ids` can be given blocks for `tokens` tokens."""
        need = ceil(tokens / self.block_size) - held.blocks - len(ids) * self._per_id
        taken = sum(one in self._unused for one in ids) if ids else 0
        return need <= self.free + (len(self._unused) - taken) * self._per_id

    def share(self, held: Holding, ids: tuple[int, ...]) -> None:
        """Give known blocks to a sequence that has none."""
        for one in ids:
            self._users[one] += 1
            self._unused.pop(one, None)
        held.ids.extend(ids)
        held.blocks += len(ids) * self._per_id
        self.hit_tokens += len(ids) * self.id_tokens

    def grow(self, held: Holding, tokens: int) -> bool:
        """Give a sequence the blocks that it lacks for `tokens` tokens; False, and nothing, if there are not enough."""
        need = -(-tokens // self.block_size) - held.blocks
        if need <= 0:
            return True
        if need > self.free:
            if need > self.free + len(self._unused) * self._per_id:
                return False
            while self.free < need:
                one, _ = self._unused.popitem(last=False)
                del self._users[one]
                self.free += self._per_id
                self.evicted += 1
        self.free -= need
        held.blocks += need
        used = self.capacity - self.free - len(self._unused) * self._per_id
        if used > self.peak:
            self.peak = used
        return True

    def learn(self, held: Holding, ids: tuple[int, ...]) -> None:
        """Make the next full blocks of a sequence known by `ids`, in order; it stops at one that another sequence has made known meanwhile."""
        for one in ids:
            if one in self._users:
                return
            self._users[one] = 1
            held.ids.append(one)

    def release(self, held: Holding) -> None:
        """Take all blocks of a sequence back."""
        self.free += held.blocks - len(held.ids) * self._per_id
        for one in reversed(held.ids):
            left = self._users[one] - 1
            self._users[one] = left
            if not left:
                self._unused[one] = None
        held.blocks, held.ids = 0, []
