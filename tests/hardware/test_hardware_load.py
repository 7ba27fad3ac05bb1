"""Hardware YAML: names for any counts, units per key, rules, `extends`, hostile files, data-sheet warnings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import HardwareError
from moesim.hardware import library_names, load_cluster
from moesim.hardware.schema import KNOWN_KEYS

VALID: dict[str, Any] = {
    "format": "moesim.hardware/1",
    "name": "toy",
    "device": {
        "name": "Toy",
        "kind": "gpu",
        "peak_flops": {"bfloat16": "100 TFLOP/s"},
        "datasheet": {"bfloat16": "100 TFLOP/s"},
        "num_sms": 10,
        "l2": "1 MiB",
        "gemm_efficiency": 0.5,
        "memory_efficiency": 1,
        "kernel_launch": "2.5 us",
        "power": {"idle": "10 W", "peak": "0.1 kW"},
    },
    "tiers": {
        "hbm": {"capacity": "80 GiB", "bandwidth": "1 TB/s", "datasheet": "1 TB/s", "latency": "500 ns"},
        "dram": {"capacity": "1 TB", "read": "100 GB/s", "write": "50 GB/s", "attached_to": "node", "shared": True, "link": "host"},
    },
    "links": {
        "scale_up": {"bandwidth": "400 Gb/s", "datasheet": "50 GB/s", "latency": "1 us", "efficiency": {"sizes": ["1 KiB", "1 MiB"], "shares": [0.1, 0.9]}},
        "scale_out": {"bandwidth": "100 Gb/s", "latency": "3 us", "shared_by": "node", "discipline": "serial"},
        "host": {"bandwidth": "32 GB/s", "latency": "10 us", "shared_by": 2, "duplex": False},
    },
    "devices_per_node": 4,
    "num_nodes": 2,
    "fabric_oversubscription": 2,
    "price_per_hour": "2.5 $/h",
}


def edit(path: str, value: Any) -> dict[str, Any]:
    """Return the valid document with one key changed; the value `...` removes it."""
    node = copy.deepcopy(VALID)
    *parents, last = path.split(".")
    target = node
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return node


def save(folder: Path, node: Any, name: str = "toy.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(node if isinstance(node, str) else yaml.safe_dump(node))
    return path


def message(path: Path | str) -> str:
    with pytest.raises(HardwareError) as caught:
        load_cluster(path)
    return str(caught.value)


def test_every_quantity_arrives_in_si_units(tmp_path: Path) -> None:
    one = load_cluster(save(tmp_path, VALID))
    assert one.device.peak_flops == {"bfloat16": 100e12} and one.device.l2_bytes == 2**20 and one.device.kernel_launch_s == pytest.approx(2.5e-6)
    assert (one.device.power_idle_w, one.device.power_peak_w) == (10, 100) and one.device.memory_efficiency == 1
    hbm, dram = one.tiers["hbm"], one.tiers["dram"]
    assert one.memory is hbm and hbm.capacity_bytes == 80 * 2**30 and hbm.read_Bps == hbm.write_Bps == 1e12 and hbm.latency_s == pytest.approx(5e-7)
    assert (dram.capacity_bytes, dram.read_Bps, dram.write_Bps, dram.attached_to, dram.shared, dram.link) == (1e12, 100e9, 50e9, "node", True, "host")
    up, out, host = (one.links[name] for name in ("scale_up", "scale_out", "host"))
    assert up.bandwidth_Bps == 50e9 and up.efficiency.size_bytes == (1024.0, 2.0**20) and up.efficiency.efficiency == (0.1, 0.9)
    assert (out.bandwidth_Bps, out.shared_by, out.discipline) == (12.5e9, 4, "serial") and (host.shared_by, host.duplex) == (2, False)
    assert (one.num_ranks, one.fabric_oversubscription, one.price_per_hour, one.warnings) == (8, 2.0, 2.5, ())


@given(st.sampled_from(library_names()), st.integers(1, 1024), st.integers(1, 256))
@settings(max_examples=40, deadline=None)
def test_a_library_name_works_for_any_counts(device: str, devices: int, nodes: int) -> None:
    one = load_cluster(f"{device}-{devices}" + (f"x{nodes}" if nodes > 1 else ""))
    assert (one.devices_per_node, one.num_nodes, one.num_ranks) == (devices, nodes, devices * nodes)
    assert one.name == f"{device}-{devices}" + (f"x{nodes}" if nodes > 1 else "") and one.node_of(one.num_ranks - 1) == nodes - 1
    assert all(link.shared_by <= devices for link in one.links.values())


def test_names_ignore_case_and_x1() -> None:
    assert load_cluster("H100-SXM-8X1").sha256 == load_cluster("h100-sxm-8").sha256 != load_cluster("h100-sxm-4").sha256


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h100-smx-8", "did you mean h100-sxm-8"),
        ("h100-sxm", "h100-sxm-1, or h100-sxm-8x4"),
        ("rtx-4090", "rtx-4090-1"),
        ("h100-sxm-0", "must be in 1..1024"),
        ("h100-sxm-8x0", "must be in 1..256"),
        ("h100-sxm-8x257", "must be in 1..256"),
        ("h100-sxm-99999999999999", "is not in the library"),
        ("zzz", "devices: a100-sxm"),
        ("", "is not in the library"),
        ("h100-sxm--8", "is not in the library"),
        ("h100-sxm-8x", "is not in the library"),
        ("nowhere/x.yaml", "does not exist"),
        ("a\x00b.yaml", ""),
    ],
)
def test_a_bad_name_is_explained(name: str, words: str) -> None:
    try:
        load_cluster(name)
    except HardwareError as error:
        assert words in str(error)
    except ValueError as error:  # the operating system's own refusal of a null byte
        assert "null byte" in str(error)
    else:
        pytest.fail("accepted")


UNIT_KEYS = [
    ("device.peak_flops.bfloat16", "flop/s"),
    ("device.datasheet.bfloat16", "flop/s"),
    ("device.l2", "bytes"),
    ("device.kernel_launch", "seconds"),
    ("device.power.idle", "watts"),
    ("device.power.peak", "watts"),
    ("tiers.hbm.capacity", "bytes"),
    ("tiers.hbm.bandwidth", "bytes/s"),
    ("tiers.dram.read", "bytes/s"),
    ("tiers.dram.write", "bytes/s"),
    ("tiers.hbm.datasheet", "bytes/s"),
    ("tiers.hbm.latency", "seconds"),
    ("links.scale_up.bandwidth", "bytes/s"),
    ("links.scale_up.datasheet", "bytes/s"),
    ("links.scale_up.latency", "seconds"),
    ("price_per_hour", "dollars/h"),
]
SAMPLE = {"bytes": "1 GiB", "bytes/s": "1 GB/s", "seconds": "1 us", "flop/s": "1 TFLOP/s", "watts": "1 W", "dollars/h": "1 $/h"}


@pytest.mark.parametrize(("path", "dimension"), UNIT_KEYS)
def test_each_key_takes_only_its_own_unit(tmp_path: Path, path: str, dimension: str) -> None:
    load_cluster(save(tmp_path, edit(path, SAMPLE[dimension])))
    wrong = [text for other, text in SAMPLE.items() if other != dimension]
    for value in [*wrong, 5, 5.0, "5", "", "fast", True, ["1 GB/s"], "nan GB/s", "1e400 B", "-1 " + SAMPLE[dimension].split()[1], "9" * 80]:
        text = message(save(tmp_path, edit(path, value)))
        assert f"toy.yaml: {path}" in text, (value, text)


@pytest.mark.parametrize("path", [path for path, _ in UNIT_KEYS if not path.endswith(("latency", "kernel_launch", "price_per_hour"))])
def test_zero_and_negative_sizes_are_refused(tmp_path: Path, path: str) -> None:
    unit = SAMPLE[dict(UNIT_KEYS)[path]].split()[1]
    for value in (f"0 {unit}", f"-3 {unit}", 0):
        assert f"{path} = " in message(save(tmp_path, edit(path, value)))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("format", "moesim.hardware/9", "format"),
        ("format", ..., "format: is missing"),
        ("name", "", "name"),
        ("name", "two\nlines", "printable"),
        ("device.kind", "tpu", "device.kind = 'tpu'"),
        ("device.num_sms", 0, "device.num_sms = 0"),
        ("device.num_sms", 1.5, "whole number"),
        ("device.num_sms", True, "whole number"),
        ("device.num_sms", "132", "whole number"),
        ("device.gemm_efficiency", 0, "device.gemm_efficiency"),
        ("device.gemm_efficiency", 1.01, "device.gemm_efficiency"),
        ("device.gemm_efficiency", "0.7", "number without a unit"),
        ("device.gemm_efficiency", float("nan"), "device.gemm_efficiency"),
        ("device.peak_flops", {}, "device.peak_flops"),
        ("device.peak_flops", 5, "device.peak_flops"),
        ("tiers", ..., "tiers: is missing"),
        ("tiers.hbm", ..., "needs tiers.hbm"),
        ("tiers.hbm.capacity", ..., "tiers.hbm.capacity: is missing"),
        ("tiers.hbm.bandwidth", ..., "needs `bandwidth`"),
        ("tiers.hbm.shared", True, "attached_to: node"),
        ("tiers.dram.link", "disk", "needs links.disk"),
        ("tiers.dram.link", "hsot", "tiers.dram.link = 'hsot'"),
        ("tiers.dram.link", ..., "needs tiers.dram.link"),
        ("tiers.dram.shared", "yes", "tiers.dram.shared"),
        ("links.scale_up", ..., "needs links.scale_up, because devices_per_node is 4"),
        ("links.scale_out", ..., "needs links.scale_out, because num_nodes is 2"),
        ("links.host", ..., "needs links.host"),
        ("links.scale_up.shared_by", 0, "links.scale_up.shared_by"),
        ("links.scale_up.discipline", "lifo", "links.scale_up.discipline"),
        ("links.scale_up.efficiency", 0, "links.scale_up.efficiency"),
        ("links.scale_up.efficiency", {"sizes": ["1 B"], "shares": [0.5, 0.6]}, "one share per size"),
        ("links.scale_up.efficiency", {"sizes": ["2 B", "1 B"], "shares": [0.5, 0.6]}, "increasing"),
        ("links.scale_up.efficiency", {"sizes": [1], "shares": [0.5]}, "unit of bytes"),
        ("devices_per_node", 0, "devices_per_node = 0"),
        ("devices_per_node", 2000, "devices_per_node = 2000"),
        ("num_nodes", 257, "num_nodes = 257"),
        ("fabric_oversubscription", 0.5, "fabric_oversubscription = 0.5"),
        ("fabric_oversubscription", float("inf"), "fabric_oversubscription"),
        ("tables", "/etc", "relative path inside"),
        ("tables", "../..", "relative path inside"),
        ("tables", "missing", "is not a folder"),
        ("links.scale_up.bandwidth", "1e9 PB/s", "must be <="),
    ],
)
def test_a_broken_rule_names_file_key_and_value(tmp_path: Path, path: str, value: Any, words: str) -> None:
    text = message(save(tmp_path, edit(path, value)))
    assert "toy.yaml" in text and words in text and "Traceback" not in text and "\n" not in text, text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nmae", "did you mean 'name'"),
        ("device.peak_flop", "device.peak_flop: is not a known key; did you mean 'peak_flops'"),
        ("device.peak_flops.bf16", "did you mean 'bfloat16'"),
        ("tiers.hmb", "tiers.hmb: is not a known key; did you mean 'hbm'"),
        ("tiers.hbm.capcity", "did you mean 'capacity'"),
        ("links.scaleup", "did you mean 'scale_up'"),
        ("links.host.bandwith", "links.host.bandwith: is not a known key; did you mean 'bandwidth'"),
        ("links.scale_up.efficiency.size", "did you mean 'sizes'"),
        ("zzz", "known keys: format, name"),
    ],
)
def test_an_unknown_key_names_its_path_and_a_near_match(tmp_path: Path, path: str, words: str) -> None:
    assert words in message(save(tmp_path, edit(path, "1 GB/s")))


def test_known_keys_cover_the_valid_document() -> None:
    def walk(node: dict[str, Any], prefix: tuple[str, ...]) -> None:
        shape = tuple("*" if i == 1 and prefix[0] in ("tiers", "links") else part for i, part in enumerate(prefix))
        assert set(node) <= set(KNOWN_KEYS[shape])
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, (*prefix, key))

    walk(VALID, ())


HOSTILE = {
    "python tag": "!!python/object/apply:os.system ['true']",
    "alias": "a: &x [1]\nb: *x\n",
    "billion laughs": "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]\n",
    "merge key": "a: &x {b: 1}\nc:\n  <<: *x\n",
    "duplicate key": "name: a\nname: b\n",
    "deep nesting": "[" * 500 + "]" * 500,
    "deep mapping": "".join(f"{' ' * i}a:\n" for i in range(200)),
    "not yaml": "a: [",
    "list": "- 1\n- 2\n",
    "scalar": "hello",
    "empty": "",
    "null byte": "name: a\x00b",
    "number key": "1: 2\n",
    "bool key": "true: 2\n",
    "complex key": "? [a]\n: 1\n",
    "date": "name: 2020-01-01\nformat: moesim.hardware/1\n",
    "binary": "name: !!binary aGVsbG8=\n",
    "set": "device: !!set {a, b}\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_yaml_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    shown = message(save(tmp_path, text))
    assert "toy.yaml" in shown and "\n" not in shown and len(shown) < 1000


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "toy.yaml"
    with path.open("wb") as file:
        file.truncate(5 * 2**20)
    assert "size" in message(path)


KEYS = st.sampled_from(["device", "tiers", "hbm", "links", "scale_up", "efficiency", "sizes", "bandwidth", "name", "extends", "tables"]) | st.text(max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12))
@settings(max_examples=150, deadline=None)
def test_any_document_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, node: Any) -> None:
    path = save(tmp_path_factory.getbasetemp(), {**VALID, **node} if isinstance(node, dict) else node)
    try:
        load_cluster(path)
    except HardwareError as error:
        assert "toy.yaml" in str(error)


# --- extends ---


def test_extends_changes_only_what_is_stated(tmp_path: Path) -> None:
    base = load_cluster("h100-sxm-8x2")
    slower = {"scale_out": {"bandwidth": "200 Gb/s"}}
    mine = load_cluster(save(tmp_path, {"extends": "h100-sxm", "name": "mine", "devices_per_node": 8, "num_nodes": 2, "links": slower}))
    assert mine.links["scale_out"].bandwidth_Bps == 25e9 and mine.links["scale_out"].latency_s == base.links["scale_out"].latency_s
    assert mine.device == base.device and mine.tiers == base.tiers and mine.tables == base.tables and mine.sha256 != base.sha256


def test_extends_takes_library_clusters_nodes_and_relative_files(tmp_path: Path) -> None:
    save(tmp_path, {"links": {"scale_out": {"latency": "9 us"}}}, "parts/net.yaml")
    one = load_cluster(save(tmp_path, {"extends": ["h100-sxm-8x4", "nodes/pcie-server", "parts/net.yaml"], "name": "mix"}))
    assert one.num_ranks == 32 and one.tiers["dram"].capacity_bytes == 2**40 and one.links["scale_out"].latency_s == pytest.approx(9e-6)


def test_null_drops_what_was_inherited(tmp_path: Path) -> None:
    one = load_cluster(save(tmp_path, {"extends": "h100-sxm-8", "name": "bare", "tables": None, "tiers": {"nvme": None}}))
    assert one.tables is None and "nvme" not in one.tiers and "dram" in one.tiers


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_cycle_of_extends_is_refused(tmp_path: Path, size: int) -> None:
    for index in range(size):
        save(tmp_path, {"extends": f"c{(index + 1) % size}.yaml"}, f"c{index}.yaml")
    text = message(tmp_path / "c0.yaml")
    assert "cycle" in text and "c0.yaml -> " in text


def test_a_cycle_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"extends": "b.yaml"}, "a.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    assert "cycle" in message(tmp_path / "a.yaml")


def test_a_diamond_is_no_cycle_but_a_fan_is_bounded(tmp_path: Path) -> None:
    save(tmp_path, {"extends": "h100-sxm"}, "base.yaml")
    save(tmp_path, {"extends": "base.yaml"}, "left.yaml")
    save(tmp_path, {"extends": "base.yaml"}, "right.yaml")
    load_cluster(save(tmp_path, {"extends": ["left.yaml", "right.yaml"], "name": "diamond"}))
    for index in range(6):
        save(tmp_path, {"extends": [f"f{index + 1}.yaml"] * 4} if index < 5 else {"name": "leaf"}, f"f{index}.yaml")
    assert "more than" in message(tmp_path / "f0.yaml")


def test_extends_stays_inside_the_folder(tmp_path: Path) -> None:
    save(tmp_path, VALID, "outside.yaml")
    inner = tmp_path / "inner"
    for part in ("../outside.yaml", str(tmp_path / "outside.yaml"), "sub/../../outside.yaml"):
        assert "relative path inside" in message(save(inner, {"extends": part, "name": "x"}))
    (inner / "link.yaml").symlink_to(tmp_path / "outside.yaml")
    assert "relative path inside" in message(save(inner, {"extends": "link.yaml", "name": "x"}))


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("h100-smx", "did you mean 'h100-sxm'"),
        ("h100-sxm-0", "1..1024"),
        ("absent.yaml", "does not exist"),
        (5, "must be a library name"),
        ({"a": 1}, "must be a library name"),
        ([["a"]], "must be a library name"),
        ("../laptop", "neither in the library"),
        ("nodes/../laptop", "neither in the library"),
        ("", "neither in the library"),
    ],
)
def test_a_bad_extends_is_explained(tmp_path: Path, part: Any, words: str) -> None:
    text = message(save(tmp_path, {"extends": part, "name": "x"}))
    assert words in text


def test_an_error_names_the_file_that_holds_the_key(tmp_path: Path) -> None:
    save(tmp_path, edit("links.host.bandwidth", "32"), "base.yaml")
    text = message(save(tmp_path, {"extends": "base.yaml", "name": "x"}, "top.yaml"))
    assert "base.yaml: links.host.bandwidth = '32'" in text and "top.yaml" not in text


# --- data sheets, identity ---


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("links.scale_up.bandwidth", "900 GB/s", "links.scale_up.bandwidth = 9e+11 B/s is above the data-sheet value 5e+10 B/s"),
        ("tiers.hbm.bandwidth", "2 TB/s", "tiers.hbm.bandwidth = 2e+12 B/s"),
        ("device.peak_flops.bfloat16", "200 TFLOP/s", "device.peak_flops.bfloat16 = 2e+14 FLOP/s"),
    ],
)
def test_more_than_the_data_sheet_warns(tmp_path: Path, path: str, value: str, words: str) -> None:
    (warning,) = load_cluster(save(tmp_path, edit(path, value))).warnings
    assert warning.startswith(f"{tmp_path / 'toy.yaml'}: {words}")


def test_both_directions_of_nvlink_by_mistake_warn(tmp_path: Path) -> None:
    (warning,) = load_cluster(save(tmp_path, {"extends": "h100-sxm-8", "name": "x", "links": {"scale_up": {"bandwidth": "900 GB/s"}}})).warnings
    assert "both directions" in warning


def test_identity_depends_on_values_not_on_place_or_order(tmp_path: Path) -> None:
    first = load_cluster(save(tmp_path / "a", VALID))
    second = load_cluster(save(tmp_path / "b" / "c", dict(reversed(list(VALID.items())))))
    same_value = load_cluster(save(tmp_path / "d", edit("links.scale_up.bandwidth", "50 GB/s")))
    assert first.sha256 == second.sha256 == same_value.sha256 and len(first.sha256) == 64
    assert load_cluster(save(tmp_path / "e", edit("links.scale_up.bandwidth", "51 GB/s"))).sha256 != first.sha256


def test_loading_twice_gives_equal_clusters_and_no_shared_state() -> None:
    first = load_cluster("a100-sxm-8")
    second = load_cluster("a100-sxm-8x2")
    assert first == load_cluster("a100-sxm-8") and second.num_nodes == 2 and first.num_nodes == 1
