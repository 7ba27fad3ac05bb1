"""What users and the command line call to talk to a running deployment; needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moesim.files import canonical_json, sha256_hex
from moesim.plan import Plan
from moesim.runtime.control import call


def apply_plan(address: str, plan: Plan, *, dry_run: bool = False, on_progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Install `plan` on the deployment at `address` ("HOST:PORT") and return the report, schema moesim.apply/1.

    The status is installed, unchanged, dry-run, or rolled_back if verification failed. Raises ApplyError with the
    deployment's reason if it refuses or fails.
    """
    content = plan.content()
    stamped = {**content, "sha256": sha256_hex(canonical_json(content))}
    return dict(call(address, "apply", plan=stamped, name=plan.source, dry_run=dry_run, on_progress=on_progress)["report"])


def status(address: str) -> dict[str, Any]:
    """Return state, epoch, map and pids of the deployment."""
    return call(address, "status")


def metrics(address: str) -> dict[str, Any]:
    """Return per rank: tokens, step times, answered requests and the digest of every wave's answers."""
    return call(address, "metrics")


def publish_trace(address: str) -> dict[str, Any]:
    """Let the deployment write the trace of everything routed so far; return the number of rows."""
    return call(address, "trace")


def save_checkpoint(address: str, folder: str) -> dict[str, Any]:
    """Let the deployment write a checkpoint to the new `folder` (absolute, on its machines) between two steps; return step and epoch."""
    return call(address, "checkpoint", folder=folder)


def stop(address: str) -> None:
    """Stop the deployment."""
    call(address, "stop")
