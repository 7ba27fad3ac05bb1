"""One rank's side of one migration: experts arrive in staging buffers, then change places with those in the slots, or are dropped.

`stage` runs beside serving in a thread and only reads live weights. What goes from one rank to another is one stream of bytes, cut into
chunks; an expert is checked by the digest that travels with it while the next chunks are under way. `install` runs between two
steps on the serving thread and exchanges staged and live bytes, so that `restore` is the same again and needs nobody else.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from moesim.errors import ApplyError
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.digest import DIGEST_BYTES
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.expert_rows import Reader, staging
from moesim.runtime.group import gloo_group
from moesim.runtime.moves import CHUNK_BYTES, Chunk, Move, moves_between, rounds
from moesim.runtime.slot_map import SlotMap

P2P_TIMEOUT_S = 10.0


class Migration:
    """The staged change from one plan to the next on one rank."""

    def __init__(self, layers: Sequence[ExpertParallelExperts], old: Plan, new: Plan, *, rank: int) -> None:
        """Prepare the moves of the rows that `layers` hold: all of the plan, or those of one pipeline stage; rank: as in the plan."""
        self.layers, self.old, self.new, self.rank = layers, old, new, rank
        self._layer_of = {layer.slot_map.layer: layer for layer in layers}
        self.moves = [move for move in moves_between(old, new) if move.layer in self._layer_of]
        self.aborted = threading.Event()
        self.is_touched = False
        """Whether live weights may be those of the new plan."""
        self.staged: dict[tuple[int, int], np.ndarray] = {}
        """By (layer, slot) what is to be installed; once it is, what it replaced."""
        self._readers = {row: Reader(layer.rows) for row, layer in self._layer_of.items()}
        self._swapped: set[tuple[int, int]] = set()
        self._digests: dict[tuple[int, int], bytes] = {}
        self._known: dict[tuple[int, int], bytes] = {}
        self._buffers: dict[tuple[int, int], np.ndarray] = {}
        self._group: Any = None
        self._old_maps = [layer.slot_map for layer in layers]
        self._maps: list[SlotMap] = []

    def stage(self, store: Any, host: str, *, known: Mapping[tuple[int, int], bytes] | None = None, duty: float = 1.0) -> dict[str, str]:
        """Bring all experts into staging; return digest per "layer:slot". Raise ApplyError if one arrived damaged.

        known: digests of live experts by (layer, slot), which are then not made again. duty: share of the time that may be spent on this.
        """
        incoming, outgoing = self._streams(lambda move: move.source, True), self._streams(lambda move: move.target, False)
        sent_R, received_R = ([streams[peer].size if peer in streams else 0 for peer in range(self.old.num_ranks)] for streams in (outgoing, incoming))
        if any(move.source != move.target for move in self.moves):
            self._group = gloo_group(store, rank=self.rank, size=self.old.num_ranks, timeout_s=P2P_TIMEOUT_S, host=host)
        failpoints.hit("stage.begin")
        self._known = dict(known or {})
        under_way: deque[list[tuple[Chunk, Any]]] = deque()
        for batch in rounds(sent_R, received_R, self.rank):
            begin = time.perf_counter()
            if self.aborted.is_set():
                raise ApplyError(f"rank {self.rank}: staging was called off")
            under_way.append([self._post(chunk, outgoing, incoming) for chunk in batch])
            failpoints.hit("stage.posted")
            if len(under_way) > 1:
                self._arrive(under_way.popleft(), incoming)
            failpoints.hit("stage.batch")
            time.sleep((time.perf_counter() - begin) * (1 / duty - 1))
        for batch_under_way in under_way:
            self._await(batch_under_way)
        local = self._copy_local()
        unchecked = [*local.values(), *(incoming[chunk.peer].last for batch in under_way for chunk, _ in batch if not chunk.sends)]
        if failpoints.hit("stage.staged"):
            _flip(unchecked[0])
        for batch_under_way in under_way:
            self._check(batch_under_way, incoming)
        self._buffers.clear()
        for key, data in local.items():
            self.staged[key], self._digests[key] = data, self._readers[key[0]].digest_of(data)
        self._maps = [SlotMap.of(self.new, row, 0) for row in self._layer_of]
        return {f"{row}:{slot}": value.hex() for (row, slot), value in self._digests.items()}

    def _streams(self, peer_of: Callable[[Move], int], arrive: bool) -> dict[int, _Stream]:
        """Return by rank the stream of bytes from it or to it: expert, digest, expert, digest, …"""
        found: dict[int, list[Move]] = {}
        for move in self.moves:
            if move.source != move.target and self.rank == (move.target if arrive else move.source):
                found.setdefault(peer_of(move), []).append(move)
        sizes = {row: reader.expert_bytes + DIGEST_BYTES for row, reader in self._readers.items()}
        return {peer: _Stream.of(moves, sizes, with_memory=arrive) for peer, moves in found.items()}

    def _post(self, chunk: Chunk, outgoing: Mapping[int, _Stream], incoming: Mapping[int, _Stream]) -> tuple[Chunk, Any]:
        """Start to send or to receive a chunk."""
        if not chunk.sends:
            data = incoming[chunk.peer].memory[chunk.begin : chunk.end]
            return chunk, self._group.recv([torch.from_numpy(data)], chunk.peer, chunk.begin // CHUNK_BYTES)
        parity = chunk.begin // CHUNK_BYTES % 2
        spare = self._buffers.setdefault((chunk.peer, parity), np.empty(0, np.uint8))
        if spare.size < chunk.end - chunk.begin:
            spare = self._buffers[chunk.peer, parity] = np.empty(chunk.end - chunk.begin, np.uint8)
        data = spare[: chunk.end - chunk.begin]
        for move, offset in outgoing[chunk.peer].between(chunk.begin, chunk.end):
            self._fill(move, chunk.begin - offset, data)
        if failpoints.hit("stage.sent"):
            _flip(data)
        return chunk, self._group.send([torch.from_numpy(data)], chunk.peer, chunk.begin // CHUNK_BYTES)

    def _fill(self, move: Move, begin: int, out: np.ndarray) -> None:
        """Put the bytes of an expert and its digest, from byte `begin` on (negative: so far into `out`), into `out`."""
        reader, key = self._readers[move.layer], (move.layer, move.source_slot)
        size, skip = reader.expert_bytes, max(-begin, 0)
        begin, end = max(begin, 0), begin + out.size
        if begin < size:
            reader.copy_range(move.source_slot, begin, min(end, size), out[skip : skip + min(end, size) - begin])
        if end > size:
            if key not in self._known:
                self._known[key] = reader.digest(move.source_slot)
            tail = np.frombuffer(self._known[key], np.uint8)[max(begin - size, 0) : end - size]
            start = skip + max(size - begin, 0)
            out[start : start + tail.size] = tail

    def _await(self, batch: Sequence[tuple[Chunk, Any]]) -> None:
        for _, work in batch:
            work.wait()

    def _arrive(self, batch: Sequence[tuple[Chunk, Any]], incoming: Mapping[int, _Stream]) -> None:
        self._await(batch)
        self._check(batch, incoming)

    def _check(self, batch: Sequence[tuple[Chunk, Any]], incoming: Mapping[int, _Stream]) -> None:
        """Check the experts that are complete with these chunks by the digests that came with them."""
        for chunk, _ in batch:
            for move, offset in () if chunk.sends else incoming[chunk.peer].between(chunk.begin, chunk.end):
                size = self._readers[move.layer].expert_bytes
                if not chunk.begin < offset + size + DIGEST_BYTES <= chunk.end:
                    continue
                stream = incoming[chunk.peer].memory
                data, tail = stream[offset : offset + size], stream[offset + size : offset + size + DIGEST_BYTES].tobytes()
                if self._readers[move.layer].digest_of(data) != tail:
                    where = f"expert {move.expert} of layer row {move.layer}"
                    raise ApplyError(f"rank {self.rank}: {where} arrived damaged from rank {move.source}; nothing was installed")
                self.staged[move.layer, move.target_slot], self._digests[move.layer, move.target_slot] = data, tail

    def _copy_local(self) -> dict[tuple[int, int], np.ndarray]:
        """Return copies of the experts that stay on this rank and change their slot."""
        moves = [move for move in self.moves if move.source == move.target == self.rank]
        memory = staging(sum(self._readers[move.layer].expert_bytes for move in moves))
        result, offset = {}, 0
        for move in moves:
            reader = self._readers[move.layer]
            result[move.layer, move.target_slot] = memory[offset : offset + reader.expert_bytes]
            reader.read(move.source_slot, memory[offset : offset + reader.expert_bytes])
            offset += reader.expert_bytes
        return result

    @property
    def is_staged(self) -> bool:
        """Whether every expert has arrived and been checked."""
        return bool(self._maps)

    def install(self, epoch: int) -> float:
        """Exchange the staged experts with those in place and dispatch by the new map; return the seconds it took."""
        return self._write(self._maps, epoch, installed=True)

    def restore(self, epoch: int) -> float:
        """Exchange them back and dispatch by the old map again; return the seconds it took."""
        return self._write(self._old_maps, epoch, installed=False)

    def _write(self, maps: Sequence[SlotMap], epoch: int, *, installed: bool) -> float:
        """Bring every slot to the wanted side; what broke off in the middle can be finished or undone."""
        begin = time.perf_counter()
        self.is_touched = True
        for layer, slot_map in zip(self.layers, maps, strict=True):
            slots = int(slot_map.slots_per_rank_R[self.rank])
            if slots > layer.held_slots:
                layer.grow(slots)
            layer.use(replace(slot_map, epoch=epoch))
            layer.rows.drop_gradients()
        failpoints.hit("write.mapped")
        for key, data in self.staged.items():
            if (key in self._swapped) != installed:
                self._readers[key[0]].swap(key[1], data)
                self._swapped ^= {key}
        self.is_touched = installed
        return time.perf_counter() - begin

    def close(self) -> None:
        """Free the staging memory and the connections."""
        self.aborted.set()
        self.staged, self._group = {}, None
        self._buffers.clear()


@dataclass(frozen=True, slots=True)
class _Stream:
    """The experts that go from one rank to another, one after the other."""

    moves: list[Move]
    offsets: list[int]
    """First byte of every expert, and the end."""
    memory: np.ndarray
    """uint8, where they arrive; empty at the sender."""

    @classmethod
    def of(cls, moves: list[Move], sizes: Mapping[int, int], *, with_memory: bool) -> _Stream:
        offsets = list(accumulate((sizes[move.layer] for move in moves), initial=0))
        return cls(moves, offsets, staging(offsets[-1] if with_memory else 0))

    @property
    def size(self) -> int:
        return self.offsets[-1]

    @property
    def last(self) -> np.ndarray:
        return self.memory[self.offsets[-2] :]

    def between(self, begin: int, end: int) -> Iterator[tuple[Move, int]]:
        """Yield the experts that have bytes in [begin, end), and where they begin."""
        for index in range(bisect_right(self.offsets, begin) - 1, len(self.moves)):
            if self.offsets[index] >= end:
                return
            yield self.moves[index], self.offsets[index]


def _flip(data: np.ndarray) -> None:
    data[data.size // 2] ^= 0x10


def live_digests(layers: Sequence[ExpertParallelExperts]) -> list[dict[str, Any]]:
    """Return for every slot of this rank in use: row, slot, expert and the digest of all that moves with it."""
    result = []
    for layer in layers:
        table, reader, row = layer.slot_map.slot_to_expert_S[layer.first : layer.last].tolist(), Reader(layer.rows), layer.slot_map.layer
        result += [{"row": row, "slot": slot, "expert": expert, "digest": reader.digest(slot).hex()} for slot, expert in enumerate(table) if expert >= 0]
    return result
