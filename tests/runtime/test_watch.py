"""A watch decides as a replay does, carries its plans out, and lets no failure pass unseen."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.api.watching import LIVE, watch
from moesim.errors import ApplyError, InputError, PlanError
from moesim.plan import Plan, linear
from moesim.runtime.control import ControlServer, StaleBase
from moesim.runtime.metrics import PAUSE_BUCKETS_S, Endpoint, Figures
from moesim.runtime.moves import placement_sha256
from moesim.runtime.watch import DeploymentGone, Limits, Prices, Watch
from moesim.sim.balancer import Price
from tests.runtime.live import moesim

RANKS, EXPERTS, LAYERS = 4, 16, (0, 1)
QUICK = Limits(answer_s=2.0, apply_s=0.5, stall_s=0.3, give_up_s=5.0, rest_s=0.05, longest_rest_s=0.2)
BRISK = replace(LIVE, window=8, every=4, min_interval=8, horizon=0)


class Deployment:
    """Answers as a coordinator does, from a script: 4 steps a question, loads skewed to the first experts."""

    def __init__(self) -> None:
        self.plan = linear(model="m", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=RANKS)
        self.step, self.pace, self.epoch, self.failure = 8, 4, 0, ""
        self.load_E = np.r_[np.full(4, 40), np.full(EXPERTS - 4, 10)]
        self.applies: list[dict[str, Any]] = []
        self.fate: Callable[[], str] = lambda: "installed"
        self.server = ControlServer("127.0.0.1", 0, self.handle)
        self.server.start()
        self.address = f"127.0.0.1:{self.server.port}"

    def handle(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        return dict(getattr(self, request["op"])(request))

    def status(self, request: dict[str, Any]) -> dict[str, Any]:
        self.step += self.pace
        ranks = [{"step": self.step, "epoch": self.epoch}] * RANKS
        return {"state": "failed" if self.failure else "serving", "reason": self.failure or None, "rank_status": [] if self.failure else ranks}

    def counts(self, request: dict[str, Any]) -> dict[str, Any]:
        rows = np.tile(self.load_E * (request["last"] - request["first"]), (len(LAYERS), 1))
        load_LR = self.plan.rank_load_LR(rows)
        known = {} if request["known"] == placement_sha256(self.plan) else {"plan": self.plan.stamped()}
        return {
            "first": request["first"], "last": request["last"], "rows_LE": rows.tolist(), "balance": float(load_LR.mean(1).sum() / load_LR.max(1).sum()),
            "compute_s": 1e-5 * rows.sum(), "step_ms": 0.1, "exchanged_bytes": 1000 * self.step, "exchanged_s": 0.25 * self.step, "steps": self.step,
            "expert_bytes": 1000, "placement": placement_sha256(self.plan), **known,
        }  # fmt: skip

    def apply(self, request: dict[str, Any]) -> dict[str, Any]:
        self.applies.append(request)
        plan, fate = Plan.from_content(request["plan"], "asked"), self.fate()
        if request["base"] != placement_sha256(self.plan):
            fate = "stale"
        if fate == "stale":
            raise StaleBase("another placement")
        if fate == "refused":
            raise PlanError("too many slots")
        if fate == "failed":
            raise ApplyError("rank 2 was killed during stage")
        if fate == "hangs":
            time.sleep(1.0)
        if fate == "rolled_back":
            return {"report": {"status": fate, "reason": "outputs differ", "epoch": self.epoch + 2, "pause_ms": 30.0}}
        self.plan, self.epoch = plan, self.epoch + 1
        report = {
            "status": "installed", "epoch": self.epoch, "pause_ms": 40.0, "pause_parts_ms": {"wait_ms": 10.0, "probe_ms": 20.0, "install_ms": 10.0},
            "moved": {"slots": 6, "bytes": 6000}, "balance": {"before": 0.5, "predicted": 0.9, "after": 0.9}, "outputs_equal": True,
        }  # fmt: skip
        return {"report": report}


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    started = Deployment()
    yield started
    started.server.close()


def watching(deployment: Deployment, **options: Any) -> tuple[Watch, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return watch(deployment.address, **{"settings": BRISK, "limits": QUICK, "log": events.append, **options}), events


def of_kind(events: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [one for one in events if one["event"] == event]


# --- decisions that become applies ------------------------------------------------------------------------------------


def test_skew_is_repaired_once_and_then_left_alone(deployment: Deployment) -> None:
    running, events = watching(deployment)
    summary = running.run(max_steps=60)
    assert summary["migrations"] == {"installed": 1} and summary["ended"] == "max_steps" and summary["watch_errors"] == {}
    decision = next(one for one in of_kind(events, "decision") if one["kind"] == "repair")
    assert decision["balance"] == pytest.approx(70 / 160) and decision["balance_after"] == pytest.approx(1.0) == summary["balance_ratio"]
    # The busiest rank had 160 choices a step and layer and gets 70, at 10 µs each.
    assert decision["gain_s"] == pytest.approx(2 * 90 * 1e-5)
    assert deployment.applies[0]["base"] == placement_sha256(linear(model="m", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=RANKS))
    assert summary["epoch"] == 1 and summary["migrated_bytes"] == 6000 and summary["pause_seconds"] == {"count": 1, "sum": 0.04, "max": 0.04}
    assert summary["decisions"]["quiet"] >= 5 and summary["decisions"]["repair"] == 1
    assert summary["all_to_all_bytes"] == 1000 * summary["steps"] > 0 and summary["all_to_all_seconds"] == 0.25 * summary["steps"]


def test_a_dry_run_says_what_it_would_do_and_does_nothing(deployment: Deployment) -> None:
    running, events = watching(deployment, dry_run=True)
    summary = running.run(max_decisions=1)
    assert deployment.applies == [] and summary["migrations"] == {} and summary["ended"] == "decided"
    assert of_kind(events, "decision")[-1]["kind"] == "repair"


def test_a_plan_that_does_not_pay_is_not_installed(deployment: Deployment) -> None:
    """It costs 0.1 s and saves 1.8 ms a step: it pays after 56 steps."""
    for horizon, result in ((55, {}), (57, {"installed": 1})):
        running, events = watching(deployment, settings=replace(BRISK, horizon=horizon))
        assert running.run(max_decisions=1)["migrations"] == result
        assert of_kind(events, "decision")[-1]["break_even_steps"] == 56


def test_what_an_apply_cost_is_what_the_next_is_taken_to_cost() -> None:
    prices = Prices()
    assert prices.price(1e9) == Price(fixed_s=0.1, slot_s=1.0)
    old = linear(model="m", num_experts=8, moe_layer_ids=(0,), num_ranks=2)
    new = replace(old, slot_to_expert_LS=np.array([[4, 1, 2, 3, 0, 5, 6, 7]]))
    prices.learn({"pause_parts_ms": {"wait_ms": 1.0, "probe_ms": 2.0, "install_ms": 5.0}}, old, new)
    assert prices.price(1e9) == Price(fixed_s=0.003, slot_s=0.005)


def test_a_plan_that_others_install_is_the_base_of_the_next(deployment: Deployment) -> None:
    running, events = watching(deployment, settings=replace(BRISK, balancer="never"))
    running.run(max_steps=8)
    deployment.plan = linear(model="m", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=RANKS, kind="random", seed=3)
    running.run(max_steps=24)
    assert [one["by"] for one in of_kind(events, "plan")] == ["start", "others"]


def test_a_restarted_deployment_is_watched_anew(deployment: Deployment) -> None:
    running, events = watching(deployment, settings=replace(BRISK, balancer="never"))
    running.run(max_steps=40)
    deployment.step, deployment.epoch = 0, 0
    summary = running.run(duration_s=0.3)
    assert len(of_kind(events, "restarted")) == 1 and summary["watch_errors"] == {}
    assert of_kind(events, "decision")[-1]["step"] < 200 and summary["all_to_all_bytes"] < 1000 * (60 + deployment.step)


# --- failures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fate", "result"), [(name, name) for name in ("stale", "refused", "failed", "rolled_back")] + [("hangs", "unanswered")])
def test_a_failed_apply_is_counted_and_the_watch_goes_on(deployment: Deployment, fate: str, result: str) -> None:
    fates = iter([fate])
    deployment.fate = lambda: next(fates, "installed")
    running, events = watching(deployment, limits=replace(QUICK, rest_s=0.7, longest_rest_s=0.7))
    summary = running.run(duration_s=1.8)
    assert summary["migrations"][result] == 1 and summary["watch_errors"]["apply"] == 1
    assert summary["decisions"]["held"] >= 1, "after a failure it rests before it plans again"
    assert of_kind(events, "apply")[0]["reason"] and of_kind(events, "apply")[0]["wall_s"] < 1.0
    # What hung has been installed in the end, and is not installed a second time.
    assert summary["migrations"].get("installed", 0) == (0 if fate == "hangs" else 1) and summary["balance_ratio"] == pytest.approx(1.0)


def test_serving_that_stands_still_is_an_error_until_it_goes_on(deployment: Deployment) -> None:
    running, events = watching(deployment)
    running.run(max_steps=20)
    deployment.pace = 0
    stalled = running.run(duration_s=1.0)
    assert stalled["watch_errors"]["serving"] >= 1 and stalled["up"] == 0
    assert "stood still" in of_kind(events, "error")[0]["reason"]
    deployment.pace = 4
    assert running.run(duration_s=0.5)["up"] == 1


def test_a_failed_deployment_ends_the_watch_with_its_reason(deployment: Deployment) -> None:
    running, _ = watching(deployment, limits=replace(QUICK, give_up_s=0.3))
    running.run(max_steps=12)
    deployment.failure = "rank 1 was killed by SIGKILL"
    began = time.monotonic()
    with pytest.raises(DeploymentGone, match="rank 1 was killed by SIGKILL; gave up after 0.3 s") as gone:
        running.run()
    assert gone.value.exit_code == 3 and time.monotonic() - began < 2.0
    assert running.figures.labelled["watch_errors"]["serving"] >= 2 and running.figures.gauges["up"] == 0


def test_nobody_there_is_an_error_and_then_the_end(deployment: Deployment) -> None:
    deployment.server.close()
    result = moesim("watch", deployment.address, "--give-up", "0.2", "--json")
    assert result.returncode == 3 and "gave up after 0.2 s" in result.stderr and result.stdout == ""


def test_a_planner_that_fails_is_no_failure_of_the_deployment(deployment: Deployment) -> None:
    from moesim.sim.change_replay import balancer_of

    def fails(load_KLE: np.ndarray, plan: Plan, budget: int | None) -> Plan:
        raise PlanError("no idea")

    running = Watch(deployment.address, balancer_of(BRISK, fails), limits=QUICK)
    summary = running.run(duration_s=0.5)
    assert summary["watch_errors"]["plan"] >= 1 and summary["up"] == 1 and deployment.applies == []


def test_stop_ends_a_watch_at_once(deployment: Deployment) -> None:
    running, _ = watching(deployment)
    threading.Timer(0.2, running.stop).start()
    began = time.monotonic()
    assert running.run()["ended"] == "stopped" and time.monotonic() - began < 1.5


# --- figures ----------------------------------------------------------------------------------------------------------


def scrape(port: int) -> dict[str, float]:
    """Return every sample of the endpoint by its name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_the_endpoint_shows_what_was_counted() -> None:
    pytest.importorskip("prometheus_client", reason="the endpoint needs prometheus-client")
    figures = Figures()
    figures.set(balance_ratio=0.75, epoch=2)
    figures.follow("all_to_all_bytes", 100.0)
    figures.follow("all_to_all_bytes", 350.0)
    figures.follow("all_to_all_bytes", 50.0)  # the deployment has been restarted
    figures.count("migrations", "installed")
    figures.count("decisions", "no_gain")
    figures.count("watch_errors", "apply")
    for seconds in (0.004, 0.005, 0.3, 99.0):
        figures.pause(seconds)
    endpoint = Endpoint(figures, "127.0.0.1", 0)
    try:
        seen = scrape(endpoint.port)
        with pytest.raises(InputError, match="--metrics-port"):
            Endpoint(figures, "127.0.0.1", endpoint.port)
    finally:
        endpoint.close()
    assert seen["moesim_balance_ratio"] == 0.75 and seen["moesim_epoch"] == 2 and seen["moesim_up"] == 0
    assert seen["moesim_all_to_all_bytes_total"] == 300 and seen["moesim_all_to_all_seconds_total"] == 0
    assert seen['moesim_migrations_total{result="installed"}'] == seen['moesim_decisions_total{decision="no_gain"}'] == 1
    assert seen['moesim_watch_errors_total{phase="apply"}'] == 1 and seen["moesim_migrated_bytes_total"] == 0
    assert seen["moesim_pause_seconds_sum"] == pytest.approx(99.309) and seen["moesim_pause_seconds_count"] == 4
    below = [seen[f'moesim_pause_seconds_bucket{{le="{limit:g}"}}'] for limit in PAUSE_BUCKETS_S]
    assert below[:3] == [0, 2, 2] and below[-1] == 3 and below == sorted(below) and seen['moesim_pause_seconds_bucket{le="+Inf"}'] == 4


# --- the command line -------------------------------------------------------------------------------------------------


def test_once_decides_once_and_tells_people(deployment: Deployment, tmp_path: Path) -> None:
    flags = ("--window", "8", "--every", "4", "--once", "--log", str(tmp_path / "log"))
    dry = moesim("watch", deployment.address, *flags, "--dry-run")
    assert dry.returncode == 0 and "would install it" in dry.stderr and deployment.applies == []
    real = moesim("watch", deployment.address, *flags, "--json")
    assert real.returncode == 0, real.stderr
    summary = json.loads(real.stdout)
    assert summary["schema"] == "moesim.watch/1" and summary["migrations"] == {"installed": 1}
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["plan", "decision"] * 2 + ["apply"]
    assert np.array(lines[1]["load_LE"]).shape == (2, 16)
    deployment.plan, deployment.fate = linear(model="m", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=RANKS), lambda: "refused"
    refused = moesim("watch", deployment.address, *flags)
    assert refused.returncode == 1 and "too many slots" in refused.stderr and "1 refused" in refused.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--window", "0"), "change.window = 0 must be >= 1"),
        (("--every", "0"), "change.every = 0 must be >= 1"),
        (("--budget", "much"), "must be bytes or seconds"),
        (("--budget", "0 B"), "must be > 0"),
        (("--hysteresis", "1"), r"must be in [0, 1)"),
        (("--policy", "sometimes"), "sometimes"),
        (("--log", "/nowhere/at/all"), "cannot be opened"),
    ],
)
def test_bad_options_are_refused_before_anybody_is_asked(flags: tuple[str, ...], message: str) -> None:
    result = moesim("watch", "127.0.0.1:9", *flags)
    assert result.returncode == 2 and message in result.stderr
    assert moesim("watch", "nowhere").returncode == 2
