"""The coordinator's view of the ranks: it hosts their store, hears their answers, and notices when one dies or hangs.

It is a process of its own and never a rank. Every question has a deadline; a rank that has died ends all waiting at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moesim.errors import ApplyError, InputError, describe
from moesim.runtime import failpoints

ANSWER_S = 10.0
"""Default deadline of a command that needs no data to move."""
KEEP_COMMANDS = 64
SILENT_S = 20.0
"""Silence after which a rank on another machine counts as dead; those on this one are looked at."""
SOON_S = 1.5
"""Silence of a rank's own thread, which speaks four times a second, that tells a stopped process from one that lost its peer."""
UNKNOWN = 255
"""Exit code of a rank whose own is not known here."""


class LostAgain(ApplyError):
    """Another rank was lost while the group was rebuilt."""


class Deployment:
    """Commands to all ranks, and their answers."""

    def __init__(self, host: str, size: int, *, port: int = 0, pids: list[int] | None = None, answer_s: float = ANSWER_S) -> None:
        """Host the store at `host`:`port` (0: any free one) for `size` ranks. Raises InputError if the port is taken.

        pids: of the ranks, if they are children of this process; else see `adopt`.
        """
        self.host, self.size, self.answer_s = host, size, answer_s
        self.pids, self._children = pids or [], pids is not None
        self.launcher: subprocess.Popen[bytes] | None = None
        """The process that started the ranks, if they are not children of this one."""
        try:
            listener = socket.create_server((host, port))  # left to itself the store would listen on all addresses
        except OSError as cause:
            raise InputError(describe("launch", "store port", port, f"cannot be bound on {host} ({cause.strerror or cause})", "give another port")) from None
        self.store = dist.TCPStore(
            host, listener.getsockname()[1], None, True, timeout=timedelta(seconds=5), wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self.exit_codes: dict[int, int] = {}
        self.failure: str | None = None
        """Why the deployment can serve no more; None while it can."""
        self.stopping = False
        self.seats = list(range(size))
        """Rank with which every rank started; they differ once some have been lost."""
        self.lost: list[dict[str, Any]] = []
        """Ranks that others have gone on without: seat, pid, reason."""
        self.lost_s = 0.0
        """How long it took to go on after the last loss, from its notice."""
        self.exchange_s = 0.0
        """After which an exchange with a silent rank fails."""
        self.hang_s = 0.0
        """Silence after which a rank of this machine counts as hung; 0: never."""
        self.late: Counter[str] = Counter()
        """Commands and actions that a rank did not answer in time, by kind."""
        self._attempt, self._left_at = 0, 0.0
        self._number = 0
        self._heard: dict[int, tuple[str, float]] = {}
        self._remote: set[int] = set()
        self._lock, self._swap = threading.Lock(), threading.Lock()
        self._monitor = threading.Thread(target=self._watch, name="moesim-monitor", daemon=True)

    def start(self) -> None:
        """Begin to watch the ranks."""
        self._monitor.start()

    def adopt(self) -> None:
        """Learn the ranks' pids from what they publish."""
        if not self.pids:
            statuses = [status for status in self.statuses() if status is not None]
            self._remote = {status["rank"] for status in statuses if status["host"] != socket.gethostname()}
            self.pids = [int(status["pid"]) for status in statuses]

    # --- death ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while len(self.exit_codes) < self.size:
            with self._swap:
                dead = [rank for rank in range(len(self.pids)) if rank not in self.exit_codes and self._has_ended(rank)]
                if not self.stopping and self.failure is None:
                    self.failure = self._reason(dead) if dead else self._silent()
            if not self.pids and not self._children:
                said = next((text for rank in range(self.size) if (text := self.get(f"down/{rank}"))), None)
                ended = self.launcher is not None and self.launcher.poll() is not None
                if said or ended:
                    self.failure = self.failure or said or f"the launcher ended: exit code {self.launcher.returncode}"  # type: ignore[union-attr]
                    return
            time.sleep(0.05)

    def _has_ended(self, rank: int) -> bool:
        if rank in self._remote:
            if time.monotonic() - self._status(rank)[1] > SILENT_S:
                self.exit_codes[rank] = UNKNOWN
            return rank in self.exit_codes
        if not self._children:
            if not _exists(self.pids[rank]):
                self.exit_codes[rank] = UNKNOWN
            return rank in self.exit_codes
        try:
            pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
        except ChildProcessError:
            self.exit_codes[rank] = UNKNOWN
            return True
        if pid:
            self.exit_codes[rank] = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def _silent(self) -> str | None:
        """Return what is wrong with a rank that lives and has not been heard of for `hang_s`, or that lost a peer; None if all is well."""
        if not self.hang_s or not self.pids:
            return None
        silent = self._hung(self.hang_s)
        if silent:
            return f"rank {silent[0]} (pid {self.pids[silent[0]]}) hangs or is stopped: no sign of life for {self.hang_s:g} s"
        left = [json.loads(text)["reason"] for seat in self.seats if (text := self.get(f"out/{self._attempt}/{seat}"))]
        if left and (silent := self._hung(SOON_S)):
            return f"rank {silent[0]} (pid {self.pids[silent[0]]}) hangs or is stopped: {left[0]}"
        self._left_at = (self._left_at or time.monotonic()) if left else 0.0
        late = left and time.monotonic() - self._left_at > self.hang_s
        return f"an exchange failed: {left[0]}" if late or len(left) == self.size else None

    def _hung(self, silence_s: float) -> list[int]:
        statuses = self.statuses()
        return [rank for rank, status in enumerate(statuses) if rank not in self.exit_codes and status is not None and status["age_s"] > silence_s]

    def _reason(self, dead: list[int]) -> str:
        """Name the rank that failed first: one killed by a signal, else one whose error is not about a lost peer."""
        hung = self._hung(SOON_S) if self.hang_s else []
        if hung and all(_names_a_peer(self.get(f"down/{rank}") or "") for rank in dead):
            return f"rank {hung[0]} (pid {self.pids[hung[0]]}) hangs or is stopped: {self.get(f'down/{dead[0]}')}"
        killed = [rank for rank in dead if self.exit_codes[rank] < 0]
        if killed:
            return f"rank {killed[0]} (pid {self.pids[killed[0]]}) was killed by {signal.Signals(-self.exit_codes[killed[0]]).name}"
        said = {rank: self.get(f"down/{rank}") for rank in dead}
        first = next((rank for rank in dead if not _names_a_peer(said[rank] or "")), dead[0])
        code = self.exit_codes[first]
        return f"rank {first} (pid {self.pids[first]}) failed: {said[first] or ('it was killed' if code == UNKNOWN else f'exit code {code}')}"

    # --- commands ---------------------------------------------------------------------------------

    def get(self, key: str) -> str | None:
        """Return the value of a key that may not exist."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def statuses(self) -> list[dict[str, Any] | None]:
        """Return what every rank last published, with the age of it in seconds."""
        result: list[dict[str, Any] | None] = []
        for rank in range(self.size):
            text, heard = self._status(rank)
            status = json.loads(text) if text else None
            if status is not None:
                clock = status.pop("time")
                status["age_s"] = round(time.monotonic() - (heard if rank in self._remote else clock), 3)
            result.append(status)
        return result

    def _status(self, rank: int) -> tuple[str, float]:
        """Return what a rank last published, and when that was first seen here: clocks of other machines are not comparable."""
        text = self.get(f"status/{rank}") or ""
        if self._heard.get(rank, ("", 0.0))[0] != text:
            self._heard[rank] = text, time.monotonic()
        return self._heard.setdefault(rank, (text, time.monotonic()))

    def ask(self, kind: str, *, timeout_s: float | None = None, **fields: Any) -> list[dict[str, Any]]:
        """Give a command to all ranks and return their answers by rank; raise ApplyError if one refuses, dies or is late."""
        return self._collect("rep", self._send(kind, fields), kind, timeout_s or self.answer_s)

    def _send(self, kind: str, fields: dict[str, Any]) -> int:
        with self._lock:
            if self.failure:
                raise ApplyError(f"the deployment has failed: {self.failure}")
            number = self._number
            self._number += 1
            self.store.set(f"cmd/{number}", json.dumps({"kind": kind, "n": number, **fields}))
            if number >= KEEP_COMMANDS:
                self.store.delete_key(f"cmd/{number - KEEP_COMMANDS}")
        return number

    def _collect(self, prefix: str, number: int, kind: str, timeout_s: float, what: str = "") -> list[dict[str, Any]]:
        what = what or kind
        deadline, hurried = time.monotonic() + timeout_s, False
        answers: dict[int, dict[str, Any]] = {}
        while True:
            for rank in range(self.size):
                if rank not in answers and (text := self.get(f"{prefix}/{number}/{rank}")) is not None:
                    answers[rank] = json.loads(text)
                    self.store.delete_key(f"{prefix}/{number}/{rank}")
            refused = [answer["error"] for answer in answers.values() if not answer["ok"]]
            own = [text for text in refused if not _names_a_peer(text)]
            if own:
                raise ApplyError(own[0])
            if refused and not self.failure:  # a rank that lost a peer says so before the peer's end is seen here
                deadline = min(deadline, time.monotonic() + SOON_S) if not hurried else deadline
                hurried = True
                if time.monotonic() > deadline:
                    raise ApplyError(refused[0])
            if len(answers) == self.size:
                return [answers[rank] for rank in range(self.size)]
            if self.failure:
                raise ApplyError(f"{self.failure} during {what}")
            if time.monotonic() > deadline and not refused:
                late = [rank for rank in range(self.size) if rank not in answers]
                self.late[kind] += 1
                raise ApplyError(f"rank {late[0]} (pid {self.pids[late[0]]}) did not answer {what} within {timeout_s:g} s; it hangs or is stopped")
            time.sleep(0.003)

    def schedule(
        self, action: str, *, timeout_s: float | None = None, before_decision: Callable[[int], None] | None = None, decided: Callable[[], None] | None = None,
        **fields: Any,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Let all ranks do `action` between the same two steps; return their answers.

        before_decision: called with the step once all ranks have promised, before it is decided; it may raise, and nobody acts.
        decided: called once the ranks have been told to act; from here on they will.
        """
        timeout_s = timeout_s or self.answer_s
        number = self._send("schedule", {"action": action, **fields})
        key, step = f"decide/{number}", -1
        try:
            promises = self._collect("rep", number, "schedule", timeout_s, f"the promise to {action}")
            step = max(answer["limit"] for answer in promises)
            if before_decision is not None:
                before_decision(step)
            found = self.store.compare_set(key, "", str(step)).decode()
        except BaseException:
            found = self.store.compare_set(key, "", "abort").decode()
            if found == "abort":  # else the decision got there, and only its answer was lost
                raise
        if found != str(step):
            raise ApplyError(f"{action} was decided elsewhere: {found}")
        if decided is not None:
            decided()
        failpoints.hit(f"{action}.announced")
        return self._collect("act", number, action, timeout_s + self.exchange_s)  # a silent rank ends the exchange of the step before it

    # --- going on without lost ranks ----------------------------------------------------------------

    def call_out(self, timeout_s: float) -> dict[int, dict[str, Any]]:
        """Call every rank out of the broken group; return what each survivor says, by rank. One that does not come is killed."""
        attempt, deadline = self._attempt, time.monotonic() + timeout_s
        self._attempt += 1
        self.store.set(f"leave/{attempt}", str(self.failure))
        for rank in self._hung(SOON_S):  # so that those who wait for it see a closed connection instead of a timeout
            self._kill(rank)
        while True:
            living = [rank for rank in range(self.size) if rank not in self.exit_codes]
            said = {rank: text for rank in living if (text := self.get(f"out/{attempt}/{self.seats[rank]}")) is not None}
            if len(said) == len(living):
                return {rank: json.loads(text) for rank, text in said.items()}
            if time.monotonic() > deadline:
                for rank in set(living) - set(said):
                    self._kill(rank)
                deadline = time.monotonic() + timeout_s
            time.sleep(0.003)

    def _kill(self, rank: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], signal.SIGKILL)

    def rebuild(self, members: list[int], timeout_s: float, call: dict[str, Any], before_going: Callable[[list[dict[str, Any]]], None]) -> None:
        """Let the `members` (ranks) that have been called out meet in a smaller group and serve on, numbered anew.

        before_going: called with what they report once all are ready; it may raise. Raises LostAgain if one dies or is late;
        then all have to be called out again.
        """
        attempt, seats = self._attempt - 1, [self.seats[rank] for rank in members]
        self.store.set(f"rebuild/{attempt}", json.dumps({**call, "seats": self.seats, "members": seats}))
        before_going(self._await_members(f"built/{attempt}", members, timeout_s))
        self.store.set(f"go/{attempt}", "")
        with self._swap:
            gone = [rank for rank in range(self.size) if rank not in members]
            self.lost += [{"seat": self.seats[rank], "pid": self.pids[rank], "reason": str(self.failure)} for rank in gone]
            self.exit_codes = {place: self.exit_codes[rank] for place, rank in enumerate(members) if rank in self.exit_codes}
            self.pids, self.seats, self.size = [self.pids[rank] for rank in members], seats, len(members)
            self._heard.clear()
        self._await_members(f"here/{attempt}", list(range(self.size)), timeout_s)
        with self._swap:
            self.failure = self._reason(list(self.exit_codes)) if self.exit_codes else None

    def _await_members(self, prefix: str, members: list[int], timeout_s: float) -> list[dict[str, Any]]:
        deadline = time.monotonic() + timeout_s
        while True:
            said = [self.get(f"{prefix}/{self.seats[rank]}") for rank in members]
            if all(said):
                return [json.loads(str(text)) for text in said]
            dead = [rank for rank in members if rank in self.exit_codes]
            if dead:
                raise LostAgain(f"rank {dead[0]} was lost while the group was rebuilt")
            if time.monotonic() > deadline:
                self._kill(members[said.index(None)])
                raise LostAgain(f"rank {members[said.index(None)]} did not join the smaller group within {timeout_s:g} s")
            time.sleep(0.003)

    # --- stop -------------------------------------------------------------------------------------

    def stop(self, timeout_s: float = 5.0) -> None:
        """End all ranks: by agreement if they answer, else by SIGTERM and then SIGKILL. Returns when none is left."""
        self.stopping = True
        if self.failure is None and not self.exit_codes and self.pids:
            with contextlib.suppress(ApplyError):
                self.schedule("stop", timeout_s=timeout_s)
        for rank, pid in enumerate(self.pids):
            if pid == os.getppid():  # the rank that forked the coordinator ends with it
                self.exit_codes.setdefault(rank, 0)
        self._await_ends(timeout_s if self.failure is None else 0.0)
        for name, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            for rank in [rank for rank in range(len(self.pids)) if rank not in self.exit_codes and rank not in self._remote]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pids[rank], name)
            self._await_ends(wait_s)
        if self.launcher is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.launcher.wait(3 if self.pids else 0)
            self.launcher.kill()
            self.launcher.wait()

    def _await_ends(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.exit_codes) < len(self.pids) and time.monotonic() < deadline:
            time.sleep(0.01)


def _names_a_peer(reason: str) -> bool:
    """Return True if a rank's error is about another rank."""
    return "peer" in reason or "gloo" in reason


def _exists(pid: int) -> bool:
    """Return True if a process runs that is not a child of this one; one that has ended but was not reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
