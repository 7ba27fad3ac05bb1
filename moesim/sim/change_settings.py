"""What changes during a run: a balancer, failures, ranks that join or leave: the settings `change.…`.

The defaults change nothing. Events are written RANKS@SECONDS with commas between them, like `3@1.5,4-7@2`; the steps of a ladder
COUNT@SECONDS. Every time is on the simulated clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from moesim.errors import InputError, describe
from moesim.sim.balancer import budget_of
from moesim.units import parse

CHOICES = {"mode": ("background", "pause"), "discipline": ("low", "fair")}
TIMES = ("detection_s", "rebuild_s", "init_s", "min_gain")
MAX_RANKS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSettings:
    """Settings of the group `change`."""

    balancer: str = ""
    """When to plan again (hook `balancer`): never, periodic:N, on_drift:T, budgeted:BYTES,N; empty: as the plan says, else never."""
    mode: str = "background"
    """Migrate while serving goes on (`background`), or serve nothing from the decision to the installation (`pause`)."""
    discipline: str = "low"
    """Of migrations: leave the ports to the exchanges (`low`), or share them (`fair`)."""
    layers_per_chunk: int = 0
    """Layers that are staged and installed together; 0: all."""
    staging: str = ""
    """Staging memory of a rank, like `2 GB`; empty: what is free."""
    planner_s: float = -1.0
    """Time that the planner takes; -1: a declared time per layer and expert."""
    window: int = 8
    """Passes that the balancer observes."""
    every: int = 1
    """Passes between two of its decisions."""
    min_gain: float = 0.02
    """A plan is taken if it raises the balance of the window by more than this share."""
    min_interval: int = 0
    """Least number of passes from asking the planner to asking it again."""
    hysteresis: float = 0.0
    """After a plan was declined the planner is not asked before the balance has fallen by this share; 0: it is."""
    horizon: int = 0
    """Passes within which a plan has to pay for its installation; 0: any number."""
    budget: str = ""
    """Most that a change may move, like `2 GB`, or cost, like `50 ms`; empty: no limit."""
    start_ranks: int = 0
    """Ranks that serve at first, the others wait to join; 0: all that the plan gives experts."""
    fail: str = ""
    """Ranks that die."""
    leave: str = ""
    """Ranks that are drained and leave."""
    join: str = ""
    """Ranks that start, load and join."""
    ladder: str = ""
    """Numbers of ranks to scale up and down to, one after another, from `start_ranks` on."""
    detection_s: float = 5.0
    """From a death until the survivors leave the pass in flight."""
    rebuild_s: float = 0.3
    """To rebuild the process group; serving stands still."""
    init_s: float = 30.0
    """To start the process of a rank that joins; serving goes on."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                self._refuse(name, f"must be one of {', '.join(known)}")
        for name in TIMES:
            if not 0 <= getattr(self, name) < float("inf"):
                self._refuse(name, "must be finite and >= 0")
        if not (self.planner_s == -1.0 or 0 <= self.planner_s < float("inf")):
            self._refuse("planner_s", "must be finite and >= 0, or -1 for the declared time")
        for name, low in (("layers_per_chunk", 0), ("window", 1), ("every", 1), ("min_interval", 0), ("horizon", 0), ("start_ranks", 0)):
            if getattr(self, name) < low:
                self._refuse(name, f"must be >= {low}")
        if not 0 <= self.hysteresis < 1:
            self._refuse("hysteresis", "must be in [0, 1)")
        try:
            budget_of(self.budget)
        except ValueError as cause:
            self._refuse("budget", str(cause))
        try:
            limit = self.staging_bytes
        except ValueError as cause:
            self._refuse("staging", str(cause))
        else:
            if not limit > 0:
                self._refuse("staging", "must be > 0 bytes")
        self.events()
        steps = self.ladder_steps()
        if any(later[0] < earlier[0] for earlier, later in zip(steps, steps[1:], strict=False)):
            self._refuse("ladder", "must come in order of time")

    def _refuse(self, name: str, rule: str) -> None:
        raise InputError(describe("--set", f"change.{name}", getattr(self, name), rule)) from None

    @property
    def is_on(self) -> bool:
        """Whether anything differs from the defaults."""
        return self != ChangeSettings()

    @property
    def staging_bytes(self) -> float:
        """Most bytes that a rank stages. Raises ValueError for a text without a unit of bytes."""
        return parse(self.staging, "bytes") if self.staging else float("inf")

    def events(self) -> list[tuple[str, float, tuple[int, ...]]]:
        """Return (kind, time in s, ranks) of every death, leave and join. Raises InputError for a text that is no list of them."""
        return [(kind, at_s, ranks) for kind in ("fail", "leave", "join") for ranks, at_s in self._entries(kind)]

    def ladder_steps(self) -> list[tuple[float, int]]:
        """Return (time in s, number of ranks) of every step of the ladder. Raises InputError for a text that is none."""
        result = []
        for ranks, at_s in self._entries("ladder"):
            if len(ranks) != 1 or ranks[0] < 1:
                self._refuse("ladder", "must be COUNT@SECONDS with a count >= 1, like 8@10,4@20")
            result.append((at_s, ranks[0]))
        return result

    def _entries(self, name: str) -> list[tuple[tuple[int, ...], float]]:
        result = []
        for word in filter(None, getattr(self, name).split(",")):
            text, _, when = word.partition("@")
            first, _, last = text.partition("-")
            try:
                low, high, at_s = int(first), int(last or first), float(when)
            except ValueError:
                low, high, at_s = 0, -1, -1.0
            if not (0 <= low <= high < MAX_RANKS and 0 <= at_s < float("inf")):
                self._refuse(name, "must be RANKS@SECONDS with commas between them, like 3@1.5,4-7@2")
            result.append((tuple(range(low, high + 1)), at_s))
        return result

    def with_policies(self, policies: Mapping[str, str]) -> ChangeSettings:
        """Return the settings with the balancer that `policies` (hook → name, of a plan) names, where they name none."""
        return self if self.balancer or "balancer" not in policies else replace(self, balancer=policies["balancer"])
