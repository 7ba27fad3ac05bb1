"""First placements: how many copies every expert gets, and which rank every copy goes to.

All layers advance in lock step, one copy per numpy call; nothing loops over layers but the repair of a dead end.
Shapes: K windows, L layers, E experts, R ranks, C slots of the largest rank. Empty slots hold -1.
"""

from __future__ import annotations

import numpy as np


def copies_LE(load_LE: np.ndarray, slots: int, cap: int) -> np.ndarray:
    """Return int64 [L, E]: copies of every expert, each extra slot going to the expert with the largest load per copy.

    slots: filled slots of a layer, >= E. cap: most copies that an expert may have.
    """
    layers, experts = load_LE.shape
    copies = np.ones((layers, experts))
    size = np.array(load_LE, dtype=np.float64)
    row = np.arange(layers)
    if cap == 1:
        size[:] = -1.0
    for _ in range(slots - experts):
        expert = size.argmax(axis=1)
        copies[row, expert] += 1
        count = copies[row, expert]
        size[row, expert] = np.where(count < cap, load_LE[row, expert] / count, -1.0)
    return copies.astype(np.int64)


def capped_copies_LE(load_LE: np.ndarray, slots: int, cap: int, target_L: np.ndarray, *, spread: bool) -> np.ndarray:
    """Return int64 [L, E]: the fewest copies that keep every copy within `target_L`, the slots left over spent where they are of use.

    spread: leftover slots go to experts whose copy is at most half a target, else to replicated experts. Where the targets need more
    slots than there are, the answer is that of `copies_LE`.
    """
    copies = np.clip(np.ceil(load_LE / np.maximum(target_L, 1e-300)[:, None]), 1, cap)
    row = np.arange(len(load_LE))
    room = slots - copies.sum(axis=1)
    fits = room >= 0
    for step in range(int(room.max(initial=0))):
        size = load_LE / copies
        gain = np.where(size <= 0.5 * target_L[:, None], size, -1.0) if spread else np.where(copies > 1, size / copies, -1.0)
        gain[copies >= cap] = -2.0
        expert = gain.argmax(axis=1)
        copies[row, expert] += step < room
    short = ~fits | (copies.max(axis=1) > cap)
    if short.any():
        copies[short] = copies_LE(load_LE[short], slots, cap)
    return copies.astype(np.int64)


def pack_LRC(load_KLE: np.ndarray, weight_KL: np.ndarray, copies: np.ndarray, fill_R: np.ndarray, speed_R: np.ndarray, *, allow_duplicates: bool) -> np.ndarray:
    """Return int32 [L, R, C]: copies dealt heaviest first to the rank that it burdens least and that has a free slot.

    weight_KL: importance of a unit of load in every window and layer. With one window this is longest processing time
    first; with several, the burden is Σ_k weight²·(rank load)·(copy load). `copies` is changed in place where a copy has
    no rank left without that expert: the slot goes to another expert.
    """
    windows, layers, experts = load_KLE.shape
    ranks = len(fill_R)
    row = np.arange(layers)
    size = load_KLE / copies * weight_KL[..., None]
    order = np.argsort(-size.sum(axis=0), axis=1, kind="stable")
    repeats = np.take_along_axis(copies, order, axis=1)
    queue = np.repeat(order.ravel(), repeats.ravel()).reshape(layers, -1)
    table = np.full((layers, ranks, int(fill_R.max())), -1, dtype=np.int32)
    used = np.zeros((layers, ranks), dtype=np.int64)
    load = np.zeros((windows, layers, ranks))
    held = np.zeros((layers, ranks, experts), dtype=bool)
    inverse = 1.0 / speed_R
    for expert in queue.T.copy():
        one = size[:, row, expert]
        if windows == 1:
            burden = (load[0] + one[0][:, None]) * inverse
        else:
            burden = ((load + one[..., None] * 0.5) * one[..., None]).sum(axis=0) * inverse
        closed = used >= fill_R
        burden[closed if allow_duplicates else closed | held[row, :, expert]] = np.inf
        rank = burden.argmin(axis=1)
        stuck = np.nonzero(np.isinf(burden[row, rank]))[0]
        for layer in stuck:
            rank[layer] = int(np.where(closed[layer], np.inf, load[:, layer].sum(axis=0)).argmin())
            expert[layer] = _substitute(held, copies, size, int(layer), int(rank[layer]), int(expert[layer]))
        if stuck.size:
            one = size[:, row, expert]
        table[row, rank, used[row, rank]] = expert
        used[row, rank] += 1
        load[:, row, rank] += one
        held[row, rank, expert] = True
    return table


def _substitute(held_LRE: np.ndarray, copies: np.ndarray, size: np.ndarray, layer: int, rank: int, expert: int) -> int:
    """Give a slot that no copy of `expert` may take to the heaviest expert that the rank lacks; return it."""
    per_copy = (size[:, layer] * copies[layer]).sum(axis=0) / (copies[layer] + 1)
    per_copy[held_LRE[layer, rank]] = -1.0
    other = int(per_copy.argmax())
    for changed, by in ((expert, -1), (other, 1)):
        before = copies[layer, changed]
        copies[layer, changed] = before + by
        size[:, layer, changed] *= before / (before + by)
    return other


def to_slots_LS(table_LRC: np.ndarray, slots_per_rank_R: np.ndarray) -> np.ndarray:
    """Return int32 [L, S]: the table with the slots of all ranks side by side, ranks with fewer slots cut short."""
    layers, ranks, width = table_LRC.shape
    most = int(slots_per_rank_R.max())
    wide = np.full((layers, ranks, max(width, most)), -1, dtype=np.int32)
    wide[:, :, :width] = table_LRC
    keep = np.arange(wide.shape[2])[None, :] < np.asarray(slots_per_rank_R)[:, None]
    return wide[:, keep]


def from_slots_LRC(table_LS: np.ndarray, slots_per_rank_R: np.ndarray) -> np.ndarray:
    """Return int32 [L, R, C]: the inverse of `to_slots_LS`, padded with -1."""
    slots = np.asarray(slots_per_rank_R)
    wide = np.full((len(table_LS), len(slots), int(slots.max())), -1, dtype=np.int32)
    wide[:, np.arange(wide.shape[2])[None, :] < slots[:, None]] = table_LS
    return wide
