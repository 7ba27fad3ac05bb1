"""One rank of a calibration: times every case while all ranks time the same one, as in a deployment in which all of them compute at once.

Started by `calibrate.measure`, or by torchrun with the settings in the JSON file that MOESIM_CALIBRATE names. A sample is the mean over a block of calls that
fills a fixed time, so that what processes on too few cores take from each other is in it; a case is the median of its blocks. Writes `rank-<r>.json`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

BLOCKS = 5
WARM_UP = 2
SHORT = 0.1
"""Length of a block, relative to the usual one, once the time limit is over."""


def timed(run: Callable[[], Any], block_s: float, wait: Callable[[], None]) -> list[float]:
    """Return seconds per call of `BLOCKS` blocks; `wait` returns when the device has done what was asked of it."""
    for _ in range(WARM_UP):
        run()
    wait()
    samples = []
    for _ in range(BLOCKS):
        begin = time.perf_counter()
        calls, end = 0, begin + block_s
        while time.perf_counter() < end or not calls:
            run()
            calls += 1
            if calls % 64 == 0:
                wait()  # or a queue of kernels would outlast the block
        wait()
        samples.append((time.perf_counter() - begin) / calls)
    return samples


def timed_together(run: Callable[[], Any], block_s: float, wait: Callable[[], None], agree: Callable[[float], float]) -> list[float]:
    """Return seconds per call of `BLOCKS` blocks with as many calls on all ranks; `agree` returns the largest of the ranks' values."""
    for _ in range(WARM_UP):
        run()
    wait()
    agree(0.0)
    begin = time.perf_counter()
    run()
    wait()
    calls = max(int(block_s / agree(time.perf_counter() - begin)), 1)
    samples = []
    for _ in range(BLOCKS):
        agree(0.0)
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        wait()
        samples.append((time.perf_counter() - begin) / calls)
    return samples


def main() -> None:
    """Measure as the settings say."""
    import torch
    import torch.distributed as dist

    from moesim.runtime import calibrate_cases as cases
    from moesim.runtime.worker import die_with_parent

    settings = json.loads(Path(os.environ["MOESIM_CALIBRATE"]).read_bytes())
    rank, size = int(os.environ["RANK"]), int(settings["ranks"])
    die_with_parent()
    torch.set_num_threads(settings["threads"])
    cuda = settings["device"] == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    wait = (lambda: torch.cuda.synchronize(device)) if cuda else (lambda: None)
    store = dist.TCPStore(settings["host"], settings["port"], is_master=False, timeout=timedelta(seconds=60))
    group = _group(store, rank, size, settings["host"], device)
    scratch = torch.zeros(1, dtype=torch.float64, device=device)

    def agree(value: float) -> float:
        scratch.fill_(value)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MAX
        group.allreduce([scratch], options).wait()
        return float(scratch.item())

    grid = cases.Grid(**settings["grid"])
    rows: list[dict[str, Any]] = []

    def keep(case: Any, samples: list[float]) -> None:
        rows.append({"kind": case.kind, "keys": dict(case.keys), "samples": samples})

    began = time.monotonic()

    def block_s() -> float:
        """Return how long a block is, the same on all ranks, which begin it together."""
        late = agree(time.monotonic() - began) > settings["limit_s"]
        return float(settings["block_s"]) * (SHORT if late else 1.0)

    with torch.inference_mode():
        for case in cases.kernels(grid, device):
            keep(case, timed(case.run, block_s(), wait))
        if size > 1:
            for case in cases.collectives(grid, group, rank, size, device):
                keep(case, timed_together(case.run, block_s(), wait, agree))
            for case in cases.exchanges(grid, group, rank, size, device):
                keep(case, timed_together(case.run, block_s(), wait, agree))
    agree(0.0)
    Path(settings["folder"], f"rank-{rank}.json").write_text(json.dumps({"rows": rows, "facts": _facts(device)}))


def _group(store: Any, rank: int, size: int, host: str, device: Any) -> Any:
    import torch.distributed as dist

    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=60)
        return dist.ProcessGroupNCCL(dist.PrefixStore("calibrate", store), rank, size, options)
    from moesim.runtime.group import gloo_group

    return gloo_group(dist.PrefixStore("calibrate", store), rank=rank, size=size, timeout_s=60, host=host)


def _facts(device: Any) -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "sms": properties.multi_processor_count, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return facts


if __name__ == "__main__":
    main()
