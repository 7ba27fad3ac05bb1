"""Stage times of one rank: when every layer's attention, router, dispatch, experts and combine ran, step by step.

The clock is always in exactly one stage: entering one ends the one before, so that the stages of a step add up to it and nothing is counted twice. Inside
a torch.profiler window every stage is also a range named `moesim/L{layer}/{stage}`, so that kernels can be joined to stages. Stages are entered by hooks on
the model's modules and by the expert-parallel layer; the host's monotonic clock times them, which on CPU is when the work ran.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moesim.runtime.capture import ROW
from moesim.traces.manifest import STAGES

if TYPE_CHECKING:
    from moesim.runtime.expert_parallel import ExpertParallelExperts

_CODES = {name: code for code, name in enumerate(STAGES)}
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\Z")


class StageClock:
    """Times the stages of the step that is being served."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, int, int, int, int]] = []
        self._open: tuple[int, int, int] | None = None
        self._noted = (0, 0)
        self._range: Any = None

    def start(self) -> None:
        """Forget what was timed, and enter what runs before the layers."""
        self._rows.clear()
        self._open = None
        self.enter(0, "other")

    def enter(self, layer: int, stage: str) -> None:
        """End the current stage and begin `stage` of layer `layer` (its index in the model)."""
        now = self._close()
        self._open = (layer, _CODES[stage], now)
        if torch.autograd._profiler_enabled():  # a range costs microseconds, so only where somebody looks
            self._range = torch.autograd.profiler.record_function(f"moesim/L{layer}/{stage}")
            self._range.__enter__()

    def note(self, nbytes: int, tokens: int) -> None:
        """Say what the current stage moves to other ranks, and how many (token, expert) rows it handles."""
        self._noted = nbytes, tokens

    def take(self, step: int) -> np.ndarray:
        """End the current stage and return the rows of this step, `ROW`."""
        self._close()
        rows = np.empty(len(self._rows), ROW)
        if self._rows:
            for name, values in zip(("layer", "stage", "t_ns", "dur_ns", "bytes", "tokens"), zip(*self._rows, strict=True), strict=True):
                rows[name] = values
        rows["step"] = step
        self._rows.clear()
        return rows

    def _close(self) -> int:
        now = time.monotonic_ns()
        if self._open is not None:
            layer, code, begin = self._open
            self._rows.append((layer, code, begin, now - begin, *self._noted))
            self._open, self._noted = None, (0, 0)
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        return now


def watch(model: nn.Module, experts: Sequence[ExpertParallelExperts], clock: StageClock) -> None:
    """Let the layers of a Hugging Face model enter their stages on `clock`; `experts`: its expert-parallel modules."""
    named = dict(model.named_modules())
    layers = {int(match[1]): name for name in named if (match := _LAYER.match(name)) and hasattr(named[name], "mlp")}
    for layer, name in layers.items():
        _before(named[name], clock, layer, "attention")
        sparse = [module for key, module in named.items() if key.startswith(f"{name}.") and any(module is one for one in experts)]
        _before(named[name].mlp, clock, layer, "router" if sparse else "dense")
        for module in sparse:
            module.stages = clock, layer
        for key, module in named.items():
            if key.startswith(f"{name}.mlp.shared_expert") and key.count(".") == name.count(".") + 2 and "gate" not in key.rpartition(".")[2]:
                _before(module, clock, layer, "shared")
                module.register_forward_hook(lambda *_, layer=layer: clock.enter(layer, "combine"))
    named[layers[max(layers)]].register_forward_hook(lambda *_: clock.enter(len(layers), "other"))


def _before(module: nn.Module, clock: StageClock, layer: int, stage: str) -> None:
    module.register_forward_pre_hook(lambda *_: clock.enter(layer, stage))
