"""The points of one instance shape: every (micro-batches, decode batch, prefill batch), its memory and its optimistic and exact measures.

One pass of m micro-batches through a pipeline takes max(m · slowest stage, all stages and hops): with too few micro-batches stages idle, with one stage
it is the pass itself. A mixed instance of b sequences a replica prefills each of them once per generation, b / (m·c) prefill cycles, and decodes in
between: TTFT = prefill cycle + one decode cycle (the one under way), TPOT = decode cycle + the other sequences' prefill over the generation. A prefill
or decode instance does one of them. Times in seconds, rates in requests per second and instance.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.costs import footprint
from moesim.hardware.cluster import Cluster
from moesim.model.moe_model import MoEModel
from moesim.solvers.parallelism.space import Shape, Space, micro_batches
from moesim.solvers.parallelism.stages import Partition, StageProblem, fits_N, least_overflow, partition
from moesim.solvers.parallelism.step_time import PassTimes
from moesim.solvers.parallelism.workload import Workload

ROLES = ("mixed", "prefill", "decode")
SAFE = 1.0 - 1e-9
"""Factor on optimistic times, against rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """N points of one shape and role."""

    micro_N: np.ndarray
    batch_N: np.ndarray
    """Sequences that decode on a replica; 0 for prefill."""
    prompts_N: np.ndarray
    """Prompts of a prefill micro-batch on a replica; 0 for decode."""

    def __len__(self) -> int:
        return len(self.micro_N)

    def take(self, keep: np.ndarray) -> Points:
        """Return some of the points."""
        return Points(micro_N=self.micro_N[keep], batch_N=self.batch_N[keep], prompts_N=self.prompts_N[keep])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """tpot, ttft (s) and rate (requests/s and instance) of N points."""

    tpot_N: np.ndarray
    ttft_N: np.ndarray
    rate_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Cycle:
    """One pass of m micro-batches: its time, and the busy time of all its stages together (m · all layers and ends)."""

    seconds: float
    busy: float


class PointModel:
    """Enumerates and measures points."""

    def __init__(self, model: MoEModel, cluster: Cluster, workload: Workload, space: Space) -> None:
        self.model, self.cluster, self.workload, self.space = model, cluster, workload, space
        self.capacity = footprint.capacity_bytes(cluster, space.memory_share)
        batches = sorted({batch // micro for batch in space.batch for micro in (*space.micro_batches, 1) if batch % micro == 0})
        self.decode_sizes = np.array(batches, dtype=np.float64)
        """Sequences of a decode micro-batch on a replica, all that occur."""
        self.prefill_sizes = np.array(sorted(space.prefill_batch), dtype=np.float64)

    def points(self, shape: Shape, role: str) -> Points:
        """Return all points of a shape and role, in order: the batch divides into micro-batches, and a mixed prefill cycle does not exceed the batch."""
        rows: list[tuple[int, int, int]] = []
        for micro in micro_batches(self.space, shape.pp):
            batches = [batch for batch in sorted(self.space.batch) if batch % micro == 0] if role != "prefill" else [0]
            prompts = sorted(self.space.prefill_batch) if role != "decode" else [0]
            rows += [(micro, b, c) for b in batches for c in prompts if role != "mixed" or micro * c <= b]
        table = np.array(rows, dtype=np.int64).reshape(-1, 3)
        return Points(micro_N=table[:, 0], batch_N=table[:, 1], prompts_N=table[:, 2])

    # --- memory ---------------------------------------------------------------------------------------------------

    def _demand(self, role: str, points: Points) -> tuple[np.ndarray, int, np.ndarray]:
        """Return sequences held per replica [N], KV entries of each, and tokens of a replica's largest micro-batch [N]."""
        work = self.workload
        if role == "prefill":
            return points.micro_N * points.prompts_N, work.prompt_tokens, points.prompts_N * work.prompt_tokens
        return points.batch_N, work.full_tokens, np.maximum(points.prompts_N * work.prompt_tokens, -(-points.batch_N // points.micro_N))

    def _bytes(self, shape: Shape, role: str, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of every layer [N, L] and beside the layers of every stage [N, S]."""
        group = shape.group
        held, each, tokens = self._demand(role, points)
        layers = footprint.weights_L(self.model, group) + held[:, None] * footprint.kv_L(self.model, group.tp, each)
        extra = np.zeros((len(points), shape.pp))
        extra += (footprint.activation_bytes(self.model, group, tokens) + footprint.staging_bytes(self.model, group, self.space.staging_experts))[:, None]
        first, last = footprint.ends_bytes(self.model, group.tp, shape.pp)
        extra[:, 0] += first
        extra[:, -1] += last
        return layers, extra

    def fits(self, shape: Shape, role: str, points: Points) -> np.ndarray:
        """Return bool [N]: does some partition fit?"""
        layers, extra = self._bytes(shape, role, points)
        return fits_N(layers, extra_NS=extra, capacity=self.capacity)

    def overflow_floor(self, shape: Shape, role: str, points: Points) -> np.ndarray:
        """Return float64 [N]: bytes that the worst stage lacks at least (an even split of everything)."""
        layers, extra = self._bytes(shape, role, points)
        return np.asarray((layers.sum(axis=1) + extra.sum(axis=1)) / shape.pp - self.capacity)

    def missing(self, shape: Shape, role: str, point: Points) -> tuple[float, footprint.StageMemory]:
        """Return the fewest bytes that one point lacks (<= 0: it fits), and the account of the stage that lacks them."""
        layers, extra = self._bytes(shape, role, point)
        stages = shape.pp
        lacking, found = least_overflow(
            StageProblem(
                time_SL=np.zeros((stages, layers.shape[1])),
                time_extra_S=np.zeros(stages),
                memory_SL=np.repeat(layers, stages, axis=0),
                memory_extra_S=extra[0],
                capacity_S=np.full(stages, self.capacity),
            )
        )
        accounts = self.accounts(shape, role, point, found.bounds)
        return lacking, max(accounts, key=lambda one: one.used_bytes)

    def accounts(self, shape: Shape, role: str, point: Points, bounds: tuple[int, ...]) -> tuple[footprint.StageMemory, ...]:
        """Return the account of every stage of one point."""
        held, each, tokens = self._demand(role, point)
        return footprint.stage_accounts(
            self.model,
            shape.group,
            bounds,
            sequences=float(held[0]),
            tokens_each=each,
            pass_tokens=float(tokens[0]),
            staging_experts=self.space.staging_experts,
            capacity=self.capacity,
        )

    # --- measures -------------------------------------------------------------------------------------------------

    def measure(self, shape: Shape, role: str, points: Points, prefill: PassTimes | None, decode: PassTimes | None, handover_s: float = 0.0) -> Measure:
        """Return optimistic measures (exact for one stage): stages are taken to be as even as arithmetic allows.

        handover_s: seconds until a prompt's KV cache has reached the decode pool; prefill only.
        """
        zero = np.zeros(len(points))
        pre = self._optimistic(shape, points.micro_N, prefill, self._at(self.prefill_sizes, points.prompts_N)) if prefill is not None else zero
        dec = self._optimistic(shape, points.micro_N, decode, self._at(self.decode_sizes, points.batch_N / points.micro_N)) if decode is not None else zero
        return self._measure(shape, role, points, pre, dec, handover_s)

    def exact(
        self, shape: Shape, role: str, point: Points, prefill: PassTimes | None, decode: PassTimes | None, handover_s: float = 0.0
    ) -> tuple[Measure, Partition, dict[str, Cycle]]:
        """Return the measures of one point that fits, with the best partition of its layers and the cycle of every phase."""
        micro = int(point.micro_N[0])
        at = {
            "prefill": int(self._at(self.prefill_sizes, point.prompts_N)[0]) if prefill is not None else 0,
            "decode": int(self._at(self.decode_sizes, point.batch_N / point.micro_N)[0]) if decode is not None else 0,
        }
        weight = self._weights(role, point)
        phases = [(name, times) for name, times in (("prefill", prefill), ("decode", decode)) if times is not None]
        times_SL = sum(weight[name] * times.layer_nL[at[name]] for name, times in phases)
        extra_S = sum((weight[name] * self._extra_S(shape, times, at[name]) for name, times in phases), np.zeros(shape.pp))
        layers, extra = self._bytes(shape, role, point)
        found = partition(
            StageProblem(
                time_SL=np.repeat(np.atleast_2d(times_SL), shape.pp, axis=0),
                time_extra_S=extra_S,
                memory_SL=np.repeat(layers, shape.pp, axis=0),
                memory_extra_S=extra[0],
                capacity_S=np.full(shape.pp, self.capacity),
            )
        )
        assert found is not None, "only points that fit are evaluated"
        cycles = {}
        for name, times in phases:
            one = times.layer_nL[at[name]]
            own = np.array([one[low:high].sum() for low, high in zip(found.bounds, found.bounds[1:], strict=False)]) + self._extra_S(shape, times, at[name])
            all_stages = float(times.total_n[at[name]]) + float(self._hops(shape, times)[at[name]])
            seconds = max(micro * float(own.max()), all_stages) if shape.pp > 1 else all_stages
            cycles[name] = Cycle(seconds, micro * float(times.total_n[at[name]]))
        pre, dec = (np.array([cycles[name].seconds if name in cycles else 0.0]) for name in ("prefill", "decode"))
        return self._measure(shape, role, point, pre, dec, handover_s), found, cycles

    def _weights(self, role: str, point: Points) -> dict[str, float]:
        """Return how often each phase passes per generation, by which a mixed instance's stages are balanced."""
        if role != "mixed":
            return {"prefill": 1.0, "decode": 1.0}
        return {"prefill": float(point.batch_N[0] / (point.micro_N[0] * point.prompts_N[0])), "decode": float(self.workload.decode_steps)}

    def _measure(self, shape: Shape, role: str, points: Points, pre: np.ndarray, dec: np.ndarray, handover_s: float) -> Measure:
        steps, replicas = self.workload.decode_steps, shape.group.dp
        zero = np.zeros(len(points))
        if role == "prefill":
            return Measure(tpot_N=zero, ttft_N=pre + handover_s, rate_N=replicas * points.micro_N * points.prompts_N / pre)
        if role == "decode":
            return Measure(tpot_N=dec, ttft_N=zero, rate_N=replicas * points.batch_N / (dec * steps))
        cycles = points.batch_N / (points.micro_N * points.prompts_N)
        generation = cycles * pre + steps * dec
        tpot = dec + (cycles - 1.0) * pre / steps if steps else zero
        return Measure(tpot_N=tpot, ttft_N=pre + (dec if steps else 0.0), rate_N=replicas * points.batch_N / generation)

    def _optimistic(self, shape: Shape, micro_N: np.ndarray, times: PassTimes, at: np.ndarray) -> np.ndarray:
        alone = (times.total_n + self._hops(shape, times))[at]
        if shape.pp == 1:
            return np.asarray(alone)
        longest = times.layer_nL.max(axis=1)[at]
        return np.asarray(np.maximum(alone, micro_N * np.maximum(alone / shape.pp, longest)) * SAFE)

    def _hop_kinds(self, shape: Shape) -> np.ndarray:
        """Return int [S]: 0 or 1 for a hop in the node or to another after a stage; -1 after the last."""
        ranks, node = shape.group.ranks, self.cluster.devices_per_node
        kinds = [int((stage + 1) * ranks % node == 0) for stage in range(shape.pp - 1)]
        return np.array([*kinds, -1])

    def _hops(self, shape: Shape, times: PassTimes) -> np.ndarray:
        kinds = self._hop_kinds(shape)
        return np.asarray((kinds == 0).sum() * times.hop_n[0] + (kinds == 1).sum() * times.hop_n[1])

    def _extra_S(self, shape: Shape, times: PassTimes, at: int) -> np.ndarray:
        extra = np.array([0.0 if kind < 0 else float(times.hop_n[kind][at]) for kind in self._hop_kinds(shape)])
        extra[0] += times.first_n[at]
        extra[-1] += times.last_n[at]
        return extra

    @staticmethod
    def _at(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        return np.searchsorted(sizes, wanted)
