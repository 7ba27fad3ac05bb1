"""What a placement is judged by: one term in its own unit, or a weighted sum of terms, and the data that the terms need.

Terms, each summed over layers, averaged over windows and smaller when better:
- `balance`: time of the slowest rank over that of a perfect spread (1 is perfect);
- `activated`: experts that a decode batch activates on the slowest rank (divided by its speed);
- `latency`: seconds of the slowest rank, as a callable predicts them from the expected tokens of every slot;
- `traffic`: distinct ranks + node_weight · distinct nodes + rack_weight · distinct racks that a token reaches in a layer (not averaged over
  windows: tokens say it); with copies of experts only those other than its own count (see `affinity.replicas` for who serves it);
- `hops`: share of a token's transitions between layers that leave the rank (+ node_weight · the node); only alone.
In a sum every term is divided by its ideal (a perfect spread, one copy of every expert, equal tokens on all slots, as few ranks
as hold the choices), so that weights compare. `balance+activated:0.3` gives activation 0.3 and balance what is left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from moesim.errors import InputError, describe

if TYPE_CHECKING:
    from moesim.solvers.affinity.routes import TokenRoutes

TERMS = ("balance", "activated", "latency", "traffic", "hops")
NEEDS = {"activated": ("decode",), "latency": ("decode", "expert_seconds"), "traffic": ("routes",), "hops": ("routes",)}
"""Term → fields of the objective without which it cannot be computed."""
RULE = f"must be one of {', '.join(TERMS)}, or a sum like balance+activated:0.5 with weights in 0..1"

ExpertSeconds: TypeAlias = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(tokens [L, R, C], mask [L, R, C] of filled slots) → seconds [L, R]; must not fall when tokens or slots are added."""


def parse_weights(text: str) -> tuple[tuple[str, float], ...]:
    """Return (term, weight) pairs summing to 1; terms without a weight share what the others leave."""
    names, given = [], []
    for part in text.split("+"):
        name, colon, weight = part.partition(":")
        try:
            given.append(float(weight) if colon else None)
        except ValueError:
            raise InputError(describe("solve", "objective", text, RULE)) from None
        names.append(name)
    known = [weight for weight in given if weight is not None]
    left, free = 1.0 - sum(known), len(given) - len(known)
    if any(name not in TERMS for name in names) or len(set(names)) < len(names) or not all(0.0 <= weight <= 1.0 for weight in known):
        raise InputError(describe("solve", "objective", text, RULE))
    if "hops" in names and len(names) > 1:
        raise InputError(describe("solve", "objective", text, "cannot weigh hops against others: it is the traffic of another execution", "use traffic"))
    if (free == 0 and abs(left) > 1e-9) or left < -1e-9:
        raise InputError(describe("solve", "objective", text, f"has weights that sum to {sum(known):g}, must be 1", "leave one term without a weight"))
    return tuple((name, max(left, 0.0) / free if weight is None else weight) for name, weight in zip(names, given, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """A decode batch and what it activates.

    A token picks expert e of a layer with probability p = top_k · load / Σ load (at most 1); a slot that serves the share s of its expert's tokens is
    active in a batch of n tokens with probability 1 - (1 - p·s)^n.
    """

    tokens: int
    """n, tokens of the batch over all ranks."""
    top_k: int
    """Experts that a token picks in a layer."""

    def __post_init__(self) -> None:
        for key, value in (("tokens", self.tokens), ("top_k", self.top_k)):
            if value < 1:
                raise InputError(describe("objective", key, value, "must be >= 1"))

    def pick_KLE(self, load_KLE: np.ndarray) -> np.ndarray:
        """Return float64 [K, L, E]: probability that a token picks an expert."""
        total = load_KLE.sum(axis=2, keepdims=True)
        return np.minimum(np.divide(self.top_k * load_KLE, total, out=np.zeros_like(load_KLE), where=total > 0), 1.0)

    def active(self, pick: np.ndarray) -> np.ndarray:
        """Return the probability that a batch activates a slot that a token picks with probability `pick`."""
        with np.errstate(divide="ignore"):
            return -np.expm1(self.tokens * np.log1p(-np.asarray(pick)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Objective:
    """The weights of the terms and what they are computed from."""

    weights: tuple[tuple[str, float], ...] = (("balance", 1.0),)
    """(term, weight) pairs; weights sum to 1."""
    decode: Decode | None = None
    """The batch, for `activated` and `latency`."""
    expert_seconds: ExpertSeconds | None = None
    """Predicted time of every rank, for `latency`."""
    routes: TokenRoutes | None = None
    """Tokens to plan on, for `traffic` and `hops`."""
    node_weight: float = 1.0
    """Cost of reaching a node where reaching a rank costs 1; 0 on a single node."""
    rack_weight: float = 1.0
    """Cost of reaching a rack on top, for `traffic`; 0 where the nodes form a single one."""

    def __post_init__(self) -> None:
        for term in self.terms:
            for field in NEEDS.get(term, ()):
                if getattr(self, field) is None:
                    raise InputError(describe("solve", field, None, f"must be given for the objective {term}"))

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        decode: Decode | None = None,
        expert_seconds: ExpertSeconds | None = None,
        routes: TokenRoutes | None = None,
        node_weight: float = 1.0,
        rack_weight: float = 1.0,
    ) -> Objective:
        """Return the objective that `text` names; raise InputError if it is unknown or lacks its data."""
        return cls(weights=parse_weights(text), decode=decode, expert_seconds=expert_seconds, routes=routes, node_weight=node_weight, rack_weight=rack_weight)

    @property
    def terms(self) -> tuple[str, ...]:
        """Terms in the order given."""
        return tuple(name for name, _ in self.weights)

    @property
    def alone(self) -> str | None:
        """The only term; None for a sum."""
        return self.weights[0][0] if len(self.weights) == 1 else None

    @property
    def name(self) -> str:
        """The text that parses to these weights."""
        return self.alone or "+".join(f"{name}:{weight:g}" for name, weight in self.weights)

    def weight(self, term: str) -> float:
        """Return the weight of a term, 0 if it is not part of the sum."""
        return dict(self.weights).get(term, 0.0)


BALANCE = Objective()
