"""The live side: a model spread over ranks by a plan, a small serving loop, and the protocol that changes the plan.

`client` and `control` talk to a deployment and need no torch; `launch` starts one (`templates` elsewhere), with `coordinator`,
`apply`, `deployment` and `journal` in the launcher and `worker`, `agent`, `migration`, `serving` and `capture` in the ranks. A rank's
part of the model is `mesh`, `model`, `expert_parallel`, `tensor_parallel` and `pipeline`; `checkpoint` and `training` work on parts.
A loop of your own joins by `spread` and `attach` (`own_loop`, with the coordinator in `companion`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.runtime.agent import Agent
    from moesim.runtime.own_loop import attach, spread

__all__ = ["Agent", "attach", "spread"]


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is asked for."""
    if name == "Agent":
        from moesim.runtime.agent import Agent

        return Agent
    if name in ("attach", "spread"):
        from moesim.runtime import own_loop

        return getattr(own_loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
