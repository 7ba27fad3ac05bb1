"""Rates over time: how fast a port of a rank serves Ops while Flows claim a part of it, or communication holds its SMs.

A `RateTimeline` is piecewise constant: 1 until the first change, then whatever the last change said. Adding a
change at time t never alters what happened before t, so a Program can be evaluated again after any change.
Times in seconds, rates as a share of full speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.errors import SimulationError


class RateTimeline:
    """Share of every (port, rank) that Ops get, as a function of time, and when ranks have failed."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._times: dict[str, list[float]] = {}
        self._rates: dict[str, list[np.ndarray]] = {}
        self.fail_R: np.ndarray | None = None
        """float64 [R]: when a rank stops for good, inf if it does not; None: no rank has failed."""

    @property
    def is_plain(self) -> bool:
        """Whether Ops run at full rate everywhere and always."""
        return not self._times and self.fail_R is None

    def set(self, port: str, time: float, rate_R: np.ndarray) -> bool:
        """From `time` on, Ops run on `port` at `rate_R` (0 < rate <= 1) of full speed; return whether that changes anything."""
        if not ((rate_R > 0).all() and (rate_R <= 1).all()):
            raise SimulationError(f"port {port}: rate must be in (0, 1]; got {rate_R.min()}..{rate_R.max()}")
        if port not in self._times:
            if (rate_R == 1).all():
                return False
            self._times[port], self._rates[port] = [-np.inf], [np.ones(self.num_ranks)]
        times, rates = self._times[port], self._rates[port]
        if time < times[-1]:
            raise SimulationError(f"port {port}: change at {time} s is before the last one at {times[-1]} s")
        if np.array_equal(rates[-1], rate_R):
            return False
        if time == times[-1] and np.array_equal(rates[-2], rate_R):
            # Back to what it was before this moment: as if nothing had happened.
            times.pop()
            rates.pop()
        elif time == times[-1]:
            rates[-1] = rate_R.copy()
        else:
            times.append(time)
            rates.append(rate_R.copy())
        return True

    def fail(self, rank: int, time: float) -> None:
        """Stop `rank` at `time`."""
        fail_R = np.full(self.num_ranks, np.inf) if self.fail_R is None else self.fail_R.copy()
        fail_R[rank] = min(fail_R[rank], time)
        self.fail_R = fail_R

    def stamp(self) -> tuple:
        """Return something that is equal while nothing has changed."""
        failed = () if self.fail_R is None else tuple(self.fail_R.tolist())
        return failed, tuple((port, tuple(times), self._rates[port][-1].tobytes()) for port, times in self._times.items() if len(times) > 1)

    def forget_before(self, time: float) -> None:
        """Drop changes that no Op starting at or after `time` can see."""
        for port, times in list(self._times.items()):
            keep = max(0, int(np.searchsorted(times, time, side="right")) - 1)
            if keep:
                del times[1 : keep + 1]
                self._rates[port][0 : keep + 1] = [self._rates[port][keep]]
            if len(times) == 1 and (self._rates[port][0] == 1).all():
                del self._times[port], self._rates[port]

    def changes(self, port: str) -> tuple[list[float], list[np.ndarray]]:
        """Return the times and rates [R] of `port`; the first time is -inf."""
        return self._times.get(port, [-np.inf]), self._rates.get(port, [np.ones(self.num_ranks)])

    def finish(self, port: str, begin: np.ndarray, work_s: np.ndarray) -> np.ndarray:
        """Return when work begun at `begin` ends, both [..., R]."""
        times = self._times.get(port)
        if times is None:
            return begin + work_s
        rates = self._rates[port]
        last = len(times) - 1
        if last == 0:
            return begin + work_s / rates[0]
        low = begin.min()
        if low >= times[last]:
            return begin + work_s / rates[last]
        first = int(np.searchsorted(times, low, side="right")) - 1 if low > -np.inf else 0
        shape = np.broadcast_shapes(begin.shape, work_s.shape)
        left, now, end = np.broadcast_to(work_s, shape), np.broadcast_to(begin, shape), np.full(shape, np.inf)
        todo = now < np.inf
        for index in range(first, last + 1):
            rate, until = rates[index], times[index + 1] if index < last else np.inf
            here = todo & (now < until)
            candidate = now + left / rate
            over = here & (candidate <= until)
            end = np.where(over, candidate, end)
            todo = todo & ~over
            if not todo.any():
                break
            passed = here & ~over
            left = np.where(passed, left - (until - now) * rate, left)
            now = np.where(passed, until, now)
        return end


class Slowdown:
    """How fast the port `sm` serves every rank while Ops with an `sm_share` hold a part of its SMs; shares beside each other multiply."""

    def __init__(
        self, shape: tuple[int, ...], share_K: Sequence[float], floor: float, rates: RateTimeline | None, start: float, *, serial: bool = False
    ) -> None:
        """Take K Ops that as yet hold nothing; shape: of times, [R] or [P, R]; floor: the least speed that all of them together leave.

        serial: they follow each other on one lane, so that a rank has one of them at a time, in their order.
        """
        self.begin = np.full((len(share_K), *shape), start)
        """float64 [K, ..., R]: when they take their SMs; `end`: when they give them back."""
        self.end = self.begin.copy()
        self._first, self._last = np.full(len(share_K), start), np.full(len(share_K), start)
        self._start, self._factor = start, 1.0 - np.array(share_K)
        changes, left = rates.changes("sm") if rates is not None else ([-np.inf], [])
        self._changes = np.array(changes[1:])
        self._left = np.stack(left) if len(changes) > 1 or (left and bool((left[0] < 1).any())) else None
        self._floor = floor if self._left is None else floor * float(self._left.min())
        self._serial = serial and self._left is None
        self._computed: np.ndarray | float = start
        self.too_late = False
        """Whether an Op has taken its SMs before the end of one that had been worked out without it."""

    def hold(self, row: int, begin: np.ndarray, end: np.ndarray) -> None:
        """Let Op `row` hold its SMs from `begin` to `end`, -inf where it does not take part."""
        self.begin[row] = np.maximum(begin, self._start)
        self.end[row] = np.maximum(end, self.begin[row])
        self.too_late = self.too_late or bool(((self.begin[row] < self._computed) & (self.end[row] > self.begin[row])).any())
        self._first[row], self._last[row] = self.begin[row].min(), self.end[row].max()

    def finish(self, begin: np.ndarray, work_s: np.ndarray, beside_K: np.ndarray) -> np.ndarray:
        """Return when work begun at `begin` ends, both [..., R]; beside_K: bool, which of the K Ops can run beside it at all."""
        end = self._finish(begin, work_s, beside_K)
        self._computed = np.maximum(self._computed, end)
        return end

    def _finish(self, begin: np.ndarray, work_s: np.ndarray, beside_K: np.ndarray) -> np.ndarray:
        real = np.isfinite(begin)
        if not real.any():
            return begin + work_s
        low = float(begin.min(where=real, initial=np.inf))
        high = float(begin.max(where=real, initial=-np.inf)) + float(work_s.max()) / self._floor
        rows = np.flatnonzero(beside_K & (self._last > low) & (self._first < high))
        if not len(rows) and self._left is None:
            return begin + work_s
        if self._serial and high < np.inf and float(self._last[rows].max()) < np.inf and begin.max() < np.inf:
            return self._one_after_another(begin, work_s, rows)
        shape = np.broadcast_shapes(begin.shape, work_s.shape, self.begin.shape[1:])
        changes = self._changes[(self._changes > low) & (self._changes < high)] if self._left is not None else self._changes[:0]
        fixed = np.append(low, changes)
        knots = np.empty((len(fixed) + 2 * len(rows), *shape))
        factor = np.ones(len(knots))
        knots[: len(fixed)] = fixed.reshape(-1, *(1,) * len(shape))
        knots[len(fixed) :: 2], knots[len(fixed) + 1 :: 2] = self.begin[rows], self.end[rows]
        factor[len(fixed) :: 2], factor[len(fixed) + 1 :: 2] = self._factor[rows], 1.0 / self._factor[rows]
        order = np.argsort(knots, axis=0, kind="stable")
        knots = np.take_along_axis(knots, order, axis=0)
        speed = np.cumprod(factor[order], axis=0)
        if self._left is not None:
            speed = speed * self._left[np.searchsorted(self._changes, knots, side="right"), np.arange(shape[-1])]
        with np.errstate(invalid="ignore"):
            steps = np.diff(knots, axis=0) * speed[:-1]
        work = np.concatenate([np.zeros((1, *shape)), np.cumsum(steps, axis=0)])
        now = np.where(real, begin, low)
        here = _last_not_after(knots, now)
        done = _pick(work, here) + _pick(speed, here) * (now - _pick(knots, here)) + work_s
        there = _last_not_after(work, done)
        return np.where(real, _pick(knots, there) + (done - _pick(work, there)) / _pick(speed, there), begin)

    def _one_after_another(self, begin: np.ndarray, work_s: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return when work ends beside Ops of one lane: up to each, then beside it, as long as work is left."""
        now, left = begin, work_s
        for row in rows.tolist():
            alone = np.minimum(np.maximum(self.begin[row] - now, 0.0), left)
            now, left = now + alone, left - alone
            slowed = np.minimum(np.maximum(self.end[row] - now, 0.0) * self._factor[row], left)
            now, left = now + slowed / self._factor[row], left - slowed
        return now + left


def _last_not_after(keys: np.ndarray, point: np.ndarray) -> np.ndarray:
    return np.maximum((keys <= point).sum(axis=0, keepdims=True) - 1, 0)


def _pick(values: np.ndarray, index: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, index, axis=0)[0]
