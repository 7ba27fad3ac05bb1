"""Engine formats: a round trip loses nothing, the file is what the engine reads, and what does not fit is refused."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError, PlanError
from moesim.plan import Plan, linear
from moesim.plan_formats import FORMATS, difference, export_plan, import_plan, summary
from moesim.plan_formats.eplb import arrays_of

MOE_LAYERS = (3, 4, 5)
HIDDEN = 6
EXPERTS, RANKS, SLOTS = 6, 4, 8


def make(seed: int = 0, *, layers: tuple[int, ...] = MOE_LAYERS, experts: int = EXPERTS, ranks: int = RANKS, slots: int = SLOTS) -> Plan:
    """Return a plan with replicas and no expert twice on a rank."""
    generator = np.random.Generator(np.random.PCG64(seed))
    per_rank = slots // ranks
    rows = []
    for _ in layers:
        while True:
            row = np.concatenate((generator.permutation(experts), generator.integers(0, experts, slots - experts)))
            row = generator.permutation(row)
            if all(len(set(part)) == per_rank for part in row.reshape(ranks, per_rank).tolist()):
                break
        rows.append(row)
    return Plan(
        model="toy", num_experts=experts, moe_layer_ids=layers, slot_to_expert_LS=np.stack(rows), slot_rank_S=np.arange(slots) // per_rank, num_ranks=ranks
    )


def back(path: Path, name: str, **changes: Any) -> Plan:
    arguments: dict[str, Any] = {"model": "toy", "num_experts": EXPERTS, "moe_layer_ids": MOE_LAYERS, "num_ranks": RANKS, "num_hidden_layers": HIDDEN}
    return import_plan(path, name, **{**arguments, **changes})


FILES = [("sglang", "map.json"), ("trtllm", "map.yaml"), ("vllm-ascend", "map.json"), ("eplb", "map.json"), ("eplb", "map.npz")]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_round_trip_keeps_every_slot(tmp_path_factory: pytest.TempPathFactory, name: str, file: str, seed: int) -> None:
    path = tmp_path_factory.mktemp("formats") / file
    plan = make(seed)
    export_plan(plan, name, path, num_hidden_layers=HIDDEN)
    returned = back(path, name)
    assert returned.map_sha256 == plan.map_sha256
    assert returned.result["status"] == "IMPORTED"
    assert returned.moe_layer_ids == MOE_LAYERS


@pytest.mark.parametrize(("name", "file"), FILES)
def test_the_same_plan_gives_the_same_bytes(tmp_path: Path, name: str, file: str) -> None:
    contents = []
    for folder in ("a", "b"):
        export_plan(make(), name, tmp_path / folder / file, num_hidden_layers=HIDDEN)
        contents.append((tmp_path / folder / file).read_bytes())
    assert contents[0] == contents[1]


def test_every_format_is_tested() -> None:
    assert {name for name, _ in FILES} == set(FORMATS)


# --- the file is what the engine reads ------------------------------------------------------------


def test_sglang_gets_one_row_per_hidden_layer_and_no_other_key(tmp_path: Path) -> None:
    plan = make()
    export_plan(plan, "sglang", tmp_path / "map.json", num_hidden_layers=8)
    node = json.loads((tmp_path / "map.json").read_text())
    assert list(node) == ["physical_to_logical_map"]
    assert len(node["physical_to_logical_map"]) == 8
    assert node["physical_to_logical_map"][3:6] == plan.slot_to_expert_LS.tolist()
    assert node["physical_to_logical_map"][0] == node["physical_to_logical_map"][7] == [0, 1, 2, 3, 4, 5, 0, 1]


def test_trtllm_gets_true_layer_indices_and_its_three_keys(tmp_path: Path) -> None:
    plan = make()
    export_plan(plan, "trtllm", tmp_path / "map.yaml", num_hidden_layers=HIDDEN, mtp_layers=1, layer_updates_per_iter=2)
    node = yaml.safe_load((tmp_path / "map.yaml").read_text())
    assert list(node) == ["initial_global_assignments", "num_slots", "layer_updates_per_iter"]
    assert list(node["initial_global_assignments"]) == [3, 4, 5, 6]
    assert node["initial_global_assignments"][4] == plan.slot_to_expert_LS[1].tolist()
    assert node["initial_global_assignments"][6] == [0, 1, 2, 3, 4, 5, 0, 1]
    assert (node["num_slots"], node["layer_updates_per_iter"]) == (8, 2)
    assert back(tmp_path / "map.yaml", "trtllm").map_sha256 == plan.map_sha256


def test_vllm_ascend_gets_its_nested_lists(tmp_path: Path) -> None:
    plan = make()
    export_plan(plan, "vllm-ascend", tmp_path / "map.json")
    node = json.loads((tmp_path / "map.json").read_text())
    assert set(node) == {"moe_layer_count", "layer_list"}
    assert node["moe_layer_count"] == 3
    layer = node["layer_list"][1]
    assert (layer["layer_id"], layer["device_count"]) == (1, RANKS)
    assert layer["device_list"][2] == {"device_id": 2, "device_expert": plan.slot_to_expert_LS[1, 4:6].tolist()}


def test_eplb_gets_three_arrays_that_invert_each_other(tmp_path: Path) -> None:
    plan = make()
    export_plan(plan, "eplb", tmp_path / "map.npz")
    with np.load(tmp_path / "map.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    assert set(arrays) == {"physical_to_logical_map", "logical_to_physical_map", "expert_count"}
    assert {array.dtype for array in arrays.values()} == {np.dtype("int64")}
    count, inverse = arrays["expert_count"], arrays["logical_to_physical_map"]
    assert inverse.shape == (3, EXPERTS, count.max())
    assert ((inverse >= 0).sum(axis=2) == count).all()
    for layer in range(3):
        for expert in range(EXPERTS):
            slots = inverse[layer, expert, : count[layer, expert]]
            assert (plan.slot_to_expert_LS[layer, slots] == expert).all()
            assert (inverse[layer, expert, count[layer, expert] :] == -1).all()


# --- what a format cannot say is refused -----------------------------------------------------------


@pytest.mark.parametrize("name", list(FORMATS))
def test_unequal_ranks_are_refused(tmp_path: Path, name: str) -> None:
    plan = linear(model="toy", num_experts=6, moe_layer_ids=MOE_LAYERS, num_ranks=4)
    with pytest.raises(PlanError, match=r"slots per rank = \[1, 2\] must be equal on all 4 ranks"):
        export_plan(plan, name, tmp_path / "map", num_hidden_layers=HIDDEN)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(FORMATS))
def test_empty_slots_are_refused(tmp_path: Path, name: str) -> None:
    table = np.array([[0, 1, 2, 3, 4, 5, -1, 0]] * 3)
    plan = replace(make(), slot_to_expert_LS=table)
    with pytest.raises(PlanError, match=r"slot_to_expert\[0\]\[6\] = -1 must be an expert"):
        export_plan(plan, name, tmp_path / "map", num_hidden_layers=HIDDEN)


@pytest.mark.parametrize("name", list(FORMATS))
def test_unequal_shares_are_refused(tmp_path: Path, name: str) -> None:
    plan = make()
    share = plan.shares_LS().copy()
    slots = np.flatnonzero(plan.slot_to_expert_LS[0] == np.bincount(plan.slot_to_expert_LS[0]).argmax())
    share[0, slots[0]] += 0.1
    share[0, slots[1]] -= 0.1
    with pytest.raises(PlanError, match="unequal shares"):
        export_plan(replace(plan, share_LS=share), name, tmp_path / "map", num_hidden_layers=HIDDEN)
    export_plan(replace(plan, share_LS=plan.shares_LS()), name, tmp_path / "map.json", num_hidden_layers=HIDDEN)


def test_an_expert_twice_on_a_device_is_refused_where_the_engine_cannot_hold_it(tmp_path: Path) -> None:
    plan = replace(make(), slot_to_expert_LS=np.array([[0, 0, 1, 2, 3, 4, 5, 1]] * 3))
    with pytest.raises(PlanError, match="expert 0 on rank 0 in layer 0 = '2 copies'"):
        export_plan(plan, "vllm-ascend", tmp_path / "map")
    export_plan(plan, "sglang", tmp_path / "map.json", num_hidden_layers=HIDDEN)
    assert back(tmp_path / "map.json", "sglang").map_sha256 == plan.map_sha256


def test_layers_the_export_needs_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model"):
        export_plan(make(), "sglang", tmp_path / "map.json")
    with pytest.raises(InputError, match="--model"):
        export_plan(make(), "trtllm", tmp_path / "map.yaml", mtp_layers=1)
    with pytest.raises(PlanError, match="below the 4 hidden layers"):
        export_plan(make(), "sglang", tmp_path / "map.json", num_hidden_layers=4)
    with pytest.raises(InputError, match="must be one of sglang"):
        export_plan(make(), "tensorrt", tmp_path / "map.json")


# --- what comes in is checked ----------------------------------------------------------------------


def mutated(tmp_path: Path, name: str, change: Any) -> Path:
    path = tmp_path / ("map.yaml" if name == "trtllm" else "map.json")
    export_plan(make(), name, path, num_hidden_layers=HIDDEN)
    node = yaml.safe_load(path.read_text())
    node = change(node) or node
    path.write_text(yaml.safe_dump(node) if name == "trtllm" else json.dumps(node))
    return path


def put(*keys: Any, value: Any) -> Any:
    def change(node: Any) -> None:
        for key in keys[:-1]:
            node = node[key]
        if value is ...:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value

    return change


MAP, ASSIGN = "physical_to_logical_map", "initial_global_assignments"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sglang", put("note", value="x"), r"unknown keys \['note'\]"),
        ("sglang", put("logical_count", value=[[1]]), "trace import --format sglang"),
        ("sglang", put(MAP, 3, 0, value=6), r"physical_to_logical_map\[3\] = 6 must hold integers in 0..5"),
        ("sglang", put(MAP, 3, 0, value=-1), "must hold integers"),
        ("sglang", put(MAP, 3, 0, value=True), "must hold integers"),
        ("sglang", put(MAP, 3, 0, value=1.0), "must hold integers"),
        ("sglang", put(MAP, 3, value=[0, 1]), r"length of physical_to_logical_map\[3\] = 2 must be 8"),
        ("sglang", put(MAP, 5, value=...), "rows of physical_to_logical_map = 5 must be 6"),
        ("sglang", put(MAP, value=[]), "non-empty list of rows"),
        ("sglang", put(MAP, value="abc"), "non-empty list of rows"),
        ("sglang", put(MAP, 3, value=[0] * 8), "no slot for expert 1"),
        ("sglang", lambda node: [node], "must be an object"),
        ("trtllm", put(ASSIGN, 4, value=...), "4 is missing"),
        ("trtllm", put(ASSIGN, 1, value=[0] * 8), r"initial_global_assignments\[1\].*must belong to a MoE layer"),
        ("trtllm", put(ASSIGN, value=None), "must map layer indices"),
        ("trtllm", put("num_slots", value=9), r"must be 9"),
        ("trtllm", put("num_slots", value=10**12), "num_slots"),
        ("trtllm", put("layer_updates_per_iter", value=-1), "layer_updates_per_iter"),
        ("trtllm", put("slots", value=8), "unknown keys"),
        ("vllm-ascend", put("moe_layer_count", value=4), "moe_layer_count = 4 entries"),
        ("vllm-ascend", put("layer_list", 1, "layer_id", value=0), "layer_id = 0 must be 1"),
        ("vllm-ascend", put("layer_list", 0, "device_count", value=8), "must equal the 4 ranks"),
        ("vllm-ascend", put("layer_list", 0, "device_list", 3, value=...), "must have 4 entries"),
        ("vllm-ascend", put("layer_list", 0, "device_list", 1, "device_id", value=0), "must be 1"),
        ("vllm-ascend", put("layer_list", 0, "device_list", 1, "device_expert", value=[2, 2]), "must not hold an expert twice"),
        ("vllm-ascend", put("layer_list", 0, "device_list", 1, "device_expert", value=[2]), "length of"),
        ("eplb", put("expert_count", 0, 0, value=7), r"expert_count\[0\]\[0\] = 7"),
        ("eplb", put("logical_to_physical_map", 1, value=[[0]] * 6), "does not invert"),
        ("eplb", put("logical_to_physical_map", 1, value=[[0]] * 5), "one row per expert"),
        ("eplb", put("logical_to_physical_map", value=[]), "must have 3 layers"),
        ("eplb", put(MAP, 0, 0, value=2**70), "must hold integers"),
    ],
)
def test_a_file_that_breaks_a_rule_is_refused_by_name(tmp_path: Path, name: str, change: Any, words: str) -> None:
    path = mutated(tmp_path, name, change)
    with pytest.raises(PlanError, match=words) as caught:
        back(path, name)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_a_file_for_another_model_or_rank_count_is_refused(tmp_path: Path, name: str, file: str) -> None:
    export_plan(make(), name, tmp_path / file, num_hidden_layers=HIDDEN)
    for changes in ({"num_experts": 5}, {"num_experts": 9}, {"moe_layer_ids": (1, 3, 4, 5, 7), "num_hidden_layers": 9}, {"num_ranks": 3}):
        with pytest.raises(PlanError):
            back(tmp_path / file, name, **changes)
    with pytest.raises(InputError, match="--ranks"):
        back(tmp_path / file, name, num_ranks=0)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1, "a": 2}', b"!!python/object/apply:os.system ['true']", b"PK\x03\x04broken"]
)
def test_hostile_bytes_end_in_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    for file in ("map.json", "map.npz"):
        (tmp_path / file).write_bytes(content)
        with pytest.raises(PlanError):
            back(tmp_path / file, name)
    with pytest.raises(PlanError, match="does not exist"):
        back(tmp_path / "nowhere.json", name)


def archive_with(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def test_hostile_archives_are_refused(tmp_path: Path) -> None:
    good = {f"{name}.npy": npy(array) for name, array in arrays_of(make()).items()}
    assert back(archive_with(tmp_path / "good.npz", good), "eplb").map_sha256 == make().map_sha256
    first = "physical_to_logical_map.npy"
    huge = bytearray(npy(np.zeros((3, 8), dtype=np.int64)))
    huge[: len(huge)] = bytes(huge).replace(b"(3, 8)", b"(3,8" + b"0" * 1 + b")")
    for number, members in enumerate(
        [
            {**good, first: npy(np.array([[{}]], dtype=object), allow_pickle=True)},
            {**good, first: npy(np.zeros((3, 8)))},
            {**good, first: bytes(huge)},
            {**good, first: b"not an array"},
            {**good, first: b"\0" * 70 * 2**20},
            {**good, "extra.npy": good[first]},
            {name: data for name, data in good.items() if name != first},
        ]
    ):
        with pytest.raises(PlanError):
            back(archive_with(tmp_path / f"bad{number}.npz", members), "eplb")


def test_a_torch_file_is_named_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "map.pt").write_bytes(b"PK")
    with pytest.raises(PlanError, match="convert it to JSON"):
        back(tmp_path / "map.pt", "sglang")


# --- summaries -------------------------------------------------------------------------------------


def test_a_summary_counts_replicas_duplicates_and_holes() -> None:
    plan = replace(make(), slot_to_expert_LS=np.array([[0, 0, 1, 2, 3, 4, 5, -1]] * 3))
    facts = summary(plan)
    assert (facts["duplicate_slots"], facts["empty_slots"], facts["replicas"]["most"]) == (3, 3, 2)
    assert facts["slots_per_rank"] == {"min": 2, "max": 2}


def test_a_difference_names_slots_and_ranks() -> None:
    old = replace(make(), slot_to_expert_LS=np.array([[0, 1, 2, 3, 4, 5, 0, 1]] * 3))
    table = np.array(old.slot_to_expert_LS)
    table[1, [0, 1]] = [1, 0]
    table[2, 7] = 2
    change = difference(old, replace(old, slot_to_expert_LS=table))
    assert (change["slots"], change["layers"], change["ranks"]) == (3, {"4": 2, "5": 1}, {"0": 2, "3": 1})
    assert change["fetched_experts"] == 1
    assert change["experts_with_other_replica_count"] == 2
    assert not change["identical"]
    assert difference(old, old)["identical"]


def test_plans_of_different_shape_are_not_compared() -> None:
    with pytest.raises(PlanError, match="num_slots"):
        difference(make(), make(slots=12))
