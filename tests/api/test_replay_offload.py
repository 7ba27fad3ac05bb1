"""Replay with experts behind a link: metamorphic twins, memory of every tier, one device against the engine, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.api.documents import trace_of
from moesim.api.running import builder_of, passes_of
from moesim.cli.replay import offload_rows
from moesim.costs.model import CostModel
from moesim.errors import CostError, InputError
from moesim.hardware import load_cluster
from moesim.hardware.cluster import Cluster
from moesim.model import sizes
from moesim.model.hf_config import load_model
from moesim.plan import linear
from moesim.sim.loads import LoadCompiler
from moesim.sim.offload_replay import run_offload
from moesim.sim.settings import Settings
from moesim.traces.in_memory import from_batches
from moesim.traces.routing_trace import RoutingTrace

DECODE = "synthetic:markov:0.6,tokens=1,steps=24,phase=decode"
BATCH = "synthetic:zipf:1.0,tokens=32,steps=6,phase=decode"
ONE: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "rtx-4090-1"}
MANY: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-4"}
WAITS = ("late_hit", "miss", "disk_miss", "compute")


def offload(**settings: Any) -> dict[str, str]:
    return {f"offload.{key}": str(value) for key, value in ({"tier": "dram"} | settings).items()}


def run(trace: str | RoutingTrace = DECODE, where: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    return api.replay(trace, **(where or ONE), settings=offload(**settings)).report


def changed(hardware: str, factor: float = 1.0, **links: Any) -> Cluster:
    """Links and tiers behind them `factor` times as fast; links: fields of every link to a tier."""
    cluster = load_cluster(hardware)
    ways = {name: link for name, link in cluster.links.items() if name in ("host", "disk")}
    behind = {name: dataclasses.replace(link, bandwidth_Bps=link.bandwidth_Bps * factor, **links) for name, link in ways.items()}
    tiers = {name: tier if tier.link is None else dataclasses.replace(tier, read_Bps=tier.read_Bps * factor) for name, tier in cluster.tiers.items()}
    return dataclasses.replace(cluster, links={**cluster.links, **behind}, tiers=tiers)


def waited(report: dict[str, Any]) -> float:
    return sum(report["stall_s"][cause] for cause in WAITS)


# --- metamorphic twins -----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [ONE, MANY])
@pytest.mark.parametrize("settings", [{}, {"slots": 0}, {"slots": 2, "predictor": "synthetic:0.7,0.7"}, {"tier": "nvme", "host_slots": 4}])
def test_a_link_without_limits_equals_no_offloading(where: dict[str, Any], settings: dict[str, Any]) -> None:
    free = {**where, "hardware": changed(where["hardware"], math.inf, latency_s=0.0)}
    plain, free_run = api.replay(BATCH, **free).report, run(BATCH, free, **settings)
    assert free_run["simulated_s"] == pytest.approx(plain["simulated_s"], rel=1e-9)
    assert waited(free_run) == pytest.approx(0.0, abs=1e-12)
    assert waited(run(BATCH, where, **settings)) > 0


def test_without_a_cache_every_use_is_loaded_on_demand() -> None:
    report, plain = run(slots=0), api.replay(DECODE, **ONE).report
    uses = 24 * 8 * 6
    assert (report["cache"]["hits"], report["cache"]["misses"]) == (0, uses)
    model, cluster = load_model("flame-moe-290m"), load_cluster("rtx-4090-1")
    load_s = cluster.links["host"].latency_s + sizes.expert_bytes(model) / cluster.links["host"].bandwidth_Bps
    assert report["simulated_s"] == pytest.approx(plain["simulated_s"] + uses * load_s)
    assert report["bytes"]["host"] == uses * sizes.expert_bytes(model)


@pytest.mark.parametrize("where", [ONE, MANY])
@pytest.mark.parametrize("settings", [{"slots": 4}, {"slots": 8, "predictor": "exact"}, {"tier": "nvme", "slots": 4, "host_slots": 8}])
def test_a_faster_link_never_hurts_and_a_slower_one_does(where: dict[str, Any], settings: dict[str, Any]) -> None:
    times = [run(BATCH, {**where, "hardware": changed(where["hardware"], factor)}, **settings)["simulated_s"] for factor in (0.5, 1.0, 2.0)]
    assert times[0] > times[1] > times[2]


@pytest.mark.parametrize("where", [ONE, MANY])
@pytest.mark.parametrize("discipline", ["fifo", "priority"])
def test_right_predictions_and_a_window_above_the_load_stall_only_in_the_first_layer(where: dict[str, Any], discipline: str) -> None:
    fast = {**where, "hardware": changed(where["hardware"], 1e4, latency_s=0.0)}
    report = run(BATCH, fast, slots=0, predictor="exact", across_steps=True, discipline=discipline)
    assert report["stall_s"]["late_hit"] == 0.0 and report["cache"]["late_hits"] == 0
    routing = trace_of(BATCH, load_model("flame-moe-290m"), 0, None)
    assert routing.tokens is not None
    first = routing.tokens.read(0)
    assert report["cache"]["misses"] == len(np.unique(first.experts_TLK[first.step_T == first.step_T.min(), 0])), "nobody predicts the first layer of all"
    assert waited(report) > 0 and waited(run(BATCH, fast, slots=0)) > waited(report)


def test_a_cache_that_holds_all_loads_every_expert_once() -> None:
    for where in (ONE, MANY):
        report = run(BATCH, where)
        routing = trace_of(BATCH, load_model("flame-moe-290m"), 0, None)
        distinct = int((routing.counts_WLE("all")[0] > 0).sum())
        assert report["cache"]["misses"] == distinct, where
        assert report["bytes"]["host"] == distinct * sizes.expert_bytes(load_model("flame-moe-290m"))
        assert run(BATCH, where, predictor="exact")["bytes"] == report["bytes"], "a rank fetches what it holds, and nothing else"


def test_the_oracle_beats_the_other_policies_and_a_start_with_the_frequent_experts_helps() -> None:
    rates = {policy: run(cache=policy, slots=12)["cache"]["hit_rate"] for policy in ("belady", "lru", "lfu", "fifo")}
    assert rates["belady"] == max(rates.values()) > rates["lru"] > 0
    assert run(slots=12, start="frequent")["cache"]["hit_rate"] > rates["lru"]


# --- one device and many ----------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {},
    {"slots": 3},
    {"slots": 60, "scope": "device", "cache": "lfu", "expert_start": "each"},
    {"slots": 4, "predictor": "synthetic:0.8,0.7", "lookahead": 2, "across_steps": True},
    {"slots": 4, "predictor": "exact", "issue": "experts", "into": "staging", "predict_time": "5 us"},
    {"slots": 4, "predictor": "synthetic:0.6,0.6", "discipline": "priority", "chunk_bytes": "1 MB", "cancel_wrong": "true", "predict_time": "9 us"},
    {"slots": 4, "predictor": "synthetic:0.6,0.6", "discipline": "priority", "predict_time": "9 us", "predict_on": "cpu"},
    {"slots": 6, "miss": "cheapest", "cpu_flops": "500 GFLOP/s"},
    {"slots": 6, "miss": "unimportance:0.3,0.8", "low_bits": 4.5},
    {"tier": "nvme", "slots": 4, "host_slots": 40, "predictor": "exact"},
]  # fmt: skip


@pytest.mark.parametrize("trace", [DECODE, "flame-moe-290m"])
@pytest.mark.parametrize("settings", KINDS, ids=lambda value: ",".join(value) or "default")
def test_one_device_and_the_engine_agree(trace: str, settings: dict[str, Any]) -> None:
    model, cluster = load_model("flame-moe-290m"), load_cluster("rtx-4090-1")
    plan = linear(model=model.name, num_experts=model.num_experts, moe_layer_ids=model.moe_layer_ids, num_ranks=1)
    costs, routing = CostModel(cluster, model), trace_of(trace, model, 0, None)
    runs = []
    for on_engine in (False, True):
        builder = builder_of(cluster, model, plan, costs, Settings.parse({**offload(**settings), "host_overhead_us": "3"}))
        passes = passes_of(routing, 1, 256 if trace == "flame-moe-290m" else None, 0)
        runs.append(run_offload(passes, builder=builder, compiler=LoadCompiler(plan, ranks_per_node=1), on_engine=on_engine))
    fast, slow = runs
    assert fast.ledger.duration_s == pytest.approx(slow.ledger.duration_s, abs=1e-9)
    assert (fast.cache, fast.link_bytes, fast.memory) == (slow.cache, slow.link_bytes, slow.memory)
    assert fast.stall_s == pytest.approx(slow.stall_s, abs=1e-9)
    one, other = (run.ledger.breakdown_s() for run in runs)
    for label in ("expert_load", "experts", "attention"):
        assert one[label] == pytest.approx(other[label], abs=1e-9), label


def test_a_rank_that_loads_keeps_the_others_waiting() -> None:
    """Ranks load differently many experts: the stall of one is the others' wait at the exchange."""
    skewed = "synthetic:zipf:1.5,tokens=64,steps=8,phase=decode"
    report, plain = run(skewed, MANY, slots=1), api.replay(skewed, **MANY).report
    assert report["stall_s"]["straggler"] > plain["stall_s"]["straggler"]
    assert report["tokens"] == plain["tokens"] and report["balance"] == plain["balance"]
    assert sum(report["breakdown_ms"].values()) == pytest.approx(report["step_ms"]["mean"], rel=1e-9)


def test_ranks_share_neither_caches_nor_experts() -> None:
    """With one slot per layer everywhere, more ranks hold more of the experts in all."""
    one, many = run(BATCH, ONE, slots=4), run(BATCH, MANY, slots=4)
    assert many["cache"]["hits"] > one["cache"]["hits"]
    assert one["cache"]["hits"] + one["cache"]["misses"] == many["cache"]["hits"] + many["cache"]["misses"]


def test_relabelling_experts_changes_nothing() -> None:
    shape = trace_of(DECODE, load_model("flame-moe-290m"), 0, None)
    assert shape.tokens is not None
    batches = [shape.tokens.read(index) for index in range(len(shape.tokens.groups))]
    new = np.random.Generator(np.random.PCG64(5)).permutation(64).astype(np.uint8)
    renamed = [dataclasses.replace(batch, experts_TLK=new[batch.experts_TLK]) for batch in batches]
    assert run(from_batches(shape.shape, batches, source="a"), slots=8)["simulated_s"] == pytest.approx(
        run(from_batches(shape.shape, renamed, source="b"), slots=8)["simulated_s"]
    )


# --- what is prefetched, and what a miss does ----------------------------------------------------------------


def test_predictions_of_the_trace_are_used() -> None:
    shape = trace_of(DECODE, load_model("flame-moe-290m"), 0, None)
    assert shape.tokens is not None
    batches = [shape.tokens.read(index) for index in range(len(shape.tokens.groups))]
    recorded = from_batches(shape.shape, [dataclasses.replace(batch, predicted_TLK=batch.experts_TLK) for batch in batches], source="with predictions")
    assert run(recorded, slots=8, predictor="recorded")["cache"] == run(slots=8, predictor="exact")["cache"]
    with pytest.raises(InputError, match="next_gate_topk"):
        run(slots=8, predictor="recorded")


def test_wrong_predictions_are_useless_prefetches_and_cost_bytes() -> None:
    right, wrong = run(slots=8, predictor="exact"), run(slots=8, predictor="synthetic:1,0.5")
    assert right["cache"]["useless_prefetches"] == 0 < wrong["cache"]["useless_prefetches"]
    assert wrong["bytes"]["host"] > right["bytes"]["host"]
    assert right["cache"]["late_hits"] > 0 and right["simulated_s"] < run(slots=8)["simulated_s"]


def test_weights_of_the_trace_decide_what_is_unimportant() -> None:
    """The recorded weights differ between choices, so thresholds part them; a threshold of 1 asks for no low precision."""
    low = run("flame-moe-290m", slots=4, miss="unimportance:0.4,0.9", low_bits=4.5)
    assert low["cache"]["low_precision"] > 0 and low["cache"]["skipped"] > 0
    none = run("flame-moe-290m", slots=4, miss="unimportance:1,1", low_bits=4.5)
    assert none["cache"]["low_precision"] == none["cache"]["skipped"] == 0
    assert low["bytes"]["host"] < none["bytes"]["host"]


def test_a_cpu_without_speed_loads_and_a_fast_one_computes() -> None:
    slow, fast = (run(slots=4, miss="cheapest", cpu_flops=speed) for speed in ("1 kFLOP/s", "2 TFLOP/s"))
    assert slow["cache"]["computed"] == 0 and slow["simulated_s"] == run(slots=4)["simulated_s"]
    assert fast["cache"]["computed"] > 0 and fast["simulated_s"] < slow["simulated_s"] and fast["stall_s"]["compute"] > 0


def test_half_the_bits_load_in_half_the_time() -> None:
    whole, half = (run(slots=0, miss=miss, low_bits=8.0) for miss in ("load", "precision"))
    assert half["bytes"]["host"] == whole["bytes"]["host"] / 2 and half["cache"]["low_precision"] == half["cache"]["misses"]


def test_a_disk_behind_host_memory() -> None:
    model = load_model("flame-moe-290m")
    report = run(tier="nvme", slots=2, host_slots=160)
    assert report["bytes"]["disk"] < report["bytes"]["host"] and report["stall_s"]["disk_miss"] > 0
    assert report["memory"]["dram"] == 160 * sizes.expert_bytes(model)
    assert report["memory"]["nvme"] == 8 * 64 * sizes.expert_bytes(model)
    assert run(tier="nvme", slots=2)["bytes"]["disk"] < report["bytes"]["disk"], "all of host memory reads every expert once"


def test_a_disk_without_host_memory_in_front_feeds_the_device() -> None:
    report = run(DECODE, {"model": "tiny-moe", "hardware": "laptop-1"}, tier="nvme", slots=2)
    assert set(report["memory"]) == {"dram", "nvme"} and report["bytes"]["disk"] > 0 and "host" not in report["bytes"]


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trace", [DECODE, BATCH, "synthetic:balanced,tokens=512"])
def test_a_model_that_does_not_fit_runs_within_its_memory(trace: str) -> None:
    where: dict[str, Any] = {"model": "mixtral-8x7b", "hardware": "rtx-4090-1"}
    with pytest.raises(InputError, match=r"hbm .*offload\.tier"):
        api.replay(trace, **where)
    report = run(trace, where)
    assert 0.8 * 24 * 2**30 < report["memory"]["hbm"] <= 24 * 2**30
    assert report["memory"]["dram"] == 256 * sizes.expert_bytes(load_model("mixtral-8x7b"))
    assert report["memory"]["hbm"] == sum(report["memory_by_use"]["hbm"].values())
    json.dumps(report, allow_nan=False)


@pytest.mark.parametrize(
    ("where", "settings", "message"),
    [
        ({"model": "mixtral-8x7b", "hardware": "rtx-4090-1"}, {"slots": 8}, r"hbm: offload.slots = 8 \(layer\) need 84 GiB, must be <= 21"),
        ({"model": "mixtral-8x7b", "hardware": "rtx-4090-1"}, {"bytes": "23 GiB"}, "hbm: offload.bytes = 23 GiB need 23 GiB, must be <= "),
        ({"model": "mixtral-8x22b", "hardware": "rtx-4090-1"}, {}, "dram: the experts need .* must be <= 128 GiB.*nvme"),
        ({"model": "mixtral-8x22b", "hardware": "rtx-4090-1"}, {"tier": "nvme", "host_slots": 999}, "dram: offload.host_slots = 999 need"),
        (ONE, {"tier": "ufs"}, "must be a tier of rtx-4090-1 behind a link: dram, nvme"),
        (ONE, {"tier": "hbm"}, "must be a tier of"),
        (ONE, {"cache": "mru"}, "is not registered"),
        (ONE, {"miss": "compute"}, "needs compute_s"),
        (ONE, {"miss": "precision"}, "needs low_bytes"),
    ],
)
def test_what_does_not_fit_names_the_tier_and_the_rule(where: dict[str, Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(DECODE, where, **settings)


@pytest.mark.parametrize(
    ("room", "message"), [(2, "needs 2.99 GiB of hbm .* must be <= 2 GiB"), (4, "hbm: the 8 experts that one layer of a pass wants need 2.6")]
)
def test_dense_weights_and_one_layers_experts_must_fit_the_device(room: int, message: str) -> None:
    cluster = load_cluster("rtx-4090-1")
    small = dataclasses.replace(cluster, tiers={**cluster.tiers, "hbm": dataclasses.replace(cluster.tiers["hbm"], capacity_bytes=room * 2.0**30)})
    with pytest.raises(InputError, match=message):
        run(BATCH, {"model": "mixtral-8x7b", "hardware": small})
    if room == 4:
        assert run(DECODE, {"model": "mixtral-8x7b", "hardware": small})["memory"]["hbm"] <= 4 * 2**30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload.cache": "lru"}, "needs offload.tier"),
        ({"offload.tier": "dram", "offload.scope": "world"}, "must be one of layer, device"),
        ({"offload.tier": "dram", "offload.bytes": "8"}, "unit"),
        ({"offload.tier": "dram", "offload.bytes": "8 GB", "offload.slots": "2"}, "must not be combined"),
        ({"offload.tier": "dram", "offload.slots": "-2"}, "must be >= 0"),
        ({"offload.tier": "dram", "offload.lookahead": "0"}, "must be >= 1 layer"),
        ({"offload.tier": "dram", "offload.chunk_bytes": "1 MB"}, "priority"),
        ({"offload.tier": "dram", "offload.low_bits": "nan"}, r"must be in 0\.\.16"),
        ({"offload.tier": "dram", "micro_batches": "2"}, "must be 1 with offload.tier"),
        ({"offload.tier": "dram", "change.balancer": "periodic:2"}, "cannot be combined"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        api.replay(DECODE, **ONE, settings=settings)


def test_strict_refuses_a_link_that_was_not_measured() -> None:
    with pytest.raises(CostError, match="tier_copy"):
        api.replay(DECODE, model="deepseek-v2-lite", hardware="h100-sxm-1", settings=offload(), strict=True)


def test_a_plan_names_the_policies_that_settings_do_not() -> None:
    model = load_model("flame-moe-290m")
    plan = dataclasses.replace(
        linear(model=model.name, num_experts=64, moe_layer_ids=model.moe_layer_ids, num_ranks=1), policies={"cache": "lfu", "predictor": "exact"}
    )
    report = api.replay(DECODE, **ONE, plan=plan, settings=offload(slots=8)).report
    assert (report["settings"]["offload.cache"], report["settings"]["offload.predictor"]) == ("lfu", "exact")
    assert report["cache"] == run(slots=8, cache="lfu", predictor="exact")["cache"]
    assert api.replay(DECODE, **ONE, plan=plan, settings=offload(slots=8, cache="lru")).report["settings"]["offload.cache"] == "lru"
    assert api.replay(DECODE, **ONE, plan=plan).report["cache"]["misses"] == 0, "without a tier the plan's policies wait"


def test_people_read_what_caches_and_links_did() -> None:
    rows = dict(offload_rows(run(slots=8, predictor="exact")))
    assert rows["experts copied"].endswith("over host") and "late hit" in rows["waited for"]
    assert "hit rate" in rows["experts: hits / late hits / misses"] and "prefetches / useless" in rows
    assert offload_rows(api.replay(DECODE, **ONE).report) == []
