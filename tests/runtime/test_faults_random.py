"""Ranks are killed at random times while plans are installed under traffic: the survivors always agree on one map and give the same answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import Plan, linear
from moesim.runtime import client
from moesim.runtime.recovery import shrunk
from tests.runtime.grid import CAPACITY, RANKS, Bench, note
from tests.runtime.live import EXPERTS, LAYERS, Result

pytestmark = pytest.mark.dist
LEAST = 2
"""Ranks that have room for all experts."""


def plan_of(ranks: int, seed: int) -> Plan:
    return linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=ranks, kind="random", seed=seed)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    started = Bench(tmp_path_factory.mktemp("kills"))
    yield started
    started.close()


class Kills:
    """One deployment after the other, from which ranks are killed until two are left."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.generator = bench, np.random.Generator(np.random.PCG64(seed))
        self.seats: list[int] = []
        self.plan = plan_of(RANKS, 0)
        self.typical_s = 1.0

    def once(self, number: int) -> str:
        """Kill a rank at a random time of an apply; check what is left; return whose map it is."""
        bench = self.bench
        if len(self.seats) <= LEAST:
            bench.close()
            bench.number += 1
            self.plan, self.seats = plan_of(RANKS, 1000 + bench.number), list(range(RANKS))
            bench.live = bench.start(self.plan)
        live = bench.live
        assert live is not None
        new = plan_of(len(self.seats), number)
        victim, delay = int(self.generator.integers(len(self.seats))), float(self.generator.random()) * self.typical_s
        pid = client.status(live.control)["pids"][victim]
        result: list[Result] = []
        thread = threading.Thread(target=lambda: result.append(live.apply(new)))
        begin = time.monotonic()
        thread.start()
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        thread.join(30)
        assert result, "the apply did not end"
        left = [place for place in range(len(self.seats)) if place != victim]
        wanted = {"old": shrunk(self.plan, left, CAPACITY), "new": shrunk(new, left, CAPACITY)}
        seats = [self.seats[place] for place in left]
        sides = bench.check(live, wanted, seats)
        if result[0].returncode == 0:
            self.typical_s = 0.5 * self.typical_s + 0.5 * (time.monotonic() - begin)
            assert "new" in sides
        side = min(sides)
        self.plan, self.seats = wanted[side], seats
        note("kill", number=number, delay_s=round(delay, 3), ranks=len(seats), outcome=side, exit_code=result[0].returncode)
        return side


def kill(bench: Bench, seed: int, count: int) -> None:
    kills = Kills(bench, seed)
    try:
        for number in range(count):
            kills.once(number)
    except BaseException as error:
        note("kill", failed=f"{type(error).__name__}: {error}"[:300])
        print(bench.abandon())
        raise
    bench.close()


def test_20_random_kills_leave_no_inconsistent_map(bench: Bench) -> None:
    kill(bench, 1, 20)


@pytest.mark.slow
def test_200_random_kills_leave_no_inconsistent_map(bench: Bench) -> None:
    kill(bench, 2, 200)


def test_experts_of_a_dead_rank_come_from_the_checkpoint_and_the_answers_stay(bench: Bench, tmp_path: Path) -> None:
    from tests.runtime.live import Forked

    plan = plan_of(RANKS, 5)  # the seed of the second one is another, so that only the checkpoint can be the source
    first = Forked(tmp_path / "first", plan=plan)
    try:
        client.save_checkpoint(first.control, str(tmp_path / "saved"))
    finally:
        first.close()
    live = Forked(tmp_path / "second", plan=plan, model_seed=9, checkpoint=tmp_path / "saved", on_death="shrink", journal=tmp_path / "journal")
    try:
        while not all(rank["waves"] for rank in client.metrics(live.control)["rank_metrics"]):
            time.sleep(0.02)
        answers = {seat: rank["wave_digests"] for seat, rank in enumerate(client.metrics(live.control)["rank_metrics"])}
        os.kill(live.pids[1], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while not (status := client.status(live.control))["lost"] or status["state"] != "serving":
            assert time.monotonic() < deadline, status
            time.sleep(0.02)
        ranks = client.metrics(live.control)["rank_metrics"]
        while min(rank["waves"] for rank in ranks) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
            ranks = client.metrics(live.control)["rank_metrics"]
        for seat, rank in zip([0, 2, 3], ranks, strict=True):
            assert len({digest for _, digest in [*answers[seat], *rank["wave_digests"]]}) == 1
    finally:
        assert live.close() == 0
    assert "was killed by SIGKILL; 3 ranks serve on" in live.stderr_text
