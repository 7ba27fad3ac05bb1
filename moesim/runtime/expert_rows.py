"""All tensors of one layer that have a row per slot: weights and biases, optimizer moments, master copies, whatever was registered.

What belongs to an expert moves with it, whole or not at all: a tensor with an expert dimension that nobody registered is
refused. The bytes of one expert are those of its rows in the order of their names, each padded to 8 bytes, so that every
row can be read back at its own type; its digest is of its rows where they are, without padding. Q: slots held here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch

from moesim.errors import ModelError, describe
from moesim.runtime.digest import digest
from moesim.runtime.slot_map import SlotMap

PAD = 8
SWAP_BYTES = 1 << 18
"""Bytes exchanged at a time, so that what is under way stays in the cache."""


def padded(size: int) -> int:
    """Return `size` rounded up to whole words."""
    return -(-size // PAD) * PAD


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the bytes of a tensor: a view where it is contiguous and in host memory, else a copy."""
    return np.asarray(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())


class Slotted(Protocol):
    """A module with tensors that have a row per slot."""

    slot_map: SlotMap
    tensor_names: tuple[str, ...]

    @property
    def held_slots(self) -> int: ...
    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class ExpertRows:
    """What moves when an expert of this layer moves."""

    def __init__(self, module: Slotted) -> None:
        self._module = module
        self._optimizers: list[torch.optim.Optimizer] = []
        self._registered: dict[str, Callable[[], torch.Tensor]] = {}
        self._states: set[str] = set()
        self.pending = False
        """Whether gradients have been computed that no optimizer step has used yet."""

    # --- what there is ----------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the state that `optimizer` keeps for this layer's tensors move with them."""
        self._optimizers.append(optimizer)

    def register(self, name: str, tensor: Callable[[], torch.Tensor]) -> None:
        """Let the rows of `tensor()`, [Q, ...], move too: a master copy, a scale, a cached product. It may be a key of the optimizer's state."""
        self._registered[name] = tensor

    def register_state(self, name: str) -> None:
        """Say that the optimizer's state `name` has a row per slot, though not the shape of its parameter."""
        self._states.add(name)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all tensors [Q, ...] by name; raise ModelError if there is one with an expert dimension that is not registered."""
        module, slots = self._module, self._module.held_slots
        main: dict[str, torch.Tensor] = {name: getattr(module, name) for name in module.tensor_names}
        main |= {name: tensor() for name, tensor in self._registered.items()}
        for name, tensor in main.items():
            if tensor.ndim == 0 or tensor.shape[0] != slots:
                raise self._refusal(name, tuple(tensor.shape), f"must have {slots} rows, one per slot")
        known = {tensor.data_ptr() for tensor in main.values()}
        for name, tensor in self._held():
            if slots and tensor.ndim and tensor.shape[0] == slots and tensor.data_ptr() not in known:
                raise self._refusal(name, tuple(tensor.shape), "has an expert dimension and is not registered", "register it, or its experts cannot move")
        return main | {f"{key}.{name}": value for key, tensor in list(main.items()) for name, value in self._state_of(key, tensor)}

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self._module.named_parameters()
        yield from self._module.named_buffers()
        own = ("captured", "_header")
        yield from ((name, value) for name, value in vars(self._module).items() if isinstance(value, torch.Tensor) and name not in own)

    def _state_of(self, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for optimizer in self._optimizers:
            for name, value in sorted(optimizer.state.get(tensor, {}).items()):
                if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
                    raise self._refusal(f"{key}.{name}", type(value).__name__, "is a list of tensors, which cannot be moved by expert")
                if not isinstance(value, torch.Tensor):
                    continue
                if value.shape == tensor.shape or (name in self._states and value.ndim and value.shape[0] == tensor.shape[0]):
                    yield name, value
                elif value.numel() != 1:  # one number is a step count, which all experts share
                    rule = f"must have the shape of its parameter, {tuple(tensor.shape)}, or be registered by name"
                    raise self._refusal(f"{key}.{name}", tuple(value.shape), rule, "register_state it if it has a row per slot")

    def shared_state(self) -> dict[str, float]:
        """Return by name the numbers that an optimizer keeps per tensor, like the count of steps: experts leave them behind, so ranks must agree."""
        main = {name: getattr(self._module, name) for name in self._module.tensor_names} | {name: tensor() for name, tensor in self._registered.items()}
        return {
            f"{key}.{name}": float(value)
            for key, tensor in main.items()
            for optimizer in self._optimizers
            for name, value in optimizer.state.get(tensor, {}).items()
            if isinstance(value, (int, float)) or (isinstance(value, torch.Tensor) and value.numel() == 1 and value.shape != tensor.shape)
        }

    def _refusal(self, name: str, value: object, rule: str, remedy: str = "") -> ModelError:
        return ModelError(describe(f"layer row {self._module.slot_map.layer}", name, value, rule, remedy))

    # --- one expert -------------------------------------------------------------------------------

    def layout(self) -> list[tuple[torch.Tensor, int, int]]:
        """Return per tensor: the tensor, the offset of its row in the bytes of an expert, and the bytes of a row."""
        result, offset = [], 0
        for _, tensor in sorted(self.tensors().items()):
            size = math.prod(tensor.shape[1:]) * tensor.element_size()
            result.append((tensor, offset, size))
            offset += padded(size)
        return result

    def grow(self, slots: int) -> None:
        """Make room for `slots` rows in all tensors; existing rows keep their bytes and every tensor its identity, but not its address."""
        with torch.inference_mode(False), torch.no_grad():  # what is made in inference mode cannot be trained on
            for tensor in self.tensors().values():
                fresh = torch.zeros((slots, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
                fresh[: tensor.shape[0]] = tensor.data
                tensor.data = fresh
                tensor.grad = None

    def has_pending_gradients(self) -> bool:
        """Return True if gradients wait for an optimizer step."""
        return self.pending and any(tensor.grad is not None for tensor in self.tensors().values())

    def drop_gradients(self) -> None:
        """Forget gradients: they belong to the experts that were here before."""
        for tensor in self.tensors().values():
            tensor.grad = None


class _Rows:
    """One tensor [Q, ...] of a layer and where its row lies among the bytes of an expert."""

    def __init__(self, tensor: torch.Tensor, offset: int, size: int) -> None:
        self.tensor, self.offset, self.size = tensor, offset, size
        self._address, self._view = 0, np.empty(0, np.uint8)

    def row(self, local: int) -> np.ndarray:
        """Return the bytes of local slot `local`: a view where they lie together in host memory, else a copy."""
        tensor = self.tensor
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return bytes_of(tensor.data[local])
        if tensor.data_ptr() != self._address:  # the layer has grown, or its owner has put other memory there
            self._address, self._view = tensor.data_ptr(), bytes_of(tensor)
        return self._view[local * self.size : (local + 1) * self.size]


class Reader:
    """The rows of one layer as they are laid out now, for as long as no tensor is added to them."""

    def __init__(self, rows: ExpertRows) -> None:
        self._layout = [_Rows(*entry) for entry in rows.layout()]
        last = self._layout[-1]
        self.expert_bytes = last.offset + padded(last.size)

    def read(self, local: int, out: np.ndarray) -> None:
        """Copy the bytes of local slot `local` to `out`."""
        for rows in self._layout:
            out[rows.offset : rows.offset + rows.size] = rows.row(local)
            out[rows.offset + rows.size : rows.offset + padded(rows.size)] = 0

    @property
    def row_bytes(self) -> list[int]:
        """Bytes of every row of an expert, padding included."""
        return [padded(rows.size) for rows in self._layout]

    def span(self, local: int, begin: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the bytes of local slot `local` that lie within [begin, end) of its expert, and where each row's begin: views of host memory."""
        for rows in self._layout:
            first, last = max(begin, rows.offset), min(end, rows.offset + rows.size)
            if first < last:
                yield first, rows.row(local)[first - rows.offset : last - rows.offset]

    def swap(self, local: int, data: np.ndarray) -> None:
        """Exchange the bytes of local slot `local`, in place, with those in `data`."""
        spare = np.empty(SWAP_BYTES, np.uint8)
        for rows in self._layout:
            row, fresh = rows.tensor.data[local], data[rows.offset : rows.offset + rows.size]
            if row.device.type == "cpu" and row.is_contiguous():
                live = bytes_of(row)
                for begin in range(0, rows.size, SWAP_BYTES):
                    old, new = live[begin : begin + SWAP_BYTES], fresh[begin : begin + SWAP_BYTES]
                    kept = spare[: old.size]
                    kept[:] = old
                    old[:] = new
                    new[:] = kept
            else:
                replaced = bytes_of(row).copy()
                row.copy_(torch.from_numpy(fresh).view(row.dtype).view(row.shape))
                fresh[:] = replaced

    def digest(self, local: int) -> bytes:
        """Return the digest of what local slot `local` holds."""
        return digest(*(rows.row(local) for rows in self._layout))

    def digest_of(self, data: np.ndarray) -> bytes:
        """Return the digest of the bytes of an expert."""
        return digest(*(data[rows.offset : rows.offset + rows.size] for rows in self._layout))
