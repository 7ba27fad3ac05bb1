"""Dumps of SGLang's expert distribution recorder: ranks are summed, slots mapped, padding and dense layers left out."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError, TraceError
from moesim.traces.importers import import_trace
from moesim.traces.importers.common import ImportOptions
from moesim.traces.routing_trace import DECODE, DUMMY, PREFILL, RoutingTrace, TraceShape, concatenate
from tests.traces.helpers import batch, shape

torch = pytest.importorskip("torch")

DEEP = TraceShape(model="deep", num_experts=16, top_k=2, moe_layer_ids=(1, 2, 3))
"""Four layers, the first of them dense."""
SLOTS = np.stack([np.concatenate([np.random.Generator(np.random.PCG64(layer)).permutation(16), [3, 5, 7, 9]]) for layer in range(4)])
"""20 slots a layer: a permutation and four replicas."""


def notes(trace: RoutingTrace) -> str:
    return "\n".join(trace.provenance["notes"])


def slots_of(ids_TLK: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return a slot that holds each expert, [T, L, K], a random replica where there are two."""
    generator = np.random.Generator(np.random.PCG64(seed))
    result = np.empty(ids_TLK.shape, dtype=np.int64)
    for (token, layer, choice), expert in np.ndenumerate(ids_TLK):
        result[token, layer, choice] = generator.choice(np.flatnonzero(SLOTS[layer + 1] == expert))
    return result


def token_record(number: int, rank: int, ids_TLK: np.ndarray, *, pad: int = -1, decode: bool = False, **more: Any) -> dict[str, Any]:
    tokens = len(ids_TLK)
    table = np.full((4, tokens, 8), pad, dtype=np.int32)
    table[1:, :, :2] = slots_of(ids_TLK).transpose(1, 0, 2)
    lengths = None if decode else [tokens // 2, tokens - tokens // 2]
    return {
        "forward_pass_id": number,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": list(range(tokens)),
        "positions": [*range(tokens // 2), *range(tokens - tokens // 2)],
        "extend_seq_lens": lengths,
        "forward_mode": 1,
        "topk_ids_of_layer": torch.from_numpy(table),
        "misc_objects": [],
        **more,
    }


def save(folder: Path, rank: int, records: list[dict[str, Any]], slots: np.ndarray = SLOTS) -> Path:
    path = folder / f"expert_distribution_recorder_1712.5_{rank}.pt"
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(slots)}, path)
    return path


def test_stat_rows_are_all_layers_and_empty_windows_are_dropped(tmp_path: Path) -> None:
    count = np.random.Generator(np.random.PCG64(0)).integers(1, 50, (5, 4, 16)).astype(np.int32)
    count[:, 0] = 0
    count[3] = 0
    torch.save(
        {"rank": 0, "logical_count": torch.from_numpy(count), "average_utilization_rate_over_window": None}, tmp_path / "expert_distribution_recorder_1.pt"
    )
    for options in (ImportOptions(shape=DEEP), ImportOptions(top_k=2)):
        trace = import_trace("sglang", tmp_path / "expert_distribution_recorder_1.pt", options)
        assert trace.shape.moe_layer_ids == (1, 2, 3) and trace.window_names == ("slot 0", "slot 1", "slot 2", "slot 4")
        np.testing.assert_array_equal(trace.counts_WLE(), count[[0, 1, 2, 4], 1:])
        assert "not that of time" in notes(trace)


def test_older_json_is_read_as_counts(tmp_path: Path) -> None:
    table = np.zeros((4, 16), dtype=int)
    table[1:] = 7
    (tmp_path / "old.json").write_text(json.dumps({"logical_count": table.tolist()}))
    trace = import_trace("sglang", tmp_path / "old.json", ImportOptions(shape=DEEP))
    assert (trace.counts_WLE() == 7).all() and trace.counts_WLE().shape == (1, 3, 16)


def _per_pass(folder: Path, ranks: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(1))
    count = generator.integers(0, 30, (ranks, 3, 4, 20)).astype(np.int32)
    count[:, :, 0] = 0
    for rank in range(ranks):
        save(
            folder,
            rank,
            [{"forward_pass_id": 5 + n, "rank": rank, "gatherer_key": "primary", "global_physical_count": torch.from_numpy(count[rank, n])} for n in range(3)],
        )
    return count


def test_per_pass_files_of_all_ranks_are_summed_and_slots_mapped(tmp_path: Path) -> None:
    count = _per_pass(tmp_path, 3)
    expected = np.zeros((3, 3, 16), dtype=np.int64)
    for _, n, layer, slot in np.ndindex(count.shape):
        if layer:
            expected[n, layer - 1, SLOTS[layer, slot]] += count[_, n, layer, slot]
    trace = import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))
    np.testing.assert_array_equal(trace.counts_WLE(), expected)
    assert trace.window_names == ("forward pass 5", "forward pass 6", "forward pass 7") and "3 ranks" in notes(trace)


def test_one_rank_of_several_is_refused(tmp_path: Path) -> None:
    _per_pass(tmp_path, 3)
    with pytest.raises(TraceError, match="must be summed"):
        import_trace("sglang", tmp_path / "expert_distribution_recorder_1712.5_1.pt", ImportOptions(shape=DEEP))
    (tmp_path / "expert_distribution_recorder_1712.5_1.pt").unlink()
    with pytest.raises(TraceError, match="without a gap"):
        import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))


def test_a_pass_recorded_twice_is_refused(tmp_path: Path) -> None:
    record = {"forward_pass_id": 1, "rank": 0, "global_physical_count": torch.ones((4, 20), dtype=torch.int32)}
    save(tmp_path, 0, [record, record])
    with pytest.raises(TraceError, match="twice"):
        import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))


def test_a_map_that_changed_while_recording_is_refused(tmp_path: Path) -> None:
    _per_pass(tmp_path, 2)
    save(tmp_path, 1, [{"forward_pass_id": 1, "rank": 1, "global_physical_count": torch.ones((4, 20), dtype=torch.int32)}], SLOTS[:, ::-1].copy())
    with pytest.raises(TraceError, match="rebalance"):
        import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))


def test_per_token_ids_are_slots_and_become_experts(tmp_path: Path) -> None:
    ids = np.asarray(batch(shape(), 30).experts_TLK)
    save(tmp_path, 0, [token_record(1, 0, ids[:10]), token_record(2, 0, ids[20:26], decode=True)])
    save(tmp_path, 1, [token_record(1, 1, ids[10:20]), token_record(2, 1, ids[26:], decode=True)])
    for options in (ImportOptions(shape=DEEP), ImportOptions()):
        trace = import_trace("sglang", tmp_path, options)
        found = concatenate(list(trace.batches()))
        np.testing.assert_array_equal(found.experts_TLK, ids)
        assert trace.shape.moe_layer_ids == (1, 2, 3) and trace.shape.top_k == 2 and trace.shape.num_experts == 16
        assert found.valid_TLK is None
        assert found.step_T.tolist() == [1] * 20 + [2] * 10 and found.rank_T.tolist() == [0] * 10 + [1] * 10 + [0] * 6 + [1] * 4
        assert found.phase_T.tolist() == [PREFILL] * 20 + [DECODE] * 10
        assert len(np.unique(found.request_T)) == 4 + 10
        assert found.position_T[:10].tolist() == [0, 1, 2, 3, 4] * 2


def test_a_first_pass_padded_with_zeros_does_not_invent_expert_zero(tmp_path: Path) -> None:
    ids = np.asarray(batch(shape(), 20).experts_TLK)
    save(tmp_path, 0, [token_record(1, 0, ids[:10], pad=0), token_record(2, 0, ids[10:])])
    for options in (ImportOptions(shape=DEEP), ImportOptions()):
        found = concatenate(list(import_trace("sglang", tmp_path, options).batches()))
        np.testing.assert_array_equal(found.experts_TLK, ids)
        assert found.valid_TLK is None


def test_padding_becomes_missing_choices(tmp_path: Path) -> None:
    ids = np.asarray(batch(shape(), 10).experts_TLK)
    record = token_record(1, 0, ids)
    record["topk_ids_of_layer"][2, 4, :] = -1
    save(tmp_path, 0, [record])
    found = concatenate(list(import_trace("sglang", tmp_path, ImportOptions(shape=DEEP)).batches()))
    assert found.valid_TLK is not None and np.argwhere(~found.valid_TLK).tolist() == [[4, 1, 0], [4, 1, 1]]


def test_warm_up_tokens_of_the_server_are_marked(tmp_path: Path) -> None:
    ids = np.asarray(batch(shape(), 20).experts_TLK).copy()
    ids[:12] = ids[0]
    record = token_record(1, 0, ids[:12], decode=True, positions=[0] * 12)
    record["topk_ids_of_layer"] = record["topk_ids_of_layer"][:, :1].repeat(1, 12, 1)
    save(tmp_path, 0, [record, token_record(2, 0, ids[12:])])
    trace = import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))
    assert concatenate(list(trace.batches())).phase_T.tolist() == [DUMMY] * 12 + [PREFILL] * 8
    assert "warm-up" in notes(trace)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["topk_ids_of_layer"].__setitem__((2, 4, 0), 20), "slots < 20"),
        (lambda r: r["topk_ids_of_layer"].__setitem__((2, 4, 0), -2), "slots < 20"),
        (lambda r: r.update(topk_ids_of_layer=r["topk_ids_of_layer"].float()), "integers"),
        (lambda r: r.update(topk_ids_of_layer=r["topk_ids_of_layer"][:3]), "topk_ids_of_layer"),
        (lambda r: r.update(topk_ids_of_layer=torch.zeros(1, dtype=torch.int32).expand(4, 1 << 30, 8)), "integers with"),
        (lambda r: r.update(extend_seq_lens=[3, 4]), "extend_seq_lens"),
        (lambda r: r.update(positions=[1]), "positions"),
        (lambda r: r.update(rank=-1), "rank"),
        (lambda r: r.update(forward_pass_id="1"), "forward_pass_id"),
        (lambda r: r["topk_ids_of_layer"].__setitem__((2, 4, 2), 1), "top-k"),
        (lambda r: r["topk_ids_of_layer"].__setitem__((0, 4, 0), 1), "layers with routing"),
    ],
)
def test_a_broken_record_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    record = token_record(1, 0, np.asarray(batch(shape(), 10).experts_TLK))
    change(record)
    save(tmp_path, 0, [record])
    with pytest.raises(TraceError, match=message):
        import_trace("sglang", tmp_path, ImportOptions(shape=DEEP))


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("pwned"), "x"))


def test_code_in_a_dump_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"records": [_Evil()], "last_physical_to_logical_map": 1}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"logical_count": _Evil()}))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(TraceError, match=name):
            import_trace("sglang", tmp_path / name, ImportOptions(shape=DEEP))
    assert not (tmp_path / "pwned").exists()


def test_a_compressed_dump_is_refused(tmp_path: Path) -> None:
    torch.save({"logical_count": torch.zeros(1, 4, 16)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(TraceError, match="compressed"):
        import_trace("sglang", tmp_path / "b.pt", ImportOptions(shape=DEEP))


def test_without_torch_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"logical_count": torch.ones(1, 4, 16)}, tmp_path / "a.pt")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(InputError, match=r"moesim\[runtime\]"):
        import_trace("sglang", tmp_path / "a.pt", ImportOptions(shape=DEEP))


@pytest.mark.parametrize(
    "dump", [[], {}, {"records": []}, {"records": [1], "last_physical_to_logical_map": 1}, {"logical_count": "x"}, {"logical_count": [[]]}]
)
def test_a_dump_of_another_kind_is_refused(tmp_path: Path, dump: Any) -> None:
    torch.save(dump, tmp_path / "a.pt")
    with pytest.raises(TraceError, match=r"a\.pt"):
        import_trace("sglang", tmp_path / "a.pt", ImportOptions(shape=DEEP))
