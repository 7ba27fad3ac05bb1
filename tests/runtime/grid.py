"""The fault grid: every point of the protocol × what happens there × to whom, and what must hold afterwards.

Two placements A and B differ by one expert per layer that changes between ranks 0 and 1, so that one sends, one receives and
ranks 2 and 3 stand by. A cell arms one fault, applies the other placement under traffic, and checks the deployment that is left:
that of all ranks, that of the survivors, or one started again from the journal where the coordinator died.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.plan import Plan
from moesim.runtime import client
from moesim.runtime.control import call
from moesim.runtime.journal import Journal
from moesim.runtime.recovery import shrunk
from tests.runtime.live import LAYERS, Forked, Result, await_gone

RANKS, SLOTS = 4, 5
CAPACITY = 8
ROLES = ("sender", "receiver", "bystander")
ACTIONS = ("raise", "kill", "stop")
POINTS = {
    "check.asked": ("CHECK", 0), "check.answered": ("CHECK", 0), "probe.end": ("CHECK", 0), "stage.begin": ("STAGE", 0), "stage.posted": ("STAGE", 0),
    "stage.batch": ("STAGE", 0), "stage.staged": ("STAGE", 0), "stage.answered": ("READY", 0), "install.asked": ("DECIDE", 0),
    "install.answered": ("DECIDE", 0), "install.begin": ("INSTALL", 0), "write.mapped": ("INSTALL", 0), "install.end": ("INSTALL", 0),
    "probe.end again": ("VERIFY", 1), "digests.asked again": ("VERIFY", 1), "finish.asked": ("END", 0),
}  # fmt: skip
"""Failpoint of a rank → phase, and hits that come before the one meant."""
COORDINATOR = {
    "checked": "CHECK", "prepare": "PREPARE", "prepared": "PREPARE", "ready": "READY", "commit.decide": "DECIDE", "commit.written": "DECIDE",
    "install.announced": "DECIDE", "probed": "VERIFY", "verified": "END",
}  # fmt: skip
BUSY = ("stage.posted", "stage.batch")
"""Points that a rank without anything to send or receive does not come to."""
OLD, NEW, EITHER = {"old"}, {"new"}, {"old", "new"}


@dataclass(frozen=True)
class Cell:
    """One fault."""

    role: str
    point: str
    action: str

    @property
    def name(self) -> str:
        """For pytest and the report."""
        return f"{self.phase}-{self.role}-{self.point.replace(' ', '_')}-{self.action}"

    @property
    def phase(self) -> str:
        """Phase of the protocol."""
        return COORDINATOR[self.point] if self.role == "coordinator" else POINTS[self.point][0]

    @property
    def loses_a_rank(self) -> bool:
        """Whether the rank is gone afterwards: by signal, or because the error was in a thread that it cannot do without."""
        if self.role == "coordinator":
            return False
        threads = ("check.answered", "install.answered", "probe.end", "install.begin", "write.mapped", "install.end", "probe.end again")
        return self.action != "raise" or self.point in threads

    @property
    def sides(self) -> set[str]:
        """Placements that may be in force afterwards."""
        if self.role == "coordinator":
            if self.action == "stop":
                return NEW
            written = list(COORDINATOR).index(self.point) >= list(COORDINATOR).index("commit.written")
            if self.action == "kill":
                return NEW if written else OLD
            return NEW if self.point in ("install.announced", "verified") else OLD
        if self.action == "raise":
            if self.point in ("stage.answered", "finish.asked"):
                return NEW
            if self.point == "digests.asked again":
                return OLD
        if self.point == "install.answered":
            return EITHER
        return NEW if list(POINTS).index(self.point) > list(POINTS).index("install.answered") else OLD

    @property
    def exit_code(self) -> int:
        """Of `moesim apply`."""
        if self.role == "coordinator":
            return int(self.action != "stop")
        return int(not (self.point == "finish.asked" or (self.point == "stage.answered" and self.action == "raise")))


CELLS = [Cell(role, point, action) for point in POINTS for role in ROLES for action in ACTIONS if role != "bystander" or point not in BUSY]
CELLS += [Cell("coordinator", point, action) for point in COORDINATOR for action in ACTIONS]


def one_per_point() -> set[Cell]:
    """Return one cell for every point, roles and actions in turn."""
    chosen = set()
    for index, point in enumerate(POINTS):
        cells = [cell for cell in CELLS if cell.point == point and cell.role != "coordinator"]
        chosen.add(cells[(4 * index) % len(cells)])
    for index, point in enumerate(COORDINATOR):
        chosen.add(Cell("coordinator", point, ACTIONS[index % 2]))
    return chosen


def placement(second: bool) -> Plan:
    """Return A or B: four experts and an empty slot per rank, but expert `layer` of rank 0 is on rank 1 in B."""
    table = np.full((len(LAYERS), RANKS, SLOTS), -1)
    table[:, :, :4] = np.arange(16).reshape(RANKS, 4)
    if second:
        for row in range(len(LAYERS)):
            table[row, 1, 4], table[row, 0, row] = row, -1
    return Plan(
        model="tiny", num_experts=16, moe_layer_ids=LAYERS, slot_to_expert_LS=table.reshape(len(LAYERS), -1), slot_rank_S=np.repeat(np.arange(RANKS), SLOTS),
        num_ranks=RANKS,
    )  # fmt: skip


class Bench:
    """Keeps a deployment from cell to cell, and starts another where a cell has used it up."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.second, self.number = folder, False, 0
        self.live: Forked | None = None
        self.answers: dict[int, str] = {}
        """Seat → digest of its wave of requests, the same in all deployments and placements."""

    def deployment(self) -> Forked:
        """Return a deployment of all ranks; `self.second` says which placement it runs."""
        if self.live is None:
            self.number += 1
            self.second = False
            self.live = self.start(placement(False))
        return self.live

    def start(self, plan: Plan) -> Forked:
        """Start a deployment with the journal of the current number."""
        return Forked(self.folder / str(self.number), plan=plan, on_death="shrink", journal=self.journal, slots_per_rank=CAPACITY)

    @property
    def journal(self) -> Path:
        """Of the current deployment."""
        return self.folder / f"journal-{self.number}"

    def close(self) -> None:
        """Stop the deployment, if there is one."""
        if self.live is not None:
            live, self.live = self.live, None
            live.close()

    def abandon(self) -> str:
        """Kill a deployment that did not behave; its ranks go with it. Return what it wrote for people."""
        said = ""
        if self.live is not None:
            live, self.live = self.live, None
            said = live.stderr()[-6000:]
            live.process.kill()
            live.process.wait()
            live.process.stdout.close()
            live.errors.close()
        return said

    def check(self, live: Forked, wanted: dict[str, Plan], seats: list[int]) -> set[str]:
        """Wait until the ranks of `seats` serve; assert one epoch, one map, unchanged answers, and a journal that agrees. Return whose map it is."""
        deadline = time.monotonic() + 20
        while True:
            status = client.status(live.control)
            assert "cannot serve on" not in (status["reason"] or ""), status["reason"]
            if status["state"] == "serving" and status["ranks"] == len(seats) and None not in status["rank_status"]:
                break
            assert time.monotonic() < deadline, status
            time.sleep(0.01)
        before = client.metrics(live.control)["rank_metrics"]
        while True:
            after = client.metrics(live.control)["rank_metrics"]
            status = client.status(live.control)
            epochs, maps = ({rank[name] for rank in after} for name in ("epoch", "map_sha256"))
            maps.add(status["map_sha256"])
            served = all(new["waves"] > old["waves"] for old, new in zip(before, after, strict=True))
            if served and len(epochs) == len(maps) == 1:  # within a few steps of a decision
                break
            assert time.monotonic() < deadline, f"stands still or stays mixed: epochs {epochs}, maps {maps}"
            time.sleep(0.02)
        sides = {side for side, plan in wanted.items() if {plan.map_sha256} == maps}
        assert sides, "neither the old nor the new map"
        for seat, rank in zip(seats, after, strict=True):
            found = {digest for _, digest in rank["wave_digests"]}
            assert found == {self.answers.setdefault(seat, min(found))}, f"answers of seat {seat} changed"
        assert installed(self.journal) in {plan.map_sha256 for plan in wanted.values()} & maps, "the journal names another map"
        return sides

    def run(self, cell: Cell) -> dict[str, Any]:
        """Do what `cell` says and check what is left; return what happened."""
        live = self.deployment()
        while not self.answers:
            ranks = client.metrics(live.control)["rank_metrics"]
            if all(rank["waves"] for rank in ranks):
                self.answers = {seat: rank["wave_digests"][0][1] for seat, rank in enumerate(ranks)}
        old, new = placement(self.second), placement(not self.second)
        rank = {"sender": int(self.second), "receiver": int(not self.second), "bystander": 2}.get(cell.role, -1)
        skip = 0 if rank < 0 else POINTS[cell.point][1]
        target: Any = rank if rank >= 0 else "coordinator"
        call(live.control, "failpoint", rank=target, name=cell.point.removesuffix(" again"), action=cell.action, skip=skip)
        begin = time.monotonic()
        result = self._apply(live, new, cell)
        seconds = time.monotonic() - begin
        assert result.returncode == cell.exit_code, result
        assert "Traceback" not in result.stderr and (cell.exit_code == 0 or result.stderr.startswith("moesim: ")), result.stderr
        assert seconds < 20, f"took {seconds:.1f} s"
        seats, wanted = list(range(RANKS)), {"old": old, "new": new}
        if cell.role == "coordinator" and cell.action == "kill":
            assert live.process.wait(20) == -signal.SIGKILL and await_gone(live.pids, 5) == [], "ranks outlived the coordinator"
            live.close()
            self.live = live = self.start(placement(False))
        elif cell.loses_a_rank:
            seats.remove(rank)
            wanted = {side: shrunk(plan, seats, CAPACITY) for side, plan in wanted.items()}
            if cell.exit_code:
                word = {"kill": "killed by SIGKILL", "stop": "hangs or is stopped", "raise": ""}[cell.action]
                assert f"rank {rank}" in result.stderr and word in result.stderr, result.stderr
        sides = self.check(live, wanted, seats)  # both, where the survivors of either make the same map
        assert sides & cell.sides, f"the {sides} placement is in force after {result.stderr or 'an installed plan'}"
        side = min(sides & cell.sides)
        if cell.loses_a_rank:
            assert [lost["seat"] for lost in client.status(live.control)["lost"]] == [rank]
            self.close()
        elif side == "new":
            self.second = not self.second
        return {"outcome": side, "ranks": len(seats), "seconds": round(seconds, 2), "reason": result.stderr.strip().split("\n")[-1][:160]}

    def _apply(self, live: Forked, plan: Plan, cell: Cell) -> Result:
        """Apply `plan`; a coordinator that was stopped goes on half a second later."""
        if cell.role != "coordinator" or cell.action != "stop":
            return live.apply(plan)
        result: list[Result] = []
        thread = threading.Thread(target=lambda: result.append(live.apply(plan)))
        thread.start()
        deadline = time.monotonic() + 8
        while state_of(live.process.pid) != "T":
            assert time.monotonic() < deadline and thread.is_alive(), "the coordinator did not stop"
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(live.process.pid, signal.SIGCONT)
        thread.join()
        return result[0]


def note(kind: str, **happened: Any) -> None:
    """Append what happened to the file that MOESIM_FAULT_RESULTS names, for benchmarks/reliability.py."""
    path = os.environ.get("MOESIM_FAULT_RESULTS")
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"kind": kind, **happened}) + "\n")


def state_of(pid: int) -> str:
    """Return the state of a process as the kernel shows it: R, S, T (stopped) …"""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def installed(path: Path) -> str:
    """Return the map that a journal says is installed; reads a copy, since opening one truncates what is damaged."""
    copy = path.with_name(f"{path.name}.copy")
    copy.write_bytes(path.read_bytes())
    journal = Journal(copy)
    plan = journal.installed()
    journal.close()
    assert plan is not None
    return plan.map_sha256
