"""`moesim launch` on real processes: a plan's mesh is served, experts move live, other degrees need a relaunch, templates start the same."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import InputError
from moesim.plan import Parallel, Plan, linear
from moesim.runtime import client
from moesim.runtime.launch import Settings, _told
from moesim.runtime.spec import read_spec
from moesim.traces.open import open_trace
from tests.runtime.live import EXPERTS, LAYERS, Live, moesim, write_config

dist = pytest.mark.dist
FLAGS = ("--repeat", "1", "--decode", "5", "--pace-ms", "20")
MESHES: dict[str, tuple[int, dict[str, int]]] = {"tp2": (4, {"tp": 2}), "pp2": (2, {"pp": 2})}
"""Ranks of a stage and degrees; four processes each."""


def plan_of(ranks: int, seed: int = 1, **degrees: int) -> Plan:
    plan = linear(model="tiny", num_experts=EXPERTS, moe_layer_ids=LAYERS, num_ranks=ranks, kind="random", seed=seed)
    return replace(plan, parallel=Parallel(**degrees))


def replicated(ranks: int, **degrees: int) -> Plan:
    """Six slots a rank of four, twelve of two: replicas and empty slots."""
    table = np.stack([np.random.Generator(np.random.PCG64(row)).permutation(np.concatenate([np.arange(16), np.arange(7), [-1]])) for row in LAYERS])
    slots = np.sort(np.arange(24) % ranks)
    return Plan(model="tiny", num_experts=16, moe_layer_ids=LAYERS, slot_to_expert_LS=table, slot_rank_S=slots, num_ranks=ranks, parallel=Parallel(**degrees))


def launched(folder: Path, plan: Plan, *flags: str) -> Live:
    folder.mkdir(parents=True, exist_ok=True)
    model, path = write_config(folder / "tiny"), folder / "plan.json"
    plan.write(path)
    return Live(model, *FLAGS, *flags, command=[sys.executable, "-m", "moesim", "launch", str(path), "--model", str(model)])


def wave_digests(live: Live) -> list[set[Any]]:
    """Return per rank what its waves were answered with; with --repeat 1 all waves ask the same."""
    return [{digest for _, digest in rank["wave_digests"]} for rank in client.metrics(live.control)["rank_metrics"]]


def await_that(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def await_waves(live: Live, waves: int) -> None:
    await_that(lambda: min(rank["waves"] for rank in client.metrics(live.control)["rank_metrics"]) >= waves)


@pytest.fixture(scope="module", params=MESHES)
def mesh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, str, Path]]:
    """One deployment at a time; pytest runs all tests of one before it starts the other."""
    folder = tmp_path_factory.mktemp(request.param)
    ranks, degrees = MESHES[request.param]
    live = launched(folder, plan_of(ranks, **degrees), "--trace-out", str(folder / "trace"))
    yield live, request.param, folder
    assert live.close() == 0
    assert live.stderr_text == ""


@dist
def test_the_ready_line_names_the_degrees(mesh: tuple[Live, str, Path]) -> None:
    live, which, _ = mesh
    assert live.ready["schema"] == "moesim.launch/1" and len(set(live.pids)) == live.ready["ranks"] == 4
    assert live.ready["parallel"] == {"tp2": {"tp": 2, "ep": 4, "dp": 2, "pp": 1}, "pp2": {"tp": 1, "ep": 2, "dp": 2, "pp": 2}}[which]


ANSWERS: dict[str, list[set[Any]]] = {}


@dist
def test_all_ranks_of_a_replica_give_its_answers_and_all_meshes_the_same(mesh: tuple[Live, str, Path]) -> None:
    live, which, _ = mesh
    await_waves(live, 1)
    found = wave_digests(live)
    replica = [0, 0, 1, 1] if which == "tp2" else [0, 1, 0, 1]
    ANSWERS[which] = [found[replica.index(0)], found[replica.index(1)]]
    assert found == [ANSWERS[which][index] for index in replica] and found[0] != found[-1]
    assert all(answers == ANSWERS[which] for answers in ANSWERS.values())


@dist
def test_experts_and_replicas_move_live_on_a_mesh(mesh: tuple[Live, str, Path]) -> None:
    live, which, _ = mesh
    ranks, degrees = MESHES[which]
    moved = json.loads(live.apply(plan_of(ranks, 7, **degrees)).stdout)
    assert moved["status"] == "installed" and moved["outputs"]["bitwise"] is True
    assert moved["balance"]["after"] == moved["balance"]["predicted"], "the same requests again and again: the prediction must be exact"
    silent = json.loads(live.apply(replicated(ranks)).stdout)
    assert silent["status"] == "installed" and silent["outputs_equal"] is True, "a plan that names no degrees keeps those that run"
    back = json.loads(live.apply(plan_of(ranks, 1, **degrees)).stdout)
    assert back["status"] == "installed" and back["epoch"] == 3
    assert all(len(digests) == 1 for digests in wave_digests(live)), "answers changed"


@dist
def test_other_degrees_need_a_relaunch(mesh: tuple[Live, str, Path]) -> None:
    live, which, _ = mesh
    epoch = client.status(live.control)["rank_status"][0]["epoch"]
    other = {"tp2": (plan_of(4, ep=4, dp=4), plan_of(2, tp=2, pp=2)), "pp2": (plan_of(4, tp=2), plan_of(2, tp=2, pp=2), plan_of(2, dp=2))}[which]
    for plan in other:
        result = live.apply(plan)
        assert result.returncode == 1 and result.stdout == "" and "relaunch" in result.stderr
    assert {status["epoch"] for status in client.status(live.control)["rank_status"]} == {epoch}


@dist
def test_the_trace_names_every_token_once_whatever_the_mesh(mesh: tuple[Live, str, Path]) -> None:
    live, which, folder = mesh
    await_waves(live, 2)
    rows = client.publish_trace(live.control)["rows"]
    trace = open_trace(str(folder / "trace"))
    assert trace.shape.moe_layer_ids == LAYERS and trace.num_rows == rows
    batches = list(trace.batches())
    step, rank = (np.concatenate([getattr(batch, name) for batch in batches]).astype(int) for name in ("step_T", "rank_T"))
    assert np.bincount(step)[:2].tolist() == [2 * 4 * 16, 2 * 4]
    assert set(rank.tolist()) == set(range(MESHES[which][0]))
    names = {pair for batch in batches for pair in zip(batch.request_T.tolist(), batch.position_T.tolist(), strict=True)}
    assert len(names) == rows, "no token twice"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"RANK": ""}, "RANK"), ({"WORLD_SIZE": "3"}, "must be the 4 ranks"), ({"RANK": "4"}, "must be the 4 ranks"), ({"MASTER_ADDR": ""}, "MASTER_ADDR")],
)
def test_an_environment_that_does_not_fit_the_plan_is_refused(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    settings = Settings(spec=read_spec(str(write_config(tmp_path / "tiny"))), plan=plan_of(2, pp=2), launcher="env")
    told = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "there", "MASTER_PORT": "29500"}
    assert _told(settings, told) == (3, ("there", 29501))
    with pytest.raises(InputError, match=message):
        _told(settings, {**told, **changes})


def test_launch_refuses_what_it_cannot_serve_before_anything_starts(tmp_path: Path) -> None:
    model, path = write_config(tmp_path / "tiny"), tmp_path / "plan.json"
    for plan, message in ((plan_of(4, tp=3), "parallel.tp"), (plan_of(2, expert_tp=2), "expert_tp"), (plan_of(2, pp=4), "without a MoE layer")):
        plan.write(path)
        result = moesim("launch", str(path), "--model", str(model))
        assert result.returncode == 2 and message in result.stderr and result.stdout == ""
