"""A recorder that is killed at any moment leaves a trace that is a true beginning of what it would have written, or is refused with the remedy."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import TraceError  # noqa: E402
from moesim.runtime.capture import Capture  # noqa: E402
from moesim.runtime.capture_spool import publish  # noqa: E402
from moesim.runtime.model import build  # noqa: E402
from moesim.runtime.spec import read_spec  # noqa: E402
from moesim.traces import columns  # noqa: E402
from moesim.traces.open import open_trace  # noqa: E402
from moesim.traces.repair import repair  # noqa: E402
from moesim.traces.routing_trace import TokenBatch, TraceShape, concatenate  # noqa: E402
from tests.runtime.live import write_config  # noqa: E402
from tests.runtime.test_capture_spool import spooled  # noqa: E402

pytestmark = pytest.mark.dist
KILLS, STEPS, TOKENS = 20, 200, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    return build(read_spec(str(write_config(tmp_path_factory.mktemp("model"), num_hidden_layers=1))))


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen groups of three rows a shard: most shards end in the middle of a step."""
    monkeypatch.setattr(columns, "group_rows", lambda spec: 3)


def record(model: Any, target: Path, checkpoint_s: float, started: Callable[[], None] = lambda: None) -> None:
    with Capture(model, target, checkpoint_s=checkpoint_s, stages=False) as capture, torch.inference_mode():
        for step in range(STEPS):
            model(input_ids=(torch.arange(TOKENS)[None] * 7 + step) % 256, use_cache=False)
            if step == 0:
                started()
    assert capture.steps == STEPS


@pytest.fixture(scope="module")
def wanted(model: Any, tmp_path_factory: pytest.TempPathFactory) -> TokenBatch:
    folder = tmp_path_factory.mktemp("whole") / "t"
    record(model, folder, 60.0)
    return rows_of(folder)


def rows_of(folder: Path) -> TokenBatch:
    return concatenate(list(open_trace(str(folder)).batches()))


def forked(work: Callable[[Callable[[], None]], None]) -> tuple[int, int]:
    """Run `work` in a child; return its pid and a pipe that ends or has a byte when it has begun."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.close(reader)
            work(lambda: os.close(writer))
        finally:
            os._exit(0)
    os.close(writer)
    return pid, reader


def is_a_beginning(folder: Path, wanted: TokenBatch) -> int:
    """Check that a trace is whole steps from the first on, each with the true routes; return how many."""
    trace = open_trace(str(folder))
    rows = rows_of(folder)
    assert len(rows) == trace.num_rows and len(rows) % TOKENS == 0 and len(rows) > 0
    for name in ("experts_TLK", "step_T", "position_T", "phase_T"):
        assert (getattr(rows, name) == getattr(wanted, name)[: len(rows)]).all()
    if len(rows) < len(wanted):
        assert trace.provenance["unfinished"] is True
    return len(rows) // TOKENS


def examine(folder: Path, saved: Path, wanted: TokenBatch) -> str:
    """Check what a killed recorder has left; return what it was."""
    readable = 0
    try:
        readable = is_a_beginning(folder, wanted)
        found = "finished" if readable == STEPS else "readable"
    except TraceError as error:
        assert "moesim trace repair" in str(error), "the message names the remedy"
        found = "refused"
    try:
        repair(folder, saved)
    except TraceError as error:
        assert found == "finished" or "record it again" in str(error)
        return found if found != "refused" else "lost"
    steps = is_a_beginning(saved, wanted)
    assert steps >= readable
    return f"{found}, more saved" if steps > readable else found


def test_a_recorder_killed_at_random_is_never_silently_wrong(model: Any, wanted: TokenBatch, tmp_path: Path) -> None:
    rng = np.random.Generator(np.random.PCG64(7))
    outcomes = []
    for trial in range(KILLS):
        folder = tmp_path / f"trace-{trial}"
        every_s = (0.0, 0.01, 60.0)[trial % 3]
        pid, reader = forked(lambda started, folder=folder, every_s=every_s: record(model, folder, every_s, started))  # type: ignore[misc]
        os.read(reader, 1)
        os.close(reader)
        time.sleep(float(rng.uniform(0, 0.3)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        outcomes.append(examine(folder, tmp_path / f"saved-{trial}", wanted))
    assert set(outcomes) - {"finished", "lost"}, outcomes


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_recorder_killed_at_every_renaming_is_never_silently_wrong(model: Any, wanted: TokenBatch, tmp_path: Path, after: bool) -> None:
    """Files appear by renaming only, so these are all states that a folder can be left in."""
    outcomes = []
    for number in range(1, 12):
        folder = tmp_path / f"trace-{number}"

        def work(started: Callable[[], None], folder: Path = folder, number: int = number) -> None:
            real, left = os.replace, [number]

            def replace(source: Any, target: Any) -> None:
                left[0] -= 1
                if left[0] == 0 and not after:
                    os._exit(9)
                real(source, target)
                if left[0] == 0:
                    os._exit(9)

            os.replace = replace  # type: ignore[assignment]
            record(model, folder, 60.0 if number % 2 else 0.0)

        pid, reader = forked(work)
        os.close(reader)
        os.waitpid(pid, 0)
        if not folder.exists() or not (folder / "manifest.json").exists():
            with pytest.raises(TraceError, match="record or import the trace again"):
                open_trace(str(folder)) if folder.exists() else repair(folder, tmp_path / "none")
            continue
        outcomes.append(examine(folder, tmp_path / f"saved-{number}", wanted))
    assert {"refused, more saved", "readable"} <= set(outcomes), outcomes


def test_a_publisher_killed_at_random_leaves_the_trace_before_or_after(tmp_path: Path) -> None:
    shape = TraceShape(model="m", num_experts=8, top_k=2, moe_layer_ids=(0,))
    spooled(tmp_path / "spool", shape, [6, 6])
    target = tmp_path / "trace"
    rows = publish(tmp_path / "spool", 2, shape, target, {})
    rng = np.random.Generator(np.random.PCG64(3))

    def work(started: Callable[[], None]) -> None:
        started()
        while True:
            publish(tmp_path / "spool", 2, shape, target, {})

    for _ in range(10):
        pid, reader = forked(work)
        os.read(reader, 1)
        os.close(reader)
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert open_trace(str(target)).num_rows == rows == len(rows_of(target))


def test_repair_keeps_what_is_sound_and_refuses_what_is_whole(model: Any, wanted: TokenBatch, tmp_path: Path) -> None:
    record(model, tmp_path / "t", 60.0)
    with pytest.raises(TraceError, match="nothing to repair"):
        repair(tmp_path / "t", tmp_path / "out")
    shards = sorted((tmp_path / "t").glob("tokens-*.parquet"))
    damaged = bytearray(shards[4].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shards[4].write_bytes(bytes(damaged))
    with pytest.raises(TraceError, match="damaged"):
        rows_of(tmp_path / "t")
    manifest = repair(tmp_path / "t", tmp_path / "out")
    assert is_a_beginning(tmp_path / "out", wanted) == manifest.num_rows // TOKENS
    assert 4 * 48 - 2 * TOKENS < manifest.num_rows < 4 * 48 and manifest.provenance["repaired"]["shards_left_out"] == len(shards) - 4
    steps = open_trace(str(tmp_path / "out")).tables("steps")  # type: ignore[misc]
    assert steps is not None and len(steps["step"]) == manifest.num_rows // TOKENS, "side tables end with the rows"
    with pytest.raises(TraceError, match="another folder"):
        repair(tmp_path / "t", tmp_path / "t")
    (tmp_path / "t" / "manifest.json").unlink()
    with pytest.raises(TraceError, match="nothing says"):
        repair(tmp_path / "t", tmp_path / "none")


def test_the_command_says_what_it_saved(model: Any, tmp_path: Path) -> None:
    from tests.runtime.live import moesim

    with pytest.raises(KeyError), Capture(model, tmp_path / "t", stages=False), torch.inference_mode():
        model(input_ids=torch.arange(TOKENS)[None], use_cache=False)
        raise KeyError("the user's own")
    found = moesim("trace", "repair", str(tmp_path / "t"), "-o", str(tmp_path / "out"), "--json")
    report = json.loads(found.stdout)
    assert found.returncode == 0 and report["schema"] == "moesim.trace-repaired/1" and report["rows"] == TOKENS
    joined = moesim("trace", "join", str(tmp_path / "out"), "-o", str(tmp_path / "joined"), "--json")
    assert joined.returncode == 0 and json.loads(joined.stdout)["steps"] == 1, joined.stderr
