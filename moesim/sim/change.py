"""Replays passes while the plan changes: a balancer rebalances, ranks die, leave and join.

Passes run one by one on the engine's clock; migrations are Flows beside them. A new plan takes effect at the first step border after
its copies have arrived, never within a pass. One change is under way at a time; a failure aborts it. After a failure the survivors
serve what they still hold; what nobody holds is loaded from the checkpoint first. Shapes: R ranks, L MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import InputError, SimulationError, describe
from moesim.model import sizes
from moesim.plan import Plan
from moesim.sim import memory
from moesim.sim.balancer import Balancer, Decision, LoadView, LoadWindow, check_budget, check_next, plan_balance
from moesim.sim.batch import Pass
from moesim.sim.build import ProgramBuilder
from moesim.sim.change_report import Change, ChangeRun, Epoch
from moesim.sim.engine import Engine
from moesim.sim.flows import Flow
from moesim.sim.loads import LoadCompiler
from moesim.sim.membership import FAIL, JOIN, Event, Membership, alive_of, lost_LE, refill, reshard
from moesim.sim.migration import CHECKPOINT, MigrationSettings, Moves, Transfer, install_s, mixed, moves_between, way_of
from moesim.sim.network import Network
from moesim.sim.replay import ReplayRun, build_batch, one_pass, since

Steps = Generator[Any, Any, None]
REBALANCE = "rebalance"


def run_with_change(
    passes: Iterable[Pass],
    *,
    plan: Plan,
    builder_factory: Callable[[Plan], ProgramBuilder],
    compiler_factory: Callable[[Plan], LoadCompiler] | None = None,
    balancer: Balancer | None = None,
    events: Sequence[Event] = (),
    migration: MigrationSettings | None = None,
    membership: Membership | None = None,
    keep_passes: int = 16,
    progress: Callable[[int], None] | None = None,
) -> ChangeRun:
    """Replay `passes` in order, starting under `plan`, and return what happened.

    Ranks without an expert in `plan` are masked until they join. builder_factory: makes the ProgramBuilder of every plan, all for one cluster,
    model and settings (share the CostModel between them). compiler_factory: likewise; None: the plain LoadCompiler. events: deaths, leaves and
    joins in any order; what is due after the last pass does not happen. Raises InputError if an event does not fit the cluster,
    SimulationError if a planner breaks its promise, the last rank dies, or the survivors' memory does not hold the experts.
    """
    run = _Run(plan, builder_factory, compiler_factory, balancer, events, migration or MigrationSettings(), membership or Membership(), keep_passes)
    return run.simulate(passes, progress)


@dataclass(slots=True, eq=False)
class _Pending:
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


class _Run:
    """The state of one run; its methods that return Steps are parts of the simpy process that serves."""

    def __init__(
        self,
        plan: Plan,
        builder_factory: Callable[[Plan], ProgramBuilder],
        compiler_factory: Callable[[Plan], LoadCompiler] | None,
        balancer: Balancer | None,
        events: Sequence[Event],
        migration: MigrationSettings,
        membership: Membership,
        keep_passes: int,
    ) -> None:
        self.builder_factory, self.balancer, self.migration, self.membership = builder_factory, balancer, migration, membership
        self.policy = balancer.decide if balancer is not None else None
        self.builder = builder_factory(plan)
        self.cluster, self.model = self.builder.cluster, self.builder.model
        self.compiler_factory = compiler_factory or (lambda plan: LoadCompiler(plan, ranks_per_node=self.cluster.devices_per_node))
        self.expert_bytes = sizes.expert_bytes(self.model)
        self.engine = Engine(self.cluster.num_ranks)
        self.env = self.engine.env
        self.plan, self.alive_R = plan, alive_of(plan)
        self.in_pass, self.since_change = False, 0
        self.window = LoadWindow(balancer.window if balancer is not None else 8)
        self.pending: _Pending | None = None
        self.waiting: list[tuple[str, tuple[int, ...]]] = []
        """Leaves, and joins that are loaded, until no other change is under way."""
        self.dead: list[tuple[float, tuple[int, ...]]] = []
        """Deaths that service has not recovered from."""
        self.failure = self.env.event()
        self.kv_R = np.zeros(self.cluster.num_ranks)
        self.out = ChangeRun(replay=ReplayRun.empty(plan, keep_passes=keep_passes), plan=plan, alive_R=self.alive_R)
        self._check_events(events)
        for event in sorted(events, key=lambda event: event.at_s):
            self.env.process(self._occur(event))
        self.install(plan, self.alive_R, "start")

    def _check_events(self, events: Sequence[Event]) -> None:
        for event in events:
            if max(event.ranks) >= self.cluster.num_ranks:
                raise InputError(describe("event", "ranks", event.ranks, f"must be in 0..{self.cluster.num_ranks - 1}, the ranks of {self.cluster.name}"))
        if self.builder.tp > 1 and (events or not self.alive_R.all()):
            raise InputError(describe("event", "attention_tp", self.builder.tp, "must be 1 where ranks change", "a rank that is gone breaks its TP group"))

    def simulate(self, passes: Iterable[Pass], progress: Callable[[int], None] | None) -> ChangeRun:
        self.env.run(until=self.env.process(self._serve(passes, progress)))
        if self.pending is not None:
            self._abort("end of the run")
        self.out.plan, self.out.alive_R, self.out.total_s = self.plan, self.alive_R, self.engine.now
        self._room(self.plan, np.zeros(self.cluster.num_ranks))
        return self.out

    def install(self, plan: Plan, alive_R: np.ndarray, reason: str) -> None:
        """Let `plan` serve from now on. Raises SimulationError within a pass: dispatch and combine would disagree about the map."""
        if self.in_pass:
            raise SimulationError(f"plan change ({reason}) at {self.engine.now} s: a pass is running; install at a step border")
        check_next(self.plan, plan, alive_R, same_slots=False)
        out = self.out
        if reason != "start":
            self.builder = self.builder_factory(plan)
        self.plan, self.alive_R, self.compiler = plan, alive_R.copy(), self.compiler_factory(plan)
        live, at_s, first = int(alive_R.sum()), self.engine.now, out.replay.steps
        out.epochs.append(Epoch(number=len(out.epochs), reason=reason, first_pass=first, at_s=at_s, ranks=live, map_sha256=plan.map_sha256))

    def log(self, kind: str, **details: Any) -> None:
        self.out.events.append({"kind": kind, "at_s": self.engine.now, "passes": self.out.replay.steps, **details})

    # --- serving -----------------------------------------------------------------------------------------------------

    def _serve(self, passes: Iterable[Pass], progress: Callable[[int], None] | None) -> Steps:
        for item in passes:
            yield from self._border()
            while not (yield from self._execute(reshard(item, self.alive_R))):
                self.out.tokens_retried += item.num_tokens
                yield from self._border()
            self._decide()
            if progress is not None:
                progress(self.out.replay.steps)

    def _border(self) -> Steps:
        """Do what is due between two passes."""
        while True:
            if self.dead:
                yield from self._recover()
            elif self.pending is not None and self.pending.transfer is not None and self.pending.transfer.done.triggered:
                yield from self._install_chunk(self.pending)
            elif self.pending is None and self.waiting:
                self._change_ranks(*self.waiting.pop(0))
            elif self.pending is not None and self.migration.mode == "pause":
                began, change = self.engine.now, self.pending
                yield (change.planning if change.transfer is None else change.transfer.done) | self.failure
                self._pause(change, self.engine.now - began)
            else:
                return

    def _execute(self, item: Pass) -> Generator[Any, Any, bool]:
        """Run one pass; return False if a failure cut it short."""
        engine, out = self.engine, self.out
        program, traffic, parts = build_batch([item], builder=self.builder, compiler=self.compiler)
        program = one_pass(program)
        self.kv_R = item.shape.kv_entries_PR[0]
        begin = engine.now
        self.in_pass = True
        running = self.env.process(engine.execute(program))
        yield running | self.failure
        cut = not running.triggered
        if cut:
            # Kernels that were issued run to their end; nobody uses their results.
            yield running
        self.in_pass = False
        if cut:
            out.wasted_s += min(at_s for at_s, _ in self.dead) - begin
            return False
        overhead = self.builder.settings.host_overhead_us * 1e-6
        out.replay.ledger.record(program, since(running.value, begin), steps=[item.step], begin_s=begin, overhead_s=overhead)
        if overhead:
            yield self.env.timeout(overhead)
        out.replay.book([item], parts, traffic, self.plan, self.cluster.devices_per_node, None if self.alive_R.all() else self.alive_R)
        self.window.add(self.plan, parts)
        self.since_change += 1
        return True

    def _pause(self, change: _Pending, seconds: float) -> None:
        change.pause_s += seconds
        self.out.pause_s += seconds

    # --- changes -----------------------------------------------------------------------------------------------------

    def _decide(self) -> None:
        """Ask the policy, and the planner if it says so."""
        if self.balancer is None or self.policy is None or self.pending is not None or self.waiting or self.dead:
            return
        load_KLE = self.window.load_KLE(self.plan)
        view = LoadView(
            passes=self.out.replay.steps, since_change=self.since_change, window=self.balancer.window, load_KLE=load_KLE, plan=self.plan,
            alive_R=self.alive_R, expert_bytes=self.expert_bytes,
        )  # fmt: skip
        decision: Decision | None = self.policy(view)
        if decision is None:
            return
        self.since_change = 0
        self.out.decisions += 1
        self.log("decision", reason=decision.reason, budget_slots=decision.budget_slots)
        target = self.balancer.planner(load_KLE, self.plan, decision.budget_slots)
        check_next(self.plan, target, self.alive_R, same_slots=True)
        check_budget(moves_between(self.plan, target, ranks_per_node=self.cluster.devices_per_node), decision.budget_slots)
        now, then = (plan_balance(plan, view.load_LE, self.alive_R).mean_over_max for plan in (self.plan, target))
        self._begin(REBALANCE, target, self.alive_R, self.balancer.plan_s(self.plan), decline=then <= now * (1 + self.balancer.min_gain))

    def _begin(self, reason: str, target: Plan, alive_R: np.ndarray, planner_s: float, *, decline: bool = False) -> None:
        change = _Pending(reason, alive_R.copy(), self.engine.now, self.out.replay.steps)
        self.pending = change
        change.planning = self.env.process(self._plan(change, target, planner_s, decline))

    def _plan(self, change: _Pending, target: Plan, planner_s: float, decline: bool) -> Steps:
        """Spend the planner's time; then its plan is known."""
        yield self.env.timeout(planner_s)
        self.out.planner_s += planner_s
        if change.over:
            return
        if decline:
            self.out.declined += 1
            self.log("declined", reason=change.reason)
            self._end(change)
            return
        change.target = target
        rows = list(range(target.num_layers))
        size = self.migration.layers_per_chunk or len(rows)
        if np.array_equal(target.slot_rank_S, self.plan.slot_rank_S):
            differs_L = (target.slot_to_expert_LS != self.plan.slot_to_expert_LS).any(axis=1) | (target.shares_LS() != self.plan.shares_LS()).any(axis=1)
            rows = np.flatnonzero(differs_L).tolist()
        else:
            size = len(rows)
        change.chunks = [rows[low : low + size] for low in range(0, len(rows), size)]
        self._next_chunk(change)

    def _next_chunk(self, change: _Pending) -> None:
        """Put the copies of the next chunk in flight, or end the change."""
        assert change.target is not None
        change.transfer = None
        if not change.chunks:
            self._end(change, done=True)
            return
        rows = change.chunks.pop(0)
        following = mixed(self.plan, change.target, rows)
        moves = moves_between(self.plan, following, ranks_per_node=self.cluster.devices_per_node)
        staging_R = moves.staging_R(self.expert_bytes)
        room = self._room(following, staging_R)
        if room < 0:
            self.out.refused += 1
            self.log("refused", reason=change.reason, missing_bytes=-room)
            self._end(change)
            return
        self.out.staging_peak_bytes = max(self.out.staging_peak_bytes, float(staging_R.max()))
        change.rows, change.transfer = rows, self._transfer(moves)

    def _room(self, following: Plan, staging_R: np.ndarray) -> float:
        """Return the bytes that stay free (< 0: missing) on the tightest rank that takes something in, the larger map and the staged copies held."""
        replay, tp = self.out.replay, self.builder.tp
        held = memory.account(self.cluster, self.model, self.plan, attention_tp=tp, kv_entries=replay.kv_entries_peak * tp, tokens=replay.tokens_peak)
        old_R, new_R = (memory.weight_bytes_R(self.model, plan, attention_tp=tp) for plan in (self.plan, following))
        weights_R = np.maximum(old_R, new_R)
        free_R = held.capacity_bytes - weights_R - held.kv_bytes - held.activation_bytes - staging_R
        buffer_R = self.migration.staging_limit_bytes - staging_R
        room = float(np.minimum(free_R, buffer_R)[(staging_R > 0) | (new_R > old_R)].min(initial=np.inf))
        rank = int(free_R.argmin())
        uses = {"weights": weights_R[rank], "kv": held.kv_bytes, "activations": held.activation_bytes, "staging": staging_R[rank]}
        if room >= 0 and sum(uses.values()) > sum(replay.memory.get(held.tier, {}).values()):
            replay.memory[held.tier] = {use: float(nbytes) for use, nbytes in uses.items()}
        return room

    def _transfer(self, moves: Moves) -> Transfer:
        transfer = Transfer(self.engine, self.cluster, self.migration, self.expert_bytes, moves)
        self.out.transfers.append(transfer)
        return transfer

    def _install_chunk(self, change: _Pending) -> Steps:
        assert change.target is not None and change.transfer is not None
        seconds = install_s(self.cluster, change.transfer.moves.written_LR, self.expert_bytes, self.migration)
        if change.reason != REBALANCE:
            seconds += self.membership.rebuild_s
        yield self.env.timeout(seconds)
        self._pause(change, seconds)
        change.moved_bytes += change.transfer.moved_bytes
        self.install(mixed(self.plan, change.target, change.rows), change.alive_R, change.reason)
        self._next_chunk(change)

    def _end(self, change: _Pending, *, done: bool = False) -> None:
        change.over = True
        self.pending = None
        if not done:
            return
        if change.reason == REBALANCE:
            self.out.rebalances += 1
        self.out.changes.append(
            Change(
                reason=change.reason,
                decided_s=change.decided_s,
                installed_s=self.engine.now,
                decided_pass=change.decided_pass,
                installed_pass=self.out.replay.steps,
                moved_bytes=change.moved_bytes,
                pause_s=change.pause_s,
            )  # fmt: skip
        )
        self.log("installed", reason=change.reason, moved_bytes=change.moved_bytes, pause_s=change.pause_s)

    def _abort(self, why: str) -> None:
        change = self.pending
        if change is None:
            return
        if change.transfer is not None:
            change.transfer.cancel()
        self.out.aborted += 1
        self.log("aborted", reason=change.reason, why=why)
        self._end(change)

    # --- ranks that change -------------------------------------------------------------------------------------------

    def _occur(self, event: Event) -> Steps:
        yield self.env.timeout(event.at_s)
        if event.kind == FAIL:
            ranks = tuple(rank for rank in event.ranks if self.alive_R[rank])
            if ranks:
                self.log(FAIL, ranks=ranks)
                self.dead.append((self.engine.now, ranks))
                if not self.failure.triggered:
                    self.failure.succeed()
            return
        if event.kind == JOIN:
            yield self.env.timeout(self.membership.init_s)
            yield self.env.all_of([self.env.process(self._load_rank(rank)) for rank in event.ranks])
        self.waiting.append((event.kind, event.ranks))

    def _load_rank(self, rank: int) -> Steps:
        """Load everything but routed experts from the checkpoint."""
        way = way_of(Network(self.cluster), CHECKPOINT, rank, self.expert_bytes, self.migration)
        nbytes = float(memory.weight_bytes_R(self.model, self.plan, attention_tp=1)[rank])
        yield self.env.timeout(way.latency_s + self.migration.message_s)
        if way.path:
            yield self.engine.start_flow(Flow(f"weights of rank {rank}", nbytes, way.path, self.migration.discipline, ranks=way.ranks))

    def _change_ranks(self, kind: str, ranks: tuple[int, ...]) -> None:
        """Plan for ranks that leave or are ready to join."""
        alive_R = self.alive_R.copy()
        alive_R[list(ranks)] = kind == JOIN
        self.log(kind, ranks=ranks)
        if np.array_equal(alive_R, self.alive_R):
            return
        self._begin(kind, self._placed(alive_R), alive_R, self.membership.placer_s if self.membership.placer else 0.0)

    def _placed(self, alive_R: np.ndarray) -> Plan:
        load_KLE = self.window.load_KLE(self.plan)
        if self.membership.placer is None:
            return refill(self.plan, alive_R, load_KLE.sum(axis=0))
        check_next(self.plan, target := self.membership.placer(load_KLE, self.plan, alive_R.copy()), alive_R, same_slots=False)
        return target

    def _recover(self) -> Steps:
        """Leave the pass, rebuild the group over the survivors, and load what nobody holds; service stands still."""
        began = min(at_s for at_s, _ in self.dead)
        self._abort("a rank died")
        while self.dead:
            dead, self.dead, self.failure = self.dead, [], self.env.event()
            yield self.env.timeout(max(max(at_s for at_s, _ in dead) + self.membership.detection_s - self.engine.now, 0.0))
            alive_R = self.alive_R.copy()
            gone = [rank for _, ranks in dead for rank in ranks]
            alive_R[gone] = False
            self.out.kv_entries_lost += float(self.kv_R[gone].sum())
            yield self.env.timeout(self.membership.rebuild_s)
            lost = int(lost_LE(self.plan, alive_R).sum())
            new = refill(self.plan, alive_R, self.window.load_KLE(self.plan).sum(axis=0))
            moves = moves_between(self.plan, new, ranks_per_node=self.cluster.devices_per_node, alive_R=alive_R)
            if self._room(new, np.zeros(len(alive_R))) < 0:
                raise SimulationError(f"failure of ranks {gone}: no memory for the {lost} experts that nobody holds; keep more room or replicas")
            yield self._transfer(moves).done
            self.out.experts_lost += lost
            self.install(new, alive_R, FAIL)
            self.log("recovered", ranks=gone, experts_lost=lost)
        self.out.downtime_s += self.engine.now - began
        if self.membership.placer is not None:
            self._begin("after failure", self._placed(self.alive_R), self.alive_R, self.membership.placer_s)
