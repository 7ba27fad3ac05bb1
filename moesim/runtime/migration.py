"""One rank's side of one migration: experts arrive in staging buffers, then are copied in place, or dropped.

`stage` runs beside serving in a thread and only reads live weights; it also keeps the bytes that the new experts will
replace, so that `restore` needs nobody else. Every expert is checked by the digest that travels with it, and again when
all have arrived. `install` and `restore` run between two steps on the serving thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moesim.errors import ApplyError
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.digest import DIGEST_BYTES, digest
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.group import gloo_group
from moesim.runtime.moves import chunks, moves_between
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
        self.replaced: dict[tuple[int, int], np.ndarray] = {}
        self._group: Any = None
        self._old_maps = [layer.slot_map for layer in layers]
        self._maps: list[SlotMap] = []

    @property
    def staging_bytes(self) -> int:
        """Bytes that this rank needs beside its live weights: arriving experts, replaced ones, one batch in flight."""
        mine = sum(move.target == self.rank for move in self.moves)
        return (2 * mine + 32) * self.layers[0].expert_bytes

    def stage(self, store: Any, host: str) -> dict[str, str]:
        """Bring all experts into staging; return digest per "layer:slot". Raise ApplyError if one arrived damaged."""
        size, digests = self.old.num_ranks, {}
        if any(move.source != move.target for move in self.moves):
            self._group = gloo_group(store, rank=self.rank, size=size, timeout_s=P2P_TIMEOUT_S, host=host)
        failpoints.hit("stage.begin")
        for batch in chunks(self.moves):
            if self.aborted.is_set():
                raise ApplyError(f"rank {self.rank}: staging was called off")
            self._exchange(batch)
            failpoints.hit("stage.batch")
        for move in self.moves:
            if move.target != self.rank:
                continue
            key = (move.layer, move.target_slot)
            layer = self._layer_of[move.layer]
            if move.source == self.rank:
                self.staged[key] = layer.read_expert(move.source_slot)
            if move.target_slot < layer.held_slots:
                self.replaced[key] = layer.read_expert(move.target_slot)
        if failpoints.hit("stage.staged"):
            _flip(next(iter(self.staged.values())))
        self._maps = [SlotMap.of(self.new, row, 0) for row in self._layer_of]
        for (row, slot), data in self.staged.items():
            digests[f"{row}:{slot}"] = digest(data).hex()
        return digests

    def _exchange(self, batch: list[int]) -> None:
        """Send and receive one batch and check what came; the digest is the tail of every message."""
        pending, arrived = [], []
        for index in batch:
            move = self.moves[index]
            layer = self._layer_of[move.layer]
            if move.source == self.rank:
                data = layer.read_expert(move.source_slot)
                tail = np.frombuffer(digest(data), np.uint8)
                if failpoints.hit("stage.sent"):
                    _flip(data)
                message = torch.from_numpy(np.concatenate([data, tail]))
                pending.append((self._group.send([message], move.target, index), message))
            elif move.target == self.rank:
                message = torch.empty(layer.expert_bytes + DIGEST_BYTES, dtype=torch.uint8)
                pending.append((self._group.recv([message], move.source, index), message))
                arrived.append((move, message))
        failpoints.hit("stage.posted")
        for work, _ in pending:
            work.wait()
        for move, message in arrived:
            received = message.numpy()
            data, tail = received[:-DIGEST_BYTES].copy(), received[-DIGEST_BYTES:].tobytes()
            if digest(data) != tail:
                where = f"expert {move.expert} of layer row {move.layer}"
                raise ApplyError(f"rank {self.rank}: {where} arrived damaged from rank {move.source}; nothing was installed")
            self.staged[move.layer, move.target_slot] = data

    @property
    def is_staged(self) -> bool:
        """Whether every expert has arrived and been checked."""
        return bool(self._maps)

    def install(self, epoch: int) -> float:
        """Copy the staged experts in place and dispatch by the new map; return the seconds it took."""
        begin = time.perf_counter()
        self.is_touched = True
        self._write(self._maps, self.staged, epoch)
        return time.perf_counter() - begin

    def restore(self, epoch: int) -> float:
        """Put the replaced experts back and dispatch by the old map again; return the seconds it took."""
        begin = time.perf_counter()
        self._write(self._old_maps, self.replaced, epoch)
        self.is_touched = False
        return time.perf_counter() - begin

    def _write(self, maps: Sequence[SlotMap], data: dict[tuple[int, int], np.ndarray], epoch: int) -> None:
        for layer, slot_map in zip(self.layers, maps, strict=True):
            slots = int(slot_map.slots_per_rank_R[self.rank])
            if slots > layer.held_slots:
                layer.grow(slots)
            layer.use(replace(slot_map, epoch=epoch))
        failpoints.hit("write.mapped")
        for (row, slot), expert in data.items():
            self._layer_of[row].write_expert(slot, expert)

    def close(self) -> None:
        """Free the staging memory and the connections."""
        self.aborted.set()
        self.staged, self.replaced, self._group = {}, {}, None


def _flip(data: np.ndarray) -> None:
    data[data.size // 2] ^= 0x10


def live_digests(layers: Sequence[ExpertParallelExperts]) -> list[dict[str, Any]]:
    """Return for every slot of this rank in use: row, expert and the digest of its live weights."""
    result = []
    for layer in layers:
        table = layer.slot_map.slot_to_expert_S[layer.first : layer.last].tolist()
        row = layer.slot_map.layer
        result += [{"row": row, "expert": expert, "digest": digest(layer.read_expert(slot)).hex()} for slot, expert in enumerate(table) if expert >= 0]
    return result
