"""Balance of a placement over ranks of unequal speed and over several windows.

A rank's time in a layer is its load divided by its speed; the layer waits for the slowest rank. `ideal` is the
time if the load were spread perfectly: with equal speeds the mean rank load, and Σ ideal / Σ max is then
`mean_over_max` of `moesim.balance`, the one definition of balance. Several windows are folded into one number by a
risk measure over their imbalances Σ max / Σ ideal: `mean` (weighted), `worst`, or `cvar:α` (mean of the worst share α).
Shapes: K windows, L layers, S slots, E experts, R ranks.
"""

from __future__ import annotations

import numpy as np

from moesim.balance import Balance, balance_of
from moesim.errors import InputError, describe

__all__ = ["Balance", "balance_of", "fold_windows", "ideal_KL", "rank_time_KLR", "risk_tail", "risk_weights"]


def rank_time_KLR(slot_to_expert_LS: np.ndarray, slot_rank_S: np.ndarray, load_KLE: np.ndarray, speed_R: np.ndarray) -> np.ndarray:
    """Return float64 [K, L, R]: load of every rank divided by its speed, replicas of an expert serving equal shares."""
    table = np.asarray(slot_to_expert_LS)
    layers, experts, ranks = len(table), load_KLE.shape[2], len(speed_R)
    keys = table + np.arange(layers)[:, None] * (experts + 1) + 1
    copies = np.bincount(keys.ravel(), minlength=layers * (experts + 1))
    share_LS = np.where(table >= 0, 1.0 / np.maximum(copies[keys], 1), 0.0)
    index = np.maximum(table, 0)
    keys = (np.asarray(slot_rank_S)[None, :] + np.arange(layers)[:, None] * ranks).ravel()
    result = [np.bincount(keys, weights=(np.take_along_axis(load, index, axis=1) * share_LS).ravel(), minlength=layers * ranks) for load in load_KLE]
    return np.stack(result).reshape(len(load_KLE), layers, ranks) / speed_R


def ideal_KL(load_KLE: np.ndarray, speed_R: np.ndarray) -> np.ndarray:
    """Return float64 [K, L]: time of a layer if its load were spread perfectly (the mean rank load at equal speeds)."""
    return np.asarray(load_KLE).sum(axis=2) / float(np.sum(speed_R))


def imbalance_K(max_KL: np.ndarray, ideal_of_KL: np.ndarray) -> np.ndarray:
    """Return float64 [K]: Σ_l max / Σ_l ideal of every window, 1 for a window without load."""
    ideal = ideal_of_KL.sum(axis=1)
    return np.divide(max_KL.sum(axis=1), ideal, out=np.ones(len(ideal)), where=ideal > 0)


def fold_windows(max_KL: np.ndarray, ideal_of_KL: np.ndarray, weight_K: np.ndarray, risk: str) -> float:
    """Return the objective of a placement, 1 / risk over windows of their imbalance; for one window Σ ideal / Σ max."""
    ratio = imbalance_K(max_KL, ideal_of_KL)
    return 1.0 / float(risk_weights(ratio, weight_K, risk) @ ratio)


def risk_weights(ratio_K: np.ndarray, weight_K: np.ndarray, risk: str) -> np.ndarray:
    """Return float64 [K], summing to 1: the weight that the risk measure gives every window at these imbalances."""
    if risk == "mean":
        return weight_K
    tail = 0.0 if risk == "worst" else risk_tail(risk)
    order = np.lexsort((np.arange(len(ratio_K)), -ratio_K))
    result = np.zeros(len(ratio_K))
    if risk == "worst":
        result[order[weight_K[order] > 0][0]] = 1.0
        return result
    before = np.concatenate(([0.0], np.cumsum(weight_K[order])[:-1]))
    taken = np.clip(tail - before, 0.0, weight_K[order])
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
