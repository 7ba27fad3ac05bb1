"""Speed of a decode through two and three memory tiers: 1,000 tokens × 32 layers × top-2 of 8 experts.

Run `python benchmarks/bench_offload.py`. The figure is CPU seconds of one core, the best of five runs, checking and laying out the input included; the
baselines are the same decode as a Program with hooks and as simpy actors (on fewer tokens, scaled up), in the same process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from moesim.sim.cache import CacheSettings
from moesim.sim.offload import CopyLink, Decode, DecodeResult, Prefetch, decode
from moesim.sim.offload_actor import decode_events
from moesim.sim.offload_program import decode_program
from moesim.sim.predictors import PredictorView, predict

TOKENS, LAYERS, EXPERTS, TOP_K = 1000, 32, 8, 2
BASELINE_TOKENS = 20


def case(tokens: int, **more: Any) -> Decode:
    """A model of the size of Mixtral behind PCIe 4: routing repeats the last token's experts half of the time."""
    rng = np.random.Generator(np.random.PCG64(0))
    routes_TLK = np.argsort(rng.random((tokens, LAYERS, EXPERTS)), axis=-1)[..., :TOP_K]
    for token in range(1, tokens):
        again = rng.random(LAYERS) < 0.5
        routes_TLK[token, again] = routes_TLK[token - 1, again]
    guess = predict("synthetic:0.9,0.8", PredictorView(routes_TLK=routes_TLK, num_experts=EXPERTS))
    base: dict[str, Any] = {
        "attention_s": 2e-4, "gate_s": 1e-5, "expert_s": 3e-4, "expert_bytes": 88e6, "host": link(25e9), "cache": CacheSettings(slots=4),
        "prefetch": Prefetch(predicted_TLK=guess),
    }  # fmt: skip
    return Decode(routes_TLK=routes_TLK, num_experts=EXPERTS, **(base | more))


def link(bandwidth: float, **more: Any) -> CopyLink:
    return CopyLink(load_s=lambda nbytes: 1e-5 + nbytes / bandwidth, **more)


def best(function: Callable[[Decode], DecodeResult], one: Decode, repeats: int) -> tuple[float, DecodeResult]:
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        result = function(one)
        times.append(time.process_time() - begin)
    return min(times), result


def main() -> None:
    priority: dict[str, Any] = {"discipline": "priority", "chunk_bytes": 4e6}
    kinds: dict[str, dict[str, Any]] = {
        "LRU, on demand": {"prefetch": None},
        "LRU, prefetch, links in order": {},
        "LRU, prefetch, chunks with priority": {"host": link(25e9, **priority)},
        "LFU, on demand": {"prefetch": None, "cache": CacheSettings(slots=4, policy="lfu")},
        "Belady, on demand": {"prefetch": None, "cache": CacheSettings(slots=4, policy="belady")},
        "LRU, prefetch, NVMe behind DRAM": {"disk": link(5e9, name="disk"), "host_cache": CacheSettings(slots=200, scope="global")},
    }
    print(f"{TOKENS} tokens x {LAYERS} layers x top-{TOP_K}, best of 5")
    for name, more in kinds.items():
        seconds, result = best(decode, case(TOKENS, **more), 5)
        counts = result.counts
        print(f"{name:38} {seconds:6.3f} s   hits {counts.hits} late {counts.late_hits} misses {counts.misses} useless {counts.useless_prefetches}")
    for name, function in (("Program with hooks", decode_program), ("simpy actors, a Flow per chunk", decode_events)):
        few = case(BASELINE_TOKENS)
        slow, result = best(function, few, 1)
        fast, same = best(decode, few, 5)
        apart = float(np.abs(result.step_s - same.step_s).max())
        print(f"{name:38} {slow / BASELINE_TOKENS * TOKENS:6.1f} s   from {BASELINE_TOKENS} tokens: {slow / fast:.0f} times slower, {apart:.1e} s apart")


if __name__ == "__main__":
    main()
