"""Where the planner of parallelism places experts before it times a group."""

from __future__ import annotations

import numpy as np

from moesim.solvers import packing


def packed_placement(load_LE: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Replicate the hottest experts and pack the copies heaviest first; linear if all loads are equal and there is one copy of each."""
    layers, experts = load_LE.shape
    if ranks * slots == experts and (load_LE == load_LE[:, :1]).all():
        return np.tile(np.arange(experts), (layers, 1))
    copies = packing.copies_LE(load_LE, ranks * slots, ranks)
    packed = packing.pack_LRC(load_LE[None], np.ones((1, layers)), copies, np.full(ranks, slots), np.ones(ranks), allow_duplicates=False)
    return packed.reshape(layers, ranks * slots)
