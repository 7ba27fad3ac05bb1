"""What holds of any served requests, whatever the numbers: better hardware is never slower, more work never faster, nothing beats the roofline.

On a device without measured tables, whose times are closed forms: kernels that were measured may well be faster at 129 rows than at 128.
"""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.api.serving import serve
from moesim.hardware import Cluster, load_cluster
from moesim.model import load_model, sizes

MODEL = load_model("olmoe-1b-7b")
FEW = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
WATTS = {"idle": 80.0, "compute": 320.0, "memory": 250.0, "communication": 150.0}


def device(folder: Path, *, bandwidth: float = 1.0, flops: float = 1.0, link: float = 1.0, devices: int = 1) -> Cluster:
    """Return L40S cards, some of whose rates are multiplied."""
    peaks = ", ".join(f"{name}: {rate * flops} TFLOP/s" for name, rate in (("float32", 91.6), ("bfloat16", 362.05), ("float16", 362.05), ("fp8", 733)))
    path = folder / "card.yaml"
    path.write_text(
        f"extends: l40s\nformat: moesim.hardware/1\nname: card\ndevices_per_node: {devices}\n"
        f"device:\n  peak_flops: {{{peaks}}}\n  datasheet: {{{peaks}}}\n  power: {{{', '.join(f'{name}: {watts} W' for name, watts in WATTS.items())}}}\n"
        f"tiers:\n  hbm: {{bandwidth: {864 * bandwidth} GB/s, datasheet: {864 * bandwidth} GB/s}}\n"
        f"links:\n  scale_up: {{bandwidth: {25 * link} GB/s, datasheet: {32 * link} GB/s}}\n"
    )
    return load_cluster(str(path))


def served(requests: str, cluster: Cluster, **more: str) -> dict[str, Any]:
    """Return the report of a run, all of whose numbers are finite and none negative."""
    limits = {"serving.max_num_batched_tokens": "1024", "serving.max_num_seqs": "32", "serving.max_model_len": "4096"}
    report = serve(requests, trace="synthetic:balanced", model=MODEL, hardware=cluster, settings={**limits, **more}).report
    assert report["requests"]["finished"] > 0 and not report["requests"]["refused"]

    def check(value: object) -> None:
        for one in value.values() if isinstance(value, dict) else [value]:
            if isinstance(one, dict):
                check(one)
            elif isinstance(one, float):
                assert isfinite(one) and one >= 0.0

    check({key: value for key, value in report.items() if key != "settings"})
    return report


def mean(report: dict[str, Any], name: str) -> float:
    return float(report["requests"][f"{name}_ms"]["mean"])


def alone(prompt: int, cluster: Cluster) -> float:
    """Return the time to the first token (s) of a request that meets nobody."""
    return mean(served(f"synthetic:fixed:1,prompt={prompt},output=1,n=1", cluster), "ttft") / 1e3


@FEW
@given(prompts=st.lists(st.integers(1, 4000), min_size=2, max_size=2, unique=True))
def test_a_longer_prompt_never_has_an_earlier_first_token_and_none_beats_the_roofline(tmp_path: Path, prompts: list[int]) -> None:
    cluster = device(tmp_path)
    short, long = (alone(prompt, cluster) for prompt in sorted(prompts))
    assert short <= long * (1 + 1e-9)
    counts, peak = sizes.parameters(MODEL), cluster.device.peak_flops["bfloat16"]
    # The head runs on the last token only.
    work = 2.0 * (counts.active - counts.embedding) * max(prompts)
    assert long >= work / peak and short >= sizes.attention_weight_bytes(MODEL) * MODEL.num_layers / cluster.memory.read_Bps


@FEW
@given(factor=st.floats(1.0, 8.0), what=st.sampled_from(["bandwidth", "flops", "link"]), clients=st.integers(1, 24))
def test_a_better_machine_is_never_slower(tmp_path: Path, factor: float, what: str, clients: int) -> None:
    requests = f"synthetic:closed:{clients},prompt=300,output=20,n={clients * 2}"
    plain, better = served(requests, device(tmp_path, devices=2)), served(requests, device(tmp_path, devices=2, **{what: factor}))
    assert better["simulated_s"] <= plain["simulated_s"] * (1 + 1e-9)
    if what == "bandwidth" and factor > 1.5:
        assert mean(better, "tpot") < mean(plain, "tpot"), "decoding waits for weights"


def test_more_clients_never_lower_the_throughput(tmp_path: Path) -> None:
    cluster = device(tmp_path)
    rates = [served(f"synthetic:closed:{clients},prompt=200,output=30,n=64", cluster)["output_tokens_per_s"] for clients in (1, 2, 4, 8, 16, 32)]
    assert rates == sorted(rates) and rates[-1] > 3 * rates[0]


def test_more_devices_never_lower_the_throughput(tmp_path: Path) -> None:
    """Each attention replica gets its share of the clients, and every device fewer experts."""
    requests = "synthetic:closed:32,prompt=200,output=30,n=64"
    rates = [served(requests, device(tmp_path, devices=devices))["output_tokens_per_s"] for devices in (1, 2, 4, 8)]
    assert rates == sorted(rates)


@FEW
@given(rate=st.floats(0.5, 200.0))
def test_energy_is_at_least_idle_and_at_most_all_lanes_busy(tmp_path: Path, rate: float) -> None:
    report = served(f"synthetic:poisson:{rate:.3f},prompt=200,output=10,n=20", device(tmp_path, devices=2))
    joules, seconds = report["energy"]["joules"], 2 * report["simulated_s"]
    assert WATTS["idle"] * seconds < joules <= (WATTS["compute"] + WATTS["communication"]) * seconds


def test_an_idle_machine_waits(tmp_path: Path) -> None:
    """Requests a thousand seconds apart: each meets nobody, and nearly all energy is idle."""
    cluster = device(tmp_path)
    report = served("synthetic:fixed:0.001,prompt=300,output=5,n=3", cluster)
    assert mean(report, "ttft") == pytest.approx(1e3 * alone(300, cluster), rel=1e-6)
    assert report["energy"]["joules"] == pytest.approx(WATTS["idle"] * report["simulated_s"], rel=1e-3)
