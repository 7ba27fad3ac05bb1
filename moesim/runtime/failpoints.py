"""Named places in the migration at which a test can make a rank die, stop, fail or flip a bit.

Only a process started with MOESIM_TEST_FAILPOINTS=1 arms them; elsewhere `hit` returns at once.
"""

from __future__ import annotations

import os
import signal

ACTIONS = ("kill", "stop", "raise", "flip")
_armed: dict[str, str] = {}


def allowed() -> bool:
    """Return True in a process that tests may hurt."""
    return os.environ.get("MOESIM_TEST_FAILPOINTS") == "1"


def arm(name: str, action: str) -> None:
    """Let the next `hit(name)` do `action` once."""
    if allowed() and action in ACTIONS:
        _armed[name] = action


def hit(name: str) -> bool:
    """Do what is armed for `name`; return True if the caller has to flip a bit."""
    action = _armed.pop(name, None) if _armed else None
    if action is None:
        return False
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise RuntimeError(f"failpoint {name}")
    return action == "flip"
