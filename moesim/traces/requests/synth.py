"""Synthetic requests: `synthetic:KIND:VALUE,prompt=…,output=…,n=…[,seed=…]`.

Kinds: `poisson:RATE` and `fixed:RATE` (requests per second, open loop), `closed:CLIENTS` (each client sends its next request when the last one has
finished). `prompt` and `output` are a number of tokens or a range LOW-HIGH, drawn uniformly.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite

import numpy as np

from moesim.errors import TraceError, describe
from moesim.traces.requests.document import MAX_TOKENS, Request, Requests

KINDS = ("poisson", "fixed", "closed")
MAX_REQUESTS = 1 << 31
_CHUNK = 4096
_EXAMPLE = "for example synthetic:poisson:4.0,prompt=512-2048,output=128,n=1000"


def synthetic_requests(text: str, *, seed: int = 0) -> Requests:
    """Return the requests that `text` specifies; `seed` is the default of `seed=`. Raises TraceError naming the part that is wrong."""
    head, *rest = text.removeprefix("synthetic:").split(",")
    kind, _, value = head.partition(":")
    if kind not in KINDS:
        raise TraceError(describe(text, "kind", kind, f"must be one of {', '.join(KINDS)}", _EXAMPLE))
    rate = _number(text, "clients" if kind == "closed" else "rate", value)
    if kind == "closed" and rate != int(rate):
        raise TraceError(describe(text, "clients", value, "must be a whole number"))
    given: dict[str, str] = {}
    for part in rest:
        name, sign, word = part.partition("=")
        if name not in ("prompt", "output", "n", "seed") or not sign or name in given:
            raise TraceError(describe(text, "option", part, "must be prompt=, output=, n= or seed=, each once", _EXAMPLE))
        given[name] = word
    for name in ("prompt", "output", "n"):
        if name not in given:
            raise TraceError(f"{text}: {name}= is missing; {_EXAMPLE}")
    prompt, output = (_range(text, name, given[name]) for name in ("prompt", "output"))
    count = _whole(text, "n", given["n"], 1, MAX_REQUESTS)
    chosen = _whole(text, "seed", given["seed"], 0, 2**63 - 1) if "seed" in given else seed

    def read() -> Iterator[Request]:
        generator = np.random.Generator(np.random.PCG64(chosen))
        now, index = 0.0, 0
        while index < count:
            size = min(_CHUNK, count - index)
            if kind == "poisson":
                gaps = generator.exponential(1.0 / rate, size)
            else:
                gaps = np.full(size, 0.0 if kind == "closed" else 1.0 / rate)
            prompts, outputs = (generator.integers(low, high, size, endpoint=True).tolist() for low, high in (prompt, output))
            for gap, one, other in zip(gaps.tolist(), prompts, outputs, strict=True):
                now = now + gap if kind == "poisson" else 0.0 if kind == "closed" else index * gap
                yield Request(str(index), now, one, other)
                index += 1

    return Requests(source=text, format="synthetic", read=read, clients=int(rate) if kind == "closed" else None)


def _number(text: str, name: str, word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not isfinite(value) or not 0 < value <= 1e9:
        raise TraceError(describe(text, name, word, "must be a number > 0 and <= 1e9", _EXAMPLE))
    return value


def _whole(text: str, name: str, word: str, low: int, high: int) -> int:
    if not word.isdecimal() or not low <= int(word[:20]) <= high:
        raise TraceError(describe(text, name, word, f"must be a whole number in {low}..{high}", _EXAMPLE))
    return int(word)


def _range(text: str, name: str, word: str) -> tuple[int, int]:
    low, dash, high = word.partition("-")
    bounds = _whole(text, name, low, 1, MAX_TOKENS), _whole(text, name, high if dash else low, 1, MAX_TOKENS)
    if bounds[0] > bounds[1]:
        raise TraceError(describe(text, name, word, "must be LOW-HIGH with LOW <= HIGH"))
    return bounds
