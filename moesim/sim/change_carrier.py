"""Carries one change of the plan through: planner's time, copies chunk by chunk as Flows beside the passes, installation at a step border.

One change is under way at a time. Shapes: R ranks, L MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.plan import Plan
from moesim.sim import memory
from moesim.sim.change_report import Change
from moesim.sim.change_serving import Serving, Steps
from moesim.sim.migration import Moves, Transfer, install_s, mixed, moves_between

REBALANCE = "rebalance"


@dataclass(slots=True, eq=False)
class Pending:
    """A change under way: first it is planned, then chunk after chunk is moved and installed."""

    reason: str
    alive_R: np.ndarray
    """Live ranks once it is installed."""
    decided_s: float
    decided_pass: int
    planning: Any = None
    """simpy process of the planner."""
    target: Plan | None = None
    chunks: list[list[int]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    """Of the chunk in flight."""
    transfer: Transfer | None = None
    moved_bytes: float = 0.0
    pause_s: float = 0.0
    over: bool = False

    @property
    def arrived(self) -> bool:
        """Have all copies of the chunk in flight arrived?"""
        return self.transfer is not None and self.transfer.done.triggered


class Carrier:
    """The change under way, if there is one."""

    def __init__(self, serving: Serving, rebuild_s: float) -> None:
        """rebuild_s: to rebuild the process group, which every change of ranks needs."""
        self.serving, self.rebuild_s = serving, rebuild_s
        self.pending: Pending | None = None

    def begin(self, reason: str, target: Plan, alive_R: np.ndarray, planner_s: float, *, decline: bool = False) -> None:
        """Begin to carry `target` out once the planner's time has passed; decline: its plan is then dropped."""
        serving = self.serving
        change = self.pending = Pending(reason, alive_R.copy(), serving.engine.now, serving.out.replay.steps)
        change.planning = serving.env.process(self._plan(change, target, planner_s, decline))

    def wait(self) -> Steps:
        """Let serving stand still until the planner is done or the copies have arrived, or a rank dies."""
        serving, change = self.serving, self.pending
        assert change is not None
        began = serving.engine.now
        yield (change.planning if change.transfer is None else change.transfer.done) | serving.failure
        self._pause(change, serving.engine.now - began)

    def install_chunk(self) -> Steps:
        """Put the copies that have arrived in place."""
        serving, change = self.serving, self.pending
        assert change is not None and change.target is not None and change.transfer is not None
        seconds = install_s(serving.cluster, change.transfer.moves.written_LR, serving.expert_bytes, serving.migration)
        if change.reason != REBALANCE:
            seconds += self.rebuild_s
        yield serving.env.timeout(seconds)
        self._pause(change, seconds)
        change.moved_bytes += change.transfer.moved_bytes
        serving.install(mixed(serving.plan, change.target, change.rows), change.alive_R, change.reason)
        self._next_chunk(change)

    def abort(self, why: str) -> None:
        """Give the change under way up, if there is one."""
        change, out = self.pending, self.serving.out
        if change is None:
            return
        if change.transfer is not None:
            change.transfer.cancel()
        out.aborted += 1
        self.serving.log("aborted", reason=change.reason, why=why)
        self._end(change)

    def transfer(self, moves: Moves) -> Transfer:
        """Put copies in flight."""
        serving = self.serving
        transfer = Transfer(serving.engine, serving.cluster, serving.migration, serving.expert_bytes, moves)
        serving.out.transfers.append(transfer)
        return transfer

    def room(self, following: Plan, staging_R: np.ndarray) -> float:
        """Return the bytes that stay free (< 0: missing) on the tightest rank that takes something in, the larger map and the staged copies held."""
        serving = self.serving
        replay, tp, cluster, model = serving.out.replay, serving.builder.tp, serving.cluster, serving.model
        held = memory.account(cluster, model, serving.plan, attention_tp=tp, kv_entries=replay.kv_entries_peak * tp, tokens=replay.tokens_peak)
        old_R, new_R = (memory.weight_bytes_R(model, plan, attention_tp=tp) for plan in (serving.plan, following))
        weights_R = np.maximum(old_R, new_R)
        free_R = held.capacity_bytes - weights_R - held.kv_bytes - held.activation_bytes - staging_R
        buffer_R = serving.migration.staging_limit_bytes - staging_R
        room = float(np.minimum(free_R, buffer_R)[(staging_R > 0) | (new_R > old_R)].min(initial=np.inf))
        rank = int(free_R.argmin())
        uses = {"weights": weights_R[rank], "kv": held.kv_bytes, "activations": held.activation_bytes, "staging": staging_R[rank]}
        if room >= 0 and sum(uses.values()) > sum(replay.memory.get(held.tier, {}).values()):
            replay.memory[held.tier] = {use: float(nbytes) for use, nbytes in uses.items()}
        return room

    def _pause(self, change: Pending, seconds: float) -> None:
        change.pause_s += seconds
        self.serving.out.pause_s += seconds

    def _plan(self, change: Pending, target: Plan, planner_s: float, decline: bool) -> Steps:
        """Spend the planner's time; then its plan is known."""
        serving = self.serving
        yield serving.env.timeout(planner_s)
        serving.out.planner_s += planner_s
        if change.over:
            return
        if decline:
            serving.out.declined += 1
            serving.log("declined", reason=change.reason)
            self._end(change)
            return
        change.target = target
        rows = list(range(target.num_layers))
        size = serving.migration.layers_per_chunk or len(rows)
        if np.array_equal(target.slot_rank_S, serving.plan.slot_rank_S):
            differs_L = (target.slot_to_expert_LS != serving.plan.slot_to_expert_LS).any(axis=1) | (target.shares_LS() != serving.plan.shares_LS()).any(axis=1)
            rows = np.flatnonzero(differs_L).tolist()
        else:
            size = len(rows)
        change.chunks = [rows[low : low + size] for low in range(0, len(rows), size)]
        self._next_chunk(change)

    def _next_chunk(self, change: Pending) -> None:
        """Put the copies of the next chunk in flight, or end the change."""
        assert change.target is not None
        serving, out = self.serving, self.serving.out
        change.transfer = None
        if not change.chunks:
            self._end(change, done=True)
            return
        rows = change.chunks.pop(0)
        following = mixed(serving.plan, change.target, rows)
        moves = moves_between(serving.plan, following, ranks_per_node=serving.cluster.devices_per_node)
        staging_R = moves.staging_R(serving.expert_bytes)
        room = self.room(following, staging_R)
        if room < 0:
            out.refused += 1
            serving.log("refused", reason=change.reason, missing_bytes=-room)
            self._end(change)
            return
        out.staging_peak_bytes = max(out.staging_peak_bytes, float(staging_R.max()))
        change.rows, change.transfer = rows, self.transfer(moves)

    def _end(self, change: Pending, *, done: bool = False) -> None:
        serving, out = self.serving, self.serving.out
        change.over = True
        self.pending = None
        if not done:
            return
        if change.reason == REBALANCE:
            out.rebalances += 1
        out.changes.append(
            Change(
                reason=change.reason,
                decided_s=change.decided_s,
                installed_s=serving.engine.now,
                decided_pass=change.decided_pass,
                installed_pass=out.replay.steps,
                moved_bytes=change.moved_bytes,
                pause_s=change.pause_s,
            )  # fmt: skip
        )
        serving.log("installed", reason=change.reason, moved_bytes=change.moved_bytes, pause_s=change.pause_s)
