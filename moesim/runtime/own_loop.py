"""A training or serving loop of your own as a live deployment: three lines, and `moesim apply` works against it.

    moesim.runtime.spread(model)                                  # each rank keeps its share of the experts; before the optimizer is made
    agent = moesim.runtime.attach(model, optimizer)               # starts the coordinator; agent.control is its HOST:PORT
    while agent.at_step_boundary():                               # once before every step, on all ranks
        …                                                         # your step
    agent.close()

All ranks of the (gloo) group call each of them. The model is a Hugging Face MoE model; tokens differ from rank to rank, all other
weights are held alike, and summing their gradients stays your business. Gradients of replicated experts are summed just before `optimizer.step()`; call
`agent.sum_gradients()` yourself if you clip. Optimizer state moves with the experts; what cannot move is refused when a plan is checked.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from moesim.errors import ApplyError, ModelError, MoesimError, describe
from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan, linear
from moesim.runtime.agent import Agent, Undecided
from moesim.runtime.digest import digest
from moesim.runtime.expert_parallel import ExpertParallelExperts
from moesim.runtime.expert_rows import bytes_of
from moesim.runtime.mesh import own_address
from moesim.runtime.model import facts, moe_layers
from moesim.runtime.slot_map import SlotMap
from moesim.runtime.training import sum_replicas

START_S = 120.0
PROBE_TOKENS = (2, 16)


@dataclass(frozen=True, slots=True)
class _Spread:
    """How a model has been spread."""

    plan: Plan
    layers: list[ExpertParallelExperts]
    group: Any
    rank: int


def spread(model: nn.Module, plan: Plan | None = None, *, group: Any = None, slots_per_rank: int | None = None) -> Plan:
    """Let every rank of `group` keep only the experts of its slots of `model`, in place; return the plan. A call of all ranks.

    plan: default, equal runs of experts per rank. group: a process group with `alltoall_base`; default, all ranks. slots_per_rank: most that a later
    plan may use; default, twice the equal share. Raises ModelError if the experts are of a kind that cannot be moved.
    """
    group = group or dist.distributed_c10d._get_default_group()
    rank, ranks = group.rank(), group.size()
    blocks = moe_layers(model)
    if not blocks:
        raise ModelError(f"{type(model).__name__}: has no MoE layers; give a Hugging Face MoE model")
    experts, layer_ids, _ = facts(model)
    name = str(getattr(model.config, "name_or_path", "") or getattr(model.config, "model_type", "model"))
    plan = plan or linear(model=name, num_experts=experts, moe_layer_ids=layer_ids, num_ranks=ranks)
    plan.check_model(name=name, num_experts=experts, moe_layer_ids=layer_ids)
    held = int(np.bincount(plan.slot_rank_S, minlength=ranks).max())
    capacity = slots_per_rank or max(held, 2 * -(-experts // ranks))
    layers: list[ExpertParallelExperts] = []
    for row, block in enumerate(blocks.values()):
        whole: Any = block.experts
        layers.append(ExpertParallelExperts.dealt(whole, SlotMap.of(plan, row, 0), rank=rank, group=group, slot_capacity=capacity))
        block.experts = layers[-1]
    object.__setattr__(model, "_moesim_spread", _Spread(plan, layers, group, rank))
    return plan


class Attached(Agent):
    """The agent of a loop of your own: it counts steps by itself, and the loop goes on if the coordinator is lost."""

    def __init__(self, spread_out: _Spread, optimizer: torch.optim.Optimizer | None, **connection: Any) -> None:
        super().__init__(rank=spread_out.rank, layers=spread_out.layers, plan=spread_out.plan, **connection)
        self.control = ""
        """HOST:PORT for `moesim apply --to`."""
        self.trains = optimizer is not None
        self._group, self._summed, self._begin_ns = spread_out.group, False, 0
        self._companion: subprocess.Popen[str] | None = None
        self._hooks: list[Any] = []
        self.lost = False
        """Whether the coordinator is gone, and no plan can be applied any more."""
        if optimizer is not None:
            for layer in self.layers:
                layer.rows.attach(optimizer)
            self._hooks = [optimizer.register_step_pre_hook(lambda *_: self._before_optimizer()), optimizer.register_step_post_hook(lambda *_: self._stepped())]

    def at_step_boundary(self) -> bool:
        """Count the step since the last call, carry out what is scheduled for here, and return False when the deployment was told to stop.

        Between `optimizer.step()` and the next backward pass, on all ranks. Raises Undecided if a scheduled decision does not come.
        """
        if self._begin_ns:
            self.count_step(prefill=self.layers[0].tokens, decode=0, start_ns=self._begin_ns)
        try:
            goes_on = super().at_step_boundary()
        except dist.DistError:
            raise Undecided(f"rank {self.rank}: the coordinator was lost while a plan was carried out; start again") from None
        self._begin_ns = time.monotonic_ns()
        return goes_on

    def sum_gradients(self) -> None:
        """Sum the gradients of replicated experts over their ranks; a collective, before clipping. Else it is done by `optimizer.step()`."""
        sum_replicas(self.layers, self._group)
        self._summed = True

    def _before_optimizer(self) -> None:
        if not self._summed:
            self.sum_gradients()
        self._summed = False

    def _stepped(self) -> None:
        for layer in self.layers:
            layer.rows.pending = False

    def _lose(self) -> None:
        self.lost, self._held = True, False

    def _do_detach(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """The coordinator ends in order."""
        self._stopped.set()
        return {}

    def close(self) -> None:
        """Leave the deployment; the loop may go on without it."""
        for hook in self._hooks:
            hook.remove()
        if self._companion is not None and self._companion.stdin is not None:
            with contextlib.suppress(OSError):  # it may have ended by itself
                self._companion.stdin.write("end\n")
                self._companion.stdin.close()
            self._companion.wait(10)
            if self._companion.stdout is not None:
                self._companion.stdout.close()
        super().close()


def attach(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, probe: Callable[[], Any] | None = None, name: str | None = None,
    host: str = "127.0.0.1", port: int = 0, journal: Path | None = None, window: int = 16,
) -> Attached:  # fmt: skip
    """Start the coordinator beside rank 0 and join it on all ranks; a call of all ranks of the group that the model is spread over.

    optimizer: its state moves with the experts, and the ranks stand still while a plan is carried out. probe: returns the outputs for a fixed
    batch, the same at every call (a collective; default: 2 × 16 fixed tokens through `model`, in eval mode). host, port: of the control port
    (0: any), and of the ranks' store; others than this machine's own addresses need MOESIM_TOKEN. window: steps over which balance is measured.
    Raises ModelError if the model is not spread or a tensor with an expert dimension is not registered, ApplyError if the ranks hold different weights.
    """
    found: _Spread | None = getattr(model, "_moesim_spread", None)
    if found is None and optimizer is not None:
        raise ModelError("attach: the optimizer was made for a model that is not spread; call moesim.runtime.spread(model) before making it")
    if found is None:
        spread(model)
        found = model._moesim_spread
    assert found is not None
    own = {id(parameter) for parameter in model.parameters()}
    if optimizer is not None:
        _check_optimizer(optimizer, own, found)
    companion, told = None, [None]
    if found.rank == 0:
        companion, told[0] = _start(_settings(model, found, name, host, port, journal, window))
    _broadcast(told, found)
    store_port = int(str(told[0]))
    fingerprint = _agree(model, found)
    agent = Attached(
        found, optimizer, host=host, port=store_port, fingerprint=fingerprint, probe=_numpy(probe or _default_probe(model, found.rank)),
        bind=own_address(host, store_port),
    )  # fmt: skip
    agent._companion = companion
    for layer in agent.layers:
        layer.rows.tensors()
    agent.start()
    if companion is not None:
        told[0] = _line(companion)["control"]
    _broadcast(told, found)
    agent.control = str(told[0])
    return agent


def _check_optimizer(optimizer: torch.optim.Optimizer, own: set[int], found: _Spread) -> None:
    registered = {id(tensor) for layer in found.layers for tensor in layer.rows.tensors().values()}
    rows = {found.plan.num_experts, *(layer.held_slots for layer in found.layers)}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        if id(parameter) not in own | registered and parameter.ndim > 1 and parameter.shape[0] in rows:
            rule = "has an expert dimension and is not registered"
            raise ModelError(
                describe("optimizer", f"parameter {index}", tuple(parameter.shape), rule, "make the optimizer after spread, register master copies")
            )


def _settings(model: Any, found: _Spread, name: str | None, host: str, port: int, journal: Path | None, window: int) -> dict[str, Any]:
    from moesim.model.hf_config import parse_config

    config = {key: value for key, value in model.config.to_dict().items() if value is not None}
    name = name or found.plan.model
    dtype = str(found.layers[0].dtype).removeprefix("torch.")
    try:
        sha256 = parse_config({**config, "torch_dtype": dtype}, name, name).sha256
    except MoesimError:  # a configuration that the planner does not know has no fingerprint
        sha256 = ""
    spec = {
        "name": name,
        "config": {},
        "dtype": dtype,
        "num_experts": found.plan.num_experts,
        "moe_layer_ids": list(found.plan.moe_layer_ids),
        "sha256": sha256,
    }
    return {
        "spec": spec, "plan": found.plan.stamped(), "size": found.group.size(), "host": host, "port": port, "window": window,
        "journal": None if journal is None else str(journal), "slot_capacity": found.layers[0].slot_capacity,
    }  # fmt: skip


def _start(settings: dict[str, Any]) -> tuple[subprocess.Popen[str], Any]:
    """Start the coordinator; return its process and the port of its store."""
    command = [sys.executable, "-m", "moesim.runtime.companion"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    companion = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    assert companion.stdin is not None
    companion.stdin.write(json.dumps(settings) + "\n")
    companion.stdin.flush()
    return companion, _line(companion)["store"]


def _line(companion: subprocess.Popen[str]) -> dict[str, Any]:
    assert companion.stdout is not None
    text = companion.stdout.readline()
    if not text:
        raise ApplyError("attach: the coordinator did not start; its reason is above")
    answer: dict[str, Any] = json.loads(text)
    return answer


def _broadcast(told: list[Any], found: _Spread) -> None:
    """Give all ranks what rank 0 has: a line of text, over the group of the experts."""
    data = torch.zeros(256, dtype=torch.uint8)
    if found.rank == 0:
        content = str(told[0]).encode()
        data[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    found.group.broadcast(data, 0).wait()
    told[0] = bytes(data.tolist()).rstrip(b"\0").decode()


def _agree(model: nn.Module, found: _Spread) -> str:
    """Return the fingerprint of what all ranks hold alike; raise ApplyError if they do not."""
    own = {id(parameter) for layer in found.layers for parameter in layer.parameters()}
    dense = [name.encode() + digest(bytes_of(value)) for name, value in sorted(model.named_parameters()) if id(value) not in own]
    mine = sha256_hex(canonical_json([found.plan.map_sha256]) + b"".join(dense))
    words = torch.tensor([int(mine[:15], 16)])
    sums = words.clone()
    found.group.allreduce([sums]).wait()
    if int(sums) != found.group.size() * int(words):
        raise ApplyError("attach: the ranks hold different weights outside the experts; load or seed them alike before attaching")
    return mine


def _numpy(probe: Callable[[], Any]) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        with torch.no_grad():
            output = probe()
        return np.asarray(output.detach().float().cpu().numpy() if isinstance(output, torch.Tensor) else output)

    return run


def _default_probe(model: Any, rank: int) -> Callable[[], torch.Tensor]:
    tokens = torch.from_numpy(np.random.Generator(np.random.PCG64([1 << 40, rank])).integers(0, int(model.config.vocab_size), PROBE_TOKENS))

    def probe() -> torch.Tensor:
        was_training = model.training
        model.eval()
        try:
            return torch.as_tensor(model(input_ids=tokens.to(model.device)).logits)
        finally:
            model.train(was_training)

    return probe
