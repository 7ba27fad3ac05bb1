"""Choices that lie on other ranks, where a rank runs its experts over the tokens of all: rows of zeros, handled like results.

A fused kernel over M gathered tokens keeps a row for each of their M · top_k choices. For choices of other ranks' experts it multiplies nothing, but writes
zeros after both products, activates them between, and sums them in the end. Per row of hidden H and width W, a gated FFN, b bytes an element:
    written  (2W + W + H) · b, to memory        read  2W · b before the activation, H · b before the sum
What was just written is read from the last-level cache while all its rows are smaller than that, else from memory. Launches are those of the experts.
Source: issue 19590 and pull request 58051 of vLLM (its Triton experts, for unquantized weights, up to and including release 0.28).
Shapes: n batches.
"""

from __future__ import annotations

import numpy as np

ENGINE = "vllm"
DTYPES = ("bfloat16", "float16")
"""Experts of these types run in that kernel."""


def moved_bytes(rows: np.ndarray, masked: np.ndarray, *, hidden: float, width: float, gated: bool, element: float, cache: float) -> np.ndarray:
    """Return float64 [n]: bytes to and from memory for `masked` of `rows` choices; cache: bytes of the last-level cache, 0: none."""
    first, second = (2.0 if gated else 1.0) * width * element, hidden * element
    moved = masked * (first + width * element + second)
    for each in (first, second):
        moved = moved + masked * each * (rows * each >= cache)
    return np.asarray(moved)
