"""One rank of a deployment: finds the coordinator's store, joins the mesh, builds its part of the model, serves until told to stop.

Forked by the launcher, or started by torchrun, srun or anything else that sets RANK and WORLD_SIZE: `python -m moesim.runtime.worker
HOST:PORT` with the address of the store. What to serve is in the store. Exit codes: 0 stopped, 3 failed; the reason
of a failure is left under `down/<rank>` in the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, MoesimError

JOIN_S = 120.0
"""Longest wait for the coordinator's store."""


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, so that no rank is ever left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve_rank(rank: int, host: str, port: int) -> None:
    """Run one rank from start to stop with the settings that the coordinator has put into its store."""
    import torch

    torch.set_num_threads(1)
    store = find_store(host, port)
    store.wait(["settings"], timedelta(seconds=JOIN_S))
    try:
        _serve(rank, host, port, store, json.loads(store.get("settings")))
    except Exception as error:
        reason = str(error) if isinstance(error, MoesimError) else f"{type(error).__name__}: {str(error)[:300]}"
        with contextlib.suppress(Exception):
            store.set(f"down/{rank}", reason)
        raise


def find_store(host: str, port: int) -> Any:
    """Return a client of the coordinator's store; wait up to JOIN_S for it to be there."""
    import torch.distributed as dist

    deadline = time.monotonic() + JOIN_S
    while True:
        try:
            return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
        except RuntimeError as cause:
            if time.monotonic() > deadline:
                raise ApplyError(f"{host}:{port}: no coordinator within {JOIN_S:g} s ({str(cause)[:100]})") from None
            time.sleep(0.2)


def _serve(rank: int, host: str, port: int, store: Any, settings: dict[str, Any]) -> None:
    import torch.distributed as dist

    from moesim.plan import Plan
    from moesim.runtime.agent import Agent
    from moesim.runtime.capture_spool import Spool
    from moesim.runtime.expert_parallel import PeerLost
    from moesim.runtime.mesh import Layout, join, own_address
    from moesim.runtime.model import agree, build_part, fingerprint
    from moesim.runtime.pipeline import Stage
    from moesim.runtime.regroup import Regroup
    from moesim.runtime.serving import Server, Workload, make_probe
    from moesim.runtime.spec import ModelSpec
    from moesim.runtime.stages import StageClock, watch
    from moesim.traces.routing_trace import TraceShape

    spec = ModelSpec(**{**settings["spec"], "moe_layer_ids": tuple(settings["spec"]["moe_layer_ids"])})
    plan = Plan.from_content(settings["plan"], "initial plan")
    layout, address = Layout.of(plan), own_address(host, port)
    mesh = join(dist.PrefixStore("data/0", store), layout, rank=rank, timeout_s=settings["timeout_s"], host=address)
    held = build_part(spec, plan, mesh, slot_capacity=settings["slot_capacity"])
    if settings["checkpoint"] is not None:
        from moesim.runtime.checkpoint import load  # a second of torch that few need

        load(Path(settings["checkpoint"]), held, mesh, spec)
    workload = Workload(**settings["workload"])
    spool, clock, moe_layers = None, None, []
    if settings["spool"] is not None:
        total = settings["num_layers"]
        moe_layers = [sum(layer in layout.layers(stage, total) for layer in spec.moe_layer_ids) for stage in range(layout.pp)]
        if mesh.stage == 0:
            shape = TraceShape(**{**settings["shape"], "moe_layer_ids": tuple(settings["shape"]["moe_layer_ids"])})
            spool = Spool(Path(settings["spool"]), mesh.ep_rank, shape, ranks=layout.ranks)
        if layout.pp == 1:  # a trace knows one set of ranks; with stages, layer times would come from others than the tokens
            clock = StageClock()
            watch(held.model, held.experts, clock)
    stage = Stage(held.model, mesh)
    probe = make_probe(stage, vocab=workload.vocab, seed=workload.seed)
    server = Server(stage, workload, probe=probe, moe_layers=moe_layers, record=None if spool is None else spool.add, clock=clock)
    agent = Agent(
        rank=rank, host=host, port=port, layers=held.experts, plan=plan, fingerprint=agree(store, mesh, fingerprint(held, spec)),
        probe=probe, metrics=server.metrics, save=lambda folder: _save(folder, held, stage.mesh, spec), bind=address,
    )  # fmt: skip
    agent.start()
    regroup = Regroup(store, settings, spec, held, mesh, agent, server, address)
    try:
        while True:
            try:
                server.run(agent)
                break
            except PeerLost as error:
                if settings["on_death"] == "stop":
                    raise
                regroup.after(error)
    finally:
        agent.close()
        if spool is not None:
            spool.close()


def _save(folder: str, held: Any, mesh: Any, spec: Any) -> None:
    from moesim.runtime.checkpoint import save

    save(Path(folder), held, mesh, spec)


def run(rank: int, host: str, port: int) -> int:
    """Serve as `rank` of the deployment whose store is at `host`:`port`; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        serve_rank(rank, host, port)
        return 0
    except MoesimError as error:
        print(f"moesim: rank {rank}: {error}", file=sys.stderr, flush=True)
    except Exception:
        print(f"moesim: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 3


if __name__ == "__main__":
    from moesim.runtime.control import parse_address

    die_with_parent()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os._exit(run(int(os.environ["RANK"]), *parse_address(sys.argv[1])))
