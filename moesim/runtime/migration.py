"""One rank's side of one migration: experts arrive in staging buffers, then change places with those in the slots, or are dropped.

`stage` runs beside serving in a thread and only reads live weights. What goes from one rank to another is one stream of bytes, cut into
chunks. The last thing before it returns is to compare the digest of every staged expert with the one that came with it. `install` runs
between two steps on the serving thread and exchanges staged and live bytes, so that `restore` is the same backwards and needs nobody else.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moesim.errors import ApplyError
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.expert_rows import Reader
from moesim.runtime.group import gloo_group
from moesim.runtime.moves import MAX_OPS, Chunk, Move, chains, in_turn, moves_between
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.staging import Posted, StagingMemory, Stream

P2P_TIMEOUT_S = 10.0


class Migration:
    """The staged change from one plan to the next on one rank."""

    def __init__(self, layers: Sequence[ExpertParallelExperts], old: Plan, new: Plan, *, rank: int, memory: StagingMemory | None = None) -> None:
        """Prepare the moves of the rows that `layers` hold: all of the plan, or those of one pipeline stage.

        rank: as in the plan. memory: left by the migration before.
        """
        self.layers, self.old, self.new, self.rank = layers, old, new, rank
        self._layer_of = {layer.slot_map.layer: layer for layer in layers}
        self.moves = [move for move in moves_between(old, new) if move.layer in self._layer_of]
        self.aborted = threading.Event()
        self.is_touched = False
        """Whether live weights may be those of the new plan."""
        self.staged: dict[tuple[int, int], np.ndarray] = {}
        """By (layer, slot) what is to be installed there; once all is, what has been displaced."""
        self._readers = {row: Reader(layer.rows) for row, layer in self._layer_of.items()}
        self._chains = chains(move for move in self.moves if move.target == rank)
        self._exchanges = [(move.layer, move.target_slot, chain[0].target_slot) for chain in self._chains for move in chain]
        """Layer, slot, and the slot whose staged bytes it changes places with, in order."""
        self._exchanged = 0
        """How many of them have been done."""
        self._known: dict[tuple[int, int], bytes] = {}
        self._memory = memory or StagingMemory()
        self._group: Any = None
        self._old_maps, self._new_maps = [layer.slot_map for layer in layers], [SlotMap.of(new, row, 0) for row in self._layer_of]
        self.is_staged = False
        """Whether every expert has arrived and been checked."""

    def stage(self, store: Any, host: str, *, known: Mapping[tuple[int, int], bytes] | None = None, duty: float = 1.0) -> dict[str, str]:
        """Bring all experts into staging; return digest per "layer:slot". Raise ApplyError if one is damaged.

        known: digests of live experts by (layer, slot), which are then not made again. duty: share of the time that may be spent on this.
        """
        self._known.update(known or {})
        self.connect(store, host)
        outgoing = self._streams((move for move in self.moves if move.source == self.rank != move.target), "target")
        incoming = self._streams((chain[0] for chain in self._chains), "source")
        block, begin = self._memory.block(sum(stream.size for stream in incoming.values())), 0
        for stream in incoming.values():
            stream.memory, begin = block[begin : begin + stream.size], begin + stream.size
        failpoints.hit("stage.begin")
        copied = incoming.pop(self.rank, Stream.of([], {}))
        for stream in (*outgoing.values(), copied):
            stream.digests[:] = np.frombuffer(b"".join(self._digest(move) for move in stream.moves), np.uint8)
        self._exchange(outgoing, incoming, copied, duty)
        if failpoints.hit("stage.staged"):
            _flip(block)
        digests = {(chain[0].layer, move.target_slot): self._digest(move) for chain in self._chains for move in chain[1:]}
        for stream in (copied, *incoming.values()):
            for index, move in enumerate(stream.moves):
                begin_s = time.perf_counter()
                key, data = (move.layer, move.target_slot), stream.expert(index)
                if self._readers[move.layer].digest_of(data) != stream.told(index):
                    where = f"expert {move.expert} of layer row {move.layer}"
                    raise ApplyError(f"rank {self.rank}: {where} arrived damaged from rank {move.source}; nothing was installed")
                self.staged[key], digests[key] = data, stream.told(index)
                _rest(begin_s, duty)
        self.is_staged = True
        return {f"{row}:{slot}": value.hex() for (row, slot), value in digests.items()}

    def connect(self, store: Any, host: str) -> None:
        """Meet the other ranks on `store` in a group for this migration alone, if anything moves between ranks."""
        if self._group is None and any(move.source != move.target for move in self.moves):
            self._group = gloo_group(store, rank=self.rank, size=self.old.num_ranks, timeout_s=P2P_TIMEOUT_S, host=host)

    def _streams(self, moves: Iterable[Move], end: str) -> dict[int, Stream]:
        """Return what goes to or comes from every rank; end: "target" or "source"."""
        found: dict[int, list[Move]] = {}
        for move in moves:
            found.setdefault(getattr(move, end), []).append(move)
        return {peer: Stream.of(theirs, self._readers) for peer, theirs in found.items()}

    def _digest(self, move: Move) -> bytes:
        return self._known.get((move.layer, move.source_slot)) or self._readers[move.layer].digest(move.source_slot)

    def _exchange(self, outgoing: Mapping[int, Stream], incoming: Mapping[int, Stream], copied: Stream, duty: float) -> None:
        """Send and receive all streams, and copy what stays on the rank meanwhile."""
        pieces = [{peer: [(0, 0), *stream.pieces] for peer, stream in streams.items()} for streams in (outgoing, incoming)]
        under_way: deque[Posted] = deque()
        for chunk in in_turn(*pieces, rank=self.rank, size=self.old.num_ranks):
            begin_s = time.perf_counter()
            if self.aborted.is_set():
                raise ApplyError(f"rank {self.rank}: staging was called off")
            if len(under_way) == MAX_OPS:
                self._complete(under_way.popleft())
            under_way.append(self._post(chunk, (outgoing if chunk.sends else incoming)[chunk.peer]))
            failpoints.hit("stage.posted")
            _rest(begin_s, duty)
            failpoints.hit("stage.batch")
        for index, move in enumerate(copied.moves):
            self._readers[move.layer].read(move.source_slot, copied.expert(index))
        while under_way:
            self._complete(under_way.popleft())

    def _post(self, chunk: Chunk, stream: Stream) -> Posted:
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
                spare = self._memory.take()
                data = spare[: chunk.end - chunk.begin]
                for first, part in parts:
                    data[first : first + part.size] = part
                if failpoints.hit("stage.sent"):
                    _flip(data)
        tensor = torch.from_numpy(data)
        work = self._group.send([tensor], chunk.peer, chunk.number) if chunk.sends else self._group.recv([tensor], chunk.peer, chunk.number)
        return Posted(chunk, work, tensor, spare)

    def _complete(self, posted: Posted) -> None:
        """Wait for the end of a chunk."""
        posted.work.wait()  # once: gloo hangs if a receive is waited for twice
        if posted.spare is not None:
            self._memory.give(posted.spare)

    def install(self, epoch: int) -> float:
        """Exchange the staged experts with those in place and dispatch by the new map; return the seconds it took."""
        return self._write(self._new_maps, epoch, installed=True)

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
        done = self._exchanged
        for row, slot, buffer in self._exchanges[done:] if installed else reversed(self._exchanges[:done]):
            self._readers[row].swap(slot, self.staged[row, buffer])
            self._exchanged += 1 if installed else -1
        self.is_touched = installed
        return time.perf_counter() - begin

    def close(self) -> StagingMemory | None:
        """Free the staging memory and the connections; return the memory for the next migration if nothing can still arrive in it."""
        self.aborted.set()
        self.staged, self._group = {}, None
        return self._memory.trim() if self.is_staged else None


def _rest(begin_s: float, duty: float) -> None:
    """Leave the processor to others for as long as what began at `begin_s` took, or as `duty` says."""
    if duty < 1:  # even a sleep of nothing gives the processor away
        time.sleep((time.perf_counter() - begin_s) * (1 / duty - 1))


def _flip(data: np.ndarray) -> None:
    data[data.size // 2] ^= 0x10


def live_digests(layers: Sequence[ExpertParallelExperts]) -> list[dict[str, Any]]:
    """Return for every slot of this rank in use: row, slot, expert and the digest of all that moves with it."""
    result = []
    for layer in layers:
        table, reader, row = layer.slot_map.slot_to_expert_S[layer.first : layer.last].tolist(), Reader(layer.rows), layer.slot_map.layer
        result += [{"row": row, "slot": slot, "expert": expert, "digest": reader.digest(slot).hex()} for slot, expert in enumerate(table) if expert >= 0]
    return result
