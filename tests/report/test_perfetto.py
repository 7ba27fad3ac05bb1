"""Timelines: every arrow has both ends inside of slices, time never runs back, serial tracks never overlap, nothing depends on the process."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim import api
from moesim.report import perfetto
from moesim.sim.evaluate import evaluate
from moesim.sim.ledger import Ledger
from moesim.sim.ops import Program

TRACE = "synthetic:zipf:1.0,tokens=256,steps=3"


def run(hardware: str = "h100-sxm-8", **settings: str) -> api.Replay:
    return api.replay(TRACE, model="flame-moe-290m", hardware=hardware, settings=settings, seed=1)


def written(replay: api.Replay, folder: Path) -> list[dict[str, Any]]:
    perfetto.write_timeline(replay.ledger, folder / "timeline.json")
    node = json.loads((folder / "timeline.json").read_bytes())
    assert set(node) == {"traceEvents", "displayTimeUnit"}
    return list(node["traceEvents"])


@pytest.mark.parametrize("settings", [{}, {"micro_batches": "2", "shared_experts": "beside_dispatch"}, {"attention_tp": "4"}])
def test_a_timeline_is_what_the_format_asks_for(tmp_path: Path, settings: dict[str, str]) -> None:
    events = written(run(**settings), tmp_path)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == [f"rank {rank}" for rank in range(8)]
    assert {"comm", "compute", "port scale_up.in", "port scale_up.out"} == set(names.values())
    timed = [event for event in events if event["ph"] != "M"]
    stamps = [event["ts"] for event in timed]
    assert stamps == sorted(stamps) and stamps[0] >= 0
    slices = defaultdict(list)
    for event in timed:
        if event["ph"] == "X":
            assert event["dur"] > 0 and set(event["args"]) == {"step", "layer"}
            slices[event["pid"], event["tid"]].append((event["ts"], event["ts"] + event["dur"]))
    for track in slices.values():
        for (_, end), (begin, _) in zip(track, track[1:], strict=False):
            assert begin >= end - 1e-3, "a serial track overlaps (1 ns is the rounding)"
    assert set(slices) == set(names), "a named track is empty"
    check_arrows(timed, slices)


def check_arrows(timed: list[dict[str, Any]], slices: dict[Any, list[tuple[float, float]]]) -> None:
    starts = {event["id"]: event for event in timed if event["ph"] == "s"}
    ends = {event["id"]: event for event in timed if event["ph"] == "f"}
    assert starts and set(starts) == set(ends) and len(starts) == sum(event["ph"] == "s" for event in timed)
    for number, start in starts.items():
        end = ends[number]
        assert start["ts"] <= end["ts"] and start["pid"] != end["pid"] and start["name"] == end["name"] and end["bp"] == "e"
        for event in (start, end):
            track = slices[event["pid"], event["tid"]]
            assert any(begin - 1e-3 <= event["ts"] <= over + 1e-3 for begin, over in track[:]), "an arrow ends outside of any slice"


def test_the_slices_of_a_rank_are_its_time(tmp_path: Path) -> None:
    replay = run()
    spent: dict[int, float] = defaultdict(float)
    for event in written(replay, tmp_path):
        if event["ph"] == "X" and event["tid"] < 2:
            spent[event["pid"]] += event["dur"] * 1e-6
    table = sum(replay.ledger.lane_s.values())
    assert [spent[rank] for rank in range(8)] == pytest.approx(np.asarray(table).tolist(), rel=1e-4)


def test_counters_stand_for_tiers_and_loads(tmp_path: Path) -> None:
    replay = run()
    counters = defaultdict(list)
    for event in written(replay, tmp_path):
        if event["ph"] == "C":
            counters[event["name"]].append((event["ts"], event["pid"], event["args"]["value"]))
    assert len(counters) == 3 and any("bytes of weights" in name for name in counters)
    loads = [value for name, rows in counters.items() if "rank load" in name for _, _, value in rows]
    assert sum(loads) == replay.load_LE.sum()
    resident = [value for name, rows in counters.items() if "bytes of weights" in name for _, _, value in rows]
    assert max(resident) <= sum(replay.report["memory"].values())


def test_large_groups_draw_only_the_messages_that_all_wait_for(tmp_path: Path) -> None:
    program = Program(16)
    work = program.local("experts", np.arange(16) * 1e-3 + 1e-3)
    program.collective("dispatch", np.full(16, 1e-3), np.full(16, 1e-3), group_R=np.arange(16) // 12, port="scale_up", deps=[work])
    ledger = Ledger(16)
    ledger.record(program, evaluate(program, 0.0), steps=[0], begin_s=0.0)
    arrows = [event for event in perfetto.timeline_events(ledger) if event["ph"] == "s"]
    assert [event["pid"] for event in arrows].count(11) == 11, "rank 11 arrives last in the group of 12"
    assert len(arrows) == 11 + 4 * 3


def test_events_are_bounded_by_whole_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    replay = run()
    whole = len(written(replay, tmp_path))
    monkeypatch.setattr(perfetto, "MAX_EVENTS", whole // 2)
    events = written(replay, tmp_path)
    assert 0 < len(events) <= whole // 2 + 100
    assert {event["args"]["step"] for event in events if event["ph"] == "X"} == {0}


def test_a_run_of_hooks_and_absent_ranks_is_drawn(tmp_path: Path) -> None:
    program = Program(2)
    here = np.array([True, False])
    first = program.local("load", np.zeros(2), lane="copy", port="host.in", ranks_R=here, decide=lambda ready: np.array([2e-3, 0.0]))
    program.local("experts", np.full(2, 1e-3), deps=[first])
    ledger = Ledger(2)
    ledger.record(program, evaluate(program, 0.0), steps=[0], begin_s=0.0)
    slices = [(e["pid"], e["name"], e["ts"], e["dur"]) for e in perfetto.timeline_events(ledger) if e["ph"] == "X" and e["tid"] < 2]
    assert sorted(slices) == [(0, "experts", 2000.0, 1000.0), (0, "load", 0.0, 2000.0), (1, "experts", 0.0, 1000.0)]
    assert ledger.lane_s["copy"].tolist() == [2e-3, 0.0]
