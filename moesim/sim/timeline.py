"""Rates over time: how fast a port of a rank serves Ops while Flows claim a part of it.

A `RateTimeline` is piecewise constant: 1 until the first change, then whatever the last change said. Adding a
change at time t never alters what happened before t, so a Program can be evaluated again after any change.
Times in seconds, rates as a share of full speed.
"""

from __future__ import annotations

import numpy as np

from moesim.errors import SimulationError


class RateTimeline:
    """Share of every (port, rank) that Ops get, as a function of time."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._times: dict[str, list[float]] = {}
        self._rates: dict[str, list[np.ndarray]] = {}

    def set(self, port: str, time: float, rate_R: np.ndarray) -> None:
        """From `time` on, Ops run on `port` at `rate_R` (0 < rate <= 1) of full speed."""
        if not ((rate_R > 0).all() and (rate_R <= 1).all()):
            raise SimulationError(f"port {port}: rate must be in (0, 1]; got {rate_R.min()}..{rate_R.max()}")
        times = self._times.setdefault(port, [-np.inf])
        rates = self._rates.setdefault(port, [np.ones(self.num_ranks)])
        if time < times[-1]:
            raise SimulationError(f"port {port}: change at {time} s is before the last one at {times[-1]} s")
        if time == times[-1]:
            rates[-1] = rate_R.copy()
        elif not np.array_equal(rates[-1], rate_R):
            times.append(time)
            rates.append(rate_R.copy())

    def forget_before(self, time: float) -> None:
        """Drop changes that no Op starting at or after `time` can see."""
        for port, times in self._times.items():
            keep = max(0, int(np.searchsorted(times, time, side="right")) - 1)
            if keep:
                del times[1 : keep + 1]
                self._rates[port][0 : keep + 1] = [self._rates[port][keep]]

    def finish(self, port: str, begin: np.ndarray, work_s: np.ndarray) -> np.ndarray:
        """Return when work begun at `begin` ends, both [..., R]."""
        times = self._times.get(port)
        if times is None:
            return begin + work_s
        rates = self._rates[port]
        end = begin + work_s / rates[-1]
        left = work_s
        now = begin
        done = np.zeros(np.broadcast_shapes(begin.shape, work_s.shape), dtype=bool)
        for index, rate in enumerate(rates):
            until = times[index + 1] if index + 1 < len(times) else np.inf
            candidate = now + left / rate
            here = ~done & (now < until) & (candidate <= until)
            end = np.where(here, candidate, end)
            done |= here
            passed = ~done & (now < until)
            left = np.where(passed, left - (until - now) * rate, left) if until < np.inf else left
            now = np.where(passed, until, now)
        return end
