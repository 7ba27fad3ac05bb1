"""Open a request trace by whatever names it: a shipped name, a file, `synthetic:…`.

The format is told by the header of a CSV file or the keys of the first JSON line. Lines are read one by one, each of bounded length.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moesim.errors import TraceError, describe
from moesim.files import parse_json
from moesim.traces.requests.document import Request, Requests
from moesim.traces.requests.rows import CSV_FORMATS, JSON_FORMATS, Format

MAX_LINE = 16 * 2**20
"""Most characters of a line: a long prompt given as token ids."""
SYNTHETIC = "synthetic:"


def library() -> dict[str, Path]:
    """Return the shipped excerpts by name."""
    folder = Path(__file__).parent / "library"
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix in (".csv", ".jsonl")}


def open_requests(ref: str | Path, *, seed: int = 0) -> Requests:
    """Open the request trace that `ref` names. Raises TraceError if it does not exist or its format is not known."""
    text = str(ref)
    if text.startswith(SYNTHETIC):
        from moesim.traces.requests.synth import synthetic_requests

        return synthetic_requests(text, seed=seed)
    path = Path(ref)
    if not path.exists():
        shipped = library()
        if text not in shipped:
            known = ", ".join(shipped) or "none"
            raise TraceError(f"{text}: is neither a file of requests nor a shipped one; shipped: {known}; or synthetic:poisson:RATE,prompt=…,output=…,n=…")
        path = shipped[text]
    if not path.is_file():
        raise TraceError(f"{path}: is not a file; name the file of requests in it")
    try:
        with _text(path) as file:
            first = next(_lines(path, file), (0, ""))[1]
    except OSError as cause:
        raise TraceError(f"{path}: cannot be read ({cause.strerror or cause}); check the path and its permissions") from None
    if not first:
        raise TraceError(f"{path}: holds no requests; it is empty")
    is_json = first.lstrip().startswith("{")
    found = _json_format(path, first) if is_json else _csv_format(path, _cells(f"{path}: line 1", first))
    requests = Requests(source=text, format=found.name, block_tokens=found.block_tokens, read=lambda: _read(path, found, is_json, requests))
    return requests


def _text(path: Path) -> IO[str]:
    return path.open(encoding="utf-8-sig", errors="strict", newline="")


def _lines(path: Path, file: IO[str]) -> Iterator[tuple[int, str]]:
    number = 0
    while True:
        try:
            line = file.readline(MAX_LINE + 1)
        except UnicodeDecodeError:
            raise TraceError(f"{path}: line {number + 1} is not UTF-8 text; this is not the kind of file expected here") from None
        if not line:
            return
        number += 1
        if len(line) > MAX_LINE:
            raise TraceError(describe(f"{path}: line {number}", "length", f"> {MAX_LINE}", "characters is too long for a request"))
        if line.strip():
            yield number, line.strip()


def _cells(place: str, line: str) -> list[str]:
    try:
        return next(csv.reader([line]))
    except csv.Error as cause:
        raise TraceError(f"{place}: is no row of a CSV file ({cause}); this is not the kind of file expected here") from None


def _csv_format(path: Path, header: list[str]) -> Format:
    names = [name.strip() for name in header]
    return _choose(path, CSV_FORMATS, names, "column")


def _json_format(path: Path, line: str) -> Format:
    row = parse_json(line, f"{path}: line 1", error=TraceError)
    return _choose(path, JSON_FORMATS, list(row), "key")


def _choose(path: Path, formats: tuple[Format, ...], names: list[str], kind: str) -> Format:
    """Return the format whose required names are all there; raise TraceError naming what is missing or not known."""
    for one in formats:
        if all(name in names for name in one.required):
            _check_known(f"{path}", one, names, kind)
            return one
    nearest = max(formats, key=lambda one: sum(name in names for name in one.required))
    missing = [name for name in nearest.required if name not in names]
    known = "; ".join(f"{one.name}: {', '.join(one.required)}" for one in formats)
    raise TraceError(describe(str(path), f"{kind}s", names, f"are of no known request format ({nearest.name} lacks {', '.join(missing)})", f"known: {known}"))


def _check_known(place: str, found: Format, names: list[str], kind: str) -> None:
    known = (*found.required, *found.optional)
    for name in names:
        if name not in known:
            raise TraceError(describe(place, kind, name, f"is not known in the format {found.name}", f"known: {', '.join(filter(None, known))}"))
    if len(set(names)) != len(names):
        raise TraceError(f"{place}: a {kind} appears twice; keep one of them")


def _read(path: Path, found: Format, is_json: bool, requests: Requests) -> Iterator[Request]:
    memory: dict[str, float] = {}
    names: list[str] = []
    with _text(path) as file:
        for number, line in _lines(path, file):
            place = f"{path}: line {number}"
            if is_json:
                row = parse_json(line, place, error=TraceError)
                if not isinstance(row, dict):
                    raise TraceError(f"{place}: must be a JSON object, one request")
                _check_known(place, found, list(row), "key")
            else:
                cells = _cells(place, line)
                if not names:
                    names = [name.strip() for name in cells]
                    continue
                if len(cells) != len(names):
                    raise TraceError(describe(place, "cells", len(cells), f"must be {len(names)}, one per column"))
                row = dict(zip(names, cells, strict=True))
            missing = [name for name in found.required if name not in row]
            if missing:
                raise TraceError(f"{place}: {missing[0]} is missing; the format {found.name} needs it in every row")
            request = found.parse(place, str(number), row, memory)
            if isinstance(request, str):
                requests.excluded[request] = requests.excluded.get(request, 0) + 1
            else:
                yield request
