"""Human units in, SI out: bytes, bytes/s, seconds, FLOP/s, watts, dollars per hour.

`b` is a bit and `B` a byte: `400 Gb/s` is 50e9 B/s, `450 GB/s` is 450e9 B/s, `80 GiB` is 80·2³⁰ B.
A bare number is refused where a unit is required, because a wrong unit is the costliest typo there is.
"""

from __future__ import annotations

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
_PREFIX = {**_DECIMAL, **_BINARY}
_TIME = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*$")

DIMENSIONS = {
    "bytes": "80 GiB",
    "bytes/s": "450 GB/s or 400 Gb/s",
    "seconds": "2.5 us",
    "flop/s": "989 TFLOP/s",
    "watts": "700 W",
    "dollars/h": "2.5 $/h",
}


def _scale(unit: str, dimension: str) -> float | None:
    if dimension == "seconds":
        return _TIME.get(unit)
    if dimension == "dollars/h":
        return 1.0 if unit in ("$/h", "USD/h") else None
    endings = {
        "bytes": (("B", 1.0), ("b", 0.125)),
        "bytes/s": (("B/s", 1.0), ("b/s", 0.125), ("Bps", 1.0), ("bps", 0.125)),
        "flop/s": (("FLOP/s", 1.0), ("FLOPS", 1.0), ("OP/s", 1.0)),
        "watts": (("W", 1.0),),
    }[dimension]
    for ending, factor in endings:
        if unit.endswith(ending):
            prefix = _PREFIX.get(unit[: len(unit) - len(ending)])
            if prefix is not None:
                return prefix * factor
    return None


def parse(text: str | int | float, dimension: str) -> float:
    """Return the SI value of `text`, a number with a unit of `dimension`.

    dimension: one of `DIMENSIONS`. Raises ValueError if the unit is missing, belongs to another
    dimension, or the number is not finite.
    """
    example = DIMENSIONS[dimension]
    if isinstance(text, bool) or not isinstance(text, str):
        if text == 0 and not isinstance(text, bool):
            return 0.0
        raise ValueError(f"needs a unit of {dimension}, like {example}")
    match = _NUMBER.match(text)
    if match is None:
        raise ValueError(f"must be a number with a unit of {dimension}, like {example}")
    value = float(match.group(1))
    scale = _scale(match.group(2), dimension)
    if scale is None:
        raise ValueError(f"has unit {match.group(2)!r}, which is not a unit of {dimension}; write it like {example}")
    if not math.isfinite(value * scale):
        raise ValueError(f"must be finite, like {example}")
    return value * scale


def format_bytes(count: float) -> str:
    """Render a byte count with a binary prefix: 1536 → `1.5 KiB`."""
    for prefix in ("", "Ki", "Mi", "Gi", "Ti"):
        if abs(count) < 1024 or prefix == "Ti":
            return f"{count:.4g} {prefix}B"
        count /= 1024
    raise AssertionError("unreachable")


def format_time(seconds: float) -> str:
    """Render a duration in the unit that reads best: 0.00125 → `1.25 ms`."""
    if seconds == 0:
        return "0 s"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"
