"""Prices on slots and on partners: a certificate for few slots per rank, and the counts of copies that go with it.

Suppose no rank takes longer than T. A copy larger than T - x then needs partners: of the others on its rank at most i exceed x / (i + 1), so that
at least C - 1 - i are small. And at most k - 1 copies of a rank exceed T / k. Any prices >= 0 on these rules and on slots turn the choice of every
expert's count into a cheapest one of its own; should even the cheapest counts cost more than the slots there are, T is refuted, whatever the
prices – a Lagrangian relaxation. Good prices are found by multiplicative weights: a rule that the counts break becomes dearer. Where only some
experts at a time answer to the prices, the counts themselves come close to a placement (`paired_counts`).
Shapes: N rows (layers), E experts by falling load, J sizes at which a copy may be large, C slots of every rank, O options of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from moesim.solvers.problem import PlacementProblem

SAFE = 1 - 1e-12
"""Rounds so that floating-point noise never makes a rule stronger than it is."""
MAX_SLOTS = 4
"""Slots per rank up to which partners are scarce enough to count."""
SIZES = 64
OPTIONS = 12
"""Counts of an expert looked at one by one; all larger ones share a price that none of them undercuts."""
FEW_OPTIONS = 5
"""The same in the search for counts, where the larger ones are left out."""
PROOF_STEPS = 5
PROOF_ROUNDS = 60
HOPELESS = 3
"""Steps without any refutation after which a row is left alone."""
PROOF_RATE = 3.0
COUNT_STEPS = 6
COUNT_ROUNDS = 80
COUNT_RATE = 0.3
ANSWERING = 0.1
"""Share of the experts that answer to new prices in a round of the search for counts."""
MOST_REPAIRED = 4
"""Copies too many or too few that are repaired before counts are judged."""
LEAST_WEIGHT = -40.0

Seen = Callable[[np.ndarray, np.ndarray], None]


def priceable(problem: PlacementProblem) -> bool:
    """Say whether the rules hold for a problem: one window, equal ranks, every placement fills its slots, few of them but more than experts."""
    fill, speed = problem.fill_R[problem.fill_R > 0], problem.speed_R
    few = 2 <= fill.min() <= MAX_SLOTS and fill.sum() > problem.num_experts
    return problem.num_windows == 1 and problem.rigid and bool(few) and float(speed.min()) == float(speed.max())


@dataclass(slots=True)
class Prices:
    """Rules and prices of rows that share ranks and slots."""

    load_NE: np.ndarray
    ranks: int
    slots: int
    """C, slots of every rank (at least)."""
    total: int
    """S, slots of all ranks."""
    high_N: np.ndarray
    """Time that is reached in every row: limits lie below it."""
    large_NJ: np.ndarray = field(init=False)
    weight_NP: np.ndarray = field(init=False)
    """Logarithm of the price of every rule: slots, partners by i and size, k on a rank."""

    def __post_init__(self) -> None:
        rows = len(self.load_NE)
        high = np.maximum(self.high_N[:, None], 1e-300)
        least = np.maximum(np.ceil(self.load_NE / high * SAFE), 1)
        size = np.sort(np.concatenate([self.load_NE / (least + more) for more in range(3)], axis=1), axis=1)
        first = (size <= high * 0.48).sum(axis=1)
        pick = first[:, None] + np.floor(np.linspace(0, 1, SIZES) * np.maximum(size.shape[1] - 1 - first, 0)[:, None]).astype(np.int64)
        self.large_NJ = np.take_along_axis(size, np.minimum(pick, size.shape[1] - 1), axis=1)
        self.weight_NP = np.zeros((rows, 1 + (self.slots - 1) * (SIZES + 1)))

    def play(
        self, rows: np.ndarray, limit_n: np.ndarray, rounds: int, rate: float, seen: Seen | None = None, draw: np.random.Generator | None = None
    ) -> np.ndarray:
        """Let prices and counts answer each other at the times `limit_n`; return bool [n]: rows whose limit is refuted.

        seen: called with (rows, counts [n, E]) in every round. draw: where given, only some experts answer in a round, and nothing is refuted.
        """
        rules = _Rules.of(self, rows, limit_n, OPTIONS if draw is None else FEW_OPTIONS)
        refuted = rules.room_n < 0
        weight = self.weight_NP[rows]
        counts_at: np.ndarray | None = None
        for step in range(rounds):
            if draw is None and refuted.all():
                break
            price = np.exp(weight - weight.max(axis=1, keepdims=True))
            price /= price.sum(axis=1, keepdims=True)
            answer, value = rules.cheapest(price)
            if draw is None:
                refuted |= value > 1e-9 * self.total
            elif counts_at is not None:
                answer = np.where(draw.random(answer.shape) < ANSWERING, answer, counts_at)
            counts_at = answer
            counts, broken = rules.broken(answer)
            if seen is not None:
                seen(rows, counts)
            weight += (rate / np.sqrt(1 + step / 10) / np.maximum(np.abs(broken).max(axis=1), 1e-9))[:, None] * broken
            weight = np.maximum(weight - weight.max(axis=1, keepdims=True), LEAST_WEIGHT)
        self.weight_NP[rows] = weight
        return refuted


@dataclass(slots=True)
class _Rules:
    """The rules at one limit per row: what every option of every expert adds to them."""

    total: int
    ranks: int
    slots: int
    room_n: np.ndarray
    count_nEO: np.ndarray
    open_nEO: np.ndarray
    dearest_nE: np.ndarray
    """Largest count of every expert."""
    large_nX: np.ndarray
    """Sizes j that an option reaches, options of a row side by side (X = E · O); as an index into a table [n, J + 1] laid out flat."""
    small_inX: np.ndarray
    """For every i, sizes j that an option is a partner to."""
    over_knX: np.ndarray
    """For every k >= 2, whether a copy of an option exceeds T / k."""

    @classmethod
    def of(cls, prices: Prices, rows: np.ndarray, limit_n: np.ndarray, most_options: int) -> _Rules:
        load, limit = prices.load_NE[rows], limit_n[:, None]
        least = np.clip(np.ceil(load / np.maximum(limit, 1e-300) * SAFE), 1, prices.ranks)
        room = prices.total - least.sum(axis=1)
        room = np.where((load * SAFE > least * limit).any(axis=1), -1, room)
        options = int(np.clip(room.max(initial=0) + 1, 1, most_options))
        more = np.arange(options)
        count = least[:, :, None] + more
        size = (load[:, :, None] / count).reshape(len(rows), -1)
        allowed = np.minimum(np.maximum(room, 0)[:, None] + least, prices.ranks)
        # a large copy is larger than half the limit, or two of them could share a rank
        sizes = np.maximum(prices.large_NJ[rows], limit * (0.5 + 1e-9))
        large = np.empty(size.shape, dtype=np.int64)
        small = np.empty((prices.slots - 1, *size.shape), dtype=np.int64)
        for row in range(len(rows)):
            large[row] = np.searchsorted(sizes[row], size[row] * SAFE, side="right")
            for i in range(prices.slots - 1):
                small[i, row] = np.searchsorted(sizes[row], limit_n[row] - (i + 1) * size[row] * SAFE, side="right")
        large += np.arange(len(rows))[:, None] * (SIZES + 1)
        small += np.arange(len(rows))[:, None] * (SIZES + 1)
        over = np.stack([size * SAFE > limit / k for k in range(2, prices.slots + 1)])
        return cls(prices.total, prices.ranks, prices.slots, room, count, count <= allowed[:, :, None], allowed, large, small, over)

    def cheapest(self, price_nP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the cheapest option of every expert [n, E] and what all of them cost beyond the slots and ranks there are [n]."""
        n, experts, options = self.count_nEO.shape
        each = np.repeat(price_nP[:, :1], experts * options, axis=1)
        least = price_nP[:, :1].copy()
        for i in range(self.slots - 1):
            part = price_nP[:, 1 + i * SIZES : 1 + (i + 1) * SIZES]
            below = np.concatenate([np.zeros((n, 1)), np.cumsum(part, axis=1)], axis=1)
            each += (self.slots - 1 - i) * below.take(self.large_nX)
            each -= below.take(self.small_inX[i])
            least -= below[:, -1:]
        crowd = price_nP[:, 1 + (self.slots - 1) * SIZES :]
        for k in range(self.slots - 1):
            each += crowd[:, k : k + 1] * self.over_knX[k]
        cost = np.where(self.open_nEO, each.reshape(self.count_nEO.shape) * self.count_nEO, np.inf)
        option = cost.argmin(axis=2)
        lowest = np.take_along_axis(cost, option[..., None], axis=2)[..., 0]
        # counts beyond the options: each copy costs at least as if it were a partner to all
        beyond = np.minimum(least * self.dearest_nE, least * (self.count_nEO[:, :, -1] + 1))
        lowest = np.where(self.dearest_nE > self.count_nEO[:, :, -1], np.minimum(lowest, beyond), lowest)
        rest = price_nP[:, 0] * self.total + crowd @ np.arange(1.0, self.slots) * self.ranks
        return option, lowest.sum(axis=1) - rest

    def broken(self, option_nE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the counts [n, E] and by how much they break every rule [n, P]; negative where there is room."""
        n, experts, options = self.count_nEO.shape
        at = option_nE + np.arange(experts) * options + np.arange(n)[:, None] * experts * options
        counts = self.count_nEO.take(at)
        large = _reached(self.large_nX.take(at), counts)
        parts = [counts.sum(axis=1, keepdims=True) - self.total]
        parts += [(self.slots - 1 - i) * large - _reached(self.small_inX[i].take(at), counts) for i in range(self.slots - 1)]
        parts += [((over.take(at) * counts).sum(axis=1) - (k + 1) * self.ranks)[:, None] for k, over in enumerate(self.over_knX)]
        return counts, np.concatenate(parts, axis=1)


def _reached(level_nE: np.ndarray, counts_nE: np.ndarray) -> np.ndarray:
    """Return [n, J]: copies whose level (an index into a flat table [n, J + 1]) exceeds j."""
    n = len(level_nE)
    held = np.bincount(level_nE.ravel(), weights=counts_nE.ravel(), minlength=n * (SIZES + 1)).reshape(n, SIZES + 1)
    return np.asarray(np.cumsum(held[:, :0:-1], axis=1)[:, ::-1])


def raise_bound(prices: Prices, low_N: np.ndarray, high_N: np.ndarray, close: float) -> np.ndarray:
    """Return a bound >= `low_N`: limits between it and `high_N` (a time that is reached) that the prices refute, by bisection.

    close: rows whose `high_N` is within this factor of the bound are left alone.
    """
    low, tried = low_N.copy(), high_N.copy()
    for step in range(PROOF_STEPS):
        # where the upper limits all stand, the lower ones are not worth their time
        rows = np.flatnonzero((high_N > low * close) & (tried > low * (1 + (close - 1) / 4)) & ((step < HOPELESS) | (low > low_N)))
        if not rows.size:
            break
        middle = (low[rows] + tried[rows]) / 2
        refuted = prices.play(rows, middle, PROOF_ROUNDS, PROOF_RATE)
        low[rows] = np.where(refuted, middle, low[rows])
        tried[rows] = np.where(refuted, tried[rows], middle)
    return low


def paired_counts(prices: Prices, low_N: np.ndarray, high_N: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For two slots per rank: return the counts [N, E] with the least time found when the largest copy joins the smallest, and that time [N].

    low_N, high_N: a bound and a time reached; the times aimed at lie between. Rows for which nothing was found have time infinity.
    """
    best, least = np.ones(prices.load_NE.shape, dtype=np.int64), np.full(len(low_N), np.inf)

    def judge(rows: np.ndarray, counts_nE: np.ndarray) -> None:
        counts, good = _repaired(prices.load_NE[rows], counts_nE.astype(np.int64), prices.total, prices.ranks)
        if good.any():
            rows, counts = rows[good], counts[good]
            size = np.sort(np.repeat((prices.load_NE[rows] / counts).ravel(), counts.ravel()).reshape(len(rows), -1), axis=1)
            time = (size + size[:, ::-1]).max(axis=1)
            better = time < least[rows]
            best[rows[better]], least[rows[better]] = counts[better], time[better]

    draw = np.random.Generator(np.random.PCG64(seed))
    every = np.arange(len(low_N))
    for step in range(COUNT_STEPS):
        aim = low_N + (np.minimum(high_N, least) - low_N) * (0.7, 0.5, 0.35)[step % 3]
        prices.play(every, aim, COUNT_ROUNDS, COUNT_RATE, judge, draw)
    return best, least


def _repaired(load_nE: np.ndarray, counts: np.ndarray, total: int, cap: int) -> tuple[np.ndarray, np.ndarray]:
    """Give missing copies to the smallest, take surplus ones where the copy stays smallest; return counts and where they now fill the slots."""
    row = np.arange(len(counts))
    for _ in range(MOST_REPAIRED):
        lack = total - counts.sum(axis=1)
        if not lack.any():
            break
        smallest = np.where(counts < cap, load_nE / counts, np.inf).argmin(axis=1)
        cheapest = np.where(counts > 1, load_nE / np.maximum(counts - 1, 1), np.inf).argmin(axis=1)
        counts[row, np.where(lack > 0, smallest, cheapest)] += np.sign(lack)
    return counts, (counts.sum(axis=1) == total) & (counts.min(axis=1) >= 1) & (counts.max(axis=1) <= cap)


def pairs_LRC(load_LE: np.ndarray, copies: np.ndarray) -> np.ndarray:
    """Return int32 [L, R, 2]: the largest copy beside the smallest and so on, never an expert beside itself where that can be helped."""
    table = []
    for load, count in zip(load_LE, copies, strict=True):
        expert = np.repeat(np.arange(len(load)), count)
        expert = expert[np.argsort(-(load / count)[expert], kind="stable")]
        first, second = expert[: len(expert) // 2].copy(), expert[len(expert) // 2 :][::-1].copy()
        for twin in np.flatnonzero(first == second)[::-1].tolist():
            # a partner of the nearest pair that has neither
            free = np.flatnonzero((first != first[twin]) & (second != second[twin]))
            if free.size:
                other = int(free[np.abs(free - twin).argmin()])
                second[[twin, other]] = second[[other, twin]]
        table.append(np.stack([first, second], axis=1))
    return np.stack(table).astype(np.int32)
