"""Queues on one port of the Engine against Pollaczek-Khinchine, Lindley's recursion and processor sharing."""

from __future__ import annotations

from collections.abc import Generator
from heapq import heappop, heappush
from typing import Any

import numpy as np
import pytest

from moesim.sim.engine import Engine
from moesim.sim.flows import Flow

CUSTOMERS = 2500
PORT = ("host.in", 0)


def sojourns(discipline: str, arrival_C: np.ndarray, service_C: np.ndarray, priority_C: np.ndarray | None = None) -> np.ndarray:
    """Return how long every customer is there: a Flow of service_C[i] seconds on a port of rate 1."""
    engine = Engine(1)
    priority = np.zeros(len(arrival_C), dtype=int) if priority_C is None else priority_C
    flows = [Flow(str(i), float(work), {PORT: 1.0}, discipline, int(priority[i])) for i, work in enumerate(service_C)]

    def arrivals() -> Generator[Any, Any, None]:
        for time, flow in zip(arrival_C, flows, strict=True):
            yield engine.env.timeout(time - engine.now)
            engine.start_flow(flow)

    engine.env.process(arrivals())
    engine.env.run()
    return np.array([flow.end_s for flow in flows]) - arrival_C


def customers(kind: str, load: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.Generator(np.random.PCG64(seed))
    arrival = np.cumsum(rng.exponential(1 / load, CUSTOMERS))
    return arrival, np.ones(CUSTOMERS) if kind == "D" else rng.exponential(1.0, CUSTOMERS)


@pytest.mark.parametrize(("kind", "load", "wait"), [("D", 0.5, 0.5), ("M", 0.5, 1.0), ("D", 0.3, 3 / 14)])
def test_mean_wait_of_a_fifo_port_is_that_of_pollaczek_and_khinchine(kind: str, load: float, wait: float) -> None:
    """M/D/1: ρ / 2(1 - ρ); M/M/1: ρ / (1 - ρ), in service times. Each single wait is Lindley's."""
    arrival, service = customers(kind, load, 11)
    waits = sojourns("fifo", arrival, service) - service
    assert waits.mean() == pytest.approx(wait, rel=0.2)
    expected, free = [], 0.0
    for time, work in zip(arrival, service, strict=True):
        begin = max(free, time)
        expected.append(begin - time)
        free = begin + work
    assert waits == pytest.approx(np.array(expected), abs=1e-8)


@pytest.mark.parametrize("kind", ["D", "M"])
def test_mean_time_on_a_shared_port_does_not_depend_on_the_sizes(kind: str) -> None:
    """Processor sharing: 1 / (1 - ρ) whatever the distribution of the service."""
    arrival, service = customers(kind, 0.5, 7)
    assert sojourns("fair", arrival, service).mean() == pytest.approx(2.0, rel=0.2)


def test_urgent_customers_wait_only_for_the_one_in_service() -> None:
    """Two classes without interruption: each single wait is that of a heap of customers; on average (Cobham) W1 = ρ / 2(1 - ρ1), ρ as drawn."""
    arrival, service = customers("D", 0.6, 3)
    urgent = np.random.Generator(np.random.PCG64(4)).random(CUSTOMERS) < 0.5
    waits = sojourns("fifo", arrival, service, np.where(urgent, 0, 1)) - service
    queue: list[tuple[bool, int]] = []
    expected, free, following = np.zeros(CUSTOMERS), 0.0, 0
    while following < CUSTOMERS or queue:
        free = max(free, arrival[following]) if not queue else free
        while following < CUSTOMERS and arrival[following] <= free:
            heappush(queue, (not urgent[following], following))
            following += 1
        _, customer = heappop(queue)
        expected[customer] = free - arrival[customer]
        free += service[customer]
    assert waits == pytest.approx(expected, abs=1e-8)
    load = CUSTOMERS / arrival[-1]
    first = 1 - load * urgent.mean()
    assert waits[urgent].mean() == pytest.approx(load / 2 / first, rel=0.2)
