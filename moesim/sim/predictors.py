"""Predictors: which experts a layer will want, known some layers ahead. Hook `predictor` of the policy registry.

A predictor turns routing into predictions [T steps, L layers, N], -1 where there are fewer; it sees no expert that its
kind could not know: `exact` is a gate computed ahead, `recorded` what the trace holds, `synthetic:RECALL,PRECISION` the
truth with seeded errors, `frequency:N` the N experts of a layer used most in earlier steps, `all` every expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, describe
from moesim.sim import policies
from moesim.sim.policies import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictorView:
    """What a predictor is made from."""

    routes_TLK: np.ndarray
    """int: distinct experts of every step and layer, -1 where there are fewer."""
    num_experts: int
    recorded_TLK: np.ndarray | None = None
    """int: predictions in the trace."""
    seed: int = 0


def predict(predictor: str | Policy, view: PredictorView) -> np.ndarray:
    """Return int [T, L, N]: the experts predicted for every step and layer. Raises InputError if one does not exist."""
    policy = policies.get("predictor", predictor)
    result = np.asarray(policy.function(view))
    steps, layers, _ = view.routes_TLK.shape
    place = f"policy {policy.name} (hook predictor)"
    if result.ndim != 3 or result.shape[:2] != (steps, layers) or result.dtype.kind not in "iu":
        raise InputError(describe(place, "shape", result.shape, f"must be integers [{steps}, {layers}, N]"))
    wrong = (result < -1) | (result >= view.num_experts)
    if wrong.any():
        raise InputError(describe(place, "expert", int(result[wrong][0]), f"must be an expert 0..{view.num_experts - 1}, or -1 for none"))
    return result


def _exact(view: PredictorView) -> np.ndarray:
    return view.routes_TLK


def _recorded(view: PredictorView) -> np.ndarray:
    if view.recorded_TLK is None:
        raise InputError(describe("predictor", "recorded", None, "needs predictions in the trace; record next_gate_topk, or use exact or synthetic"))
    return view.recorded_TLK


def _all(view: PredictorView) -> np.ndarray:
    steps, layers, _ = view.routes_TLK.shape
    return np.broadcast_to(np.arange(view.num_experts), (steps, layers, view.num_experts))


def _synthetic(text: str) -> Policy:
    """RECALL: each wanted expert is predicted with this probability. PRECISION: share of predictions that are right, on average."""
    try:
        recall, precision = (float(part) for part in (text + ",1" if "," not in text else text).split(","))
    except ValueError:
        recall, precision = -1.0, -1.0
    if not (0 <= recall <= 1 and 0 < precision <= 1):
        raise InputError(describe("predictor synthetic", "parameter", text, "must be RECALL in [0, 1], PRECISION in (0, 1], like synthetic:0.9,0.8"))

    def function(view: PredictorView) -> np.ndarray:
        rng = np.random.Generator(np.random.PCG64(view.seed))
        routes = view.routes_TLK
        steps, layers, width = routes.shape
        known = np.where((rng.random(routes.shape) < recall) & (routes >= 0), routes, -1)
        wanted = (routes >= 0).sum(axis=-1)
        wrong = recall * wanted * (1 - precision) / precision
        count_TL = np.minimum((wrong + rng.random(wrong.shape)).astype(np.int64), view.num_experts - wanted)
        extra = int(count_TL.max(initial=0))
        if extra == 0:
            return known
        draw = rng.random((steps, layers, view.num_experts))
        t, layer, k = np.nonzero(routes >= 0)
        draw[t, layer, routes[t, layer, k]] = 2.0
        false = np.argsort(draw, axis=-1, kind="stable")[..., :extra]
        false = np.where(np.arange(extra) < count_TL[..., None], false, -1)
        return np.concatenate([known, false], axis=-1)

    return Policy(hook="predictor", name=f"synthetic:{recall:g},{precision:g}", function=function)


def _frequency(text: str) -> Policy:
    number = policies.whole_parameter("frequency", text, 2, 1)

    def function(view: PredictorView) -> np.ndarray:
        steps, layers, _ = view.routes_TLK.shape
        count = min(number, view.num_experts)
        result = np.full((steps, layers, count), -1, dtype=np.int64)
        for layer in range(layers):
            used = np.zeros((steps + 1, view.num_experts), dtype=np.int64)
            t, k = np.nonzero(view.routes_TLK[:, layer] >= 0)
            np.add.at(used, (t + 1, view.routes_TLK[t, layer, k]), 1)
            before = np.cumsum(used, axis=0)[:steps]
            top = np.argsort(-before, axis=-1, kind="stable")[:, :count]
            result[:, layer] = np.where(np.take_along_axis(before, top, axis=-1) > 0, top, -1)
        return result

    return Policy(hook="predictor", name=f"frequency:{number}", function=function)


policies.register(Policy(hook="predictor", name="exact", function=_exact))
policies.register(Policy(hook="predictor", name="recorded", function=_recorded))
policies.register(Policy(hook="predictor", name="all", function=_all))
policies.register_maker("predictor", "synthetic", _synthetic)
policies.register_maker("predictor", "frequency", _frequency)
