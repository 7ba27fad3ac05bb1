"""The library: every device loads, states its sources, and agrees with published specifications."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from moesim.hardware import library_names, load_cluster

# Specifications per device (aiconfigurator-core 0.12.0 and data sheets): memory B/s, bytes, bf16 FLOP/s, one direction to the next GPU of the node, W.
SPECIFICATIONS = {
    "a100-sxm": (2.039e12, 85899345920, 312e12, 300e9, 400),
    "a800-sxm": (2.039e12, 85899345920, 312e12, 200e9, 400),
    "h100-sxm": (3.35e12, 85899345920, 989e12, 450e9, 700),
    "h200-sxm": (4.8e12, 151397597184, 989e12, 450e9, 700),
    "h800-sxm": (3.35e12, 85899345920, 989e12, 200e9, 700),
    "l40s": (864e9, 48305799168, 362.05e12, 25e9, 350),
    "rtx-4090": (1.008e12, 24 * 2**30, 165.2e12, 25e9, 450),
    "rtx-pro-6000": (1.792e12, 102641958912, 467.8e12, 55e9, 600),
}


@pytest.mark.parametrize("name", SPECIFICATIONS)
def test_devices_agree_with_their_specifications(name: str) -> None:
    one = load_cluster(f"{name}-8")
    bandwidth, capacity, flops, scale_up, power = SPECIFICATIONS[name]
    figures = (one.memory.read_Bps, one.device.peak_flops["bfloat16"], one.links["scale_up"].bandwidth_Bps)
    assert figures == pytest.approx((bandwidth, flops, scale_up), rel=1e-12)
    assert one.memory.capacity_bytes == pytest.approx(capacity, rel=1e-4) and one.device.power_peak_w == power and one.device.kind == "gpu"


def test_the_library_holds_exactly_these_devices() -> None:
    assert set(library_names()) == {*SPECIFICATIONS, "laptop"}
    laptop = load_cluster("laptop-1")
    assert laptop.device.kind == "cpu" and "hbm" not in laptop.tiers and {"dram", "nvme"} <= set(laptop.tiers) and laptop.memory.name == "dram"


@pytest.mark.parametrize("name", [name for name in SPECIFICATIONS if name.endswith("-sxm")])
def test_sxm_nodes_have_one_400_gigabit_nic_per_gpu(name: str) -> None:
    link = load_cluster(f"{name}-8x4").links["scale_out"]
    assert link.bandwidth_Bps == 50e9 and link.shared_by == 1


@pytest.mark.parametrize("name", library_names())
def test_every_value_has_a_source_and_none_is_above_its_data_sheet(name: str) -> None:
    one = load_cluster(f"{name}-2x2")
    assert not one.warnings and one.device.source
    assert all(part.source for parts in (one.tiers, one.links) for part in parts.values())
    assert 0 < one.device.gemm_efficiency < 1 and 0 < one.device.memory_efficiency < 1


def test_measured_devices_and_donors() -> None:
    clusters = {name: load_cluster(f"{name}-1") for name in library_names()}
    assert [name for name, cluster in clusters.items() if cluster.tables] == ["a100-sxm", "a800-sxm", "h100-sxm", "h800-sxm", "rtx-pro-6000"]
    assert {name for name, cluster in clusters.items() if cluster.calibrated_from == "h100-sxm"} == {"a100-sxm", "a800-sxm", "h200-sxm", "h800-sxm"}


def test_loading_imports_nothing_heavy() -> None:
    code = "import sys; from moesim.hardware import load_cluster; load_cluster('h100-sxm-8x4'); print([m for m in sys.modules if m in (%s)])"
    heavy = "'pandas','numba','ortools','pulp','torch','networkx','pyarrow','scipy','simpy'"
    assert subprocess.run([sys.executable, "-c", code % heavy], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def command(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", "moesim", "hardware", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_commands_print_one_object_for_machines() -> None:
    code, out, _ = command("show", "h100-sxm-8x4", "--json")
    report = json.loads(out)
    assert code == 0 and report["schema"] == "moesim.hardware-show/1" and report["num_ranks"] == 32 and "nccl2.29.2" in report["tables"]
    code, out, _ = command("list", "--json")
    assert code == 0 and {device["name"] for device in json.loads(out)["devices"]} == set(library_names())
    code, out, _ = command("check", "h100-sxm-8", "--json")
    assert code == 0 and json.loads(out)["ok"] is True and json.loads(out)["tables"]["gemm_sglang0.5.14"] == 101010


def test_the_commands_print_tables_for_people_on_stderr() -> None:
    code, out, err = command("show", "rtx-4090-1")
    assert code == 0 and out == "" and "NVIDIA GeForce RTX 4090" in err and "25 GB/s" in err and "sha256" in err
    code, out, err = command("check", "h100-smx-8")
    assert code == 2 and out == "" and err.startswith("moesim: hardware 'h100-smx-8'") and "Traceback" not in err
