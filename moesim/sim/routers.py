"""Routing during a replay: policies at the hook `router` decide, pass by pass, which of the recorded choices are carried out.

`--set router=…` names them, joined by `+`: the rules of `moesim.traces.rules`, and any policy that is registered, whose
function takes a `RouterView` and returns a `Decision`. A rule sees the tokens of one pass over all source ranks, sorted by
rank, so capacity depends on the batch as it does in a server.
Shapes: T tokens, L layers, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.sim import policies
from moesim.sim.policies import Policy
from moesim.traces.routing_trace import RoutingTrace
from moesim.traces.rules import RULES, parts_of
from moesim.traces.rules_view import RouterView, Rule, Tally, run
from moesim.traces.steps import StepTokens


def _maker(make: Callable[[str], Rule]) -> Callable[[str], Policy]:
    def policy(text: str) -> Policy:
        rule = make(text)
        if rule.not_live:
            raise InputError(f"--set router: rule {rule.name} cannot act during a replay: {rule.not_live}")
        return Policy(hook="router", name=rule.name, function=rule.decide)

    return policy


for _name, _make in RULES.items():
    policies.register_maker("router", _name, _maker(_make))


class Router:
    """Policies for the passes of one replay, and the count of what they did."""

    def __init__(self, text: str, routing: RoutingTrace) -> None:
        """Take the policies that `text` names; raise InputError if one is unknown or cannot act during a replay."""
        self._policies = [policies.get("router", part) for part in parts_of(text)]
        self._functions = [(policy.name, policy.function) for policy in self._policies]
        self._is_ranked = routing.kind == "tokens"
        self._layers, self._experts = routing.shape.moe_layer_ids, routing.shape.num_experts
        self._tally = Tally()

    def route(self, step: StepTokens) -> StepTokens:
        """Return the tokens of a pass with the choices that are left."""
        view = RouterView(
            experts_TLK=step.experts_TLK,
            weights_TLK=step.weights_TLK,
            valid_TLK=step.valid_TLK,
            rank_T=step.rank_T,
            request_T=step.request_T,
            position_T=step.position_T,
            phase_T=step.phase_T,
            kind_E=np.zeros(self._experts, dtype=np.uint8),
            moe_layer_ids=self._layers,
            step=step.step,
            predicted_TLK=step.predicted_TLK,
            is_ranked=self._is_ranked,
        )
        left = run(self._functions, view, self._tally)
        return replace(step, experts_TLK=left.experts_TLK, weights_TLK=left.weights_TLK, valid_TLK=left.valid_TLK, predicted_TLK=left.predicted_TLK)

    def report(self) -> dict[str, Any]:
        """Return what a replay adds to `routing` in its report."""
        return {"router": "+".join(policy.name for policy in self._policies), **self._tally.report()}


def router_of(text: str, routing: RoutingTrace) -> Router | None:
    """Return the router of a setting; None where it is empty and the routing is as recorded."""
    return Router(text, routing) if text else None
