"""Speed of the serving simulation: the shipped 300-request run with its set-up, and many requests.

Baseline: the scheduler of the tests, which visits every sequence at every step. `python benchmarks/bench_serving.py [requests]`
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the reference scheduler lives with the tests

from moesim.api.documents import cluster_of, model_of
from moesim.api.serving_deployment import deployment_of
from moesim.api.validation import read_run
from moesim.costs.group import Group
from moesim.sim.serving.settings import ServingSettings
from moesim.sim.settings import Settings
from moesim.traces.requests.document import Requests
from moesim.traces.requests.open import open_requests
from tests.sim.serving.toys import pool, reference, run


def recorded() -> None:
    """Time the shipped run: set-up (tables, curves) and simulation."""
    rows = read_run("rtx-pro-6000_llama-3.1-8b").requests
    settings = Settings(serving=ServingSettings(max_num_seqs=128, max_num_batched_tokens=2048))
    cluster, model = cluster_of("rtx-pro-6000-1"), model_of("llama-3.1-8b")
    for name in ("first", "again"):
        began = time.process_time()
        deployment = deployment_of(cluster, model, settings, group=Group(1, 1, 1, 1, 0), routing=None)
        built = time.process_time()
        done = deployment.run(Requests(source="run", format="run", read=lambda: iter(rows)))
        ended = time.process_time()
        each = (ended - built) / done.sums.steps * 1e6
        print(f"300 requests, {done.simulated_s:.0f} s ({name}): set-up {built - began:.3f} s, simulation {ended - built:.3f} s, {each:.1f} us per step")


def many(count: int) -> None:
    """Time `count` requests on a toy instance, and the first of them visited one by one."""

    def time_s(prompt: int, decodes: int) -> float:
        return 0.003 + prompt * 2e-6 + decodes * 2e-5

    settings = ServingSettings(max_num_seqs=512, max_num_batched_tokens=8192)
    requests = open_requests(f"synthetic:poisson:40,prompt=100-1500,output=50-350,n={count}", seed=1)
    began = time.process_time()
    done, _ = run(requests, settings, pool(time_s))
    spent = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{count} requests: {spent:.1f} s, {spent / done.sums.steps * 1e6:.1f} us per step, {peak:.0f} MB at most")
    few = list(open_requests("synthetic:poisson:40,prompt=100-1500,output=50-350,n=500", seed=1))
    for name, call in (("calendar", lambda: run(few, settings, pool(time_s))), ("one by one", lambda: reference(few, settings, 1 << 20, time_s))):
        began = time.process_time()
        call()
        print(f"500 requests, {name}: {time.process_time() - began:.2f} s")


if __name__ == "__main__":
    recorded()
    many(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
