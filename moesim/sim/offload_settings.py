"""Experts behind a link: tiers, caches, prefetch: the settings `offload.…`.

`tier` turns the group on: it names the memory tier of the cluster that every expert lives in; device memory then caches
experts, and a host memory in between caches what lies on a disk. Empty texts mean a default that other documents decide:
the policies of the plan first, and what memory leaves free for sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from moesim.errors import InputError, describe
from moesim.units import parse

POLICIES = {"cache": "lru", "predictor": "none", "miss": "load"}
"""Hook → the policy where neither the settings nor the plan name one."""
CHOICES = {
    "scope": ("layer", "device"),
    "start": ("empty", "frequent"),
    "issue": ("gate", "experts"),
    "into": ("cache", "staging"),
    "predict_on": ("gpu", "cpu"),
    "expert_start": ("all", "each"),
    "discipline": ("fifo", "priority"),
}
UNITS = {"bytes": "bytes", "chunk_bytes": "bytes", "predict_time": "seconds", "cpu_flops": "flop/s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadSettings:
    """Settings of the group `offload`."""

    tier: str = ""
    """Tier of the cluster that holds the experts: `dram`, `nvme` …; empty: all of them are in device memory."""
    slots: int = -1
    """Experts that a pool of the cache holds; 0: every use loads; -1: as many as `bytes` has room for."""
    bytes: str = ""
    """Size of the cache of a device, all pools together; empty: what weights, KV, activations and one layer's loads leave free."""
    scope: str = "layer"
    """One pool for each `layer`, or one for the whole `device`."""
    cache: str = ""
    """Replacement policy (hook `cache`): lru, lfu, fifo, belady …"""
    start: str = "empty"
    """The cache at first: `empty`, or full of the experts that the trace uses most (`frequent`), as after a profile."""
    predictor: str = ""
    """What is prefetched (hook `predictor`): none, recorded, exact, all, frequency:N, synthetic:RECALL,PRECISION."""
    lookahead: int = 1
    """Layers between the one that issues a prefetch and the last one that is predicted."""
    across_steps: bool = False
    """Whether the last layers predict the first ones of the next pass."""
    issue: str = "gate"
    """When prefetches are issued: when the `gate` has decided, or when the layer's `experts` have run."""
    into: str = "cache"
    """Where they go: the `cache`, or `staging` buffers beside it."""
    cancel_wrong: bool = False
    """Stop prefetches that the gate has proved wrong; needs discipline priority."""
    predict_time: str = ""
    """Time of one prediction for one layer, like `20 us`; empty: none."""
    predict_on: str = "gpu"
    """Where it is spent: before the experts (`gpu`), or beside them (`cpu`)."""
    miss: str = ""
    """What is done about a missing expert (hook `miss`): load, compute, cheapest, precision, unimportance:LOW,SKIP."""
    low_bits: float = 0.0
    """Bits per weight of the low-precision copies, scales included; 0: there are none."""
    cpu_flops: str = ""
    """What the host's CPU reaches per device, like `1 TFLOP/s`; empty: experts cannot be computed there."""
    expert_start: str = "all"
    """Experts of a layer run when `all` are there, or `each` when it has arrived."""
    discipline: str = "fifo"
    """Of the links: copies in order of issue (`fifo`), or demanded copies first (`priority`)."""
    chunk_bytes: str = ""
    """With priority: a prefetch gives way after so many bytes; empty: when it is over."""
    host_slots: int = -1
    """Experts that host memory caches per device where a disk holds them; -1: as many as fit."""
    host_cache: str = "lru"
    """Its replacement policy."""

    def __post_init__(self) -> None:
        if not self.tier and self.is_on:
            changed = next(item.name for item in fields(self) if getattr(self, item.name) != item.default)
            rule = "needs offload.tier, the tier that holds the experts"
            raise InputError(describe("--set", f"offload.{changed}", getattr(self, changed), rule, "add --set offload.tier=dram"))
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                self._refuse(name, f"must be one of {', '.join(known)}")
        for name, dimension in UNITS.items():
            try:
                negative = self.amount(name) is not None and (self.amount(name) or 0.0) < 0
            except ValueError as cause:
                self._refuse(name, str(cause))
            if negative:
                self._refuse(name, f"must be >= 0 {dimension}")
        for name in ("slots", "host_slots"):
            if getattr(self, name) < -1:
                self._refuse(name, "must be >= 0, or -1 for what fits")
        if self.slots >= 0 and self.bytes:
            self._refuse("bytes", "must not be combined with offload.slots; give one of the two")
        if self.lookahead < 1:
            self._refuse("lookahead", "must be >= 1 layer")
        if not 0 <= self.low_bits <= 16:
            self._refuse("low_bits", "must be in 0..16")
        if self.discipline == "fifo" and self.chunk_bytes:
            self._refuse("chunk_bytes", "needs --set offload.discipline=priority")

    def _refuse(self, name: str, rule: str) -> None:
        raise InputError(describe("--set", f"offload.{name}", getattr(self, name), rule)) from None

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return any(getattr(self, item.name) != item.default for item in fields(self))

    def amount(self, name: str) -> float | None:
        """Return a setting with a unit as a number, None if it is empty."""
        text = getattr(self, name)
        return parse(text, UNITS[name]) if text else None

    def with_policies(self, policies: Mapping[str, str]) -> OffloadSettings:
        """Return the settings with every policy named: as it is here, else in `policies` (hook → name, of a plan), else the default."""
        if not self.tier:
            return self
        chosen: dict[str, Any] = {hook: getattr(self, hook) or policies.get(hook, default) for hook, default in POLICIES.items()}
        return replace(self, **chosen)
