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
from collections.abc import Iterator, Mapping, Sequence
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
from moesim.runtime.expert_rows import Reader
from moesim.runtime.group import gloo_group
from moesim.runtime.moves import CHUNK_BYTES, MAX_OPS, Chunk, Move, cut, in_turn, moves_between
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
        self._spare: list[np.ndarray] = []
        self._group: Any = None
        self._old_maps = [layer.slot_map for layer in layers]
        self._maps: list[SlotMap] = []

    def stage(self, store: Any, host: str, *, known: Mapping[tuple[int, int], bytes] | None = None, duty: float = 1.0) -> dict[str, str]:
        """Bring all experts into staging; return digest per "layer:slot". Raise ApplyError if one arrived damaged.

        known: digests of live experts by (layer, slot), which are then not made again. duty: share of the time that may be spent on this.
        """
        incoming, outgoing = self._streams(arrive=True), self._streams(arrive=False)
        self.connect(store, host)
        failpoints.hit("stage.begin")
        for stream in outgoing.values():
            stream.digests[:] = np.frombuffer(b"".join(self._digest(move, known or {}) for move in stream.moves), np.uint8)
        pieces = [{peer: [(0, 0), *stream.pieces] for peer, stream in streams.items()} for streams in (outgoing, incoming)]
        under_way: deque[_Posted] = deque()
        for chunk in in_turn(*pieces, rank=self.rank, size=self.old.num_ranks):
            begin = time.perf_counter()
            if self.aborted.is_set():
                raise ApplyError(f"rank {self.rank}: staging was called off")
            if len(under_way) == MAX_OPS:
                self._complete(under_way.popleft(), incoming)
            under_way.append(self._post(chunk, (outgoing if chunk.sends else incoming)[chunk.peer]))
            failpoints.hit("stage.posted")
            if duty < 1:  # even a sleep of nothing gives the processor away
                time.sleep((time.perf_counter() - begin) * (1 / duty - 1))
            failpoints.hit("stage.batch")
        local = self._copy_local()  # while the last chunks are under way
        while len(under_way) > 1:
            self._complete(under_way.popleft(), incoming)
        if under_way:
            under_way[0].work.wait()
        if failpoints.hit("stage.staged"):
            _flip(next(iter(local.values())) if local else incoming[under_way[0].chunk.peer].memory[-DIGEST_BYTES:])
        if under_way:
            self._check(under_way.popleft(), incoming)
        for key, data in local.items():
            self.staged[key], self._digests[key] = data, self._readers[key[0]].digest_of(data)
        self._spare.clear()
        self._maps = [SlotMap.of(self.new, row, 0) for row in self._layer_of]
        return {f"{row}:{slot}": value.hex() for (row, slot), value in self._digests.items()}

    def connect(self, store: Any, host: str) -> None:
        """Meet the other ranks on `store` in a group for this migration alone, if anything moves between ranks."""
        if self._group is None and any(move.source != move.target for move in self.moves):
            self._group = gloo_group(store, rank=self.rank, size=self.old.num_ranks, timeout_s=P2P_TIMEOUT_S, host=host)

    def _streams(self, *, arrive: bool) -> dict[int, _Stream]:
        """Return by rank what comes from it or goes to it."""
        found: dict[int, list[Move]] = {}
        for move in self.moves:
            if move.source != move.target and self.rank == (move.target if arrive else move.source):
                found.setdefault(move.source if arrive else move.target, []).append(move)
        return {peer: _Stream.of(moves, self._readers, arrives=arrive) for peer, moves in found.items()}

    def _digest(self, move: Move, known: Mapping[tuple[int, int], bytes]) -> bytes:
        return known.get((move.layer, move.source_slot)) or self._readers[move.layer].digest(move.source_slot)

    def _post(self, chunk: Chunk, stream: _Stream) -> _Posted:
        """Start to send or to receive a chunk; the first of a stream is the experts' digests."""
        spare = None
        if chunk.number == 0:
            data = stream.digests
        elif not chunk.sends:
            data = stream.memory[chunk.begin : chunk.end]
        else:
            parts = [
                (offset + first - chunk.begin, part)
                for move, offset in stream.between(chunk.begin, chunk.end)
                for first, part in self._readers[move.layer].span(move.source_slot, chunk.begin - offset, chunk.end - offset)
            ]
            if len(parts) == 1 and parts[0][1].size == chunk.end - chunk.begin and not failpoints.allowed():
                data = parts[0][1]
            else:
                spare = self._spare.pop() if self._spare else np.empty(CHUNK_BYTES, np.uint8)
                data = spare[: chunk.end - chunk.begin]
                for first, part in parts:
                    data[first : first + part.size] = part
                if failpoints.hit("stage.sent"):
                    _flip(data)
        tensor = torch.from_numpy(data)
        work = self._group.send([tensor], chunk.peer, chunk.number) if chunk.sends else self._group.recv([tensor], chunk.peer, chunk.number)
        return _Posted(chunk, work, tensor, spare)

    def _complete(self, posted: _Posted, incoming: Mapping[int, _Stream]) -> None:
        """Wait for the end of a chunk and check what is complete with it."""
        posted.work.wait()  # once: gloo hangs if a receive is waited for twice
        self._check(posted, incoming)

    def _check(self, posted: _Posted, incoming: Mapping[int, _Stream]) -> None:
        """Check the experts that end in a chunk by the digests that came with them."""
        chunk = posted.chunk
        if chunk.sends:
            if posted.spare is not None:
                self._spare.append(posted.spare)
            return
        stream = incoming[chunk.peer]
        for index in range(*stream.ended(chunk.begin, chunk.end)):
            move, data = stream.moves[index], stream.memory[stream.offsets[index] : stream.offsets[index + 1]]
            told = stream.digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES].tobytes()
            if self._readers[move.layer].digest_of(data) != told:
                where = f"expert {move.expert} of layer row {move.layer}"
                raise ApplyError(f"rank {self.rank}: {where} arrived damaged from rank {move.source}; nothing was installed")
            self.staged[move.layer, move.target_slot], self._digests[move.layer, move.target_slot] = data, told

    def _copy_local(self) -> dict[tuple[int, int], np.ndarray]:
        """Return copies of the experts that stay on this rank and change their slot."""
        moves = [move for move in self.moves if move.source == move.target == self.rank]
        memory = np.empty(sum(self._readers[move.layer].expert_bytes for move in moves), np.uint8)
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
        self._spare.clear()


@dataclass(frozen=True, slots=True)
class _Posted:
    """A chunk under way."""

    chunk: Chunk
    work: Any
    tensor: torch.Tensor
    """What is sent, or where it arrives; alive until the end."""
    spare: np.ndarray | None
    """A buffer to use again."""


@dataclass(frozen=True, slots=True)
class _Stream:
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
    def of(cls, moves: list[Move], readers: Mapping[int, Reader], *, arrives: bool) -> _Stream:
        offsets = list(accumulate((readers[move.layer].expert_bytes for move in moves), initial=0))
        pieces = cut(size for move in moves for size in readers[move.layer].row_bytes)
        return cls(moves, offsets, pieces, np.empty(len(moves) * DIGEST_BYTES, np.uint8), np.empty(offsets[-1] if arrives else 0, np.uint8))

    def between(self, begin: int, end: int) -> Iterator[tuple[Move, int]]:
        """Yield the experts that have bytes in [begin, end), and where they begin."""
        for index in range(bisect_right(self.offsets, begin) - 1, len(self.moves)):
            if self.offsets[index] >= end:
                return
            yield self.moves[index], self.offsets[index]

    def ended(self, begin: int, end: int) -> tuple[int, int]:
        """Return first and one past the last of the experts whose last byte is in [begin, end)."""
        return max(bisect_right(self.offsets, begin) - 1, 0), max(bisect_right(self.offsets, end) - 1, 0)


def _flip(data: np.ndarray) -> None:
    data[data.size // 2] ^= 0x10


def live_digests(layers: Sequence[ExpertParallelExperts]) -> list[dict[str, Any]]:
    """Return for every slot of this rank in use: row, slot, expert and the digest of all that moves with it."""
    result = []
    for layer in layers:
        table, reader, row = layer.slot_map.slot_to_expert_S[layer.first : layer.last].tolist(), Reader(layer.rows), layer.slot_map.layer
        result += [{"row": row, "slot": slot, "expert": expert, "digest": reader.digest(slot).hex()} for slot, expert in enumerate(table) if expert >= 0]
    return result
