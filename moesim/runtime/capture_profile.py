"""Which kernels ran: a torch.profiler window over a few passes, its kernels joined to the stages of the model's layers.

Seconds over the whole window and all layers. On CUDA a kernel belongs to the stage whose range launched it; without a GPU operators take the place of kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moesim.runtime.stages import StageClock, watch

KEEP = 24
"""Kernels listed, those that took longest."""


def profiled(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the longest kernels of `run()`: stage, name, calls, seconds, and the (token, expert) pairs its experts handled for those of stage `experts`."""
    from torch.profiler import ProfilerActivity, profile

    cuda = next(model.parameters()).is_cuda
    clock = _Ranges()
    handles = [*watch(model, (), clock), model.register_forward_pre_hook(lambda *_: clock.start()), model.register_forward_hook(lambda *_: clock.stop())]
    run()
    clock.pairs = 0
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as window:
            run()
            if cuda:
                torch.cuda.synchronize()
    finally:
        for handle in handles:
            handle.remove()
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0])
    for event in window.events() or ():
        stage = _stage(event)
        if stage is None:
            continue
        parts = [(kernel.name, kernel.duration) for kernel in event.kernels] if cuda else [(event.name, event.self_cpu_time_total)]
        for name, micros in parts:
            cell = found[stage, name]
            cell[0] += 1
            cell[1] += float(micros) * 1e-6
    order = sorted(found, key=lambda key: (-found[key][1], key))[:KEEP]
    rows: list[dict[str, Any]] = []
    for stage, name in order:
        calls, seconds = found[stage, name]
        rows.append({"stage": stage, "name": name[:200], "calls": int(calls), "seconds": seconds})
    return [{**row, "pairs": clock.pairs} if row["stage"] == "experts" else row for row in rows]


class _Ranges(StageClock):
    """Opens the ranges and counts pairs; keeps no times."""

    pairs = 0

    def note(self, nbytes: int, tokens: int) -> None:
        self.pairs += tokens

    def stop(self) -> None:
        self.take(0)


def _stage(event: Any) -> str | None:
    """Return the stage whose range encloses an operator, or None."""
    if event.name.startswith("moesim/"):
        return None
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("moesim/"):
            return str(parent.name.rpartition("/")[2])
        parent = parent.cpu_parent
    return None
