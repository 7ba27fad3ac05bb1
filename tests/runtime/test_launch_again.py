"""What outlives a deployment: scripts that start it again by torchrun and Slurm, and checkpoints that another mesh serves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import ApplyError, InputError
from moesim.runtime import client
from moesim.runtime.templates import script
from tests.runtime.live import Live, await_gone, moesim, write_config
from tests.runtime.test_launch import FLAGS, await_waves, launched, plan_of, replicated, wave_digests

dist = pytest.mark.dist


@dist
def test_a_checkpoint_of_one_mesh_serves_on_another(tmp_path: Path) -> None:
    first = launched(tmp_path / "first", plan_of(1, pp=2))
    saved = tmp_path / "saved"
    try:
        first.apply(replicated(1, pp=2))
        assert client.save_checkpoint(first.control, str(saved))["epoch"] == 1
        with pytest.raises(ApplyError, match="is in use"):
            client.save_checkpoint(first.control, str(saved))
        with pytest.raises(ApplyError, match="absolute"):
            client.save_checkpoint(first.control, "saved")
        await_waves(first, 1)
        wanted = wave_digests(first)
    finally:
        assert first.close() == 0
    other = launched(tmp_path / "other", plan_of(2, 5, tp=2), "--checkpoint", str(saved), "--seed", "0")
    try:
        await_waves(other, 1)
        assert wave_digests(other) == wanted
    finally:
        assert other.close() == 0


@dist
def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan_of(1).write(path)
    refused = moesim("launch", str(path), "--model", str(write_config(tmp_path / "tiny")), "--checkpoint", str(tmp_path / "none"))
    assert refused.returncode == 2 and "checkpoint.json: does not exist" in refused.stderr


SCONTROL = "#!/bin/sh\necho 127.0.0.1\n"
SRUN = """#!/bin/sh
# Stands in for srun: drops its options, starts SLURM_NTASKS tasks, and waits for them.
while [ "${1#--}" != "$1" ]; do shift; done
for rank in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$rank "$@" & done
wait
"""


def free_ports() -> int:
    """Return a port that is free, as is the next one, below those that systems hand out by themselves."""
    for port in range(21000 + os.getpid() % 5000, 29000, 2):
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue
    raise AssertionError("no port is free")


@dist
@pytest.mark.parametrize("kind", ["torchrun", pytest.param("slurm", marks=pytest.mark.slow)])
def test_a_template_starts_the_deployment(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, bash = write_config(tmp_path / "tiny"), tmp_path / "plan.json", shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    plan_of(1, pp=2).write(path)
    printed = moesim("launch", str(path), "--model", str(model), "--write-template", kind)
    assert printed.returncode == 0, printed.stderr
    (tmp_path / "launch.sh").write_text(printed.stdout)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": "1", "PYTHON": sys.executable, "MASTER_PORT": str(free_ports())}
    for name, value in {**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    live = Live(model, *FLAGS, command=[bash, str(tmp_path / "launch.sh")])
    try:
        assert len(set(live.pids)) == 2 and live.ready["parallel"]["pp"] == 2
        assert json.loads(live.apply(replicated(1, pp=2)).stdout)["status"] == "installed"
        client.stop(live.control)
        assert live.process.wait(30) == 0
    finally:
        live.close()
    assert await_gone(live.pids, 5) == []


def test_a_template_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--write-template"):
        script("pbs", plan=tmp_path / "p", model="m", world=4)
    with pytest.raises(InputError, match="--nodes"):
        script("slurm", plan=tmp_path / "p", model="m", world=4, nodes=3)
    text = script("torchrun", plan=tmp_path / "a b;.json", model="odd\nname", world=4, nodes=2)
    assert f"'{tmp_path}/a b;.json'" in text and "--nproc-per-node=2" in text
    assert [line for line in text.splitlines() if line.startswith("name")] == ['name\' --launcher env "$@"'], "a comment holds no line end"
