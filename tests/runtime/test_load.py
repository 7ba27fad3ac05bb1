"""Requests go on being served while plan after plan is installed: none fails, none is answered differently, memory does not grow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.plan import Plan, linear
from moesim.runtime import client
from tests.runtime.live import EXPERTS, LAYERS, Live, write_config

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    started = Live(write_config(tmp_path_factory.mktemp("load") / "tiny"), "--repeat", "1", "--decode", "7", "--answer-timeout", "60", "--timeout", "60")
    yield started
    assert started.close() == 0
    assert started.stderr_text == ""


def permutation(seed: int) -> Plan:
    return linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=4, kind="random", seed=seed)


def resident(live: Live) -> int:
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in live.pids) * 4096


def check(live: Live, seeds: range) -> list[int]:
    """Install a plan per seed while requests are served; return the memory of all ranks after each."""
    first = client.metrics(live.control)["rank_metrics"]
    sizes, pauses = [], []
    for seed in seeds:
        report = client.apply_plan(live.control, permutation(seed))
        assert report["status"] == "installed" and report["outputs"]["bitwise"] is True
        assert report["pause_parts_ms"]["install_ms"] <= report["pause_ms"]
        pauses.append(report["pause_ms"])
        sizes.append(resident(live))
    last = client.metrics(live.control)["rank_metrics"]
    for before, after in zip(first, last, strict=True):
        assert after["requests"] == 4 * after["waves"] > before["requests"], "requests were served meanwhile, every one to its end"
        assert len({digest for _, digest in after["wave_digests"]}) == 1, "the same requests got other answers"
    assert np.percentile(pauses, 99) < 60_000, pauses
    return sizes


def test_requests_are_answered_alike_while_5_plans_are_installed(live: Live) -> None:
    sizes = check(live, range(5))
    assert sizes[-1] - sizes[0] < 64 << 20


@pytest.mark.slow
def test_requests_are_answered_alike_while_50_plans_are_installed_and_memory_does_not_grow(live: Live) -> None:
    sizes = check(live, range(100, 150))
    slope = float(np.polyfit(np.arange(30), sizes[20:], 1)[0])
    assert slope < 256 << 10, f"memory grows by {slope:.0f} B a migration: {sizes}"
