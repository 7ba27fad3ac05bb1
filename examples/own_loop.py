"""Training in a loop of your own while `moesim apply` moves experts, with their Adam moments, between the ranks.

    python examples/own_loop.py --ranks 4 --steps 200          # prints {"control": "HOST:PORT"}
    moesim apply plan.json --to HOST:PORT                      # in another terminal; training goes on

or under torchrun: `torchrun --nproc-per-node 4 examples/own_loop.py --steps 200`. The three lines that matter carry an arrow. The loss is
the same, bit for bit, with and without a plan that permutes the experts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig

import moesim.runtime

EXPERTS, LAYERS, VOCABULARY = 8, (0, 1), 64


def make_model() -> Any:
    """Return a small Mixtral with random weights, the same on all ranks."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32, intermediate_size=16, num_hidden_layers=len(LAYERS), num_attention_heads=4, num_key_value_heads=2, vocab_size=VOCABULARY,
        num_local_experts=EXPERTS, num_experts_per_tok=2, pad_token_id=None, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def batch(step: int, rank: int) -> torch.Tensor:
    """Return int64 [4, 17]: token sequences that count on from a random start."""
    start = torch.randint(VOCABULARY, (4, 1), generator=torch.Generator().manual_seed(1000 * step + rank))
    return (start + torch.arange(17)) % VOCABULARY


def train(steps: int, *, attached: bool = True, pace_s: float = 0.0) -> list[float]:
    """Train on this rank of the default process group; return the loss of every step, summed over the ranks."""
    model = make_model()
    moesim.runtime.spread(model)  # each rank keeps its share of the experts
    experts = {id(parameter) for name, parameter in model.named_parameters() if ".experts." in name}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in experts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    agent = moesim.runtime.attach(model, optimizer, name="own-loop", window=4) if attached else None  # <-
    if agent is not None and dist.get_rank() == 0:
        print(json.dumps({"control": agent.control}), flush=True)
    losses = []
    for step in range(steps):
        if agent is not None and not agent.at_step_boundary():  # <-
            break
        tokens = batch(step, dist.get_rank())
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter in dense:
            dist.all_reduce(parameter.grad)
        optimizer.step()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(float(total))
        time.sleep(pace_s)
    if agent is not None:
        agent.close()  # <-
    return losses


def _rank(rank: int, size: int, port: int, steps: int, pace_s: float) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    losses = train(steps, pace_s=pace_s)
    if rank == 0:
        print(json.dumps({"losses": losses}), flush=True)
    dist.destroy_process_group()


def main() -> None:
    """Start the ranks, or be one of torchrun's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds to wait after a step")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        losses = train(arguments.steps, pace_s=arguments.pace)
        if dist.get_rank() == 0:
            print(json.dumps({"losses": losses}), flush=True)
        dist.destroy_process_group()
        return
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    from torch.multiprocessing.spawn import start_processes

    start_processes(_rank, (arguments.ranks, port, arguments.steps, arguments.pace), nprocs=arguments.ranks, start_method="fork")


if __name__ == "__main__":
    sys.exit(main())
