"""Replay end to end: conservation, provenance, metamorphic twins, determinism, what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.errors import CostError, InputError, PlanError, TraceError
from moesim.hardware import load_cluster
from moesim.plan import Plan, linear
from moesim.traces.open import open_trace

FLAME: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-8"}
KEYS = {
    "schema", "model", "hardware", "placement", "settings", "simulated_s", "wall_s", "steps", "tokens", "tokens_per_s", "step_ms", "breakdown_ms", "balance",
    "bytes", "traffic", "cache", "stall_s", "memory", "memory_by_use", "change", "requests", "routing", "provenance",
}  # fmt: skip


@pytest.fixture(scope="module")
def flame() -> api.Replay:
    return api.replay("flame-moe-290m", **FLAME)


def faster(hardware: str, **factors: float) -> Any:
    cluster = load_cluster(hardware)
    links = {name: dataclasses.replace(link, bandwidth_Bps=link.bandwidth_Bps * factors.get(name, 1.0)) for name, link in cluster.links.items()}
    return dataclasses.replace(cluster, links=links)


def test_the_report_has_the_keys_that_users_rely_on(flame: api.Replay) -> None:
    assert set(flame.report) == KEYS
    assert set(flame.report["step_ms"]) == {"mean", "p50", "p95", "p99"}
    assert set(flame.report["balance"]) == {"mean_over_max", "layer_mean", "worst_layer"}
    assert set(flame.report["bytes"]) == {"local", "intra_node", "inter_node"}
    json.dumps(flame.report, allow_nan=False)


def test_routed_choices_are_conserved(flame: api.Replay) -> None:
    """tokens × k × layers = routed = received, against the trace itself."""
    counts = open_trace("flame-moe-290m").counts_WLE("all")[0]
    assert (flame.load_LE == counts).all()
    assert flame.load_LE.sum() == 1536 * 6 * 8


def test_the_parts_of_a_step_add_up_to_it(flame: api.Replay) -> None:
    assert sum(flame.report["breakdown_ms"].values()) == pytest.approx(flame.report["step_ms"]["mean"], rel=1e-9)
    assert sum(flame.report["provenance"].values()) == pytest.approx(1.0)


def test_balance_equals_the_loads_of_the_trace(flame: api.Replay) -> None:
    counts = open_trace("flame-moe-290m").counts_WLE("all")[0]
    rank = counts.reshape(8, 8, 8).sum(axis=2)
    assert flame.report["balance"]["mean_over_max"] == pytest.approx(rank.mean(axis=1).sum() / rank.max(axis=1).sum())


def test_equal_runs_write_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        api.replay("synthetic:zipf:1.0,tokens=512,steps=3", **FLAME, seed=7).write(tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("hardware", ["h200-sxm-8x2", "rtx-pro-6000-4", "laptop-4"])
def test_a_faster_link_never_hurts(hardware: str) -> None:
    trace = "synthetic:zipf:1.0,tokens=1024"
    slow = api.replay(trace, model="flame-moe-290m", hardware=load_cluster(hardware)).report["simulated_s"]
    for name in ("scale_up", "scale_out"):
        fast = api.replay(trace, model="flame-moe-290m", hardware=faster(hardware, **{name: 2.0})).report["simulated_s"]
        assert fast <= slow * (1 + 1e-12), name
    assert api.replay(trace, model="flame-moe-290m", hardware=faster(hardware, scale_up=0.01, scale_out=0.01)).report["simulated_s"] > slow


def test_balanced_routing_waits_for_nobody_and_gains_nothing() -> None:
    balanced = api.replay("synthetic:balanced,tokens=1024", **FLAME).report
    skewed = api.replay("synthetic:zipf:1.0,tokens=1024", **FLAME).report
    assert balanced["balance"]["mean_over_max"] > 0.98
    assert balanced["simulated_s"] < skewed["simulated_s"]
    gain = api.solve("synthetic:balanced,tokens=1024", **FLAME).report["predicted"]["gain"]
    assert abs(gain) < 0.02


def test_one_device_exchanges_nothing() -> None:
    report = api.replay("synthetic:zipf:1.0,tokens=256", model="flame-moe-290m", hardware="h100-sxm-1").report
    assert "dispatch" not in report["breakdown_ms"] and report["bytes"]["inter_node"] == 0
    assert report["balance"]["mean_over_max"] == 1.0


def test_attention_tp_splits_attention_and_adds_a_reduction() -> None:
    trace = "synthetic:balanced,tokens=4096"
    plain = api.replay(trace, **FLAME).report["breakdown_ms"]
    split = api.replay(trace, **FLAME, settings={"attention_tp": "4"}).report["breakdown_ms"]
    assert "all_reduce" in split and "all_reduce" not in plain


def test_the_dispatch_algorithm_follows_the_phase_unless_set() -> None:
    model: dict[str, Any] = {"model": "deepseek-v2-lite", "hardware": "h100-sxm-8x2"}
    for phase, default, other in (("prefill", "normal", "low_latency"), ("decode", "low_latency", "normal")):
        trace = f"synthetic:zipf:0.8,tokens=512,phase={phase}"
        chosen = api.replay(trace, **model).report
        assert api.replay(trace, **model, settings={"dispatch": default}).report["simulated_s"] == chosen["simulated_s"]
        changed = api.replay(trace, **model, settings={"dispatch": other}).report
        more, less = (chosen, changed) if default == "low_latency" else (changed, chosen)
        assert more["bytes"]["inter_node"] > less["bytes"]["inter_node"], "one message per expert crosses the network more often than one per node"


def test_micro_batches_keep_every_token_and_overlap_exchange_with_computation() -> None:
    """Two-batch overlap pays where exchanges are long and costs where weights are read twice for few tokens."""
    model: dict[str, Any] = {"model": "deepseek-v2-lite", "hardware": "h100-sxm-8x2"}
    many = [api.replay("synthetic:balanced,tokens=65536", **model, settings={"micro_batches": n}) for n in ("1", "2")]
    few = [api.replay("synthetic:balanced,tokens=512", **model, settings={"micro_batches": n}).report["simulated_s"] for n in ("1", "2")]
    assert many[1].report["tokens"] == many[0].report["tokens"] and (many[1].load_LE == many[0].load_LE).all()
    assert many[1].report["simulated_s"] < many[0].report["simulated_s"]
    assert few[1] > few[0]
    report = many[1].report
    exchanges = sum(report["breakdown_ms"][label] for label in ("dispatch", "combine"))
    compute = sum(report["breakdown_ms"].get(label, 0.0) for label in ("attention", "experts", "shared_experts", "gate", "dense_ffn", "head", "embedding"))
    assert report["step_ms"]["mean"] >= max(exchanges, compute), "no lane does two things at once"


def test_tokens_per_step_cuts_the_trace() -> None:
    report = api.replay("flame-moe-290m", **FLAME, tokens_per_step=512).report
    assert (report["steps"], report["tokens"]) == (3, 1536)


def test_a_counts_trace_says_that_it_was_sampled() -> None:
    report = api.replay("olmoe-1b-7b-counts", model="olmoe-1b-7b", hardware="h100-sxm-8", map_layers="cycle", tokens_per_step=2048).report
    assert report["routing"]["sampled_from_counts"] is True


def test_a_synthetic_trace_is_named_in_the_report() -> None:
    assert "zipf" in api.replay("synthetic:zipf:1.0,tokens=256", **FLAME).report["routing"]["synthetic"]


def test_strict_refuses_a_roofline_and_names_the_missing_key() -> None:
    with pytest.raises(CostError, match="strict"):
        api.replay("synthetic:balanced,tokens=256", model="flame-moe-290m", hardware="h200-sxm-8", strict=True)


@pytest.mark.parametrize(
    ("arguments", "error", "rule"),
    [
        ({"trace": "flame-moe-290m", "model": "olmoe-1b-7b", "hardware": "h100-sxm-8"}, TraceError, "top|layers"),
        ({"trace": "absent", **FLAME}, TraceError, "absent"),
        ({"trace": "flame-moe-290m", **FLAME, "placement": "best"}, InputError, "must be one of linear"),
        ({"trace": "flame-moe-290m", **FLAME, "tokens_per_step": 0}, InputError, "tokens_per_step = 0 must be in 1"),
        ({"trace": "flame-moe-290m", **FLAME, "settings": {"attention_tp": "3"}}, PlanError, "must divide"),
        ({"trace": "synthetic:balanced,tokens=64", "model": "deepseek-v3", "hardware": "h100-sxm-8"}, PlanError, "are missing: use more devices"),
        ({"trace": "synthetic:balanced", "model": "llama-3.1-8b", "hardware": "h100-sxm-8"}, InputError, "no MoE layers"),
    ],
)
def test_documents_that_do_not_fit_are_refused_with_the_rule(arguments: dict[str, Any], error: type[Exception], rule: str) -> None:
    with pytest.raises(error, match=rule):
        api.replay(**arguments)


def test_a_plan_for_other_hardware_or_another_model_is_refused() -> None:
    plan = linear(model="flame-moe-290m", num_experts=64, moe_layer_ids=range(1, 9), num_ranks=4)
    with pytest.raises(PlanError, match="num_ranks = 4 must equal the 8 devices"):
        api.replay("flame-moe-290m", **FLAME, plan=plan)
    other = linear(model="x", num_experts=32, moe_layer_ids=range(1, 9), num_ranks=8)
    with pytest.raises(PlanError, match="must equal the 64 experts"):
        api.replay("flame-moe-290m", **FLAME, plan=other)


def test_uneven_slots_and_empty_slots_are_replayed() -> None:
    table = np.tile(np.r_[np.arange(64), -1, 0], (8, 1))
    ranks = np.sort(np.r_[np.arange(64) // 8, 7, 7])
    plan = Plan(model="flame-moe-290m", num_experts=64, moe_layer_ids=tuple(range(1, 9)), slot_to_expert_LS=table, slot_rank_S=ranks, num_ranks=8)
    result = api.replay("flame-moe-290m", **FLAME, plan=plan)
    assert result.load_LE.sum() == 1536 * 6 * 8


def test_a_small_replay_imports_no_heavy_library() -> None:
    code = (
        "import sys; from moesim import api; api.replay('flame-moe-290m', model='flame-moe-290m', hardware='h100-sxm-8');"
        "print(sorted({'pandas', 'numba', 'ortools', 'torch', 'pulp', 'scipy', 'matplotlib', 'networkx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
