"""The state of a local search over placements, all layers at once, and the price of every move from it.

Costs are per layer: Σ_k weight_KL · (time of the slowest rank). For one window a move is judged by the larger of
the two ranks it touches, so that ties between slow ranks do not block it; for several, by the true cost plus a
small share of that. Shapes: K windows, L layers, R ranks, C slots of the largest rank, E experts; n chosen layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TIE_WEIGHT = 0.05
STRICT = 1.0 - 1e-12
CHUNK_CELLS = 1 << 21
CACHE_CELLS = 1 << 16
NEAR_RANKS = 32
CALL_PRICES = 50_000
"""What a call costs whatever its size, in prices of moves."""


@dataclass(slots=True)
class SearchState:
    """Placement, copies and rank loads of all layers; arrays change in place."""

    load_KLE: np.ndarray
    weight_KL: np.ndarray
    table_LRC: np.ndarray
    filled_RC: np.ndarray
    speed_R: np.ndarray
    copies_LE: np.ndarray
    held_LRE: np.ndarray
    """uint8: copies of every expert on every rank."""
    value_KLRC: np.ndarray
    """Load of the copy in every slot."""
    rank_KLR: np.ndarray
    """Load of every rank."""
    cap: int
    """Most copies an expert may have."""
    allow_duplicates: bool
    priced: int = 0
    """Prices of moves computed so far: work, counted rather than timed."""

    @classmethod
    def of(cls, load_KLE: np.ndarray, weight_KL: np.ndarray, table_LRC: np.ndarray, speed_R: np.ndarray, *, allow_duplicates: bool = False) -> SearchState:
        """Build the state of a placement."""
        layers, ranks, width = table_LRC.shape
        experts = load_KLE.shape[2]
        held = np.zeros((layers, ranks, experts + 1), dtype=np.int32)
        np.add.at(held, (np.arange(layers)[:, None, None], np.arange(ranks)[None, :, None], table_LRC), 1)
        held = held[:, :, :experts].astype(np.uint8)
        state = cls(
            load_KLE=load_KLE,
            weight_KL=weight_KL,
            table_LRC=table_LRC,
            filled_RC=np.ones((layers, ranks, width), dtype=bool),
            speed_R=speed_R,
            copies_LE=held.sum(axis=1, dtype=np.int64),
            held_LRE=held,
            value_KLRC=np.zeros((len(load_KLE), *table_LRC.shape)),
            rank_KLR=np.zeros((len(load_KLE), layers, ranks)),
            cap=10**9 if allow_duplicates else ranks,
            allow_duplicates=allow_duplicates,
        )
        state.filled_RC = table_LRC >= 0
        state.refresh(np.arange(layers))
        return state

    def refresh(self, layers_n: np.ndarray) -> None:
        """Recompute slot values and rank loads of some layers from their tables."""
        if len(layers_n) == 0:
            return
        table = self.table_LRC[layers_n]
        size = self.load_KLE[:, layers_n] / np.maximum(self.copies_LE[layers_n], 1)
        index = np.maximum(table, 0).reshape(len(layers_n), -1)
        value = np.stack([np.take_along_axis(one, index, axis=1).reshape(table.shape) for one in size]) * (table >= 0)
        self.value_KLRC[:, layers_n] = value
        self.rank_KLR[:, layers_n] = value.sum(axis=3)

    def time_KLR(self) -> np.ndarray:
        """Return the time of every rank."""
        return self.rank_KLR / self.speed_R

    def cost_L(self) -> np.ndarray:
        """Return the cost of every layer."""
        return (self.time_KLR().max(axis=2) * self.weight_KL).sum(axis=0)

    def measure(self, layers_n: np.ndarray) -> np.ndarray:
        """Return what a move is judged by across kinds: for one window how crowded the top is, for several the cost."""
        if len(self.rank_KLR) > 1:
            return self.cost_L()[layers_n]
        time = self.rank_KLR[0, layers_n] / self.speed_R
        return _crowding(time, time.max(axis=1))

    def measure_after_swap(self, layers_n: np.ndarray, rank: np.ndarray, slot: np.ndarray, other: np.ndarray, other_slot: np.ndarray) -> np.ndarray:
        """Return the measure after a swap in every given layer."""
        change = self.value_KLRC[:, layers_n, rank, slot] - self.value_KLRC[:, layers_n, other, other_slot]
        load = self.rank_KLR[:, layers_n]
        row = np.arange(len(layers_n))
        load[:, row, rank] -= change
        load[:, row, other] += change
        time = load / self.speed_R
        if len(load) > 1:
            return (time.max(axis=2) * self.weight_KL[:, layers_n]).sum(axis=0)
        return _crowding(time[0], (self.rank_KLR[0, layers_n] / self.speed_R).max(axis=1))

    def measure_after_retarget(self, layers_n: np.ndarray, rank: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> np.ndarray:
        """Return the measure after a retarget in every given layer; where a layer has none to offer the entry means nothing."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._retarget_cost_part(layers_n, rank, slot, expert)

    # --- swaps: one slot of the slowest rank against any slot of another ------------------------

    def best_swap(self, layers_n: np.ndarray, window: int) -> tuple[np.ndarray, ...]:
        """Find the best swap between the slowest rank of a window and the others in the given layers.

        Many ranks: the fastest `NEAR_RANKS` first, all of them only where these have nothing to offer.
        Returns (better, rank, slot, other rank, other slot), each [n]; `better` says whether the swap is worth making.
        """
        ranks = len(self.speed_R)
        if ranks < 2 * NEAR_RANKS:
            return self._best_swap_blocks(layers_n, window, ranks)
        found = self._best_swap_blocks(layers_n, window, NEAR_RANKS)
        again = np.flatnonzero(~found[0])
        if again.size:
            for column, late in zip(found, self._best_swap_blocks(layers_n[again], window, ranks), strict=True):
                column[again] = late
        return found

    def _best_swap_blocks(self, layers_n: np.ndarray, window: int, partners: int) -> tuple[np.ndarray, ...]:
        """Price blocks of layers whose prices stay in the processor's cache."""
        width = self.table_LRC.shape[2]
        self.priced += CALL_PRICES + len(layers_n) * partners * width * width * len(self.load_KLE)
        step = max(1, CACHE_CELLS // (partners * width * width))
        parts = [self._best_swap_block(layers_n[start : start + step], window, partners) for start in range(0, max(1, len(layers_n)), step)]
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _best_swap_block(self, layers_n: np.ndarray, window: int, partners: int) -> tuple[np.ndarray, ...]:
        n, ranks, width = len(layers_n), len(self.speed_R), self.table_LRC.shape[2]
        row, at = np.arange(n), layers_n[:, None]
        inverse = 1.0 / self.speed_R
        time = self.rank_KLR[window, layers_n] * inverse
        slow = time.argmax(axis=1)
        other_nP = np.tile(np.arange(ranks), (n, 1)) if partners == ranks else np.sort(np.argpartition(time, partners - 1, axis=1)[:, :partners], axis=1)
        mine_nC, theirs_nPC = self.table_LRC[layers_n, slow], self.table_LRC[at, other_nP]
        one_window = len(self.rank_KLR) == 1
        uniform = bool((self.speed_R == self.speed_R[0]).all())
        inverse_nP, inverse_slow = inverse[other_nP], inverse[slow]
        score = np.zeros((n, width, partners, width))
        for k in range(len(self.rank_KLR)):
            values, load = self.value_KLRC[k, at, other_nP], self.rank_KLR[k, at, other_nP]
            mine, top = self.value_KLRC[k, layers_n, slow], self.rank_KLR[k, layers_n, slow]
            if one_window and uniform:
                half = (top[:, None] - load) / 2
                np.subtract(mine[:, :, None, None], (values + half[:, :, None])[:, None], out=score)
                np.abs(score, out=score)
                score += ((top[:, None] + load) / 2)[:, None, :, None]
                break
            left = (top[:, None] - mine) * inverse_slow[:, None]
            pair = left[:, :, None, None] + (values * inverse_slow[:, None, None])[:, None]
            right = ((load[:, :, None] - values) * inverse_nP[:, :, None])[:, None] + mine[:, :, None, None] * inverse_nP[:, None, :, None]
            np.maximum(pair, right, out=pair)
            if one_window:
                score = pair
                break
            rest = np.take_along_axis(_max_without(self.rank_KLR[k, layers_n] * inverse, slow), other_nP, axis=1)
            weight = self.weight_KL[k, layers_n][:, None, None, None]
            np.multiply(pair, TIE_WEIGHT, out=right)
            right += np.maximum(pair, rest[:, None, :, None], out=pair)
            right *= weight
            score += right
        barred = (theirs_nPC < 0) | (other_nP == slow[:, None])[:, :, None]
        mine_barred = np.repeat((mine_nC < 0)[:, :, None], partners, axis=2)
        if not self.allow_duplicates:
            barred |= self.held_LRE[layers_n, slow][row[:, None, None], theirs_nPC] > 0
            mine_barred |= self.held_LRE[at[:, :, None], other_nP[:, None, :], np.maximum(mine_nC, 0)[:, :, None]] > 0
        score += np.where(barred, np.inf, 0.0)[:, None]
        score[mine_barred] = np.inf
        flat = score.reshape(n, -1)
        best = flat.argmin(axis=1) if n else np.zeros(0, dtype=np.int64)
        slot, place, other_slot = np.unravel_index(best, (width, partners, width))
        other = other_nP[row, place]
        better = np.isfinite(flat[row, best]) & self._swap_is_better(layers_n, slow, slot, other, other_slot)
        return better, slow, slot, other, other_slot

    def _swap_is_better(self, layers_n: np.ndarray, rank: np.ndarray, slot: np.ndarray, other: np.ndarray, other_slot: np.ndarray) -> np.ndarray:
        time = self.time_KLR()[:, layers_n]
        row = np.arange(len(layers_n))
        before = time.max(axis=2)
        change = self.value_KLRC[:, layers_n, rank, slot] - self.value_KLRC[:, layers_n, other, other_slot]
        time[:, row, rank] -= change / self.speed_R[rank]
        time[:, row, other] += change / self.speed_R[other]
        if len(time) == 1:
            return np.maximum(time[0, row, rank], time[0, row, other]) < before[0] * STRICT
        weight = self.weight_KL[:, layers_n]
        return (time.max(axis=2) * weight).sum(axis=0) < (before * weight).sum(axis=0) * STRICT

    def swap(self, layers_n: np.ndarray, rank: np.ndarray, slot: np.ndarray, other: np.ndarray, other_slot: np.ndarray) -> None:
        """Exchange the experts of two slots in every given layer."""
        table, value, load, held = self.table_LRC, self.value_KLRC, self.rank_KLR, self.held_LRE
        mine, theirs = table[layers_n, rank, slot], table[layers_n, other, other_slot]
        change = value[:, layers_n, other, other_slot] - value[:, layers_n, rank, slot]
        value[:, layers_n, rank, slot] += change
        value[:, layers_n, other, other_slot] -= change
        load[:, layers_n, rank] += change
        load[:, layers_n, other] -= change
        table[layers_n, rank, slot], table[layers_n, other, other_slot] = theirs, mine
        held[layers_n, rank, mine] -= 1
        held[layers_n, other, mine] += 1
        held[layers_n, rank, theirs] += 1
        held[layers_n, other, theirs] -= 1

    # --- retargets: a slot of a replicated expert is given to another expert ---------------------

    def best_retarget(self, layers_n: np.ndarray, window: int) -> tuple[np.ndarray, ...]:
        """Find the slot whose reassignment to another expert lowers the cost most.

        Candidates: a replicated expert's slot anywhere takes an expert of the slowest rank, or one on the slowest rank takes any expert.
        Returns (better, rank, slot, expert), each [n].
        """
        n = len(layers_n)
        slow = self.time_KLR()[window, layers_n].argmax(axis=1)
        table = self.table_LRC[layers_n]
        spare = (table >= 0) & (np.take_along_axis(self.copies_LE[layers_n], np.maximum(table, 0).reshape(n, -1), axis=1).reshape(table.shape) > 1)
        i, rank, slot = np.nonzero(spare)
        wanted = table[i, slow[i]]
        elsewhere = [np.repeat(part, wanted.shape[1]) for part in (i, rank, slot)] + [wanted.ravel()]
        at = np.nonzero(rank == slow[i])[0]
        experts = self.load_KLE.shape[2]
        own = [np.repeat(part[at], experts) for part in (i, rank, slot)] + [np.tile(np.arange(experts), len(at))]
        i, rank, slot, expert = (np.concatenate(pair) for pair in zip(elsewhere, own, strict=True))
        layer = layers_n[i]
        keep = (expert >= 0) & (expert != table[i, rank, slot]) & (self.copies_LE[layer, expert] < self.cap)
        if not self.allow_duplicates:
            keep &= self.held_LRE[layer, rank, expert] == 0
        i, rank, slot, expert = i[keep], rank[keep], slot[keep], expert[keep]
        better, result = np.zeros(n, dtype=bool), [np.zeros(n, dtype=np.int64) for _ in range(3)]
        if len(i) == 0:
            return better, *result
        if len(self.rank_KLR) == 1:
            keep = self._may_help(layers_n[i], rank, slot, expert)
            i, rank, slot, expert = i[keep], rank[keep], slot[keep], expert[keep]
        cost = self._retarget_cost(layers_n[i], rank, slot, expert)
        order = np.lexsort((cost, i))
        first = order[np.flatnonzero(np.diff(i[order], prepend=-1))]
        before = (
            _crowding(self.rank_KLR[0, layers_n] / self.speed_R, self.time_KLR()[0, layers_n].max(axis=1))
            if len(self.rank_KLR) == 1
            else self.cost_L()[layers_n]
        )[i[first]]
        better[i[first]] = cost[first] < before * STRICT
        for out, part in zip(result, (rank, slot, expert), strict=True):
            out[i[first]] = part[first]
        return better, *result

    def _may_help(self, layer: np.ndarray, rank: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> np.ndarray:
        """Say which retargets leave every rank that they burden below the slowest: the others cannot help."""
        load, speed = self.load_KLE[0], self.speed_R
        time = self.rank_KLR[0] / speed
        top = time.max(axis=1)[layer]
        dropped = self.table_LRC[layer, rank, slot]
        copies, more = self.copies_LE[layer, dropped], self.copies_LE[layer, expert]
        target = self.rank_KLR[0, layer, rank] - load[layer, dropped] / copies + load[layer, expert] / (more + 1)
        keep = target / speed[rank] < top
        # dropping an expert's copy burdens its other ranks: the busiest of them decides
        part = np.flatnonzero(keep)
        key, where = np.unique(layer[part] * load.shape[1] + dropped[part], return_inverse=True)
        of_layer, of_expert = np.divmod(key, load.shape[1])
        copies = self.copies_LE[of_layer, of_expert]
        growth = (load[of_layer, of_expert] / (copies - 1) - load[of_layer, of_expert] / copies)[:, None] / speed
        others = time[of_layer] + growth * self.held_LRE[of_layer, :, of_expert]
        others[self.held_LRE[of_layer, :, of_expert] == 0] = 0.0
        # the rank that loses the copy is spared: take the two busiest
        first = others.argmax(axis=1)
        peak = others[np.arange(len(key)), first]
        others[np.arange(len(key)), first] = 0.0
        second = others.max(axis=1)
        keep[part] = np.where(rank[part] == first[where], second[where], peak[where]) < top[part]
        return keep

    def _retarget_cost(self, layer: np.ndarray, rank: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> np.ndarray:
        result = np.empty(len(layer))
        self.priced += CALL_PRICES + len(layer) * len(self.speed_R) * len(self.load_KLE)
        step = max(1, CHUNK_CELLS // len(self.speed_R))
        for start in range(0, len(layer), step):
            part = slice(start, start + step)
            result[part] = self._retarget_cost_part(layer[part], rank[part], slot[part], expert[part])
        return result

    def _retarget_cost_part(self, layer: np.ndarray, rank: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> np.ndarray:
        dropped = self.table_LRC[layer, rank, slot]
        copies, more = self.copies_LE[layer, dropped], self.copies_LE[layer, expert]
        row = np.arange(len(layer))
        on_dropped, on_expert = self.held_LRE[layer, :, dropped], self.held_LRE[layer, :, expert]
        total = np.zeros(len(layer))
        for k in range(len(self.rank_KLR)):
            load_dropped, load_expert = self.load_KLE[k, layer, dropped], self.load_KLE[k, layer, expert]
            load = self.rank_KLR[k, layer]
            load += on_dropped * (load_dropped / (copies - 1) - load_dropped / copies)[:, None]
            load += on_expert * (load_expert / (more + 1) - load_expert / more)[:, None]
            load[row, rank] += load_expert / (more + 1) - load_dropped / (copies - 1)
            time = load / self.speed_R
            if len(self.rank_KLR) == 1:
                return _crowding(time, (self.rank_KLR[0] / self.speed_R).max(axis=1)[layer])
            total += self.weight_KL[k, layer] * time.max(axis=1)
        return total

    def retarget(self, layers_n: np.ndarray, rank: np.ndarray, slot: np.ndarray, expert: np.ndarray) -> None:
        """Give a slot of every given layer to another expert."""
        dropped = self.table_LRC[layers_n, rank, slot]
        self.table_LRC[layers_n, rank, slot] = expert
        for which, by in ((dropped, -1), (expert, 1)):
            self.copies_LE[layers_n, which] += by
        self.held_LRE[layers_n, rank, dropped] -= 1
        self.held_LRE[layers_n, rank, expert] += 1
        self.refresh(layers_n)


def _crowding(time_nR: np.ndarray, top_n: np.ndarray) -> np.ndarray:
    """Return [n]: Σ_r (time / top)^64, infinite where a rank is slower than `top`: how many ranks are (nearly) the slowest."""
    share = time_nR / np.maximum(top_n, 1e-300)[:, None]
    worse = share.max(axis=1) > 1.0 + 1e-12
    for _ in range(6):
        share *= share
    return np.where(worse, np.inf, share.sum(axis=1))


def _max_without(time_nR: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """Return [n, R]: the largest time among the ranks other than `slow` and the rank of the column."""
    row = np.arange(len(slow))
    others = time_nR.copy()
    others[row, slow] = -np.inf
    first = others.argmax(axis=1)
    top = others[row, first]
    result = np.repeat(top[:, None], time_nR.shape[1], axis=1)
    others[row, first] = -np.inf
    result[row, first] = others.max(axis=1)
    return np.maximum(result, 0.0)
