"""An offloaded decode step: experts lie behind a link, the device keeps two per layer, and a prefetch hides what it can."""

import numpy as np

from moesim.sim.cache import CacheSettings
from moesim.sim.offload import CopyLink, Decode, Prefetch, decode

ROUTES_TLK = np.array(
    [  # three tokens, two layers, one expert each
        [[0], [0]],
        [[1], [0]],
        [[2], [1]],
    ]
)


def case(slots: int, ahead: bool, warm: bool = False) -> Decode:
    """Return attention 3 ms, gate 1 ms, an expert 2 ms; copying an expert takes 100 MB / (20 GB/s) = 5 ms."""
    return Decode(
        routes_TLK=ROUTES_TLK,
        num_experts=4,
        attention_s=3e-3,
        gate_s=1e-3,
        expert_s=2e-3,
        expert_bytes=100e6,
        host=CopyLink(load_s=lambda nbytes: nbytes / 20e9),
        cache=CacheSettings(slots=slots, policy="lru", initial=tuple((layer, expert) for layer in range(2) for expert in range(4)) if warm else ()),
        prefetch=Prefetch(predicted_TLK=ROUTES_TLK, lookahead=1, across_steps=True) if ahead else None,
    )


print("                       token ms            hits late miss   stall ms")
for title, inputs in (
    ("on demand, no cache", case(0, ahead=False)),
    ("LRU, 2 experts a layer", case(2, ahead=False)),
    ("exact prefetch, LRU 2", case(2, ahead=True)),
    ("all 4 resident", case(4, ahead=False, warm=True)),
):
    result = decode(inputs)
    steps = " ".join(f"{value * 1e3:5.0f}" for value in result.step_s)
    counts = result.counts
    stall = sum(result.stall_s.values()) * 1e3
    print(f"{title:<24}{steps}  {counts.hits:>6} {counts.late_hits:>4} {counts.misses:>4} {stall:>10.0f}")
