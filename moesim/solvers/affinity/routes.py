"""The choices of a sample of tokens, kept in memory where counts are not enough: splits, nulls, distinct ranks.

Dummy tokens are left out. A trace longer than `max_tokens` is thinned evenly, so the sample covers all of it.
Shapes: T tokens, L MoE layers, K choices (best first), E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, TraceError, describe
from moesim.traces.routing_trace import DUMMY, RoutingTrace

MAX_TOKENS = 200_000
"""Default size of the sample: far more than the 5000 tokens from which transition profiles stop over-fitting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRoutes:
    """Which experts every token of a sample chose."""

    experts_TLK: np.ndarray
    """uint8 or uint16: chosen experts, best first."""
    request_T: np.ndarray
    """uint64: request of every token."""
    home_T: np.ndarray
    """int64: rank that recorded the token."""
    num_experts: int
    """E."""
    valid_TLK: np.ndarray | None = None
    """bool: False where a choice does not exist; None: all exist."""
    source: str = "routes"
    """Where the tokens came from, for messages."""

    def __post_init__(self) -> None:
        shape = self.experts_TLK.shape
        if len(shape) != 3 or 0 in shape or any(len(column) != shape[0] for column in (self.request_T, self.home_T)):
            raise InputError(describe(self.source, "experts shape", shape, "must be [tokens, layers, choices], all > 0, with one request and rank per token"))
        if int(self.experts_TLK.max()) >= self.num_experts:
            raise InputError(describe(self.source, "expert", int(self.experts_TLK.max()), f"must be in 0..{self.num_experts - 1}"))
        if self.valid_TLK is not None and self.valid_TLK.shape != shape:
            raise InputError(describe(self.source, "valid shape", self.valid_TLK.shape, f"must be that of the experts, {shape}"))

    def __len__(self) -> int:
        return len(self.experts_TLK)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.experts_TLK.shape[1])

    def take(self, rows: np.ndarray) -> TokenRoutes:
        """Return the tokens at the given rows."""
        return TokenRoutes(
            experts_TLK=self.experts_TLK[rows],
            request_T=self.request_T[rows],
            home_T=self.home_T[rows],
            num_experts=self.num_experts,
            valid_TLK=None if self.valid_TLK is None else self.valid_TLK[rows],
            source=self.source,
        )

    def with_experts(self, experts_TLK: np.ndarray, valid_TLK: np.ndarray | None) -> TokenRoutes:
        """Return the same tokens with other choices."""
        return TokenRoutes(
            experts_TLK=experts_TLK, request_T=self.request_T, home_T=self.home_T, num_experts=self.num_experts, valid_TLK=valid_TLK, source=self.source
        )


def stream(trace: RoutingTrace) -> Iterator[tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]]:
    """Yield (experts, valid, request, rank) of every batch of a token trace, dummies left out."""
    for batch in trace.batches():
        real = batch if not (batch.phase_T == DUMMY).any() else batch.take(batch.phase_T != DUMMY)
        if len(real):
            yield real.experts_TLK, real.valid_TLK, real.request_T, real.rank_T.astype(np.int64)


def read_routes(trace: RoutingTrace, *, max_tokens: int = MAX_TOKENS) -> TokenRoutes:
    """Read the tokens of a trace, every n-th one if it has more than `max_tokens`.

    Raises TraceError if the trace holds counts only, or no token but dummies.
    """
    if max_tokens < 1:
        raise InputError(describe("affinity", "max_tokens", max_tokens, "must be >= 1"))
    every = -(-trace.num_rows // max_tokens)
    parts, seen = [], 0
    for experts, valid, request, rank in stream(trace):
        rows = np.arange(-seen % every, len(experts), every)
        seen += len(experts)
        parts.append((experts[rows], np.ones(experts[rows].shape, dtype=bool) if valid is None else valid[rows], request[rows], rank[rows]))
    if not parts or not sum(len(part[0]) for part in parts):
        raise TraceError(describe(trace.source, "tokens", 0, "must be > 0 to measure affinity", "give a trace with tokens that are not dummies"))
    experts, valid, request, rank = (np.concatenate(column) for column in zip(*parts, strict=True))
    return TokenRoutes(
        experts_TLK=experts,
        request_T=request,
        home_T=rank,
        num_experts=trace.shape.num_experts,
        valid_TLK=None if valid.all() else valid,
        source=trace.source,
    )


def split_routes(routes: TokenRoutes, *, share: float = 0.5, by: str = "request", seed: int = 0) -> tuple[TokenRoutes, TokenRoutes]:
    """Split tokens into a part to plan on and a part to score on.

    share: of the tokens (or requests) to plan on, in 0..1. by: `request` keeps the tokens of a request together; `token` does not.
    Raises InputError if one part would be empty.
    """
    if by not in ("request", "token"):
        raise InputError(describe("affinity", "split", by, "must be 'request' or 'token'"))
    if not 0.0 < share < 1.0:
        raise InputError(describe("affinity", "share", share, "must be in 0..1, both ends excluded"))
    generator = np.random.Generator(np.random.PCG64(seed))
    key_T = np.unique(routes.request_T, return_inverse=True)[1] if by == "request" else np.arange(len(routes))
    units = int(key_T.max()) + 1
    taken = round(share * units)
    if not 0 < taken < units:
        remedy = "split by token, or give more requests" if by == "request" else "give more tokens"
        raise InputError(describe(routes.source, f"{by}s to split", units, f"leave one of the two parts empty at share {share:g}", remedy))
    chosen = np.zeros(units, dtype=bool)
    chosen[generator.permutation(units)[:taken]] = True
    return routes.take(np.flatnonzero(chosen[key_T])), routes.take(np.flatnonzero(~chosen[key_T]))
