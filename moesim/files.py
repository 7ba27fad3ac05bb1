"""Reading hostile files and writing whole ones.

Every file from outside is read through here with a size limit and a safe parser (no duplicate keys,
no tags, bounded nesting); every output is written to a temporary name beside the target and renamed, so
that a crash or a full disk never leaves half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moesim.errors import InputError, describe

MAX_TEXT_BYTES = 64 * 2**20
MAX_DEPTH = 64


def read_bytes(path: Path, *, limit: int = MAX_TEXT_BYTES, error: type[InputError] = InputError) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, or raise `error` naming the file."""
    try:
        if not path.is_file():
            rule = "is a folder, not a file" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
            raise error(f"{path}: {rule}; check the path")
        size = path.stat().st_size
        if size > limit:
            raise error(describe(str(path), "size", f"{size} B", f"must be <= {limit} B", "this is not the kind of file expected here"))
        return path.read_bytes()
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause}); check the path and its permissions") from None


def _check_depth(node: object, place: str, error: type[InputError]) -> None:
    level = [node]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())]
        if not level:
            return
    raise error(f"{place}: nested deeper than {MAX_DEPTH} levels; this is not the kind of file expected here")


def parse_json(text: bytes | str, place: str, *, error: type[InputError] = InputError) -> Any:
    """Parse JSON, refusing duplicate keys, NaN and deep nesting; `place` names the source in errors."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise error(f"{place}: key {key!r} appears twice; keep one of them")
            result[key] = value
        return result

    def constant(name: str) -> Any:
        raise error(f"{place}: {name} is not allowed; give a finite number")

    try:
        node = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as cause:
        raise error(f"{place}: is not valid JSON ({cause}); regenerate or repair the file") from None
    _check_depth(node, place, error)
    return node


def read_json(path: Path, *, limit: int = MAX_TEXT_BYTES, error: type[InputError] = InputError) -> Any:
    """Read and parse a JSON file under the limits of this module."""
    return parse_json(read_bytes(path, limit=limit, error=error), str(path), error=error)


def read_yaml(path: Path, *, limit: int = 4 * 2**20, error: type[InputError] = InputError) -> Any:
    """Read a YAML file with the safe loader, refusing duplicate keys, aliases and deep nesting."""
    import yaml

    text = read_bytes(path, limit=limit, error=error)
    depth = 0
    for bracket in re.finditer(rb"[\[\]{}]", text):  # the parser's time grows with the square of the depth
        depth += 1 if bracket.group() in b"[{" else -1
        if depth > MAX_DEPTH:
            raise error(f"{path}: nested deeper than {MAX_DEPTH} levels; this is not the kind of file expected here")
    base = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    class Loader(base):  # type: ignore[misc, valid-type]
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int)):
                raise error(f"{path}: key {key!r} must be a plain name; quote it")
            if key in result:
                raise error(f"{path}: key {key!r} appears twice; keep one of them")
            result[key] = loader.construct_object(value_node, deep=True)
        return result

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=base)):
            raise error(f"{path}: YAML aliases (*name) are not allowed; write the value out")
        node = yaml.load(text, Loader=Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as cause:
        raise error(f"{path}: is not valid YAML ({' '.join(str(cause).split())}); repair the file") from None
    _check_depth(node, str(path), error)
    return node


def canonical_json(value: Any) -> bytes:
    """Serialise to the one byte string that stands for `value`: sorted keys, no blanks, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def write_atomic(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write `content` (or let it write itself to the path it is called with), fsync, then rename to `path`."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as cause:
        raise InputError(f"{path}: cannot be written ({cause.strerror or cause}); check the folder, its permissions and the free space") from None
