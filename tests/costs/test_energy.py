"""Energy and cost: hand-computed values, only where declared, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moesim import api
from moesim.costs.energy import cost, energy
from moesim.errors import HardwareError
from moesim.hardware import load_cluster
from moesim.hardware.cluster import Cluster

STATES = {"compute": 700.0, "memory": 500.0, "communication": 300.0}


def machine(idle: float | None = 100.0, states: dict[str, float] | None = STATES, price: float | None = 3.6) -> Cluster:
    cluster = load_cluster("h100-sxm-8")
    return dataclasses.replace(cluster, device=dataclasses.replace(cluster.device, power_idle_w=idle, power_state_w=states), price_per_hour=price)


def document(folder: Path, power: str, more: str = "") -> Path:
    path = folder / "priced.yaml"
    path.write_text(f"extends: h100-sxm-8\nname: priced\ndevice:\n  power: {power}\n{more}")
    return path


def test_energy_is_idle_power_and_what_every_state_adds() -> None:
    # 8 devices × 2 s × 100 W = 1600 J; 3 s × 600 W + 1 s × 400 W + 5 s × 200 W = 3200 J
    found = energy(machine(), simulated_s=2.0, state_s={"compute": 3.0, "memory": 1.0, "communication": 5.0}, tokens=1000)
    assert found == pytest.approx({"joules": 4800.0, "joules_per_token": 4.8})


def test_cost_is_the_price_of_all_devices_for_the_time() -> None:
    # 8 devices × 3.6 $/h = 0.008 $/s; 5 s for 2000 tokens: 0.04 $ / 2000 · 1e6 = 20 $
    assert cost(machine(), simulated_s=5.0, tokens=2000) == pytest.approx({"per_million_tokens": 20.0})


def test_a_served_workload_tells_output_apart() -> None:
    report = api.serve("synthetic:poisson:40,prompt=128,output=32,n=20", trace="synthetic:balanced", model="flame-moe-290m", hardware=machine()).report
    dollars = 0.008 * report["simulated_s"]
    output = report["output_tokens_per_s"] * report["simulated_s"]
    assert report["cost"]["per_million_output_tokens"] == pytest.approx(dollars / output * 1e6)
    assert report["cost"]["per_million_tokens"] == pytest.approx(dollars / report["tokens"] * 1e6)
    assert report["tokens"] > output


SERVED = "synthetic:poisson:40,prompt=128,output=32,n=20"


def served(workload: str = SERVED, cluster: Cluster | None = None, **settings: str) -> dict[str, Any]:
    words = {name.replace("__", "."): value for name, value in settings.items()}
    return api.serve(workload, trace="synthetic:balanced", model="flame-moe-290m", hardware=cluster or machine(), settings=words).report


def test_serving_counts_the_states_of_its_steps() -> None:
    """Joules are linear in the watts: one state's at a time give the seconds in it, over all devices."""
    seconds = {}
    for state in STATES:
        report = served(cluster=machine(idle=0.0, states={**dict.fromkeys(STATES, 0.0), state: 1.0}))
        seconds[state] = report["energy"]["joules"]
    report = served()
    idle = 100.0 * 8 * report["simulated_s"]
    assert report["energy"]["joules"] == pytest.approx(idle + sum((STATES[state] - 100.0) * taken for state, taken in seconds.items()))
    assert report["energy"]["joules_per_token"] == pytest.approx(report["energy"]["joules"] / report["tokens"])
    assert all(taken > 0 for taken in seconds.values())
    # Devices that step do one of the three; a step is nothing else without pipeline stages and host time.
    steps = report["utilisation"] * report["simulated_s"] * 8
    assert sum(seconds.values()) == pytest.approx(steps, rel=1e-9)
    slower = served(cluster=machine(idle=0.0, states=dict.fromkeys(STATES, 1.0)), host_overhead_us="500")
    assert slower["energy"]["joules"] == pytest.approx(8 * slower["simulated_s"] * slower["utilisation"] - 8 * 500e-6 * slower["steps"], rel=1e-6)


def test_one_request_alone_computes_its_prompt_and_waits_for_memory_in_between() -> None:
    # One prompt step, then 31 that decode: the states are the two kinds of steps.
    one = "synthetic:poisson:1,prompt=128,output=32,n=1"
    parts = [served(one, machine(idle=0.0, states={**dict.fromkeys(STATES, 0.0), state: 1.0}))["energy"]["joules"] for state in ("compute", "memory")]
    requests = served(one)["requests"]
    ttft, whole = requests["ttft_ms"]["mean"] * 1e-3, requests["latency_ms"]["mean"] * 1e-3
    assert 0 < parts[0] <= 8 * ttft and 0.5 * 8 * (whole - ttft) < parts[1] <= 8 * (whole - ttft)


def test_nothing_is_said_of_what_is_not_declared() -> None:
    assert energy(machine(idle=None), simulated_s=1.0, state_s={}, tokens=1) is None
    assert energy(machine(states=None), simulated_s=1.0, state_s={}, tokens=1) is None
    assert cost(machine(price=None), simulated_s=1.0, tokens=1) is None and cost(machine(), simulated_s=1.0, tokens=0) is None
    report = api.replay("flame-moe-290m", model="flame-moe-290m", hardware="h100-sxm-8").report
    assert "energy" not in report and "cost" not in report


def run(phase: str, cluster: Cluster) -> dict[str, Any]:
    return api.replay(f"synthetic:balanced,tokens=1024,steps=2,phase={phase}", model="flame-moe-290m", hardware=cluster).report


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_replay_counts_its_lanes_by_state(phase: str) -> None:
    report = run(phase, machine())
    parts = report["breakdown_ms"]
    exchange = parts["dispatch"] + parts["combine"]
    waiting = parts.get("straggler_wait", 0.0) + parts.get("idle", 0.0)
    computing = report["step_ms"]["mean"] - exchange - waiting
    watts = 600.0 if phase == "prefill" else 400.0
    joules = 8 * report["steps"] * 1e-3 * (100.0 * report["step_ms"]["mean"] + watts * computing + 200.0 * exchange)
    assert report["energy"]["joules"] == pytest.approx(joules, rel=1e-9)
    assert report["energy"]["joules_per_token"] == pytest.approx(joules / 2048)
    assert report["cost"]["per_million_tokens"] == pytest.approx(0.008 * report["simulated_s"] / 2048 * 1e6)


def test_a_machine_of_equal_states_draws_the_same_whatever_it_does() -> None:
    """Watts that are those of idling in every state: joules are watts times device-seconds."""
    report = run("prefill", machine(states=dict.fromkeys(STATES, 100.0)))
    assert report["energy"]["joules"] == pytest.approx(100.0 * 8 * report["simulated_s"])


def test_a_document_declares_power_and_price(tmp_path: Path) -> None:
    power = "{idle: 90 W, compute: 0.65 kW, memory: 450 W, communication: 250 W}"
    cluster = load_cluster(document(tmp_path, power, "price_per_hour: 2.5 $/h\n"))
    assert cluster.device.power_idle_w == 90 and cluster.device.power_state_w == {"compute": 650, "memory": 450, "communication": 250}
    assert cluster.price_per_hour == 2.5
    assert load_cluster("h100-sxm-8").device.power_state_w is None


@pytest.mark.parametrize(
    ("power", "says"),
    [
        ("{idle: 90 W, compute: 650 W, memory: 450 W}", "lacks communication"),
        ("{compute: 650 W, memory: 450 W, communication: 250 W}", "lacks idle"),
        ("{idle: 300 W, compute: 650 W, memory: 450 W, communication: 250 W}", "communication = 250 W below idle"),
        ("{idle: 90 W, compute: 650, memory: 450 W, communication: 250 W}", "device.power.compute"),
        ("{idle: 90 W, computing: 650 W}", "did you mean 'compute'"),
    ],
)
def test_power_states_are_declared_whole(tmp_path: Path, power: str, says: str) -> None:
    with pytest.raises(HardwareError, match=r"priced\.yaml") as caught:
        load_cluster(document(tmp_path, power))
    assert says in str(caught.value)


def test_states_that_are_not_declared_do_not_change_a_fingerprint(tmp_path: Path) -> None:
    plain, same = load_cluster(document(tmp_path, "{peak: 700 W}")), load_cluster(document(tmp_path, "{peak: 700 W, compute: null}"))
    other = load_cluster(document(tmp_path, "{idle: 90 W, compute: 650 W, memory: 450 W, communication: 250 W}"))
    assert plain.sha256 == same.sha256 != other.sha256
