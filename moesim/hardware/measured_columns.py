"""Columns of a measured table, and what readers ask of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SUFFIXES = (".csv", ".csv.gz", ".txt", ".txt.gz", ".parquet")
Columns = dict[str, np.ndarray]
Facts = Mapping[str, float]


@dataclass(slots=True, kw_only=True)
class Measured:
    """One operator's rows of one file."""

    stem: str
    kind: str
    part: str
    """What the file times here, where it times several things; else empty."""
    source: str
    """`aiconfigurator`, `infersim`, `frontier`, `llmservingsim` or `vidur`."""
    rows: Columns
    excluded: dict[str, int] = field(default_factory=dict)
    """Reason → rows of the file that are not in `rows`."""

    def leave_out(self, bad: np.ndarray, reason: str) -> None:
        """Drop the rows where `bad` holds, and count them."""
        if bad.any():
            self.excluded[reason] = self.excluded.get(reason, 0) + int(bad.sum())
            self.rows = {name: values[~bad] for name, values in self.rows.items()}


def stem_of(path: Path) -> str:
    """Return the file's name without its ending."""
    return next((path.name.removesuffix(suffix) for suffix in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), path.stem)


def seconds_of(columns: Columns, name: str, unit: float) -> np.ndarray:
    """Return a time column in seconds; `name_s` of a converted table as it is."""
    if f"{name}_s" in columns and name not in columns:
        return columns[f"{name}_s"]
    values = columns[name]
    return values / round(1 / unit) if values.dtype.kind == "f" else np.full(len(values), np.nan)


def numbers_of(columns: Columns, name: str, default: float | None = None) -> np.ndarray:
    length = len(next(iter(columns.values())))
    values = columns.get(name)
    if values is None:
        return np.full(length, np.nan if default is None else default)
    return values if values.dtype.kind == "f" else np.full(length, np.nan)


def text_of(columns: Columns, name: str, default: str) -> np.ndarray:
    values = columns.get(name)
    length = len(next(iter(columns.values())))
    if values is None or values.dtype.kind == "f":
        return np.full(length, default, dtype=object)
    short = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "float8": "fp8"}
    return np.array([short.get(str(cell).lower(), str(cell)) for cell in values], dtype=object)


def words_of(path: Path) -> list[str]:
    """Return what the file's name and its last folders are made of: the sources put shapes there."""
    return re.split(r"__|/", "/".join((*path.parts[-5:-1], stem_of(path))))
