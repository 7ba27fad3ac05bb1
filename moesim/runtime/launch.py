"""Starting a deployment: a coordinator that hosts the ranks' store and the control port, and R ranks per pipeline stage.

On one machine the coordinator imports torch and transformers once and forks the ranks, or lets torchrun start them. Where torchrun,
srun or the like has already started one process per rank (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT tell), the process of
rank 0 forks the coordinator. It is a process of its own in any case, and nothing is left of either when it has ended.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moesim.errors import ApplyError, InputError, MoesimError, describe
from moesim.plan import Plan
from moesim.runtime.control import ControlServer
from moesim.runtime.journal import Journal
from moesim.runtime.mesh import Layout
from moesim.runtime.recovery import check_can_shrink
from moesim.runtime.spec import ModelSpec

START_S = 120.0
LINGER_S = 60.0
"""How long the control port of a failed deployment goes on telling why."""
FIRST_TRACE_STEPS = 64
LOOPBACK = "127.0.0.1"
"""Where the ranks of one machine meet; only the control port may be open to others."""
LAUNCHERS = ("fork", "torchrun", "env")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What was asked for."""

    spec: ModelSpec
    plan: Plan
    """Its parallel degrees and number of ranks are those of the deployment."""
    command: str = "launch"
    """The command that asks, for messages."""
    launcher: str = "fork"
    """`fork` from this process (imports torch once), `torchrun` on this machine, or `env`: the ranks have been started, this process is one."""
    host: str = "127.0.0.1"
    port: int = 0
    store_port: int | None = None
    """Of the ranks' store, where others start the ranks; default MASTER_PORT + 1."""
    trace_out: Path | None = None
    journal: Path | None = None
    checkpoint: Path | None = None
    """Weights to start with; default: those of the seed."""
    slots_per_rank: int | None = None
    timeout_s: float = 20.0
    """After which an exchange with a silent rank fails."""
    answer_s: float = 10.0
    """After which a rank that does not answer a command fails an apply."""
    on_death: str = "stop"
    """When a rank dies or hangs: `stop`, or `shrink`: the others rebuild a smaller group and serve on."""
    window: int | None = None
    """Steps over which balance is measured; default two waves."""
    seed: int = 0
    batch: int = 8
    prompt: int = 32
    decode: int = 16
    repeat: int = 0
    drift: int = 0
    pace_ms: float = 0.0

    @property
    def layout(self) -> Layout:
        """Degrees of parallelism."""
        return Layout.of(self.plan)


def serve(settings: Settings, *, token: str = "") -> int:
    """Run a deployment until it is stopped; print one JSON line when it serves. Return the exit code."""
    from moesim.runtime.capture_spool import check_target

    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{settings.command}: needs {' and '.join(missing)}; install moesim[runtime]")
    settings.plan.check_model(name=settings.spec.name, num_experts=settings.spec.num_experts, moe_layer_ids=settings.spec.moe_layer_ids)
    capacity = _capacity(settings)
    if settings.trace_out is not None:
        check_target(settings.trace_out)
    if settings.checkpoint is not None and not (settings.checkpoint / "checkpoint.json").is_file():
        raise InputError(f"{settings.checkpoint / 'checkpoint.json'}: does not exist; give a folder that a checkpoint was saved to")
    _check_on_death(settings)
    store = (LOOPBACK, 0)
    if settings.launcher == "env":
        rank, store = _told(settings, os.environ)
        coordinator = os.fork() if rank == 0 else None
        if coordinator != 0:
            _be_rank(rank, store, coordinator)
        os.setpgid(0, 0)  # what torchrun tells its ranks is not for the coordinator
        _die_with_parent()
    scratch = Path(tempfile.mkdtemp(prefix="moesim-launch-"))
    journal = Journal(settings.journal or scratch / "journal")
    try:
        return _serve(dataclasses.replace(settings, plan=_initial_plan(settings, journal)), capacity, journal, scratch, store, token)
    finally:
        journal.close()
        shutil.rmtree(scratch, ignore_errors=True)


def _check_on_death(settings: Settings) -> None:
    if settings.on_death not in ("stop", "shrink"):
        raise InputError(describe(settings.command, "--on-death", settings.on_death, "must be stop or shrink"))
    if settings.on_death == "shrink":
        check_can_shrink(settings.plan)
        if settings.launcher != "fork":
            rule = "must be fork: others end all ranks when one dies"
            raise InputError(describe("--on-death shrink", "--launcher", settings.launcher, rule))


def _die_with_parent() -> None:
    from moesim.runtime.worker import die_with_parent

    die_with_parent()


def _initial_plan(settings: Settings, journal: Journal) -> Plan:
    """Return the plan to start with: the journal's if it names one, else the given one."""
    plan = journal.installed() or settings.plan
    plan.check_model(name=settings.spec.name, num_experts=settings.spec.num_experts, moe_layer_ids=settings.spec.moe_layer_ids)
    if Layout.of(plan) != settings.layout:
        found, asked = (f"tp {one.tp}, dp {one.dp}, pp {one.pp}" for one in (Layout.of(plan), settings.layout))
        raise InputError(describe(plan.source, "parallel", found, f"must equal {asked}, which is asked for", "give another --journal"))
    return plan


def _capacity(settings: Settings) -> int:
    plan = settings.plan
    held = max(int((plan.slot_rank_S == rank).sum()) for rank in range(plan.num_ranks))
    if settings.slots_per_rank is None:
        return max(held, 2 * -(-settings.spec.num_experts // plan.num_ranks))
    if settings.slots_per_rank < held:
        raise InputError(describe(settings.command, "--slots-per-rank", settings.slots_per_rank, f"must be >= the {held} slots of the plan"))
    return settings.slots_per_rank


def _told(settings: Settings, environment: Mapping[str, str]) -> tuple[int, tuple[str, int]]:
    """Return this process's rank and the address of the store, as the launcher of the ranks says; raise InputError if it does not say."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        text = environment.get(name, "")
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise InputError(describe("--launcher env", name, text or None, "must be a number in the environment", "start it by torchrun or a template"))
        numbers[name] = int(text)
    world, port = settings.layout.world, settings.store_port or numbers["MASTER_PORT"] + 1
    if numbers["WORLD_SIZE"] != world or numbers["RANK"] >= world:
        rule = f"must be the {world} ranks of the plan ({settings.plan.num_ranks} per stage, {settings.layout.pp} stages)"
        raise InputError(describe("--launcher env", "WORLD_SIZE", numbers["WORLD_SIZE"], rule, "start as many processes"))
    if not environment.get("MASTER_ADDR"):
        raise InputError("--launcher env: MASTER_ADDR must name the machine of rank 0; start it by torchrun or a template")
    return numbers["RANK"], (environment["MASTER_ADDR"], port)


def _be_rank(rank: int, store: tuple[str, int], coordinator: int | None) -> NoReturn:
    """Serve as a rank; that of the coordinator's machine also waits for it and ends with it if it fails."""
    from moesim.runtime import worker

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _die_with_parent()
    if coordinator is None:
        _leave(worker.run(rank, *store))
    ended: list[int] = []

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            pid, status = os.waitpid(coordinator, os.WNOHANG)
            if pid:
                ended.append(os.waitstatus_to_exitcode(status))
                if ended[0]:
                    os._exit(abs(ended[0]))

    signal.signal(signal.SIGCHLD, reap)
    code = worker.run(rank, *store)
    deadline = time.monotonic() + (LINGER_S if code == 0 else 1.0)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End this rank at once, as forked ones do: gloo's threads abort the process if the interpreter takes them down after a peer has gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve(settings: Settings, capacity: int, journal: Journal, scratch: Path, store: tuple[str, int], token: str) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    from moesim.runtime.model import skeleton

    torch.set_num_threads(1)
    config: Any = skeleton(settings.spec).config
    layout = settings.layout
    layout.check_layers(config.num_hidden_layers, settings.spec.moe_layer_ids, settings.plan.source)
    holder: list[Any] = []
    control = ControlServer(settings.host, settings.port, lambda request, progress: holder[0].handle(request, progress), token=token)
    forked = settings.launcher == "fork"
    pids, pipes = _fork(layout.world, control) if forked else ([], [])

    from moesim.runtime.coordinator import Coordinator
    from moesim.runtime.deployment import Deployment

    try:
        deployment = Deployment(store[0], layout.world, port=store[1], pids=pids if forked else None, answer_s=settings.answer_s)
    except BaseException:
        control.close()
        raise
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    shared = settings.launcher == "env" and settings.trace_out is not None  # ranks of other machines reach what reaches the trace
    recorder = _Recorder(settings, settings.trace_out.parent / f".{settings.trace_out.name}.spool" if shared and settings.trace_out else scratch / "spool")
    try:
        deployment.store.set("settings", json.dumps(_worker_settings(settings, capacity, config, recorder)))
        for pipe in pipes:
            with os.fdopen(pipe, "wb") as file:
                file.write(str(deployment.store.port).encode())
        if settings.launcher == "torchrun":
            deployment.launcher = _torchrun(layout.world, deployment.store.port)
        deployment.exchange_s = settings.timeout_s
        if settings.on_death == "shrink":
            deployment.hang_s = settings.timeout_s
        deployment.start()
        if not journal.records:
            journal.append("start", plan=settings.plan.stamped())
        window = settings.window or 2 * (1 + settings.decode)
        coordinator = Coordinator(
            deployment, spec=settings.spec, plan=settings.plan, slot_capacity=capacity, window=window, journal=journal, publish=recorder.publish,
        )  # fmt: skip
        holder.append(coordinator)
        _await_first_step(deployment, stop)
        deployment.adopt()
        control.start()
        degrees = {"tp": layout.tp, "ep": layout.ranks, "dp": layout.dp, "pp": layout.pp}
        ready = {
            "schema": f"moesim.{settings.command}/1", "control": f"{settings.host}:{control.port}", "pids": deployment.pids, "model": settings.spec.name,
            "ranks": layout.world, "parallel": degrees,
        }  # fmt: skip
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        return _stay(settings, deployment, coordinator, stop, recorder)
    finally:
        deployment.stop()
        control.close()
        recorder.close(keep=not shared)


def _fork(ranks: int, control: ControlServer) -> tuple[list[int], list[int]]:
    """Fork the ranks; each waits for the port of the store on a pipe. Return their pids and the writing ends."""
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
                code = worker.run(rank, LOOPBACK, int(text)) if text else 3
            finally:
                os._exit(code)
        os.close(reader)
        pids.append(pid)
        pipes.append(writer)
    return pids, pipes


def _torchrun(ranks: int, store_port: int) -> subprocess.Popen[bytes]:
    """Start the ranks by torchrun on this machine."""
    from moesim.runtime.worker import die_with_parent

    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    rendezvous = ["--nnodes=1", f"--nproc-per-node={ranks}", "--rdzv-backend=static", "--node-rank=0", f"--master-addr={LOOPBACK}", f"--master-port={port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "moesim.runtime.worker", f"{LOOPBACK}:{store_port}"]
    # A session of its own keeps Ctrl-C away from torchrun; the launcher ends the ranks in order.
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, preexec_fn=die_with_parent, start_new_session=True)


def _worker_settings(settings: Settings, capacity: int, config: Any, recorder: _Recorder) -> dict[str, Any]:
    workload = {name: getattr(settings, name) for name in ("seed", "batch", "prompt", "decode", "repeat", "drift", "pace_ms")}
    return {
        "timeout_s": settings.timeout_s, "on_death": settings.on_death, "slot_capacity": capacity, "spec": dataclasses.asdict(settings.spec),
        "plan": settings.plan.stamped(),
        "workload": {**workload, "ranks": settings.layout.dp, "vocab": int(config.vocab_size)}, "num_layers": int(config.num_hidden_layers),
        "checkpoint": None if settings.checkpoint is None else str(settings.checkpoint.absolute()),
        "spool": None if settings.trace_out is None else str(recorder.folder.absolute()), "shape": recorder.shape_fields(),
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


def _stay(settings: Settings, deployment: Any, coordinator: Any, stop: threading.Event, recorder: _Recorder) -> int:
    """Serve until a signal or a stop request, or for LINGER_S after a failure; return the exit code."""
    failed_at, command = None, settings.command
    while not (stop.wait(0.1) or coordinator.stop_asked.is_set()):
        recorder.publish_if_due()
        if deployment.failure and failed_at is None:
            if settings.on_death == "shrink":
                reason = deployment.failure
                if coordinator.recover(timeout_s=settings.timeout_s) is None:
                    print(f"moesim: {command}: {reason}; {deployment.size} ranks serve on", file=sys.stderr, flush=True)
                    continue
            failed_at = time.monotonic()
            print(f"moesim: {command}: {deployment.failure}; serving has ended", file=sys.stderr, flush=True)
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
        from moesim.runtime.capture_spool import spooled_steps

        if self.settings.trace_out is not None and spooled_steps(self.folder, self.settings.plan.num_ranks) >= self._due:
            self._due *= 4
            self.try_publish()

    def close(self, *, keep: bool) -> None:
        """Publish what there is, and remove the spool unless its folder goes anyway (`keep`)."""
        self.try_publish()
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def try_publish(self) -> None:
        """Publish; a trace that cannot be written is no reason to stop serving."""
        try:
            self.publish()
        except (MoesimError, OSError) as error:
            print(f"moesim: {self.settings.command}: the trace cannot be written: {error}", file=sys.stderr, flush=True)

    def publish(self) -> int | None:
        """Write the trace so far; return its rows, or None if there is nothing to write."""
        from moesim import __version__
        from moesim.runtime.capture_spool import publish, spooled_steps
        from moesim.traces.routing_trace import TraceShape

        target = self.settings.trace_out
        if target is None or spooled_steps(self.folder, self.settings.plan.num_ranks) == 0:
            return None
        shape = TraceShape(**{**self.shape_fields(), "moe_layer_ids": self.settings.spec.moe_layer_ids})
        asked = self.settings
        provenance = {"tool": f"moesim {asked.command}", "version": __version__, "seed": asked.seed, "skew": asked.spec.skew, "hardware": "CPU, gloo"}
        with self._lock:
            return publish(self.folder, self.settings.plan.num_ranks, shape, target, provenance)
