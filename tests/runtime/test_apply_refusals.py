"""Bad input to `moesim apply` is refused or rolled back with the reason; the old map serves on and the exit code says so."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import ApplyError  # noqa: E402
from moesim.plan import Parallel, Plan  # noqa: E402
from moesim.runtime import agent as agent_module  # noqa: E402
from moesim.runtime import client  # noqa: E402
from tests.runtime.inside import Inside, inside, plan_of  # noqa: E402
from tests.runtime.live import Result, moesim  # noqa: E402

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with inside(tmp_path_factory.mktemp("inside"), token="secret") as started:
        yield started


def apply(live: Inside, plan: Plan, folder: Path, token: str = "secret") -> Result:
    plan.write(folder / "plan.json")
    return moesim("apply", str(folder / "plan.json"), "--to", live.address, "--json", token=token)


def assert_refused(live: Inside, result: Result, reason: str, code: int = 1) -> None:
    """The reason is told, in one line and without a traceback; nothing has changed and serving goes on."""
    assert result.returncode == code and result.stdout == "", result
    assert reason in result.stderr and result.stderr.startswith("moesim: ") and "Traceback" not in result.stderr, result.stderr
    assert live.maps() == {live.plan.map_sha256}
    assert live.serves()


def test_a_plan_for_another_model(shared: Inside, tmp_path: Path) -> None:
    assert_refused(shared, apply(shared, plan_of(1, num_experts=4), tmp_path), "num_experts")
    assert_refused(shared, apply(shared, replace(plan_of(1), fingerprints={"model": "0" * 64}), tmp_path), "fingerprints.model")


def test_a_plan_for_other_ranks_or_degrees(shared: Inside, tmp_path: Path) -> None:
    assert_refused(shared, apply(shared, plan_of(1, num_ranks=4), tmp_path), "num_ranks")
    assert_refused(shared, apply(shared, replace(plan_of(1), parallel=Parallel(tp=2)), tmp_path), "relaunch with this plan")


def test_a_wrong_token(shared: Inside, tmp_path: Path) -> None:
    assert_refused(shared, apply(shared, plan_of(1), tmp_path, token="guess"), "token is wrong")
    assert_refused(shared, apply(shared, plan_of(1), tmp_path, token=""), "token is wrong")


def test_a_plan_file_that_was_damaged(shared: Inside, tmp_path: Path) -> None:
    plan_of(1).write(tmp_path / "plan.json")
    text = (tmp_path / "plan.json").read_text()
    (tmp_path / "plan.json").write_text(text.replace('"num_ranks":2', '"num_ranks":3'))
    assert_refused(shared, moesim("apply", str(tmp_path / "plan.json"), "--to", shared.address, "--json", token="secret"), "sha256", code=2)


def test_a_stale_plan(shared: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESIM_TOKEN", "secret")
    with pytest.raises(ApplyError, match="installed|placement"):
        client.apply_plan(shared.address, plan_of(1), base="0" * 64)
    assert shared.maps() == {shared.plan.map_sha256} and shared.serves()


def test_too_little_memory(shared: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "free_memory", lambda: 1000)
    assert_refused(shared, apply(shared, plan_of(1), tmp_path), "must be <= the 1000 B free")


@pytest.mark.parametrize("where", ["buffer", "parameter", "attribute"])
def test_an_unregistered_tensor_with_an_expert_dimension(where: str, shared: Inside, tmp_path: Path) -> None:
    layer: Any = shared.layers[1][0]
    value = torch.ones(layer.held_slots)
    if where == "buffer":
        layer.register_buffer("down_proj_scale", value)
    else:
        layer.down_proj_scale = torch.nn.Parameter(value, requires_grad=False) if where == "parameter" else value
    try:
        assert_refused(shared, apply(shared, plan_of(1), tmp_path), "down_proj_scale")
    finally:
        delattr(layer, "down_proj_scale")


def test_a_rank_that_hangs_in_a_command(shared: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.deployment, "answer_s", 0.5)
    with shared.agents[1]._lock:  # its agent cannot answer and its serving loop stands still
        result = apply(shared, plan_of(1), tmp_path)
    assert_refused(shared, result, "did not answer")
    assert "rank 1" in result.stderr


@pytest.mark.parametrize("record", ["prepare", "commit"])
def test_a_full_disk_before_the_decision(record: str, shared: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if descriptor == shared.journal._file.fileno() and f'"kind":"{record}"'.encode() in data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    assert_refused(shared, apply(shared, plan_of(1), tmp_path), "the decision cannot be written (No space left on device)")


def test_an_error_between_the_journal_and_the_announcement_takes_the_commit_back(shared: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = shared.deployment.store.compare_set

    class Store:
        """The store, but the first decision on an install cannot be announced."""

        def compare_set(self, key: str, old: str, new: str) -> bytes:
            if new != "abort" and shared.journal.records[-1]["kind"] == "commit":
                raise RuntimeError("the store is gone")
            return bytes(real(key, old, new))

        def __getattr__(self, name: str) -> Any:
            return getattr(self_store, name)

    self_store = shared.deployment.store
    monkeypatch.setattr(shared.deployment, "store", Store())
    assert_refused(shared, apply(shared, plan_of(1), tmp_path), "the store is gone")


def test_after_all_this_a_good_plan_is_installed_even_if_the_disk_is_full_by_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with inside(tmp_path) as live:
        real = live.journal.append

        def append(kind: str, **fields: Any) -> None:
            if kind == "done":
                raise ApplyError("no space")
            real(kind, **fields)

        monkeypatch.setattr(live.journal, "append", append)
        result = apply(live, plan_of(1), tmp_path, token="")
        assert result.returncode == 0 and json.loads(result.stdout)["status"] == "installed", result.stderr
        assert live.maps() == {plan_of(1).map_sha256} and live.serves()


def test_a_verification_that_cannot_be_carried_out_puts_the_old_map_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moesim.runtime.apply import Apply

    def judge(*_: object) -> str:
        raise ValueError("no verdict")

    monkeypatch.setattr(Apply, "_judge", judge)
    with inside(tmp_path) as live:
        result = apply(live, plan_of(1), tmp_path, token="")
        assert result.returncode == 1 and "no verdict" in result.stderr and json.loads(result.stdout)["status"] == "rolled_back"
        assert live.maps() == {live.plan.map_sha256} and live.serves()
