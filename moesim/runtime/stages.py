"""Stage times of one rank: when every layer's attention, router, dispatch, experts and combine ran, step by step.

The clock is always in exactly one stage: entering one ends the one before, so that the stages of a step add up to it and nothing is counted twice. Inside
a torch.profiler window every stage is also a range named `moesim/L{layer}/{stage}`, so that kernels can be joined to stages. Stages are entered by hooks on
the model's modules and by the expert-parallel layer; the host's monotonic clock times them, which on CPU is when the work ran; on CUDA events do.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from moesim.runtime.capture_spool import ROW
from moesim.traces.manifest import STAGES

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

    @property
    def stage(self) -> str | None:
        """Name of the current stage."""
        return None if self._open is None else STAGES[self._open[1]]

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
        self._leave_range()
        return now

    def _leave_range(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None


class CudaStageClock(StageClock):
    """Times stages by CUDA events, without ever waiting for the device: the rows of a step come when its last event has passed."""

    def __init__(self) -> None:
        super().__init__()
        self._marks: list[tuple[int, int, int, int, Any]] = []
        self._waiting: deque[tuple[int, int, list[tuple[int, int, int, int, Any]], Any]] = deque()
        self._begin_ns = 0
        self._mark: Any = None

    def start(self) -> None:
        """Forget what was timed, and enter what runs before the layers."""
        self._marks = []
        self._begin_ns = time.monotonic_ns()
        super().start()

    def take(self, step: int) -> np.ndarray:
        """End the current stage and return the rows of the earlier steps that are over on the device."""
        self._close()
        self._waiting.append((step, self._begin_ns, self._marks, self._event()))
        self._marks = []
        return self._rows_of(lambda end: bool(end.query()))

    def rest(self) -> np.ndarray:
        """Wait for the device and return the rows of all steps that are left."""
        torch.cuda.synchronize()
        return self._rows_of(lambda end: True)

    def _rows_of(self, is_over: Callable[[Any], bool]) -> np.ndarray:
        parts = [np.empty(0, ROW)]
        while self._waiting and is_over(self._waiting[0][3]):
            step, begin_ns, marks, end = self._waiting.popleft()
            events = [*(mark[4] for mark in marks), end]
            at_ns = [begin_ns + int(events[0].elapsed_time(event) * 1e6) for event in events] if marks else []
            rows = np.empty(len(marks), ROW)
            for index, (layer, code, nbytes, tokens, _) in enumerate(marks):
                rows[index] = (step, layer, code, at_ns[index], at_ns[index + 1] - at_ns[index], nbytes, tokens)
            parts.append(rows)
        return np.concatenate(parts)

    @staticmethod
    def _event() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self) -> int:
        if self._open is not None:
            layer, code, _ = self._open
            self._marks.append((layer, code, *self._noted, self._mark))
            self._open, self._noted = None, (0, 0)
        self._mark = self._event()
        self._leave_range()
        return 0


class Spread(Protocol):
    """Experts over several ranks, which enter dispatch, experts and combine by themselves."""

    stages: tuple[StageClock, int] | None
    """The clock, and the layer's index in the model."""


def watch(model: nn.Module, experts: Sequence[Spread], clock: StageClock) -> list[Any]:
    """Let the layers of a Hugging Face model enter their stages on `clock`; return the hooks' handles.

    experts: the model's expert-parallel modules, which know dispatch and combine; any other `experts` is one stage, and what follows it the combine.
    """
    named = dict(model.named_modules())
    layers = {int(match[1]): name for name in named if (match := _LAYER.match(name)) and hasattr(named[name], "mlp")}
    handles: list[Any] = []
    for layer, name in layers.items():
        handles.append(_before(named[name], clock, layer, "attention"))
        spread = [module for key, module in named.items() if key.startswith(f"{name}.") and any(module is one for one in experts)]
        whole = None if spread else getattr(named[name].mlp, "experts", None)
        handles.append(_before(named[name].mlp, clock, layer, "router" if spread or whole is not None else "dense"))
        for module in spread:
            module.stages = clock, layer
        if whole is not None:
            handles.append(whole.register_forward_pre_hook(lambda _, args, kwargs, layer=layer: _experts(clock, layer, args, kwargs), with_kwargs=True))
            handles.append(_after(whole, clock, layer, "combine"))
        for key, module in named.items():
            if key.startswith(f"{name}.mlp.shared_expert") and key.count(".") == name.count(".") + 2 and "gate" not in key.rpartition(".")[2]:
                handles += [_before(module, clock, layer, "shared"), _after(module, clock, layer, "combine")]
    handles.append(_after(named[layers[max(layers)]], clock, len(layers), "other"))
    return handles


def _before(module: nn.Module, clock: StageClock, layer: int, stage: str) -> Any:
    return module.register_forward_pre_hook(lambda *_: clock.enter(layer, stage))


def _after(module: nn.Module, clock: StageClock, layer: int, stage: str) -> Any:
    return module.register_forward_hook(lambda *_: clock.enter(layer, stage))


def _experts(clock: StageClock, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    clock.enter(layer, "experts")
    clock.note(0, int((*args, *kwargs.values())[1].numel()))
