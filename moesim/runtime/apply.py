"""Carrying a plan out on a live deployment: check, stage, decide, install, verify; the coordinator's side.

A step that fails before the decision leaves everything as it was; a failed verification puts the old placement back.
Balance before and after is counted on the ranks over windows of steps; only `predicted` is arithmetic: the new plan on
the expert loads of the window before. Shapes: L layers, E experts, R ranks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from moesim.balance import balance_of
from moesim.errors import ApplyError, MoesimError, PlanError, describe
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.counts import gather
from moesim.runtime.deployment import Deployment
from moesim.runtime.journal import Journal
from moesim.runtime.mesh import Layout, is_silent
from moesim.runtime.moves import moves_between, pair_bytes, placement_sha256, staging_bytes_R

SCHEMA = "moesim.apply/1"
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest relative error of the probe's logits when replicas change; permutations must be bitwise equal."""
HOLD_S = 120.0
"""Longest wait for ranks that train to come to a step boundary together."""
DECLARED_BYTES_PER_S = 1e9
"""What a dry run takes a rank to receive where nothing was measured."""
STAGE_BYTES_PER_S = 20e6
"""Slowest transfer that is waited for; the stage deadline grows with the bytes."""


def check_plan(plan: Plan, *, spec: Any, installed: Plan, slot_capacity: int) -> None:
    """Raise PlanError with the first reason why `plan` cannot run on the deployment that serves `spec`."""
    plan.check_model(name=spec.name, num_experts=spec.num_experts, moe_layer_ids=spec.moe_layer_ids)
    made_for = plan.fingerprints.get("model")
    if made_for and made_for != spec.sha256:
        rule = f"must be that of {spec.name}, {spec.sha256[:12]}"
        raise PlanError(describe(plan.source, "fingerprints.model", made_for[:12], rule, f"the plan was made for {plan.model}; solve again"))
    if plan.policies:
        rule = "cannot be carried out by a live deployment, which only places experts"
        raise PlanError(describe(plan.source, "policies", sorted(plan.policies), rule, "leave them out"))
    running = Layout.of(installed)
    wanted = running if is_silent(plan.parallel, plan.num_ranks) else Layout.of(plan)
    for name in ("tp", "pp"):
        if getattr(wanted, name) != getattr(running, name):
            rule = f"must equal the {getattr(running, name)} of the running deployment, which only moves experts"
            raise PlanError(describe(plan.source, f"parallel.{name}", getattr(wanted, name), rule, "relaunch with this plan"))
    if plan.num_ranks != installed.num_ranks:
        rule = f"must equal the {installed.num_ranks} ranks of the deployment"
        raise PlanError(describe(plan.source, "num_ranks", plan.num_ranks, rule, "solve for this many ranks"))
    most = int(np.bincount(plan.slot_rank_S, minlength=plan.num_ranks).max())
    if most > slot_capacity:
        rule = f"must be <= {slot_capacity}, the slot capacity"
        raise PlanError(describe(plan.source, "slots per rank", most, rule, "start the deployment with --slots-per-rank"))


class Apply:
    """One attempt to install one plan."""

    def __init__(
        self, deployment: Deployment, *, spec: Any, installed: Plan, plan: Plan, number: int, slot_capacity: int, window: int, journal: Journal,
        progress: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.ranks, self.spec, self.old = deployment, spec, installed
        self.new = replace(plan, parallel=installed.parallel) if is_silent(plan.parallel, plan.num_ranks) else plan
        self.number, self.slot_capacity, self.window, self.journal, self.progress = number, slot_capacity, window, journal, progress
        self.installed = installed
        """What the ranks run now; the caller keeps it."""
        self.epoch = -1

    def run(self, *, dry_run: bool) -> dict[str, Any]:
        """Carry the plan out and return the report; raise ApplyError or PlanError with the reason if it was refused."""
        check_plan(self.new, spec=self.spec, installed=self.old, slot_capacity=self.slot_capacity)
        self.progress("CHECK")
        checks = self._check()
        moves = moves_between(self.old, self.new)
        expert_bytes = checks[0]["expert_bytes"]
        pairs = pair_bytes(moves, expert_bytes, self.old.num_ranks)
        between = int(pairs.sum() - np.trace(pairs))
        report: dict[str, Any] = {
            "schema": SCHEMA, "status": "unchanged", "epoch": self.epoch, "map_sha256": self.new.map_sha256,
            "moved": {"slots": len(moves), "bytes": int(pairs.sum()), "between_ranks": between, "rank_pairs": pairs.tolist()},
            "balance": {"before": None, "after": None, "predicted": None}, "pause_ms": 0.0, "outputs_equal": True, "break_even_steps": 0,
        }  # fmt: skip
        slots = [np.bincount(plan.slot_rank_S, minlength=self.old.num_ranks) for plan in (self.old, self.new)]
        grown = np.maximum(slots[1] - slots[0], 0) * self.old.num_layers * expert_bytes
        staging = staging_bytes_R(pairs) + grown
        if placement_sha256(self.old) == placement_sha256(self.new):
            return report
        self.progress("MEASURE")
        before = self._measure_before()
        predicted = self.new.rank_load_LR(before["rows_LE"])
        report["balance"] |= {"before": before["balance"], "predicted": balance_of(predicted).mean_over_max}
        report["staging_bytes"] = int(staging.max())
        if dry_run:
            copy_s = max(check["copy_s"] for check in checks) * int(pairs.sum(0).max()) / expert_bytes
            parts = {"wait_ms": 0.0, "probe_ms": 2 * before["step_ms"], "install_ms": 2e3 * copy_s}  # two probes; bytes change places
            if checks[0]["trains"]:  # held while weights move
                parts["wait_ms"] = 1e3 * int((pairs - np.diag(np.diag(pairs))).sum(0).max()) / DECLARED_BYTES_PER_S
            report |= {"status": "dry-run", "pause_ms": sum(parts.values()), "pause_parts_ms": parts, "outputs_equal": None}
            report["break_even_steps"] = self._break_even(report["pause_ms"] / 1e3, before, predicted)
            return report
        free = min(check["free_bytes"] for check in checks)
        if int(staging.sum()) > free:
            needed = f"{int(staging.sum())} B"
            raise ApplyError(describe("deployment", "staging memory", needed, f"must be <= the {free} B free", "move fewer experts at a time"))
        try:
            if checks[0]["trains"]:  # digests and probes compare only what does not change meanwhile
                self.progress("HOLD")
                self.ranks.schedule("hold", timeout_s=HOLD_S)
            self._change(report, before, len(moves) * expert_bytes)
        finally:
            self._finish()
        return report

    # --- the protocol -----------------------------------------------------------------------------

    def _check(self) -> list[dict[str, Any]]:
        checks = self.ranks.ask("check")
        for key in ("fingerprint", "placement", "epoch", "slot_capacity"):
            values = [check[key] for check in checks]
            if len(set(values)) != 1:
                raise ApplyError(f"the ranks disagree on {key}: {[str(value)[:12] for value in values]}; restart the deployment")
        if checks[0]["placement"] != placement_sha256(self.old):
            raise ApplyError("the ranks run another placement than the journal says; restart the deployment")
        self.epoch = checks[0]["epoch"]
        failpoints.hit("checked")
        return checks

    def _change(self, report: dict[str, Any], before: dict[str, Any], moved_bytes: int) -> None:
        timeout_s = 15.0 + moved_bytes / STAGE_BYTES_PER_S
        digests = self._digest_table(timeout_s)
        self.ranks.schedule("probe")
        self.progress("PREPARE")
        failpoints.hit("prepare")
        self.journal.append("prepare", apply=self.number, base=placement_sha256(self.old), epoch=self.epoch + 1, plan=self._stamped())
        try:
            failpoints.hit("prepared")
            self.progress("STAGE")
            self.ranks.store.set(f"plan/{self.number}", _json(self._stamped()))
            begin = time.monotonic()
            ready = self.ranks.ask("stage", apply=self.number, timeout_s=timeout_s)
            report["stage_ms"] = (time.monotonic() - begin) * 1e3
            failpoints.hit("ready")
            self._compare_staged(ready, digests)
            self.progress("INSTALL")
            self.ranks.schedule("install", epoch=self.epoch + 1, before_decision=partial(self._record, "commit"), decided=partial(self._now_runs, self.new))
        except BaseException as cause:
            if self.installed is self.new and not self.ranks.failure:
                raise ApplyError(f"the plan is installed but was not verified: {cause}") from None
            if self.installed is not self.new:
                with contextlib.suppress(ApplyError):  # without the line the journal names the old placement, unless the commit was just written
                    self.journal.append("abort", apply=self.number)
            raise
        self.progress("VERIFY")
        answers, reason = self._verify(report, digests, timeout_s)
        if reason:
            self._roll_back(report, reason)
            return
        pauses = [answer["pause"] for answer in answers]
        report |= {"status": "installed", "epoch": self.epoch + 1, "pause_ms": max(sum(pause.values()) for pause in pauses)}
        report["pause_parts_ms"] = {part: max(pause.get(part, 0.0) for pause in pauses) for part in ("wait_ms", "probe_ms", "install_ms")}
        with contextlib.suppress(ApplyError):  # no decision: a full disk is no reason to call an installed plan a failure
            self.journal.append("done", apply=self.number)
        failpoints.hit("verified")
        self.ranks.ask("release")
        after = self._measure(self._next(self.window))
        report["balance"]["after"] = after["balance"]
        report["step_ms"] = {"before": before["step_ms"], "after": after["step_ms"]}
        report["break_even_steps"] = self._break_even(report["pause_ms"] / 1e3, before, after["load_LR"])

    def _now_runs(self, plan: Plan) -> None:
        self.installed = plan

    def _record(self, kind: str, step: int) -> None:
        failpoints.hit(f"{kind}.decide")
        self.journal.append(kind, apply=self.number, step=step)
        failpoints.hit(f"{kind}.written")

    def _stamped(self) -> dict[str, Any]:
        from moesim.files import canonical_json, sha256_hex

        content = self.new.content()
        return {**content, "sha256": sha256_hex(canonical_json(content))}

    def _digest_table(self, timeout_s: float) -> dict[tuple[int, int], str]:
        """Return the digest of every (layer row, expert); raise ApplyError if its replicas differ, or optimizers are not at the same step."""
        table: dict[tuple[int, int], str] = {}
        answers = self.ranks.ask("digests", timeout_s=timeout_s)
        for rank, answer in enumerate(answers):
            first = rank // self.old.num_ranks * self.old.num_ranks  # of the same pipeline stage
            other, state = answers[first]["state"], answer["state"]
            for key in sorted(other.keys() | state.keys()):
                if other.get(key) != state.get(key):
                    values = f"is {state.get(key)} on rank {rank} and {other.get(key)} on rank {first}"
                    raise ApplyError(f"{key} {values}; let every rank's optimizer take the same steps before experts move")
            for item in answer["table"]:
                key = (item["row"], item["expert"])
                if table.setdefault(key, item["digest"]) != item["digest"]:
                    raise ApplyError(f"rank {rank}: expert {key[1]} of layer row {key[0]} differs from its other replica")
        return table

    def _compare_staged(self, ready: list[dict[str, Any]], digests: dict[tuple[int, int], str]) -> None:
        staged: dict[int, dict[str, str]] = {}
        for rank, answer in enumerate(ready):  # pipeline stages hold different layers under the same ranks of the plan
            staged.setdefault(rank % self.old.num_ranks, {}).update(answer["digests"])
        for move in moves_between(self.old, self.new):
            got = staged[move.target].get(f"{move.layer}:{move.target_slot}")
            if got != digests[move.layer, move.expert]:
                where = f"expert {move.expert} of layer row {move.layer}"
                raise ApplyError(f"rank {move.target}: {where} in staging differs from the live one on rank {move.source}; nothing was installed")

    def _verify(self, report: dict[str, Any], digests: dict[tuple[int, int], str], timeout_s: float) -> tuple[list[dict[str, Any]], str | None]:
        """Return the ranks' answers and why the new placement must go, or None; one that cannot be verified must go too."""
        try:
            answers = self.ranks.schedule("probe")
            failpoints.hit("probed")
            return answers, self._judge(report, answers, digests, timeout_s)
        except Exception as cause:
            if self.ranks.failure:
                raise
            report["outputs_equal"] = None
            return [], f"it could not be carried out ({cause})"

    def _judge(self, report: dict[str, Any], answers: list[dict[str, Any]], digests: dict[tuple[int, int], str], timeout_s: float) -> str | None:
        """Fill `outputs_equal` and return why the new placement must go, or None."""
        exact = bool((self.old.replicas_LE == 1).all() and (self.new.replicas_LE == 1).all())
        bitwise, error = all(answer["bitwise"] for answer in answers), max(answer["relative_error"] for answer in answers)
        tolerance = 0.0 if exact else TOLERANCE[self.spec.dtype]
        report["outputs_equal"] = bitwise if exact else bool(error <= tolerance)
        report["outputs"] = {"bitwise": bitwise, "relative_error": error if math.isfinite(error) else None, "tolerance": tolerance}
        try:
            if self._digest_table(timeout_s) != digests:
                return "the experts' digests differ from those before"
        except ApplyError as cause:
            return str(cause)
        return None if report["outputs_equal"] else f"the probe's outputs differ (relative error {error:.3g}, allowed {tolerance:g})"

    def _roll_back(self, report: dict[str, Any], reason: str) -> None:
        self.progress("ROLLBACK")
        try:
            answers = self.ranks.schedule(
                "restore", epoch=self.epoch + 2, before_decision=partial(self._record, "rollback"), decided=partial(self._now_runs, self.old)
            )
        except BaseException:
            if self.installed is self.new and self.journal.records[-1]["kind"] == "rollback":
                with contextlib.suppress(ApplyError):  # written but never announced: the ranks run the new placement
                    self.journal.append("commit", apply=self.number)
            raise
        report |= {"status": "rolled_back", "reason": reason, "epoch": self.epoch + 2, "map_sha256": self.old.map_sha256}
        report |= {"pause_ms": max(sum(answer["pause"].values()) for answer in answers), "break_even_steps": None}

    def _finish(self) -> None:
        """Free the staging buffers; a rank that is gone by now has no say in the outcome."""
        try:
            self.ranks.ask("finish", timeout_s=3.0)
        except MoesimError as cause:
            self.progress(f"staging not confirmed free: {cause}")

    # --- measuring --------------------------------------------------------------------------------

    def _latest(self, steps: int) -> int:
        """Wait until `steps` steps have been served; return the first of the last `steps`."""
        return self._wait_for(steps) - steps

    def _next(self, steps: int) -> int:
        """Return the first step after those that any rank has begun."""
        return max(answer["step"] for answer in self.ranks.ask("status")) + 1

    def _wait_for(self, step: int) -> int:
        """Wait until all ranks have served `step` steps; raise ApplyError if they stand still. Return the smallest count."""
        last, moved = -1, time.monotonic()
        while True:
            least = min(answer["step"] for answer in self.ranks.ask("status"))
            if least >= step:
                return int(least)
            if least != last:
                last, moved = least, time.monotonic()
            elif time.monotonic() - moved > 10:
                raise ApplyError(f"serving has stood still at step {least} for 10 s")
            time.sleep(0.05)

    def _measure_before(self) -> dict[str, Any]:
        """Return what was counted over the last window; over the next one where the last saw another change."""
        try:
            return self._measure(self._latest(self.window))
        except ApplyError:
            if self.ranks.failure:
                raise
            return self._measure(self._next(self.window))

    def _measure(self, first: int) -> dict[str, Any]:
        """Return what the ranks counted over the window of steps from `first` on."""
        last = first + self.window
        self._wait_for(last)
        answers = self.ranks.ask("window", first=first, last=last)
        epochs = {epoch for answer in answers for epoch in answer["epochs"]}
        if len(epochs) != 1:
            raise ApplyError(f"steps {first}..{last - 1} were served in epochs {sorted(epochs)}; balance needs one")
        return gather(answers, self.old.num_ranks)

    def _break_even(self, cost_s: float, before: dict[str, Any], after_LR: np.ndarray) -> int | None:
        """Return the steps after which the pause is paid back, or None for never.

        What a step saves is the work of the busiest rank of every layer, at the measured seconds per row.
        """
        rows = float(before["load_LR"].sum())
        saved_rows = float(before["load_LR"].max(1).sum()) - float(np.asarray(after_LR).max(1).sum())
        saved_s = saved_rows / self.window * before["compute_s"] / rows if rows else 0.0
        return math.ceil(cost_s / saved_s) if saved_s > 0 else None


def _json(value: Any) -> str:
    from moesim.files import canonical_json

    return canonical_json(value).decode()
