"""From a point of the search to a described pool: partition, memory, breakdown of its cycles, and what keeps the next batch out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.plan import Parallel
from moesim.solvers.parallelism.points import PointModel, Points
from moesim.solvers.parallelism.result import Pool
from moesim.solvers.parallelism.space import Shape
from moesim.solvers.parallelism.step_time import PARTS, PassTimes, StepTimer
from moesim.solvers.parallelism.workload import Slo
from moesim.units import format_bytes


@dataclass(frozen=True, slots=True, order=True)
class Choice:
    """One point of one shape."""

    shape: Shape
    micro: int
    batch: int
    prompts: int

    def points(self) -> Points:
        """Return the point as an array of one."""
        return Points(micro_N=np.array([self.micro]), batch_N=np.array([self.batch]), prompts_N=np.array([self.prompts]))


def phases(role: str, timer: StepTimer, model: PointModel, shape: Shape, *, floor: bool = False) -> tuple[PassTimes | None, PassTimes | None]:
    """Return the prefill and decode times of a shape's group, None where the role has no such phase."""
    ask = timer.floor if floor else timer
    prefill = ask(shape.group, "prefill", model.prefill_sizes) if role != "decode" else None
    decode = ask(shape.group, "decode", model.decode_sizes) if role == "decode" or role == "mixed" and timer.workload.decode_steps else None
    return prefill, decode


def describe_pool(choice: Choice, role: str, instances: int, model: PointModel, timer: StepTimer, slo: Slo | None) -> Pool:
    """Return the pool of a point that fits."""
    shape, point = choice.shape, choice.points()
    group = shape.group
    prefill, decode = phases(role, timer, model, shape)
    measure, found, cycles = model.exact(shape, role, point, prefill, decode)
    held = {"prefill": (prefill, model.prefill_sizes, choice.prompts), "decode": (decode, model.decode_sizes, choice.batch / choice.micro)}
    # Cycles per request: a prefill cycle serves micro · prompts per replica, the decode steps of a generation serve the whole batch.
    served = {"prefill": choice.micro * choice.prompts * group.dp, "decode": choice.batch * group.dp / max(timer.workload.decode_steps, 1)}
    parts_ms: dict[str, dict[str, float]] = {}
    spent = dict.fromkeys((*PARTS, "bubble"), 0.0)
    for phase, cycle in cycles.items():
        times, sizes, size = held[phase]
        assert times is not None
        at = int(np.searchsorted(sizes, size))
        # All stages work on all micro-batches; what is left of the instance's cycle is bubbles and hops.
        busy = {name: float(values[at]) * choice.micro / shape.pp for name, values in times.parts.items()}
        busy["bubble"] = max(cycle.seconds - sum(busy.values()), 0.0)
        parts_ms[phase] = {name: 1e3 * value for name, value in busy.items()}
        for name, value in busy.items():
            spent[name] += value * shape.devices / served[phase]
    memory = max(model.accounts(shape, role, point, found.bounds), key=lambda one: one.used_bytes)
    redundant = group.slots * group.ep - timer.model.num_experts if group.slots else 0
    return Pool(
        role=role,
        instances=instances,
        parallel=Parallel(tp=group.tp, ep=group.ep, dp=group.dp, pp=shape.pp, expert_tp=group.expert_tp),
        devices=shape.devices,
        micro_batches=choice.micro,
        batch=choice.batch,
        prefill_batch=choice.prompts,
        slots_per_rank=group.slots,
        redundant_slots=redundant,
        stage_layers=tuple(zip(found.bounds, found.bounds[1:], strict=False)),
        cycle_ms={phase: 1e3 * cycle.seconds for phase, cycle in cycles.items()},
        parts_ms=parts_ms,
        gpu_s_per_request=spent,
        memory=memory,
        next_batch=_next_batch(choice, role, model, timer, slo, float(measure.rate_N[0])),
    )


def _next_batch(choice: Choice, role: str, model: PointModel, timer: StepTimer, slo: Slo | None, rate: float) -> str:
    """Say what keeps the next larger batch out: memory, a service level, or that it is no faster."""
    sizes = model.space.prefill_batch if role == "prefill" else model.space.batch
    now = choice.prompts if role == "prefill" else choice.batch
    larger = sorted(size for size in sizes if size > now and (role == "prefill" or size % choice.micro == 0))
    if not larger:
        return "the declared space has no larger batch"
    batch, prompts = (choice.batch, larger[0]) if role == "prefill" else (larger[0], choice.prompts)
    point = Choice(choice.shape, choice.micro, batch, prompts).points()
    missing, stage = model.missing(choice.shape, role, point)
    if missing > 1.0:
        return f"memory: a batch of {larger[0]} lacks {format_bytes(missing)} on stage {stage.stage} ({format_bytes(stage.kv_bytes)} of KV cache)"
    measure, _, _ = model.exact(choice.shape, role, point, *phases(role, timer, model, choice.shape))
    for name, value, limit in (
        ("TPOT", 1e3 * float(measure.tpot_N[0]), slo.tpot_ms if slo else None),
        ("TTFT", 1e3 * float(measure.ttft_N[0]), slo.ttft_ms if slo else None),
    ):
        if limit is not None and value > limit:
            return f"SLO: a batch of {larger[0]} has a {name} of {value:.4g} ms, the limit is {limit:g} ms"
    faster = float(measure.rate_N[0]) / rate - 1.0
    return f"rate: a batch of {larger[0]} changes the instance's rate by {faster:+.1%}"
