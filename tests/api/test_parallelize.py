"""The search of parallel degrees through its one door."""

from __future__ import annotations

from typing import Any

import pytest

from moesim import api
from moesim.errors import InfeasibleError, InputError

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
