"""The layers of a model as the runtime serves them: every stage timed in the step that it is part of, while all ranks take the same step.

Kernels timed one by one leave out what a step pays around them: the model's Python, small operators, the agent's thread, and ranks that arrive late
because they share cores. A rehearsal has them all. Its tokens are random, its routing even by construction (every rank receives as many rows, over a set
number of experts), so waiting within an exchange is what the machine costs, not what a placement costs. Nothing of any deployment's run enters.
Shapes: N tokens of a rank, k choices, E experts, R ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.plan import linear
from moesim.runtime.agent import Agent
from moesim.runtime.capture_spool import Spool
from moesim.runtime.mesh import Mesh
from moesim.runtime.model import build_part
from moesim.runtime.pipeline import Stage
from moesim.runtime.serving import Server, Workload
from moesim.runtime.spec import ModelSpec
from moesim.runtime.stages import StageClock, watch
from moesim.traces.manifest import STAGES
from moesim.traces.routing_trace import TraceShape

SEED = 1 << 40
"""Of the made-up requests; no deployment's own."""
MAX_PREFILL = 1024
"""Most tokens of a prefill step on a rank."""
LOCAL = {"attention": "attention", "router": "gate", "dense": "dense_ffn", "shared": "shared_experts"}
"""Stage of the clock → operator of the cost model, for what a rank does by itself."""
Row = dict[str, Any]


def spec_of(settings: Mapping[str, Any]) -> ModelSpec:
    """Return the model that the settings of a calibration name."""
    return ModelSpec(**{**settings["spec"], "moe_layer_ids": tuple(settings["spec"]["moe_layer_ids"])})


class Rehearsal:
    """A rank of a deployment that serves made-up requests: the serving loop, its agent and its recorder are the runtime's own."""

    def __init__(self, settings: Mapping[str, Any], *, group: Any, rank: int, address: tuple[str, int]) -> None:
        """settings: of the calibration. address: of the ranks' store."""
        spec, size = spec_of(settings), int(settings["ranks"])
        plan = linear(model=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids, num_ranks=size)
        mesh = Mesh.flat(rank=rank, size=size, group=group if size > 1 else None)
        held = build_part(spec, plan, mesh)
        self._spec, self._rank, self._size, self._wanted = spec, rank, size, settings["rehearsal"]
        self._decodes, self._warm = int(self._wanted["decodes"]), False
        self._config, self._moe_layers, self._last = held.model.config, [len(held.experts)], len(held.layers)
        self._stage, self._clock, self._active = Stage(held.model, mesh), StageClock(), spec.num_experts // size
        watch(held.model, held.experts, self._clock)
        for module in held.experts:
            module.register_forward_pre_hook(lambda _, args: (args[0], self._ids(args[0].shape[0]), args[2]))
        shape = TraceShape(model=spec.name, num_experts=spec.num_experts, top_k=spec.top_k, moe_layer_ids=spec.moe_layer_ids)
        self._spool = Spool(Path(settings["folder"], "trace"), rank, shape, ranks=size)
        self._routed: dict[tuple[int, int], torch.Tensor] = {}
        host, port = address
        self._agent = Agent(rank=rank, host=host, port=port, layers=held.experts, plan=plan, fingerprint="", probe=lambda: np.zeros(0))

    def __enter__(self) -> Rehearsal:
        self._agent.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._agent.close()
        self._spool.close()

    def sizes(self) -> list[tuple[int, int]]:
        """Return the (requests, prompt length) to be measured, on every rank."""
        longest = int(getattr(self._config, "max_position_embeddings", MAX_PREFILL)) - self._decodes
        every = [(batch, length) for length in self._wanted["lengths"] for batch in self._wanted["batches"]]
        return [(batch, length) for batch, length in every if batch * length <= MAX_PREFILL and length <= longest]

    def units(self, is_late: Callable[[], bool]) -> Iterator[Callable[[], list[Row]]]:
        """Yield rounds; is_late: True (on all ranks alike) once time is short, and rounds are left out.

        A round is a wave of every size: what else the machine does for some seconds is then in all sizes alike, and not in one of them.
        """
        for number in range(int(self._wanted["rounds"])):
            yield partial(self._round, number, is_late)

    def _round(self, number: int, is_late: Callable[[], bool]) -> list[Row]:
        if number and is_late():
            return []
        found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
        for batch, length in self.sizes():
            if not self._warm:
                self._wave(batch, length, number, defaultdict(list))
            self._wave(batch, length, number, found)
        self._warm = True
        return [{"kind": kind, "keys": dict(keys), "samples": samples} for (kind, *keys), samples in found.items()]

    def _wave(self, batch: int, length: int, number: int, found: dict[tuple[Any, ...], list[float]]) -> None:
        local = self._spec.num_experts // self._size
        spread = [active for active in dict.fromkeys((local, max(local // 2, 1), max(local // 4, 1))) if active * self._size >= self._spec.top_k]
        self._active = spread[number % len(spread)]

        def record(**step: Any) -> None:
            self._spool.add(**step)
            sizes = {"batch": batch, "tokens": len(step["requests"]), "context": length + (self._decodes + 1) // 2 if step["phase"] else length}
            self._book(found, step["stages"], phase="decode" if step["phase"] else "prefill", **sizes)

        workload = Workload(ranks=self._size, vocab=int(self._config.vocab_size), seed=SEED + number, batch=batch, prompt=length, decode=self._decodes)
        Server(self._stage, workload, probe=lambda: np.zeros(0), moe_layers=self._moe_layers, record=record, clock=self._clock)._wave(self._agent)

    def _ids(self, tokens: int) -> torch.Tensor:
        key = tokens, self._active
        if key not in self._routed:  # made once, because the time is booked to the router
            local = self._spec.num_experts // self._size
            self._routed[key] = even_ids(tokens, self._spec.top_k, active=self._active, local=local, ranks=self._size, rank=self._rank)
        return self._routed[key]

    def _book(self, found: dict[tuple[Any, ...], list[float]], rows: np.ndarray, *, phase: str, batch: int, tokens: int, context: int) -> None:
        spec, pairs = self._spec, tokens * self._spec.top_k
        sizes = {"phase": phase, "batch_size": batch, "num_tokens": tokens, "context": context}
        for layer, code, duration in zip(rows["layer"].tolist(), rows["stage"].tolist(), (rows["dur_ns"] * 1e-9).tolist(), strict=True):
            stage = STAGES[code]
            if stage in ("dispatch", "combine"):
                if self._size == 1:
                    continue
                away = pairs * (self._size - 1) // self._size * self._config.hidden_size * (2 if spec.dtype == "bfloat16" else 4)
                keys = {"stage": stage, "tokens": tokens, "up_bytes": away}
                kind = "exchange"
            elif stage == "experts":
                used = min(self._active, pairs)
                kind, keys = "grouped_gemm", {"slots": used, "active": used, "assignments": pairs}
            else:
                operator = LOCAL.get(stage) or ("embedding" if layer < self._last else "head")
                kind, keys = "stage", {"operator": operator, **sizes}
            found[(kind, *keys.items())].append(duration)


def even_ids(tokens: int, top_k: int, *, active: int, local: int, ranks: int, rank: int) -> torch.Tensor:
    """Return int64 [N, k]: distinct choices that give every rank as many rows, spread over its first `active` of `local` experts.

    Ranks start at different places of the same round, so that together they fill it.
    """
    turn = torch.arange(active * ranks)
    order = (turn % ranks) * local + turn // ranks
    return order[(torch.arange(tokens * top_k) + rank * tokens * top_k) % len(order)].view(tokens, top_k)
