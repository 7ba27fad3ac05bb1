"""A deployment inside the test's own process: real coordinator, agents, journal and control port, one thread per rank.

It starts in a moment and its parts can be reached, which is what the tests of refusals need. Deaths are for real processes (`live`, `grid`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.plan import Plan, linear
from moesim.runtime.agent import LEASE, Agent
from moesim.runtime.control import ControlServer
from moesim.runtime.coordinator import Coordinator
from moesim.runtime.deployment import Deployment
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.group import gloo_group
from moesim.runtime.journal import Journal
from moesim.runtime.model import build_distributed
from moesim.runtime.spec import ModelSpec

EXPERTS, LAYERS, RANKS = 8, (0, 1), 2
CONFIG = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": 64, "pad_token_id": None, "eos_token_id": 2, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip
SPEC = ModelSpec(name="toy", config=CONFIG, num_experts=EXPERTS, moe_layer_ids=LAYERS, top_k=2, sha256="5" * 64)


def plan_of(seed: int | None = None, **changes: Any) -> Plan:
    """Return blocks of experts, or a random permutation."""
    fields = {"model": "toy", "num_experts": EXPERTS, "moe_layer_ids": LAYERS, "num_ranks": RANKS, **changes}
    return linear(**fields) if seed is None else linear(**fields, kind="random", seed=seed)


class Inside:
    """Two ranks that serve, and their coordinator."""

    def __init__(self, journal: Path, *, token: str = "", answer_s: float = 3.0, slot_capacity: int = 8) -> None:
        self.plan = plan_of()
        self.deployment = Deployment("127.0.0.1", RANKS, answer_s=answer_s)
        self.deployment.pids = [os.getpid()] * RANKS
        self.journal = Journal(journal)
        self.journal.append("start", plan=self.plan.stamped())
        self.coordinator = Coordinator(
            self.deployment, spec=SPEC, plan=self.plan, slot_capacity=slot_capacity, window=2, journal=self.journal, publish=lambda: None,
        )  # fmt: skip
        self.control = ControlServer("127.0.0.1", 0, self.coordinator.handle, token=token)
        self.address = f"127.0.0.1:{self.control.port}"
        self.agents: dict[int, Agent] = {}
        self.layers: dict[int, list[ExpertParallelExperts]] = {}
        self.outputs: dict[int, list[bytes]] = {rank: [] for rank in range(RANKS)}
        self.errors: list[BaseException] = []
        self._slot_capacity = slot_capacity
        self._threads = [threading.Thread(target=self._rank, args=(rank,), daemon=True) for rank in range(RANKS)]
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 60
        while len(self.agents) < RANKS or min(agent.step for agent in self.agents.values()) < 4:
            assert time.monotonic() < deadline and not self.errors, self.errors
            time.sleep(0.01)
        self.control.start()

    def _rank(self, rank: int) -> None:
        try:
            store = dist.TCPStore("127.0.0.1", self.deployment.store.port, is_master=False)
            group = gloo_group(dist.PrefixStore("data", store), rank=rank, size=RANKS, timeout_s=20)
            _, layers = build_distributed(SPEC, self.plan, rank=rank, group=group, slot_capacity=self._slot_capacity)
            generator = torch.Generator().manual_seed(rank)
            hidden, scores = torch.randn(12, 32, generator=generator), torch.randn(12, EXPERTS, generator=generator)
            weights, chosen = torch.topk(torch.softmax(scores, 1), 2)

            def forward() -> np.ndarray:
                with torch.inference_mode():
                    return np.stack([layer(hidden, chosen, weights).numpy() for layer in layers])

            agent = Agent(
                rank=rank, host="127.0.0.1", port=self.deployment.store.port, layers=layers, plan=self.plan, fingerprint="f" * 64, probe=forward,
            )  # fmt: skip
            agent.start()
            self.agents[rank], self.layers[rank] = agent, layers
            while agent.at_step_boundary():
                begin = time.monotonic_ns()
                self.outputs[rank].append(forward().tobytes())
                agent.count_step(prefill=0, decode=12, start_ns=begin)
                time.sleep(0.002)
        except BaseException as error:
            self.errors.append(error)

    def serves(self) -> bool:
        """Return whether both ranks go on stepping, for longer than an open decision lets them, in one epoch and give the answers that they gave at first."""
        before = [agent.step for agent in self.agents.values()]
        deadline = time.monotonic() + 20
        while any(agent.step < old + LEASE + 2 for agent, old in zip(self.agents.values(), before, strict=True)):
            if time.monotonic() > deadline or self.errors:
                return False
            time.sleep(0.005)
        return len({agent.epoch for agent in self.agents.values()}) == 1 and all(len({*outputs[:1], *outputs[-2:]}) == 1 for outputs in self.outputs.values())

    def maps(self) -> set[str]:
        """Return the maps that ranks, coordinator and journal name."""
        named = self.journal.installed()
        return {agent.plan.map_sha256 for agent in self.agents.values()} | {self.coordinator.plan.map_sha256, named.map_sha256 if named else ""}

    def close(self) -> None:
        """Stop the ranks."""
        with contextlib.suppress(Exception):
            self.deployment.schedule("stop", timeout_s=5.0)
        for agent in self.agents.values():
            agent.close()
        for thread in self._threads:
            thread.join(10)
        self.control.close()
        self.journal.close()


@contextlib.contextmanager
def inside(folder: Path, **settings: Any) -> Iterator[Inside]:
    """Start a deployment and stop it at the end."""
    started = Inside(folder / "journal", **settings)
    try:
        yield started
    finally:
        started.close()
