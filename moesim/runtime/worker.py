"""One rank of a deployment: joins the group, builds its part of the model, serves until it is told to stop.

Started by fork from the launcher, or by `torchrun … -m moesim.runtime.worker` with the same settings in the JSON file
that MOESIM_WORKER names. Exit codes: 0 stopped, 3 failed; the reason of a failure is left under `down/<rank>` in the store.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from moesim.errors import MoesimError


def die_with_parent() -> None:
    """Ask the kernel (Linux) to kill this process when its parent ends, so that no rank is ever left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def serve_rank(rank: int, settings: dict[str, Any]) -> None:
    """Run one rank from start to stop; `settings` is what `launch.settings_of` makes."""
    import torch
    import torch.distributed as dist

    from moesim.plan import Plan
    from moesim.runtime.agent import Agent
    from moesim.runtime.capture import Spool
    from moesim.runtime.group import gloo_group
    from moesim.runtime.model import build_distributed, fingerprint
    from moesim.runtime.serving import Server, Workload, make_probe
    from moesim.runtime.spec import ModelSpec
    from moesim.runtime.stages import StageClock, watch
    from moesim.traces.routing_trace import TraceShape

    torch.set_num_threads(1)
    host, port, size = settings["host"], settings["store_port"], settings["ranks"]
    store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=60))
    group = gloo_group(dist.PrefixStore("data/0", store), rank=rank, size=size, timeout_s=settings["timeout_s"], host=host)
    spec = ModelSpec(**{**settings["spec"], "moe_layer_ids": tuple(settings["spec"]["moe_layer_ids"])})
    plan = Plan.from_content(settings["plan"], "initial plan")
    model, layers = build_distributed(spec, plan, rank=rank, group=group, slot_capacity=settings["slot_capacity"])
    workload = Workload(**settings["workload"])
    spool = None
    if settings["spool"] is not None:
        shape = TraceShape(**{**settings["shape"], "moe_layer_ids": tuple(settings["shape"]["moe_layer_ids"])})
        spool = Spool(Path(settings["spool"]), rank, shape, ranks=size)
    clock = None
    if spool is not None:
        clock = StageClock()
        watch(model, layers, clock)
    server = Server(model, workload, rank=rank, record=None if spool is None else spool.add, stages=clock)
    probe = make_probe(model, rank=rank, vocab=workload.vocab, seed=workload.seed)
    agent = Agent(rank=rank, host=host, port=port, layers=layers, plan=plan, fingerprint=fingerprint(model, spec), probe=probe, metrics=server.metrics)
    agent.start()
    try:
        server.run(agent)
    except Exception as error:
        reason = str(error) if isinstance(error, MoesimError) else f"{type(error).__name__}: {str(error)[:300]}"
        with contextlib.suppress(Exception):
            store.set(f"down/{rank}", reason)
        raise
    finally:
        agent.close()
        if spool is not None:
            spool.close()


def run(rank: int, settings: dict[str, Any]) -> int:
    """Serve as `rank`; return the exit code."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the coordinator decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        serve_rank(rank, settings)
        return 0
    except MoesimError as error:
        print(f"moesim: rank {rank}: {error}", file=sys.stderr, flush=True)
    except Exception:
        print(f"moesim: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 3


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.stdout.flush()
    os._exit(run(int(os.environ["RANK"]), json.loads(Path(os.environ["MOESIM_WORKER"]).read_bytes())))
