"""Max-min shares: how transfers divide the ports that they cross.

Progressive filling: all rates rise together, in proportion to their weights, until a port is full; the transfers that cross it keep
their rate, and the others go on rising. A strict class gets only what the classes before it leave. Exact up to rounding. A flow may use a
port at worse than full efficiency: then one byte/s of it takes more than one byte/s of the port. Shapes: F flows, P ports. Bytes/s.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import SimulationError, describe

_TIE = 1e-12


def max_min(use_FP: np.ndarray, capacity_P: np.ndarray, weight_F: np.ndarray | None = None, *, limit_F: np.ndarray | None = None) -> np.ndarray:
    """Return the weighted max-min rates, float64 [F].

    use_FP: bytes/s of the port that one byte/s of the flow takes; bool: 1 where it crosses. capacity_P: >= 0; inf never binds. weight_F: > 0,
    default 1. limit_F: the most that a flow can take.
    Raises SimulationError if a flow is bounded by nothing, or a shape or value breaks its rule.
    """
    use = np.asarray(use_FP, dtype=np.float64)
    flows, ports = use.shape
    left = np.array(capacity_P, dtype=np.float64)
    weight = np.ones(flows) if weight_F is None else np.array(weight_F, dtype=np.float64)
    if left.shape != (ports,) or weight.shape != (flows,):
        raise SimulationError(describe("max-min", "shape", (use.shape, left.shape, weight.shape), "must be [F, P], [P] and [F]"))
    if not ((left >= 0).all() and (weight > 0).all() and np.isfinite(weight).all()):
        raise SimulationError(describe("max-min", "capacity and weight", (left.tolist(), weight.tolist()), "must be >= 0 and > 0"))
    if flows == 1 and limit_F is None and use.any():
        crossed = use[0] > 0
        return np.array([(left[crossed] / use[0, crossed]).min()])
    own = np.full(flows, np.inf) if limit_F is None else np.array(limit_F, dtype=np.float64) / weight
    rate = np.zeros(flows)
    rising = np.ones(flows, dtype=bool)
    while rising.any():
        load = (weight * rising) @ use
        level = np.full(ports, np.inf)
        np.divide(left, load, out=level, where=load > 0)
        top = min(float(level.min(initial=np.inf)), float(own[rising].min()))
        if top == np.inf:
            raise SimulationError(f"max-min: flow {int(np.flatnonzero(rising)[0])} crosses no port with a finite capacity; its rate has no bound")
        full = level <= top * (1 + _TIE)
        fixed = rising & ((use @ full > 0) | (own <= top * (1 + _TIE)))
        rate[fixed] = weight[fixed] * top
        rising &= ~fixed
        left = np.maximum(left - rate[fixed] @ use[fixed], 0.0)
        left[full] = 0.0
    return rate


def by_class(use_FP: np.ndarray, capacity_P: np.ndarray, class_F: np.ndarray, weight_F: np.ndarray | None = None) -> np.ndarray:
    """Return max-min rates under strict priority: class 0 first, every further class from what is left, float64 [F]."""
    use = np.asarray(use_FP, dtype=np.float64)
    capacity = np.asarray(capacity_P, dtype=np.float64)
    weight = np.ones(len(use)) if weight_F is None else np.asarray(weight_F, dtype=np.float64)
    left, rate = capacity.copy(), np.zeros(len(use))
    for level in np.unique(class_F):
        mine = np.asarray(class_F) == level
        rate[mine] = max_min(use[mine], left, weight[mine])
        left = remaining(capacity, left - rate[mine] @ use[mine])
    return rate


def remaining(capacity_P: np.ndarray, left_P: np.ndarray) -> np.ndarray:
    """Return what is left of every port, without the rounding that is no capacity."""
    return np.where(left_P > _TIE * capacity_P, left_P, 0.0)


def guaranteed(capacity: float, use_F: np.ndarray, weight_F: np.ndarray, limit_F: np.ndarray) -> float:
    """Return the least rate that max-min can leave to one more claim, of weight 1, on a port of `capacity` bytes/s.

    The claim may count on it whatever happens elsewhere: no flow takes more than its limit (its narrowest port), nor more than its share.
    """
    left, load = capacity, 1.0 + float(use_F @ weight_F)
    for limit, weight, use in sorted(zip(limit_F.tolist(), weight_F.tolist(), use_F.tolist(), strict=True), key=lambda claim: claim[0] / claim[1]):
        if limit * load >= weight * left:
            break
        left, load = left - use * limit, load - use * weight
    return left / load
