"""What the control port of a deployment answers: status, metrics, counts, apply, trace, checkpoint, stop."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from moesim.errors import ApplyError, InputError, MoesimError, PlanError, describe
from moesim.plan import Plan
from moesim.runtime import failpoints
from moesim.runtime.agent import LEAVE_S
from moesim.runtime.apply import TOLERANCE, Apply
from moesim.runtime.control import StaleBase
from moesim.runtime.counts import counts_answer, window_of
from moesim.runtime.deployment import Deployment, LostAgain
from moesim.runtime.journal import Journal
from moesim.runtime.moves import placement_sha256
from moesim.runtime.recovery import check_can_shrink, shrunk

OPS = ("status", "metrics", "counts", "apply", "trace", "checkpoint", "stop", "failpoint")
SAVE_S = 3600.0
"""Longest wait for a checkpoint."""
REBUILD_S = 10.0
"""Time for the experts of lost ranks to be loaded, beyond the time to meet."""


class Coordinator:
    """Owns the installed plan and the journal; one change at a time."""

    def __init__(
        self, deployment: Deployment, *, spec: Any, plan: Plan, slot_capacity: int, window: int, journal: Journal, publish: Callable[[], int | None],
    ) -> None:  # fmt: skip
        """publish: writes the trace so far and returns its number of rows, or None if nothing is recorded."""
        self.deployment, self.spec, self.plan, self.journal = deployment, spec, plan, journal
        self.slot_capacity, self.window, self._publish = slot_capacity, window, publish
        self.applies: Counter[str] = Counter()
        """How attempts to install a plan have ended."""
        self.stop_asked = threading.Event()
        self._busy = threading.Lock()  # an apply, a checkpoint or a recovery
        self._applies = sum(record["kind"] == "prepare" for record in journal.records)

    def recover(self, *, timeout_s: float) -> str | None:
        """Go on without the ranks that were lost; return None, or why the rest cannot serve on.

        timeout_s: of an exchange, and so the longest that a rank may take to notice. An apply under way ends by itself first, because
        the deployment has failed; what the journal says is installed is what the survivors go on with.
        """
        ranks, reason = self.deployment, str(self.deployment.failure)
        with self._busy:
            try:
                check_can_shrink(self.plan)
                begin = time.monotonic()
                while True:
                    said = ranks.call_out(timeout_s + LEAVE_S)
                    if not said:
                        return f"{reason}; no rank is left"
                    members = sorted(said)
                    plan = self.plan if len(members) == ranks.size else shrunk(self.plan, members, self.slot_capacity)
                    call = {
                        "base": self.plan.stamped(), "plan": plan.stamped(), "epoch": max(answer["epoch"] for answer in said.values()) + 1,
                        "step": max(answer["step"] for answer in said.values()) + 1, "wave": min(answer["wave"] for answer in said.values()),
                    }  # fmt: skip
                    try:
                        ranks.rebuild(members, timeout_s + REBUILD_S, call, partial(self._agree_to_shrink, plan))
                    except LostAgain:
                        continue
                    ranks.lost_s = time.monotonic() - begin
                    return None
            except MoesimError as cause:
                ranks.failure = f"{reason}; the other ranks cannot serve on: {cause}"
                return ranks.failure

    def _agree_to_shrink(self, plan: Plan, reports: list[dict[str, Any]]) -> None:
        """Write the decision down; raise ApplyError if the outputs are not what they were when serving began."""
        error, allowed = max(report["relative_error"] for report in reports), TOLERANCE[self.spec.dtype]
        if not error <= allowed:
            raise ApplyError(f"the probe's outputs differ from those at the start (relative error {error:.3g}, allowed {allowed:g})")
        self.journal.append("shrink", plan=plan.stamped(), lost=self.deployment.size - plan.num_ranks)
        self.plan = plan

    def handle(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        """Answer one request; raise a MoesimError with the reason if it is refused."""
        op = request["op"]
        if op not in OPS:
            raise InputError(f"op {op[:40]!r} is not known; it must be one of {', '.join(OPS)}")
        return getattr(self, f"_{op}")(request, progress)

    def _status(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        ranks = self.deployment
        statuses = ranks.statuses() if ranks.failure is None else []
        return {
            "schema": "moesim.status/1", "state": "serving" if ranks.failure is None else "failed", "reason": ranks.failure, "model": self.spec.name,
            "ranks": ranks.size, "pids": ranks.pids, "map_sha256": self.plan.map_sha256, "slot_capacity": self.slot_capacity, "rank_status": statuses,
            "lost": ranks.lost, "num_experts": self.spec.num_experts, "moe_layer_ids": list(self.spec.moe_layer_ids), "window": self.window,
        }  # fmt: skip

    def _metrics(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        shown = {"applies": dict(self.applies), "late": dict(self.deployment.late)}
        return {"schema": "moesim.metrics/1", **shown, "rank_metrics": self.deployment.ask("metrics")}

    def _counts(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        first, last = window_of(request)
        plan = self.plan
        answers = self.deployment.ask("window", first=first, last=last)
        placement = placement_sha256(plan)
        known = {"plan": plan.stamped()} if request.get("known") != placement else {}
        return {"schema": "moesim.counts/1", "first": first, "last": last, **counts_answer(answers, plan.num_ranks), "placement": placement, **known}

    def _trace(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        rows = self._publish()
        if rows is None:
            raise ApplyError("the deployment records no trace; start it with --trace-out")
        return {"schema": "moesim.serve-trace/1", "rows": rows}

    def _checkpoint(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        folder = request.get("folder")
        if not isinstance(folder, str) or not os.path.isabs(folder) or "\0" in folder:
            raise InputError(describe("checkpoint", "folder", folder, "must be an absolute path that all ranks can write to"))
        with self._alone():
            answers = self.deployment.schedule("save", folder=folder, timeout_s=SAVE_S)
        return {"schema": "moesim.checkpoint-saved/1", "folder": folder, "step": answers[0]["step"], "epoch": answers[0]["epoch"]}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other changes out; raise ApplyError if one is under way."""
        if not self._busy.acquire(blocking=False):
            raise ApplyError("another apply is under way; try again when it has ended")
        try:
            yield
        finally:
            self._busy.release()

    def _stop(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        self.stop_asked.set()
        return {"schema": "moesim.stop/1"}

    def _failpoint(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        if not failpoints.allowed():
            raise InputError("failpoints are for tests; start the deployment with MOESIM_TEST_FAILPOINTS=1")
        if request["rank"] == "coordinator":
            failpoints.arm(request["name"], request["action"], int(request.get("skip", 0)))
        else:
            self.deployment.ask("failpoint", rank=request["rank"], name=request["name"], do=request["action"], skip=request.get("skip", 0))
        return {}

    def _apply(self, request: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
        plan = Plan.from_content(request.get("plan"), str(request.get("name", "plan"))[:200])
        dry_run = request.get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise PlanError("request: dry_run must be true or false")
        with self._alone():
            base = request.get("base")
            if base is not None and base != placement_sha256(self.plan):
                raise StaleBase(f"the plan was made for placement {str(base)[:12]}, but {placement_sha256(self.plan)[:12]} is installed; plan again")
            self._applies += 1
            change = Apply(
                self.deployment, spec=self.spec, installed=self.plan, plan=plan, number=self._applies, slot_capacity=self.slot_capacity,
                window=self.window, journal=self.journal, progress=progress,
            )  # fmt: skip
            try:
                report = change.run(dry_run=dry_run)
                self.applies[report["status"]] += 1
                return {"report": report}
            except BaseException as cause:
                self.applies["refused" if isinstance(cause, PlanError) else "failed"] += 1
                raise
            finally:
                self.plan = change.installed
