"""Policies: pure functions from what is observed to a decision at a named hook, in one registry.

A Policy never keeps state of its own; what it may look at is handed to it (`CacheView`, `MissView`). Users add one with
`register`, or from a package of theirs through the entry-point group `moesim.policies`. `NAME:PARAMETER` names a policy
that takes a parameter (`sch:16`). Experts are keys: layer · num_experts + expert; a position is step · num_layers + layer.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from moesim.errors import InputError, describe

HOOKS = ("router", "cache", "predictor", "miss", "batcher", "balancer", "scaler", "overlap")
ENTRY_POINTS = "moesim.policies"
LOAD, COMPUTE, PRECISION, SKIP = "load", "compute", "precision", "skip"
MISS_ACTIONS = (LOAD, COMPUTE, PRECISION, SKIP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A decision at a hook."""

    hook: str
    """One of `HOOKS`."""
    name: str
    function: Callable[..., Any]
    order: str = ""
    """`cache` only: the victim is always the first evictable expert by `recency` of use or by `insertion`, found without calling the function."""
    needs_future: bool = False
    """`cache` only: an oracle that is shown the demands to come."""

    def __post_init__(self) -> None:
        if self.hook not in HOOKS:
            raise InputError(describe(f"policy {self.name}", "hook", self.hook, f"must be one of {', '.join(HOOKS)}"))
        if self.order not in ("", "recency", "insertion"):
            raise InputError(describe(f"policy {self.name}", "order", self.order, "must be empty, recency or insertion"))


Maker = Callable[[str], Policy]
_POLICIES: dict[tuple[str, str], Policy] = {}
_MAKERS: dict[tuple[str, str], Maker] = {}


def register(policy: Policy) -> Policy:
    """Add `policy` to the registry. Raises InputError if its hook has one of that name already."""
    key = (policy.hook, policy.name)
    if key in _POLICIES or key in _MAKERS:
        raise InputError(describe(f"policy {policy.name}", "hook", policy.hook, "has a policy of this name already; choose another name"))
    _POLICIES[key] = policy
    return policy


def register_maker(hook: str, name: str, make: Maker) -> None:
    """Add a policy with a parameter: `make(text)` gets what follows the colon in `name:text`, or '' if there is none."""
    _MAKERS[(hook, name)] = make


def names(hook: str) -> tuple[str, ...]:
    """Return the names registered at `hook`."""
    return tuple(sorted({name for at, name in [*_POLICIES, *_MAKERS] if at == hook}))


def get(hook: str, policy: str | Policy) -> Policy:
    """Return the policy of this name at `hook`; a Policy is checked and returned. Raises InputError if it is unknown."""
    if isinstance(policy, Policy):
        if policy.hook != hook:
            raise InputError(describe(f"policy {policy.name}", "hook", policy.hook, f"must be {hook} to decide here"))
        return policy
    name, _, parameter = policy.partition(":")
    if (hook, name) not in _POLICIES and (hook, name) not in _MAKERS:
        _load_entry_points()
    if (hook, policy) in _POLICIES:
        return _POLICIES[(hook, policy)]
    if (hook, name) in _MAKERS:
        return _MAKERS[(hook, name)](parameter)
    known = names(hook)
    near = difflib.get_close_matches(name, known, n=1)
    raise InputError(describe("policy", hook, policy, "is not registered", f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"))


def _load_entry_points() -> None:
    for point in entry_points(group=ENTRY_POINTS):
        found = point.load()
        if not isinstance(found, Policy):
            raise InputError(describe(f"entry point {point.name}", ENTRY_POINTS, found, "must be a moesim.sim.policies.Policy"))
        _POLICIES.setdefault((found.hook, found.name), found)


# --- hook "cache": which expert leaves --------------------------------------------------------------------------


class Oracle(Protocol):
    """What an oracle policy may ask about the demands to come."""

    def next_use(self, key: int, position: int) -> float:
        """Return the first position after `position` that demands `key`; inf if none does."""

    def uses_within(self, key: int, position: int, until: int) -> int:
        """Return how many positions in (position, until] demand `key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheView:
    """What a replacement policy sees when one expert has to leave a pool."""

    pool: int
    """Which cache: a layer, a device, or 0 for a global one."""
    position: int
    """Now: step · num_layers + layer."""
    num_layers: int
    num_experts: int
    candidates: Sequence[int]
    """Keys that may leave, least recently used (or loaded) first; never empty."""
    last_used: Sequence[int]
    """By key: position of the last demand, -1 if none."""
    uses: Sequence[int]
    """By key: demands so far."""
    inserted: Sequence[int]
    """By key: running number of its last insertion."""
    future: Oracle | None = None
    """None unless the policy needs the future."""

    @property
    def layer(self) -> int:
        """The layer that runs now."""
        return self.position % self.num_layers


def _lowest(score: Callable[[CacheView, int], float]) -> Callable[[CacheView], int]:
    """Return a policy that evicts the candidate of the lowest score; among equals the least recently used."""
    return lambda view: min(view.candidates, key=lambda key: score(view, key))


def _oracle(view: CacheView) -> Oracle:
    if view.future is None:
        raise InputError(describe("policy", "cache", "oracle", "needs the demands to come, and none are given; use lru, lfu or fifo"))
    return view.future


def whole_parameter(policy: str, text: str, default: int, low: int) -> int:
    """Return the whole number after the colon of `policy:text`. Raises InputError if it is below `low` or none."""
    try:
        value = int(text) if text else default
    except ValueError:
        value = low - 1
    if value < low:
        raise InputError(describe(f"policy {policy}", "parameter", text, f"must be a whole number >= {low}, like {policy}:{default}"))
    return value


def _random(text: str) -> Policy:
    seed = whole_parameter("random", text, 0, 0)

    def pick(view: CacheView) -> int:
        state = (seed * 0x9E3779B97F4A7C15 + view.position * 0xBF58476D1CE4E5B9 + max(view.inserted[key] for key in view.candidates) + 1) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        return view.candidates[(state ^ (state >> 31)) % len(view.candidates)]

    return Policy(hook="cache", name=f"random:{seed}", function=pick)


def _sch(text: str) -> Policy:
    tokens = whole_parameter("sch", text, 16, 1)
    score = _lowest(lambda view, key: _oracle(view).uses_within(key, view.position, view.position + tokens * view.num_layers))
    return Policy(hook="cache", name=f"sch:{tokens}", function=score, needs_future=True)


def _steps_until(view: CacheView, key: int) -> int:
    return (key // view.num_experts - view.layer - 1) % view.num_layers + 1


register(Policy(hook="cache", name="lru", function=lambda view: view.candidates[0], order="recency"))
register(Policy(hook="cache", name="fifo", function=_lowest(lambda view, key: view.inserted[key]), order="insertion"))
register(Policy(hook="cache", name="lifo", function=_lowest(lambda view, key: -view.inserted[key])))
register(Policy(hook="cache", name="lfu", function=_lowest(lambda view, key: view.uses[key])))
register(Policy(hook="cache", name="belady", function=_lowest(lambda view, key: -_oracle(view).next_use(key, view.position)), needs_future=True))
register(Policy(hook="cache", name="frequency_distance", function=_lowest(lambda view, key: view.uses[key] / _steps_until(view, key))))
register_maker("cache", "random", _random)
register_maker("cache", "sch", _sch)


# --- hook "miss": what is done about an expert that is not there ------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class MissView:
    """What a miss policy sees when the gate has chosen an expert that is not resident."""

    layer: int
    expert: int
    tokens: int
    weight_above: float
    """Sum of the gate weights of the experts ranked above this one, of 1; 0 where weights are not known."""
    work_s: float
    """Time of the expert on the device."""
    load_s: float
    """Time to copy it there, without waiting."""
    load_wait_s: float
    """Until the copies already demanded are done."""
    low_s: float | None
    """Time to copy its low-precision version; None: there is none."""
    compute_s: float | None
    """Time to compute it elsewhere; None: not possible, or its weights are not in host memory."""
    compute_wait_s: float
    """Until the other device is free."""


def _or_load(action: str, field: str) -> Callable[[MissView], str]:
    return lambda view: LOAD if getattr(view, field) is None else action


def _cheapest(view: MissView) -> str:
    """Compare when the expert's result would be there: loaded, or computed elsewhere."""
    if view.compute_s is None:
        return LOAD
    return COMPUTE if view.compute_wait_s + view.compute_s < view.load_wait_s + view.load_s + view.work_s else LOAD


def _unimportance(text: str) -> Policy:
    try:
        low, skip = (float(part) for part in (text or "0.6,0.9").split(","))
    except ValueError:
        low, skip = -1.0, -1.0
    if not 0 <= low <= skip:
        raise InputError(describe("policy unimportance", "parameter", text, "must be two thresholds 0 <= LOW <= SKIP, like unimportance:0.6,0.9"))

    def choose(view: MissView) -> str:
        if view.weight_above > skip:
            return SKIP
        return PRECISION if view.weight_above > low and view.low_s is not None else LOAD

    return Policy(hook="miss", name=f"unimportance:{low:g},{skip:g}", function=choose)


register(Policy(hook="miss", name=LOAD, function=lambda view: LOAD))
register(Policy(hook="miss", name=COMPUTE, function=_or_load(COMPUTE, "compute_s")))
register(Policy(hook="miss", name=PRECISION, function=_or_load(PRECISION, "low_s")))
register(Policy(hook="miss", name="cheapest", function=_cheapest))
register_maker("miss", "unimportance", _unimportance)
