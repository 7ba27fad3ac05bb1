"""Named places in the protocol at which a test can make a rank or the coordinator die, stop, fail or flip a bit.

Only a process started with MOESIM_TEST_FAILPOINTS=1 arms them; elsewhere `hit` returns at once.
"""

from __future__ import annotations

import os
import signal
import time

ACTIONS = ("kill", "stop", "raise", "flip")
_armed: dict[str, tuple[str, int]] = {}


def allowed() -> bool:
    """Return True in a process that tests may hurt."""
    return os.environ.get("MOESIM_TEST_FAILPOINTS") == "1"


def arm(name: str, action: str, skip: int = 0) -> None:
    """Let `hit(name)` do `action` once, after `skip` hits that do nothing."""
    if allowed() and action in ACTIONS:
        _armed[name] = action, skip


def hit(name: str) -> bool:
    """Do what is armed for `name`; return True if the caller has to flip a bit."""
    action, skip = _armed.pop(name, ("", 0)) if _armed else ("", 0)
    if skip:
        _armed[name] = action, skip - 1
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)  # the thread that asks may run on for a moment before all of them stand
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    return action == "flip"
