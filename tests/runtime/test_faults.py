"""Whatever goes wrong during a migration, it ends in bounded time, nothing mixed is served, and nobody is left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import Plan, linear
from moesim.runtime import client
from moesim.runtime.control import call
from moesim.runtime.journal import Journal
from tests.runtime.live import EXPERTS, LAYERS, Live, await_gone, write_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp("faults")
    flags = ("--repeat", "1", "--decode", "3", "--journal", str(folder / "journal"), "--timeout", "30", "--answer-timeout", "4")
    started = Live(write_config(folder / "tiny"), *flags, ranks=3, failpoints=True)
    yield started
    started.close()


def plan(seed: int) -> Plan:
    return linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=3, kind="random", seed=seed)


def fail(live: Live, rank: int, name: str, action: str) -> None:
    call(live.control, "failpoint", rank=rank, name=name, action=action)


def answers(live: Live) -> set[str]:
    """The digests of all waves of rank 0; one only, as every wave asks the same."""
    return {digest for _, digest in client.metrics(live.control)["rank_metrics"][0]["wave_digests"]}


def assert_serves_on(live: Live, epoch: int, map_sha256: str) -> None:
    """All ranks go on stepping in one epoch of one map, and the answers are what they were."""
    before = client.metrics(live.control)["rank_metrics"]
    deadline = time.monotonic() + 20
    while True:
        after = client.metrics(live.control)["rank_metrics"]
        if all(new["waves"] > old["waves"] + 1 for old, new in zip(before, after, strict=True)):
            break
        assert time.monotonic() < deadline, "serving stands still"
        time.sleep(0.05)
    assert {rank["epoch"] for rank in after} == {epoch}
    assert {rank["map_sha256"] for rank in after} == {map_sha256}
    assert len(answers(live)) == 1


@pytest.mark.parametrize(
    ("rank", "name", "action", "message"),
    [
        (0, "stage.sent", "flip", "arrived damaged from rank 0"),
        (1, "stage.staged", "flip", r"rank 1: expert \d+ of layer row \d arrived damaged from rank \d; nothing was installed"),
        (2, "stage.begin", "raise", "rank 2: RuntimeError: failpoint stage.begin"),
        (1, "stage.batch", "raise", "rank 1: RuntimeError: failpoint stage.batch"),
    ],
)
def test_a_failure_before_the_decision_leaves_everything_as_it_was(live: Live, rank: int, name: str, action: str, message: str) -> None:
    old = client.status(live.control)["map_sha256"]
    fail(live, rank, name, action)
    begin = time.monotonic()
    result = live.apply(plan(1))
    assert result.returncode == 1 and result.stdout == ""
    assert re.search(message, result.stderr), result.stderr
    assert time.monotonic() - begin < 15
    assert_serves_on(live, 0, old)


def test_damage_found_after_the_install_puts_the_old_placement_back(live: Live) -> None:
    old = client.status(live.control)["map_sha256"]
    fail(live, 1, "install.begin", "flip")
    result = live.apply(plan(1))
    assert result.returncode == 1
    assert "verification failed" in result.stderr and "put back" in result.stderr
    report = json.loads(result.stdout)
    assert (report["status"], report["epoch"], report["map_sha256"]) == ("rolled_back", 2, old)
    assert_serves_on_after_damage(live, 2, old)


def assert_serves_on_after_damage(live: Live, epoch: int, map_sha256: str) -> None:
    """As `assert_serves_on`, but the answers between install and rollback may differ: the last ones must be the first ones."""
    digests = [digest for _, digest in client.metrics(live.control)["rank_metrics"][0]["wave_digests"]]
    deadline = time.monotonic() + 20
    while len(client.metrics(live.control)["rank_metrics"][0]["wave_digests"]) < len(digests) + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    metrics = client.metrics(live.control)["rank_metrics"]
    assert {rank["epoch"] for rank in metrics} == {epoch} and {rank["map_sha256"] for rank in metrics} == {map_sha256}
    for rank in metrics:
        assert rank["wave_digests"][-1][1] == rank["wave_digests"][0][1]


def test_a_plan_is_installed_after_all_those_failures(live: Live) -> None:
    result = live.apply(plan(1))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "installed" and report["outputs"]["bitwise"] is True and report["epoch"] == 3


def test_a_rank_that_hangs_is_named_in_bounded_time_and_may_come_back(live: Live) -> None:
    os.kill(live.pids[1], signal.SIGSTOP)
    begin = time.monotonic()
    try:
        result = live.apply(plan(2))
    finally:
        os.kill(live.pids[1], signal.SIGCONT)
    assert result.returncode == 1
    assert "rank 1" in result.stderr and "did not answer check within" in result.stderr
    assert time.monotonic() - begin < 8
    deadline = time.monotonic() + 20
    while client.status(live.control)["rank_status"][1]["age_s"] > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert_serves_on_after_damage(live, 3, plan(1).map_sha256)


def test_a_rank_killed_while_staging_ends_the_apply_at_once(live: Live) -> None:
    fail(live, 2, "stage.batch", "kill")
    begin = time.monotonic()
    result = live.apply(plan(3))
    assert result.returncode == 1
    assert "rank 2" in result.stderr and "killed by SIGKILL" in result.stderr
    assert time.monotonic() - begin < 8
    again = live.apply(plan(3))
    assert again.returncode == 1 and "the deployment has failed: rank 2" in again.stderr
    status = client.status(live.control)
    assert status["state"] == "failed" and "rank 2" in status["reason"]
    assert await_gone(live.pids, 5) == [], "survivors leave when their group is broken"
    journal_path = Path(live.errors.name).parent.parent / "journal"
    journal_copy = journal_path.with_name("copy")
    journal_copy.write_bytes(journal_path.read_bytes())
    journal = Journal(journal_copy)
    installed = journal.installed()
    journal.close()
    assert installed is not None and installed.map_sha256 == plan(1).map_sha256


def test_a_restart_serves_what_the_journal_says_and_dies_with_its_launcher(live: Live) -> None:
    journal = Path(live.errors.name).parent.parent / "journal"
    live.process.send_signal(signal.SIGINT)
    assert live.process.wait(20) == 1, "a failed deployment says so in its exit code"
    again = Live(write_config(journal.parent / "again" / "tiny"), "--journal", str(journal), ranks=3)
    try:
        assert client.status(again.control)["map_sha256"] == plan(1).map_sha256
        again.process.kill()
        again.process.wait()
        assert await_gone(again.pids, 5) == [], "ranks outlived a killed launcher"
    finally:
        again.close()
