"""Is rebalancing worth it: drifting traces pay, balanced ones are left alone, the sweep names a period."""

from __future__ import annotations

from typing import Any

import pytest

from moesim import api
from moesim.errors import InputError

TINY: dict[str, Any] = {"model": "tiny-moe", "hardware": "h100-sxm-4"}


def drifting(steps: int = 12) -> list[str]:
    return [f"synthetic:zipf:1.0,tokens=256,steps={steps},seed={seed},phase=decode" for seed in (1, 2)]


def test_the_report_weighs_the_run_against_the_same_passes_without() -> None:
    report = api.rebalance(drifting(), **TINY, policy="periodic:6", planner_s=0.0)
    found = report["verdict"]
    assert found["rebalances"] > 0 and found["moved_bytes"] > 0
    assert found["saved_s"] == pytest.approx(found["without_s"] - found["total_s"])
    assert found["worth_it"] is (found["saved_s"] > 0)
    assert found["balance"]["run"] > found["balance"]["without"]


def test_balanced_routing_is_left_alone() -> None:
    report = api.rebalance(["synthetic:balanced,tokens=256,steps=8,phase=decode"], **TINY, policy="on_drift:0.9")
    assert report["verdict"]["rebalances"] == 0 and report["verdict"]["gain"] == 0.0


def test_the_sweep_moves_less_with_longer_periods() -> None:
    rows = api.rebalance(drifting(), **TINY, policy="never", periods=[3, 9], planner_s=0.0)["sweep"]["rows"]
    assert [row["period"] for row in rows] == [3, 9] and rows[0]["moved_bytes"] >= rows[1]["moved_bytes"] > 0


@pytest.mark.parametrize(("changes", "rule"), [({"policy": "sometimes"}, "sometimes"), ({"mode": "asleep"}, "asleep"), ({"traces": []}, "no trace")])
def test_what_cannot_be_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        api.rebalance(**{"traces": drifting(2), **TINY, **changes})
