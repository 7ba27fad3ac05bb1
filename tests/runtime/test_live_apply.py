"""A plan is carried out on real processes that serve on: same pids, same answers, measured balance."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import Plan, linear
from moesim.runtime import client
from moesim.traces.open import open_trace
from tests.runtime.live import CONFIG, EXPERTS, LAYERS, Live, alive, moesim, write_config

pytestmark = pytest.mark.dist
TOKEN = "a-shared-secret"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture(scope="module")
def live(folder: Path) -> Iterator[Live]:
    config = write_config(folder / "tiny")
    started = Live(config, "--repeat", "1", "--decode", "7", "--trace-out", str(folder / "trace"), "--journal", str(folder / "journal"), token=TOKEN)
    yield started
    assert started.close() == 0
    assert started.stderr_text == ""


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESIM_TOKEN", TOKEN)


def permutation(seed: int, kind: str = "random") -> Plan:
    return linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=4, kind=kind, seed=seed)


def replicated(per_rank: int = 6) -> Plan:
    table = np.stack([np.random.Generator(np.random.PCG64(row)).permutation(np.concatenate([np.arange(16), np.arange(7), [-1]])) for row in range(3)])
    return Plan(model="tiny", num_experts=16, moe_layer_ids=LAYERS, slot_to_expert_LS=table, slot_rank_S=np.repeat(np.arange(4), per_rank), num_ranks=4)


def wave_digests(live: Live) -> list[list[Any]]:
    """Per rank the digests of all waves so far; with --repeat 1 all waves ask the same."""
    return [[digest for _, digest in rank["wave_digests"]] for rank in client.metrics(live.control)["rank_metrics"]]


def await_waves(live: Live, more: int) -> None:
    start = client.metrics(live.control)["rank_metrics"][0]["waves"]
    deadline = time.monotonic() + 60
    while min(rank["waves"] for rank in client.metrics(live.control)["rank_metrics"]) < start + more:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_ready_line_names_the_control_port_and_the_ranks(live: Live) -> None:
    assert set(live.ready) >= {"control", "pids"}
    assert len(set(live.pids)) == 4 and all(alive(pid) for pid in live.pids)
    status = client.status(live.control)
    assert status["state"] == "serving" and status["pids"] == live.pids
    assert {rank["epoch"] for rank in status["rank_status"]} == {0}
    assert {rank["pid"] for rank in status["rank_status"]} == set(live.pids)


def test_dry_run_tells_what_would_move_and_moves_nothing(live: Live) -> None:
    result = live.apply(permutation(1), "--dry-run")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    old = permutation(0, "linear").slot_to_expert_LS
    assert report["schema"] == "moesim.apply/1" and report["status"] == "dry-run" and report["epoch"] == 0
    assert report["moved"]["slots"] == int((old != permutation(1).slot_to_expert_LS).sum())
    expert_bytes = 3 * CONFIG["hidden_size"] * CONFIG["moe_intermediate_size"] * 4  # type: ignore[operator]
    assert report["moved"]["bytes"] == report["moved"]["slots"] * expert_bytes == np.sum(report["moved"]["rank_pairs"])
    assert report["balance"]["after"] is None and 0 < report["balance"]["predicted"] <= 1
    assert client.status(live.control)["map_sha256"] == permutation(0, "linear").map_sha256


def test_a_permutation_is_installed_while_requests_are_served(live: Live) -> None:
    await_waves(live, 1)
    served = sum(rank["requests"] for rank in client.metrics(live.control)["rank_metrics"])
    result = live.apply(permutation(1))
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "installed" and report["epoch"] == 1 and report["map_sha256"] == permutation(1).map_sha256
    assert report["outputs_equal"] is True and report["outputs"]["bitwise"] is True
    assert 0 < report["balance"]["before"] <= 1 and 0 < report["balance"]["after"] <= 1
    assert report["balance"]["after"] == report["balance"]["predicted"], "the same requests again and again: the prediction must be exact"
    assert 0 < report["pause_ms"] < 5000
    assert all(alive(pid) for pid in live.pids)
    status = client.status(live.control)
    assert status["pids"] == live.pids and status["map_sha256"] == report["map_sha256"]
    await_waves(live, 2)
    assert all(len(set(digests)) == 1 for digests in wave_digests(live)), "answers changed or were lost"
    metrics = client.metrics(live.control)["rank_metrics"]
    assert sum(rank["requests"] for rank in metrics) > served
    assert all(rank["requests"] == 4 * rank["waves"] for rank in metrics)


def test_applying_the_installed_plan_again_changes_nothing(live: Live) -> None:
    result = live.apply(permutation(1))
    report = json.loads(result.stdout)
    assert result.returncode == 0
    assert (report["status"], report["epoch"], report["moved"]["slots"]) == ("unchanged", 1, 0)


@pytest.mark.parametrize("case", ["model", "layers", "ranks", "slots", "fingerprint"])
def test_a_plan_that_does_not_fit_is_refused_with_the_reason(live: Live, case: str) -> None:
    fitting: dict[str, Any] = {"model": "other", "num_experts": EXPERTS, "moe_layer_ids": LAYERS, "num_ranks": 4}
    changes: dict[str, dict[str, Any]] = {"model": {"num_experts": 8}, "layers": {"moe_layer_ids": (0, 1)}, "ranks": {"num_ranks": 2}}
    plan = linear(**{**fitting, **changes.get(case, {})})
    if case == "slots":
        table = np.tile(np.arange(16), (3, 1))
        plan = Plan(model="t", num_experts=16, moe_layer_ids=LAYERS, slot_to_expert_LS=table, slot_rank_S=np.sort([0] * 13 + [1, 2, 3]), num_ranks=4)
    elif case == "fingerprint":
        plan = Plan(**{**{name: getattr(plan, name) for name in Plan.__dataclass_fields__}, "fingerprints": {"model": "0" * 64}})
    result = live.apply(plan)
    words = {"model": "num_experts", "layers": "moe_layer_ids", "ranks": "num_ranks", "slots": "slots per rank", "fingerprint": "fingerprints.model"}
    assert result.returncode == 1 and result.stdout == ""
    assert words[case] in result.stderr and "Traceback" not in result.stderr
    assert {rank["epoch"] for rank in client.status(live.control)["rank_status"]} == {1}


def test_bad_input_is_refused_before_anybody_is_asked(live: Live, tmp_path: Path) -> None:
    damaged = tmp_path / "plan.json"
    permutation(2).write(damaged)
    damaged.write_text(damaged.read_text().replace('"num_ranks":4', '"num_ranks":5'))
    for arguments in ([str(damaged), "--to", live.control], [str(tmp_path / "none.json"), "--to", live.control], [str(damaged), "--to", "nowhere"]):
        result = moesim("apply", *arguments, "--json", token=TOKEN)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.startswith("moesim: ")


def test_a_wrong_token_and_a_closed_port_are_refused(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    permutation(2).write(path)
    wrong = moesim("apply", str(path), "--to", live.control, "--json", token="guess")
    assert wrong.returncode == 1 and "token is wrong" in wrong.stderr
    closed = moesim("apply", str(path), "--to", "127.0.0.1:1", "--json", token=TOKEN)
    assert closed.returncode == 1 and "no deployment answers" in closed.stderr


def test_replicas_beyond_the_memory_held_so_far_are_installed_within_tolerance(live: Live) -> None:
    result = live.apply(replicated())
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["status"] == "installed" and report["epoch"] == 2
    assert report["outputs_equal"] is True and report["outputs"]["relative_error"] <= 1e-4
    assert report["balance"]["after"] == pytest.approx(report["balance"]["predicted"], abs=0.05), "shares are kept up to whole tokens"
    back = json.loads(live.apply(permutation(7)).stdout)
    assert back["status"] == "installed" and back["epoch"] == 3


def test_the_trace_holds_every_token_that_was_routed(live: Live, folder: Path) -> None:
    await_waves(live, 1)
    rows = client.publish_trace(live.control)["rows"]
    trace = open_trace(str(folder / "trace"))
    assert trace.shape.num_experts == EXPERTS and trace.shape.moe_layer_ids == LAYERS and trace.shape.top_k == 4
    assert trace.num_rows == rows
    per_rank: dict[int, int] = {}
    seen = set()
    for batch in trace.batches():
        for rank in range(4):
            per_rank[rank] = per_rank.get(rank, 0) + int((batch.rank_T == rank).sum())
        seen |= set(zip(batch.request_T.tolist(), batch.position_T.tolist(), strict=True))
        assert ((batch.phase_T == 0) == (batch.position_T < 16)).all()
        assert all(len(set(row)) == 4 for row in batch.experts_TLK[:50].reshape(-1, 4).tolist())
    assert len(seen) == sum(per_rank.values()) == rows, "no token twice, none missing"
    assert len(set(per_rank.values())) == 1
    step_tokens = [16 * 4, *[4] * 7]
    steps = trace.provenance["steps"]
    assert per_rank[0] == sum(step_tokens[step % 8] for step in range(steps))


def test_one_apply_at_a_time(live: Live) -> None:
    import threading

    results: list[str] = []

    def attempt(seed: int) -> None:
        try:
            results.append(client.apply_plan(live.control, permutation(seed))["status"])
        except Exception as error:
            results.append(str(error))

    threads = [threading.Thread(target=attempt, args=(seed,)) for seed in (11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted("another apply" in result for result in results) == [False, True]
    assert "installed" in results


def test_the_journal_names_the_installed_plan(live: Live, folder: Path) -> None:
    from moesim.runtime.journal import Journal

    copy = folder / "journal-copy"
    copy.write_bytes((folder / "journal").read_bytes())
    journal = Journal(copy)
    plan = journal.installed()
    journal.close()
    assert plan is not None and plan.map_sha256 == client.status(live.control)["map_sha256"]


@pytest.mark.slow
def test_a_deployment_started_by_torchrun_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESIM_TOKEN", "")
    started = Live(write_config(tmp_path / "tiny"), "--launcher", "torchrun", "--decode", "3", ranks=2)
    try:
        plan = linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=2, kind="random", seed=1)
        report = json.loads(started.apply(plan).stdout)
        assert (report["status"], report["outputs"]["bitwise"]) == ("installed", True)
        assert all(alive(pid) for pid in started.pids)
    finally:
        assert started.close() == 0
