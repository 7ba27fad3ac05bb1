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
        if time == times[-1]:
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

    def __init__(self, begin_K: Sequence[np.ndarray], end_K: Sequence[np.ndarray], share_K: Sequence[float], rates: RateTimeline | None, start: float) -> None:
        """Take K Ops, each with begin and end [..., R] (equal where it takes nothing), and whatever Flows leave of `sm`."""
        changes, left = rates.changes("sm") if rates is not None else ([-np.inf], [])
        times = [max(time, start) for time in changes]
        shape = np.broadcast_shapes(*(array.shape for array in (*begin_K, *end_K)))
        knots = np.empty((2 * len(share_K) + len(times), *shape))
        factor = np.zeros(len(knots))
        for index, time in enumerate(times):
            knots[index] = time
        for index, (begin, end, share) in enumerate(zip(begin_K, end_K, share_K, strict=True)):
            row = len(times) + 2 * index
            knots[row], knots[row + 1] = begin, end
            factor[row], factor[row + 1] = np.log1p(-share), -np.log1p(-share)
        order = np.argsort(knots, axis=0, kind="stable")
        self._knots = np.take_along_axis(knots, order, axis=0)
        self._speed = np.exp(np.cumsum(factor[order], axis=0))
        if left:
            which = np.searchsorted(np.array(times), self._knots, side="right") - 1
            self._speed = self._speed * np.stack(left)[which, np.arange(shape[-1])]
        with np.errstate(invalid="ignore"):
            steps = np.diff(self._knots, axis=0) * self._speed[:-1]
        self._work = np.concatenate([np.zeros((1, *shape)), np.cumsum(steps, axis=0)])

    def finish(self, begin: np.ndarray, work_s: np.ndarray) -> np.ndarray:
        """Return when work begun at `begin` ends, both [..., R]."""
        shape = np.broadcast_shapes(begin.shape, work_s.shape, self._knots.shape[1:])
        begin = np.broadcast_to(begin, shape)
        real = np.isfinite(begin)
        now = np.where(real, begin, self._knots[0])
        done = self._at(self._work, self._knots, now) + self._at(self._speed, self._knots, now) * (now - self._at(self._knots, self._knots, now)) + work_s
        end = self._at(self._knots, self._work, done) + (done - self._at(self._work, self._work, done)) / self._at(self._speed, self._work, done)
        return np.where(real, end, begin)

    @staticmethod
    def _at(values: np.ndarray, keys: np.ndarray, point: np.ndarray) -> np.ndarray:
        """Return the values at the last key that is not after `point`."""
        index = np.maximum((keys <= point).sum(axis=0) - 1, 0)
        return np.take_along_axis(values, index[None], axis=0)[0]
