"""What the gates of a trace's passes want of every rank's experts: the input of a decode through memory tiers.

An expert is wanted where a slot of the rank gets tokens of the pass, in the order in which its tokens first mention it (one token: best
first). Shapes: T passes, P of them in a batch, L MoE layers, E experts, S slots, R ranks, W wanted, -1 where there are fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.plan import Plan
from moesim.sim.batch import Part
from moesim.sim.loads import StepLoads

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Distinct experts wanted in every pass and layer, over all ranks or of one."""

    experts_TLW: np.ndarray
    tokens_TLW: np.ndarray
    weights_TLW: np.ndarray
    """Sum of the gate weights of these tokens; 1 for each choice where the trace has no weights."""

    @property
    def widest(self) -> int:
        """Most experts that one layer of a pass wants."""
        return int((self.experts_TLW >= 0).sum(axis=-1).max(initial=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Demands:
    """The demands of a run."""

    everywhere: Demand
    """Over all ranks, as a predictor sees it."""
    of_rank: tuple[Demand, ...]
    recorded_TLN: np.ndarray | None
    """Predictions in the trace; None unless every token has them."""


def held_RLE(plan: Plan) -> np.ndarray:
    """Return bool [R, L, E]: does the rank own a slot of the expert?"""
    held = np.zeros((plan.num_ranks, plan.num_layers, plan.num_experts), dtype=bool)
    layer, slot = np.nonzero(plan.slot_to_expert_LS >= 0)
    held[plan.slot_rank_S[slot], layer, plan.slot_to_expert_LS[layer, slot]] = True
    return held


def demands_of(batches: Sequence[tuple[Sequence[Part], StepLoads]], plan: Plan) -> Demands:
    """Return the demands of passes; batches: the passes of each, and their loads."""
    everywhere: list[Demand] = []
    of_rank: list[list[Demand]] = [[] for _ in range(plan.num_ranks)]
    recorded: list[np.ndarray] | None = []
    for parts, loads in batches:
        shape = (len(parts), plan.num_layers, plan.num_experts)
        mentions = [_mentions(part, plan) for part in parts]
        order_PLE, weight_PLE = (np.stack([one[index] for one in mentions]).reshape(shape) for index in (0, 1))
        total_PLE = np.zeros(shape, dtype=np.int64)
        for rank, seen in enumerate(of_rank):
            tokens_PLE = _tokens(plan, loads, rank)
            total_PLE += tokens_PLE
            seen.append(_packed(tokens_PLE, order_PLE, weight_PLE))
        everywhere.append(_packed(total_PLE, order_PLE, weight_PLE))
        guesses = [_guesses(part, plan) for part in parts]
        if recorded is None or any(guess is None for guess in guesses):
            recorded = None
        else:
            recorded.append(_ids(np.stack([guess for guess in guesses if guess is not None]).reshape(shape)))
    return Demands(
        everywhere=_joined(everywhere), of_rank=tuple(_joined(seen) for seen in of_rank), recorded_TLN=None if recorded is None else _padded(recorded, -1)
    )


def _keys(experts_TLK: np.ndarray, plan: Plan) -> np.ndarray:
    return (experts_TLK.astype(np.int64) + np.arange(plan.num_layers)[None, :, None] * plan.num_experts).reshape(-1)


def _first(keys: np.ndarray, plan: Plan) -> np.ndarray:
    """Return, by key, the place of its first mention, `_NEVER` if there is none."""
    order = np.full(plan.num_layers * plan.num_experts, _NEVER)
    order[keys[::-1]] = np.arange(len(keys))[::-1]  # of equal keys the last assignment stays: the first mention
    return order


def _mentions(part: Part, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return, by key, when the tokens of one pass first mention an expert and the sum of its weights."""
    keys = _keys(part.experts_TLK, plan)
    weights = np.ones(len(keys)) if part.weights_TLK is None else part.weights_TLK.reshape(-1).astype(np.float64)
    if part.valid_TLK is not None:
        valid = part.valid_TLK.reshape(-1)
        keys, weights = keys[valid], weights[valid]
    return _first(keys, plan), np.bincount(keys, weights=weights, minlength=plan.num_layers * plan.num_experts)


def _guesses(part: Part, plan: Plan) -> np.ndarray | None:
    """Return, by key, when the tokens' recorded predictions first name an expert."""
    return None if part.predicted_TLK is None else _first(_keys(part.predicted_TLK, plan), plan)


def _tokens(plan: Plan, loads: StepLoads, rank: int) -> np.ndarray:
    """Return int64 [P, L, E]: tokens that the rank's slots of every expert get."""
    tokens = np.zeros((loads.num_passes, plan.num_layers, plan.num_experts), dtype=np.int64)
    layers = np.arange(plan.num_layers)
    for slot in np.flatnonzero(plan.slot_rank_S == rank).tolist():
        expert = plan.slot_to_expert_LS[:, slot]
        tokens[:, layers, np.maximum(expert, 0)] += np.where(expert >= 0, loads.slot_PLS[:, :, slot], 0)
    return tokens


def _packed(tokens_PLE: np.ndarray, order_PLE: np.ndarray, weight_PLE: np.ndarray) -> Demand:
    experts = _ids(np.where(tokens_PLE > 0, order_PLE, _NEVER))
    present, at = experts >= 0, np.maximum(experts, 0)
    tokens, weights = (np.where(present, np.take_along_axis(value, at, axis=-1), 0) for value in (tokens_PLE, weight_PLE))
    return Demand(experts_TLW=experts, tokens_TLW=tokens, weights_TLW=weights)


def _ids(order_PLE: np.ndarray) -> np.ndarray:
    """Return the experts whose order is not `_NEVER`, in that order."""
    width = max(int((order_PLE < _NEVER).sum(axis=-1).max(initial=0)), 1)
    chosen = np.argsort(order_PLE, axis=-1, kind="stable")[..., :width]
    return np.where(np.take_along_axis(order_PLE, chosen, axis=-1) < _NEVER, chosen, -1)


def _joined(parts: list[Demand]) -> Demand:
    fill = {"experts_TLW": -1, "tokens_TLW": 0, "weights_TLW": 0}
    return Demand(**{name: _padded([getattr(part, name) for part in parts], value) for name, value in fill.items()})


def _padded(parts: list[np.ndarray], fill: int) -> np.ndarray:
    width = max(part.shape[-1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, 0), (0, width - part.shape[-1])), constant_values=fill) for part in parts])
