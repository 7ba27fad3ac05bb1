"""How a pass is executed, where engines differ: what `--set key=value` may change.

Every setting has a default that is stated here and reported with the result. Settings that belong together are a group
with a prefix: `--set offload.cache=lru`. A group is off as long as it has its defaults.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any

from moesim.errors import InputError, describe
from moesim.sim.change_settings import ChangeSettings
from moesim.sim.offload_settings import OffloadSettings
from moesim.sim.pipeline_settings import PipelineSettings
from moesim.sim.serving.settings import ServingSettings

DISPATCH = ("auto", "normal", "low_latency", "direct", "2dh")
SHARED = ("serial", "beside_dispatch", "beside_combine")
TURNS = ("halves", "fifths")


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
    turns: str = "halves"
    """Pieces of a layer by which micro-batches take turns. `halves`: to dispatch, from dispatch on. `fifths`, in decode: attention before its scores; the
    rest of it and the gate; dispatch and shared experts; routed experts; combine; each micro-batch two pieces behind the one before."""
    host_overhead_us: float = 0.0
    """Host time per forward pass that no device work hides, µs."""
    rounds: int = 1
    """Times that gate, dispatch, experts and combine run in a layer, each with routing of its own (Chain-of-Experts)."""
    comm_sm_share: float = 0.0
    """Share of a device's SMs that an exchange takes while it runs; computation beside it slows by as much."""
    comm_sm_reserved: bool = False
    """Whether kernels leave that share of SMs free all the time, as engines configure their products for a pass, not only beside an exchange."""
    prefill_clock: float = 1.0
    """Clock that a device sustains in passes with prompt tokens, over that at which its kernels were timed; their computation takes as much longer."""
    router: str = ""
    """Routing rule that acts on every pass, like `top_p:0.4,6+capacity:1.25`; empty: the routing is as recorded."""
    pipeline: PipelineSettings = field(default_factory=PipelineSettings)
    """Schedule of pipeline stages, training, chunked exchanges."""
    offload: OffloadSettings = field(default_factory=OffloadSettings)
    """Experts behind a link: tiers, caches, prefetch."""
    change: ChangeSettings = field(default_factory=ChangeSettings)
    """A balancer, failures, ranks that join or leave."""
    serving: ServingSettings = field(default_factory=ServingSettings)
    """Batching, queues and KV blocks where requests drive the steps."""

    def __post_init__(self) -> None:
        if self.attention_tp < 1:
            raise InputError(describe("--set", "attention_tp", self.attention_tp, "must be >= 1"))
        if not 1 <= self.micro_batches <= 64:
            raise InputError(describe("--set", "micro_batches", self.micro_batches, "must be in 1..64"))
        if self.dispatch not in DISPATCH:
            raise InputError(describe("--set", "dispatch", self.dispatch, f"must be one of {', '.join(DISPATCH)}"))
        if self.shared_experts not in SHARED:
            raise InputError(describe("--set", "shared_experts", self.shared_experts, f"must be one of {', '.join(SHARED)}"))
        if self.turns not in TURNS:
            raise InputError(describe("--set", "turns", self.turns, f"must be one of {', '.join(TURNS)}"))
        if self.turns == "fifths" and (self.micro_batches == 1 or self.rounds > 1):
            raise InputError(describe("--set", "turns", self.turns, "needs micro_batches > 1 and rounds = 1"))
        if not 0 <= self.host_overhead_us < 1e9:
            raise InputError(describe("--set", "host_overhead_us", self.host_overhead_us, "must be in [0, 1e9)"))
        if not 1 <= self.rounds <= 16:
            raise InputError(describe("--set", "rounds", self.rounds, "must be in 1..16"))
        if not 0 <= self.comm_sm_share < 1:
            raise InputError(describe("--set", "comm_sm_share", self.comm_sm_share, "must be in [0, 1)"))
        if not 0.1 <= self.prefill_clock <= 1:
            raise InputError(describe("--set", "prefill_clock", self.prefill_clock, "must be in [0.1, 1]"))
        if self.comm_sm_share and self.offload.is_on:
            raise InputError(describe("--set", "comm_sm_share", self.comm_sm_share, "must be 0 where experts lie in another tier"))
        if self.micro_batches > 1 and self.pipeline.train:
            raise InputError(describe("--set", "micro_batches", self.micro_batches, "must be 1 in training", "use pipeline.micro_batches"))

    @classmethod
    def parse(cls, items: Mapping[str, str]) -> Settings:
        """Build settings from text; raise InputError for an unknown key or a value of the wrong type."""
        defaults = flat(asdict(cls()))
        values: dict[str, Any] = {}
        for key, text in items.items():
            if key not in defaults:
                near = difflib.get_close_matches(key, defaults, n=1)
                raise InputError(describe("--set", key, text, "is not a setting", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(defaults)}"))
            group, _, name = key.rpartition(".")
            (values.setdefault(group, {}) if group else values)[name] = _value(key, text, type(defaults[key]))
        for item in fields(cls):
            if isinstance(values.get(item.name), dict):
                assert is_dataclass(item.default_factory)
                values[item.name] = item.default_factory(**values[item.name])
        return cls(**values)

    def parts(self, stages: int) -> int:
        """Return into how many micro-batches a pass on `stages` pipeline stages is cut."""
        if stages > 1 or self.pipeline.train:
            return self.pipeline.micro_batches or stages
        return self.micro_batches

    def algorithm(self, is_prefill: bool) -> str:
        """Return the all-to-all algorithm of a pass."""
        if self.dispatch != "auto":
            return self.dispatch
        return "normal" if is_prefill else "low_latency"

    def report(self) -> dict[str, Any]:
        """Return every setting by the key that sets it."""
        return flat(asdict(self))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested groups as one level of dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result.update(flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return result


def _value(key: str, text: str, kind: type) -> Any:
    """Return `text` as a value of `kind`. Raises InputError if it is none."""
    if kind is bool:
        if text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        raise InputError(describe("--set", key, text, "must be true or false"))
    try:
        return kind(text)
    except ValueError:
        raise InputError(describe("--set", key, text, f"must be of type {kind.__name__}")) from None
