"""Declared defaults of the serving engines, and what a version says of its host."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from moesim.files import read_yaml

FOLDER = Path(__file__).parent / "points"
OVERLAP = "overlap_since"


@cache
def engine_settings() -> Mapping[str, Mapping[str, Any]]:
    """Return the declared defaults of the engines."""
    return dict(read_yaml(FOLDER / "engines.yaml"))


def is_overlapped(backend: str, version: str) -> bool:
    """Return whether the host of an engine's version works on a step while the device runs the one before, as declared."""
    since = engine_settings().get(backend, {}).get(OVERLAP)
    return since is not None and _numbers(version) >= _numbers(since)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", version)[:2])
