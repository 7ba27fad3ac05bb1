"""One agent, told over a real store what a coordinator would say, at moments that a busy machine makes possible and that a quiet one hardly ever meets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("transformers", reason="the model needs transformers")

import torch.distributed as dist  # noqa: E402

from moesim.runtime import failpoints  # noqa: E402
from moesim.runtime.agent import Agent  # noqa: E402
from moesim.runtime.model import build_distributed  # noqa: E402
from tests.runtime.inside import SPEC, plan_of  # noqa: E402

OLD, NEW = plan_of(num_ranks=1), plan_of(0, num_ranks=1)


class Alone:
    """An agent of a deployment of one rank, and the store through which it is told."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        _, layers = build_distributed(SPEC, OLD, rank=0, group=None, slot_capacity=8)
        self.agent = Agent(
            rank=0, host="127.0.0.1", port=self.store.port, layers=layers, plan=OLD, fingerprint="f" * 64, probe=lambda: np.zeros(1),
        )  # fmt: skip
        self.agent.start()
        self.told = 0

    def tell(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Give the next command and return the answer to it."""
        number, self.told = self.told, self.told + 1
        self.store.set(f"cmd/{number}", json.dumps({"kind": kind, "n": number, **fields}))
        return self._answer(f"rep/{number}/0")

    def decide(self, action: str, step: int, **fields: Any) -> int:
        """Let it promise `action` and decide it for `step`; return the number of the command."""
        number = self.told
        assert self.tell("schedule", action=action, **fields)["ok"]
        self.store.set(f"decide/{number}", str(step))
        return number

    def acted(self, number: int) -> dict[str, Any]:
        """Return what it said after it had carried out command `number`."""
        return self._answer(f"act/{number}/0")

    def _answer(self, key: str) -> dict[str, Any]:
        deadline = time.monotonic() + 10
        while not self.store.check([key]):
            assert time.monotonic() < deadline, f"no {key}"
            time.sleep(0.002)
        return dict(json.loads(self.store.get(key)))

    def stage(self) -> None:
        """Let it stage NEW."""
        self.store.set("plan/1", json.dumps(NEW.stamped()))
        assert self.tell("stage", apply=1)["ok"]


@pytest.fixture
def alone() -> Iterator[Alone]:
    one = Alone()
    yield one
    one.agent.close()


def test_a_promise_that_was_given_after_the_rank_had_left_does_not_bind_it_in_the_new_group(alone: Alone) -> None:
    alone.agent.left(1, 0.0)
    alone.decide("install", 7, epoch=1)
    alone.agent.regroup(rank=0, plan=OLD, epoch=1, step=7)
    assert alone.agent.at_step_boundary() and alone.agent.step == 7 and alone.agent.plan is OLD


def test_what_is_staged_is_kept_until_it_is_installed_though_the_apply_has_ended(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.stage()
    number = alone.decide("install", 0, epoch=1)
    said: list[dict[str, Any]] = []

    def finish_meanwhile(name: str) -> bool:
        if name == "write.mapped":
            said.append(alone.tell("finish"))
        return False

    monkeypatch.setattr(failpoints, "hit", finish_meanwhile)
    assert alone.agent.at_step_boundary() and said[0]["ok"]
    assert alone.acted(number)["ok"] and alone.agent.plan.map_sha256 == NEW.map_sha256
    assert alone.agent._migration is None, "the buffers go as soon as they are not needed"


@pytest.mark.parametrize("early", [True, False], ids=["before the step", "after it"])
def test_staging_buffers_go_once(alone: Alone, early: bool) -> None:
    alone.stage()
    number = alone.decide("install", 0, epoch=1)
    if early:
        assert alone.tell("finish")["ok"] and alone.agent._migration is not None, "they are needed for what has been promised"
    assert alone.agent.at_step_boundary() and alone.acted(number)["ok"]
    assert early == (alone.agent._migration is None)
    assert alone.tell("finish")["ok"] and alone.agent._migration is None
