"""A watch beside four real processes whose traffic drifts: balance recovers, figures say so, and a replay of the same routing decides the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")
pytest.importorskip("prometheus_client", reason="the endpoint needs prometheus-client")

from moesim.api.changing import planner_on
from moesim.api.documents import cluster_of, model_of, trace_shape
from moesim.api.running import builder_of, passes_of
from moesim.api.watching import LIVE, watch
from moesim.costs.model import CostModel
from moesim.errors import ApplyError
from moesim.plan import Plan, linear
from moesim.runtime import client
from moesim.runtime.watch import DeploymentGone, Limits
from moesim.sim.balancer import KINDS
from moesim.sim.change_replay import run_change
from moesim.sim.settings import Settings
from moesim.traces.open import open_trace
from tests.runtime.live import EXPERTS, LAYERS, Live, write_config
from tests.runtime.test_watch import scrape

pytestmark = pytest.mark.dist
WATCHED = replace(LIVE, balancer="on_drift:0.9", window=32, every=8, min_interval=112, hysteresis=0.02, horizon=0, mode="pause", planner_s=0.0)
DRIFT_WAVES = 20
"""Of 8 steps: longer than `min_interval`."""


class Watched:
    """`moesim watch` as a subprocess beside a deployment."""

    def __init__(self, control: str, log: Path, *flags: str) -> None:
        said = log.with_suffix(".said")
        names = {"policy": "balancer", **{name: name for name in ("window", "every", "min_interval", "hysteresis", "horizon")}}
        told = [text for flag, name in names.items() for text in (f"--{flag.replace('_', '-')}", str(getattr(WATCHED, name)))]
        command = [sys.executable, "-m", "moesim", "watch", control, *told, "--metrics-port", "0", "--log", str(log), "--json", *flags]
        with said.open("w") as errors:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "MOESIM_TOKEN": ""})
        deadline = time.monotonic() + 30
        while "metrics: " not in (text := said.read_text()):
            assert self.process.poll() is None and time.monotonic() < deadline, text
            time.sleep(0.05)
        self.port = int(text.rpartition("/metrics")[0].rpartition(":")[2])
        self.said = said

    def kill(self) -> None:
        """End it whatever it does."""
        self.process.kill()
        self.process.communicate()

    def end(self, number: int | None = None) -> tuple[int, dict[str, Any]]:
        """Wait for the end, after a signal if one is given; return the exit code and the summary."""
        if number is not None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=30)
        return self.process.returncode, json.loads(output or "{}")


@dataclass(frozen=True)
class Session:
    """What a watched deployment left behind."""

    seen: list[dict[str, float]]
    """Scrapes, in order."""
    summary: dict[str, Any]
    events: list[dict[str, Any]]
    model: Path
    trace: Path
    answers_equal: bool
    refused: list[tuple[str, str]]
    """Kind and reason of refused requests."""
    death: tuple[str, dict[str, Any], float]
    """How a watch ends after a rank was killed: reason, figures, seconds."""

    def asked(self) -> list[tuple[int, str, str]]:
        """Return (passes, kind, map) of every decision for which the planner was asked."""
        return [(one["passes"], one["kind"], one["map_sha256"]) for one in self.events if one["event"] == "decision" and one["map_sha256"]]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    folder = tmp_path_factory.mktemp("watched")
    config = write_config(folder / "tiny")
    stream = ("--decode", "7", "--drift", str(DRIFT_WAVES), "--skew", "0", "--pace-ms", "10", "--window", "8")
    live = Live(config, *stream, "--trace-out", str(folder / "trace"))
    seen: list[dict[str, float]] = []
    watches: list[Watched] = []
    try:
        watches.append(watched := Watched(live.control, folder / "log"))
        deadline = time.monotonic() + 150
        while not (seen and seen[-1].get('moesim_migrations_total{result="installed"}', 0) >= 2):
            assert time.monotonic() < deadline, watched.said.read_text()
            time.sleep(0.1)
            seen.append(scrape(watched.port))
        code, summary = watched.end(signal.SIGTERM)
        assert code == 0, watched.said.read_text()
        client.publish_trace(live.control)
        refused = _refusals(live)
        left = _after_a_death(live)
    finally:
        for one in watches:
            one.kill()
        live.close()
    events = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    reports = [one for one in events if one["event"] == "apply"]
    yield Session(seen, summary, events, config, folder / "trace", all(report["outputs_equal"] for report in reports), refused, left)


def _refusals(live: Live) -> list[tuple[str, str]]:
    """Ask for what cannot be had."""
    plan = linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=4, kind="random", seed=1)
    refused = []
    for ask in (
        lambda: client.apply_plan(live.control, plan, base="0" * 64),
        lambda: client.counts(live.control, 0, 1 << 40),
        lambda: client.counts(live.control, 5, 5),
        lambda: client.counts(live.control, 0, "all"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ApplyError) as error:
            ask()
        refused.append((type(error.value).__name__, str(error.value)))
    return refused


def _after_a_death(live: Live) -> tuple[str, dict[str, Any], float]:
    """Kill a rank under a watch; return the reason with which it ends, its figures, and the seconds until then."""
    running = watch(live.control, settings=replace(WATCHED, balancer="never"), limits=Limits(give_up_s=0.5, rest_s=0.1))
    running.run(max_decisions=1)
    os.kill(live.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(DeploymentGone) as gone:
        running.run()
    return str(gone.value), running.figures.summary(), time.monotonic() - began


def test_balance_recovers_and_the_endpoint_shows_it(session: Session) -> None:
    installed = [one.get('moesim_migrations_total{result="installed"}', 0.0) for one in session.seen]
    balance = np.array([one.get("moesim_balance_ratio", np.nan) for one in session.seen])
    first = installed.index(1.0)
    assert np.nanmin(balance[: first + 1]) < 0.75 and np.nanmax(balance[first:]) > 0.9
    assert installed == sorted(installed) and session.seen[-1]["moesim_epoch"] >= 2 and session.answers_equal
    last = session.seen[-1]
    assert last["moesim_up"] == 1 and last["moesim_pause_seconds_count"] == installed[-1] and 0 < last["moesim_pause_seconds_sum"] < 10
    assert last["moesim_migrated_bytes_total"] > 0 and last["moesim_all_to_all_seconds_total"] > 0
    assert not any(name.startswith("moesim_watch_errors_total") for name in last), session.events


def test_the_ranks_count_every_byte_that_they_send(session: Session) -> None:
    """Closed form for what is not rows of tokens: the headers; and the rows cannot be more than if all of them left their rank."""
    steps, sent = session.seen[-1]["moesim_steps_total"], session.seen[-1]["moesim_all_to_all_bytes_total"]
    capacity, tokens = 2 * EXPERTS // 4, 4 * (16 + 7 * 1) / 8
    headers = steps * len(LAYERS) * 4 * 3 * 8 * (4 + capacity)
    rows = steps * len(LAYERS) * 4 * tokens * 4 * 2 * 64 * 4
    assert headers + 0.4 * rows < sent < headers + 1.05 * rows


def test_the_simulators_balancer_decides_the_same_on_the_recorded_routing(session: Session) -> None:
    """The same steps, the same kinds, the same plans."""
    first = next(one for one in session.events if one["event"] == "decision")
    origin = first["step"] - first["passes"]
    model, cluster = model_of(str(session.model)), cluster_of("laptop-4")
    trace = open_trace(str(session.trace), shape=trace_shape(model))
    passes = [item for item in passes_of(trace, 4, None, 0, as_recorded=True) if item.step >= origin]
    last = max(passes_seen for passes_seen, _, _ in session.asked())
    start = linear(model=model.name, num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=4)
    costs, settings = CostModel(cluster, model), Settings(change=WATCHED)

    def builder(plan: Plan) -> Any:
        return builder_of(cluster, model, plan, costs, settings)

    run = run_change(passes[: last + 1], plan=start, settings=WATCHED, builder_factory=builder, planner=planner_on(None))
    simulated = [(one["passes"], one["decided"], one["map_sha256"]) for one in run.events if one["kind"] == "decision"]
    assert simulated == session.asked() and len(simulated) >= 2
    # And what the live decision saw is what was routed.
    by_step = {item.step: item for item in passes}
    for event in session.events:
        if event["event"] == "decision" and event["map_sha256"]:
            counted = np.zeros((len(LAYERS), EXPERTS), np.int64)
            for step in range(event["first"], event["step"]):
                for part in by_step[step].parts:
                    for layer in range(len(LAYERS)):
                        counted[layer] += np.bincount(part.experts_TLK[:, layer].ravel(), minlength=EXPERTS)
            np.testing.assert_array_equal(counted, event["load_LE"])


def test_a_stale_plan_and_windows_that_nobody_served_are_refused(session: Session) -> None:
    (stale, why), *counts = session.refused
    assert stale == "StaleBase" and "plan again" in why
    assert [kind for kind, _ in counts] == ["ApplyError"] * 3
    assert [word in text for word, (_, text) in zip(("history", "first < last", "two step numbers"), counts, strict=True)] == [True] * 3


def test_a_dead_rank_ends_a_watch_in_time_with_its_reason_and_a_metric(session: Session) -> None:
    reason, figures, seconds = session.death
    assert "rank 1" in reason and "gave up after 0.5 s" in reason and seconds < 15
    assert figures["up"] == 0 and sum(figures["watch_errors"].values()) >= 1 and figures["migrations"] == {}


def test_both_sides_have_the_same_settings() -> None:
    from moesim.sim.balancer import Balancer

    shared = {field.name for field in fields(Balancer)} - {"planner", "policy", "planner_s"}
    assert shared <= {field.name for field in fields(WATCHED)} and set(KINDS) >= {"quiet", "repair"}
