"""A deployment under test: `moesim serve-demo` as a subprocess, stopped and checked for orphans at the end."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.cli.main import main
from moesim.plan import Plan

CONFIG = {
    "model_type": "qwen3_moe", "torch_dtype": "float32", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32, "intermediate_size": 64, "norm_topk_prob": True,
    "vocab_size": 256, "max_position_embeddings": 512, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
LAYERS, EXPERTS = (0, 1, 2), 16


def write_config(folder: Path, **changes: Any) -> Path:
    """Write the tiny model's config.json and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**CONFIG, **changes}))
    return path


@dataclass
class Result:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def moesim(*arguments: str, token: str = "") -> Result:
    """Run the command line to its end, in this process to save its start-up."""
    output, errors = io.StringIO(), io.StringIO()
    before = os.environ.get("MOESIM_TOKEN")
    os.environ["MOESIM_TOKEN"] = token
    code: object = 0
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main(list(arguments))
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.environ.pop("MOESIM_TOKEN") if before is None else os.environ.update(MOESIM_TOKEN=before)
    assert isinstance(code, int)
    return Result(code, output.getvalue(), errors.getvalue())


def alive(pid: int) -> bool:
    """Return True if the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def await_gone(pids: list[int], timeout_s: float) -> list[int]:
    """Return the processes that still exist after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and any(alive(pid) for pid in pids):
        time.sleep(0.02)
    return [pid for pid in pids if alive(pid)]


class Live:
    """A running deployment."""

    process: Any

    def __init__(self, model: Path, *flags: str, ranks: int = 4, token: str = "", failpoints: bool = False, command: Sequence[str] = ()) -> None:
        """command: what to run instead of `moesim serve-demo`, a script that takes the flags."""
        environment = {**os.environ, "MOESIM_TOKEN": token, "MOESIM_TEST_FAILPOINTS": "1" if failpoints else "0"}
        command = command or [sys.executable, "-m", "moesim", "serve-demo", "--ranks", str(ranks), "--model", str(model)]
        self.errors = (model.parent / "stderr").open("w+")
        command = [*command, "--batch", "4", "--prompt", "16", "--json", *flags]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment)
        self.await_ready(token)

    def await_ready(self, token: str) -> None:
        """Read the line that says where the deployment answers."""
        self.token, self.stderr_text = token, ""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            line = self.process.stdout.readline() if selector.select(90) else ""
        if not line:
            self.process.kill()
            raise AssertionError(f"the deployment did not start: {self.stderr()}")
        self.ready = json.loads(line)
        self.control, self.pids = str(self.ready["control"]), list(self.ready["pids"])

    def stderr(self) -> str:
        """Return what the deployment has written for people."""
        self.errors.flush()
        return Path(self.errors.name).read_text()

    def apply(self, plan: Any, *flags: str) -> Result:
        """Write `plan` beside the model and apply it through the command line."""
        path = Path(self.errors.name).parent / "plan.json"
        plan.write(path)
        return moesim("apply", str(path), "--to", self.control, "--json", *flags, token=self.token)

    def close(self, number: int = signal.SIGINT) -> int:
        """End the deployment by a signal; assert that no rank is left; return its exit code."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()
            self.stderr_text = self.stderr()
            self.errors.close()
        assert await_gone(self.pids, 3) == [], "orphans"
        return code


PRELOAD = [
    "torch.distributed.device_mesh", "transformers.models.qwen3_moe.modeling_qwen3_moe", "moesim.runtime.worker", "moesim.runtime.coordinator",
    "moesim.runtime.regroup", "moesim.runtime.launch", "moesim.runtime.capture_spool", "moesim.runtime.checkpoint",
]  # fmt: skip


class _Child:
    """A process forked from one that has imported torch, with the few methods of Popen that `Live` uses."""

    def __init__(self, process: Any, reader: int) -> None:
        self._process, self.stdout, self.pid = process, os.fdopen(reader), process.pid

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("serve", timeout or 0)
        return int(self._process.exitcode)


class Forked(Live):
    """A deployment whose coordinator is forked from a process that has imported torch: it serves after a second."""

    def __init__(self, folder: Path, *, plan: Plan, failpoints: bool = True, token: str = "", **settings: Any) -> None:
        """settings: fields of `launch.Settings`, and model_seed; the stderr goes to `folder`."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        model = write_config(folder / "tiny")
        self.errors = (model.parent / "stderr").open("w+")
        ready = model.parent / "ready"
        ready.unlink(missing_ok=True)
        os.mkfifo(ready)
        reader = os.open(ready, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(reader, True)
        fields = {"repeat": 1, "batch": 2, "prompt": 8, "decode": 3, "window": 4, "timeout_s": 5.0, "answer_s": 6.0, **settings}
        process = context.Process(target=_host, args=(model.parent, plan.stamped(), failpoints, fields, token))
        process.start()
        self.process = _Child(process, reader)
        self.await_ready(token)


def _host(folder: Path, plan: dict[str, Any], failpoints: bool, fields: dict[str, Any], token: str) -> None:
    os.dup2(os.open(folder / "ready", os.O_WRONLY), 1)
    os.dup2(os.open(folder / "stderr", os.O_WRONLY | os.O_APPEND), 2)
    os.environ |= {"MOESIM_TEST_FAILPOINTS": str(int(failpoints)), "OMP_NUM_THREADS": "1"}
    from moesim.runtime.launch import Settings, serve
    from moesim.runtime.spec import read_spec

    spec = read_spec(str(folder), seed=fields.pop("model_seed", 0))
    sys.exit(serve(Settings(spec=spec, plan=Plan.from_content(plan, "plan"), command="serve-demo", **fields), token=token))
