"""What a recorder holds of one forward pass: whose tokens it had, and the buffers on the model's device that its hooks copy into.

Nothing here waits for a device: what has to be read on the host is copied there by a side stream and looked at a step later.
Shapes: B sequences, L MoE layers, k choices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moesim.runtime.serving import request_id
from moesim.traces.routing_trace import DUMMY


@dataclass(slots=True)
class Step:
    """What is known of a step when it begins."""

    number: int
    requests_B: np.ndarray
    past: int
    length: int
    phase: int
    mask: torch.Tensor | None
    start_ns: int
    end_ns: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of the whole batch, padding included."""
        return len(self.requests_B) * self.length

    def columns(self, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return request, position and phase of every token; mask: bool [B, past + length], False where there is padding."""
        batch, length = len(self.requests_B), self.length
        phases = np.full((batch, length), self.phase, np.uint8)
        positions = np.broadcast_to(self.past + np.arange(length), (batch, length))
        if mask is not None:
            phases[~mask[:, -length:]] = DUMMY
            positions = np.maximum(np.cumsum(mask, axis=1)[:, -length:] - 1, 0)
        return np.repeat(request_id(self.requests_B), length), positions.reshape(-1).astype(np.uint32), phases.reshape(-1)


class Column:
    """One value per token, layer and choice, [L, capacity, k], where the model computes."""

    def __init__(self, layers: int, top_k: int, dtype: torch.dtype) -> None:
        self._layers, self._top_k, self._dtype = layers, top_k, dtype
        self._buffer: torch.Tensor | None = None

    def put(self, row: int, values: torch.Tensor, tokens: int) -> None:
        """Copy the values [tokens, k] of one layer; on the device, without waiting for it."""
        if self._buffer is None or self._buffer.shape[1] < tokens:
            with torch.inference_mode(False):  # or it could not be written outside of inference mode, in training
                fresh = torch.empty((self._layers, tokens, self._top_k), dtype=self._dtype, device=values.device)
            self._buffer = fresh
        self._buffer[row, :tokens].copy_(values)

    def host(self, tokens: int, stream: Any) -> torch.Tensor:
        """Return a host copy [L, tokens, k]; under a CUDA `stream` it is filled when that stream gets there."""
        assert self._buffer is not None
        part = self._buffer[:, :tokens]
        return part.clone() if stream is None else pinned(part)


def pinned(value: torch.Tensor) -> torch.Tensor:
    """Return a host copy that is filled when the current stream gets there."""
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    pinned.copy_(value.contiguous(), non_blocking=True)
    return pinned


def real_tokens(mask: Any, batch: int, length: int, total: int) -> torch.Tensor | None:
    """Return which tokens are no padding, [B, total], from the mask that the model was given; None if it does not say.

    With a cache of fixed size that is a mask of four dimensions: what the last token may look at, where it may look at everything before it.
    """
    mask = mask.get("full_attention") if isinstance(mask, Mapping) else mask
    if not isinstance(mask, torch.Tensor) or mask.ndim not in (2, 4):
        return None
    if mask.ndim == 4:
        seen = mask[:, 0, -1]
        mask = seen if seen.dtype == torch.bool else seen > -1
    mask = mask[:, :total]
    return mask if mask.shape[0] == batch and mask.shape[1] >= length else None
