"""The search of parallel degrees through its one door."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moesim import api
from moesim.errors import InfeasibleError, InputError
from moesim.model import load_model
from moesim.plan import Plan

SMALL: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-4", "prompt_tokens": 512, "output_tokens": 64, "modes": ("mixed",)}


def test_the_search_is_complete_and_says_why_the_runner_up_lost() -> None:
    report = api.parallelize(**SMALL)
    assert report["status"] == "OPTIMAL" and report["best"]["devices"] == 4 and report["reasons"]
    assert report["best"]["output_tokens_per_s_per_gpu"] == max(point["output_tokens_per_s_per_gpu"] for point in report["front"])


def test_skewed_loads_of_a_trace_cost_throughput() -> None:
    balanced = api.parallelize(**{**SMALL, "hardware": "h100-sxm-4"}, routing="balanced")["front"]
    traced = api.parallelize(**SMALL, routing="synthetic:zipf:1.5,tokens=512")["front"]
    assert max(p["output_tokens_per_s_per_gpu"] for p in traced) <= max(p["output_tokens_per_s_per_gpu"] for p in balanced) * (1 + 1e-9)


def test_an_impossible_service_level_is_infeasible_with_the_nearest() -> None:
    with pytest.raises(InfeasibleError, match="TPOT"):
        api.parallelize(**SMALL, tpot_ms=0.001)


def test_unknown_routing_is_refused() -> None:
    with pytest.raises(InputError):
        api.parallelize(**SMALL, routing="absent-trace")


def test_the_plan_has_the_degrees_and_slots_of_the_best_deployment(tmp_path: Path) -> None:
    report = api.parallelize(**SMALL, routing="zipf:1.0", plan_path=tmp_path / "plan.json")
    (written,), (pool,) = report["plans"], report["best"]["pools"]
    plan, model = Plan.read(Path(written["path"])), load_model("flame-moe-290m")
    assert Path(written["path"]) == tmp_path / "plan.json" and plan.sha256 == written["sha256"]
    assert {name: getattr(plan.parallel, name) for name in pool["parallel"]} == pool["parallel"]
    assert plan.num_slots == pool["slots_per_rank"] * plan.num_ranks and plan.num_ranks == pool["parallel"]["ep"]
    assert plan.fingerprints["model"] == model.sha256 and plan.moe_layer_ids == model.moe_layer_ids


def test_two_pools_give_two_plans(tmp_path: Path) -> None:
    report = api.parallelize(**{**SMALL, "modes": ("disaggregated",)}, plan_path=tmp_path / "split.json")
    assert [one["role"] for one in report["plans"]] == ["prefill", "decode"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["split.decode.json", "split.prefill.json"]
    assert [Plan.read(Path(one["path"])).result["instances"] for one in report["plans"]] == [pool["instances"] for pool in report["best"]["pools"]]


def test_without_a_path_no_plan_is_written() -> None:
    assert api.parallelize(**SMALL)["plans"] == []


def test_a_request_trace_gives_lengths_and_demand(tmp_path: Path) -> None:
    trace = tmp_path / "requests.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,10\n1.0,200,20\n2.0,303,33\n")
    options: dict[str, Any] = {"model": "flame-moe-290m", "hardware": "h100-sxm-2", "modes": ("mixed",)}
    taken = api.parallelize(requests=str(trace), **options)
    given = api.parallelize(prompt_tokens=201, output_tokens=21, arrival_rps=1.5, **options)
    assert taken["best"] == given["best"] and taken["requests"] == str(trace)
    with pytest.raises(InputError, match="--requests"):
        api.parallelize(**options)
