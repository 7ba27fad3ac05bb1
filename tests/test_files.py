"""Files from outside are hostile, files to outside are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from moesim import files
from moesim.errors import InputError


def write(tmp_path: Path, text: str, name: str = "x.json") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": NaN}', "not allowed"),
        ('{"a": 1', "not valid JSON"),
        ("[" * 200 + "]" * 200, "nested"),
        ("[" * 100_000, "not valid JSON|nested"),
        ("", "not valid JSON"),
    ],
)
def test_hostile_json_is_refused_with_its_rule(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        files.read_json(write(tmp_path, text))
    assert "x.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("a: 1\na: 2\n", "twice"),
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("? [1]\n: 2\n", "plain name"),
        ("[" * 90 + "]" * 90, "nested"),
        ("[" * 1_000_000, "nested"),
    ],
)
def test_hostile_yaml_is_refused_with_its_rule(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        files.read_yaml(write(tmp_path, text, "x.yaml"))


def test_a_file_past_its_limit_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="size = '11 B' must be <= 10 B"):
        files.read_bytes(write(tmp_path, "x" * 11), limit=10)


@pytest.mark.parametrize("name", ["absent.json", "."])
def test_a_missing_file_and_a_folder_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist|is a folder"):
        files.read_json(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = write(tmp_path, "old")

    def broken(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        files.write_atomic(target, broken)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
