"""A small serving loop: a deterministic stream of requests through the real model, prefill then decode, on every rank.

Requests are numbered 0, 1, 2 …; wave w gives data-parallel replica r of R the requests (w·R + r)·B … + B − 1. A wave is one
prefill step of P tokens per request and D decode steps, greedy, with the model's own KV cache; all ranks are in the same step
of the same wave, because every MoE layer is an exchange among them. Prompts are Zipf-distributed token ids seeded by the request,
so the same requests give the same answers whatever the placement; a SHA-256 per wave over the answers says so.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moesim.runtime.agent import Agent
from moesim.runtime.mesh import Mesh
from moesim.runtime.pipeline import Stage
from moesim.runtime.stages import StageClock

PREFILL, DECODE = 0, 1
KEEP_WAVES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The stream of requests; the same on all ranks."""

    ranks: int
    """R, data-parallel replicas."""
    vocab: int
    seed: int = 0
    batch: int = 8
    """Requests in flight per replica."""
    prompt: int = 32
    """Tokens per prompt."""
    decode: int = 16
    """Tokens generated after the first."""
    repeat: int = 0
    """Waves after which the stream starts again; 0: never."""
    drift: int = 0
    """Waves after which other tokens become the popular ones; 0: never."""
    pace_ms: float = 0.0
    """Shortest time of a step."""

    @property
    def wave_steps(self) -> int:
        """Steps of one wave."""
        return 1 + self.decode

    def requests(self, wave: int, rank: int) -> np.ndarray:
        """Return the numbers of the requests that replica `rank` serves in wave `wave`."""
        return (wave * self.ranks + rank) * self.batch + np.arange(self.batch)

    def prompts(self, wave: int, rank: int) -> np.ndarray:
        """Return int64 [B, P]: the prompts of those requests."""
        content = wave % self.repeat if self.repeat else wave
        rows = [np.random.Generator(np.random.PCG64([self.seed, int(number)])).zipf(1.2, self.prompt) for number in self.requests(content, rank)]
        shift = content // self.drift * (self.vocab // 7 + 1) if self.drift else 0
        return (np.stack(rows) - 1 + shift) % self.vocab


def request_id(numbers: np.ndarray) -> np.ndarray:
    """Return the uint64 ids under which requests appear in a trace: a one-to-one mix of their numbers."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


class Server:
    """Serves waves on one rank until the agent says stop."""

    def __init__(
        self, stage: Stage, workload: Workload, *, probe: Callable[[], np.ndarray], moe_layers: Sequence[int] = (),
        record: Callable[..., None] | None = None, clock: StageClock | None = None,
    ) -> None:  # fmt: skip
        """probe: runs a fixed batch through the model (a collective; once at the start).

        record: called in the first pipeline stage after every step with what was routed and when (see `capture.Spool.add`). moe_layers: how
        many MoE layers each pipeline stage has, if routes are recorded. clock: times the parts of every step.
        """
        self.stage, self.workload, self._record, self._stages = stage, workload, record, clock
        self._moe_layers = list(moe_layers)
        self.replica, self.probe, self.first_probe = stage.mesh.replica, probe, probe()
        self.served, self.waves, self._chain = 0, 0, hashlib.sha256()
        self._chain_before = self._chain
        self.digests: deque[tuple[int, str]] = deque(maxlen=KEEP_WAVES)

    def metrics(self) -> dict[str, Any]:
        """Return how many requests were answered, in which waves, and the digest of every wave's answers."""
        return {"requests": self.served, "waves": self.waves, "wave_digests": list(self.digests), "answers_sha256": self._chain.hexdigest()}

    def regroup(self, mesh: Mesh, *, wave: int) -> None:
        """Serve on in a smaller mesh, the requests of the same replica as before, from the start of `wave`: this one or the one before."""
        self.stage.mesh, self._record = mesh, None  # a trace has a fixed set of ranks
        if wave < self.waves:
            self.digests.pop()
            self._chain, self.served, self.waves = self._chain_before, self.served - self.workload.batch, wave

    @torch.inference_mode()
    def run(self, agent: Agent) -> None:
        """Serve until `agent` stops the loop."""
        while self._wave(agent):
            pass

    def _wave(self, agent: Agent) -> bool:
        work = self.workload
        numbers = work.requests(self.waves, self.replica)
        tokens = torch.from_numpy(work.prompts(self.waves, self.replica))
        cache, answers = None, []
        for index in range(work.wave_steps):
            if not agent.at_step_boundary():
                return False
            start_ns = time.monotonic_ns()
            if self._stages is not None:
                self._stages.start()
            tokens, cache = self.stage.next_tokens(tokens, cache)
            positions = np.arange(work.prompt) if index == 0 else np.array([work.prompt + index - 1])
            epoch, step = agent.epoch, agent.step
            answers.append(tokens.numpy())
            timed = None if self._stages is None else self._stages.take(step)
            rest = work.pace_ms / 1e3 - (time.monotonic_ns() - start_ns) / 1e9
            if rest > 0:
                time.sleep(rest)
            share = self.stage.mesh.share(work.batch * len(positions))
            count = share.stop - share.start
            agent.count_step(prefill=count if index == 0 else 0, decode=count if index else 0, start_ns=start_ns)
            captured = self.stage.collect(torch.stack([layer.captured for layer in agent.layers]), self._moe_layers) if self._moe_layers else ()
            if self._record is not None:
                self._record(
                    step=step, epoch=epoch, phase=PREFILL if index == 0 else DECODE, requests=np.repeat(request_id(numbers), len(positions))[share],
                    positions=np.tile(positions, work.batch)[share], experts_LNk=captured, start_ns=start_ns, end_ns=time.monotonic_ns(),
                    plan=agent.plan, stages=timed,
                )  # fmt: skip
        content = np.concatenate(answers, axis=1).astype("<i4").tobytes()
        self.digests.append((self.waves, hashlib.sha256(content).hexdigest()[:16]))
        self._chain_before = self._chain.copy()
        self._chain.update(content)
        self.served += work.batch
        self.waves += 1
        return True


def make_probe(stage: Stage, *, vocab: int, seed: int = 0, batch: int = 2, length: int = 16) -> Callable[[], np.ndarray]:
    """Return a function that runs a fixed batch through the model, the same every time, and returns this stage's output."""
    tokens = torch.from_numpy(np.random.Generator(np.random.PCG64([seed, 1 << 40, stage.mesh.replica])).integers(0, vocab, (batch, length)))

    def probe() -> np.ndarray:
        with torch.inference_mode():
            return np.asarray(stage(tokens)[0].float().numpy())

    return probe
