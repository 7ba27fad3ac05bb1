"""Which kernels ran: a torch.profiler window over a few passes, its kernels joined to the stages of the model's layers.

Seconds, tokens and bytes are those of the whole window and all layers. On CUDA a kernel belongs to the stage whose range launched it; without a GPU operators
take the place of kernels. Bytes are those of the tensors that the operator was given, at the width of the model's parameters; what it wrote is not known.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.stages import StageClock, watch

KEEP = 24
"""Kernels listed, those that took longest."""


def profiled(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Return the longest kernels of `run()`: stage, name, calls, seconds, bytes, the tokens that went through the model, and for those of stage `experts` the
    (token, expert) pairs that they handled."""
    from torch.profiler import ProfilerActivity, profile

    first = next(model.parameters())
    cuda, width = first.is_cuda, first.element_size()
    clock = _Ranges()
    spread = [module for module in model.modules() if isinstance(module, ExpertParallelExperts)]
    handles = [
        *watch(model, spread, clock), model.register_forward_pre_hook(clock.begin, with_kwargs=True), model.register_forward_hook(lambda *_: clock.stop()),
    ]  # fmt: skip
    run()
    clock.pairs = clock.tokens = 0
    try:
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], record_shapes=True) as window:
            run()
            if cuda:
                torch.cuda.synchronize()
    finally:
        for handle in handles:
            handle.remove()
        for module in spread:
            module.stages = None
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0, 0.0, 0])
    for event in window.events() or ():
        stage = _stage(event)
        if stage is None:
            continue
        parts = [(kernel.name, kernel.duration) for kernel in event.kernels] if cuda else [(event.name, event.self_cpu_time_total)]
        given = sum(math.prod(shape) for shape in event.input_shapes or () if shape) * width
        for name, micros in parts:
            cell = found[stage, name]
            cell[0] += 1
            cell[1] += float(micros) * 1e-6
            cell[2] += given
    order = sorted(found, key=lambda key: (-found[key][1], key))[:KEEP]
    rows: list[dict[str, Any]] = []
    for stage, name in order:
        calls, seconds, given = found[stage, name]
        rows.append({"stage": stage, "name": name[:200], "calls": int(calls), "seconds": seconds, "tokens": clock.tokens, "bytes": int(given)})
    return [{**row, "pairs": clock.pairs} if row["stage"] == "experts" else row for row in rows]


class _Ranges(StageClock):
    """Opens the ranges and counts tokens and pairs; keeps no times."""

    pairs = tokens = 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens += int(kwargs.get("input_ids", args[0] if args else torch.empty(0)).numel())
        self.start()

    def note(self, nbytes: int, tokens: int) -> None:
        self.pairs += tokens if self.stage == "experts" else 0

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
