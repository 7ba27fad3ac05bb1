"""What every command prints: one JSON object on stdout for machines, tables and notes on stderr for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def emit_json(report: dict[str, Any]) -> None:
    """Print `report` as the one object on stdout; keys keep their order, NaN is refused."""
    sys.stdout.write(json.dumps(report, allow_nan=False, indent=None, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not JSON")


def note(text: str) -> None:
    """Print one line for people on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def counting(text: str, delay_s: float = 1.0) -> Iterator[Callable[[int], None]]:
    """Yield a function that is told how much is done; on a terminal, work longer than `delay_s` shows a moving line with it."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console

    began, console = time.monotonic(), Console(stderr=True)
    with console.status("", spinner="line") as status:
        status.stop()

        def tell(done: int) -> None:
            if time.monotonic() - began > delay_s:
                status.start()
                status.update(f"{done} {text}, {time.monotonic() - began:.0f} s")

        yield tell


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a plain aligned table on stderr: first column left, the others right."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max([len(name), *(len(row[i]) for row in cells)]) for i, name in enumerate(columns)]
    lines = [title] if title else []
    for row in [list(columns), ["-" * width for width in widths], *cells]:
        lines.append("  ".join(value.ljust(width) if i == 0 else value.rjust(width) for i, (value, width) in enumerate(zip(row, widths, strict=True))).rstrip())
    note("\n".join(lines))
