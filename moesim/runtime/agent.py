"""The migration agent of one rank: what a serving loop calls between steps, and the thread that talks to the coordinator.

All talk goes through the coordinator's key-value store: `cmd/n` holds command n, `rep/n/rank` its answer. Reading and
staging happen in threads beside serving. What must happen on all ranks between the same two steps (probe, install,
restore, stop) is scheduled without a race: a rank that answers at step s promises to start no step from s + LEASE on
before it has read `decide/n`; the coordinator then writes, once, the largest s + LEASE as the step of the action, and
every rank meets that decision before it gets there.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist

from moesim.errors import ApplyError, MoesimError
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.expert_parallel import ExpertParallelExperts, PeerLost
from moesim.runtime.history import History
from moesim.runtime.migration import Migration, live_digests
from moesim.runtime.moves import local_tables, placement_sha256
from moesim.runtime.staging import StagingMemory, free_memory

LEASE = 4
"""Steps that a rank may go on before it waits for a scheduled decision."""
CHANGES = ("install", "restore")
"""Actions that need what has been staged."""
DECISION_TIMEOUT_S = 30.0
"""Longest wait for a decision; then the rank gives up, because going on could mix two maps."""
POLL_S = 0.02
HOLD_POLL_S = 0.002
STAGE_DUTY = 0.5
"""Share of the time that staging may take beside serving steps; ranks that are held stage without a break."""
LEAVE_S = 5.0
"""Time that the serving thread has to come out of a group that has lost a rank."""
HEARTBEAT_S = 0.25


class Undecided(MoesimError):
    """The coordinator has not said in time whether to install."""


class Agent:
    """One rank's part in checking, staging, installing and verifying a plan."""

    def __init__(
        self, *, rank: int, host: str, port: int, layers: Sequence[ExpertParallelExperts], plan: Plan, fingerprint: str,
        probe: Callable[[], np.ndarray], metrics: Callable[[], dict[str, Any]] | None = None, save: Callable[[str], None] | None = None,
        bind: str | None = None,
    ) -> None:  # fmt: skip
        """Connect to the coordinator's store at `host`:`port`. probe: runs a fixed batch through the model (a collective).

        rank: of the whole deployment; in the plan it is `rank` modulo R, and `layers` are those of its pipeline stage.
        save: writes a checkpoint to the folder it is told (a collective). bind: own address, if it is not `host`.
        """
        self.rank, self.layers, self.plan, self.fingerprint = rank, list(layers), plan, fingerprint
        self.seat = rank
        """The rank with which this process started; `rank` changes when others are lost."""
        self._attempt, self._called_at, self._patience_s = 0, 0.0, LEAVE_S
        self._place, self._save, self._bind = rank % plan.num_ranks, save, bind or host
        self.epoch, self.step, self.history = 0, 0, History(len(self.layers), plan.num_experts)
        self.history.use(0, self._table())
        self._address, self._probe, self._metrics = (host, port), probe, metrics or dict
        self._store, self._thread_store = self.connect(), self.connect()
        self._lock = threading.Lock()
        self._promise: dict[str, Any] | None = None
        self._changing = False
        """Whether the serving thread exchanges weights at this moment."""
        self._migration: Migration | None = None
        self._memory: StagingMemory | None = None
        """Staging buffers of the last migration."""
        self._finishing = False
        """Whether the staging buffers go as soon as what is promised has been done."""
        self._probes: deque[np.ndarray] = deque(maxlen=2)
        self._pause: dict[str, float] = {}
        self.trains = False
        """Whether weights change from step to step; then the ranks stand still from before the staging until the verification."""
        self._held, self._held_at = False, 0.0
        self._known: dict[tuple[int, int], bytes] = {}
        """Digests of live experts by (layer, slot), good until weights change."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="moesim-agent", daemon=True)

    def _table(self) -> np.ndarray:
        """Return int32 [L, Q]: the expert of every slot of this rank, for the layers that it holds."""
        return local_tables(self.plan)[self._place][[layer.slot_map.layer for layer in self.layers]]

    def connect(self) -> Any:
        """Return a client of the coordinator's store; every thread has its own."""
        return dist.TCPStore(*self._address, is_master=False, timeout=timedelta(seconds=20))

    def start(self) -> None:
        """Begin to listen for commands, and to count; what ran before, like a first probe, is no step."""
        for layer in self.layers:
            layer.take_counts()
            layer.take_exchanged()
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._stopped.set()

    # --- on the serving thread ----------------------------------------------------------------------

    def at_step_boundary(self) -> bool:
        """Count a finished step, carry out what is scheduled for here, and return False when serving has to stop.

        Called on every rank before every step. Raises Undecided if a scheduled decision does not come.
        """
        goes_on = self._meet()
        while self._held and goes_on:
            time.sleep(HOLD_POLL_S)
            goes_on = self._meet()
        return goes_on

    def _meet(self) -> bool:
        """Carry out what is scheduled for this step; return False when serving has to stop."""
        with self._lock:
            promise = self._promise
        if promise is None:
            return True
        begin = time.perf_counter()
        step = self._decision(promise)
        if step is None or self.step < step:
            self._add_pause("wait_ms", begin)
            return True
        self._add_pause("wait_ms", begin)
        with self._lock:
            if self._promise is promise:
                self._promise, self._changing = None, step == self.step and promise["action"] in CHANGES
        if step < 0:
            return True
        if self.step > step:
            raise Undecided(f"rank {self.rank}: reached step {self.step} before it read the decision for step {step}")
        return self._act(promise)

    def count_step(self, *, prefill: int, decode: int, start_ns: int) -> None:
        """Record a step that has just been served: its tokens by phase, and when it began (monotonic ns)."""
        counts = [layer.take_counts() for layer in self.layers]
        exchanged = [layer.take_exchanged() for layer in self.layers]
        self.history.add(self.step, self.epoch, counts, prefill=prefill, decode=decode, start_ns=start_ns, exchanged=exchanged)
        with self._lock:
            self.step += 1

    def _add_pause(self, part: str, begin: float) -> None:
        self._pause[part] = self._pause.get(part, 0.0) + (time.perf_counter() - begin) * 1e3

    def _decision(self, promise: dict[str, Any]) -> int | None:
        """Return the decided step, -1 for an abort, or None while it is open and this rank may go on."""
        key = f"decide/{promise['n']}"
        deadline = time.monotonic() + DECISION_TIMEOUT_S
        while not self._store.check([key]):
            if self.step < promise["limit"]:
                return None
            if time.monotonic() > deadline:
                what = f"no decision on {promise['action']} within {DECISION_TIMEOUT_S:g} s at step {self.step}"
                raise Undecided(f"rank {self.rank}: {what}; stopping, because going on could mix two maps")
            time.sleep(0.002)
        text = self._store.get(key).decode()
        return -1 if text == "abort" else int(text)

    def _act(self, promise: dict[str, Any]) -> bool:
        action, begin = promise["action"], time.perf_counter()
        answer: dict[str, Any] = {"ok": True, "step": self.step}
        if action == "probe":
            output = self._probe()
            for layer in self.layers:
                layer.take_counts()
                layer.take_exchanged()
            self._probes.append(output)
            failpoints.hit("probe.end")
            if len(self._probes) == 2:
                answer |= compare(*self._probes)
            self._add_pause("probe_ms", begin)
        elif action in CHANGES:
            assert self._migration is not None
            self.epoch = int(promise["epoch"])
            if failpoints.hit(f"{action}.begin"):
                next(iter(self._migration.staged.values()))[0] ^= 1
            getattr(self._migration, action)(self.epoch)
            self.plan = self._migration.new if action == "install" else self._migration.old
            self.history.use(self.epoch, self._table())
            self._add_pause(f"{action}_ms", begin)
            with self._lock:
                self._changing = False
            if self._finishing:
                self._drop_staged()
            failpoints.hit(f"{action}.end")
            self._known = {}
        elif action == "hold":
            if any(layer.rows.has_pending_gradients() for layer in self.layers):
                answer |= {"ok": False, "error": f"rank {self.rank}: gradients are being accumulated over a step boundary; call it after optimizer.step()"}
            self._held, self._held_at, self._pause = bool(answer["ok"]), begin, {}
        elif action == "save":
            try:
                if self._save is None:
                    raise ApplyError(f"rank {self.rank}: saves no checkpoints for the coordinator; save in the loop itself")
                self._save(str(promise["folder"]))
            except Exception as error:  # a full disk is no reason to stop serving
                answer |= {"ok": False, "error": self._reason(error)}
        if self._held:  # all of it is a pause, whatever is done meanwhile
            self._pause["wait_ms"] = 0.0
            self._pause["wait_ms"] = (time.perf_counter() - self._held_at) * 1e3 - sum(self._pause.values())
        answer |= {"epoch": self.epoch, "pause": dict(self._pause)}
        self._store.set(f"act/{promise['n']}/{self.rank}", json.dumps(answer))
        return action != "stop"

    # --- on the agent's thread ----------------------------------------------------------------------

    def _listen(self) -> None:
        number, beat = 0, 0.0
        try:
            while not self._stopped.is_set():
                now = time.monotonic()
                if now - beat > HEARTBEAT_S:
                    beat = now
                    self._thread_store.set(f"status/{self.rank}", json.dumps(self.status()))
                    self._watch_serving(now)
                key = f"cmd/{number}"
                if not self._thread_store.check([key]):
                    time.sleep(POLL_S)
                    continue
                command = json.loads(self._thread_store.get(key))
                number += 1
                if command["kind"] == "stage":  # may block in the network, and commands have to go on being heard
                    threading.Thread(target=self._answer, args=(command, self.connect()), daemon=True).start()
                else:
                    self._answer(command, self._thread_store)
        except Exception:  # DistStoreError: the coordinator is gone and nobody could ever decide again; any other: nobody listens any more
            if not self._stopped.is_set():
                self._lose()

    def _lose(self) -> None:
        """End this rank, whose coordinator is gone."""
        os._exit(4)

    # --- when a peer is lost ------------------------------------------------------------------------

    def _watch_serving(self, now: float) -> None:
        """End this process if its serving thread does not come out of a broken group: gloo has waits that no timeout ends."""
        if not self._thread_store.check([f"leave/{self._attempt}"]):
            self._called_at = 0.0
        elif not self._called_at:
            self._called_at = now
        elif now - self._called_at > self._patience_s:
            what = f"its serving thread did not leave a broken group within {self._patience_s:g} s"
            self._thread_store.set(f"down/{self.rank}", f"rank {self.rank}: {what}")
            os._exit(5)

    def standing(self) -> dict[str, Any]:
        """Return what the coordinator needs to know of a survivor."""
        return {"step": self.step, "epoch": self.epoch, "placement": placement_sha256(self.plan)}

    def left(self, attempt: int, join_s: float) -> None:
        """The serving thread has left the broken group; `attempt`: number of the next one, which may take `join_s` to come to nothing."""
        self._attempt, self._called_at, self._patience_s = attempt, 0.0, LEAVE_S + join_s
        with self._lock:
            self._promise, self._changing = None, False

    def settle(self, installed: Plan, epoch: int) -> None:
        """Bring this rank to the placement `installed` from what it has staged; raise ApplyError if it is not one step away."""
        wanted, migration = placement_sha256(installed), self._migration
        if migration is not None and wanted == placement_sha256(migration.new) and migration.is_staged:
            migration.install(epoch)  # again, if it broke off in the middle
        elif migration is not None and wanted == placement_sha256(migration.old):
            if migration.is_touched:
                migration.restore(epoch)
        elif wanted != placement_sha256(self.plan):
            raise ApplyError(f"rank {self.rank}: holds neither side of the change to map {wanted[:12]}; start the deployment again")
        self.plan = installed
        self._drop_staged()

    def regroup(self, *, rank: int, plan: Plan, epoch: int, step: int) -> None:
        """Go on as `rank` of the smaller `plan`."""
        with self._lock:
            self.rank, self.plan, self.epoch, self.step, self._place = rank, plan, epoch, step, rank
            self._promise = None  # one given after this rank had left was to the old group
        self._patience_s = LEAVE_S
        self.history.use(epoch, self._table())
        self._probes.clear()
        self._store.set(f"status/{rank}", json.dumps(self.status()))

    def status(self) -> dict[str, Any]:
        """Return where this rank is; published a few times a second."""
        place = {"rank": self.rank, "pid": os.getpid(), "host": socket.gethostname(), "time": time.monotonic()}
        return {**place, "step": self.step, "epoch": self.epoch, "map_sha256": self.plan.map_sha256}

    def _answer(self, command: dict[str, Any], store: Any) -> None:
        what = command.get("action", command["kind"])  # a name for failpoints
        try:
            failpoints.hit(f"{what}.asked")
            answer = {"ok": True, **getattr(self, f"_do_{command['kind']}")(command, store)}
        except Exception as error:  # whatever went wrong is the coordinator's to judge
            answer = {"ok": False, "error": self._reason(error)}
        store.set(f"rep/{command['n']}/{self.rank}", json.dumps(answer))
        failpoints.hit(f"{what}.answered")

    def _reason(self, error: Exception) -> str:
        if isinstance(error, RuntimeError) and "gloo" in str(error):
            error = PeerLost(f"rank {self.rank}: a peer is gone or silent ({' '.join(str(error).split())[:200]})")
        return str(error) if isinstance(error, MoesimError) else f"rank {self.rank}: {type(error).__name__}: {str(error)[:300]}"

    def _do_check(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """Say what this rank runs, and start the account of pauses."""
        self._pause = {}
        self._probes.clear()
        begin = time.perf_counter()
        self.layers[0].read_expert(0) if self.layers[0].held_slots else None
        copy_s = time.perf_counter() - begin
        return {
            "fingerprint": self.fingerprint, "placement": placement_sha256(self.plan), "epoch": self.epoch, "step": self.step,
            "trains": self.trains, "slot_capacity": self.layers[0].slot_capacity, "expert_bytes": self.layers[0].expert_bytes,
            "free_bytes": free_memory() + (self._memory.kept_bytes if self._memory else 0), "copy_s": copy_s,
        }  # fmt: skip

    def _do_status(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        return self.status()

    def _do_digests(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        table = live_digests(self.layers)
        self._known = {(entry["row"], entry["slot"]): bytes.fromhex(entry["digest"]) for entry in table}
        state = {f"layer row {layer.slot_map.layer}: {name}": value for layer in self.layers for name, value in layer.rows.shared_state().items()}
        return {"table": table, "state": state}

    def _do_window(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        return {**self.history.window(command["first"], command["last"]), "expert_bytes": self.layers[0].expert_bytes}

    def _do_stage(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """Bring the experts of plan `plan/<apply>` into staging buffers."""
        self._drop_staged()  # of an apply that could not say that it had ended
        plan = Plan.from_content(json.loads(store.get(f"plan/{command['apply']}")), f"apply {command['apply']}")
        memory, self._memory = self._memory, None
        migration = self._migration = Migration(self.layers, self.plan, plan, rank=self._place, memory=memory)
        begin = time.monotonic()
        apart = dist.PrefixStore(f"p2p/{command['apply']}/{self.rank // plan.num_ranks}", store)
        digests = migration.stage(apart, self._bind, known=self._known, duty=1.0 if self._held else STAGE_DUTY)
        return {"digests": digests, "seconds": time.monotonic() - begin, "steps": self.step}

    def _do_schedule(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """Promise not to pass LEASE more steps before the decision is read."""
        with self._lock:
            if self._promise is not None and store.check([f"decide/{self._promise['n']}"]) and store.get(f"decide/{self._promise['n']}") == b"abort":
                self._promise = None  # called off before this rank came to a step boundary
            if self._promise is not None:
                raise ApplyError(f"rank {self.rank}: {self._promise['action']} is still to be decided")
            self._promise = {**command, "limit": self.step + (0 if self._held else LEASE)}
            return {"limit": self._promise["limit"]}

    def _do_finish(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """Drop the staging buffers, installed or not."""
        with self._lock:
            self._finishing = self._changing or (self._promise is not None and self._promise["action"] in CHANGES)
        if not self._finishing:
            self._drop_staged()
        self._held, self._known = False, {}
        self._probes.clear()
        return {"epoch": self.epoch, "placement": placement_sha256(self.plan)}

    def _do_release(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        """Let held ranks go on."""
        self._held = False
        return {}

    def _drop_staged(self) -> None:
        if self._migration is not None:
            self._memory = self._migration.close()
        self._migration, self._finishing = None, False

    def _do_metrics(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        return {**self.status(), **self.history.metrics(), **self._metrics()}

    def _do_failpoint(self, command: dict[str, Any], store: Any) -> dict[str, Any]:
        if command["rank"] == self.rank:
            failpoints.arm(command["name"], command["do"], int(command.get("skip", 0)))
        return {}


def compare(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Return whether two probe outputs are the same bits, and how far apart they are relative to their size."""
    scale = float(np.linalg.norm(before)) or 1.0
    return {"bitwise": before.tobytes() == after.tobytes(), "relative_error": float(np.linalg.norm(after - before)) / scale}
