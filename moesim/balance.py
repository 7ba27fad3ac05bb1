"""The one definition of balance, used by planner, simulator, runtime and report alike.

Rank loads are tokens (or any additive load) per rank; leading axes are layers, passes or windows. 1 is perfect.
`mean_over_max` = Σ mean / Σ max (what a job that waits at every layer feels; vLLM's definition);
`layer_mean` = mean of mean / max (SGLang's); `worst_layer` = the smallest ratio. Empty layers do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Balance of rank loads over layers."""

    mean_over_max: float
    layer_mean: float
    worst_layer: float

    def as_dict(self) -> dict[str, float]:
        """Return the three figures by name."""
        return {"mean_over_max": self.mean_over_max, "layer_mean": self.layer_mean, "worst_layer": self.worst_layer}


def balance_of(load: np.ndarray) -> Balance:
    """Return the balance of `load` [..., R] (>= 0); all leading axes are summed over. No load at all is balanced."""
    load = np.asarray(load, dtype=np.float64)
    mean, most = load.mean(axis=-1).ravel(), load.max(axis=-1).ravel()
    loaded = most > 0
    if not loaded.any():
        return Balance(mean_over_max=1.0, layer_mean=1.0, worst_layer=1.0)
    ratio = mean[loaded] / most[loaded]
    return Balance(mean_over_max=float(mean.sum() / most.sum()), layer_mean=float(ratio.mean()), worst_layer=float(ratio.min()))
