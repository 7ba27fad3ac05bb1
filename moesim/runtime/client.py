"""What users and the command line call to talk to a running deployment; needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from moesim.plan import Plan
from moesim.runtime.control import call


def apply_plan(
    address: str, plan: Plan, *, dry_run: bool = False, base: str | None = None, deadline_s: float = math.inf,
    on_progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Install `plan` on the deployment at `address` ("HOST:PORT") and return the report, schema moesim.apply/1.

    The status is installed, unchanged, dry-run, or rolled_back if verification failed. Raises ApplyError with the
    deployment's reason if it refuses or fails. base: the placement that the plan was made for (`counts` names it); if another one
    is installed by then, StaleBase is raised. deadline_s: raise Unreachable if there is no answer by then.
    """
    asked = {"plan": plan.stamped(), "name": plan.source, "dry_run": dry_run, "base": base}
    return dict(call(address, "apply", **asked, on_progress=on_progress, deadline_s=deadline_s)["report"])


def status(address: str) -> dict[str, Any]:
    """Return state, epoch, map and pids of the deployment."""
    return call(address, "status")


def metrics(address: str) -> dict[str, Any]:
    """Return per rank: tokens, step times, answered requests and the digest of every wave's answers."""
    return call(address, "metrics")


def counts(address: str, first: int, last: int, *, known: str | None = None) -> dict[str, Any]:
    """Return what the ranks counted over steps first..last-1 (schema moesim.counts/1): loads per expert and rank, seconds, exchanges since the start.

    Nothing stands still for it. known: a placement that the caller has; the answer holds the installed plan if it is another one.
    Raises ApplyError if the steps have not been served, or not within the last few thousand.
    """
    return call(address, "counts", first=first, last=last, known=known)


def publish_trace(address: str) -> dict[str, Any]:
    """Let the deployment write the trace of everything routed so far; return the number of rows."""
    return call(address, "trace")


def save_checkpoint(address: str, folder: str) -> dict[str, Any]:
    """Let the deployment write a checkpoint to the new `folder` (absolute, on its machines) between two steps; return step and epoch."""
    return call(address, "checkpoint", folder=folder)


def stop(address: str) -> None:
    """Stop the deployment."""
    call(address, "stop")
