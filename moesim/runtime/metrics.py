"""What a watch has seen and done, as plain figures, and the endpoint that shows them to Prometheus.

The figures need nothing; the endpoint needs prometheus-client (`moesim[metrics]`), imported when it is opened. Names carry their units.
"""

from __future__ import annotations

import importlib.util
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from typing import Any

from moesim.errors import InputError, describe

PAUSE_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
GAUGES = {
    "up": "1 while the deployment serves and answers, else 0",
    "balance_ratio": "mean over max tokens per rank, summed over layers, as the ranks counted them in the last window",
    "epoch": "installed placements since the deployment started",
    "step": "steps that every rank has served",
    "break_even_steps": "steps after which the last plan that the planner made pays for its installation; -1: never",
}
COUNTERS = {
    "steps": "steps served while watching",
    "all_to_all_bytes": "bytes that ranks sent to other ranks in dispatch and combine, counts included",
    "all_to_all_seconds": "seconds that ranks spent in these exchanges, added up over ranks, waiting for others included",
    "migrated_bytes": "bytes of experts copied for installed plans",
}
LABELLED = {
    "decisions": ("decision", "decisions at step borders by what was decided"),
    "migrations": ("result", "attempts to install a plan by how they ended"),
    "watch_errors": ("phase", "errors by the phase that failed or outlived its deadline"),
}


class Figures:
    """Everything that a watch counts; written by one thread, read by others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.gauges: dict[str, float] = {"up": 0.0}
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self.labelled: dict[str, Counter[str]] = {name: Counter() for name in LABELLED}
        self.pauses_s: list[float] = []
        self._totals: dict[str, float] = {}

    def set(self, **gauges: float) -> None:
        """Set gauges."""
        with self.lock:
            self.gauges.update(gauges)

    def add(self, name: str, value: float) -> None:
        """Raise a counter."""
        with self.lock:
            self.counters[name] += value

    def follow(self, name: str, total: float) -> None:
        """Raise a counter by what `total`, somebody else's count, has risen by; a count that fell began again at 0."""
        with self.lock:
            before = self._totals.get(name, total)
            self.counters[name] += total - before if total >= before else total
            self._totals[name] = total

    def count(self, name: str, label: str) -> None:
        """Count one more of a kind."""
        with self.lock:
            self.labelled[name][label] += 1

    def pause(self, seconds: float) -> None:
        """Record a pause."""
        with self.lock:
            self.pauses_s.append(seconds)

    def summary(self) -> dict[str, Any]:
        """Return the figures as one JSON object."""
        with self.lock:
            pauses = {"count": len(self.pauses_s), "sum": sum(self.pauses_s), "max": max(self.pauses_s, default=0.0)}
            return {**self.counters, **{name: dict(sorted(kinds.items())) for name, kinds in self.labelled.items()}, "pause_seconds": pauses, **self.gauges}

    def collect(self) -> Iterator[Any]:
        """Yield the figures as prometheus-client's metric families."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        with self.lock:
            for name, value in self.gauges.items():
                yield GaugeMetricFamily(f"moesim_{name}", GAUGES[name], value)
            for name, value in self.counters.items():
                yield CounterMetricFamily(f"moesim_{name}", COUNTERS[name], value)
            for name, (label, text) in LABELLED.items():
                family = CounterMetricFamily(f"moesim_{name}", text, labels=[label])
                for kind, count in sorted(self.labelled[name].items()):
                    family.add_metric([kind], count)
                yield family
            below = Counter(bisect_left(PAUSE_BUCKETS_S, value) for value in self.pauses_s)
            buckets, total = [], 0
            for index, limit in enumerate((*PAUSE_BUCKETS_S, float("inf"))):
                total += below[index]
                buckets.append(("+Inf" if limit == float("inf") else f"{limit:g}", total))
            yield HistogramMetricFamily("moesim_pause_seconds", "serving stood still to install a plan", buckets=buckets, sum_value=sum(self.pauses_s))


class Endpoint:
    """An HTTP endpoint that shows figures to Prometheus."""

    def __init__(self, figures: Figures, host: str, port: int) -> None:
        """Listen on `host`:`port` (0: any free one). Raises InputError if prometheus-client is missing or the port is taken."""
        if importlib.util.find_spec("prometheus_client") is None:
            raise InputError("watch: --metrics-port needs prometheus-client; install moesim[metrics]")
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(figures)
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as cause:
            rule = f"cannot be bound on {host} ({cause.strerror or cause})"
            raise InputError(describe("watch", "--metrics-port", port, rule, "give another one, or 0 for any")) from None
        self.host, self.port = host, int(self._server.server_port)

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
