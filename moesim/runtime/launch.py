"""Starting a deployment on this machine: fork the ranks, host their store, serve the control port, stop without a trace.

The launcher imports torch and transformers once and forks the ranks from there, before it has any thread; each rank is a
process of its own that would run the same under torchrun (see `worker`). The launcher then is the coordinator.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import ApplyError, InputError, MoesimError, describe
from moesim.plan import Plan, linear
from moesim.runtime.control import ControlServer
from moesim.runtime.journal import Journal
from moesim.runtime.spec import ModelSpec

START_S = 120.0
LINGER_S = 60.0
"""How long the control port of a failed deployment goes on telling why."""
FIRST_TRACE_STEPS = 64
LOOPBACK = "127.0.0.1"
"""Where the ranks meet; only the control port may be open to others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `serve-demo` was asked for."""

    spec: ModelSpec
    ranks: int
    launcher: str = "fork"
    """`fork` from this process (imports torch once) or `torchrun`."""
    plan: Plan | None = None
    host: str = "127.0.0.1"
    port: int = 0
    trace_out: Path | None = None
    journal: Path | None = None
    slots_per_rank: int | None = None
    timeout_s: float = 20.0
    """After which an exchange with a silent rank fails."""
    answer_s: float = 10.0
    """After which a rank that does not answer a command fails an apply."""
    window: int | None = None
    """Steps over which balance is measured; default two waves."""
    seed: int = 0
    batch: int = 8
    prompt: int = 32
    decode: int = 16
    repeat: int = 0
    pace_ms: float = 0.0


def serve(settings: Settings, *, token: str = "") -> int:
    """Run a deployment until it is stopped; print one JSON line when it serves. Return the exit code."""
    from moesim.runtime.capture import check_target

    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve-demo: needs {' and '.join(missing)}; install moesim[runtime]")
    if settings.trace_out is not None:
        check_target(settings.trace_out)
    scratch = Path(tempfile.mkdtemp(prefix="moesim-serve-"))
    journal = Journal(settings.journal or scratch / "journal")
    try:
        plan = _initial_plan(settings, journal)
        return _serve(settings, plan, journal, scratch, token)
    finally:
        journal.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _initial_plan(settings: Settings, journal: Journal) -> Plan:
    """Return the plan to start with: the journal's if it names one, else the given one, else linear blocks."""
    spec = settings.spec
    plan = journal.installed() or settings.plan
    if plan is None:
        plan = linear(model=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids, num_ranks=settings.ranks)
    plan.check_model(name=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids)
    if plan.num_ranks != settings.ranks:
        raise InputError(describe(plan.source, "num_ranks", plan.num_ranks, f"must equal --ranks {settings.ranks}"))
    return plan


def _capacity(settings: Settings, plan: Plan) -> int:
    held = max(int((plan.slot_rank_S == rank).sum()) for rank in range(settings.ranks))
    if settings.slots_per_rank is None:
        return max(held, 2 * -(-settings.spec.num_experts // settings.ranks))
    if settings.slots_per_rank < held:
        raise InputError(describe("serve-demo", "--slots-per-rank", settings.slots_per_rank, f"must be >= the {held} slots of the plan"))
    return settings.slots_per_rank


def _serve(settings: Settings, plan: Plan, journal: Journal, scratch: Path, token: str) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    capacity = _capacity(settings, plan)
    holder: list[Any] = []
    control = ControlServer(settings.host, settings.port, lambda request, progress: holder[0].handle(request, progress), token=token)

    import torch

    from moesim.runtime.model import skeleton

    torch.set_num_threads(1)
    vocab = int(skeleton(settings.spec).config.vocab_size)
    forked = settings.launcher == "fork"
    pids, pipes = _fork(settings.ranks, control) if forked else ([], [])

    from moesim.runtime.coordinator import Coordinator
    from moesim.runtime.deployment import Deployment

    deployment = Deployment(LOOPBACK, settings.ranks, pids=pids if forked else None, answer_s=settings.answer_s)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    recorder = _Recorder(settings, scratch / "spool")
    try:
        told = json.dumps(_worker_settings(settings, plan, capacity, vocab, deployment.store.port, recorder)).encode()
        for pipe in pipes:
            with os.fdopen(pipe, "wb") as file:
                file.write(told)
        if not forked:
            deployment.launcher = _torchrun(settings.ranks, told, scratch / "worker.json")
        deployment.start()
        if not journal.records:
            journal.append("start", plan=_stamped(plan))
        window = settings.window or 2 * (1 + settings.decode)
        coordinator = Coordinator(
            deployment, spec=settings.spec, plan=plan, slot_capacity=capacity, window=window, journal=journal, publish=recorder.publish,
        )  # fmt: skip
        holder.append(coordinator)
        _await_first_step(deployment, stop)
        deployment.adopt()
        control.start()
        address = f"{settings.host}:{control.port}"
        ready = {"schema": "moesim.serve-demo/1", "control": address, "pids": deployment.pids, "model": settings.spec.name, "ranks": settings.ranks}
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        return _stay(deployment, coordinator, stop, recorder)
    finally:
        deployment.stop()
        control.close()
        recorder.try_publish()


def _fork(ranks: int, control: ControlServer) -> tuple[list[int], list[int]]:
    """Fork the ranks; each waits for its settings on a pipe. Return their pids and the writing ends."""
    from moesim.runtime import worker

    sys.stdout.flush()
    sys.stderr.flush()
    pids: list[int] = []
    pipes: list[int] = []
    for rank in range(ranks):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                worker.die_with_parent()
                os.dup2(2, 1)  # stdout belongs to the launcher's one line
                control.close()
                for other in [writer, *pipes]:
                    os.close(other)
                with os.fdopen(reader, "rb") as file:
                    text = file.read()
                code = worker.run(rank, json.loads(text)) if text else 3
            finally:
                os._exit(code)
        os.close(reader)
        pids.append(pid)
        pipes.append(writer)
    return pids, pipes


def _torchrun(ranks: int, told: bytes, path: Path) -> subprocess.Popen[bytes]:
    """Start the ranks by torchrun on this machine; they read their settings from `path`."""
    from moesim.runtime.worker import die_with_parent

    path.write_bytes(told)
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    rendezvous = ["--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=static", "--node-rank=0", f"--master-addr={LOOPBACK}", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "moesim.runtime.worker"]
    environment = {**os.environ, "MOESIM_WORKER": str(path)}
    # A session of its own keeps Ctrl-C away from torchrun; the launcher ends the ranks in order.
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent, start_new_session=True)


def _stamped(plan: Plan) -> dict[str, Any]:
    from moesim.files import canonical_json, sha256_hex

    content = plan.content()
    return {**content, "sha256": sha256_hex(canonical_json(content))}


def _worker_settings(settings: Settings, plan: Plan, capacity: int, vocab: int, store_port: int, recorder: _Recorder) -> dict[str, Any]:
    workload = {name: getattr(settings, name) for name in ("ranks", "seed", "batch", "prompt", "decode", "repeat", "pace_ms")}
    return {
        "host": LOOPBACK, "store_port": store_port, "ranks": settings.ranks, "timeout_s": settings.timeout_s, "slot_capacity": capacity,
        "spec": dataclasses.asdict(settings.spec), "plan": _stamped(plan), "workload": {**workload, "vocab": vocab},
        "spool": None if settings.trace_out is None else str(recorder.folder), "shape": recorder.shape_fields(),
    }  # fmt: skip


def _await_first_step(deployment: Any, stop: threading.Event) -> None:
    """Wait until every rank has served a step; raise ApplyError if one fails or they take too long."""
    deadline = time.monotonic() + START_S
    while not all(status is not None and status["step"] > 0 for status in deployment.statuses()):
        if deployment.failure:
            raise ApplyError(f"the deployment did not start: {deployment.failure}")
        if stop.is_set():
            raise ApplyError("the deployment was stopped before it served")
        if time.monotonic() > deadline:
            raise ApplyError(f"the deployment did not serve a step within {START_S:g} s")
        time.sleep(0.05)


def _stay(deployment: Any, coordinator: Any, stop: threading.Event, recorder: _Recorder) -> int:
    """Serve until a signal or a stop request, or for LINGER_S after a failure; return the exit code."""
    failed_at = None
    while not (stop.wait(0.1) or coordinator.stop_asked.is_set()):
        recorder.publish_if_due()
        if deployment.failure and failed_at is None:
            failed_at = time.monotonic()
            print(f"moesim: serve-demo: {deployment.failure}; serving has ended", file=sys.stderr, flush=True)
        if failed_at is not None and time.monotonic() - failed_at > LINGER_S:
            break
    return 0 if deployment.failure is None else 1


class _Recorder:
    """Publishes the ranks' spools as a trace: after 64, 256, 1024 … steps, on request, and at the end."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self._due, self._lock = FIRST_TRACE_STEPS, threading.Lock()

    def shape_fields(self) -> dict[str, Any]:
        """Return the fields of the trace's shape."""
        spec = self.settings.spec
        return {"model": spec.name, "num_experts": spec.num_experts, "top_k": spec.top_k, "moe_layer_ids": list(spec.moe_layer_ids)}

    def publish_if_due(self) -> None:
        """Publish when four times as many steps have been served as last time."""
        from moesim.runtime.capture import spooled_steps

        if self.settings.trace_out is not None and spooled_steps(self.folder, self.settings.ranks) >= self._due:
            self._due *= 4
            self.try_publish()

    def try_publish(self) -> None:
        """Publish; a trace that cannot be written is no reason to stop serving."""
        try:
            self.publish()
        except (MoesimError, OSError) as error:
            print(f"moesim: serve-demo: the trace cannot be written: {error}", file=sys.stderr, flush=True)

    def publish(self) -> int | None:
        """Write the trace so far; return its rows, or None if there is nothing to write."""
        from moesim import __version__
        from moesim.runtime.capture import publish, spooled_steps
        from moesim.traces.routing_trace import TraceShape

        target = self.settings.trace_out
        if target is None or spooled_steps(self.folder, self.settings.ranks) == 0:
            return None
        shape = TraceShape(**{**self.shape_fields(), "moe_layer_ids": self.settings.spec.moe_layer_ids})
        provenance = {"tool": "moesim serve-demo", "version": __version__, "seed": self.settings.seed, "skew": self.settings.spec.skew, "hardware": "CPU, gloo"}
        with self._lock:
            return publish(self.folder, self.settings.ranks, shape, target, provenance)
