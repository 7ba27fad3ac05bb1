"""The experts of one MoE layer, spread over the ranks of a process group by a plan's slot map.

Takes the place of the `experts` submodule of the Hugging Face MoE blocks (called with hidden [N, H], ids [N, k], weights
[N, k]). Every exchange opens with a header of fixed size: epoch, map hash, layer and the rows for each of the receiver's
slots; a header from another epoch or map raises MapMismatch before any row moves. Rows are sorted by slot at the sender,
regrouped by (slot, source rank, token) at the receiver and summed in the order of k, so that permuting the placement
changes no bit of the output. Shapes: N tokens, k choices, H hidden, R ranks, S slots, Q the local slots of this rank.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from moesim.errors import ModelError, MoesimError, describe
from moesim.runtime.expert_rows import ExpertRows, Reader
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.stages import StageClock

WEIGHTS = ("down_proj", "gate_up_proj")
BIASES = ("down_proj_bias", "gate_up_proj_bias")
HEADER = 4
"""Header words before the counts: epoch, two of the map hash, layer."""


class PeerLost(MoesimError):
    """An exchange failed because another rank is gone or silent."""


class MapMismatch(MoesimError):
    """Two ranks met in one exchange with different placements."""


class _AllToAll(torch.autograd.Function):
    """Rows to and from every rank; the backward pass is the opposite exchange."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
        ctx.splits, ctx.group = (send, receive), group
        return exchange(rows, send, receive, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        send, receive = ctx.splits
        return exchange(gradient.contiguous(), receive, send, ctx.group), None, None, None


def exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    """Send `send[r]` leading rows to every rank r in turn and return the `receive[r]` rows that came from each."""
    result = rows.new_empty((sum(receive), *rows.shape[1:]))
    try:
        group.alltoall_base(result, rows, receive, send).wait()
    except RuntimeError as cause:
        raise PeerLost(f"rank {group.rank()}: a peer is gone or silent ({' '.join(str(cause).split())[:200]})") from None
    return result


class ExpertParallelExperts(nn.Module):
    """The slots of one rank in one MoE layer, and the exchange with the other ranks."""

    def __init__(self, template: nn.Module, slot_map: SlotMap, *, rank: int, group: Any = None, slot_capacity: int | None = None) -> None:
        """Take the expert function from `template`, a Hugging Face experts module; its weights are not kept.

        group: a process group with `alltoall_base`, or None for one rank. slot_capacity: most slots per rank that
        any later plan may use; all ranks must agree on it, because it is the size of the header.
        """
        super().__init__()
        held = {**dict(template.named_parameters()), **dict(template.named_buffers())}
        self.tensor_names = tuple(sorted(WEIGHTS + (BIASES if getattr(template, "has_bias", False) else ())))
        unknown = sorted(set(held) ^ set(self.tensor_names))
        if unknown or not getattr(template, "has_gate", True) or getattr(template, "has_post_expert_norm", False):
            raise ModelError(
                f"{type(template).__name__}: expert tensors {unknown or 'without a gate or with a norm'} are not known to the migration; "
                f"supported are gated experts with {WEIGHTS} and their biases"
            )
        self.shapes = {name: tuple(held[name].shape[1:]) for name in self.tensor_names}
        self.dtype = held[WEIGHTS[0]].dtype
        self.is_transposed = bool(getattr(template, "is_transposed", False))
        self.rank, self.group = rank, group
        first, last = slot_map.local(rank)
        most = int(slot_map.slots_per_rank_R.max())
        self.slot_capacity = most if slot_capacity is None else slot_capacity
        if most > self.slot_capacity:
            raise ModelError(describe("deployment", "slots per rank", most, f"must be <= the slot capacity {self.slot_capacity}"))
        for name in self.tensor_names:
            rows = torch.zeros((last - first, *self.shapes[name]), dtype=self.dtype)
            self.register_parameter(name, nn.Parameter(rows, requires_grad=held[name].requires_grad))
        for name in self.tensor_names:
            delattr(template, name)
        self.template = template
        self.rows = ExpertRows(self)
        """What moves with an expert."""
        self.tokens = 0
        """Tokens routed here since the counts were taken."""
        self.stages: tuple[StageClock, int] | None = None
        """Who times the stages of this layer, and its index in the model; None: nobody."""
        self.use(slot_map)

    @classmethod
    def dealt(cls, whole: nn.Module, slot_map: SlotMap, *, rank: int, group: Any = None, slot_capacity: int | None = None) -> ExpertParallelExperts:
        """Return this rank's slots of a whole layer with their weights; what is left of `whole` is its expert function."""
        weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
        mine = cls(whole, slot_map, rank=rank, group=group, slot_capacity=slot_capacity)
        with torch.no_grad():
            for local, expert in enumerate(slot_map.slot_to_expert_S[mine.first : mine.last].tolist()):
                for name in mine.tensor_names if expert >= 0 else ():
                    mine.tensor(name)[local] = weights[name][expert]
        return mine

    # --- placement and weights --------------------------------------------------------------------

    def use(self, slot_map: SlotMap) -> None:
        """Dispatch by `slot_map` from now on; the caller has put the right weights in place."""
        self.slot_map = slot_map
        self.first, self.last = slot_map.local(self.rank)
        ends = np.cumsum(slot_map.slots_per_rank_R)
        self._bounds_R = list(zip((ends - slot_map.slots_per_rank_R).tolist(), ends.tolist(), strict=True))
        identity = [int.from_bytes(bytes.fromhex(slot_map.map_sha256)[i : i + 8], "little", signed=True) for i in (0, 8)]
        self._header = torch.tensor([slot_map.epoch, *identity, slot_map.layer])
        self.received_Q = np.zeros(self.last - self.first, np.int64)
        self.compute_s = 0.0
        self.exchanged = (0, 0.0)
        self.captured: torch.Tensor | None = None

    def take_counts(self) -> tuple[np.ndarray, float]:
        """Return the rows received per local slot and the seconds spent on experts since the last call, and reset both."""
        result = self.received_Q, self.compute_s
        self.received_Q, self.compute_s, self.tokens = np.zeros_like(self.received_Q), 0.0, 0
        return result

    def take_exchanged(self) -> tuple[int, float]:
        """Return the bytes sent to other ranks and the seconds spent in exchanges, waiting included, since the last call, and reset both."""
        result, self.exchanged = self.exchanged, (0, 0.0)
        return result

    def _exchange(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        begin = time.perf_counter()
        result = _AllToAll.apply(rows, send, receive, self.group)
        nbytes, seconds = self.exchanged
        away = (sum(send) - send[self.rank]) * (rows[0].numel() * rows.element_size() if rows.shape[0] else 0)
        self.exchanged = nbytes + away, seconds + time.perf_counter() - begin
        return result

    def tensor(self, name: str) -> torch.Tensor:
        """Return the parameter `name`, [Q, ...]."""
        return getattr(self, name).data

    @property
    def held_slots(self) -> int:
        """Slots that the weight tensors have room for."""
        return int(self.tensor(WEIGHTS[0]).shape[0])

    @property
    def expert_bytes(self) -> int:
        """Bytes of all that moves with one expert."""
        return Reader(self.rows).expert_bytes

    def grow(self, slots: int) -> None:
        """Make room for `slots` local slots; existing rows keep their bytes, their addresses change."""
        self.rows.grow(slots)

    def read_expert(self, local: int) -> np.ndarray:
        """Return a copy of the bytes of local slot `local`: all that moves with the expert (see `expert_rows`)."""
        reader = Reader(self.rows)
        result = np.empty(reader.expert_bytes, np.uint8)
        reader.read(local, result)
        return result

    # --- forward ----------------------------------------------------------------------------------

    def _headers(self, counts_S: torch.Tensor) -> torch.Tensor:
        """Exchange epoch, map and row counts with every rank; return [R, Q], the rows that come from each rank per slot."""
        ranks = len(self._bounds_R)
        width = HEADER + self.slot_capacity
        outgoing = torch.zeros((ranks, width), dtype=torch.int64)
        outgoing[:, :HEADER] = self._header
        for rank, (first, last) in enumerate(self._bounds_R):
            outgoing[rank, HEADER : HEADER + last - first] = counts_S[first:last]
        incoming = self._exchange(outgoing, [1] * ranks, [1] * ranks)
        if not bool((incoming[:, :HEADER] == self._header).all()):
            other = int((incoming[:, :HEADER] != self._header).any(1).nonzero()[0, 0])
            raise MapMismatch(
                f"rank {self.rank}, layer {self.slot_map.layer}: epoch {self.slot_map.epoch} of map {self.slot_map.map_sha256[:12]} met rank {other} "
                f"in epoch {int(incoming[other, 0])} of another map or layer; nothing was exchanged"
            )
        return incoming[:, HEADER : HEADER + self.last - self.first]

    def _one_expert(self, rows: torch.Tensor, local: int) -> torch.Tensor:
        """Apply the expert in local slot `local` to `rows` [M, H]."""

        def project(name: str, value: torch.Tensor) -> torch.Tensor:
            weight = getattr(self, name)[local]
            bias = getattr(self, f"{name}_bias")[local] if BIASES[0] in self.tensor_names else None
            return linear(value, weight.T if self.is_transposed else weight, bias)

        return project("down_proj", self.template._apply_gate(project("gate_up_proj", rows)))

    def _enter(self, stage: str) -> None:
        if self.stages is not None:
            clock, layer = self.stages
            clock.enter(layer, stage)

    def _note(self, rows: torch.Tensor, sent: int, handled: int) -> None:
        if self.stages is not None:
            self.stages[0].note(sent * rows.shape[1] * rows.element_size(), handled)

    def forward(self, hidden_NH: torch.Tensor, expert_Nk: torch.Tensor, weight_Nk: torch.Tensor) -> torch.Tensor:
        """Return [N, H]: the weighted sum of the chosen experts for every token."""
        tokens, choices = expert_Nk.shape
        self.captured = expert_Nk
        self.tokens += tokens
        self.rows.pending |= torch.is_grad_enabled()
        self._enter("dispatch")
        slot = self.slot_map.choose(expert_Nk, self.rank)
        order = torch.argsort(slot, stable=True)
        counts_S = torch.bincount(slot, minlength=self.slot_map.num_slots)
        if torch.is_grad_enabled():  # the copies' gradients are then summed in the order of k, whatever the placement
            rows = hidden_NH[:, None].expand(-1, choices, -1).reshape(tokens * choices, hidden_NH.shape[1])[order]
        else:
            rows = hidden_NH[order // choices]
        if self.group is None:
            per_slot, back = counts_S, None
        else:
            from_RQ = self._headers(counts_S)
            send = [int(counts_S[first:last].sum()) for first, last in self._bounds_R]
            receive = from_RQ.sum(1).tolist()
            self._note(rows, sum(send) - send[self.rank], sum(send))
            rows = self._exchange(rows, send, receive)
            source_slot = torch.arange(from_RQ.shape[1]).repeat(from_RQ.shape[0]).repeat_interleave(from_RQ.reshape(-1))
            regroup = torch.argsort(source_slot, stable=True)
            back = torch.empty_like(regroup)
            back[regroup] = torch.arange(regroup.numel())
            rows, per_slot = rows[regroup], from_RQ.sum(0)
        self._enter("experts")
        self._note(rows, 0, rows.shape[0])
        begin = time.perf_counter()
        parts = [self._one_expert(part, local) for local, part in enumerate(rows.split(per_slot.tolist())) if part.shape[0]]
        rows = torch.cat(parts) if parts else rows
        self.compute_s += time.perf_counter() - begin
        self.received_Q += per_slot.numpy()
        self._enter("combine")
        if back is not None:
            self._note(rows, sum(receive) - receive[self.rank], sum(receive))
            rows = self._exchange(rows[back], receive, send)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        result_NkH = rows[inverse].view(tokens, choices, hidden_NH.shape[1])
        total = result_NkH[:, 0].float() * weight_Nk[:, 0, None].float()
        for choice in range(1, choices):
            total = total + result_NkH[:, choice].float() * weight_Nk[:, choice, None].float()
        return total.to(hidden_NH.dtype)
