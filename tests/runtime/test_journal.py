"""Wherever the journal is cut or damaged, it names the old placement or the new one, and can be continued."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import ApplyError
from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan, linear
from moesim.runtime.journal import Journal


def stamped(plan: Plan) -> dict[str, Any]:
    content = plan.content()
    return {**content, "sha256": sha256_hex(canonical_json(content))}


OLD = linear(model="m", num_experts=4, moe_layer_ids=(0,), num_ranks=2)
NEW = linear(model="m", num_experts=4, moe_layer_ids=(0,), num_ranks=2, kind="round_robin")


def written(path: Path, last: str = "done") -> Journal:
    journal = Journal(path)
    journal.append("start", plan=stamped(OLD))
    journal.append("prepare", apply=1, plan=stamped(NEW))
    for kind in ("commit", "done") if last == "done" else ("commit", "rollback") if last == "rollback" else (last,):
        journal.append(kind, apply=1)
    return journal


def installed(path: Path) -> str | None:
    journal = Journal(path)
    plan = journal.installed()
    journal.close()
    return None if plan is None else plan.map_sha256


@pytest.mark.parametrize(("last", "expected"), [("done", NEW), ("commit", NEW), ("abort", OLD), ("rollback", OLD)])
def test_the_last_standing_commit_decides(tmp_path: Path, last: str, expected: Plan) -> None:
    written(tmp_path / "journal", last).close()
    assert installed(tmp_path / "journal") == expected.map_sha256


def test_a_cut_at_every_byte_recovers_to_the_old_or_the_new_map_only(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path).close()
    data = path.read_bytes()
    commit_end = [index for index, byte in enumerate(data) if byte == 10][2] + 1
    start_end = data.index(b"\n") + 1
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert installed(path) == (NEW.map_sha256 if cut >= commit_end else OLD.map_sha256 if cut >= start_end else None), cut


def test_a_flipped_bit_ends_the_journal_there_and_writing_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path, "commit").close()
    data = bytearray(path.read_bytes())
    data[-20] ^= 4
    path.write_bytes(bytes(data))
    journal = Journal(path)
    assert [record["kind"] for record in journal.records] == ["start", "prepare"]
    journal.append("commit", apply=1)
    journal.close()
    assert installed(path) == NEW.map_sha256


def test_a_record_that_cannot_reach_the_disk_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = written(path, "abort")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ApplyError, match="No space left"):
            journal.append("commit", apply=1)
    journal.append("done", apply=1)
    journal.close()
    assert installed(path) == OLD.map_sha256
    assert [record["kind"] for record in journal.records] == ["start", "prepare", "abort", "done"]
