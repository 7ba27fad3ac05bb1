"""The requests document in memory: a stream of requests in order of arrival.

A request asks for `output_tokens` (at least 1) after a prompt of `prompt_tokens` (at least 1). Prefix blocks are ids of the leading full blocks of a
prompt: two prompts share a prefix as far as their ids agree. A request may have a successor that arrives `pause_s` after it has finished (sessions).
Requests are read anew by every iteration and never held together, so a trace of any length takes bounded memory. Seconds and tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isfinite

from moesim.errors import TraceError, describe

MAX_TOKENS = 1 << 24
MAX_CHAIN = 4096
"""Most requests of one session."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request."""

    id: str
    arrival_s: float
    """Seconds from the start of the trace; of a successor, 0."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Ids of the full blocks that the prompt begins with."""
    then: Request | None = None
    """Successor in the session."""
    pause_s: float = 0.0
    """Seconds from the end of this request to the arrival of its successor."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Requests:
    """A validated request trace; open one with `moesim.traces.requests.open.open_requests`."""

    source: str
    """Where it comes from, for messages and reports."""
    format: str
    """`azure`, `mooncake`, `vidur`, `llmservingsim`, `burstgpt`, `run` or `synthetic`."""
    read: Callable[[], Iterator[Request]] = field(repr=False)
    """Start a new pass over the trace."""
    block_tokens: int = 0
    """Tokens of a prefix block; 0: prompts have no block ids."""
    clients: int | None = None
    """Requests in flight of a closed loop, which ignores arrival times; None: open loop."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Reason → rows that the last pass has left out."""

    def __iter__(self) -> Iterator[Request]:
        """Yield the requests in order of arrival, checked. Raises TraceError naming the row that breaks a rule."""
        self.excluded.clear()
        last = 0.0
        for row, request in enumerate(self.read(), start=1):
            if request.arrival_s < last:
                rule = f"s must be >= the arrival before it, {last:.6f} s"
                raise TraceError(describe(self.source, f"request {row} ({request.id}): arrival", request.arrival_s, rule, "sort by arrival"))
            last = request.arrival_s
            yield request


def check_request(place: str, arrival_s: float, prompt: int, output: int) -> None:
    """Raise TraceError, naming the row by `place`, unless the numbers are those of a request."""
    if not isfinite(arrival_s) or not 0.0 <= arrival_s <= 1e12:
        raise TraceError(describe(place, "arrival", arrival_s, "must be a number of seconds in 0..1e12"))
    for name, value in (("prompt tokens", prompt), ("output tokens", output)):
        if not 1 <= value <= MAX_TOKENS:
            raise TraceError(describe(place, name, value, f"must be in 1..{MAX_TOKENS}"))
