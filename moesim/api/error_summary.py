"""Relative errors summed up, the same way wherever predictions meet measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def error_summary(errors: Sequence[float] | np.ndarray) -> dict[str, Any]:
    """Return n, mean, and mean, median and p90 of the size of signed relative errors; None where there are none."""
    if not len(errors):
        return {"n": 0, "mean_error": None, "mean_abs_error": None, "median_abs_error": None, "p90_abs_error": None}
    each = np.asarray(errors, dtype=np.float64)
    size = np.abs(each)
    return {
        "n": len(each),
        "mean_error": float(each.mean()),
        "mean_abs_error": float(size.mean()),
        "median_abs_error": float(np.median(size)),
        "p90_abs_error": float(np.quantile(size, 0.9)),
    }
