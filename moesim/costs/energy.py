"""Energy and cost of a run from what the hardware document declares: watts of a device by state, dollars per device and hour.

    joules = Σ over devices of  idle · elapsed  +  Σ over states of (state − idle) · seconds in it

A device computes while it runs the operators of passes that hold prompts or train, is in the memory state in those of decode passes (they wait for
weights and KV cache), and communicates while its exchanges transfer; states of different lanes add up. Waiting is idle. Joules, dollars.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moesim.hardware.cluster import Cluster

SECONDS_PER_HOUR = 3600.0


def energy(cluster: Cluster, *, simulated_s: float, state_s: Mapping[str, float], tokens: int) -> dict[str, float] | None:
    """Return `joules` and `joules_per_token`; None unless the document declares the watts of every state.

    simulated_s: length of the run. state_s: state (`compute`, `memory`, `communication`) → seconds in it, summed over devices.
    """
    watts = cluster.device.power_state_w
    idle = cluster.device.power_idle_w
    if watts is None or idle is None:
        return None
    joules = idle * simulated_s * cluster.num_ranks + sum((watts[state] - idle) * seconds for state, seconds in state_s.items())
    return {"joules": joules, "joules_per_token": joules / tokens if tokens else 0.0}


def cost(cluster: Cluster, *, simulated_s: float, tokens: int, output_tokens: int = 0) -> dict[str, float] | None:
    """Return `per_million_tokens` in dollars, and `per_million_output_tokens` where output is told apart.

    None unless the document declares a price, or where no token was processed.
    """
    if cluster.price_per_hour is None or not tokens:
        return None
    dollars = cluster.price_per_hour * cluster.num_ranks * simulated_s / SECONDS_PER_HOUR
    output = {"per_million_output_tokens": dollars / output_tokens * 1e6} if output_tokens else {}
    return {"per_million_tokens": dollars / tokens * 1e6, **output}


def declared(cluster: Cluster, *, simulated_s: float, state_s: Mapping[str, float], tokens: int) -> dict[str, Any]:
    """Return the keys `energy` and `cost` of a report, each only where it was declared."""
    found = {
        "energy": energy(cluster, simulated_s=simulated_s, state_s=state_s, tokens=tokens),
        "cost": cost(cluster, simulated_s=simulated_s, tokens=tokens),
    }
    return {key: value for key, value in found.items() if value is not None}
