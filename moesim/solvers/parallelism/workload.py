"""What is to be served and how fast: lengths, demand, routing skew and service levels.

`routing` is `balanced`, `zipf:S`, or measured loads [L, E]; it becomes `assign_LE`, the expected choices of every expert by one token (a row sums to
top_k, no entry exceeds 1: a token chooses an expert once). Balanced and Zipf loads have one row that stands for every MoE layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.costs.group_loads import capped_LE
from moesim.errors import InputError, describe
from moesim.model.moe_model import MoEModel

MAX_TOKENS = 1 << 24


def _whole(place: str, key: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(describe(place, key, value, f"must be an integer in {low}..{high}"))


def _positive(place: str, key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(describe(place, key, value, "must be a finite number > 0"))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Requests of one length and their demand."""

    prompt_tokens: int
    """Tokens of a prompt."""
    output_tokens: int
    """Tokens generated per request; 1: prefill only."""
    concurrency: int | None = None
    """Requests in flight in the whole deployment; None: as many as a plan takes."""
    arrival_rps: float | None = None
    """Requests per second that the deployment has to carry; None: no demand."""
    routing: str | np.ndarray = "balanced"
    """`balanced`, `zipf:S` or load_LE [MoE layers, E]."""

    def __post_init__(self) -> None:
        _whole("workload", "prompt_tokens", self.prompt_tokens, 1, MAX_TOKENS)
        _whole("workload", "output_tokens", self.output_tokens, 1, MAX_TOKENS)
        if self.concurrency is not None:
            _whole("workload", "concurrency", self.concurrency, 1, MAX_TOKENS)
        if self.arrival_rps is not None:
            _positive("workload", "arrival_rps", self.arrival_rps)

    @property
    def decode_steps(self) -> int:
        """Steps after the one that gives the first token."""
        return self.output_tokens - 1

    @property
    def full_tokens(self) -> int:
        """KV entries of a finished request."""
        return self.prompt_tokens + self.output_tokens

    @property
    def decode_context(self) -> float:
        """Mean KV length while decoding."""
        return self.prompt_tokens + self.output_tokens / 2

    def assign_LE(self, model: MoEModel) -> np.ndarray:
        """Return float64 [L or 1, E]: expected choices of every expert by one token. Raises InputError if `routing` does not fit the model."""
        experts, layers = model.num_experts, len(model.moe_layer_ids)
        if not layers:
            return np.zeros((0, 0))
        if isinstance(self.routing, str):
            kind, _, parameter = self.routing.partition(":")
            if kind == "balanced" and not parameter:
                return np.full((1, experts), model.top_k / experts)
            try:
                exponent = float(parameter) if kind == "zipf" else float("nan")
            except ValueError:
                exponent = float("nan")
            if not 0.0 <= exponent <= 10.0:
                raise InputError(describe("workload", "routing", self.routing, "must be balanced, zipf:S with S in 0..10, or an array of loads"))
            return capped_LE(1.0 / np.arange(1, experts + 1, dtype=np.float64)[None] ** exponent, model.top_k)
        load = np.asarray(self.routing, dtype=np.float64)
        if load.shape != (layers, experts):
            raise InputError(describe("workload", "routing shape", load.shape, f"must be [{layers}, {experts}]: MoE layers and experts of {model.name}"))
        if not np.isfinite(load).all() or load.min() < 0 or ((load > 0).sum(axis=1) < model.top_k).any():
            raise InputError(f"workload: routing must hold finite loads >= 0, and at least {model.top_k} experts (top-k) with load in every layer")
        return capped_LE(load, model.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service levels; None: not limited."""

    ttft_ms: float | None = None
    """Longest time to the first token, ms."""
    tpot_ms: float | None = None
    """Longest mean time per output token after the first, ms."""

    def __post_init__(self) -> None:
        for key in ("ttft_ms", "tpot_ms"):
            if getattr(self, key) is not None:
                _positive("slo", key, getattr(self, key))
