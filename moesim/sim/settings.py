"""How a pass is executed, where engines differ: what `--set key=value` may change.

Every setting has a default that is stated here and reported with the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from moesim.errors import InputError, describe

DISPATCH = ("auto", "normal", "low_latency", "direct", "2dh")
SHARED = ("serial", "beside_dispatch", "beside_combine")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Execution choices of the serving engine."""

    attention_tp: int = 1
    """Ranks that share one attention replica; the others are data parallel."""
    dispatch: str = "auto"
    """All-to-all algorithm; `auto` takes `normal` for passes with prompt tokens and `low_latency` for decode."""
    shared_experts: str = "serial"
    """Where the shared experts run: after the routed ones, or beside the dispatch or the combine."""
    micro_batches: int = 1
    """Parts of a pass that overlap their exchanges with each other's computation; 2 is two-batch overlap."""
    host_overhead_us: float = 0.0
    """Host time per forward pass that no device work hides, µs."""

    def __post_init__(self) -> None:
        if self.attention_tp < 1:
            raise InputError(describe("--set", "attention_tp", self.attention_tp, "must be >= 1"))
        if not 1 <= self.micro_batches <= 64:
            raise InputError(describe("--set", "micro_batches", self.micro_batches, "must be in 1..64"))
        if self.dispatch not in DISPATCH:
            raise InputError(describe("--set", "dispatch", self.dispatch, f"must be one of {', '.join(DISPATCH)}"))
        if self.shared_experts not in SHARED:
            raise InputError(describe("--set", "shared_experts", self.shared_experts, f"must be one of {', '.join(SHARED)}"))
        if not 0 <= self.host_overhead_us < 1e9:
            raise InputError(describe("--set", "host_overhead_us", self.host_overhead_us, "must be in [0, 1e9)"))

    @classmethod
    def parse(cls, items: Mapping[str, str]) -> Settings:
        """Build settings from text; raise InputError for an unknown key or a value of the wrong type."""
        values: dict[str, int | float | str] = {}
        defaults = asdict(cls())
        for key, text in items.items():
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1)
                raise InputError(describe("--set", key, text, "is not a setting", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(defaults)}"))
            kind = type(defaults[key])
            try:
                values[key] = kind(text)
            except ValueError:
                raise InputError(describe("--set", key, text, f"must be of type {kind.__name__}")) from None
        return cls(**values)  # type: ignore[arg-type]

    def algorithm(self, is_prefill: bool) -> str:
        """Return the all-to-all algorithm of a pass."""
        if self.dispatch != "auto":
            return self.dispatch
        return "normal" if is_prefill else "low_latency"
