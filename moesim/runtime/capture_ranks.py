"""`moesim capture`, in this process or over several: then the experts are spread over them, each serves passes of its own and records to its own folder.

The ranks are forked here, or torchrun, srun or the like has started them (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell). When all are done the first one
joins the folders, `TARGET.ranks/rank-N`, to the trace and removes them. If one is lost the others end, and their folders stay: readable up to the loss.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, InputError, MoesimError, describe
from moesim.runtime.capture_run import Job, Ready, ended_in_order, load, record, size_of

MAX_RANKS = 256
TIMEOUT_S = 20.0
"""After which an exchange with a silent rank fails."""
DONE_S = 120.0
"""Longest that one rank's end may come after another's."""
LOOPBACK = "127.0.0.1"


def run(job: Job, on_progress: Callable[[str], None] = lambda text: None) -> dict[str, Any] | None:
    """Record the job's passes to its target and return the report, schema moesim.capture/1; None in a rank that somebody else started, but the first.

    Raises ModelError if the model cannot be built or loaded, InputError if text or target cannot be used, ApplyError if a rank is lost.
    """
    if (place := told(os.environ, job.ranks)) is not None:
        return be_rank(job, *place, on_progress)
    if job.ranks > 1:
        return launch(job, on_progress)
    with ended_in_order():
        return record(job, load(job), job.target, on_progress=on_progress)


def told(environment: Mapping[str, str], ranks: int) -> tuple[int, int] | None:
    """Return rank and ranks as the launcher of this process says, None if there is none; raise InputError if it contradicts `ranks`."""
    size = environment.get("WORLD_SIZE", "")
    if not size.isdecimal() or not environment.get("RANK", "").isdecimal() or "MASTER_ADDR" not in environment or int(size) < 2:
        return None
    if ranks not in (0, int(size)):
        raise InputError(describe("capture", "--ranks", ranks, f"must be the {size} processes that were started (WORLD_SIZE)", "leave it out"))
    return int(environment["RANK"]), int(size)


def be_rank(job: Job, rank: int, ranks: int, on_progress: Callable[[str], None]) -> dict[str, Any] | None:
    """Record as one of the ranks that somebody else started; return the report of all in the first one, None in the others."""
    import torch.distributed as dist

    from moesim.runtime.mesh import own_address

    _check(job, ranks)
    store = next(dist.rendezvous("env://"))[0]
    store = dist.PrefixStore(f"moesim-capture/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    host = own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    return _record(replace(job, threads=job.threads or 1), None, rank, ranks, store, host, on_progress)


def launch(job: Job, on_progress: Callable[[str], None]) -> dict[str, Any]:
    """Fork the ranks, wait for them, and return the report; raise ApplyError if one is lost."""
    import torch

    _check(job, job.ranks)
    torch.set_num_threads(1)  # or the threads of a forked process would wait for those that stayed behind
    ready = load(replace(job, device="cpu", threads=0))
    from moesim.runtime.worker import die_with_parent

    reader, writer = os.pipe()
    pids = []
    with tempfile.TemporaryDirectory(prefix="moesim-capture-") as scratch:
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(job.ranks):
            if (pid := os.fork()) == 0:
                die_with_parent()
                os._exit(_forked(job, ready, rank, f"{scratch}/store", writer, on_progress))
            pids.append(pid)
        os.close(writer)
        try:
            failed = _await(pids)
        except BaseException:
            _end(pids)
            raise
        with os.fdopen(reader) as pipe:
            text = pipe.read()
    if failed is not None:
        raise ApplyError(f"{failed}; {_remedy(job)}")
    report: dict[str, Any] = json.loads(text)
    return report


def _forked(job: Job, ready: Ready, rank: int, store: str, writer: int, on_progress: Callable[[str], None]) -> int:
    """Be a forked rank and return its exit code."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(job.threads or 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal group; the parent decides
    try:
        with ended_in_order():
            report = _record(job, ready, rank, job.ranks, dist.FileStore(store, job.ranks), LOOPBACK, on_progress if rank == 0 else lambda text: None)
        if report is not None:
            os.write(writer, json.dumps(report).encode())
        return 0
    except MoesimError as error:
        print(f"moesim: rank {rank}: {error}", file=sys.stderr, flush=True)
    except SystemExit as end:
        return int(end.code) if isinstance(end.code, int) else 3
    except Exception as error:  # a rank has nobody above it to say what went wrong
        print(f"moesim: rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=sys.stderr, flush=True)
    return 3


def _record(
    job: Job, ready: Ready | None, rank: int, ranks: int, store: Any, host: str, on_progress: Callable[[str], None]
) -> dict[str, Any] | None:  # fmt: skip
    """Record as `rank`; in the first one wait for the others, join, and return the report."""
    from moesim.plan import linear
    from moesim.runtime.capture import shape_of
    from moesim.runtime.capture_join import join
    from moesim.runtime.group import gloo_group
    from moesim.runtime.mesh import Mesh

    with ended_in_order():
        ready = ready or load(replace(job, device="cpu"))
        if len(ready.passes) < ranks:
            raise InputError(describe("capture", "passes", len(ready.passes), f"must be >= the {ranks} ranks", "give more --tokens, or a smaller --batch"))
        if rank == 0:
            store.set("run", uuid.uuid4().hex)
        store.wait(["run"], timedelta(seconds=DONE_S))
        group = gloo_group(store, rank=rank, size=ranks, timeout_s=TIMEOUT_S, host=host)
        shape = shape_of(ready.model, ready.name)
        plan = linear(model=shape.model, num_experts=shape.num_experts, moe_layer_ids=shape.moe_layer_ids, num_ranks=ranks)
        mesh = Mesh.flat(rank=rank, size=ranks, group=group)
        held = spread(ready.model, plan, mesh)
        each = len(ready.passes) // ranks
        mine = replace(ready, passes=ready.passes[rank::ranks][:each])
        folder = _folders(job, ranks)[rank]
        found = record(job, mine, folder, rank=rank, held=held, plan=plan, mesh=mesh, run_id=store.get("run").decode(), on_progress=on_progress)
        store.set(f"done/{rank}", json.dumps(found))
        if rank:
            return None
        store.wait([f"done/{other}" for other in range(ranks)], timedelta(seconds=DONE_S))
        reports = [json.loads(store.get(f"done/{other}")) for other in range(ranks)]
        joined = join(_folders(job, ranks), job.target)
        shutil.rmtree(_parts(job))
    total = {name: sum(report[name] for report in reports) for name in ("rows", "incomplete_steps")}
    left_out = len(ready.passes) - each * ranks
    return {**found, **total, "trace": str(job.target), "ranks": ranks, "steps": joined["steps"], "bytes": size_of(job.target), "passes_left_out": left_out}


def spread(model: Any, plan: Any, mesh: Any) -> Any:
    """Keep of a whole model's experts those of this rank's slots, and let the ranks exchange tokens; return it as this rank's part."""
    from moesim.runtime.expert_parallel import ExpertParallelExperts
    from moesim.runtime.model import Part, moe_layers
    from moesim.runtime.slot_map import SlotMap

    blocks = moe_layers(model)
    experts = []
    for row, block in enumerate(blocks.values()):
        block.experts = ExpertParallelExperts.dealt(block.experts, SlotMap.of(plan, row, 0), rank=mesh.ep_rank, group=mesh.ep)
        experts.append(block.experts)
    inside = {id(parameter) for one in experts for parameter in one.parameters()}
    dense = {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in inside}
    return Part(model=model, experts=experts, layers=range(model.config.num_hidden_layers), layer_ids=tuple(blocks), dense=dense, dealt={})


def _check(job: Job, ranks: int) -> None:
    from moesim.runtime.capture_spool import check_target

    if ranks > MAX_RANKS:
        raise InputError(describe("capture", "--ranks", ranks, f"must be <= {MAX_RANKS}"))
    if job.device == "cuda":
        rule = "must be cpu with --ranks, whose exchanges are CPU ones"
        raise InputError(describe("capture", "--device", job.device, rule, "in a CUDA deployment of your own use moesim.runtime.capture.Capture in every rank"))
    check_target(job.target)
    for folder in _folders(job, ranks):
        check_target(folder)


def _parts(job: Job) -> Path:
    return job.target.parent / f"{job.target.name}.ranks"


def _folders(job: Job, ranks: int) -> list[Path]:
    return [_parts(job) / f"rank-{rank}" for rank in range(ranks)]


def _remedy(job: Job) -> str:
    parts = _parts(job)
    ways = f"`moesim trace repair` saves a rank that was killed, `moesim trace join {parts}/rank-* -o OUT` all of them"
    return f"what the ranks recorded until then is in {parts}: {ways}"


def _await(pids: list[int]) -> str | None:
    """Wait for all ranks to end; return why the first that failed did, None if none failed."""
    left = dict(enumerate(pids))
    reason: str | None = None
    deadline = float("inf")
    while left:
        for rank, pid in list(left.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del left[rank]
            code = os.waitstatus_to_exitcode(status)
            if code and (reason is None or code < 0):
                why = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
                reason = f"rank {rank} (pid {pid}) {why}"
            if code:
                deadline = min(deadline, time.monotonic() + TIMEOUT_S + 5)
        if time.monotonic() > deadline:
            _end(list(left.values()))
            return reason
        time.sleep(0.02)
    return reason


def _end(pids: list[int]) -> None:
    """End the ranks that are left: by SIGTERM, so that they make readable what they have, then by SIGKILL."""
    for number, wait_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + wait_s
        while pids and time.monotonic() < deadline:
            for pid in list(pids):
                with contextlib.suppress(ChildProcessError):
                    if not os.waitpid(pid, os.WNOHANG)[0]:
                        continue
                pids.remove(pid)
            time.sleep(0.02)
