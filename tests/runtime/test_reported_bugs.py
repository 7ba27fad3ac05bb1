"""Bugs that other systems were reported to have when experts move live, one test each against this runtime; names tell the report."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the runtime needs transformers")

from moesim.errors import ApplyError, InputError, ModelError, PlanError  # noqa: E402
from moesim.plan import Parallel, Plan  # noqa: E402
from moesim.runtime import agent as agent_module  # noqa: E402
from moesim.runtime import client, failpoints, migration, moves  # noqa: E402
from moesim.runtime.deployment import Deployment  # noqa: E402
from moesim.runtime.expert_parallel import ExpertParallelExperts  # noqa: E402
from moesim.runtime.migration import Migration, live_digests  # noqa: E402
from moesim.runtime.model import build_distributed, expert_tensor, skeleton  # noqa: E402
from moesim.runtime.slot_map import SlotMap  # noqa: E402
from tests.runtime.inside import EXPERTS, SPEC, Inside, inside, plan_of  # noqa: E402
from tests.runtime.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with inside(tmp_path_factory.mktemp("bugs")) as started:
        yield started


class Silent:
    """Stands for a rank that answers every command but one, as a rank does that is stuck for ever."""

    def __init__(self, deployment: Deployment, mute: str) -> None:
        self.deployment, self.mute, self.stopped = deployment, mute, threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        number = 0
        while not self.stopped.is_set():
            text = self.deployment.get(f"cmd/{number}")
            if text is None:
                time.sleep(0.002)
                continue
            number += 1
            command = json.loads(text)
            if command["kind"] != self.mute:
                self.deployment.store.set(f"rep/{command['n']}/0", json.dumps({"ok": True, "limit": 1, "step": 1}))


@pytest.mark.parametrize("phase", ["check", "status", "window", "digests", "stage", "schedule", "finish", "metrics"])
def test_vllm_57883_no_phase_outlives_its_deadline_without_an_error_and_a_count(phase: str) -> None:
    deployment = Deployment("127.0.0.1", 1, answer_s=0.2)
    deployment.pids = [os.getpid()]
    rank = Silent(deployment, phase)
    try:
        begin = time.monotonic()
        with pytest.raises(ApplyError, match=r"rank 0 .pid \d+. did not answer .* within 0.2 s; it hangs or is stopped"):
            deployment.schedule("install") if phase == "schedule" else deployment.ask(phase)
        assert 0.2 <= time.monotonic() - begin < 5
        assert deployment.late == {phase: 1}, "health must not stay green"
    finally:
        rank.stopped.set()
        rank.thread.join()


def test_vllm_57883_the_control_port_shows_what_was_late(live: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live.deployment, "answer_s", 0.3)
    with live.agents[1]._lock, pytest.raises(ApplyError, match="did not answer"):
        client.apply_plan(live.address, plan_of(1))
    monkeypatch.undo()
    assert live.serves()
    shown = client.metrics(live.address)
    assert shown["late"] and shown["applies"]["failed"] >= 1


def _swap_512(rank: int, size: int, group: Any, folder: str) -> tuple[int, int, bool]:
    import torch.distributed as dist

    moves.LARGE_BYTES = 1  # every expert is a message of its own
    spec = replace(SPEC, config={**SPEC.config, "num_local_experts": 512, "hidden_size": 8, "intermediate_size": 4}, num_experts=512)
    old, new = (plan_of(seed, num_experts=512) for seed in (None, 1))
    _, layers = build_distributed(spec, old, rank=rank, group=group)
    change = Migration(layers, old, new, rank=rank)
    under_way, most, posted = [0], [0], [0]
    post, complete = change._post, change._complete

    def counted_post(*args: Any) -> Any:
        under_way[0] += 1
        posted[0] += 1
        most[0] = max(most[0], under_way[0])
        return post(*args)

    def counted_complete(*args: Any) -> None:
        complete(*args)
        under_way[0] -= 1

    setattr(change, "_post", counted_post)  # noqa: B010
    setattr(change, "_complete", counted_complete)  # noqa: B010
    change.stage(dist.PrefixStore("p2p", dist.FileStore(folder, size)), "127.0.0.1")
    change.install(1)
    first, last = layers[0].slot_map.local(rank)
    wanted = new.slot_to_expert_LS[:, first:last]
    right = all(
        torch.equal(layer.tensor(name)[slot], expert_tensor(spec, row, int(wanted[row, slot]), name, layer.shapes[name], layer.is_transposed))
        for name in ("down_proj",) for row, layer in enumerate(layers) for slot in range(last - first)
    )  # fmt: skip
    return most[0], posted[0], right


def test_sglang_30829_and_7956_hundreds_of_transfers_go_in_small_numbers_at_a_time(tmp_path: Path) -> None:
    for most, posted, right in run_ranks(2, _swap_512, str(tmp_path / "store")):
        assert posted >= 512 and most <= moves.MAX_OPS == 32 and right


def test_vllm_34646_37217_47588_48355_a_tensor_that_would_stay_behind_is_refused(live: Inside) -> None:
    layer = live.layers[0][0]
    layer.register_buffer("gate_up_proj_scale", torch.ones(layer.held_slots, 1))
    try:
        with pytest.raises(ApplyError, match=r"gate_up_proj_scale .* has an expert dimension and is not registered"):
            client.apply_plan(live.address, plan_of(1))
    finally:
        del layer.gate_up_proj_scale
    assert live.maps() == {live.plan.map_sha256} and live.serves()


def test_trtllm_18581_the_digest_is_of_what_the_slot_holds_whatever_its_layout_in_memory() -> None:
    old, new = (plan_of(seed, num_ranks=1) for seed in (None, 1))
    _, layers = build_distributed(SPEC, old, rank=0, group=None)
    for layer in layers:  # the same numbers, stored the other way round
        layer.gate_up_proj.data = layer.gate_up_proj.data.transpose(1, 2).contiguous().transpose(1, 2)
        assert not layer.gate_up_proj[0].is_contiguous()
    _, plain = build_distributed(SPEC, old, rank=0, group=None)
    by_expert = {(item["row"], item["expert"]): item["digest"] for item in live_digests(plain)}
    assert {(item["row"], item["expert"]): item["digest"] for item in live_digests(layers)} == by_expert
    _install(layers, old, new)
    assert {(item["row"], item["expert"]): item["digest"] for item in live_digests(layers)} == by_expert
    _check_weights(layers, new)


def test_sglang_ascend_603_wrong_output_after_a_move_is_noticed_and_undone(live: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESIM_TEST_FAILPOINTS", "1")
    failpoints.arm("install.begin", "flip")
    report = client.apply_plan(live.address, plan_of(2))
    assert report["status"] == "rolled_back" and report["outputs_equal"] is False or "digests differ" in report["reason"]
    assert live.maps() == {live.plan.map_sha256} and live.serves(), "the answers are what they were"


def _install(layers: list[ExpertParallelExperts], old: Plan, new: Plan) -> None:
    change = Migration(layers, old, new, rank=0)
    change.stage(None, "")
    change.install(1)


def _check_weights(layers: list[ExpertParallelExperts], plan: Plan) -> None:
    for row, layer in enumerate(layers):
        for slot, expert in enumerate(plan.slot_to_expert_LS[row].tolist()):
            for name in layer.tensor_names if expert >= 0 else ():
                assert torch.equal(layer.tensor(name)[slot], expert_tensor(SPEC, row, expert, name, layer.shapes[name], layer.is_transposed))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6), st.integers(0, 6))
def test_vllm_18343_every_slot_is_filled_where_an_expert_is_on_a_rank_more_than_once(seed: int, extra: int, more: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    plans = []
    for count in (extra, more):
        table = np.stack([generator.permutation(np.concatenate([np.arange(EXPERTS), generator.integers(-1, EXPERTS, count)])) for _ in range(2)])
        plans.append(replace(plan_of(num_ranks=1), slot_to_expert_LS=table, slot_rank_S=np.zeros(EXPERTS + count, int)))
    _, layers = build_distributed(SPEC, plans[0], rank=0, group=None, slot_capacity=EXPERTS + 6)
    _install(layers, *plans)
    _check_weights(layers, plans[1])


def test_prime_rl_3583_weights_loaded_after_a_move_go_by_the_placement_of_now(tmp_path: Path) -> None:
    from moesim.runtime.checkpoint import _tensors
    from moesim.runtime.mesh import Mesh
    from moesim.runtime.model import build_part

    old, new = (plan_of(seed, num_ranks=1) for seed in (None, 1))
    mesh = Mesh.flat(rank=0, size=1, group=None)
    held = build_part(SPEC, old, mesh)
    _install(held.experts, old, new)
    reloaded = 0
    with torch.no_grad():
        for key, row, _ in _tensors(held, mesh, None):
            if ".experts." in key:
                row.fill_(float(key.split(".")[3]))  # a checkpoint in which every expert is full of its own number
                reloaded += 1
    assert reloaded == 2 * EXPERTS * 2
    for index, layer in enumerate(held.experts):
        assert layer.tensor("down_proj")[:, 0, 0].tolist() == new.slot_to_expert_LS[index].tolist()


def test_vllm_47206_small_slots_cost_a_time_each_not_only_bytes() -> None:
    from moesim.hardware.load import load_cluster
    from moesim.sim.migration import MigrationSettings, price_of

    cluster = load_cluster("h100-sxm-8")
    slow = MigrationSettings(mode="pause", message_s=10e-3)
    one, small = (price_of(cluster, chosen, 1.0, 0.0).slot_s for chosen in (slow, MigrationSettings(mode="pause")))
    assert 1664 * one == pytest.approx(1664 * (small - MigrationSettings().message_s + 10e-3)) and 16 < 1664 * one < 21
    assert small >= MigrationSettings().message_s


def test_vllm_28369_a_plan_is_worked_out_once_on_the_host_and_not_while_serving(live: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real: Any = SlotMap.of

    def counted(name: str, made: Any) -> Any:
        calls.append(name)
        return made

    monkeypatch.setattr(migration, "moves_between", lambda *plans: counted("moves", moves.moves_between(*plans)))
    monkeypatch.setattr(SlotMap, "of", lambda *args: counted("map", real(*args)))
    assert client.apply_plan(live.address, plan_of(3))["status"] == "installed"
    assert calls.count("moves") == 2 and calls.count("map") == 2 * 2, "once per rank, and once per rank and layer"
    assert live.serves() and len(calls) == 6, "serving looks tables up and computes none"
    client.apply_plan(live.address, live.plan)


def test_trtllm_18626_what_cannot_be_done_is_refused_not_ignored(live: Inside, tmp_path: Path) -> None:
    from moesim.runtime.launch import Settings, serve

    tp = replace(plan_of(), parallel=Parallel(tp=2))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"on_death": "shrink", "plan": tp}, "parallel.tp"), ({"on_death": "shrink", "launcher": "torchrun"}, "--launcher"),
        ({"on_death": "retry"}, "--on-death"), ({"slots_per_rank": 1}, "--slots-per-rank"),
    )  # fmt: skip
    for broken, message in cases:
        with pytest.raises(InputError, match=message):
            serve(Settings(**{"spec": SPEC, "plan": plan_of(), **broken}))
    acting = replace(plan_of(1), policies={"router": "top_p:0.4"})
    for plan, message in ((replace(plan_of(1), parallel=Parallel(expert_tp=2)), "expert_tp"), (tp, "relaunch"), (acting, "policies")):
        with pytest.raises((ApplyError, PlanError), match=message):
            client.apply_plan(live.address, plan)
    template: Any = skeleton(SPEC)
    experts = template.model.layers[0].mlp.experts
    experts.register_parameter("down_proj_scale", torch.nn.Parameter(torch.ones(EXPERTS, device="meta")))
    with pytest.raises(ModelError, match="down_proj_scale"):
        ExpertParallelExperts(experts, SlotMap.of(plan_of(num_ranks=1), 0, 0), rank=0)


def test_gloo_520_a_wait_that_no_timeout_ends_is_ended_by_our_own_watchdog(live: Inside, monkeypatch: pytest.MonkeyPatch) -> None:
    """The serving thread is stuck in a dead group; the agent's thread ends the process and leaves the reason."""
    ended: list[int] = []

    def leave(code: int) -> None:
        ended.append(code)
        threading.Event().wait()  # the real one ends the process

    monkeypatch.setattr(agent_module, "LEAVE_S", 0.2)
    monkeypatch.setattr(os, "_exit", leave)
    _, layers = build_distributed(SPEC, plan_of(num_ranks=1), rank=0, group=None)
    deployment = Deployment("127.0.0.1", 1)
    stuck = agent_module.Agent(
        rank=0, host="127.0.0.1", port=deployment.store.port, layers=layers, plan=plan_of(num_ranks=1), fingerprint="f" * 64, probe=lambda: np.zeros(1),
    )  # fmt: skip
    stuck.start()
    deployment.store.set("leave/0", "rank 1 is gone")
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == [5]
    assert "its serving thread did not leave a broken group within 0.2 s" in str(deployment.get("down/0"))
