"""Balance of a placement: the one definition that planner, simulator and report share.

A rank's time in a layer is its load divided by its speed; the layer waits for the slowest rank. With equal
speeds, `mean` is the mean rank load and `max` the largest; 1 is perfect balance. A layer without load is
balanced. Several windows are folded into one number by a risk measure over their imbalances Σ max / Σ mean:
`mean` (weighted), `worst`, or `cvar:α` (mean of the worst share α). Shapes: K windows, L layers, S slots, R ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError, describe


def rank_time_KLR(slot_to_expert_LS: np.ndarray, slot_rank_S: np.ndarray, load_KLE: np.ndarray, speed_R: np.ndarray, share_LS: np.ndarray | None = None) -> np.ndarray:
    """Return float64 [K, L, R]: load of every rank divided by its speed; replicas share equally unless `share_LS` says otherwise."""
    table = np.asarray(slot_to_expert_LS)
    layers, _ = table.shape
    experts = load_KLE.shape[2]
    if share_LS is None:
        keys = table + np.arange(layers)[:, None] * (experts + 1) + 1
        copies = np.bincount(keys.ravel(), minlength=layers * (experts + 1))
        share_LS = np.where(table >= 0, 1.0 / np.maximum(copies[keys], 1), 0.0)
    index = np.maximum(table, 0)
    ranks = speed_R.shape[0]
    keys = (np.asarray(slot_rank_S)[None, :] + np.arange(layers)[:, None] * ranks).ravel()
    result = [np.bincount(keys, weights=(np.take_along_axis(load, index, axis=1) * share_LS).ravel(), minlength=layers * ranks) for load in load_KLE]
    return np.stack(result).reshape(len(load_KLE), layers, ranks) / speed_R


def ideal_KL(load_KLE: np.ndarray, speed_R: np.ndarray) -> np.ndarray:
    """Return float64 [K, L]: time of a layer if its load were spread perfectly (the mean rank load at equal speeds)."""
    return np.asarray(load_KLE).sum(axis=2) / float(np.sum(speed_R))


def mean_over_max(mean_L: np.ndarray, max_L: np.ndarray) -> float:
    """Return Σ mean / Σ max over layers, 1.0 if there is no load."""
    total = float(np.sum(max_L))
    return float(np.sum(mean_L)) / total if total > 0 else 1.0


def per_layer(mean_L: np.ndarray, max_L: np.ndarray) -> np.ndarray:
    """Return float64 [L]: mean / max of every layer, 1.0 where there is no load."""
    return np.divide(mean_L, max_L, out=np.ones_like(np.asarray(max_L, dtype=np.float64)), where=np.asarray(max_L) > 0)


def balance(time_LR: np.ndarray, speed_R: np.ndarray | None = None) -> dict[str, float]:
    """Return `mean_over_max`, `layer_mean` and `worst_layer` of rank times [L, R]; `speed_R` weighs the mean."""
    time = np.asarray(time_LR, dtype=np.float64)
    speed = np.ones(time.shape[1]) if speed_R is None else speed_R
    mean = (time * speed).sum(axis=1) / speed.sum()
    layers = per_layer(mean, time.max(axis=1))
    return {"mean_over_max": mean_over_max(mean, time.max(axis=1)), "layer_mean": float(layers.mean()), "worst_layer": float(layers.min())}


def fold_windows(max_KL: np.ndarray, ideal_of_KL: np.ndarray, weight_K: np.ndarray, risk: str) -> float:
    """Return the objective of a placement: 1 / risk over windows of Σ_l max / Σ_l ideal; for one window Σ mean / Σ max."""
    ideal = ideal_of_KL.sum(axis=1)
    ratio = np.divide(max_KL.sum(axis=1), ideal, out=np.ones(len(ideal)), where=ideal > 0)
    return 1.0 / float(risk_weights(ratio, weight_K, risk) @ ratio)


def risk_weights(ratio_K: np.ndarray, weight_K: np.ndarray, risk: str) -> np.ndarray:
    """Return float64 [K], summing to 1: the weight that the risk measure gives every window at these imbalances."""
    if risk == "mean":
        return weight_K
    tail = 0.0 if risk == "worst" else risk_tail(risk)
    order = np.lexsort((np.arange(len(ratio_K)), -ratio_K))
    if tail == 0.0:
        order = order[weight_K[order] > 0]
        return np.eye(len(ratio_K))[order[0]]
    before = np.concatenate(([0.0], np.cumsum(weight_K[order])[:-1]))
    taken = np.clip(tail - before, 0.0, weight_K[order])
    result = np.zeros(len(ratio_K))
    result[order] = taken / taken.sum()
    return result


def risk_tail(risk: str) -> float:
    """Return α of `cvar:α`; raise InputError if `risk` is no known measure."""
    name, _, text = risk.partition(":")
    try:
        tail = float(text) if name == "cvar" and text else 0.0
    except ValueError:
        tail = 0.0
    if name != "cvar" or not 0.0 < tail <= 1.0:
        raise InputError(describe("solver options", "risk", risk, "must be mean, worst or cvar:ALPHA with 0 < ALPHA <= 1"))
    return tail
