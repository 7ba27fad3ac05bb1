"""Recording a Hugging Face MoE model while it runs: a context manager that hooks the model and writes a `moetrace/1` folder.

Every forward pass of the model is a step: its tokens' requests, positions and phase (0 prefill, 1 decode, 2 train, 3 padding) follow from the call itself,
what was routed from the inputs of every `*.mlp.experts` (hidden [N, H], ids [N, k], weights [N, k]), which are the router's own choice in every family. A
hook copies into buffers that lie on the model's device and does nothing else: on CUDA there is no synchronisation in it, and one asynchronous copy per column
and step on a side stream, read a step later. Memory is bounded by one step and one shard; every `checkpoint_s` the trace is made readable as far as it has got.
Shapes: N tokens of a step, L MoE layers, k choices, E experts.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from moesim import __version__
from moesim.errors import InputError, ModelError, describe
from moesim.plan import Plan, linear
from moesim.runtime.capture_spool import MAX_KERNEL_ROWS, check_target, parallel_facts
from moesim.runtime.capture_step import Column, Step, pinned, real_tokens
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.mesh import Layout, Mesh
from moesim.runtime.model import moe_layers, router_of
from moesim.runtime.stages import CudaStageClock, StageClock, watch
from moesim.runtime.tensor_parallel import SharedTokens
from moesim.traces.manifest import KERNELS_SPEC, STEPS_SPEC, Columns
from moesim.traces.routing_trace import DECODE, PREFILL, TRAIN, TokenBatch, TraceShape
from moesim.traces.writer import TraceWriter

MAX_STEPS = 1 << 22
"""Rows of the step table: 150 MB. Later steps have routes, but no times."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
RANK_REQUESTS = 1 << 40
"""Numbers of requests that one rank may use."""


def shape_of(model: nn.Module, name: str) -> TraceShape:
    """Return what a trace of `model` holds; raise ModelError if it has no MoE layers that are known how to hook."""
    blocks, config = moe_layers(model), model.config
    experts = next((int(getattr(config, key)) for key in EXPERT_COUNTS if getattr(config, key, None)), 0)
    if not blocks or not experts:
        raise ModelError(f"{name}: {type(model).__name__} has no module named experts in its layers, so there is no routing to record; give an MoE model")
    limited = getattr(config, "topk_method", None) != "greedy"
    groups = int(getattr(config, "n_group", None) or 1) if limited else 1
    limits: dict[str, Any] = {"num_groups": groups, "top_k_groups": int(getattr(config, "topk_group", None) or 1)} if groups > 1 else {}
    return TraceShape(model=name, num_experts=experts, top_k=int(config.num_experts_per_tok), moe_layer_ids=tuple(blocks), **limits)


class Capture:
    """Records every forward pass of `model` between entering and leaving.

    Example: `with Capture(model, Path("trace")): model.generate(**inputs)`.
    """

    def __init__(
        self, model: nn.Module, target: Path, *, name: str | None = None, weights: bool | str = False, predictions: bool = False, stages: bool = True,
        rank: int = 0, ranks: int = 1, plan: Plan | None = None, provenance: Mapping[str, Any] | None = None, checkpoint_s: float = 60.0,
    ) -> None:  # fmt: skip
        """Prepare to record to the folder `target`, which must be empty, new or a trace.

        weights: also what the router weighed its choices with; `float16`, `float32`, or True: as precise as the model's parameters. predictions: also what the
        next layer's router says to this layer's hidden state (the first layer's: to the hidden state before its attention). stages: times of attention, router,
        experts … of every layer. rank, ranks: of a distributed run, in which every rank records to a folder of its own (see `capture_join.join`). plan: the map
        and mesh that the ranks serve under, if the experts are spread over them; under tensor parallelism a rank records those tokens that it hands on.
        Raises ModelError if the model has no MoE layers, InputError if `target` holds something else.
        """
        self.model = model
        self.shape = shape_of(model, name or str(getattr(model.config, "model_type", "model")))
        check_target(target)
        self.target, self.rank = target, rank
        self.steps = self.rows = self.incomplete = 0
        """Forward passes, rows written, and passes left out because a layer was not reached."""
        first = next(model.parameters())
        self._dtype = weights if isinstance(weights, str) else "float32" if first.dtype == torch.float32 else "float16"
        if self._dtype not in ("float16", "float32"):
            raise InputError(describe("Capture", "weights", weights, "must be True, False, 'float16' or 'float32'"))
        self._cuda = first.device.type == "cuda"
        blocks = moe_layers(model)
        self._blocks, self._row = list(blocks.values()), {layer: row for row, layer in enumerate(blocks)}
        self._routers = [router_of(block, self.shape.num_experts) for block in self._blocks] if predictions else []
        # Group-limited and bias-corrected routers choose without an order; best first then means by weight.
        unordered = any(hasattr(child, "e_score_correction_bias") for block in self._blocks for child in block.children())
        self._sorts = unordered or hasattr(model.config, "topk_group")
        count, top_k = len(blocks), self.shape.top_k
        narrow = torch.uint8 if self.shape.dtype.itemsize == 1 else torch.int16
        self._columns = {"experts": Column(count, top_k, narrow)}
        if weights or self._sorts:
            self._columns["weights"] = Column(count, top_k, torch.float32 if self._dtype == "float32" else torch.float16)
        if predictions:
            self._columns["predicted"] = Column(count, top_k, narrow)
        self._weights, self._predictions = bool(weights), predictions
        self._clock: StageClock | None = None
        if stages:
            self._clock = CudaStageClock() if self._cuda else StageClock()
        self._checkpoint_s = checkpoint_s
        self._provenance = {"tool": "moesim capture", "version": __version__, "hardware": _hardware(first.device), **(provenance or {})}
        self._spread = [module for module in model.modules() if isinstance(module, ExpertParallelExperts)]
        if plan is None and ranks == 1:
            plan = linear(model=self.shape.model, num_experts=self.shape.num_experts, moe_layer_ids=self.shape.moe_layer_ids, num_ranks=1)
        ranks = ranks if plan is None else plan.num_ranks
        self._mesh = Mesh(layout=Layout(dp=ranks) if plan is None else Layout.of(plan), rank=rank, ep=None)
        self._facts = {"parallel": parallel_facts(ranks, {} if plan is None else {"0": plan.stamped()}), "clock": "CLOCK_MONOTONIC"}
        self._open: Step | None = None
        self._reached: set[int] = set()
        self._pending: deque[tuple[Step, dict[str, torch.Tensor], Any]] = deque()
        self._stream = torch.cuda.Stream(first.device) if self._cuda else None
        self._numbers = self._live = np.zeros(0, np.int64)
        self._next_request = self._mesh.replica * RANK_REQUESTS
        self._cache: tuple[int, int] = (0, 0)
        self._handles: list[Any] = []
        self._step_rows: list[tuple[int, ...]] = []
        self._kernel_rows: list[np.ndarray] = []
        self._kernels_left = MAX_KERNEL_ROWS // ranks
        self._writer: TraceWriter | None = None

    # --- entering and leaving ---------------------------------------------------------------------

    def __enter__(self) -> Capture:
        columns = Columns(weights=self._dtype if self._weights else None, predicted=self._predictions)
        self._writer = TraceWriter(self.target, self.shape, columns=columns, provenance=self._provenance, facts=self._facts)
        self._writer.checkpoint()  # from now on a killed run leaves what says of which model and run its shards are
        self._saved = time.monotonic()
        self._attach()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._spread:
            module.stages = None
        assert self._writer is not None
        failed = kind is not None and not issubclass(kind, KeyboardInterrupt)
        with contextlib.suppress(RuntimeError) if failed else contextlib.nullcontext():  # a lost device fails again here; the first error counts
            while self._pending:
                self._write(*self._pending.popleft())
            self._finish_stages()
        self._add_tables()
        if failed:
            self._writer.checkpoint()  # what was routed until the failure is readable, and marked as unfinished
            return
        self._writer.provenance |= {"steps": self.steps, **({"incomplete_steps": self.incomplete} if self.incomplete else {})}
        self._writer.close()

    def _attach(self) -> None:
        if self._clock is not None:
            self._handles += watch(self.model, self._spread, self._clock)
        for row, block in enumerate(self._blocks):
            experts = block.experts.shared if isinstance(block.experts, SharedTokens) else block.experts
            self._handles.append(experts.register_forward_pre_hook(lambda _, args, kwargs, row=row: self._routed(row, args, kwargs), with_kwargs=True))
        if self._predictions:
            names = [name for name, module in self.model.named_modules() if any(child is self._blocks[0] for child in module.children())]
            self._handles.append(self.model.get_submodule(names[0]).register_forward_pre_hook(self._before_first, with_kwargs=True))
        self._handles.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True))
        self._handles.append(self.model.register_forward_hook(self._end))

    # --- hooks ------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return
        batch, length = int(inputs.shape[0]), int(inputs.shape[1])
        past = self._past(kwargs.get("past_key_values"), length)
        if past == 0 or len(self._live) != batch:
            self._live = self._next_request + np.arange(batch)
            self._next_request += batch
        phase = TRAIN if model.training else DECODE if past and length == 1 else PREFILL
        mask = real_tokens(kwargs.get("attention_mask"), batch, length, past + length)
        self._reached.clear()
        if self._clock is not None:
            self._clock.start()
        self._open = Step(self.steps, self._live, past, length, phase, mask, start_ns=time.monotonic_ns())

    def _past(self, cache: Any, length: int) -> int:
        """Return the tokens that are in a KV cache; a cache of fixed size says so by a tensor on the device, which must not be waited for."""
        if cache is None:
            return 0
        past = cache.get_seq_length()
        if isinstance(past, torch.Tensor) and past.is_cuda:
            known, count = self._cache
            past = count if known == id(cache) else 0
        past = int(past)
        self._cache = id(cache), past + length
        return past

    def _routed(self, row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        step = self._open
        if step is None:  # a recomputation in the backward pass
            return
        values = (*args, *kwargs.values())
        tokens = self._share(step.tokens)
        if len(values) < 3 or len(values[1]) != tokens:
            return
        with torch.no_grad():
            self._columns["experts"].put(row, values[1], tokens)
            if "weights" in self._columns:
                self._columns["weights"].put(row, values[2].detach(), tokens)
            if self._predictions and row + 1 < len(self._routers):
                self._predict(row + 1, values[0])
        self._reached.add(row)

    def _before_first(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            rows = hidden.reshape(-1, hidden.shape[-1])
            self._predict(0, rows[self._mesh.share(len(rows))])

    def _share(self, tokens: int) -> int:
        """Return how many of a step's tokens this rank hands to the experts."""
        part = self._mesh.share(tokens)
        return part.stop - part.start

    def _predict(self, row: int, hidden: torch.Tensor) -> None:
        with torch.no_grad():
            self._columns["predicted"].put(row, self._routers[row](hidden)[2], len(hidden))

    def _end(self, *_: Any) -> None:
        step, self._open = self._open, None
        if step is None:
            return
        if len(self._reached) != len(self._blocks):
            self.incomplete += 1
            return
        self.steps += 1
        tokens = self._share(step.tokens)
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                held = {name: column.host(tokens, self._stream) for name, column in self._columns.items()}
                if step.mask is not None and step.mask.is_cuda:
                    step.mask.record_stream(self._stream)
                    step.mask = pinned(step.mask)
                event.record(self._stream)
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)  # the next step must not overwrite what is being copied
        else:
            held = {name: column.host(tokens, None) for name, column in self._columns.items()}
        step.end_ns = time.monotonic_ns()
        if self._clock is not None:
            self._take(self._clock.take(step.number))
        self._pending.append((step, held, event))
        while len(self._pending) > (1 if self._cuda else 0):
            self._write(*self._pending.popleft())

    # --- writing ----------------------------------------------------------------------------------

    def _write(self, step: Step, held: dict[str, torch.Tensor], event: Any) -> None:
        if event is not None:
            event.synchronize()  # of the step before: over long ago
        cubes = {name: np.ascontiguousarray(value.numpy().swapaxes(0, 1)) for name, value in held.items()}
        experts = cubes["experts"].view(self.shape.dtype)
        if self._sorts:
            order = np.argsort(-cubes["weights"], axis=-1, kind="stable")
            experts, cubes["weights"] = (np.take_along_axis(cube, order, -1) for cube in (experts, cubes["weights"]))
        share = self._mesh.share(step.tokens)
        requests, positions, phases = (column[share] for column in step.columns(None if step.mask is None else step.mask.numpy().astype(bool)))
        tokens = len(requests)
        assert self._writer is not None
        self._writer.append(
            TokenBatch(
                step_T=np.full(tokens, step.number, np.uint32), rank_T=np.full(tokens, self.rank, np.uint16), request_T=requests,
                position_T=positions, phase_T=phases, experts_TLK=experts, weights_TLK=cubes["weights"] if self._weights else None,
                predicted_TLK=cubes["predicted"].view(self.shape.dtype) if self._predictions else None,
            )
        )  # fmt: skip
        self.rows += tokens
        decode = int((phases == DECODE).sum())
        if len(self._step_rows) < MAX_STEPS:
            self._step_rows.append((step.number, self.rank, 0, tokens - decode, decode, step.start_ns, step.end_ns))
        if time.monotonic() - self._saved > self._checkpoint_s:
            self._writer.checkpoint()
            self._saved = time.monotonic()

    def _take(self, rows: np.ndarray) -> None:
        self._kernels_left -= len(rows)
        if self._kernels_left >= 0:
            self._kernel_rows.append(rows)

    def _finish_stages(self) -> None:
        if isinstance(self._clock, CudaStageClock):
            self._take(self._clock.rest())

    def _add_tables(self) -> None:
        assert self._writer is not None
        if self._step_rows:
            self._writer.add_table("steps", {name: np.array(values) for name, values in zip(STEPS_SPEC, zip(*self._step_rows, strict=True), strict=True)})
        rows = np.concatenate(self._kernel_rows) if self._kernel_rows else np.zeros(0, [("step", "<u4")])
        if len(rows):
            table = {name: rows[name] for name in KERNELS_SPEC if name != "rank"}
            self._writer.add_table("kernels", {**table, "rank": np.full(len(rows), self.rank, np.uint16)})


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def overhead(model: nn.Module, run: Any, target: Path, *, pairs: int = 5, **options: Any) -> dict[str, float]:
    """Return the seconds of `run()` without and with recording to the scratch folder `target`, the fastest of `pairs` in turn, and their ratio − 1.

    The fastest, because what else runs on the machine only adds.
    """
    if pairs < 1:
        raise ModelError(describe("overhead", "pairs", pairs, "must be >= 1"))
    times: tuple[list[float], list[float]] = ([], [])
    run()
    for _ in range(pairs):
        begin = time.perf_counter()
        run()
        times[0].append(time.perf_counter() - begin)
        with Capture(model, target, **options):
            begin = time.perf_counter()
            run()
            if next(model.parameters()).is_cuda:
                torch.cuda.synchronize()
            times[1].append(time.perf_counter() - begin)
    without, recording = (min(values) for values in times)
    return {"without_s": without, "recording_s": recording, "overhead": recording / without - 1.0}
