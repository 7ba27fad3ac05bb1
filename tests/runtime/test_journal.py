"""Wherever the journal is cut or damaged, it names the old placement or the new one, and can be continued."""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import ApplyError, InputError
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


def failing(code: int, after: int) -> Callable[..., int]:
    """A write of which the first call takes `after` bytes and the next fails: what a full disk does."""
    calls: list[int] = []

    def write(descriptor: int, data: bytes) -> int:
        calls.append(descriptor)
        if len(calls) > 1 or not after:
            raise OSError(code, os.strerror(code))
        return REAL_WRITE(descriptor, data[:after])

    return write


REAL_WRITE = os.write


@pytest.mark.parametrize("call", ["write", "write in the middle", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_record_that_cannot_reach_the_disk_is_not_counted(call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = written(path, "abort")
    journal.append("prepare", apply=2, plan=stamped(NEW))

    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, *(("fsync", fsync) if call == "fsync" else ("write", failing(code, 20 if "middle" in call else 0))))
        with pytest.raises(ApplyError, match=f"journal: the decision cannot be written .{os.strerror(code)}"):
            journal.append("commit", apply=2)
    assert installed(copy_of(path)) == OLD.map_sha256
    journal.append("abort", apply=2)
    journal.append("prepare", apply=3, plan=stamped(NEW))
    journal.append("commit", apply=3)
    journal.close()
    assert installed(path) == NEW.map_sha256
    assert kinds_in(path) == ["start", "prepare", "abort", "prepare", "abort", "prepare", "commit"]


def test_a_disk_that_neither_takes_nor_gives_back_bytes_leaves_one_of_the_two_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit may be on disk though its fsync failed and it could not be cut off; an abort that gets through later settles it."""
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.append("start", plan=stamped(OLD))
    journal.append("prepare", apply=1, plan=stamped(NEW))
    real = journal._file

    class Stuck:
        """The file, but it cannot be cut."""

        def truncate(self, size: int) -> int:
            if os.path.getsize(path) > size:
                raise OSError(errno.EIO, "stuck")
            return size

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "stuck")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(journal, "_file", Stuck())
        for kind in ("commit", "abort"):
            with pytest.raises(ApplyError, match="cannot be written"):
                journal.append(kind, apply=1)
        assert installed(copy_of(path)) in (OLD.map_sha256, NEW.map_sha256)
    journal.append("abort", apply=1)
    journal.close()
    assert installed(path) == OLD.map_sha256


def _fill_up(path: str, answers: Any) -> None:
    journal = Journal(Path(path))
    journal.append("start", plan=stamped(OLD))
    journal.append("prepare", apply=1, plan=stamped(NEW))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(path) + 30, limits[1]))
    try:
        journal.append("commit", apply=1)
        answers.put("written")
    except ApplyError as error:
        answers.put(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.append("abort", apply=1)
    journal.close()


def test_a_file_that_the_kernel_lets_grow_no_further_keeps_the_old_map(tmp_path: Path) -> None:
    """No seam: the kernel takes 30 bytes of the commit and refuses the rest."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_fill_up, args=(str(tmp_path / "journal"), answers))
    child.start()
    assert "the decision cannot be written (File too large)" in answers.get(timeout=20)
    child.join(20)
    assert child.exitcode == 0
    assert installed(tmp_path / "journal") == OLD.map_sha256
    assert kinds_in(tmp_path / "journal") == ["start", "prepare", "abort"]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("commit", "abort"), OLD), (("commit", "rollback"), OLD), (("commit", "rollback", "commit"), NEW), (("abort",), OLD),
        (("commit", "done", "rollback"), OLD),
    ],
)  # fmt: skip
def test_what_is_taken_back_does_not_count_and_what_is_given_again_does(tmp_path: Path, kinds: tuple[str, ...], expected: Plan) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append("start", plan=stamped(OLD))
    journal.append("prepare", apply=1, plan=stamped(NEW))
    for kind in kinds:
        journal.append(kind, apply=1)
    journal.close()
    assert installed(tmp_path / "journal") == expected.map_sha256


def test_after_ranks_were_lost_the_smaller_placement_counts(tmp_path: Path) -> None:
    journal = written(tmp_path / "journal")
    small = linear(model="m", num_experts=4, moe_layer_ids=(0,), num_ranks=1)
    journal.append("shrink", plan=stamped(small), lost=1)
    journal.close()
    assert installed(tmp_path / "journal") == small.map_sha256


def test_a_journal_that_cannot_be_opened_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "journal", Path("/dev/full")):
        with pytest.raises(InputError, match="cannot be written|is a folder|is not a regular file"):
            Journal(path)


def copy_of(path: Path) -> Path:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    return copy


def kinds_in(path: Path) -> list[str]:
    journal = Journal(path)
    journal.close()
    return [record["kind"] for record in journal.records]
