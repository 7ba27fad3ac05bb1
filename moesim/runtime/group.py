"""Gloo process groups bound to one address, made directly on a store so that every migration can have its own."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist


def gloo_group(store: Any, *, rank: int, size: int, timeout_s: float, host: str = "127.0.0.1") -> Any:
    """Return a group of `size` ranks that meet on `store`; every operation fails after `timeout_s` seconds."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout_s)
    return dist.ProcessGroupGloo(store, rank, size, options)
